"""What adapters add to a linear layer on CUDA: y += s (x A^T) B^T, every row with its own A and B.

Two launches for the modules of a fused product: shrink writes x A^T, expand adds s (x A^T) B^T.
Which pages a row has is read on the device, and what is launched depends on shapes alone: a decode
step with them is one CUDA graph whatever its adapters are. A tile is a few neighbouring rows, of
which those with equal pages are computed together, whoever owns them: rows of one adapter, and in
the shrink those of all adapters with a common A, are one dense product.

A row is summed in one order, fixed by the layer's width, in batches of any size: its bits do not
depend on the rows beside it. Nothing is summed with atomics.

Gathered rows in one launch: Punica, arXiv 2310.18547; segments of rows: S-LoRA, arXiv 2311.03285.
Only CUDA needs this module, and torch for CUDA brings Triton along.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharelora_serve.kernels.batch import PAGE_RANK, AdapterBatch

_MAX_SPREAD_TOKENS = 256  # up to here every row may have an adapter of its own: as many programs
_MAX_SLICED_TOKENS = 1024  # from here on there are programs enough without cutting the sums up
_MIN_SLICE, _MAX_SLICES = 512, 8  # of the features of x, summed apart; a slice is whole blocks

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True, slots=True)
class AdaptedPlan:
    """The pages of a batch on the device, as in AdapterBatch; a graph keeps its own and refills it.

    row_adapter  (num_tokens,)                        int32, row of `offsets`; 0 is no adapter
    offsets      (1 + num_adapters, num_entries + 1)  int32, into the next three; row 0 is zeros
    a_pages      (num_pages,)                         int32; page 0 is zeros and is never read
    b_pages      (num_pages,)                         int32; likewise
    scaling      (num_pages,)                         float32
    max_pages    no entry has more
    """

    row_adapter: Tensor
    offsets: Tensor
    a_pages: Tensor
    b_pages: Tensor
    scaling: Tensor
    max_pages: int

    def refill(self, batch: AdapterBatch) -> None:
        """Copy a batch in, of no more rows, adapters or pages than there is room for.

        Rows that the batch lacks have no adapter.
        """
        num_tokens = len(batch.row_adapter)
        self.row_adapter[:num_tokens].copy_(batch.row_adapter, non_blocking=True)
        self.row_adapter[num_tokens:].zero_()
        for room, tensor in (
            (self.offsets, batch.offsets),
            (self.a_pages, batch.a_pages),
            (self.b_pages, batch.b_pages),
            (self.scaling, batch.scaling),
        ):
            assert len(tensor) <= len(room), "a batch has more adapters or pages than its plan"
            room[: len(tensor)].copy_(tensor, non_blocking=True)


def make_plan(batch: AdapterBatch, max_pages: int) -> AdaptedPlan:
    """The plan of one step, on the tensors of its batch.

    max_pages is the most that any entry of the batch has, or a bound of it: the kernels' buffers
    have room for so many, and those of an entry with more would run into the next row's.
    """
    return AdaptedPlan(
        batch.row_adapter, batch.offsets, batch.a_pages, batch.b_pages, batch.scaling, max_pages
    )


def reserve_plan(
    *,
    num_tokens: int,
    num_adapters: int,
    num_entries: int,
    num_pages: int,
    max_pages: int,
    device: torch.device,
) -> AdaptedPlan:
    """A plan without adapters, whose tensors a CUDA graph can keep; refill it before a replay."""
    return AdaptedPlan(
        row_adapter=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        offsets=torch.zeros(1 + num_adapters, num_entries + 1, dtype=torch.int32, device=device),
        a_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
        b_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
        scaling=torch.zeros(num_pages, dtype=torch.float32, device=device),
        max_pages=max_pages,
    )


def add_adapters(
    x: Tensor, out: Tensor, plan: AdaptedPlan, arena: Tensor, entry: int, columns: tuple[int, ...]
) -> None:
    """out[t, module] += scaling * B A x[t], every row with its own pages (arXiv 2106.09685).

    x        (num_tokens, in_features)                float32, float16 or bfloat16
    out      (num_tokens, columns[-1] or more)        likewise; padding is left as it is
    arena    (num_elements,)                          likewise; page p of width f starts at p * 8 * f
    entry    of the page table, of the first module whose outputs stand in `out`
    columns  (num_modules + 1)                        where the outputs of each begin, and the end

    Sums in float32, factors of x's own 16 bits multiplied exactly; rounds once, into `out`.
    """
    _add_adapters(
        x,
        out,
        plan.row_adapter,
        plan.offsets,
        plan.a_pages,
        plan.b_pages,
        plan.scaling,
        plan.max_pages,
        arena,
        entry,
        columns,
    )


@torch.library.custom_op("sharelora::add_adapters", mutates_args=("out",))
def _add_adapters(
    x: Tensor,
    out: Tensor,
    row_adapter: Tensor,
    offsets: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    scaling: Tensor,
    max_pages: int,
    arena: Tensor,
    entry: int,
    columns: Sequence[int],
) -> None:
    num_tokens, in_features = x.shape
    num_modules = len(columns) - 1
    launch = choose_launch(num_tokens, in_features, max_pages, x.dtype, arena.dtype)
    if x.device.type == "cpu":  # in Triton's interpreter, whose dot takes bfloat16 for integers
        launch.shrink["COMPUTE"] = tl.float32
    hidden = torch.empty(
        launch.num_parts, num_modules, num_tokens, launch.max_rank, device=x.device
    )
    shrink_kernel[(launch.num_programs, num_modules * launch.num_parts, launch.num_rank_blocks)](
        x,
        hidden,
        row_adapter,
        offsets,
        a_pages,
        arena,
        x.stride(0),
        offsets.stride(0),
        num_tokens,
        in_features,
        launch.max_rank,
        entry,
        NUM_MODULES=num_modules,
        **launch.shrink,
    )
    widest = max(end - begin for begin, end in pairwise(columns))
    blocks = triton.cdiv(widest, launch.expand["BLOCK_N"])
    expand_kernel[(launch.num_programs, blocks, num_modules)](
        out,
        hidden,
        row_adapter,
        offsets,
        a_pages,
        b_pages,
        scaling,
        arena,
        out.stride(0),
        offsets.stride(0),
        num_tokens,
        launch.max_rank,
        entry,
        tuple(columns),
        NUM_MODULES=num_modules,
        **launch.expand,
    )


@_add_adapters.register_fake
def _check(
    x: Tensor,
    out: Tensor,
    row_adapter: Tensor,
    offsets: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    scaling: Tensor,
    max_pages: int,
    arena: Tensor,
    entry: int,
    columns: Sequence[int],
) -> None:
    num_tokens = len(x)
    for tensor in (x, out, arena):
        assert tensor.dtype in _TRITON_DTYPES, f"no kernel for {tensor.dtype}"
        assert tensor.stride(-1) == 1, "the elements of a row do not stand together"
    for tensor in (row_adapter, offsets, a_pages, b_pages):
        assert tensor.dtype == torch.int32, "a page table is not int32"
    assert scaling.dtype == torch.float32, "scaling is not float32"
    for tensor in (out, row_adapter, offsets, a_pages, b_pages, scaling, arena):
        assert tensor.device == x.device, "the batch is not all on one device"
    assert len(out) == num_tokens, "x and out differ in rows"
    assert len(row_adapter) == num_tokens, "the batch has other rows than x"
    assert out.shape[1] >= columns[-1], "out is narrower than its modules"
    assert len(columns) + entry <= offsets.shape[1], "the page table has no such entries"
    assert len(a_pages) == len(b_pages) == len(scaling), "page tables differ in length"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a batch is cut into programs.

    num_programs     along the rows
    num_parts        along the features of x; their sums stand apart until expand adds them up
    num_rank_blocks  along the ranks, in shrink
    max_rank         of `hidden`, the shrunk rows: rank rows of max_pages
    shrink, expand   what the kernels are compiled with
    """

    num_programs: int
    num_parts: int
    num_rank_blocks: int
    max_rank: int
    shrink: dict[str, Any]
    expand: dict[str, Any]


