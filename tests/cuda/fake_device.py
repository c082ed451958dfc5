"""A CUDA device that stores nothing: shapes, types and places are checked, nothing is computed.

What is on the CPU stays real. A tensor on "cuda" is one of torch's fake tensors: an operation that
mixes devices or shapes, or multiplies two types, fails as on a GPU, and so does one that torch has
no meta function for. Values that are read back are made up: ones.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# The meta functions of these take what the kernels refuse.
_OF_ONE_TYPE = (
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
)
_CPU, _CUDA, _NUM_DEVICE_TYPES = 0, 1, 21  # c10::DeviceType


class _WithoutDriver(FakeTensorMode):
    """Never tries to make a real tensor on the device, whatever torch.cuda says of one."""

    avoid_device_init = True


class _OnlyCudaIsFake(TorchDispatchMode):
    """Keeps what is on the CPU from the fake mode below it, and makes up what is read back."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = torch.device("cuda", 0)  # what is nowhere has no current device
        if func.namespace == "aten":
            with self:  # inference mode hands over what is made of others undecomposed
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        fakes = [
            leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)
        ]
        if not fakes and (device is None or torch.device(device).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func.overloadpacket in _OF_ONE_TYPE:
            is_widening = "out_dtype" in str(func._schema)  # then `out` alone is of another type
            operands = fakes[:2] if is_widening else fakes
            dtypes = {fake.dtype for fake in operands if fake.is_floating_point()}
            if len(dtypes) > 1:
                raise TypeError(f"{func} of {dtypes}")
        return func(*args, **kwargs)


@contextmanager
def _device_guard() -> Iterator[None]:
    """Let torch's bindings enter "cuda", for which a build without CUDA knows no way."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _NUM_DEVICE_TYPES).in_dll(
        c10, "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = guards[_CUDA]
    guards[_CUDA] = guards[_CPU]
    try:
        yield
    finally:
        guards[_CUDA] = before


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let this thread make tensors on "cuda", and every thread use them; there need be none."""
    with _device_guard(), _WithoutDriver(allow_non_fake_inputs=True), _OnlyCudaIsFake():
        yield
