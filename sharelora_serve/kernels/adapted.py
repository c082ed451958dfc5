"""Linear layers whose rows have adapters of their own, on CPU: y = x W^T + s (x A^T) B^T.

Rows of one adapter that stand together are cut into pieces. First every piece is shrunk to its
rank; then each block of outputs is computed, for all rows, and expanded on while it is in the
cache. The product is bound by arithmetic and B by memory, so the product fetches on its way the
lines of B that the next block will read.
"""

from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.batch import PAGE_RANK
from sharelora_serve.kernels.product import (
    MEDIUM,
    TALL,
    WIDE,
    add_bias,
    add_product,
    block_product,
    wide_product,
)
from sharelora_serve.kernels.vector import (
    LANES,
    PREFETCH_EVERY,
    make_dot_tile,
    make_gathered_tile,
    make_product_tile,
    to_float,
)

_PIECE_ROWS = 8  # few enough that one long prompt occupies every core, enough to reuse B

_tall_fetching = make_product_tile(TALL, WIDE, accumulate=False, prefetch=True)
_medium_fetching = make_product_tile(MEDIUM, WIDE, accumulate=False, prefetch=True)
_one_fetching = make_product_tile(1, WIDE, accumulate=False, prefetch=True)
_two_fetching = make_product_tile(2, WIDE, accumulate=False, prefetch=True)
_dot_three = make_dot_tile(3)
_dot_two = make_dot_tile(2)
_dot_one = make_dot_tile(1)
_expand_four = make_gathered_tile(4, PAGE_RANK)
_expand_one = make_gathered_tile(1, PAGE_RANK)


@numba.njit(nogil=True)
def make_pieces(row_adapter: Any) -> Any:
    """(num_pieces, 3) of first row, number of rows, adapter; rows without one are in none."""
    rows = row_adapter.shape[0]
    pieces = np.empty((rows, 3), np.int64)
    num_pieces = 0
    row = 0
    while row < rows:
        end = row + 1
        while end < rows and end - row < _PIECE_ROWS and row_adapter[end] == row_adapter[row]:
            end += 1
        if row_adapter[row] > 0:
            pieces[num_pieces, 0], pieces[num_pieces, 1] = row, end - row
            pieces[num_pieces, 2] = row_adapter[row]
            num_pieces += 1
        row = end
    return pieces[:num_pieces]


@numba.njit(nogil=True)
def count_most_pages(offsets: Any) -> Any:
    """The most pages that any adapter of the batch has in any entry."""
    most = 0
    for adapter in range(offsets.shape[0]):
        for entry in range(offsets.shape[1] - 1):
            most = max(most, offsets[adapter, entry + 1] - offsets[adapter, entry])
    return most


@numba.njit(nogil=True)
def _shrink(
    x: Any, first: Any, count: Any, page: Any, scale: Any, arena: Any, hidden: Any, column: Any
) -> None:
    """hidden[first:first + count, column:column + 8] = scale * x A^T for one page of A."""
    width = x.shape[1]
    for rank in range(PAGE_RANK):
        start = (page * PAGE_RANK + rank) * width
        row, end = first, first + count
        while end - row >= 3:
            _dot_three(x, row, arena, start, width, hidden, row, column + rank)
            row += 3
        if end - row == 2:
            _dot_two(x, row, arena, start, width, hidden, row, column + rank)
        elif end - row == 1:
            _dot_one(x, row, arena, start, width, hidden, row, column + rank)
    for t in range(first, first + count):
        for rank in range(PAGE_RANK):
            hidden[t, column + rank] *= scale


