"""Batches to hold one set of kernels against another, and who owns their rows.

Whatever the kernels are told about a batch is put together here and nowhere else in these tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair, PageTable
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.kernels.batch import BLOCK_SIZE, AdapterBatch, AttentionBatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What weights, keys and values are stored in."""

POOL_DTYPES = (*DTYPES, torch.int8)
"""What factors are stored in."""

UNWRITTEN = {torch.int8: 99}
"""What no adapter wrote holds where there is no NaN."""

OWNERS = ("base", "one", "identical", "distinct", "uniform", "zipf", "skewed")
"""Names of how the rows of a batch are spread over adapters; see draw_owners."""

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The products of a decoder layer, and the modules whose outputs stand side by side in each."""

LAYOUTS = {
    name: BaseLayout(
        name,
        num_layers=2,
        shapes={
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        },
    )
    for name, hidden, kv, inner in (("round", 48, 16, 80), ("odd", 37, 19, 53))
}
"""One base of whole vectors, and one whose widths are multiples of nothing."""


def small_integers(*shape: int, generator: torch.Generator) -> Tensor:
    """A quarter of the entries in -4..4, the rest 0: products and sums are exact in float32."""
    kept = torch.rand(shape, generator=generator) < 0.25
    return (torch.randint(-4, 5, shape, generator=generator) * kept).float()


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two float32 tensors are equal bit for bit, NaNs and signs of zeros included."""
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


def draw_owners(
    kind: str, num_rows: int, num_adapters: int, generator: torch.Generator
) -> list[int]:
    """The adapter of each row, from 1; 0 is the base's. Rows of one owner stand together.

    base, identical  all rows are the base's, or the first adapter's
    one              a single row has an adapter
    distinct         as many owners as there can be
    uniform, zipf    drawn, all alike or the n-th adapter with weight 1 / n; the base is among them
    skewed           all rows but a few belong to one adapter, the few to others
    """
    if kind in ("base", "identical"):
        return [int(kind == "identical")] * num_rows
    if kind == "one":
        return [0] * (num_rows - 1) + [1]
    if kind == "distinct":
        return sorted(1 + row % num_adapters for row in range(num_rows))
    weights = torch.ones(num_adapters + 1)
    if kind == "zipf":
        weights /= torch.arange(1, num_adapters + 2)
    if kind == "skewed":
        weights[1] = 20.0 * num_adapters
    return sorted(torch.multinomial(weights, num_rows, True, generator=generator).tolist())


def draw_adapter(
    name: str, layout: BaseLayout, share: str, generator: torch.Generator, *, exact: bool = True
) -> Adapter:
    """An adapter of some modules of some layers, each with a rank in 1..64 of its own.

    share  "", "A", "B" or "AB": the sides of which all layers of a module have the same Tensor
    exact  small integers and scales that are powers of two, for results without rounding; the
           largest value of each page is 127, so that they are themselves in int8 too
    """

    def factor(rank: int, features: int) -> Tensor:
        if not exact:
            return torch.randn(rank, features, generator=generator)
        rows = small_integers(rank, features, generator=generator)
        column = int(torch.randint(features, (), generator=generator))
        rows[::PAGE_RANK, column] = 127.0
        return rows

    pairs: dict[tuple[int, str], FactorPair] = {}
    for module in MODULES:
        in_features, out_features = layout.shapes[module]
        rank = int(torch.randint(1, 65, (), generator=generator))
        a, b = factor(rank, in_features), factor(rank, out_features).T
        for layer in range(layout.num_layers):
            if torch.rand((), generator=generator) < 0.3:
                continue  # an entry that is empty
            own_a = a if "A" in share else factor(rank, in_features)
            own_b = b if "B" in share else factor(rank, out_features).T
            scaling = 2.0 ** float(torch.randint(-2, 3, (), generator=generator))
            pairs[layer, module] = FactorPair(own_a, own_b, scaling)
    return Adapter(name, name, pairs, config={})


