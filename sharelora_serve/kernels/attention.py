"""Attention over block tables on CPU: rotate, store, attend."""

import math
from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.batch import BLOCK_SIZE
from sharelora_serve.kernels.elementwise import exp, norm_row
from sharelora_serve.kernels.product import add_product, block_product
from sharelora_serve.kernels.tiles import LANES, fetch_lines
from sharelora_serve.kernels.vector import from_float


@numba.njit(nogil=True, fastmath={"contract"})
def _rotate(head: Any, norm: Any, eps: Any, cosine: Any, sine: Any, scale: Any, to: Any) -> None:
    """The rotary embedding of one head, after its norm where the model has one."""
    half = cosine.shape[0]
    if norm.shape[0]:
        norm_row(head, norm, eps, to)
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


@numba.njit(nogil=True, fastmath={"contract", "reassoc", "nnan", "nsz"}, error_model="numpy")
def _softmax(line: Any, low: Any, high: Any) -> None:
    """Softmax of line[low:high] in place, exact zeros elsewhere."""
    seen = line[low:high]
    top = seen[0]
    for j in range(seen.shape[0]):
        top = max(top, seen[j])
    total = np.float32(0)
    for j in range(seen.shape[0]):
        seen[j] = exp(seen[j] - top)
        total += seen[j]
    inverse = np.float32(1) / total
    for j in range(seen.shape[0]):
        seen[j] *= inverse
    line[:low] = np.float32(0)
    line[high:] = np.float32(0)


@numba.njit(nogil=True)
def _scattering_stride(count: Any) -> Any:
    """A step that visits every one of `count` places once, neighbours far apart (golden ratio).

    Every thread takes a run of indices, and the tasks of a long prompt stand side by side.
    """
    stride = max(1, int(count * 0.618))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def attend(
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
    """Rotate q and k, store k and v, attend; as ReferenceKernels.attend."""
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

    num_tasks = tasks.shape[0] * kv_heads
    stride = _scattering_stride(num_tasks)
    for index in numba.prange(num_tasks):
        task = index * stride % num_tasks
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
            size = dim * BLOCK_SIZE
            fetch_lines(values, block * size, size)
            if j + 1 < end:
                fetch_lines(keys, (table[j + 1] * kv_heads + k) * size, size)
            block_product(query, rows, key_blocks, block * size, LANES, dim, scores, column)
        for r in range(rows):
            length = positions[first + r // group] + 1
            start = begin * BLOCK_SIZE
            low = max(0, length - window) - start if window > 0 else -start
            _softmax(scores[r], max(0, low), length - start)
        for j in range(begin, end):
            block = (table[j] * kv_heads + k) * dim_blocks
            column = (j - begin) * BLOCK_SIZE
            for part in range(dim_blocks):
                start = (block + part) * BLOCK_SIZE * LANES
                add_product(
                    scores, column, rows, value_blocks, start, BLOCK_SIZE, total, part * LANES
                )
        for r in range(rows):
            start = (k * group + r % group) * head_dim
            to = out[first + r // group]
            for d in range(head_dim):
                to[start + d] = total[r, d]
