"""Products of bfloat16 numbers in the matrix registers of CPUs that have them (AMX).

One instruction adds 32 products to each of 16 x 16 float32 sums.
"""

import ctypes
import platform
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sharelora_serve.kernels.tiles import LANES, TO_SECOND_LEVEL, fetch
from sharelora_serve.kernels.vector import array, element

DEPTH = 32
"""Inputs that one instruction adds up: the inputs of a weight are a multiple of it."""

_ROWS = 16  # of a register
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64
_LINE, _REGISTER = 64, 1024  # bytes of a register's row, and of all its rows
_NUM_REGISTERS, _WIDTHS_AT, _ROWS_AT = 8, 16, 48  # bytes of their configuration
_AHEAD = 16  # registers of weights whose lines memory brings meanwhile
_BYTE, _LANE, _WORD = ir.IntType(8), ir.IntType(32), ir.IntType(64)


@cache
def has_matrix_registers() -> bool:
    """Whether the CPU has them and the system lets this process use them, which is asked here."""
    features = llvm.get_host_cpu_features()
    if platform.system() != "Linux" or not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@numba.njit(nogil=True)
def empty_rows(rows: Any, depth: Any) -> Any:
    """Room for bfloat16 (rows, depth) that begins with a line of the cache."""
    room = np.empty(rows * depth + _LINE // 2, np.int16)
    skipped = -room.ctypes.data % _LINE // 2
    return room[skipped : skipped + rows * depth].reshape(rows, depth)


def _make_tile(num_row_tiles: int, num_blocks: int) -> Any:
    """An intrinsic for up to num_row_tiles * _ROWS rows times a few neighbouring blocks of outputs.

    tile(x, row, rows, weight, block, out) computes, for i < rows and n of those blocks,

        out[row + i, n] = sum over k of x[row + i, k] * W[n, k]

    x       (num_rows, in_features)                              bfloat16
    rows    more than (num_row_tiles - 1) * _ROWS
    weight  (blocks, in_features / DEPTH, DEPTH / 2, LANES, 2)   bfloat16
    out     (num_rows, columns)                                  float32

    Every output adds its products in an order that depends on nothing but in_features.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row, rows, _, block, _ = arguments
        x, packed, out = (array(context, builder, signature, arguments, at) for at in (0, 3, 5))
        tiles, blocks = range(num_row_tiles), range(num_blocks)
        counts = [_WORD(_ROWS)] * (num_row_tiles - 1)
        counts.append(builder.sub(rows, _WORD(_ROWS * (num_row_tiles - 1))))
        numbers = iter(range(_NUM_REGISTERS))
        sums = {(i, j): next(numbers) for i in tiles for j in blocks}
        of_rows, of_blocks = [next(numbers) for _ in tiles], [next(numbers) for _ in blocks]
        heights = [_WORD(_ROWS)] * _NUM_REGISTERS
        for i, count in enumerate(counts):
            for number in (of_rows[i], *(sums[i, j] for j in blocks)):
                heights[number] = count
        _configure(builder, heights)
        for number in sums.values():
            _call(builder, "tilezero", number)
        rows_at = [builder.add(row, _WORD(_ROWS * i)) for i in tiles]
        depth = cgutils.unpack_tuple(builder, x.shape, 2)[1]
        line = builder.mul(depth, _WORD(2))
        size = builder.mul(depth, _WORD(LANES))
        starts = [builder.mul(builder.add(block, _WORD(j)), size) for j in blocks]
        with cgutils.for_range(builder, builder.udiv(depth, _WORD(DEPTH))) as loop:
            k = builder.mul(loop.index, _WORD(DEPTH))
            sources = []
            for start, number in zip(starts, of_blocks, strict=True):
                at = builder.add(start, builder.mul(k, _WORD(LANES)))
                sources.append(_bytes(builder, builder.gep(packed.data, [at])))
                _call(builder, "tileloadd64", number, sources[-1], _WORD(_LINE))
            lines = [
                builder.gep(source, [_WORD(_AHEAD * _REGISTER + line)])
                for line in range(0, _REGISTER, _LINE)
                for source in sources
            ]
            share = len(lines) // len(sums)
            for i, number in enumerate(of_rows):
                source = element(builder, x.data, rows_at[i], depth, k)
                _call(builder, "tileloadd64", number, _bytes(builder, source), line)
                for j, column in enumerate(of_blocks):
                    _call(builder, "tdpbf16ps", sums[i, j], number, column)
                    for _ in range(share):
                        fetch(builder, lines.pop(), TO_SECOND_LEVEL)
        width = cgutils.unpack_tuple(builder, out.shape, 2)[1]
        first = builder.mul(block, _WORD(LANES))
        for (i, j), number in sums.items():
            column = builder.add(first, _WORD(j * LANES))
            target = element(builder, out.data, rows_at[i], width, column)
            line = builder.mul(width, _WORD(4))
            _call(builder, "tilestored64", number, _bytes(builder, target), line)
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        row: Any,
        rows: Any,
        weight: Any,
        block: Any,
        out: Any,
    ) -> Any:
        index = types.intp
        return types.void(x, index, index, weight, index, out), emit

    return tile


_two_by_two = _make_tile(2, 2)
_two_by_one = _make_tile(2, 1)
_one_by_two = _make_tile(1, 2)
_one_by_one = _make_tile(1, 1)


@numba.njit(nogil=True)
def multiply_blocks(x: Any, weight: Any, block: Any, count: Any, out: Any) -> None:
    """All rows of x times one or two neighbouring blocks of a packed weight."""
    rows = x.shape[0]
    for row in range(0, rows, 2 * _ROWS):
        height = min(2 * _ROWS, rows - row)
        if height > _ROWS and count == 2:
            _two_by_two(x, row, height, weight, block, out)
        elif height > _ROWS:
            _two_by_one(x, row, height, weight, block, out)
        elif count == 2:
            _one_by_two(x, row, height, weight, block, out)
        else:
            _one_by_one(x, row, height, weight, block, out)


def _configure(builder: Any, heights: list[Any]) -> None:
    """Give every register its rows, each a whole line wide."""
    fixed = [0] * _LINE
    fixed[0] = 1  # the palette
    for number in range(_NUM_REGISTERS):
        fixed[_WIDTHS_AT + 2 * number] = _LINE
    config = ir.Constant(ir.VectorType(_BYTE, _LINE), fixed)
    for number, height in enumerate(heights):
        height = builder.trunc(height, _BYTE)
        config = builder.insert_element(config, height, _LANE(_ROWS_AT + number))
    room = cgutils.alloca_once(builder, config.type)
    room.align = _LINE
    builder.store(config, room, align=_LINE)
    _call(builder, "ldtilecfg", _bytes(builder, room))


def _bytes(builder: Any, pointer: Any) -> Any:
    return builder.bitcast(pointer, _BYTE.as_pointer())


def _call(builder: Any, name: str, *operands: Any) -> None:
    """An instruction of the matrix registers; plain numbers name registers."""
    values = [_BYTE(each) if isinstance(each, int) else each for each in operands]
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
    builder.call(function, values)