@dataclass(frozen=True, slots=True)
class Tenants:
    """Adapters in a pool of which every element that no adapter wrote is NaN, or 99 in int8.

    The second and the third compute the same from the same pages under two page tables.
    """

    layout: BaseLayout
    pool: MatrixPool
    adapters: list[Adapter]
    tables: list[PageTable]

    def batch(self, owners: Sequence[int]) -> AdapterBatch:
        """What the kernels are told when row t is of adapter owners[t], from 1; 0 is the base."""
        used = sorted(set(owners) - {0})
        row_of = {0: 0} | {owner: row for row, owner in enumerate(used, start=1)}
        tables = [self.tables[owner - 1] for owner in used]
        offsets = np.zeros((len(used) + 1, self.layout.num_entries + 1), np.int32)
        for row, table in enumerate(tables, start=1):
            offsets[row] = table.offsets + offsets[row - 1, -1]
        none = PageTable(offsets[0], *(np.empty(0, np.int32),) * 2, np.empty(0, np.float32))
        tables.append(none)  # so that there is something to concatenate

        def joined(field: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(table, field) for table in tables]))

        return AdapterBatch(
            row_adapter=torch.tensor([row_of[owner] for owner in owners], dtype=torch.int32),
            offsets=torch.from_numpy(offsets),
            a_pages=joined("a_pages"),
            b_pages=joined("b_pages"),
            scaling=joined("scaling"),
            arena=self.pool.arena,
            max_pages=int(np.diff(offsets, axis=1).max()),
        )

    def place(self, layer: int, fused: str) -> tuple[int, Tensor]:
        """The entry of a product's first module, and the columns at which each begins."""
        widths = [self.layout.shapes[module][1] for module in FUSED[fused]]
        return self.layout.entry(layer, FUSED[fused][0]), torch.tensor([0, *accumulate(widths)])

    def draw_weight(self, fused: str, generator: torch.Generator, *, exact: bool = True) -> Tensor:
        """The base's weight of a product, (out_features, in_features), in the pool's dtype.

        In float16 beside int8.
        """
        in_features = self.layout.shapes[FUSED[fused][0]][0]
        out_features = sum(self.layout.shapes[module][1] for module in FUSED[fused])
        if exact:
            weight = small_integers(out_features, in_features, generator=generator)
        else:
            weight = torch.randn(out_features, in_features, generator=generator)
        return weight.to(torch.float16 if self.pool.dtype == torch.int8 else self.pool.dtype)

    def expected(
        self, x: Tensor, weight: Tensor, owners: Sequence[int], layer: int, fused: str
    ) -> Tensor:
        """The definition: row by row, W x[t] + s * B (A x[t]) from the factors themselves."""
        result = x @ weight.float().T
        for t, owner in enumerate(owners):
            column = 0
            for module in FUSED[fused]:
                width = self.layout.shapes[module][1]
                pair = self.adapters[owner - 1].pairs.get((layer, module)) if owner else None
                if pair is not None:
                    answer = pair.scaling * (pair.b @ (pair.a @ x[t]))
                    result[t, column : column + width] += answer
                column += width
        return result


def draw_tenants(
    layout: BaseLayout,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    num_adapters: int = 9,
    exact: bool = True,
) -> Tenants:
    """Adapters of every kind of sharing, placed among holes that released ones left."""
    pool = MatrixPool(8 << 20, layout.feature_counts, dtype, "cpu")
    pool.arena[PAGE_RANK * max(layout.feature_counts) :] = UNWRITTEN.get(dtype, float("nan"))
    adapters, tables, passing = [], [], []
    for index in range(num_adapters):
        share = ("", "A", "B", "AB")[index % 4]
        passing.append(
            pool.place(pool.stage(draw_adapter("gone", layout, share, generator), layout))
        )
        adapter = draw_adapter(f"tenant-{index + 1}", layout, share, generator, exact=exact)
        if index == 2:
            adapter = replace(adapters[1], name=adapter.name)
        adapters.append(adapter)
        tables.append(pool.place(pool.stage(adapter, layout)).page_table)
        if index % 2:
            pool.release(passing.pop(0))
    return Tenants(layout, pool, adapters, tables)


def attention_batch(
    runs: Sequence[tuple[int, int, Sequence[int]]], *, task_rows: int = 12
) -> AttentionBatch:
    """What the kernels are told of a step: per sequence, its first position, rows and blocks."""
    positions: list[int] = []
    row_sequence: list[int] = []
    tasks: list[tuple[int, int]] = []
    tables = np.zeros((len(runs), max(len(blocks) for _, _, blocks in runs)), np.int32)
    for sequence, (start, count, blocks) in enumerate(runs):
        first = len(positions)
        tables[sequence, : len(blocks)] = blocks
        positions += range(start, start + count)
        row_sequence += [sequence] * count
        tasks += [(first + at, min(task_rows, count - at)) for at in range(0, count, task_rows)]
    return AttentionBatch(
        positions=torch.tensor(positions, dtype=torch.int32),
        row_sequence=torch.tensor(row_sequence, dtype=torch.int32),
        block_tables=torch.from_numpy(tables),
        tasks=torch.tensor(tasks, dtype=torch.int32),
    )


def draw_block_tables(
    lengths: Sequence[int], num_blocks: int, generator: torch.Generator
) -> list[list[int]]:
    """Distinct blocks in no order for sequences of so many tokens; block 0 is nobody's."""
    free = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()
    return [[free.pop() for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]
