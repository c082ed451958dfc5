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
from sharelora_serve.kernels.triton_kernels import expand_kernel, shrink_kernel

_MAX_SPREAD_TOKENS = 256  # up to here every row may have an adapter of its own: as many programs
_MAX_SLICED_TOKENS = 1024  # beyond, there are programs enough without cutting the sums up
_MIN_SLICE, _MAX_SLICES = 512, 8  # of the features of x, summed apart; a slice is whole blocks

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def add_adapters(
    x: Tensor, out: Tensor, batch: AdapterBatch, entry: int, columns: tuple[int, ...]
) -> None:
    """out[t, module] += scaling * B A x[t], every row with its own pages (arXiv 2106.09685).

    x        (num_tokens, in_features)                float32, float16 or bfloat16
    out      (num_tokens, columns[-1] or more)        likewise; padding is left as it is
    entry    of the page table, of the first module whose outputs stand in `out`
    columns  (num_modules + 1)                        where the outputs of each begin, and the end

    The batch's arena is of one of these types too, or int8. Sums in float32 and rounds once, into
    `out`. No tensor but the arena has 2^31 elements.
    """
    _add_adapters(
        x,
        out,
        batch.row_adapter,
        batch.offsets,
        batch.a_pages,
        batch.b_pages,
        batch.scaling,
        batch.max_pages,
        batch.arena,
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
        (launch.num_parts, num_modules, num_tokens, launch.max_rank),
        dtype=torch.float32,
        device=x.device,
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
        launch.slice_size,
        launch.slices_per_part,
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
    for dtype in (x.dtype, out.dtype):
        assert dtype in _TRITON_DTYPES, f"no kernel for {dtype}"
    assert arena.dtype in (*_TRITON_DTYPES, torch.int8), f"no kernel for {arena.dtype} factors"
    for tensor in (x, out, arena):
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
    slice_size       features of x that are summed up before they are added to those before them
    slices_per_part  one, or all of them
    shrink, expand   what the kernels are compiled with
    """

    num_programs: int
    num_parts: int
    num_rank_blocks: int
    max_rank: int
    slice_size: int
    slices_per_part: int
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
    compute = x_dtype if arena_dtype in (x_dtype, torch.int8) else torch.float32
    spread = num_tokens <= _MAX_SPREAD_TOKENS
    sliced = num_tokens <= _MAX_SLICED_TOKENS
    tile = 16 if sliced else 32
    max_rank = triton.next_power_of_2(max(max_pages, 2)) * PAGE_RANK
    is_half = compute.itemsize == 2
    block_rank = 16 if spread else min(32, max_rank)
    block_k = (128 if spread else 64) if is_half else 32
    if arena_dtype == torch.int8 and not sliced:
        block_k = 32  # with 64 it spills
    slice_size = max(_MIN_SLICE, triton.cdiv(triton.cdiv(in_features, _MAX_SLICES), 128) * 128)
    num_slices = triton.cdiv(in_features, slice_size)
    slices_per_part = 1 if sliced else num_slices
    num_parts = num_slices // slices_per_part
    num_tiles = triton.cdiv(num_tokens, tile)
    common = {
        "PAGE_RANK": PAGE_RANK,
        "TILE": tile,
        "SPREAD": spread,
        "num_warps": 4,
        "enable_fp_fusion": False,  # one rounding rule for all variants, whatever Triton's default
    }
    return Launch(
        num_programs=num_tiles * tile if spread else num_tiles,
        num_parts=num_parts,
        num_rank_blocks=max_rank // block_rank,
        max_rank=max_rank,
        slice_size=slice_size,
        slices_per_part=slices_per_part,
        shrink=common
        | {
            "BLOCK_RANK": block_rank,
            "BLOCK_K": block_k,
            "COMPUTE": _TRITON_DTYPES[compute],
            "num_stages": 3,
        },
        expand=common
        | {
            "NUM_PARTS": num_parts,
            "BLOCK_RANK": 16,
            "BLOCK_N": 128 if spread else 64,
            "num_stages": 2,
            "maxnreg": 128,
        },
    )
