"""Attention over block tables on CPU: rotate, store, attend."""

import math
from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.batch import BLOCK_SIZE
from sharelora_serve.kernels.elementwise import add_part, exp, norm_row
from sharelora_serve.kernels.product import NOTHING_AHEAD, add_product, block_product
from sharelora_serve.kernels.tiles import LANES, STRETCH
from sharelora_serve.kernels.vector import from_float

_SHARES = 4
"""Of a thread: a row that is no more than one of them of a step's work is one thread's."""


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


@numba.njit(nogil=True)
def _is_alone(first: Any, count: Any, row_sequence: Any) -> Any:
    """Whether these rows are all that their sequence has in the step."""
    sequence, end = row_sequence[first], first + count
    return (first == 0 or row_sequence[first - 1] != sequence) and (
        end == row_sequence.shape[0] or row_sequence[end] != sequence
    )


@numba.njit(nogil=True)
def make_items(tasks: Any, positions: Any, kv_heads: Any, num_threads: Any) -> Any:
    """What `attend` does, in the order of its threads, each of which does a run of items.

    (num_items, 5) of first row, number of rows, first kv head, end of those, and whether its
    thread does the next item too. There is one for each kv head of a task, but one for all where a
    single row is a small part of the work: its blocks, in which the heads stand side by side, are
    then read as they stand.
    """
    num_tasks, shares = tasks.shape[0], _SHARES * num_threads
    total = 0
    for task in range(num_tasks):
        first, count = tasks[task, 0], tasks[task, 1]
        total += count * (positions[first + count - 1] + 1)
    items = np.empty((num_tasks * kv_heads, 4), np.int64)
    num_items = 0
    for task in range(num_tasks):
        first, count = tasks[task, 0], tasks[task, 1]
        is_small = count == 1 and shares * (positions[first] + 1) <= total
        heads = kv_heads if is_small else 1
        for head in range(0, kv_heads, heads):
            items[num_items, 0], items[num_items, 1] = first, count
            items[num_items, 2], items[num_items, 3] = head, head + heads
            num_items += 1
    stride = _scattering_stride(num_items)
    scattered = np.empty((num_items, 5), np.int64)
    for index in range(num_items):
        scattered[index, :4] = items[index * stride % num_items]
        thread = index * num_threads // num_items
        scattered[index, 4] = (index + 1) * num_threads // num_items == thread
    return scattered


@numba.njit(nogil=True)
def _visible_blocks(item: Any, positions: Any, window: Any) -> Any:
    """Which of its sequence's blocks an item reads: the first, and the end."""
    first, last = positions[item[0]], positions[item[0] + item[1] - 1]
    begin = max(0, first + 1 - window) // BLOCK_SIZE if window > 0 else 0
    return begin, last // BLOCK_SIZE + 1


