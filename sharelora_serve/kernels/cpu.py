"""The kernels of a CPU, compiled by numba. `reference` defines what each computes.

Every row is computed in an order that does not depend on the other rows, so a request's tokens do
not depend on its batch. All layers run in one call that releases the GIL, so a step and the event
loop never wait for each other.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sharelora_serve.kernels.adapted import Pages, make_pieces
from sharelora_serve.kernels.adapted_product import adapted_product, count_later
from sharelora_serve.kernels.attention import attend, make_items
from sharelora_serve.kernels.batch import BLOCK_SIZE, AdapterBatch, AttentionBatch
from sharelora_serve.kernels.elementwise import add_and_norm, add_part, silu_and_multiply
from sharelora_serve.kernels.layers import Buffers, LayerWeights
from sharelora_serve.kernels.matrix import DEPTH, has_matrix_registers
from sharelora_serve.kernels.product import embed, pack, product, unpack
from sharelora_serve.kernels.tiles import LANES
from sharelora_serve.kernels.vector import has_bfloat16_vectors
from sharelora_serve.memory import streamed

NOTHING_ADDED = np.empty((0, 0), np.float32)
"""What adapters add where there are none."""

_NO_BIAS = np.empty(0, np.float32)
_NO_PIECES = np.empty((0, 3), np.int64)
_NO_ROWS = np.empty(0, np.int32)
_NO_OFFSETS = np.empty((0, 0), np.int32)
_NO_SCALING = np.empty(0, np.float32)


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 as it is, faster than other types."""
    return has_matrix_registers() or has_bfloat16_vectors()


def stored(tensor: Tensor) -> Any:
    """The numpy view in which numba sees a tensor's numbers: uint16 is float16, int16 bfloat16."""
    if tensor.dtype == torch.float16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def pages_of(batch: AdapterBatch) -> Pages:
    """What the compiled kernels read of a batch's adapters."""
    return Pages(
        make_pieces(batch.row_adapter.numpy()),
        batch.offsets.numpy(),
        batch.a_pages.numpy(),
        batch.b_pages.numpy(),
        batch.scaling.numpy(),
        stored(batch.arena),
        batch.max_pages,
        numba.get_num_threads(),
    )


@numba.njit(nogil=True, cache=True)
def _layers(
    x: Any,
    delta: Any,
    normed: Any,
    qkv: Any,
    attended: Any,
    gate_up: Any,
    inner: Any,
    input_norm: Any,
    w_qkv: Any,
    qkv_bias: Any,
    qkv_columns: Any,
    q_norm: Any,
    k_norm: Any,
    w_o: Any,
    o_bias: Any,
    o_columns: Any,
    post_norm: Any,
    w_gate_up: Any,
    gate_up_bias: Any,
    gate_up_columns: Any,
    w_down: Any,
    down_bias: Any,
    down_columns: Any,
    windows: Any,
    eps: Any,
    cosine: Any,
    sine: Any,
    keys: Any,
    values: Any,
    positions: Any,
    row_sequence: Any,
    block_tables: Any,
    tasks: Any,
    num_threads: Any,
    pages: Any,
) -> None:
    rows = count_later(x.shape[0], w_qkv[0], pages)
    widest = max(qkv.shape[1], delta.shape[1], gate_up.shape[1])
    added = np.zeros((rows, widest), np.float32)
    items = make_items(tasks, positions, keys.shape[2], num_threads)
    entry = 0
    for layer in range(windows.shape[0]):
        add_and_norm(x, delta, added, input_norm[layer], eps, normed)
        adapted_product(
            normed, w_qkv[layer], qkv_bias[layer], qkv, added, pages, entry, qkv_columns
        )
        attend(
            qkv, added, q_norm[layer], k_norm[layer], eps, cosine, sine,
            positions, row_sequence, block_tables, tasks, items, windows[layer],
            keys[layer], values[layer], attended,
        )  # fmt: skip
        adapted_product(
            attended, w_o[layer], o_bias[layer], delta, added, pages, entry + 3, o_columns
        )
        add_and_norm(x, delta, added, post_norm[layer], eps, normed)
        adapted_product(
            normed,
            w_gate_up[layer],
            gate_up_bias[layer],
            gate_up,
            added,
            pages,
            entry + 4,
            gate_up_columns,
        )
        silu_and_multiply(gate_up, added, inner)
        adapted_product(
            inner, w_down[layer], down_bias[layer], delta, added, pages, entry + 6, down_columns
        )
        entry += 7
    for t in range(rows):
        add_part(delta, added, t, 0, x.shape[1])


