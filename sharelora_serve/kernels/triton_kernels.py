"""Shrink and expand as Triton compiles them; `triton_adapted` says what they compute together.

A tile is TILE neighbouring rows, of which those with equal pages are computed together, whoever
owns them. It has one program for each of its rows if SPREAD, of which those whose work an earlier
row does return at once; else one program that does all, one kind of rows after the other.
"""

import triton
import triton.language as tl


@triton.jit
def _load_pages(pages, offsets, places):
    """Page ids at `places` of an entry, whose bounds `offsets` points to; 0 beyond its end.

    For one entry and (BLOCK_RANK,) places, or for (TILE, 1) entries and (1, BLOCK_RANK) places.
    """
    begin = tl.load(offsets)
    count = tl.load(offsets + 1) - begin
    return tl.load(pages + begin + places, mask=places < count, other=0)


@triton.jit(do_not_specialize=["num_tokens", "slices_per_part", "entry"])
def shrink_kernel(
    x,
    hidden,
    row_adapter,
    offsets,
    a_pages,
    arena,
    x_stride,
    offsets_stride,
    num_tokens,
    in_features,
    max_rank,
    slice_size,
    slices_per_part,
    entry,
    NUM_MODULES: tl.constexpr,
    PAGE_RANK: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """hidden[part, module, t] = A x[t] over the features of one part, for the ranks of one block.

    Of two modules that have the same page in the same place only the first computes it. What is
    beyond an entry's rank is not written. Each tile has TILE programs if SPREAD, else one.
    """
    tile = tl.program_id(0) // TILE if SPREAD else tl.program_id(0)
    module = tl.program_id(1) % NUM_MODULES
    part = tl.program_id(1) // NUM_MODULES
    first_rank = tl.program_id(2) * BLOCK_RANK
    if SPREAD:
        row = tl.program_id(0)
        own = tl.load(row_adapter + row, mask=row < num_tokens, other=0)
        bound = offsets + own * offsets_stride + entry + module
        if (tl.load(bound + 1) - tl.load(bound)) * PAGE_RANK <= first_rank:
            return
    in_tile = tl.arange(0, TILE)
    rows = tile * TILE + in_tile
    rank = first_rank + tl.arange(0, BLOCK_RANK)
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
        page_rows = arena + (own.to(tl.int64) * PAGE_RANK + rank % PAGE_RANK) * in_features
        total = tl.full((TILE, BLOCK_RANK), 0.0, tl.float32)
        for piece in range(part * slices_per_part, (part + 1) * slices_per_part):
            end = min((piece + 1) * slice_size, in_features)
            answer = tl.full((TILE, BLOCK_RANK), 0.0, tl.float32)
            for begin in range(piece * slice_size, end, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                x_block = tl.load(
                    x + rows[:, None] * x_stride + k[None, :],
                    mask=equal[:, None] & (k < in_features)[None, :],
                    other=0.0,
                )
                a_block = tl.load(
                    page_rows[None, :] + k[:, None],
                    mask=(own > 0)[None, :] & (k < in_features)[:, None],
                    other=0.0,
                )
                answer = tl.dot(
                    x_block.to(COMPUTE), a_block.to(COMPUTE), answer, input_precision="tf32x3"
                )
            total += answer
        slot = (part * NUM_MODULES + module) * num_tokens + rows
        tl.store(
            hidden + slot[:, None] * max_rank + rank[None, :],
            total,
            mask=equal[:, None] & (own > 0)[None, :],
        )
        waiting = waiting & (equal == 0)
        member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)


@triton.jit(do_not_specialize=["num_tokens", "entry"])
def expand_kernel(
    out,
    hidden,
    row_adapter,
    offsets,
    a_pages,
    b_pages,
    scaling,
    arena,
    out_stride,
    offsets_stride,
    num_tokens,
    max_rank,
    entry,
    columns,
    NUM_MODULES: tl.constexpr,
    PAGE_RANK: tl.constexpr,
    TILE: tl.constexpr,
    SPREAD: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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
    if tl.program_id(1) * BLOCK_N >= width:
        return
    if SPREAD:
        row = tl.program_id(0)
        if tl.load(row_adapter + row, mask=row < num_tokens, other=0) == 0:
            return
    in_tile = tl.arange(0, TILE)
    rows = tile * TILE + in_tile
    adapter = tl.load(row_adapter + rows, mask=rows < num_tokens, other=0)
    waiting = adapter > 0
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
        total = tl.full((TILE, BLOCK_N), 0.0, tl.float32)
        for first in range(0, count * PAGE_RANK, BLOCK_RANK):
            rank = first + tl.arange(0, BLOCK_RANK)
            places = rank // PAGE_RANK
            a = _load_pages(a_pages, bounds + module, places)
            b = _load_pages(b_pages, bounds + module, places)
            scale = tl.load(scaling + begin + places, mask=places < count, other=0.0)
            source = tl.full((BLOCK_RANK,), 0, tl.int32) + module  # who computed A x
            for earlier in range(module):
                same = _load_pages(a_pages, bounds + earlier, places) == a
                source = tl.where(same & (source == module), earlier, source)
            used = (a > 0) & (b > 0)
            slot = (source * num_tokens)[None, :] + rows[:, None]
            at = slot * max_rank + rank[None, :]
            shrunk = tl.full((TILE, BLOCK_RANK), 0.0, tl.float32)
            for part in tl.static_range(NUM_PARTS):
                shrunk += tl.load(
                    hidden + part * NUM_MODULES * num_tokens * max_rank + at,
                    mask=equal[:, None] & used[None, :],
                    other=0.0,
                )
            page_rows = arena + (b.to(tl.int64) * PAGE_RANK + rank % PAGE_RANK) * width
            b_block = tl.load(
                page_rows[:, None] + n[None, :],
                mask=used[:, None] & (n < width)[None, :],
                other=0.0,
            )
            # Three products of tf32 are as exact as float32, whose range shrunk needs.
            total = tl.dot(
                shrunk * scale[None, :], b_block.to(tl.float32), total, input_precision="tf32x3"
            )
        if count > 0:
            at = out + column + rows[:, None] * out_stride + n[None, :]
            inside = equal[:, None] & (n < width)[None, :]
            tl.store(at, tl.load(at, mask=inside).to(tl.float32) + total, mask=inside)
        waiting = waiting & (equal == 0)
        member = tl.min(tl.where(waiting, in_tile, TILE), axis=0)