@numba.njit(nogil=True)
def list_blocks(
    item: Any,
    positions: Any,
    row_sequence: Any,
    block_tables: Any,
    window: Any,
    keys: Any,
    values: Any,
) -> Any:
    """Addresses of the keys and values that an item reads, STRETCH bytes after STRETCH bytes.

    (num_stretches,) int64, block by block.
    """
    table = block_tables[row_sequence[item[0]]]
    begin, end = _visible_blocks(item, positions, window)
    head_size = keys[0, 0].size * keys.itemsize
    each = -(-(item[3] - item[2]) * head_size // STRETCH)
    listed = np.empty((end - begin, each, 2), np.int64)
    for j in range(begin, end):
        start = (np.int64(table[j]) * keys.shape[1] + item[2]) * head_size
        for number in range(each):
            listed[j - begin, number, 0] = keys.ctypes.data + start + number * STRETCH
            listed[j - begin, number, 1] = values.ctypes.data + start + number * STRETCH
    return listed.reshape(-1)


@numba.njit(nogil=True)
def _store(
    qkv: Any,
    more: Any,
    first: Any,
    count: Any,
    head: Any,
    heads: Any,
    k_norm: Any,
    eps: Any,
    cosine: Any,
    sine: Any,
    positions: Any,
    row_sequence: Any,
    block_tables: Any,
    keys: Any,
    values: Any,
) -> None:
    """Rotate and store what these rows have for one kv head; `heads` are those of the queries."""
    kv_heads, head_dim = keys.shape[1], 2 * cosine.shape[1]
    rotated = np.empty(head_dim, np.float32)
    for t in range(first, first + count):
        here = positions[t]
        block = block_tables[row_sequence[t], here // BLOCK_SIZE]
        at = here % BLOCK_SIZE
        start = (heads + head) * head_dim
        add_part(qkv, more, t, start, start + head_dim)
        given = qkv[t, start : start + head_dim]
        _rotate(given, k_norm, eps, cosine[here], sine[here], np.float32(1), rotated)
        key = keys[block, head]
        for d in range(head_dim):
            key[d, at] = from_float(rotated[d], key[d, at])
        start = (heads + kv_heads + head) * head_dim
        add_part(qkv, more, t, start, start + head_dim)
        value = values[block, head]
        for d in range(head_dim):
            old = value[d // LANES, at, d % LANES]
            value[d // LANES, at, d % LANES] = from_float(qkv[t, start + d], old)


@numba.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def attend(
    qkv: Any,
    more: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    cosine: Any,
    sine: Any,
    positions: Any,
    row_sequence: Any,
    block_tables: Any,
    tasks: Any,
    items: Any,
    window: Any,
    keys: Any,
    values: Any,
    out: Any,
) -> None:
    """qkv += more; rotate q and k, store k and v, attend; as ReferenceKernels.attend.

    `more` is as in `add_and_norm`.
    """
    kv_heads, dim = keys.shape[1], keys.shape[2]
    head_dim = 2 * cosine.shape[1]
    heads = out.shape[1] // head_dim
    group = heads // kv_heads
    dim_blocks = dim // LANES
    scale = np.float32(1) / np.float32(math.sqrt(np.float32(head_dim)))
    key_blocks = keys.reshape(-1, dim, LANES)
    value_blocks = values.reshape(-1, BLOCK_SIZE, LANES)
    size = dim * BLOCK_SIZE

    # Rows of a chunk see those before them, so a chunk of several tasks is stored before any row
    # of it attends.
    is_cut = False
    for task in range(tasks.shape[0]):
        is_cut |= not _is_alone(tasks[task, 0], tasks[task, 1], row_sequence)
    if is_cut:
        for index in numba.prange(tasks.shape[0] * kv_heads):
            first, count = tasks[index // kv_heads, 0], tasks[index // kv_heads, 1]
            if not _is_alone(first, count, row_sequence):
                _store(
                    qkv, more, first, count, index % kv_heads, heads, k_norm, eps, cosine, sine,
                    positions, row_sequence, block_tables, keys, values,
                )  # fmt: skip

    for index in numba.prange(items.shape[0]):
        item = items[index]
        first, count, low_head, high_head = item[0], item[1], item[2], item[3]
        if _is_alone(first, count, row_sequence):
            for k in range(low_head, high_head):
                _store(
                    qkv, more, first, count, k, heads, k_norm, eps, cosine, sine,
                    positions, row_sequence, block_tables, keys, values,
                )  # fmt: skip
        table = block_tables[row_sequence[first]]
        rows, num_heads = count * group, high_head - low_head
        begin, end = _visible_blocks(item, positions, window)
        query = np.zeros((num_heads, rows, dim), np.float32)
        scores = np.empty((num_heads, rows, (end - begin) * BLOCK_SIZE), np.float32)
        total = np.zeros((num_heads, rows, dim), np.float32)
        for h in range(num_heads):
            for r in range(rows):
                t, g = first + r // group, r % group
                here, start = positions[t], ((low_head + h) * group + g) * head_dim
                add_part(qkv, more, t, start, start + head_dim)
                given, rotated = qkv[t, start : start + head_dim], query[h, r, :head_dim]
                _rotate(given, q_norm, eps, cosine[here], sine[here], scale, rotated)
        # Arithmetic hides memory: the products of scores fetch what the thread reads next.
        ahead = NOTHING_AHEAD
        if item[4]:
            ahead = list_blocks(
                items[index + 1], positions, row_sequence, block_tables, window, keys, values
            )
        shares = (end - begin) * num_heads
        for j in range(begin, end):
            column = (j - begin) * BLOCK_SIZE
            for h in range(num_heads):
                start = (table[j] * kv_heads + low_head + h) * size
                share = ahead.shape[0] * ((j - begin) * num_heads + h)
                listed = ahead[share // shares : (share + ahead.shape[0]) // shares]
                block_product(
                    query[h], rows, key_blocks, start, LANES, dim, scores[h], column, listed
                )
        for h in range(num_heads):
            for r in range(rows):
                length = positions[first + r // group] + 1
                start = begin * BLOCK_SIZE
                low = max(0, length - window) - start if window > 0 else -start
                _softmax(scores[h, r], max(0, low), length - start)
        for j in range(begin, end):
            column = (j - begin) * BLOCK_SIZE
            for h in range(num_heads):
                block = (table[j] * kv_heads + low_head + h) * dim_blocks
                for part in range(dim_blocks):
                    start = (block + part) * BLOCK_SIZE * LANES
                    if positions[first] + 1 >= (j + 1) * BLOCK_SIZE:
                        add_product(
                            scores[h], column, rows, value_blocks, start, BLOCK_SIZE, total[h],
                            part * LANES,
                        )  # fmt: skip
                        continue
                    # What a row does not see may be infinite, and zero times that is NaN.
                    for row in range(0, rows, group):
                        seen = positions[first + row // group] + 1 - j * BLOCK_SIZE
                        add_product(
                            scores[h, row:], column, group, value_blocks, start,
                            max(0, min(seen, BLOCK_SIZE)), total[h, row:], part * LANES,
                        )  # fmt: skip
        for h in range(num_heads):
            for r in range(rows):
                start = ((low_head + h) * group + r % group) * head_dim
                to = out[first + r // group]
                for d in range(head_dim):
                    to[start + d] = total[h, r, d]
