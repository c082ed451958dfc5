"""Tiles of products, as LLVM intrinsics for numba: sums that stay in registers throughout.

Weights and factors are numbers as `vector` knows them; all else is float32, but for activations
that are pairs as their weights are; all is C-contiguous. Every output adds its products in an order
that does not depend on the tile: a row's result never depends on the rows beside it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sharelora_serve.kernels.batch import PAGE_RANK
from sharelora_serve.kernels.vector import FLOAT, alignment, array, element, multiply_add, widen
from sharelora_serve.memory import CACHE_LINE

LANES = 16
"""Outputs that one vector holds; packed weights are stored in blocks of as many outputs."""

STRETCH = 1024
"""Bytes of one entry of a list of what to bring nearer."""

_DOT_LANES = 8  # of a vector in dot products: one register of AVX2
TO_FIRST_LEVEL, TO_SECOND_LEVEL = 3, 2  # of the caches, as LLVM calls them
_MANY = 4  # cache lines per step of a product, of much that lies ahead; else one
_FETCHES = 2  # cache lines per step of a dot product: more would wait for each other


def make_product_tile(
    max_rows: int,
    num_blocks: int,
    *,
    accumulate: bool,
    fetches: bool = False,
    min_rows: int = 1,
) -> Any:
    """An intrinsic for `min_rows` to `max_rows` rows times a few blocks of outputs.

    tile(x, x_row, rows, x_column, weight, start, stride, apart, depth, out, out_row, out_column,
    ahead) computes, for i < rows, j < num_blocks, lane l < LANES and w = start + j * apart,

        out[out_row + i, out_column + j * LANES + l]
            (+)= sum over k < depth of x[x_row + i, x_column + k] * weight[w + k * stride + l]

    x       (num_rows, columns)   float32, or pairs of bfloat16
    weight  any shape             as stored, or pairs too; addressed by element
    out     (num_rows, columns)   float32; added to when `accumulate`

    A pair, which numba sees as int32, times another is the sum of both products. When the tile
    `fetches`, it brings as much weight nearer as it reads, from the end of its own on: arithmetic
    hides memory. `ahead` is () or (addresses, first, last): then it brings nearer what lies at
    addresses[first:last], STRETCH bytes each, or as many lines of the cache of it as four times
    `depth`: one line in each step, if that is enough, since lines of a burst wait for each other.
    """

    def emit_rows(
        context: Any, builder: Any, signature: Any, arguments: Any, num_rows: int
    ) -> None:
        _, row_at, _, column_at, _, *numbers, _, out_row, out_column, ahead = arguments
        start, stride, apart, depth = numbers
        source, packed, target = (
            array(context, builder, signature, arguments, at) for at in (0, 4, 9)
        )
        word = depth.type
        rows = _rows(builder, source, num_rows, row_at, column_at)
        blocks = [element(builder, packed.data, apart, word(j), start) for j in range(num_blocks)]
        dtype = signature.args[4].dtype
        outputs = _rows(builder, target, num_rows, out_row, out_column)
        sums = _Sums(builder, outputs, num_blocks, LANES, accumulate=accumulate)
        fetched = CACHE_LINE // (LANES * dtype.bitwidth // 8)  # blocks
        end = builder.mul(depth, stride)

        def add_lines(due: Callable[[Any], None] | None) -> None:
            with cgutils.for_range(builder, depth) as loop:
                at = builder.mul(loop.index, stride)
                sums.add(rows, loop.index, [builder.gep(block, [at]) for block in blocks], dtype)
                if due is not None:
                    due(loop.index)
                if fetches:
                    for block in blocks[::fetched]:
                        fetch(builder, builder.gep(block, [builder.add(at, end)]), TO_SECOND_LEVEL)

        if len(signature.args[12]):
            listed, first, last = cgutils.unpack_tuple(builder, ahead)
            addresses = context.make_array(signature.args[12][0])(context, builder, listed)
            lines = builder.mul(builder.sub(last, first), word(STRETCH // CACHE_LINE))
            with builder.if_else(builder.icmp_signed(">", lines, depth)) as branches:
                for branch, pace in zip(branches, (_MANY, 1), strict=True):
                    with branch:
                        add_lines(
                            partial(_fetch_listed, builder, addresses.data, first, last, pace)
                        )
        else:
            add_lines(None)
        sums.store()

    @intrinsic
    def tile(
        typingctx: Any,
        x: Any,
        x_row: Any,
        rows: Any,
        x_column: Any,
        weight: Any,
        start: Any,
        stride: Any,
        apart: Any,
        depth: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
        ahead: Any,
    ) -> Any:
        index = types.intp
        product = (x, *[index] * 3, weight, *[index] * 4, out, index, index, ahead)
        return types.void(*product), _by_rows(emit_rows, min_rows, max_rows)

    return tile


def make_expand_tile(max_rows: int, num_blocks: int, *, lanes: int = LANES) -> Any:
    """An intrinsic for up to `max_rows` rows times a few blocks of some pages' outputs.

    tile(hidden, row, rows, page_ids, arena, width, column, out, out_row, out_column) computes, for
    i < rows and n < num_blocks * LANES,

        out[out_row + i, out_column + n] = sum over p < len(page_ids) and k < PAGE_RANK of
            hidden[row + i, p * PAGE_RANK + k] * arena[(page_ids[p] * PAGE_RANK + k) * width + at]

    where at = column + n.

    hidden    (num_rows, at least len(page_ids) * PAGE_RANK)   float32
    page_ids  (num_pages,)                                     int32
    arena     any shape                                        as stored; addressed by element
    out       (rows, columns)                                  float32
    `lanes` are those of a vector: a block is computed in one or more.
    """

    def emit_rows(
        context: Any, builder: Any, signature: Any, arguments: Any, num_rows: int
    ) -> None:
        _, row_at, _, _, _, width, column, _, out_row, out_column = arguments
        source, page_ids, arena, target = (
            array(context, builder, signature, arguments, at) for at in (0, 3, 4, 7)
        )
        word, dtype = width.type, signature.args[4].dtype
        rows = _rows(builder, source, num_rows, row_at, word(0))
        outputs = _rows(builder, target, num_rows, out_row, out_column)
        sums = _Sums(builder, outputs, num_blocks * LANES // lanes, lanes, accumulate=False)
        num_pages = cgutils.unpack_tuple(builder, page_ids.shape, 1)[0]
        with cgutils.for_range(builder, num_pages) as pages:
            page = builder.sext(builder.load(builder.gep(page_ids.data, [pages.index])), word)
            rank_rows = builder.mul(page, word(PAGE_RANK))
            start = element(builder, arena.data, rank_rows, width, column)
            first = builder.mul(pages.index, word(PAGE_RANK))
            for k in range(PAGE_RANK):
                begin = builder.gep(start, [builder.mul(width, word(k))])
                blocks = [
                    builder.gep(begin, [word(part)]) for part in range(0, num_blocks * LANES, lanes)
                ]
                sums.add(rows, builder.add(first, word(k)), blocks, dtype)
        sums.store()

    @intrinsic
    def tile(
        typingctx: Any,
        hidden: Any,
        row: Any,
        rows: Any,
        page_ids: Any,
        arena: Any,
        width: Any,
        column: Any,
        out: Any,
        out_row: Any,
        out_column: Any,
    ) -> Any:
        index = types.intp
        product = (hidden, index, index, page_ids, arena, index, index, out, index, index)
        return types.void(*product), _by_rows(emit_rows, 1, max_rows)

    return tile


def make_shrink_tile(num_rows: int, num_ranks: int) -> Any:
    """An intrinsic for the dot products of a few rows with a few rank rows.

    tile(x, x_row, pages, start, depth, out, out_row, out_column, ahead, num_lines) computes, for
    i < num_rows and j < num_ranks,

        out[out_row + i, out_column + j]
            = sum over k < depth of x[x_row + i, k] * pages[start + j * depth + k]

    and on its way fetches up to `num_lines` cache lines from element `ahead` of `pages` on, which
    the caller will read next: arithmetic hides memory.

    x      (rows, depth)     float32
    pages  any shape         as stored; addressed by element
    out    (rows, columns)   float32
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, row_at, _, start, depth, _, out_row, out_column, ahead, num_lines = arguments
        source, pages, target = (
            array(context, builder, signature, arguments, at) for at in (0, 2, 5)
        )
        word, dtype = depth.type, signature.args[2].dtype
        vector = ir.VectorType(FLOAT, _DOT_LANES)
        rows = _rows(builder, source, num_rows, row_at, word(0))
        ranks = [
            builder.gep(pages.data, [builder.add(start, builder.mul(depth, word(j)))])
            for j in range(num_ranks)
        ]
        outputs = _rows(builder, target, num_rows, out_row, out_column)
        dots = [
            (row, rank, output, j, cgutils.alloca_once(builder, vector))
            for row, output in zip(rows, outputs, strict=True)
            for j, rank in enumerate(ranks)
        ]
        for *_, place in dots:
            builder.store(ir.Constant(vector, [0.0] * _DOT_LANES), place)
        num_steps = builder.udiv(depth, word(_DOT_LANES))
        following = builder.bitcast(builder.gep(pages.data, [ahead]), ir.IntType(8).as_pointer())
        with cgutils.for_range(builder, num_steps) as loop:
            for n in range(_FETCHES):
                line = builder.add(builder.mul(loop.index, word(_FETCHES)), word(n))
                with builder.if_then(builder.icmp_signed("<", line, num_lines)):
                    byte = builder.mul(line, word(CACHE_LINE))
                    fetch(builder, builder.gep(following, [byte]), TO_FIRST_LEVEL)
            at = builder.mul(loop.index, word(_DOT_LANES))
            values = [
                _load(builder, builder.gep(row, [at]), types.float32, _DOT_LANES) for row in rows
            ]
            for j, rank in enumerate(ranks):
                factor = _load(builder, builder.gep(rank, [at]), dtype, _DOT_LANES)
                for i, value in enumerate(values):
                    place = dots[i * num_ranks + j][-1]
                    total = multiply_add(builder, value, factor, builder.load(place))
                    builder.store(total, place)
        whole = builder.mul(num_steps, word(_DOT_LANES))
        for row, rank, output, j, place in dots:
            total = cgutils.alloca_once_value(builder, _sum_lanes(builder, builder.load(place)))
            with cgutils.for_range_slice(builder, whole, depth, word(1)) as (k, _):
                factor = _load(builder, builder.gep(rank, [k]), dtype, 0)
                value = builder.load(builder.gep(row, [k]))
                builder.store(multiply_add(builder, value, factor, builder.load(total)), total)
            builder.store(builder.load(total), builder.gep(output, [word(j)]))
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


