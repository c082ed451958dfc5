"""Dense products with packed weights on CPU: the base's linear layers and the scores of attention.

A packed weight is (ceil(out / LANES), in, LANES): blocks of LANES outputs, padded with zeros. In
memory the blocks of a strip take turns, input by input, so that a strip is one stream; `_place`
tells where a block's numbers stand. Where the processor multiplies bfloat16 it is
(ceil(out / LANES), in / 2, LANES, 2), two inputs of an output side by side, and for matrix
registers (ceil(out / LANES), in / DEPTH, DEPTH / 2, LANES, 2): the same, but for five dimensions,
by which it is told apart, and that blocks take no turns.
"""

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np

from sharelora_serve.kernels.matrix import empty_rows, multiply_blocks
from sharelora_serve.kernels.tiles import LANES, make_product_tile
from sharelora_serve.kernels.vector import from_float, has_avx512, to_float

_STRIP = 3 if has_avx512() else 1
"""Neighbouring blocks that take turns in memory, and that one tile of `product` computes."""

_TALL = 8 if has_avx512() else 6
"""Most rows of such a tile: its sums fill the registers."""

_ONE_ROW_WIDE = 3
"""Neighbouring blocks for one row alone, of one strip or of one each: fewer wait for their sums."""

_MOST_ROWS = 6
"""Of a tile of one block."""

_FEW_ROWS = 64
"""So many are rounded by one thread: waking the others takes as long."""

NOTHING_AHEAD = np.empty(0, np.int64)
"""Nothing of which memory is told."""

# Tiles of more than one, about as many rows each, have half as many as fit at least.
_strip_tile = make_product_tile(_TALL, _STRIP, accumulate=False, min_rows=2)
_fetching_tile = make_product_tile(
    _TALL, _STRIP, accumulate=False, fetches=True, min_rows=(_TALL + 1) // 2
)
_one_row_tile = make_product_tile(1, _ONE_ROW_WIDE, accumulate=False)
_block_tile = make_product_tile(_MOST_ROWS, 1, accumulate=False)
_adding_tile = make_product_tile(_MOST_ROWS, 1, accumulate=True)


@numba.njit(nogil=True)
def _place(weight: Any, block: Any) -> Any:
    """Where a block of a packed weight begins, and how far its lines are apart.

    In numbers or, where two inputs stand side by side, pairs of numbers.
    """
    if weight.ndim == 5:
        return block * weight.shape[1] * weight.shape[2] * LANES, LANES
    blocks, depth = weight.shape[0], weight.shape[1]
    first = block // _STRIP * _STRIP
    width = min(_STRIP, blocks - first)
    return (first * depth + block - first) * LANES, width * LANES


