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
    make_expand_tile,
    make_shrink_tile,
)
from sharelora_serve.kernels.vector import to_float
from sharelora_serve.memory import CACHE_LINE

PIECE_ROWS = 6
"""Most of a piece: few enough that one long prompt occupies every core, enough to reuse a page."""

_EXPAND_ROWS = 3

# Rows times rank rows, and rows times blocks of outputs: as many sums as there are registers.
_shrink_three = make_shrink_tile(3, 4)
_shrink_two = make_shrink_tile(2, 4)
_shrink_one = make_shrink_tile(1, 8)
_expand_few = make_expand_tile(_EXPAND_ROWS, 2)
_expand_one = make_expand_tile(1, 4, lanes=8)  # float16 is widened faster so
_expand_block = make_expand_tile(_EXPAND_ROWS, 1)


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
    max_pages: int
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
        while end < rows and end - row < PIECE_ROWS and row_adapter[end] == row_adapter[row]:
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
    to: Any,
    ahead: Any,
    lines: Any,
) -> None:
    """hidden[:count, to:to + 8] = scale * x[first:first + count] A^T for one page of A.

    The `lines` cache lines from element `ahead` of the arena on are fetched meanwhile.
    """
    width = x.shape[1]
    start = page * PAGE_RANK * width
    middle = start + PAGE_RANK // 2 * width
    row = 0
    while count - row >= 3:
        _shrink_three(x, first + row, arena, start, width, hidden, row, to, ahead, lines)
        _shrink_three(x, first + row, arena, middle, width, hidden, row, to + 4, ahead, 0)
        row, lines = row + 3, 0
    if count - row == 2:
        _shrink_two(x, first + row, arena, start, width, hidden, row, to, ahead, lines)
        _shrink_two(x, first + row, arena, middle, width, hidden, row, to + 4, ahead, 0)
    elif count - row == 1:
        _shrink_one(x, first + row, arena, start, width, hidden, row, to, ahead, lines)
    for row in range(count):
        for rank in range(to, to + PAGE_RANK):
            hidden[row, rank] *= scale