class _Sums:
    """Some rows of outputs, each a few vectors, that stay in registers while products are added."""

    def __init__(
        self, builder: Any, outputs: list[Any], num_vectors: int, lanes: int, *, accumulate: bool
    ) -> None:
        """outputs: where each row's first number stands; what is there is added to, or lost."""
        vector, zero = ir.VectorType(FLOAT, lanes), [0.0] * lanes
        self._builder, self._lanes = builder, lanes
        self._targets = [
            builder.bitcast(builder.gep(row, [ir.IntType(64)(j * lanes)]), vector.as_pointer())
            for row in outputs
            for j in range(num_vectors)
        ]
        # LLVM keeps these in registers: nothing else takes their address.
        self._places = [cgutils.alloca_once(builder, vector) for _ in self._targets]
        for target, place in zip(self._targets, self._places, strict=True):
            begin = builder.load(target, align=4) if accumulate else ir.Constant(vector, zero)
            builder.store(begin, place)

    def add(self, rows: list[Any], k: Any, blocks: list[Any], dtype: Any) -> None:
        """Add each row's number k times the stored vectors that `blocks` point to."""
        builder, lane = self._builder, ir.IntType(32)
        everywhere = ir.Constant(ir.VectorType(lane, self._lanes), [0] * self._lanes)
        scalars = ir.VectorType(rows[0].type.pointee, self._lanes)
        undefined = ir.Constant(scalars, ir.Undefined)
        columns = [_load(builder, block, dtype, self._lanes) for block in blocks]
        places = iter(self._places)
        for row in rows:
            scalar = builder.load(builder.gep(row, [k]))
            first = builder.insert_element(undefined, scalar, lane(0))
            spread = builder.shuffle_vector(first, undefined, everywhere)
            for column in columns:
                place = next(places)
                total = multiply_add(builder, spread, column, builder.load(place))
                builder.store(total, place)

    def store(self) -> None:
        """Write the sums to the outputs."""
        for target, place in zip(self._targets, self._places, strict=True):
            self._builder.store(self._builder.load(place), target, align=4)