class CpuKernels:
    """The kernels that `models` calls, on tensors in CPU memory."""

    name = "cpu"
    block_size = BLOCK_SIZE
    activations = torch.float32

    def __init__(self) -> None:
        # Starts numba's threads. It does so itself when it loads a function that is parallel, but
        # not for one that calls such a function, which would then call into nothing.
        numba.get_num_threads()
        self._factors: Any = None  # what a pool holds, as numba sees it, once it is known

    def make_weights(
        self,
        num_layers: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """As `product` reads them, the layer first."""
        assert device.type == "cpu", "these kernels compute on a CPU"
        inputs: tuple[int, ...] = (in_features, LANES)
        if dtype == torch.bfloat16 and in_features % DEPTH == 0 and has_matrix_registers():
            inputs = (in_features // DEPTH, DEPTH // 2, LANES, 2)
        elif dtype == torch.bfloat16 and in_features % 2 == 0 and has_bfloat16_vectors():
            inputs = (in_features // 2, LANES, 2)
        shape = (num_layers, -(-out_features // LANES), *inputs)
        return stored(streamed(math.prod(shape), dtype).view(shape))

    def pack(self, weight: Tensor, to: Any) -> None:
        """Lay a weight (out, in), in its stored dtype, out for `linear` and `embed`."""
        pack(stored(weight.contiguous()), to)

    def unpack(self, packed: Any, out_features: int, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in) that `pack` laid out, in its stored dtype."""
        return torch.from_numpy(unpack(packed, out_features)).view(dtype)

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """out[:, :out_features] = x W^T; `out` is as wide as whole blocks of outputs."""
        product(x.numpy(), weight, _NO_BIAS, out.numpy())

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = row token_ids[t] of a packed weight."""
        embed(weight, token_ids.numpy(), out.numpy())

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """x += delta; out = root-mean-square norm of x times weight."""
        add_and_norm(
            x.numpy(), delta.numpy(), NOTHING_ADDED, weight.numpy(), np.float32(eps), out.numpy()
        )

    def make_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
        """Keys (layers, blocks, kv_heads, dim, 16), values (..., kv_heads, dim / 16, 16, 16).

        Both in blocks of 16 numbers that a product reads as packed weights. Every page of memory
        is written now: a machine that has too little tells so at the start, and the process does
        not grow under load.
        """
        assert device.type == "cpu", "these kernels compute on a CPU"
        assert BLOCK_SIZE == LANES, "attention reads a block of keys as a block of weights"
        parts = -(-head_dim // LANES)
        shape = (num_layers, num_blocks, num_kv_heads)
        size = math.prod(shape) * parts * LANES * BLOCK_SIZE
        keys = streamed(size, dtype).zero_().view(*shape, parts * LANES, BLOCK_SIZE)
        values = streamed(size, dtype).zero_().view(*shape, parts, BLOCK_SIZE, LANES)
        return stored(keys), stored(values)

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """All decoder layers, in one compiled call."""
        b, w = buffers, weights
        if adapters is None:
            # Of the pool's type, so that the same compiled function serves.
            no_arena = np.empty(0, self._factors or w.qkv.dtype)
            pages = Pages(
                _NO_PIECES,
                _NO_OFFSETS,
                _NO_ROWS,
                _NO_ROWS,
                _NO_SCALING,
                no_arena,
                0,
                numba.get_num_threads(),
            )
        else:
            self._factors = stored(adapters.arena).dtype
            pages = pages_of(adapters)
        _layers(
            b.x.numpy(),
            b.delta.numpy(),
            b.normed.numpy(),
            b.qkv.numpy(),
            b.attended.numpy(),
            b.gate_up.numpy(),
            b.inner.numpy(),
            w.input_norm.numpy(),
            w.qkv,
            w.qkv_bias.numpy(),
            w.qkv_columns.numpy(),
            w.q_norm.numpy(),
            w.k_norm.numpy(),
            w.o,
            w.o_bias.numpy(),
            w.o_columns.numpy(),
            w.post_norm.numpy(),
            w.gate_up,
            w.gate_up_bias.numpy(),
            w.gate_up_columns.numpy(),
            w.down,
            w.down_bias.numpy(),
            w.down_columns.numpy(),
            w.windows.numpy(),
            np.float32(w.norm_eps),
            w.cosine.numpy(),
            w.sine.numpy(),
            *kv_cache,
            attention.positions.numpy(),
            attention.row_sequence.numpy(),
            attention.block_tables.numpy(),
            attention.tasks.numpy(),
            numba.get_num_threads(),
            pages,
        )
