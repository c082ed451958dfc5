"""Dense products with packed weights on CPU: the base's linear layers and the scores of attention.

A packed weight is (ceil(out / LANES), in, LANES): blocks of LANES outputs, padded with zeros. For
matrix registers it is (ceil(out / LANES), in / 2, LANES, 2): two inputs of an output side by side.
"""

from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.matrix import empty_rows, multiply_blocks, split
from sharelora_serve.kernels.tiles import LANES, make_product_tile
from sharelora_serve.kernels.vector import has_avx512

_WIDE = 2 if has_avx512() else 1
"""Neighbouring blocks that one tile of `product` computes."""

_ONE_ROW_WIDE = 3
"""Neighbouring blocks for one row alone: with fewer, sums wait for sums and memory for both."""

_TALL = 12 if has_avx512() else 6
_MEDIUM = 8 if has_avx512() else 4
"""Rows of the larger tiles, so that their sums fill the registers."""

_FEW_ROWS = 64
"""So many are split by one thread: waking the others takes as long."""

_tall_wide = make_product_tile(_TALL, _WIDE, accumulate=False)
_medium_wide = make_product_tile(_MEDIUM, _WIDE, accumulate=False)
_tall_fetching = make_product_tile(_TALL, _WIDE, accumulate=False, fetches=True)
_medium_fetching = make_product_tile(_MEDIUM, _WIDE, accumulate=False, fetches=True)
_four_wide = make_product_tile(4, _WIDE, accumulate=False)
_three_wide = make_product_tile(3, _WIDE, accumulate=False)
_two_wide = make_product_tile(2, _WIDE, accumulate=False)
_one_wide = make_product_tile(1, _WIDE, accumulate=False)
_one_widest = make_product_tile(1, _ONE_ROW_WIDE, accumulate=False)
_six = make_product_tile(6, 1, accumulate=False)
_four = make_product_tile(4, 1, accumulate=False)
_three = make_product_tile(3, 1, accumulate=False)
_two = make_product_tile(2, 1, accumulate=False)
_one = make_product_tile(1, 1, accumulate=False)
_six_more = make_product_tile(6, 1, accumulate=True)
_four_more = make_product_tile(4, 1, accumulate=True)
_three_more = make_product_tile(3, 1, accumulate=True)
_two_more = make_product_tile(2, 1, accumulate=True)
_one_more = make_product_tile(1, 1, accumulate=True)


@numba.njit(nogil=True)
def _wide_product(x: Any, weight: Any, block: Any, out: Any) -> None:
    """All rows of x times _WIDE neighbouring blocks."""
    rows, row, depth = x.shape[0], 0, weight.shape[1]
    size, column = depth * LANES, block * LANES
    start = block * size
    # Low tiles wait for their sums: rather two medium ones than a tall and a low one.
    # The first tile waits for memory, the further ones fetch what the next strip's first will read.
    while rows - row >= _TALL and not 0 < rows - row - _TALL <= _TALL - _MEDIUM:
        if row == 0:
            _tall_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)
        else:
            _tall_fetching(x, row, 0, weight, start, LANES, size, depth, out, row, column)
        row += _TALL
    while rows - row >= _MEDIUM:
        if row == 0:
            _medium_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)
        else:
            _medium_fetching(x, row, 0, weight, start, LANES, size, depth, out, row, column)
        row += _MEDIUM
    while rows - row >= 4:
        _four_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)
        row += 4
    if rows - row == 3:
        _three_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)
    elif rows - row == 2:
        _two_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)
    elif rows - row == 1:
        _one_wide(x, row, 0, weight, start, LANES, size, depth, out, row, column)


@numba.njit(nogil=True)
def block_product(
    x: Any, x_row: Any, x_column: Any, rows: Any, weight: Any, block: Any, out: Any, column: Any
) -> None:
    """out[:rows, column:column + LANES] = x[x_row:x_row + rows, x_column:] times one block."""
    row, depth = 0, weight.shape[1]
    size = depth * LANES
    start = block * size
    while rows - row >= 6:
        _six(x, x_row + row, x_column, weight, start, LANES, size, depth, out, row, column)
        row += 6
    if rows - row >= 4:
        _four(x, x_row + row, x_column, weight, start, LANES, size, depth, out, row, column)
        row += 4
    if rows - row == 3:
        _three(x, x_row + row, x_column, weight, start, LANES, size, depth, out, row, column)
    elif rows - row == 2:
        _two(x, x_row + row, x_column, weight, start, LANES, size, depth, out, row, column)
    elif rows - row == 1:
        _one(x, x_row + row, x_column, weight, start, LANES, size, depth, out, row, column)