@numba.njit(nogil=True)
def _whole_strip(x: Any, weight: Any, block: Any, out: Any, ahead: Any) -> None:
    """All rows of x times the strip that begins with this block.

    In tiles of about as many rows each, since low ones wait for their sums. Each fetches its share
    of what lies ahead.
    """
    rows, depth = x.shape[0], weight.shape[1]
    start, stride, column = block * depth * LANES, _STRIP * LANES, block * LANES
    tiles = -(-rows // _TALL)
    row, first = 0, 0
    for tile in range(tiles):
        count = rows * (tile + 1) // tiles - row
        last = ahead.shape[0] * (tile + 1) // tiles
        # The first waits for memory, the further ones fetch what the next strip's first will read.
        if tile == 0:
            _strip_tile(
                x, row, count, 0, weight, start, stride, LANES, depth, out, row, column,
                (ahead, first, last),
            )  # fmt: skip
        else:
            _fetching_tile(
                x, row, count, 0, weight, start, stride, LANES, depth, out, row, column,
                (ahead, first, last),
            )  # fmt: skip
        row, first = row + count, last


@numba.njit(nogil=True)
def block_product(
    x: Any,
    rows: Any,
    weight: Any,
    start: Any,
    stride: Any,
    depth: Any,
    out: Any,
    column: Any,
    ahead: Any,
) -> None:
    """out[:rows, column:column + LANES] = x[:rows] times `depth` lines of LANES weights.

    Line k begins at element start + k * stride of `weight`. Of what lies ahead every tile brings
    its share nearer, up to four times `depth` lines of the cache.
    """
    tiles = -(-rows // _MOST_ROWS)
    for tile in range(tiles):
        row = tile * _MOST_ROWS
        count = min(_MOST_ROWS, rows - row)
        first = ahead.shape[0] * tile // tiles
        last = ahead.shape[0] * (tile + 1) // tiles
        _block_tile(
            x, row, count, 0, weight, start, stride, 0, depth, out, row, column,
            (ahead, first, last),
        )  # fmt: skip


@numba.njit(nogil=True)
def add_product(
    x: Any,
    x_column: Any,
    rows: Any,
    weight: Any,
    start: Any,
    depth: Any,
    out: Any,
    column: Any,
) -> None:
    """out[:rows, column:column + LANES] += x[:rows, x_column:] times `depth` lines of weights.

    The first line begins at element `start` of `weight`.
    """
    for row in range(0, rows, _MOST_ROWS):
        count = min(_MOST_ROWS, rows - row)
        _adding_tile(x, row, count, x_column, weight, start, LANES, 0, depth, out, row, column, ())


@numba.njit(parallel=True, nogil=True)
def _multiply_one_row(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """`product` of one row, which is bound by how fast weights come from memory."""
    blocks, depth = weight.shape[0], weight.shape[1]
    for task in numba.prange(-(-blocks // _ONE_ROW_WIDE)):
        block = task * _ONE_ROW_WIDE
        column = block * LANES
        if block + _ONE_ROW_WIDE <= blocks:
            start, stride = _place(weight, block)
            apart = _place(weight, block + 1)[0] - start
            _one_row_tile(x, 0, 1, 0, weight, start, stride, apart, depth, out, 0, column, ())
        else:
            _last_blocks(x, weight, block, out)
        _add_bias(bias, out, column, column + _ONE_ROW_WIDE * LANES)


@numba.njit(nogil=True)
def _last_blocks(x: Any, weight: Any, first: Any, out: Any) -> None:
    """All rows of x times the blocks from `first` on, one by one."""
    for block in range(first, weight.shape[0]):
        start, stride = _place(weight, block)
        block_product(
            x, x.shape[0], weight, start, stride, weight.shape[1], out, block * LANES,
            NOTHING_AHEAD,
        )  # fmt: skip


@numba.njit(parallel=True, nogil=True)
def _rounded(x: Any) -> Any:
    """x in bfloat16."""
    rows = empty_rows(x.shape[0], x.shape[1])
    if x.shape[0] <= _FEW_ROWS:
        for row in range(x.shape[0]):
            _round(x, rows, row)
    else:
        for row in numba.prange(x.shape[0]):
            _round(x, rows, row)
    return rows


@numba.njit(nogil=True)
def _round(x: Any, rounded: Any, row: Any) -> None:
    for k in range(x.shape[1]):
        rounded[row, k] = from_float(x[row, k], rounded[row, k])


@numba.njit(parallel=True, nogil=True)
def _multiply_matrices(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """`product` in matrix registers."""
    rows, pairs = _rounded(x), weight.shape[0] // 2
    for pair in numba.prange(pairs):
        multiply_blocks(rows, weight, 2 * pair, 2, out)
        _add_bias(bias, out, 2 * pair * LANES, 2 * (pair + 1) * LANES)
    for block in range(2 * pairs, weight.shape[0]):
        multiply_blocks(rows, weight, block, 1, out)
        _add_bias(bias, out, block * LANES, (block + 1) * LANES)


@numba.njit(nogil=True)
def count_strips(weight: Any) -> Any:
    """How many strips a packed weight is, the last of which may have fewer blocks."""
    return -(-weight.shape[0] // _STRIP)


@numba.njit(nogil=True)
def multiply_strip(x: Any, weight: Any, bias: Any, strip: Any, out: Any, ahead: Any) -> None:
    """The outputs of `product` that this strip of a weight has, of two rows or more.

    Meanwhile memory brings what lies ahead: (num_stretches,) int64, addresses.
    """
    block = strip * _STRIP
    if block + _STRIP <= weight.shape[0]:
        _whole_strip(x, weight, block, out, ahead)
    else:
        _last_blocks(x, weight, block, out)
    _add_bias(bias, out, block * LANES, (block + _STRIP) * LANES)


@numba.njit(nogil=True)
def in_pairs(x: Any, weight: Any) -> Any:
    """x rounded to bfloat16 and the weight, both in pairs, of a weight with two inputs each."""
    blocks, depth = weight.shape[0], weight.shape[1]
    return _rounded(x).view(np.int32), weight.reshape(blocks, depth, 2 * LANES).view(np.int32)


@numba.njit(parallel=True, nogil=True)
def _vector_product(x: Any, weight: Any, bias: Any, out: Any) -> None:
    if x.shape[0] == 0:  # nobody samples in this step
        return
    if x.shape[0] == 1:
        _multiply_one_row(x, weight, bias, out)
        return
    for strip in numba.prange(count_strips(weight)):
        multiply_strip(x, weight, bias, strip, out, NOTHING_AHEAD)


@numba.njit(nogil=True, cache=True)
def product(x: Any, weight: Any, bias: Any, out: Any) -> None:
    """out[t, n] = bias[n] + sum over k of x[t, k] W[n, k], all columns of `out`, padding included.

    x       (num_tokens, in_features)                  float32
    weight  packed, as stored
    bias    (out_features,)                            float32; empty for none
    out     (num_tokens, ceil(out / LANES) * LANES)    float32

    Where two inputs of a weight stand side by side, x is rounded to bfloat16 as the weight is.
    """
    if weight.ndim == 5:
        _multiply_matrices(x, weight, bias, out)
    elif weight.ndim == 4:
        rows, pairs = in_pairs(x, weight)
        _vector_product(rows, pairs, bias, out)
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


@numba.njit(nogil=True, cache=True)
def embed(weight: Any, token_ids: Any, out: Any) -> None:
    """out[t] = row token_ids[t] of a packed weight."""
    numbers = weight.reshape(-1)
    for t in range(token_ids.shape[0]):
        start, stride = _place(weight, token_ids[t] // LANES)
        first = start + token_ids[t] % LANES
        for i in range(out.shape[1]):
            if weight.ndim == 3:
                out[t, i] = to_float(numbers[first + i * stride])
            else:
                out[t, i] = to_float(numbers[2 * (first + i // 2 * stride) + i % 2])


def pack(weight: np.ndarray[Any, Any], to: np.ndarray[Any, Any]) -> None:
    """Lay a stored weight (out, in) out as `product` reads it."""
    outputs, inputs = weight.shape
    padded = np.zeros((to.shape[0] * LANES, inputs), weight.dtype)
    padded[:outputs] = weight
    row = 0
    for strips in _strips(to):
        count, depth, width, _, beside = strips.shape
        end = row + count * width * LANES
        rows = padded[row:end].reshape(count, width, LANES, depth, beside)
        strips[...] = rows.transpose(0, 3, 1, 2, 4)
        row = end


def unpack(packed: np.ndarray[Any, Any], outputs: int) -> np.ndarray[Any, Any]:
    """The stored weight (out, in) that `pack` laid out."""
    inputs = packed[0].size // LANES
    rows = [strips.transpose(0, 2, 3, 1, 4).reshape(-1, inputs) for strips in _strips(packed)]
    return np.concatenate(rows)[:outputs]


def _strips(packed: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Views (strips, lines, blocks, LANES, inputs of a line): whole strips, and what is left."""
    blocks = packed.shape[0]
    beside = 1 if packed.ndim == 3 else 2
    width = 1 if packed.ndim == 5 else _STRIP
    depth = packed[0].size // (LANES * beside)
    whole = blocks // width * width
    yield packed[:whole].reshape(-1, depth, width, LANES, beside)
    if whole < blocks:
        yield packed[whole:].reshape(1, depth, blocks - whole, LANES, beside)