def choose_launch(
    num_tokens: int,
    in_features: int,
    max_pages: int,
    x_dtype: torch.dtype,
    arena_dtype: torch.dtype,
) -> Launch:
    """Few rows are spread over many programs, many rows share what each program reads."""
    compute = x_dtype if x_dtype == arena_dtype else torch.float32
    spread = num_tokens <= _MAX_SPREAD_TOKENS
    tile = 16 if spread else 32
    max_rank = triton.next_power_of_2(max(max_pages, 2)) * PAGE_RANK
    block_rank = 16 if spread else min(64, max_rank)
    block_k = 128 if spread and compute.itemsize == 2 else 64
    slice_size = max(_MIN_SLICE, triton.cdiv(triton.cdiv(in_features, _MAX_SLICES), 128) * 128)
    num_slices = triton.cdiv(in_features, slice_size)
    slices_per_part = 1 if num_tokens <= _MAX_SLICED_TOKENS else num_slices
    num_parts = num_slices // slices_per_part
    num_tiles = triton.cdiv(num_tokens, tile)
    common = {"PAGE_RANK": PAGE_RANK, "TILE": tile, "SPREAD": spread, "num_warps": 4}
    return Launch(
        num_programs=num_tiles * tile if spread else num_tiles,
        num_parts=num_parts,
        num_rank_blocks=max_rank // block_rank,
        max_rank=max_rank,
        shrink=common
        | {
            "SLICE": slice_size,
            "SLICES_PER_PART": slices_per_part,
            "BLOCK_RANK": block_rank,
            "BLOCK_K": block_k,
            "COMPUTE": _TRITON_DTYPES[compute],
            "num_stages": 3 if compute.itemsize == 2 else 2,
        },
        expand=common | {"NUM_PARTS": num_parts, "BLOCK_RANK": 16, "BLOCK_N": 128, "num_stages": 2},
    )


