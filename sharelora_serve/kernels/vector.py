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

CACHE_LINE = 64
"""Bytes that memory is read by."""

_FETCHES = 3  # cache lines per stride of a dot product: what B has for one of A, at the widest
_DOT_SUMS = 4  # so many in flight hide the latency of a fused multiply-add

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

    tile(x, x_row, x_column, weight, start, stride, apart, depth, out, out_row, out_column)
    computes, for i < num_rows, j < num_blocks, lane l < LANES and w = start + j * apart,

        out[out_row + i, out_column + j * LANES + l]
            (+)= sum over k < depth of x[x_row + i, x_column + k] * weight[w + k * stride + l]

    x       (rows, columns)   float32
    weight  any shape         as stored; addressed by element
    out     (rows, columns)   float32; added to when `accumulate`

    All are C-contiguous. Every output adds its products in the order of k, one fused
    multiply-add after another, whatever the tile: a row's result never depends on its batch.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _array(context, builder, signature, arguments, 0)
        packed = _array(context, builder, signature, arguments, 3)
        target = _array(context, builder, signature, arguments, 8)
        _, row_at, column_at, _, start, stride, apart, depth, _, out_row, out_column = arguments
        x_width = cgutils.unpack_tuple(builder, source.shape, 2)[1]
        out_width = cgutils.unpack_tuple(builder, target.shape, 2)[1]
        word, lane = depth.type, ir.IntType(32)
        vector = ir.VectorType(_FLOAT, LANES)
        stored = packed.data.type.pointee
        fma = _fma(builder, vector)

        rows = [
            _at(builder, source.data, builder.add(row_at, word(i)), x_width, column_at)
            for i in range(num_rows)
        ]
        blocks = [
            builder.gep(packed.data, [builder.add(start, builder.mul(apart, word(j)))])
            for j in range(num_blocks)
        ]
        targets = [
            [
                builder.bitcast(
                    builder.gep(
                        _at(
                            builder,
                            target.data,
                            builder.add(out_row, word(i)),
                            out_width,
                            out_column,
                        ),
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
                begin = builder.load(targets[i][j], align=4) if accumulate else zero
                builder.store(begin, sums[i][j])
        everywhere = ir.Constant(ir.VectorType(lane, LANES), [0] * LANES)
        undefined = ir.Constant(vector, ir.Undefined)

        with cgutils.for_range(builder, depth) as loop:
            at = builder.mul(loop.index, stride)
            columns = []
            for pointer in blocks:
                line = builder.bitcast(
                    builder.gep(pointer, [at]), ir.VectorType(stored, LANES).as_pointer()
                )
                bits = builder.load(line, align=_alignment(stored))
                columns.append(_widen(builder, bits, signature.args[3].dtype, LANES))
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

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        x_column: Any,
        weight: Any,
        start: Any,
        stride: Any,
        apart: Any,
        depth: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
    ) -> Any:
        index = types.intp
        product = (x, index, index, weight, index, index, index, index, out, index, index)
        return types.void(*product), emit

    return tile


def make_dot_tile(num_rows: int) -> Any:
    """An intrinsic for the dot products of a few rows with one rank row.

    tile(x, x_row, pages, start, depth, out, out_row, out_column, ahead, num_lines) computes, for
    i < num_rows,

        out[out_row + i, out_column] = sum over k < depth of x[x_row + i, k] * pages[start + k]

    and on its way fetches `num_lines` cache lines from element `ahead` of `pages` on, which the
    caller will read next: arithmetic hides memory.

    x      (rows, depth)     float32
    pages  any shape         as stored; addressed by element
    out    (rows, columns)   float32

    All are C-contiguous. Every output adds in the same order whatever the tile: _DOT_SUMS vectors
    side by side, then these in order, then halves of a vector, then what is left of the depth.
    """
    half = LANES // 2
    stride = half * _DOT_SUMS

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = _array(context, builder, signature, arguments, 0)
        pages = _array(context, builder, signature, arguments, 2)
        target = _array(context, builder, signature, arguments, 5)
        _, row_at, _, start, depth, _, out_row, out_column, ahead, num_lines = arguments
        x_width = cgutils.unpack_tuple(builder, source.shape, 2)[1]
        out_width = cgutils.unpack_tuple(builder, target.shape, 2)[1]
        word, lane = depth.type, ir.IntType(32)
        vector = ir.VectorType(_FLOAT, half)
        stored, dtype = pages.data.type.pointee, signature.args[2].dtype
        factors = builder.gep(pages.data, [start])
        rows = [
            _at(builder, source.data, builder.add(row_at, word(i)), x_width, word(0))
            for i in range(num_rows)
        ]
        sums = [
            [cgutils.alloca_once(builder, vector) for _ in range(_DOT_SUMS)]
            for _ in range(num_rows)
        ]
        for line in sums:
            for place in line:
                builder.store(ir.Constant(vector, [0.0] * half), place)
        num_strides = builder.udiv(depth, word(stride))
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]),
            "llvm.prefetch.p0i8",
        )
        following = builder.bitcast(builder.gep(pages.data, [ahead]), byte)
        with cgutils.for_range(builder, num_strides) as loop:
            for n in range(_FETCHES):
                index = builder.add(builder.mul(loop.index, word(_FETCHES)), word(n))
                with builder.if_then(builder.icmp_signed("<", index, num_lines)):
                    pointer = builder.gep(following, [builder.mul(index, word(CACHE_LINE))])
                    builder.call(fetch, [pointer, flag(0), flag(3), flag(1)])  # to read, to keep
            for n in range(_DOT_SUMS):
                k = builder.add(builder.mul(loop.index, word(stride)), word(n * half))
                line = builder.bitcast(
                    builder.gep(factors, [k]), ir.VectorType(stored, half).as_pointer()
                )
                bits = builder.load(line, align=_alignment(stored))
                factor = _widen(builder, bits, dtype, half)
                for pointer, places in zip(rows, sums, strict=True):
                    at = builder.bitcast(builder.gep(pointer, [k]), vector.as_pointer())
                    terms = [builder.load(at, align=4), factor, builder.load(places[n])]
                    builder.store(builder.call(_fma(builder, vector), terms), places[n])
        totals = [cgutils.alloca_once(builder, _FLOAT) for _ in range(num_rows)]
        for places, to in zip(sums, totals, strict=True):
            total, lanes = builder.load(places[0]), half
            for place in places[1:]:
                total = builder.fadd(total, builder.load(place))
            while lanes > 1:
                lanes //= 2
                low, high = (
                    builder.shuffle_vector(
                        total,
                        total,
                        ir.Constant(ir.VectorType(lane, lanes), list(range(at, at + lanes))),
                    )
                    for at in (0, lanes)
                )
                total = builder.fadd(low, high)
            builder.store(builder.extract_element(total, lane(0)), to)
        whole = builder.mul(num_strides, word(stride))
        with cgutils.for_range_slice(builder, whole, depth, word(1)) as (k, _):
            factor = _widen(builder, builder.load(builder.gep(factors, [k])), dtype, 0)
            for pointer, to in zip(rows, totals, strict=True):
                terms = [builder.load(builder.gep(pointer, [k])), factor, builder.load(to)]
                builder.store(builder.call(_fma(builder, _FLOAT), terms), to)
        for i, to in enumerate(totals):
            row = builder.add(out_row, word(i))
            pointer = _at(builder, target.data, row, out_width, out_column)
            builder.store(builder.load(to), pointer)
        return context.get_dummy_value()

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        pages: Any,
        start: Any,
        depth: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
        ahead: Any,
        num_lines: Any,
    ) -> Any:
        index = types.intp
        return types.void(x, index, pages, index, index, out, index, index, index, index), emit

    return tile


def _array(context: Any, builder: Any, signature: Any, arguments: Any, at: int) -> Any:
    return context.make_array(signature.args[at])(context, builder, arguments[at])


def _at(builder: Any, pointer: Any, row: Any, width: Any, column: Any) -> Any:
    return builder.gep(pointer, [builder.add(builder.mul(row, width), column)])


def _alignment(stored: Any) -> int:
    return stored.width // 8 if isinstance(stored, ir.IntType) else 4


def _fma(builder: Any, kind: Any) -> Any:
    name = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.{name}"
    )
