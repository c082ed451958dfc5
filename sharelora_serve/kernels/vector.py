"""Numbers as they are stored and as they are computed with, as LLVM intrinsics for numba.

Numbers in memory are float32, float16 (seen by numba as uint16), bfloat16 (seen as int16, and two
side by side as int32) or int8; sums are always float32.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT = ir.FloatType()


def has_avx512() -> bool:
    """Whether 32 registers of 16 floats are there, which decides the size of a tile."""
    return bool(llvm.get_host_cpu_features().get("avx512f"))


def has_bfloat16_vectors() -> bool:
    """Whether vectors of bfloat16 are multiplied as they are."""
    return has_avx512() and bool(llvm.get_host_cpu_features().get("avx512bf16"))


def widen(builder: Any, bits: Any, dtype: Any, lanes: int) -> Any:
    """Turn a stored scalar (lanes == 0) or vector into float32; pairs stay what they are."""

    def shaped(scalar: Any) -> Any:
        return ir.VectorType(scalar, lanes) if lanes else scalar

    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(FLOAT))
    if dtype == types.int8:
        return builder.sitofp(bits, shaped(FLOAT))
    if dtype == types.int16:
        wide = builder.zext(bits, shaped(ir.IntType(32)))
        shift = ir.Constant(shaped(ir.IntType(32)), [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(wide, shift), shaped(FLOAT))
    return bits


@intrinsic
def to_float(typingctx: Any, stored: Any) -> Any:
    """The float32 value of a number as it is stored in weights, factors or the KV cache."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widen(builder, arguments[0], signature.args[0], 0)

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
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), emit


def array(context: Any, builder: Any, signature: Any, arguments: Any, at: int) -> Any:
    """The array that an intrinsic was given as its argument number `at`."""
    return context.make_array(signature.args[at])(context, builder, arguments[at])


def element(builder: Any, pointer: Any, row: Any, width: Any, column: Any) -> Any:
    """A pointer to one element of a C-contiguous matrix."""
    return builder.gep(pointer, [builder.add(builder.mul(row, width), column)])


def alignment(stored: Any) -> int:
    """Bytes that a stored number is aligned to."""
    return stored.width // 8 if isinstance(stored, ir.IntType) else 4


def multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    """left * right + total, of floats or vectors of them, in one rounding.

    Of vectors of pairs of bfloat16 both products of a pair are added to a total of float32, in two.
    """
    if total.type == left.type:
        lanes = f"v{total.type.count}" if isinstance(total.type, ir.VectorType) else ""
        name, terms = f"llvm.fma.{lanes}f32", [left, right, total]
    else:
        name, terms = "llvm.x86.avx512bf16.dpbf16ps.512", [total, left, right]
    kind = ir.FunctionType(total.type, [term.type for term in terms])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), terms)
