"""Fold one adapter into the base's weights, and serve everybody else beside it."""

import numpy as np
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, PageTable
from sharelora_serve.adapters.cast import cast_factor
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.models.loader import Fold

_MOST_GROWTH = {torch.float32: 1024.0}  # it has bits to spare
_MOST_GROWTH_OF_HALVES = 2.0


def fold_adapter(adapter: Adapter, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Fold:
    """W of `dtype` -> W + scaling * B A, with the factors as a pool of `adapter_dtype` holds them.

    The others subtract the pool's factors again, so these and no finer ones are folded in. What
    they are left with is W as precise as the sum is: ConfigurationError where the sum is so much
    larger than W that rounding it would change everybody's answers.
    """
    limit = _MOST_GROWTH.get(dtype, _MOST_GROWTH_OF_HALVES)

    def fold(layer: int, module: str, weight: Tensor) -> Tensor:
        pair = adapter.pairs.get((layer, module))
        if pair is None:
            return weight
        a, b = (
            cast_factor(rows, adapter_dtype).restored().to(weight.device)
            for rows in (pair.a, pair.b.T)
        )
        folded = weight + pair.scaling * (b.T @ a)
        growth = float(folded.norm() / weight.norm())
        if not growth <= limit:
            finer = "" if dtype == torch.float32 else "with --dtype float32 or "
            raise ConfigurationError(
                f"merge = {adapter.name!r}: makes layer {layer}'s {module} {growth:.3g} times as "
                f"large, and beyond {limit:g} times {str(dtype).removeprefix('torch.')} would keep "
                f"too little of the base for everybody else; serve {finer}without --merge"
            )
        return folded

    return fold


def subtract_pages(table: PageTable | None, merged: PageTable) -> PageTable:
    """The pages of a request beside a merged adapter: its own, and the merged one's negated.

    table is None for the base.
    """
    if table is None:
        return PageTable(merged.offsets, merged.a_pages, merged.b_pages, -merged.scaling)
    # Inserting keeps the order of entries: the merged pages of an entry go after its own.
    places = np.repeat(table.offsets[1:], np.diff(merged.offsets))
    return PageTable(
        table.offsets + merged.offsets,
        np.insert(table.a_pages, places, merged.a_pages),
        np.insert(table.b_pages, places, merged.b_pages),
        np.insert(table.scaling, places, -merged.scaling),
    )