def _by_rows(emit_rows: Callable[..., None], min_rows: int, max_rows: int) -> Callable[..., Any]:
    """What emits a tile for each number of rows, the third argument, of which one is run."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows = arguments[2]
        for count in range(min_rows, max_rows + 1):
            with builder.if_then(builder.icmp_signed("==", rows, rows.type(count))):
                emit_rows(context, builder, signature, arguments, count)
        return context.get_dummy_value()

    return emit


def _rows(builder: Any, matrix: Any, count: int, first: Any, column: Any) -> list[Any]:
    """Pointers to `count` rows of a matrix, from `column` on."""
    width = cgutils.unpack_tuple(builder, matrix.shape, 2)[1]
    return [
        element(builder, matrix.data, builder.add(first, first.type(i)), width, column)
        for i in range(count)
    ]


def _load(builder: Any, pointer: Any, dtype: Any, lanes: int) -> Any:
    """The stored numbers at `pointer`, as `widen` gives them; one scalar for lanes == 0."""
    stored = pointer.type.pointee
    if lanes:
        pointer = builder.bitcast(pointer, ir.VectorType(stored, lanes).as_pointer())
    return widen(builder, builder.load(pointer, align=alignment(stored)), dtype, lanes)


def _sum_lanes(builder: Any, total: Any) -> Any:
    """The sum of a vector's lanes, halves on halves."""
    lane, lanes = ir.IntType(32), total.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (
            builder.shuffle_vector(
                total, total, ir.Constant(ir.VectorType(lane, lanes), list(range(at, at + lanes)))
            )
            for at in (0, lanes)
        )
        total = builder.fadd(low, high)
    return builder.extract_element(total, lane(0))


def _fetch_listed(
    builder: Any, addresses: Any, first: Any, last: Any, pace: int, step: Any
) -> None:
    """Fetch `pace` lines of the cache, those that a step is due of addresses[first:last]."""
    word = step.type
    each = word(STRETCH // (pace * CACHE_LINE))
    at = builder.add(first, builder.udiv(step, each))
    with builder.if_then(builder.icmp_signed("<", at, last)):
        byte = builder.mul(builder.urem(step, each), word(pace * CACHE_LINE))
        address = builder.add(builder.load(builder.gep(addresses, [at])), byte)
        for line in range(pace):
            there = builder.add(address, word(line * CACHE_LINE))
            pointer = builder.inttoptr(there, ir.IntType(8).as_pointer())
            fetch(builder, pointer, TO_SECOND_LEVEL)


def fetch(builder: Any, pointer: Any, level: int) -> None:
    """Bring a cache line nearer, without waiting for it."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    prefetch = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]),
        "llvm.prefetch.p0i8",
    )
    line = builder.bitcast(pointer, byte)
    builder.call(prefetch, [line, flag(0), flag(level), flag(1)])  # to read, data
