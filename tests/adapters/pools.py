"""Adapters of any form for a tiny base, and what a pool holds of them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool, Resident
from tests.adapters.samples import LAYOUT

FORMS = ("LoRA", "ShareA", "ShareB", "ShareAB", "common A")


def factor(rank: int, features: int, seed: int) -> Tensor:
    """Rank-major values that every pool dtype holds exactly; none is zero."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 9, (rank, features), generator=generator) / 8.0


def make_adapter(
    form: str = "LoRA",
    *,
    seed: int = 0,
    modules: tuple[str, ...] = MODULES,
    rank: Callable[[str], int] = lambda _: 11,
    layout: BaseLayout = LAYOUT,
) -> Adapter:
    """An adapter whose equal factors are one Tensor object, as `Adapter` promises."""
    pairs: dict[tuple[int, str], FactorPair] = {}
    made: dict[tuple[str, int, int, int], Tensor] = {}

    def once(side: str, rank: int, features: int, seed: int) -> Tensor:
        rows = factor(rank, features, seed)
        return made.setdefault((side, rank, features, seed), rows if side == "A" else rows.T)

    for layer in range(layout.num_layers):
        for index, module in enumerate(modules):
            in_features, out_features = layout.shapes[module]
            own = 10_000 * seed + 100 * index + layer + 1
            shared = 10_000 * seed + 100 * index + 50
            a_seed = {"common A": 7}.get(form, shared if form in ("ShareA", "ShareAB") else own)
            b_seed = shared if form in ("ShareB", "ShareAB") else own
            a = once("A", rank(module), in_features, a_seed)
            b = once("B", rank(module), out_features, b_seed)
            pairs[layer, module] = FactorPair(a, b, scaling=2.0 + index + layer / 8)
    return Adapter(f"{form}-{seed}", f"{form}-{seed}-{len(modules)}", pairs, config={})


def add(pool: MatrixPool, adapter: Adapter, layout: BaseLayout) -> Resident:
    return pool.place(pool.stage(adapter, layout))


def assert_reads_back(pool: MatrixPool, resident: Resident, adapter: Adapter) -> None:
    """The page table, followed through the arena, gives the adapter's factors bit for bit."""
    table = resident.page_table
    assert len(table.offsets) == LAYOUT.num_entries + 1
    assert table.offsets[0] == 0
    assert table.offsets[-1] == len(table.a_pages) == len(table.b_pages) == len(table.scaling)
    for layer in range(LAYOUT.num_layers):
        for module in MODULES:
            entry = LAYOUT.entry(layer, module)
            span = slice(table.offsets[entry], table.offsets[entry + 1])
            pair = adapter.pairs.get((layer, module))
            if pair is None:
                assert span.start == span.stop
                continue
            rank = pair.a.shape[0]
            assert span.stop - span.start == -(-rank // PAGE_RANK)
            assert (table.scaling[span] == np.float32(pair.scaling)).all()
            for pages, rows in ((table.a_pages, pair.a), (table.b_pages, pair.b.T)):
                held = pool.view(rows.shape[1])[torch.from_numpy(pages[span])].flatten(0, 1)
                assert torch.equal(held[:rank], rows.to(pool.dtype))
                assert not held[rank:].any()  # padding of the last page
