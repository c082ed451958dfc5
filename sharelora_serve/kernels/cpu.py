"""The kernels of a CPU, compiled by numba: everything between the dense products.

Same signatures as `reference`, which defines what each computes. Every row is computed in an
order that does not depend on the other rows, so a request's tokens do not depend on its batch.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sharelora_serve.kernels.batch import BLOCK_SIZE, PAGE_RANK, AdapterBatch, AttentionBatch
from sharelora_serve.kernels.product import add_block_product, block_product, pack, product
from sharelora_serve.kernels.vector import LANES, float_from_bits, from_float, to_float

# error_model="numpy": a division by zero gives infinity or NaN in the row at fault. numba's own
# would raise, and so fail all requests of the batch.

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


def stored(tensor: Tensor) -> Any:
    """The numpy view in which numba sees a tensor's numbers: uint16 is float16, int16 bfloat16."""
    if tensor.dtype == torch.float16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


@numba.njit(nogil=True, inline="always")
def _exp(x: Any) -> Any:
    """e^x in float32 to 2 units in the last place, in a form that vectorises (Cephes expf)."""
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.float32(math.floor(x * _LOG2_E + np.float32(0.5)))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


@numba.njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _norm_row(row: Any, weight: Any, eps: Any, to: Any) -> None:
    total = np.float32(0)
    for i in range(row.shape[0]):
        total += row[i] * row[i]
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(row.shape[0]) + eps))
    for i in range(row.shape[0]):
        to[i] = row[i] * scale * weight[i]


@numba.njit(nogil=True)
def _add_and_norm_row(row: Any, add: Any, weight: Any, eps: Any, to: Any) -> None:
    for i in range(row.shape[0]):
        row[i] += add[i]
    _norm_row(row, weight, eps, to)


@numba.njit(parallel=True, nogil=True, cache=True)
def _add_and_norm(x: Any, delta: Any, weight: Any, eps: Any, out: Any) -> None:
    if x.shape[0] < 4:  # starting threads would cost more than the work
        for t in range(x.shape[0]):
            _add_and_norm_row(x[t], delta[t], weight, eps, out[t])
    else:
        for t in numba.prange(x.shape[0]):
            _add_and_norm_row(x[t], delta[t], weight, eps, out[t])


@numba.njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def _silu_and_multiply_row(gate: Any, up: Any, to: Any) -> None:
    for i in range(to.shape[0]):
        to[i] = gate[i] / (np.float32(1) + _exp(-gate[i])) * up[i]


@numba.njit(parallel=True, nogil=True, cache=True)
def _silu_and_multiply(gate_up: Any, out: Any) -> None:
    inner = out.shape[1]
    if out.shape[0] < 4:
        for t in range(out.shape[0]):
            _silu_and_multiply_row(gate_up[t, :inner], gate_up[t, inner : 2 * inner], out[t])
    else:
        for t in numba.prange(out.shape[0]):
            _silu_and_multiply_row(gate_up[t, :inner], gate_up[t, inner : 2 * inner], out[t])


@numba.njit(nogil=True, fastmath={"contract"})
def _rotate(head: Any, norm: Any, eps: Any, cosine: Any, sine: Any, scale: Any, to: Any) -> None:
    """The rotary embedding of one head, after its norm where the model has one."""
    half = cosine.shape[0]
    if norm.shape[0]:
        _norm_row(head, norm, eps, to)
    else:
        for d in range(head.shape[0]):
            to[d] = head[d]
    for d in range(half):
        first, second = to[d], to[d + half]
        to[d] = (first * cosine[d] - second * sine[d]) * scale
        to[d + half] = (second * cosine[d] + first * sine[d]) * scale