@numba.njit(nogil=True)
def _fetching_product(
    x: Any,
    weight: Any,
    block: Any,
    out: Any,
    arena: Any,
    work: Any,
    first: Any,
    last: Any,
    offset: Any,
    width: Any,
) -> None:
    """As wide_product, and fetch rank rows first to last of the work at `offset` on the way."""
    rows, row, depth = x.shape[0], 0, weight.shape[1]
    start, column = block * depth * LANES, block * LANES
    num_tiles = rows // TALL + (rows % TALL) // MEDIUM + (rows % TALL % MEDIUM + 1) // 2
    share = min(-(-(last - first) // num_tiles), depth // PREFETCH_EVERY)
    while row < rows:
        count = min(share, last - first)
        if rows - row >= TALL:
            _tall_fetching(
                x, row, 0, weight, start, LANES, depth, out, row, column,
                arena, work, first, count, offset, width,
            )  # fmt: skip
            row += TALL
        elif rows - row >= MEDIUM:
            _medium_fetching(
                x, row, 0, weight, start, LANES, depth, out, row, column,
                arena, work, first, count, offset, width,
            )  # fmt: skip
            row += MEDIUM
        elif rows - row >= 2:
            _two_fetching(
                x, row, 0, weight, start, LANES, depth, out, row, column,
                arena, work, first, count, offset, width,
            )  # fmt: skip
            row += 2
        else:
            _one_fetching(
                x, row, 0, weight, start, LANES, depth, out, row, column,
                arena, work, first, count, offset, width,
            )  # fmt: skip
            row += 1
        first += count


@numba.njit(nogil=True)
def _list_work(
    pieces: Any, offsets: Any, b_pages: Any, entry: Any, columns: Any, num_slots: Any
) -> Any:
    """What is to be expanded, for each module: (num_modules, num_items, 3) and the item counts.

    An item is (row, its place in `hidden`, where its page of B begins). First the first pages of
    all rows, then the second ones and so on, so that neighbouring items are of different rows.
    """
    num_modules = columns.shape[0] - 1
    num_rows = 0
    for piece in range(pieces.shape[0]):
        num_rows += pieces[piece, 1]
    work = np.empty((num_modules, num_rows * num_slots // PAGE_RANK, 3), np.int64)
    counts = np.zeros(num_modules, np.int64)
    for module in range(num_modules):
        width = columns[module + 1] - columns[module]
        count = 0
        for p in range(num_slots // PAGE_RANK):
            for piece in range(pieces.shape[0]):
                begin = offsets[pieces[piece, 2], entry + module]
                if begin + p >= offsets[pieces[piece, 2], entry + module + 1]:
                    continue
                start = np.int64(b_pages[begin + p]) * PAGE_RANK * width
                for row in range(pieces[piece, 0], pieces[piece, 0] + pieces[piece, 1]):
                    work[module, count, 0] = row
                    work[module, count, 1] = module * num_slots + p * PAGE_RANK
                    work[module, count, 2] = start
                    count += 1
        counts[module] = count
    return work, counts


@numba.njit(nogil=True)
def _expand(
    hidden: Any,
    arena: Any,
    width: Any,
    begin: Any,
    work: Any,
    count: Any,
    out: Any,
    column: Any,
    num_columns: Any,
) -> None:
    """out[row, column:column + num_columns] += hidden[row] times its page of B, for each item.

    begin  the module's output at `column`; LANES columns are the fast case
    """
    if num_columns == LANES:
        item = 0
        while item < count:
            row, last = work[item, 0], work[min(item + 3, count - 1), 0]
            if last - row == 3 and work[item, 2] == work[item + 3, 2]:  # one page for all four
                add_product(
                    hidden, row, work[item, 1], 4, arena, work[item, 2] + begin, width, PAGE_RANK,
                    out, row, column,
                )  # fmt: skip
                item += 4
            elif item + 3 < count and row < work[item + 1, 0] < work[item + 2, 0] < last:
                _expand_four(hidden, arena, width, out, column, begin, work, item)
                item += 4
            else:
                _expand_one(hidden, arena, width, out, column, begin, work, item)
                item += 1
        return
    for item in range(count):
        row, slot, start = work[item, 0], work[item, 1], work[item, 2] + begin
        for rank in range(PAGE_RANK):
            for n in range(num_columns):
                factor = to_float(arena[start + rank * width + n])
                out[row, column + n] += hidden[row, slot + rank] * factor


@numba.njit(parallel=True, nogil=True, cache=True)
def adapted_product(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    pieces: Any,
    offsets: Any,
    a_pages: Any,
    b_pages: Any,
    scaling: Any,
    arena: Any,
    most_pages: Any,
    entry: Any,
    columns: Any,
) -> None:
    """`product`, plus scaling * B A x for the rows of each piece.

    pieces      as make_pieces gives them
    most_pages  as count_most_pages
    entry       of the page table, of the product's first module
    columns     (num_modules + 1,) int64, where each module's outputs begin, and the end
    The rest is as in `product` and in AdapterBatch.
    """
    num_pieces, num_modules = pieces.shape[0], columns.shape[0] - 1
    num_slots = most_pages * PAGE_RANK
    hidden = np.empty((x.shape[0], num_modules * num_slots), np.float32)
    work, counts = _list_work(pieces, offsets, b_pages, entry, columns, num_slots)
    for task in numba.prange(num_modules * num_pieces):
        module, piece = task // num_pieces, task % num_pieces
        first, count, adapter = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        begin = offsets[adapter, entry + module]
        for p in range(begin, offsets[adapter, entry + module + 1]):
            slot = module * num_slots + (p - begin) * PAGE_RANK
            _shrink(x, first, count, np.int64(a_pages[p]), scaling[p], arena, hidden, slot)

    # Units of WIDE blocks; `per_line` of them read one cache line of each rank row of B.
    per_line = max(1, 64 // (arena.itemsize * LANES * WIDE))
    for unit in numba.prange(-(-weight.shape[0] // WIDE)):
        block = unit * WIDE
        start, end = block * LANES, min((block + WIDE) * LANES, out.shape[1])
        ahead = (unit // per_line + 1) * per_line * WIDE * LANES
        module = 0
        while module < num_modules and ahead >= columns[module + 1]:
            module += 1
        if end - start == WIDE * LANES and module < num_modules:
            size, part = counts[module] * PAGE_RANK, unit % per_line
            _fetching_product(
                x, weight, block, out, arena, work[module],
                part * size // per_line, (part + 1) * size // per_line,
                ahead - columns[module], columns[module + 1] - columns[module],
            )  # fmt: skip
        elif end - start == WIDE * LANES:
            wide_product(x, weight, block, out)
        else:
            block_product(x, 0, 0, x.shape[0], weight, block, out, start)
        add_bias(bias, out, start, end)
        for column in range(start, end, LANES):
            for module in range(num_modules):
                low = max(column, columns[module])
                high = min(column + LANES, columns[module + 1])
                if low < high:
                    _expand(
                        hidden, arena, columns[module + 1] - columns[module],
                        low - columns[module], work[module], counts[module], out, low, high - low,
                    )  # fmt: skip
