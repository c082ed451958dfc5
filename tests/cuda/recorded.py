"""A CUDA graph on the CPU: what was recorded runs again on the same memory, without Python."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_WAITING = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.item,
)  # for the device, which a graph cannot


class _Recorder(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket not in _WAITING, f"{func} inside of what is recorded"
        results = func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
        self.calls.append((func, args, kwargs, tensors))
        return results


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """See models.graphs.Record."""
    recorder = _Recorder()
    with recorder:
        logits = step()

    def replay() -> Tensor:
        for func, args, kwargs, kept in recorder.calls:
            results = func(*args, **kwargs)
            tensors = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]
            for new, old in zip(tensors, kept, strict=True):
                if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                    old.copy_(new)
        return logits

    return replay
