"""Shrink and expand in plain torch, without reading a number on the host: twin of the kernels."""

from itertools import pairwise

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import PAGE_RANK, AdapterBatch

_GATHERED_ROWS = 64  # rows whose pages are copied together


def add_adapters(
    x: Tensor, out: Tensor, batch: AdapterBatch, entry: int, columns: tuple[int, ...]
) -> None:
    """See triton_adapted."""
    width = x.shape[1]
    places = torch.arange(batch.max_pages, device=x.device)
    for rows, result, adapters in zip(
        x.split(_GATHERED_ROWS),
        out.split(_GATHERED_ROWS),
        batch.row_adapter.long().split(_GATHERED_ROWS),
        strict=True,
    ):
        for module, (column, end) in enumerate(pairwise(columns)):
            begin, stop = batch.offsets[adapters, entry + module : entry + module + 2].unbind(1)
            index = begin.unsqueeze(1) + places
            is_there = index < stop.unsqueeze(1)
            index = torch.where(is_there, index, 0).long()
            a, b = (
                _pages(batch.arena, torch.where(is_there, pages[index], 0), features)
                for pages, features in ((batch.a_pages, width), (batch.b_pages, end - column))
            )
            scaling = torch.where(is_there, batch.scaling[index], 0.0)
            inner = torch.bmm(a, rows.float().unsqueeze(2)).squeeze(2)
            inner = inner * scaling.repeat_interleave(PAGE_RANK, dim=1)
            result[:, column:end] += torch.bmm(inner.unsqueeze(1), b).squeeze(1)


def _pages(arena: Tensor, page_ids: Tensor, width: int) -> Tensor:
    """Rank rows (num_tokens, max_pages * 8, width) in float32; page 0 is all zeros."""
    size = PAGE_RANK * width
    view = arena[: len(arena) // size * size].view(-1, PAGE_RANK, width)
    return view[page_ids.long()].float().flatten(1, 2)