@numba.njit(nogil=True)
def _clear_after(value: Any, at: Any) -> None:
    """Zero what stands behind a sequence's last token in its last block of values.

    It is left over from whoever had the block before, and masked, but zero times infinity is NaN.
    """
    for part in range(value.shape[0]):
        for behind in range(at + 1, BLOCK_SIZE):
            for lane in range(LANES):
                value[part, behind, lane] = 0


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _attend(
    qkv: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    cosine: Any,
    sine: Any,
    positions: Any,
    row_sequence: Any,
    block_tables: Any,
    tasks: Any,
    window: Any,
    keys: Any,
    values: Any,
    out: Any,
) -> None:
    kv_heads, dim = keys.shape[1], keys.shape[2]
    head_dim = 2 * cosine.shape[1]
    heads = out.shape[1] // head_dim
    group = heads // kv_heads
    dim_blocks = dim // LANES
    scale = np.float32(1) / np.float32(math.sqrt(np.float32(head_dim)))
    key_blocks = keys.reshape(-1, dim, LANES)
    value_blocks = values.reshape(-1, BLOCK_SIZE, LANES)

    # All keys and values of the step are stored before any row attends: rows of a chunk see
    # those before them.
    for task in numba.prange(tasks.shape[0] * kv_heads):
        first, count, k = tasks[task // kv_heads, 0], tasks[task // kv_heads, 1], task % kv_heads
        rotated = np.empty(head_dim, np.float32)
        for t in range(first, first + count):
            here = positions[t]
            block = block_tables[row_sequence[t], here // BLOCK_SIZE]
            at = here % BLOCK_SIZE
            start = (heads + k) * head_dim
            _rotate(
                qkv[t, start : start + head_dim],
                k_norm,
                eps,
                cosine[here],
                sine[here],
                np.float32(1),
                rotated,
            )
            key = keys[block, k]
            for d in range(head_dim):
                key[d, at] = from_float(rotated[d], key[d, at])
            start = (heads + kv_heads + k) * head_dim
            value = values[block, k]
            for d in range(head_dim):
                old = value[d // LANES, at, d % LANES]
                value[d // LANES, at, d % LANES] = from_float(qkv[t, start + d], old)
            if t + 1 == positions.shape[0] or row_sequence[t + 1] != row_sequence[t]:
                _clear_after(value, at)

    for task in numba.prange(tasks.shape[0] * kv_heads):
        first, count, k = tasks[task // kv_heads, 0], tasks[task // kv_heads, 1], task % kv_heads
        table = block_tables[row_sequence[first]]
        rows = count * group
        begin = 0
        if window > 0:
            begin = max(0, positions[first] + 1 - window) // BLOCK_SIZE
        end = positions[first + count - 1] // BLOCK_SIZE + 1
        query = np.zeros((rows, dim), np.float32)
        scores = np.empty((rows, (end - begin) * BLOCK_SIZE), np.float32)
        total = np.zeros((rows, dim), np.float32)
        for t in range(count):
            here = positions[first + t]
            for g in range(group):
                start = (k * group + g) * head_dim
                _rotate(
                    qkv[first + t, start : start + head_dim],
                    q_norm,
                    eps,
                    cosine[here],
                    sine[here],
                    scale,
                    query[t * group + g, :head_dim],
                )
        for j in range(begin, end):
            block = table[j] * kv_heads + k
            column = (j - begin) * BLOCK_SIZE
            block_product(query, 0, 0, rows, key_blocks, block, scores, column)
        for r in range(rows):
            length = positions[first + r // group] + 1
            start = begin * BLOCK_SIZE
            low = max(0, length - window) - start if window > 0 else -start
            _softmax(scores[r], max(0, low), length - start)
        for j in range(begin, end):
            block = (table[j] * kv_heads + k) * dim_blocks
            column = (j - begin) * BLOCK_SIZE
            for part in range(dim_blocks):
                add_block_product(
                    scores, 0, column, rows, value_blocks, block + part, total, part * LANES
                )
        for r in range(rows):
            start = (k * group + r % group) * head_dim
            to = out[first + r // group]
            for d in range(head_dim):
                to[start + d] = total[r, d]


@numba.njit(nogil=True, fastmath={"contract", "reassoc", "nnan", "nsz"}, error_model="numpy")
def _softmax(line: Any, low: Any, high: Any) -> None:
    """Softmax of line[low:high] in place, exact zeros elsewhere."""
    seen = line[low:high]
    top = seen[0]
    for j in range(seen.shape[0]):
        top = max(top, seen[j])
    total = np.float32(0)
    for j in range(seen.shape[0]):
        seen[j] = _exp(seen[j] - top)
        total += seen[j]
    inverse = np.float32(1) / total
    for j in range(seen.shape[0]):
        seen[j] *= inverse
    line[:low] = np.float32(0)
    line[high:] = np.float32(0)


@numba.njit(nogil=True, fastmath={"contract", "reassoc"})
def _shrink_page(row: Any, page: Any, hidden: Any) -> None:
    """hidden[r] = page[r] . row for the 8 rank rows of a page of A."""
    a0, a1, a2, a3 = page[0], page[1], page[2], page[3]
    a4, a5, a6, a7 = page[4], page[5], page[6], page[7]
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    for i in range(row.shape[0]):
        x = row[i]
        s0 += x * to_float(a0[i])
        s1 += x * to_float(a1[i])
        s2 += x * to_float(a2[i])
        s3 += x * to_float(a3[i])
        s4 += x * to_float(a4[i])
        s5 += x * to_float(a5[i])
        s6 += x * to_float(a6[i])
        s7 += x * to_float(a7[i])
    hidden[0], hidden[1], hidden[2], hidden[3] = s0, s1, s2, s3
    hidden[4], hidden[5], hidden[6], hidden[7] = s4, s5, s6, s7


@numba.njit(nogil=True, fastmath={"contract", "reassoc"})
def _expand_page(hidden: Any, page: Any, to: Any) -> None:
    """to += hidden[r] * page[r], summed over the 8 rank rows of a page of B."""
    b0, b1, b2, b3 = page[0], page[1], page[2], page[3]
    b4, b5, b6, b7 = page[4], page[5], page[6], page[7]
    h0, h1, h2, h3 = hidden[0], hidden[1], hidden[2], hidden[3]
    h4, h5, h6, h7 = hidden[4], hidden[5], hidden[6], hidden[7]
    for i in range(to.shape[0]):
        to[i] += (
            h0 * to_float(b0[i])
            + h1 * to_float(b1[i])
            + h2 * to_float(b2[i])
            + h3 * to_float(b3[i])
            + h4 * to_float(b4[i])
            + h5 * to_float(b5[i])
            + h6 * to_float(b6[i])
            + h7 * to_float(b7[i])
        )


@numba.njit(parallel=True, nogil=True, cache=True)
def _add_adapters(
    x: Any,
    out: Any,
    row_adapter: Any,
    offsets: Any,
    a_pages: Any,
    b_pages: Any,
    scaling: Any,
    arena: Any,
    modules: Any,
) -> None:
    width = x.shape[1]
    for task in numba.prange(x.shape[0] * modules.shape[0]):
        t = task // modules.shape[0]
        entry, column, features = modules[task % modules.shape[0]]
        begin = offsets[row_adapter[t], entry]
        end = offsets[row_adapter[t], entry + 1]
        if begin == end:
            continue
        hidden = np.empty(PAGE_RANK, np.float32)
        to = out[t, column : column + features]
        for p in range(begin, end):
            start = np.int64(a_pages[p]) * PAGE_RANK * width
            page = arena[start : start + PAGE_RANK * width].reshape(PAGE_RANK, width)
            _shrink_page(x[t], page, hidden)
            for r in range(PAGE_RANK):
                hidden[r] *= scaling[p]
            start = np.int64(b_pages[p]) * PAGE_RANK * features
            page = arena[start : start + PAGE_RANK * features].reshape(PAGE_RANK, features)
            _expand_page(hidden, page, to)


@numba.njit(nogil=True, cache=True)
def _embed(weight: Any, token_ids: Any, out: Any) -> None:
    for t in range(token_ids.shape[0]):
        block, lane = token_ids[t] // LANES, token_ids[t] % LANES
        for i in range(out.shape[1]):
            out[t, i] = to_float(weight[block, i, lane])


class CpuKernels:
    """The kernels that `models` calls, on tensors in CPU memory."""

    name = "cpu"

    def pack(self, weight: Tensor) -> Any:
        """Lay a weight (out, in), in its stored dtype, out for `linear` and `embed`."""
        return pack(stored(weight.contiguous()))

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """out[:, :out_features] = x W^T + bias; `out` is as wide as whole blocks of outputs."""
        product(x.numpy(), weight, out.numpy())
        if bias is not None:
            out[:, : bias.shape[0]] += bias

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = row token_ids[t] of a packed weight."""
        _embed(weight, token_ids.numpy(), out.numpy())

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """x += delta; out = root-mean-square norm of x times weight."""
        _add_and_norm(x.numpy(), delta.numpy(), weight.numpy(), np.float32(eps), out.numpy())

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up, the two halves of gate_up."""
        _silu_and_multiply(gate_up.numpy(), out.numpy())

    def make_kv_cache(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
        """One layer's keys (blocks, kv_heads, dim, 16) and values (blocks, kv_heads, dim / 16, 16, 16).

        Both in blocks of 16 numbers that a product reads as packed weights; zeros, because what
        is masked is still multiplied, by zero.
        """
        dim_blocks = -(-head_dim // LANES)
        keys = torch.zeros(
            num_blocks, num_kv_heads, dim_blocks * LANES, BLOCK_SIZE, dtype=dtype, device=device
        )
        values = torch.zeros(
            num_blocks, num_kv_heads, dim_blocks, BLOCK_SIZE, LANES, dtype=dtype, device=device
        )
        return stored(keys), stored(values)

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cosine: Tensor,
        sine: Tensor,
        batch: AttentionBatch,
        window: int,
        keys: Any,
        values: Any,
        out: Tensor,
    ) -> None:
        """Rotate q and k, store k and v, attend causally over each row's own blocks."""
        _attend(
            qkv.numpy(),
            q_norm.numpy(),
            k_norm.numpy(),
            np.float32(eps),
            cosine.numpy(),
            sine.numpy(),
            batch.positions.numpy(),
            batch.row_sequence.numpy(),
            batch.block_tables.numpy(),
            batch.tasks.numpy(),
            window,
            keys,
            values,
            out.numpy(),
        )

    def add_adapters(self, x: Tensor, out: Tensor, batch: AdapterBatch, modules: Tensor) -> None:
        """out[t, module] += scaling * B A x[t], every row with its own pages."""
        _add_adapters(
            x.numpy(),
            out.numpy(),
            batch.row_adapter.numpy(),
            batch.offsets.numpy(),
            batch.a_pages.numpy(),
            batch.b_pages.numpy(),
            batch.scaling.numpy(),
            stored(batch.arena),
            modules.numpy(),
        )
