"""Vector arithmetic that numba lacks, as LLVM intrinsics: half precision and a tile of a product.

Numbers in memory are float32, float16 (seen by numba as uint16) or bfloat16 (seen as int16);
arithmetic is always float32.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Outputs that one vector holds; packed weights are stored in blocks of as many outputs."""

_FLOAT = ir.FloatType()


def has_avx512() -> bool:
    """Whether 32 registers of 16 floats are there, which decides the size of a tile."""
    return bool(llvm.get_host_cpu_features().get("avx512f"))


def _widen(builder: Any, bits: Any, dtype: Any, lanes: int) -> Any:
    """Turn a stored scalar (lanes == 0) or vector into float32."""

    def shaped(scalar: Any) -> Any:
        return ir.VectorType(scalar, lanes) if lanes else scalar

    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(_FLOAT))
    if dtype == types.int16:
        wide = builder.zext(bits, shaped(ir.IntType(32)))
        shift = ir.Constant(shaped(ir.IntType(32)), [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(wide, shift), shaped(_FLOAT))
    return bits


@intrinsic
def to_float(typingctx: Any, stored: Any) -> Any:
    """The float32 value of a number as it is stored in weights, factors or the KV cache."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widen(builder, arguments[0], signature.args[0], 0)

    return types.float32(stored), emit


@intrinsic
def from_float(typingctx: Any, value: Any, like: Any) -> Any:
    """`value` (float32) rounded to nearest even in the form in which `like` is stored."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[1]
        if kind == types.uint16:
            half = builder.fptrunc(arguments[0], ir.HalfType())
            return builder.bitcast(half, ir.IntType(16))
        if kind == types.int16:
            word = ir.IntType(32)
            bits = builder.bitcast(arguments[0], word)
            odd = builder.and_(builder.lshr(bits, word(16)), word(1))
            rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
            return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))
        return arguments[0]

    return like(types.float32, like), emit


@intrinsic
def float_from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _FLOAT)

    return types.float32(types.int32), emit


def make_product_tile(num_rows: int, num_blocks: int, *, accumulate: bool) -> Any:
    """An intrinsic for a few rows times a few blocks of outputs, kept in registers throughout.

    tile(x, x_row, x_column, weight, block, out, out_row, out_column) computes, for
    i < num_rows, j < num_blocks and lane l < LANES,

        out[out_row + i, out_column + j * LANES + l]
            (+)= sum over k of x[x_row + i, x_column + k] * weight[block + j, k, l]

    x       (rows, columns)               float32
    weight  (blocks, depth, LANES)        as stored
    out     (rows, columns)               float32; added to when `accumulate`

    All are C-contiguous. Every output adds its products in the order of k, one fused
    multiply-add after another, whatever the tile: a row's result never depends on its batch.
    """

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        x_column: Any,
        weight: Any,
        block: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
    ) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_type, _, _, weight_type, _, out_type, _, _ = signature.args
            row_at, column_at, block_at = arguments[1], arguments[2], arguments[4]
            source = context.make_array(x_type)(context, builder, arguments[0])
            packed = context.make_array(weight_type)(context, builder, arguments[3])
            target = context.make_array(out_type)(context, builder, arguments[5])
            x_width = cgutils.unpack_tuple(builder, source.shape, 2)[1]
            depth = cgutils.unpack_tuple(builder, packed.shape, 3)[1]
            out_width = cgutils.unpack_tuple(builder, target.shape, 2)[1]
            word = depth.type
            vector = ir.VectorType(_FLOAT, LANES)
            stored = packed.data.type.pointee
            alignment = stored.width // 8 if isinstance(stored, ir.IntType) else 4
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), "llvm.fma.v16f32"
            )

            def place(pointer: Any, row: Any, offset: int, width: Any, column: Any) -> Any:
                start = builder.mul(builder.add(row, word(offset)), width)
                return builder.gep(pointer, [builder.add(start, column)])

            rows = [place(source.data, row_at, i, x_width, column_at) for i in range(num_rows)]
            block_width = builder.mul(depth, word(LANES))
            blocks = [
                place(packed.data, block_at, j, block_width, word(0)) for j in range(num_blocks)
            ]
            targets = [
                [
                    builder.bitcast(
                        builder.gep(
                            place(target.data, arguments[6], i, out_width, arguments[7]),
                            [word(j * LANES)],
                        ),
                        vector.as_pointer(),
                    )
                    for j in range(num_blocks)
                ]
                for i in range(num_rows)
            ]
            # LLVM keeps these in registers: nothing else takes their address.
            sums = [
                [cgutils.alloca_once(builder, vector) for _ in range(num_blocks)]
                for _ in range(num_rows)
            ]
            zero = ir.Constant(vector, [0.0] * LANES)
            for i in range(num_rows):
                for j in range(num_blocks):
                    start = builder.load(targets[i][j], align=4) if accumulate else zero
                    builder.store(start, sums[i][j])
            lane = ir.IntType(32)
            everywhere = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
            undefined = ir.Constant(vector, ir.Undefined)
            with cgutils.for_range(builder, depth) as loop:
                at = builder.mul(loop.index, word(LANES))
                columns = []
                for pointer in blocks:
                    line = builder.bitcast(
                        builder.gep(pointer, [at]), ir.VectorType(stored, LANES).as_pointer()
                    )
                    bits = builder.load(line, align=alignment)
                    columns.append(_widen(builder, bits, weight_type.dtype, LANES))
                for i, pointer in enumerate(rows):
                    scalar = builder.load(builder.gep(pointer, [loop.index]))
                    first = builder.insert_element(undefined, scalar, lane(0))
                    spread = builder.shuffle_vector(first, undefined, everywhere)
                    for j in range(num_blocks):
                        total = builder.load(sums[i][j])
                        builder.store(builder.call(fma, [spread, columns[j], total]), sums[i][j])
            for i in range(num_rows):
                for j in range(num_blocks):
                    builder.store(builder.load(sums[i][j]), targets[i][j], align=4)
            return context.get_dummy_value()

        index = types.intp
        return types.void(x, index, index, weight, index, out, index, index), emit

    return tile