@triton.jit
def _load_pages(pages: Any, offsets: Any, places: Any) -> Any:
    """Page ids at `places` of an entry, whose bounds `offsets` points to; 0 beyond its end.

    For one entry and (BLOCK_RANK,) places, or for (TILE, 1) entries and (1, BLOCK_RANK) places.
    """
    begin = tl.load(offsets)
    count = tl.load(offsets + 1) - begin
    return tl.load(pages + begin + places, mask=places < count, other=0)


@triton.jit(do_not_specialize=["num_tokens", "entry"])
def shrink_kernel(
    x: Any,
    hidden: Any,
    row_adapter: Any,
    offsets: Any,
    a_pages: Any,
    arena: Any,
    x_stride: Any,
    offsets_stride: Any,
    num_tokens: Any,
    in_features: Any,
    max_rank: Any,
    entry: Any,
    NUM_MODULES: tl.constexpr,  # noqa: N803
    PAGE_RANK: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPREAD: tl.constexpr,  # noqa: N803
    SLICE: tl.constexpr,  # noqa: N803
    SLICES_PER_PART: tl.constexpr,  # noqa: N803
    BLOCK_RANK: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    COMPUTE: tl.constexpr,  # noqa: N803
) -> None:
    """hidden[part, module, t] = A x[t] over the features of one part, for the ranks of one block.

    Of two modules that have the same page in the same place only the first computes it. What is
    beyond an entry's rank is not written. Each tile has TILE programs if SPREAD, else one.
    """
    tile = tl.program_id(0) // TILE if SPREAD else tl.program_id(0)
    module = tl.program_id(1) % NUM_MODULES
    part = tl.program_id(1) // NUM_MODULES
    in_tile = tl.arange(0, TILE)
    rows = tile * TILE + in_tile
    rank = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    adapter = tl.load(row_adapter + rows, mask=rows < num_tokens, other=0)
    places = (rank // PAGE_RANK)[None, :]
    bounds = (offsets + adapter * offsets_stride + entry)[:, None]
    pages = _load_pages(a_pages, bounds + module, places)
    for earlier in range(module):
        pages = tl.where(_load_pages(a_pages, bounds + earlier, places) == pages, 0, pages)
    waiting = tl.max(pages, axis=1) > 0
    if SPREAD:
        member = tl.program_id(0) % TILE
        own = tl.sum(tl.where(in_tile[:, None] == member, pages, 0), axis=0)
        equal = tl.max(tl.abs(pages - own[None, :]), axis=1) == 0
        # The first row of its kind computes for all of them.
        waiting = waiting & equal & (tl.min(tl.where(equal, in_tile, TILE), axis=0) == member)
    member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)
    while member < TILE:
        own = tl.sum(tl.where(in_tile[:, None] == member, pages, 0), axis=0)
        equal = tl.max(tl.abs(pages - own[None, :]), axis=1) == 0
        page_rows = own.to(tl.int64) * PAGE_RANK + rank % PAGE_RANK
        total = tl.zeros((TILE, BLOCK_RANK), tl.float32)
        for piece in range(part * SLICES_PER_PART, (part + 1) * SLICES_PER_PART):
            answer = tl.zeros((TILE, BLOCK_RANK), tl.float32)
            for begin in range(piece * SLICE, min((piece + 1) * SLICE, in_features), BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                x_block = tl.load(
                    x + rows.to(tl.int64)[:, None] * x_stride + k[None, :],
                    mask=equal[:, None] & (k < in_features)[None, :],
                    other=0.0,
                )
                a_block = tl.load(
                    arena + page_rows[None, :] * in_features + k[:, None],
                    mask=(own > 0)[None, :] & (k < in_features)[:, None],
                    other=0.0,
                )
                answer = tl.dot(
                    x_block.to(COMPUTE), a_block.to(COMPUTE), answer, input_precision="tf32x3"
                )
            total += answer
        slot = (part * NUM_MODULES + module) * num_tokens + rows
        tl.store(
            hidden + slot.to(tl.int64)[:, None] * max_rank + rank[None, :],
            total,
            mask=equal[:, None] & (own > 0)[None, :],
        )
        waiting = waiting & (equal == 0)
        member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)


