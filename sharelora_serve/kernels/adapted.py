"""What adapters add to a linear layer on CPU: y += s (x A^T) B^T, every row with its own A and B.

Rows of one adapter that stand together are cut into pieces, each shrunk and expanded in one task:
B, the bulk of what is read, then streams through the cache page by page.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from sharelora_serve.kernels.batch import PAGE_RANK
from sharelora_serve.kernels.tiles import (
    LANES,
    STRETCH,
    make_product_tile,
    make_shrink_tile,
)
from sharelora_serve.kernels.vector import to_float
from sharelora_serve.memory import CACHE_LINE

_PIECE_ROWS = 6  # few enough that one long prompt occupies every core, enough to reuse a page

_EXPAND_ROWS = 3

# Rows times rank rows, and rows times blocks of outputs: as many sums as there are registers.
_shrink_three = make_shrink_tile(3, 4)
_shrink_two = make_shrink_tile(2, 4)
_shrink_one = make_shrink_tile(1, 8)
_expand_few = make_product_tile(_EXPAND_ROWS, 2, accumulate=True)
_expand_one = make_product_tile(1, 4, accumulate=True, lanes=8)  # float16 is widened faster so
_expand_block = make_product_tile(_EXPAND_ROWS, 1, accumulate=True)


class Pages(NamedTuple):
    """The rank pages of a batch as the compiled kernels take them.

    pieces       (num_pieces, 3), as make_pieces gives them
    num_threads  that the kernels run on
    The rest is as in AdapterBatch.
    """

    pieces: Any
    offsets: Any
    a_pages: Any
    b_pages: Any
    scaling: Any
    arena: Any
    num_threads: int


@numba.njit(nogil=True, cache=True)
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
def _shrink(
    x: Any,
    first: Any,
    count: Any,
    page: Any,
    scale: Any,
    arena: Any,
    hidden: Any,
    ahead: Any,
    lines: Any,
) -> None:
    """hidden[:count, :8] = scale * x[first:first + count] A^T for one page of A.

    The `lines` cache lines from element `ahead` of the arena on are fetched meanwhile.
    """
    width = x.shape[1]
    start = page * PAGE_RANK * width
    middle = start + PAGE_RANK // 2 * width
    row = 0
    while count - row >= 3:
        _shrink_three(x, first + row, arena, start, width, hidden, row, 0, ahead, lines)
        _shrink_three(x, first + row, arena, middle, width, hidden, row, 4, ahead, 0)
        row, lines = row + 3, 0
    if count - row == 2:
        _shrink_two(x, first + row, arena, start, width, hidden, row, 0, ahead, lines)
        _shrink_two(x, first + row, arena, middle, width, hidden, row, 4, ahead, 0)
    elif count - row == 1:
        _shrink_one(x, first + row, arena, start, width, hidden, row, 0, ahead, lines)
    for row in range(count):
        for rank in range(PAGE_RANK):
            hidden[row, rank] *= scale


@numba.njit(nogil=True)
def _expand(
    hidden: Any,
    first: Any,
    count: Any,
    page: Any,
    arena: Any,
    width: Any,
    out: Any,
    column: Any,
) -> None:
    """out[first:first + count, column:column + width] += hidden times one page of B."""
    start, row = page * PAGE_RANK * width, 0
    while row < count:
        rows, to, at = min(_EXPAND_ROWS, count - row), first + row, 0
        if rows == 1:
            while width - at >= 4 * LANES:
                _expand_one(
                    hidden, row, 1, 0, arena, start + at, width, LANES, PAGE_RANK,
                    out, to, column + at, (),
                )  # fmt: skip
                at += 4 * LANES
        else:
            while width - at >= 2 * LANES:
                _expand_few(
                    hidden, row, rows, 0, arena, start + at, width, LANES, PAGE_RANK,
                    out, to, column + at, (),
                )  # fmt: skip
                at += 2 * LANES
        _expand_rest(hidden, row, rows, arena, start, at, width, out, to, column)
        row += rows


@numba.njit(nogil=True)
def _expand_rest(
    hidden: Any,
    row: Any,
    rows: Any,
    arena: Any,
    start: Any,
    at: Any,
    width: Any,
    out: Any,
    to: Any,
    column: Any,
) -> None:
    """out[to:to + rows, column + at:column + width] += hidden[row:] times the rest of a page."""
    while width - at >= LANES:
        _expand_block(
            hidden, row, rows, 0, arena, start + at, width, 0, PAGE_RANK, out, to, column + at, ()
        )
        at += LANES
    for i in range(rows):
        for n in range(at, width):
            for rank in range(PAGE_RANK):
                factor = to_float(arena[start + rank * width + n])
                out[to + i, column + n] += hidden[row + i, rank] * factor


@numba.njit(nogil=True)
def list_pages(pages: Any, entry: Any, columns: Any, in_features: Any) -> Any:
    """Addresses of all the pages that `add_adapters` will read, STRETCH bytes after STRETCH bytes.

    (num_stretches,) int64, in the order of its tasks, so that every thread fetches what it reads.
    A factor that two pieces in turn have in common is listed once.
    """
    pieces, arena = pages.pieces, pages.arena
    num_modules = columns.shape[0] - 1
    room = 0
    for piece in range(pieces.shape[0]):
        offsets = pages.offsets[pieces[piece, 2], entry:]
        for module in range(num_modules):
            width = columns[module + 1] - columns[module]
            each = _num_stretches(in_features, arena) + _num_stretches(width, arena)
            room += (offsets[module + 1] - offsets[module]) * each
    listed = np.empty(room, np.int64)
    count = 0
    before = np.zeros((num_modules, 2), np.int32)  # page 0 is nobody's
    for piece in range(pieces.shape[0]):
        offsets = pages.offsets[pieces[piece, 2], entry:]
        for module in range(num_modules):
            first, last = offsets[module], offsets[module + 1]
            if first == last:
                continue
            a, b = pages.a_pages[first:last], pages.b_pages[first:last]
            if a[0] != before[module, 0]:
                count = _list(a, in_features, arena, listed, count)
            if b[0] != before[module, 1]:
                count = _list(b, columns[module + 1] - columns[module], arena, listed, count)
            before[module, 0], before[module, 1] = a[0], b[0]
    return listed[:count]


@numba.njit(nogil=True)
def _num_stretches(width: Any, arena: Any) -> Any:
    """Of a page so many features wide."""
    return -(-PAGE_RANK * width * arena.itemsize // STRETCH)


@numba.njit(nogil=True)
def _list(page_ids: Any, width: Any, arena: Any, listed: Any, count: Any) -> Any:
    """Write the stretches of these pages to listed[count:]; the count with them."""
    for page in page_ids:
        start = arena.ctypes.data + np.int64(page) * PAGE_RANK * width * arena.itemsize
        for number in range(_num_stretches(width, arena)):
            listed[count] = start + number * STRETCH
            count += 1
    return count


@numba.njit(nogil=True)
def _backwards(index: Any, count: Any, num_threads: Any) -> Any:
    """A permutation of `count` tasks that turns every thread's run of them around, or nearly so.

    What was fetched last for it is nearest; from the first on all would have left before its turn.
    Where numba divides them otherwise, a few come in another place.
    """
    thread = index * num_threads // count
    first = -(-thread * count // num_threads)
    last = -(-(thread + 1) * count // num_threads) - 1
    return first + last - index


@numba.njit(parallel=True, nogil=True, cache=True)
def add_adapters(
    x: Any,
    out: Any,
    pages: Any,
    entry: Any,
    columns: Any,
) -> None:
    """out[t, module] += scaling * B A x[t] for the rows of each piece.

    pages    what a batch's rows read, as Pages
    entry    of the page table, of the first module whose outputs stand in `out`
    columns  (num_modules + 1,) int64, where each module's outputs begin, and the end
    """
    pieces, offsets, arena = pages.pieces, pages.offsets, pages.arena
    num_modules = columns.shape[0] - 1
    num_tasks = pieces.shape[0] * num_modules
    for index in numba.prange(num_tasks):
        task = _backwards(index, num_tasks, pages.num_threads)
        piece, module = task // num_modules, task % num_modules
        first, count, adapter = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        column, width = columns[module], columns[module + 1] - columns[module]
        lines = PAGE_RANK * width * arena.itemsize // CACHE_LINE
        # Of one size, so that numba makes room once for all tasks of a thread.
        hidden = np.empty((_PIECE_ROWS, PAGE_RANK), np.float32)
        for p in range(offsets[adapter, entry + module], offsets[adapter, entry + module + 1]):
            a, b = np.int64(pages.a_pages[p]), np.int64(pages.b_pages[p])
            ahead = b * PAGE_RANK * width
            _shrink(x, first, count, a, pages.scaling[p], arena, hidden, ahead, lines)
            _expand(hidden, first, count, b, arena, width, out, column)
