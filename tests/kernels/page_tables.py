"""Random page tables for the modules of one product, and what they add in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import PAGE_RANK, AdapterBatch
from sharelora_serve.kernels.reference import ReferenceKernels
from tests.kernels.batches import UNWRITTEN, small_integers

SHARING = ("nothing", "modules", "adapters", "all")
"""Who has the same A: nobody, the modules of each adapter, the adapters for each module, all."""

ENTRY = 2
"""The first module's in the page table; there is another product's before it."""


@dataclass(frozen=True, slots=True)
class Case:
    """A batch; x and out are NaN in rows without an adapter, out in its padding too."""

    x: Tensor
    out: Tensor
    batch: AdapterBatch
    columns: tuple[int, ...]

    def expected(self) -> Tensor:
        """What out becomes by the definition, in float32, before it is rounded to its dtype."""
        out, columns = self.out.float().clone(), torch.tensor(self.columns)
        ReferenceKernels().add_adapters(self.x.float(), out, self.batch, ENTRY, columns)
        return out


class _Arena:
    """Pages of any width, one after the other, and between them NaN, or 99 in int8."""

    def __init__(self, widest: int, generator: torch.Generator) -> None:
        self._generator = generator
        self._end = PAGE_RANK * widest  # page 0 of every width
        self._written: list[tuple[int, Tensor]] = [(0, torch.zeros(self._end))]

    def add(self, rows: Tensor) -> list[int]:
        """The pages of a factor (rank, width), in no order; zero rows fill the last one."""
        rank, width = rows.shape
        num_pages = -(-rank // PAGE_RANK)
        padded = torch.zeros(num_pages * PAGE_RANK, width)
        padded[:rank] = rows
        pages = [0] * num_pages
        for place in torch.randperm(num_pages, generator=self._generator).tolist():
            page = self._end // (PAGE_RANK * width) + 1
            start = page * PAGE_RANK * width
            content = padded[place * PAGE_RANK : (place + 1) * PAGE_RANK]
            self._written.append((start, content.flatten()))
            self._end = start + content.numel()
            pages[place] = page
        return pages

    def tensor(self, dtype: torch.dtype) -> Tensor:
        arena = torch.full((self._end,), UNWRITTEN.get(dtype, float("nan")), dtype=dtype)
        for start, content in self._written:
            arena[start : start + len(content)] = content
        return arena


def draw_case(
    owners: Sequence[int],
    in_features: int,
    widths: Sequence[int],
    generator: torch.Generator,
    *,
    sharing: str = "nothing",
    x_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    arena_dtype: torch.dtype = torch.float32,
    max_rank: int = 64,
    exact: bool = True,
) -> Case:
    """Rows of these owners, from 1; 0 is none. Adapters have ranks of their own and lack modules.

    exact  small integers and scales that are powers of two: only the last addition may round
    """

    def draw(rows: int, columns: int) -> Tensor:
        if exact:
            return small_integers(rows, columns, generator=generator)
        return torch.randn(rows, columns, generator=generator)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    arena = _Arena(max(in_features, *widths), generator)
    num_adapters = max(owners)
    common = arena.add(draw(integer(1, max_rank + 1), in_features))
    of_module = [arena.add(draw(integer(1, max_rank + 1), in_features)) for _ in widths]
    lengths: list[list[int]] = [[0] * (ENTRY + len(widths))]
    a_pages: list[int] = []
    b_pages: list[int] = []
    scaling: list[float] = []
    for _ in range(num_adapters):
        own = arena.add(draw(integer(1, max_rank + 1), in_features))
        counts = [1] * ENTRY  # entries of another product, whose pages are nowhere
        a_pages += [1 << 24] * ENTRY
        b_pages += [1 << 24] * ENTRY
        scaling += [float("nan")] * ENTRY
        for module, width in enumerate(widths):
            if torch.rand((), generator=generator) < 0.2:
                counts.append(0)
                continue
            if sharing == "nothing":
                a = arena.add(draw(integer(1, max_rank + 1), in_features))
            else:
                a = {"modules": own, "adapters": of_module[module], "all": common}[sharing]
            rank = PAGE_RANK * (len(a) - 1) + integer(1, PAGE_RANK + 1)
            counts.append(len(a))
            a_pages += a
            b_pages += arena.add(draw(rank, width))
            scaling += [2.0 ** integer(-2, 3)] * len(a)
        lengths.append(counts)
    offsets = [[0] * (ENTRY + len(widths) + 1)]
    for counts in lengths[1:]:
        offsets.append(list(accumulate(counts, initial=offsets[-1][-1])))
    num_tokens, columns = len(owners), tuple(accumulate(widths, initial=0))
    x, out = draw(num_tokens, in_features), draw(num_tokens, columns[-1] + 3)
    has_none = torch.tensor(owners) == 0
    x[has_none], out[has_none], out[:, columns[-1] :] = float("nan"), float("nan"), float("nan")
    batch = AdapterBatch(
        row_adapter=torch.tensor(owners, dtype=torch.int32),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        a_pages=torch.tensor(a_pages, dtype=torch.int32),
        b_pages=torch.tensor(b_pages, dtype=torch.int32),
        scaling=torch.tensor(scaling),
        arena=arena.tensor(arena_dtype),
        max_pages=max(map(max, lengths)),
    )
    assert all(begin <= end for row in offsets for begin, end in pairwise(row))
    return Case(x.to(x_dtype), out.to(out_dtype), batch, columns)
