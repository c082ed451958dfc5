"""The CPU kernels called one by one and timed, to tell where a step's time goes."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from sharelora_serve.kernels.adapted_product import adapted_product, apply_adapters, count_later
from sharelora_serve.kernels.attention import attend, make_items
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.cpu import NOTHING_ADDED, CpuKernels, pages_of
from sharelora_serve.kernels.elementwise import silu_and_multiply
from sharelora_serve.kernels.layers import Buffers, LayerWeights
from sharelora_serve.kernels.product import product
from sharelora_serve.kernels.reference import Places, ReferenceKernels

PRODUCTS, ADAPTERS, ATTENTION, ELEMENTWISE = "products", "adapters", "attention", "elementwise"
_HEAD, _TOGETHER = "head", "products together with adapters"


class TimedKernels(CpuKernels):
    """Computes what CpuKernels does.

    Products and adapters are computed in turn with each other. So in every other step that is split
    they are timed together, and in the others the products alone: the adapters take the difference.

    is_split    whether the parts of the layers are called, and timed, one by one; else all layers
                are one call, as the server's are, which is not timed
    is_reading  whether a forward pass first reads all weights of the one before: on the engine's
                thread, since where another one has its own team of threads both are slowed down
    reads       seconds that each of these readings took
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_split = False
        self.is_reading = False
        self.reads: list[float] = []
        self._steps: list[dict[str, float]] = []  # seconds of each part
        self._parts = _Parts(self)
        self._weights: dict[str, Any] = {}

    @property
    def num_steps(self) -> int:
        """Forward passes since `clear`."""
        return len(self._steps)

    @property
    def times_together(self) -> bool:
        """Whether this step's products are timed together with the adapters."""
        return self.num_steps % 2 == 0

    def clear(self) -> None:
        """Count from here on."""
        self._steps.clear()

    def milliseconds(self) -> dict[str, float]:
        """The median of each part that was timed since `clear`."""
        times: dict[str, list[float]] = {}
        for step in self._steps:
            for part, seconds in step.items():
                times.setdefault(part, []).append(1000 * seconds)
        parts = {part: statistics.median(values) for part, values in times.items()}
        head, together = parts.pop(_HEAD, 0.0), parts.pop(_TOGETHER, None)
        if together is not None:
            parts[ADAPTERS] = together - parts.get(PRODUCTS, 0.0)
        parts[PRODUCTS] = head + parts.get(PRODUCTS, 0.0)
        return parts

    def time(self, part: str, run: Callable[..., Any], *arguments: Any) -> None:  # noqa: ANN401
        """Call something, and count how long it takes."""
        step = self._steps[-1]
        step[part] = step.get(part, 0.0) + _timed(lambda: run(*arguments))

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed: the head."""
        self._weights["head"] = weight
        self.time(_HEAD, super().linear, x, weight, out)

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed: once in a step."""
        self._steps.append({})
        if self.is_reading:
            weights = [weight.reshape(-1).view(np.uint64) for weight in self._weights.values()]
            self.reads.append(_timed(lambda: [_read(weight) for weight in weights]))
        self.time(ELEMENTWISE, super().embed, weight, token_ids, out)

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """As CpuKernels, timed."""
        self.time(ELEMENTWISE, super().add_and_norm, x, delta, weight, eps, out)

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """All decoder layers, in one compiled call or part by part."""
        for name in ("qkv", "o", "gate_up", "down"):
            self._weights[name] = getattr(weights, name)
        layers = self._parts.layers if self.is_split else super().layers
        layers(buffers, weights, kv_cache, attention, adapters)


class _Parts(ReferenceKernels):
    """The layers as ReferenceKernels has them, of compiled kernels."""

    def __init__(self, timed: TimedKernels) -> None:
        self._timed = timed

    def adapted_linear(
        self,
        x: Tensor,
        weight: Any,  # noqa: ANN401
        bias: Tensor,
        out: Tensor,
        batch: AdapterBatch | None,
        entry: int,
        columns: Tensor,
    ) -> None:
        product_arguments = x.numpy(), weight, bias.numpy(), out.numpy()
        if batch is None:
            self._timed.time(PRODUCTS, product, *product_arguments)
            return
        pages = pages_of(batch)
        of_adapters = pages, entry, columns.numpy()
        if self._timed.times_together:
            rows = count_later(x.shape[0], weight, pages)
            added = np.zeros((rows, out.shape[1]), np.float32)
            self._timed.time(_TOGETHER, adapted_product, *product_arguments, added, *of_adapters)
            if rows:
                self._timed.time(_TOGETHER, np.add, out.numpy(), added, out.numpy())
        else:
            self._timed.time(PRODUCTS, product, *product_arguments)
            apply_adapters(x.numpy(), out.numpy(), *of_adapters)

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        self._timed.add_and_norm(x, delta, weight, eps, out)

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        arguments = gate_up.numpy(), NOTHING_ADDED, out.numpy()
        self._timed.time(ELEMENTWISE, silu_and_multiply, *arguments)

    def locate(self, batch: AttentionBatch, cosine: Tensor, sine: Tensor) -> Places:
        """The compiled kernel looks the angles up itself."""
        return Places(batch, cosine, sine)

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        places: Places,
        window: int,
        keys: Any,  # noqa: ANN401
        values: Any,  # noqa: ANN401
        out: Tensor,
    ) -> Tensor:
        batch: AttentionBatch = places.rows
        positions, tasks = batch.positions.numpy(), batch.tasks.numpy()
        self._timed.time(
            ATTENTION,
            attend,
            qkv.numpy(),
            NOTHING_ADDED,
            q_norm.numpy(),
            k_norm.numpy(),
            np.float32(eps),
            places.cosine.numpy(),
            places.sine.numpy(),
            positions,
            batch.row_sequence.numpy(),
            batch.block_tables.numpy(),
            tasks,
            make_items(tasks, positions, keys.shape[1], numba.get_num_threads()),
            np.int64(window),
            keys,
            values,
            out.numpy(),
        )
        return out


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@numba.njit(parallel=True, nogil=True, cache=True)
def _read(words: Any) -> Any:  # noqa: ANN401
    """The sum of all words, so that every one of them is read."""
    total = np.uint64(0)
    for i in numba.prange(words.shape[0]):
        total += words[i]
    return total
