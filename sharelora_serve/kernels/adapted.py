"""What adapters add to a linear layer on CPU: y += s (x A^T) B^T, every row with its own A and B.

Rows of one adapter that stand together are cut into pieces, each shrunk and expanded in one task:
B, the bulk of what is read, then streams through the cache page by page.
"""

from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.batch import PAGE_RANK
from sharelora_serve.kernels.product import add_product
from sharelora_serve.kernels.vector import (
    CACHE_LINE,
    LANES,
    make_dot_tile,
    make_product_tile,
    to_float,
)

_PIECE_ROWS = 8  # few enough that one long prompt occupies every core, enough to reuse a page
_STRIP = 4  # blocks of outputs that one row is expanded on together

_dot_three = make_dot_tile(3)
_dot_two = make_dot_tile(2)
_dot_one = make_dot_tile(1)
_strip_more = make_product_tile(1, _STRIP, accumulate=True)


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
def _shrink(
    x: Any,
    first: Any,
    count: Any,
    page: Any,
    scale: Any,
    arena: Any,
    hidden: Any,
    b_page: Any,
    b_width: Any,
) -> None:
    """hidden[:count, :8] = scale * x[first:first + count] A^T for one page of A.

    The page of B that will follow is fetched meanwhile, its rank rows beside those of A.
    """
    width = x.shape[1]
    lines = b_width * arena.itemsize // CACHE_LINE
    for rank in range(PAGE_RANK):
        start = (page * PAGE_RANK + rank) * width
        ahead = (b_page * PAGE_RANK + rank) * b_width
        row = 0
        while count - row >= 3:
            _dot_three(x, first + row, arena, start, width, hidden, row, rank, ahead, lines)
            row += 3
        if count - row == 2:
            _dot_two(x, first + row, arena, start, width, hidden, row, rank, ahead, lines)
        elif count - row == 1:
            _dot_one(x, first + row, arena, start, width, hidden, row, rank, ahead, lines)
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
    start, at = page * PAGE_RANK * width, 0
    while count == 1 and width - at >= _STRIP * LANES:
        _strip_more(
            hidden, 0, 0, arena, start + at, width, LANES, PAGE_RANK, out, first, column + at
        )
        at += _STRIP * LANES
    while width - at >= LANES:
        add_product(
            hidden, 0, 0, count, arena, start + at, width, PAGE_RANK, out, first, column + at
        )
        at += LANES
    for n in range(at, width):
        for row in range(count):
            for rank in range(PAGE_RANK):
                factor = to_float(arena[start + rank * width + n])
                out[first + row, column + n] += hidden[row, rank] * factor


@numba.njit(parallel=True, nogil=True, cache=True)
def add_adapters(
    x: Any,
    out: Any,
    pieces: Any,
    offsets: Any,
    a_pages: Any,
    b_pages: Any,
    scaling: Any,
    arena: Any,
    entry: Any,
    columns: Any,
) -> None:
    """out[t, module] += scaling * B A x[t] for the rows of each piece.

    pieces   as make_pieces gives them
    entry    of the page table, of the first module whose outputs stand in `out`
    columns  (num_modules + 1,) int64, where each module's outputs begin, and the end
    The rest is as in AdapterBatch.
    """
    num_modules = columns.shape[0] - 1
    for task in numba.prange(pieces.shape[0] * num_modules):
        piece, module = task // num_modules, task % num_modules
        first, count, adapter = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        column, width = columns[module], columns[module + 1] - columns[module]
        hidden = np.empty((count, PAGE_RANK), np.float32)
        for p in range(offsets[adapter, entry + module], offsets[adapter, entry + module + 1]):
            a, b = np.int64(a_pages[p]), np.int64(b_pages[p])
            _shrink(x, first, count, a, scaling[p], arena, hidden, b, width)
            _expand(hidden, first, count, b, arena, width, out, column)
