"""Shrink and expand in plain torch, without reading a number on the host: twin of the kernels."""

from itertools import pairwise

import torch
from torch import Tensor

from sharelora_serve.kernels.adapted_plan import AdaptedPlan
from sharelora_serve.kernels.batch import PAGE_RANK

_GATHERED_ROWS = 64  # rows whose pages are copied together


def add_adapters(
    x: Tensor,
    out: Tensor,
    plan: AdaptedPlan,
    arena: Tensor,
    entry: int,
    columns: tuple[int, ...],
) -> None:
    """out[t, module] += scaling * B A x[t], every row with its own pages (arXiv 2106.09685).

    x        (num_tokens, in_features)
    out      (num_tokens, columns[-1] or more)
    arena    the pool's memory; page p of width f starts at element p * 8 * f
    entry    of the page table, of the first module whose outputs stand in `out`
    columns  (num_modules + 1,), where the outputs of each begin
    """
    width = x.shape[1]
    places = torch.arange(plan.max_pages, device=x.device)
    for rows, result, adapters in zip(
        x.split(_GATHERED_ROWS),
        out.split(_GATHERED_ROWS),
        plan.row_adapter.long().split(_GATHERED_ROWS),
        strict=True,
    ):
        for module, (column, end) in enumerate(pairwise(columns)):
            begin, stop = plan.offsets[adapters, entry + module : entry + module + 2].unbind(1)
            index = begin.unsqueeze(1) + places
            is_there = index < stop.unsqueeze(1)
            index = torch.where(is_there, index, 0).long()
            a, b = (
                _pages(arena, torch.where(is_there, pages[index], 0), features)
                for pages, features in ((plan.a_pages, width), (plan.b_pages, end - column))
            )
            scaling = torch.where(is_there, plan.scaling[index], 0.0)
            inner = torch.bmm(a, rows.float().unsqueeze(2)).squeeze(2)
            inner = inner * scaling.repeat_interleave(PAGE_RANK, dim=1)
            result[:, column:end] += torch.bmm(inner.unsqueeze(1), b).squeeze(1)


def _pages(arena: Tensor, page_ids: Tensor, width: int) -> Tensor:
    """Rank rows (num_tokens, max_pages * 8, width) in float32; page 0 is all zeros."""
    size = PAGE_RANK * width
    view = arena[: len(arena) // size * size].view(-1, PAGE_RANK, width)
    return view[page_ids.long()].float().flatten(1, 2)
