"""The CPU kernels called one by one and timed, to tell where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from sharelora_serve.kernels.adapted import add_adapters, list_pages
from sharelora_serve.kernels.attention import attend, make_items
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.cpu import CpuKernels, pages_of
from sharelora_serve.kernels.elementwise import silu_and_multiply
from sharelora_serve.kernels.layers import Buffers, LayerWeights
from sharelora_serve.kernels.product import NOTHING_AHEAD, fetches_ahead, product
from sharelora_serve.kernels.reference import Places, ReferenceKernels

PRODUCTS, ADAPTERS, ATTENTION, ELEMENTWISE = "products", "adapters", "attention", "elementwise"


class TimedKernels(CpuKernels):
    """Computes what CpuKernels does.

    is_split    whether the parts of the layers are called, and timed, one by one; else all layers
                are one call, as the server's are, which is not timed
    is_reading  whether a forward pass first reads all weights of the one before: on the engine's
                thread, since where another one has its own team of threads both are slowed down
    reads       seconds that each of these readings took
    seconds     of every part, and `num_steps` of the forward passes, since they were last cleared
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_split = False
        self.is_reading = False
        self.reads: list[float] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_steps = 0
        self._parts = _Parts(self)
        self._weights: dict[str, Any] = {}

    def clear(self) -> None:
        """Count from here on."""
        self.seconds.clear()
        self.num_steps = 0

    def time(self, part: str, run: Callable[..., Any], *arguments: Any) -> None:  # noqa: ANN401
        """Call something, and count how long it takes."""
        self.seconds[part] += _timed(lambda: run(*arguments))

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed: the head."""
        self._weights["head"] = weight
        self.time(PRODUCTS, super().linear, x, weight, out)

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed: once in a step."""
        self.num_steps += 1
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
        rows, to, ahead, borders = x.numpy(), out.numpy(), NOTHING_AHEAD, columns.numpy()
        pages = None if batch is None else pages_of(batch)
        if pages is not None and fetches_ahead(rows, weight):
            ahead = list_pages(pages, entry, borders, x.shape[1])
        self._timed.time(PRODUCTS, product, rows, weight, bias.numpy(), to, ahead)
        if pages is not None:
            self._timed.time(ADAPTERS, add_adapters, rows, to, pages, entry, borders)

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        self._timed.add_and_norm(x, delta, weight, eps, out)

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        self._timed.time(ELEMENTWISE, silu_and_multiply, gate_up.numpy(), out.numpy())

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