@numba.njit(nogil=True)
def _expand(
    hidden: Any,
    count: Any,
    page_ids: Any,
    arena: Any,
    width: Any,
    out: Any,
    first: Any,
    column: Any,
) -> None:
    """out[first:first + count, column:column + width] = hidden[:count] times these pages of B."""
    at = 0
    if count == 1:
        while width - at >= 4 * LANES:
            _expand_one(hidden, 0, 1, page_ids, arena, width, at, out, first, column + at)
            at += 4 * LANES
    else:
        while width - at >= 2 * LANES:
            for row in range(0, count, _EXPAND_ROWS):
                _expand_few(
                    hidden, row, min(_EXPAND_ROWS, count - row), page_ids, arena, width, at,
                    out, first + row, column + at,
                )  # fmt: skip
            at += 2 * LANES
    while width - at >= LANES:
        for row in range(0, count, _EXPAND_ROWS):
            _expand_block(
                hidden, row, min(_EXPAND_ROWS, count - row), page_ids, arena, width, at,
                out, first + row, column + at,
            )  # fmt: skip
        at += LANES
    for row in range(count):
        for n in range(at, width):
            total = np.float32(0)
            for rank in range(page_ids.shape[0] * PAGE_RANK):
                page = np.int64(page_ids[rank // PAGE_RANK])
                factor = to_float(arena[(page * PAGE_RANK + rank % PAGE_RANK) * width + n])
                total += hidden[row, rank] * factor
            out[first + row, column + n] = total


@numba.njit(nogil=True)
def count_tasks(pages: Any, columns: Any) -> Any:
    """How many there are for one product: every piece has one for each module."""
    return pages.pieces.shape[0] * (columns.shape[0] - 1)


@numba.njit(nogil=True)
def empty_hidden(pages: Any) -> Any:
    """Room for what `add_adapters` shrinks to: (PIECE_ROWS, most ranks of an adapter) float32."""
    return np.empty((PIECE_ROWS, pages.max_pages * PAGE_RANK), np.float32)


@numba.njit(nogil=True)
def add_adapters(
    x: Any,
    added: Any,
    since: Any,
    pages: Any,
    entry: Any,
    columns: Any,
    begin: Any,
    end: Any,
    hidden: Any,
) -> None:
    """added[t - since, module] = scaling * B A x[t] for what tasks begin .. end - 1 are of.

    pages    what a batch's rows read, as Pages
    entry    of the page table, of the first module whose outputs stand side by side
    columns  (num_modules + 1,) int64, where each module's outputs begin, and the end
    hidden   as `empty_hidden` gives it; what is in it is lost
    """
    pieces, arena = pages.pieces, pages.arena
    for task in range(begin, end):
        piece, module, start, stop = locate_task(pages, entry, columns, task)
        first, count = pieces[piece, 0], pieces[piece, 1]
        column, width = columns[module], columns[module + 1] - columns[module]
        lines = PAGE_RANK * width * arena.itemsize // CACHE_LINE
        for p in range(start, stop):
            a, b = np.int64(pages.a_pages[p]), np.int64(pages.b_pages[p])
            ahead = b * PAGE_RANK * width
            to = (p - start) * PAGE_RANK
            _shrink(x, first, count, a, pages.scaling[p], arena, hidden, to, ahead, lines)
        _expand(
            hidden, count, pages.b_pages[start:stop], arena, width, added, first - since, column
        )


@numba.njit(nogil=True)
def empty_list(pages: Any, entry: Any, columns: Any, in_features: Any, begin: Any, end: Any) -> Any:
    """Room for what `list_pages` lists of tasks begin .. end - 1: (num_stretches,) int64."""
    arena, room = pages.arena, 0
    for task in range(begin, end):
        _, module, start, stop = locate_task(pages, entry, columns, task)
        width = columns[module + 1] - columns[module]
        each = _num_stretches(in_features, arena) + _num_stretches(width, arena)
        room += (stop - start) * each
    return np.empty(room, np.int64)


@numba.njit(nogil=True)
def list_pages(
    pages: Any,
    entry: Any,
    columns: Any,
    in_features: Any,
    begin: Any,
    end: Any,
    since: Any,
    listed: Any,
) -> Any:
    """Write addresses of the pages that tasks begin .. end - 1 read to `listed`; how many.

    STRETCH bytes after STRETCH bytes, in the order of the tasks. A factor that the last task of the
    same module reads too is left out, if there is one from task `since` on.
    """
    arena, num_modules, count = pages.arena, columns.shape[0] - 1, 0
    for task in range(begin, end):
        _, module, start, stop = locate_task(pages, entry, columns, task)
        if start == stop:
            continue
        a_before, b_before = 0, 0  # page 0 is nobody's
        for before in range(task - num_modules, since - 1, -num_modules):
            _, _, start_before, stop_before = locate_task(pages, entry, columns, before)
            if start_before < stop_before:
                a_before, b_before = pages.a_pages[start_before], pages.b_pages[start_before]
                break
        if pages.a_pages[start] != a_before:
            count = _list(pages.a_pages[start:stop], in_features, arena, listed, count)
        if pages.b_pages[start] != b_before:
            width = columns[module + 1] - columns[module]
            count = _list(pages.b_pages[start:stop], width, arena, listed, count)
    return count


@numba.njit(nogil=True)
def locate_task(pages: Any, entry: Any, columns: Any, task: Any) -> Any:
    """Piece, module, and which entries of `a_pages` and `b_pages` a task reads: start, stop."""
    piece, module = task // (columns.shape[0] - 1), task % (columns.shape[0] - 1)
    offsets = pages.offsets[pages.pieces[piece, 2], entry + module :]
    return piece, module, offsets[0], offsets[1]


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
