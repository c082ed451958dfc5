"""A linear layer on CPU and what adapters add to it: the base's product and every row's own part.

Adapters wait for memory, the product of few rows for arithmetic. So each thread turns from one to
the other: while it multiplies a strip of the weight, memory brings the pages of a few tasks of the
adapters, which it then runs from its own cache.
"""

from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.adapted import (
    PIECE_ROWS,
    add_adapters,
    count_tasks,
    empty_hidden,
    empty_list,
    list_pages,
    locate_task,
)
from sharelora_serve.kernels.elementwise import add
from sharelora_serve.kernels.product import count_strips, in_pairs, multiply_strip, product

_MOST_ROWS = 64
"""That are added later: of more, what is written and read again costs more than waiting does."""


@numba.njit(nogil=True)
def count_later(rows: Any, weight: Any, pages: Any) -> Any:
    """To how many of a batch's rows what adapters add is added later: all or none of them.

    None of one row alone, whose product waits for memory itself.
    """
    later = pages.pieces.shape[0] > 0 and 1 < rows <= _MOST_ROWS and weight.ndim < 5
    return rows if later else 0


@numba.njit(nogil=True, cache=True)
def adapted_product(
    x: Any,
    weight: Any,
    bias: Any,
    out: Any,
    added: Any,
    pages: Any,
    entry: Any,
    columns: Any,
) -> None:
    """`product`, and out[t, module] += scaling * B A x[t] for each row with an adapter.

    If `added` has rows, that is written there instead, and whoever reads `out` next adds it up:
    threads need not wait for each other in between.

    added  (num_tokens or 0, at least out_features)  float32; rows without an adapter stay as they
                                                     are
    The rest is as `product` and `add_adapters` have it.
    """
    if added.shape[0] == 0:
        product(x, weight, bias, out)
        apply_adapters(x, out, pages, entry, columns)
    elif weight.ndim == 4:
        rows, pairs = in_pairs(x, weight)
        _multiply_and_apply(x, rows, pairs, bias, out, added, pages, entry, columns)
    else:
        _multiply_and_apply(x, x, weight, bias, out, added, pages, entry, columns)


@numba.njit(parallel=True, nogil=True, cache=True)
def apply_adapters(x: Any, out: Any, pages: Any, entry: Any, columns: Any) -> None:
    """out[t, module] += scaling * B A x[t] for each row with an adapter."""
    if pages.pieces.shape[0] == 0:  # to wake threads for nothing takes a while
        return
    threads, tasks = pages.num_threads, count_tasks(pages, columns)
    for thread in numba.prange(threads):
        hidden = empty_hidden(pages)
        added = np.empty((PIECE_ROWS, columns[-1]), np.float32)
        for task in range(tasks * thread // threads, tasks * (thread + 1) // threads):
            piece, module, _, _ = locate_task(pages, entry, columns, task)
            first, count = pages.pieces[piece, 0], pages.pieces[piece, 1]
            begin, end = columns[module], columns[module + 1]
            add_adapters(x, added, first, pages, entry, columns, task, task + 1, hidden)
            for row in range(count):
                add(out[first + row, begin:end], added[row, begin:end])


@numba.njit(parallel=True, nogil=True)
def _multiply_and_apply(
    x: Any,
    rows: Any,
    weight: Any,
    bias: Any,
    out: Any,
    added: Any,
    pages: Any,
    entry: Any,
    columns: Any,
) -> None:
    """Tasks of adapters in turn with strips of the product, whose rows are x as it takes them."""
    threads, tasks = pages.num_threads, count_tasks(pages, columns)
    strips = count_strips(weight)
    for thread in numba.prange(threads):
        since, last = tasks * thread // threads, tasks * (thread + 1) // threads
        first = strips * thread // threads
        count = strips * (thread + 1) // threads - first
        hidden = empty_hidden(pages)
        listed = empty_list(pages, entry, columns, x.shape[1], since, last)
        begin = since
        for turn in range(count):
            end = since + (last - since) * (turn + 1) // count
            ahead = list_pages(pages, entry, columns, x.shape[1], begin, end, since, listed)
            multiply_strip(rows, weight, bias, first + turn, out, listed[:ahead])
            add_adapters(x, added, 0, pages, entry, columns, begin, end, hidden)
            begin = end
        # A thread without a strip has tasks all the same.
        add_adapters(x, added, 0, pages, entry, columns, begin, last, hidden)