@numba.njit(nogil=True)
def add_product(
    x: Any,
    x_row: Any,
    x_column: Any,
    rows: Any,
    weight: Any,
    start: Any,
    stride: Any,
    depth: Any,
    out: Any,
    out_row: Any,
    column: Any,
) -> None:
    """out[out_row:, column:column + LANES] += rows of x times `depth` lines of LANES weights.

    Line k begins at element start + k * stride of `weight`.
    """
    row = 0
    while rows - row >= 6:
        _six_more(
            x, x_row + row, x_column, weight, start, stride, 0, depth, out, out_row + row, column
        )
        row += 6
    if rows - row >= 4:
        _four_more(
            x, x_row + row, x_column, weight, start, stride, 0, depth, out, out_row + row, column
        )
        row += 4
    if rows - row == 3:
        _three_more(
            x, x_row + row, x_column, weight, start, stride, 0, depth, out, out_row + row, column
        )
    elif rows - row == 2:
        _two_more(
            x, x_row + row, x_column, weight, start, stride, 0, depth, out, out_row + row, column
        )
    elif rows - row == 1:
        _one_more(
            x, x_row + row, x_column, weight, start, stride, 0, depth, out, out_row + row, column
        )


@numba.njit(parallel=True, nogil=True)
def _one_row(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """`product` of one row, which is bound by how fast weights come from memory."""
    depth = weight.shape[1]
    size = depth * LANES
    strips = weight.shape[0] // _ONE_ROW_WIDE
    for strip in numba.prange(strips):
        block = strip * _ONE_ROW_WIDE
        start, column = block * size, block * LANES
        _one_widest(x, 0, 0, weight, start, LANES, size, depth, out, 0, column)
        _add_bias(bias, out, column, column + _ONE_ROW_WIDE * LANES)
    for block in range(strips * _ONE_ROW_WIDE, weight.shape[0]):
        block_product(x, 0, 0, 1, weight, block, out, block * LANES)
        _add_bias(bias, out, block * LANES, (block + 1) * LANES)


@numba.njit(parallel=True, nogil=True)
def _matrix_product(x: Any, weight: Any, bias: Any, out: Any) -> None:
    rows = x.shape[0]
    high, low = empty_rows(rows, x.shape[1]), empty_rows(rows, x.shape[1])
    if rows <= _FEW_ROWS:
        for row in range(rows):
            split(x, high, low, row)
    else:
        for row in numba.prange(rows):
            split(x, high, low, row)
    pairs = weight.shape[0] // 2
    for pair in numba.prange(pairs):
        multiply_blocks(high, low, weight, 2 * pair, 2, out)
        _add_bias(bias, out, 2 * pair * LANES, 2 * (pair + 1) * LANES)
    for block in range(2 * pairs, weight.shape[0]):
        multiply_blocks(high, low, weight, block, 1, out)
        _add_bias(bias, out, block * LANES, (block + 1) * LANES)


@numba.njit(parallel=True, nogil=True)
def _vector_product(x: Any, weight: Any, bias: Any, out: Any) -> None:
    if x.shape[0] == 1:
        _one_row(x, weight, bias, out)
        return
    pairs = weight.shape[0] // _WIDE
    for pair in numba.prange(pairs):
        _wide_product(x, weight, pair * _WIDE, out)
        _add_bias(bias, out, pair * _WIDE * LANES, (pair + 1) * _WIDE * LANES)
    for block in range(pairs * _WIDE, weight.shape[0]):
        block_product(x, 0, 0, x.shape[0], weight, block, out, block * LANES)
        _add_bias(bias, out, block * LANES, (block + 1) * LANES)


@numba.njit(nogil=True, cache=True)
def product(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """out[t, n] = bias[n] + sum over k of x[t, k] W[n, k], all columns of `out`, padding included.

    x       (num_tokens, in_features)                  float32
    weight  packed, as stored
    bias    (out_features,)                            float32; empty for none
    out     (num_tokens, ceil(out / LANES) * LANES)    float32
    """
    if weight.ndim == 4:
        _matrix_product(x, weight, bias, out)
    else:
        _vector_product(x, weight, bias, out)


@numba.njit(nogil=True)
def _add_bias(bias: Any, out: Any, begin: Any, end: Any) -> None:
    """out[:, begin:end] += bias, where there is one."""
    end = min(end, bias.shape[0])
    if begin < end:
        for t in range(out.shape[0]):
            for column in range(begin, end):
                out[t, column] += bias[column]


def pack(weight: np.ndarray[Any, Any], to: np.ndarray[Any, Any]) -> None:
    """Lay a stored weight (out, in) out as `product` reads it."""
    outputs, inputs = weight.shape
    blocks = -(-outputs // LANES)
    padded = np.zeros((blocks * LANES, inputs), weight.dtype)
    padded[:outputs] = weight
    if to.ndim == 4:
        to[...] = padded.reshape(blocks, LANES, inputs // 2, 2).transpose(0, 2, 1, 3)
    else:
        to[...] = padded.reshape(blocks, LANES, inputs).transpose(0, 2, 1)


def unpack(packed: np.ndarray[Any, Any], outputs: int) -> np.ndarray[Any, Any]:
    """The stored weight (out, in) that `pack` laid out."""
    if packed.ndim == 4:
        return packed.transpose(0, 2, 1, 3).reshape(-1, 2 * packed.shape[1])[:outputs]
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:outputs]
