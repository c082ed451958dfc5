"""The CPU kernels called one by one and timed, to tell where a step's time goes."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from sharelora_serve.kernels.adapted import add_adapters, make_pieces
from sharelora_serve.kernels.attention import attend
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.cpu import CpuKernels, stored
from sharelora_serve.kernels.elementwise import add_and_norm, silu_and_multiply
from sharelora_serve.kernels.layers import Buffers, LayerWeights
from sharelora_serve.kernels.product import product

PRODUCTS, ADAPTERS, ATTENTION, ELEMENTWISE = "products", "adapters", "attention", "elementwise"


class TimedKernels(CpuKernels):
    """Computes what CpuKernels does.

    is_split  whether the parts of the layers are called, and timed, one by one; else all layers
              are one call, as the server's are, and count as products
    seconds   of every part, and `num_steps` of the forward passes, since they were last cleared
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_split = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_steps = 0
        self._weights: dict[int, Any] = {}

    def clear(self) -> None:
        """Count from here on."""
        self.seconds.clear()
        self.num_steps = 0

    def read_weights_seconds(self, rounds: int = 15) -> float:
        """Least seconds in which all threads read once what a forward pass multiplies with."""
        weights = [weight.reshape(-1).view(np.uint64) for weight in self._weights.values()]
        return min(_timed(lambda: [_read(weight) for weight in weights]) for _ in range(rounds))

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed: the head, once in a step."""
        self._weights[id(weight)] = weight
        self.num_steps += 1
        self._time(PRODUCTS, super().linear, x, weight, out)

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:  # noqa: ANN401
        """As CpuKernels, timed."""
        self._time(ELEMENTWISE, super().embed, weight, token_ids, out)

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """As CpuKernels, timed."""
        self._time(ELEMENTWISE, super().add_and_norm, x, delta, weight, eps, out)

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """All decoder layers, in one compiled call or part by part."""
        for weight in (weights.qkv, weights.o, weights.gate_up, weights.down):
            self._weights[id(weight)] = weight
        if self.is_split:
            self._split_layers(buffers, weights, kv_cache, attention, adapters)
        else:
            self._time(PRODUCTS, super().layers, buffers, weights, kv_cache, attention, adapters)

    def _split_layers(
        self,
        b: Buffers,
        w: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        keys, values = kv_cache
        eps = np.float32(w.norm_eps)
        where = [
            each.numpy()
            for each in (
                attention.positions,
                attention.row_sequence,
                attention.block_tables,
                attention.tasks,
            )
        ]

        def adapt(x: Tensor, out: Tensor, entry: int, columns: Tensor) -> None:
            if adapters is None:
                return
            pages = (adapters.offsets, adapters.a_pages, adapters.b_pages, adapters.scaling)
            self._time(
                ADAPTERS,
                add_adapters,
                x.numpy(),
                out.numpy(),
                make_pieces(adapters.row_adapter.numpy()),
                *(each.numpy() for each in pages),
                stored(adapters.arena),
                entry,
                columns.numpy(),
            )

        def norm(weight: Tensor) -> None:
            arrays = (b.x.numpy(), b.delta.numpy(), weight.numpy(), eps, b.normed.numpy())
            self._time(ELEMENTWISE, add_and_norm, *arrays)

        def multiply(x: Tensor, weight: Any, bias: Tensor, out: Tensor) -> None:  # noqa: ANN401
            self._time(PRODUCTS, product, x.numpy(), weight, bias.numpy(), out.numpy())

        for layer in range(len(w.windows)):
            entry = 7 * layer
            norm(w.input_norm[layer])
            multiply(b.normed, w.qkv[layer], w.qkv_bias[layer], b.qkv)
            adapt(b.normed, b.qkv, entry, w.qkv_columns)
            self._time(
                ATTENTION,
                attend,
                b.qkv.numpy(),
                w.q_norm[layer].numpy(),
                w.k_norm[layer].numpy(),
                eps,
                w.cosine.numpy(),
                w.sine.numpy(),
                *where,
                w.windows.numpy()[layer],
                keys[layer],
                values[layer],
                b.attended.numpy(),
            )
            multiply(b.attended, w.o[layer], w.o_bias[layer], b.delta)
            adapt(b.attended, b.delta, entry + 3, w.o_columns)
            norm(w.post_norm[layer])
            multiply(b.normed, w.gate_up[layer], w.gate_up_bias[layer], b.gate_up)
            adapt(b.normed, b.gate_up, entry + 4, w.gate_up_columns)
            self._time(ELEMENTWISE, silu_and_multiply, b.gate_up.numpy(), b.inner.numpy())
            multiply(b.inner, w.down[layer], w.down_bias[layer], b.delta)
            adapt(b.inner, b.delta, entry + 6, w.down_columns)

    def _time(self, part: str, run: Callable[..., Any], *arguments: Any) -> None:  # noqa: ANN401
        self.seconds[part] += _timed(lambda: run(*arguments))


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