@triton.jit(do_not_specialize=["num_tokens", "entry"])
def expand_kernel(
    out: Any,
    hidden: Any,
    row_adapter: Any,
    offsets: Any,
    a_pages: Any,
    b_pages: Any,
    scaling: Any,
    arena: Any,
    out_stride: Any,
    offsets_stride: Any,
    num_tokens: Any,
    max_rank: Any,
    entry: Any,
    columns: Any,
    NUM_MODULES: tl.constexpr,  # noqa: N803
    PAGE_RANK: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    SPREAD: tl.constexpr,  # noqa: N803
    NUM_PARTS: tl.constexpr,  # noqa: N803
    BLOCK_RANK: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
) -> None:
    """out[t, module] += B (scaling * hidden[t]) for one block of a module's outputs."""
    tile = tl.program_id(0) // TILE if SPREAD else tl.program_id(0)
    module = tl.program_id(2)
    column = columns[0]
    end = columns[1]
    for other in tl.static_range(1, NUM_MODULES):
        if module == other:
            column = columns[other]
            end = columns[other + 1]
    width = end - column
    in_tile = tl.arange(0, TILE)
    rows = tile * TILE + in_tile
    adapter = tl.load(row_adapter + rows, mask=rows < num_tokens, other=0)
    waiting = (adapter > 0) & (tl.program_id(1) * BLOCK_N < width)
    if SPREAD:
        member = tl.program_id(0) % TILE
        own = tl.sum(tl.where(in_tile == member, adapter, 0), axis=0)
        equal = adapter == own
        # The first row of an adapter computes for all of them.
        waiting = waiting & equal & (tl.min(tl.where(equal, in_tile, TILE), axis=0) == member)
    member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)
    while member < TILE:
        own = tl.sum(tl.where(in_tile == member, adapter, 0), axis=0)
        equal = adapter == own
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        bounds = offsets + own * offsets_stride + entry
        begin = tl.load(bounds + module)
        count = tl.load(bounds + module + 1) - begin
        total = tl.zeros((TILE, BLOCK_N), tl.float32)
        for first in range(0, count * PAGE_RANK, BLOCK_RANK):
            rank = first + tl.arange(0, BLOCK_RANK)
            places = rank // PAGE_RANK
            a = _load_pages(a_pages, bounds + module, places)
            b = _load_pages(b_pages, bounds + module, places)
            scale = tl.load(scaling + begin + places, mask=places < count, other=0.0)
            source = tl.zeros((BLOCK_RANK,), tl.int32) + module  # who computed A x
            for earlier in range(module):
                same = _load_pages(a_pages, bounds + earlier, places) == a
                source = tl.where(same & (source == module), earlier, source)
            used = (a > 0) & (b > 0)
            shrunk = tl.zeros((TILE, BLOCK_RANK), tl.float32)
            for part in tl.static_range(NUM_PARTS):
                slot = (part * NUM_MODULES + source)[None, :] * num_tokens + rows[:, None]
                shrunk += tl.load(
                    hidden + slot.to(tl.int64) * max_rank + rank[None, :],
                    mask=equal[:, None] & used[None, :],
                    other=0.0,
                )
            page_rows = b.to(tl.int64) * PAGE_RANK + rank % PAGE_RANK
            b_block = tl.load(
                arena + page_rows[:, None] * width + n[None, :],
                mask=used[:, None] & (n < width)[None, :],
                other=0.0,
            )
            # Three products of tf32 are as exact as float32, whose range shrunk needs.
            total = tl.dot(
                shrunk * scale[None, :], b_block.to(tl.float32), total, input_precision="tf32x3"
            )
        if count > 0:
            at = out + rows.to(tl.int64)[:, None] * out_stride + column + n[None, :]
            inside = equal[:, None] & (n < width)[None, :]
            tl.store(at, tl.load(at, mask=inside).to(tl.float32) + total, mask=inside)
        waiting = waiting & (equal == 0)
        member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)
