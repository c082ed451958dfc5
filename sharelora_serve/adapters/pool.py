"""The matrix pool: rank pages of every adapter on the device, equal factors stored once.

A rank page is PAGE_RANK rank rows of `features` numbers. A factor is a list of pages: A (r, in) as
it is, B (out, r) transposed, the last page padded with zero rows. An int8 page has a scale, which
page tables multiply into the adapter's. Factors are addressed by content, so LoRA, ShareA, ShareB,
ShareAB and a common A of many adapters differ only in their page tables.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, PageTable
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK, PageAllocator, PoolFullError
from sharelora_serve.adapters.staging import (
    FactorKey,
    StagedAdapter,
    distinct_factors,
    stage,
)
from sharelora_serve.adapters.transfer import CopyStream
from sharelora_serve.errors import AdapterInvalidError, ConfigurationError
from sharelora_serve.memory import streamed


@dataclass(slots=True, eq=False)
class _Factor:
    pages: list[int]
    num_references: int = 0  # residents that use it, however often each does


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """An adapter in the pool, valid until it is released; compared by identity."""

    page_table: PageTable
    _factors: tuple[FactorKey, ...] = field(repr=False)
    _num_expanded: int = field(repr=False)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What the pool holds. expanded_bytes / used_bytes is the dedupe ratio.

    num_adapters    residents
    num_factors     distinct factors alive
    used_bytes      of live pages, padding included
    expanded_bytes  of the same residents as plain LoRA, without sharing or padding
    capacity_bytes  of the arena
    """

    num_adapters: int
    num_factors: int
    used_bytes: int
    expanded_bytes: int
    capacity_bytes: int


class MatrixPool:
    """Content-addressed rank pages with reference counts, in one arena on the device.

    arena  (num_bytes / itemsize,)  the pool's dtype. Its first page of every width is all zeros
                                    for ever; the memory of pages never used is never touched.

    Any thread may call it. Adapters are written into free pages only, while kernels read others.
    """

    def __init__(
        self,
        num_bytes: int,
        feature_counts: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Reserve num_bytes on the device; ConfigurationError if that holds no page at all."""
        num_elements = num_bytes // dtype.itemsize
        smallest = 2 * PAGE_RANK * max(feature_counts) * dtype.itemsize
        if num_bytes < smallest:
            raise ConfigurationError(
                f"adapter memory of {num_bytes} bytes holds no page of this base; "
                f"give --adapter-memory at least {smallest} bytes, such as 512MiB"
            )
        self.dtype = dtype
        self.arena = _new_arena(num_elements, dtype, torch.device(device))
        self._copies = CopyStream(self.arena.device) if self.arena.is_cuda else None
        self._feature_counts = sorted(set(feature_counts))
        self._rows = {width: self.view(width).flatten(0, 1) for width in self._feature_counts}
        self._allocator = self._new_allocator()
        self.arena[: self._allocator.num_reserved].zero_()
        self._factors: dict[FactorKey, _Factor] = {}
        self._residents: set[Resident] = set()
        self._num_used = 0  # elements of live pages
        self._num_pinned = Counter[int]()  # pages, by width, that are never free again
        self._num_expanded = 0
        # Adapters are placed in turn, so that none finds a factor yet to be written; the second
        # lock is held for bookkeeping only, so that releases and stats never wait for a copy.
        self._placing = Lock()
        self._lock = Lock()

    def view(self, features: int) -> Tensor:
        """The arena as the pages of one width: (num_pages, PAGE_RANK, features), not a copy."""
        num_pages = self.arena.numel() // (PAGE_RANK * features)
        return self.arena[: num_pages * PAGE_RANK * features].view(num_pages, PAGE_RANK, features)

    def pin(self, page_table: PageTable) -> None:
        """Count on a resident never being released: `check` then refuses what fits only without."""
        with self._lock:
            (resident,) = (r for r in self._residents if r.page_table is page_table)
            self._num_pinned += _page_counts(resident._factors)

    @property
    def pinned_bytes(self) -> int:
        """Of the pages that `pin` took for good."""
        with self._lock:
            return self._num_bytes(self._num_pinned)

    def num_bytes_for(self, adapter: Adapter) -> int:
        """Bytes of the pages that the adapter takes in an empty pool, padding included."""
        return self._num_bytes(_pages_alone(adapter))

    def check(self, adapter: Adapter) -> None:
        """Raise AdapterInvalidError if an empty pool could not hold the adapter."""
        with self._lock:
            self._check_fits(_pages_alone(adapter))

    def stage(self, adapter: Adapter, layout: BaseLayout) -> StagedAdapter:
        """What `place` takes; see staging.stage. Changes nothing in the pool."""
        return stage(adapter, layout, self.dtype)

    def check_room(self, factors: Collection[FactorKey]) -> None:
        """Raise as `place` does if an adapter of these factors found no room now."""
        with self._lock:
            _, pages = self._allocate(factors)
            for features, taken in pages.items():
                self._allocator.free(features, list(taken))

    def place(self, staged: StagedAdapter) -> Resident:
        """Give a staged adapter its pages, sharing the factors that are there already.

        Raises PoolFullError if there is no room now and AdapterInvalidError if an empty pool had
        none; either leaves everything as it was.
        """
        with self._placing:
            with self._lock:
                new, pages = self._allocate(staged.factors)
                for key in new:
                    taken = [next(pages[key.features]) for _ in range(key.num_pages)]
                    self._factors[key] = _Factor(taken)
                    self._num_used += key.num_elements
                for key in staged.factors:
                    self._factors[key].num_references += 1
                self._num_expanded += staged.num_expanded
                table = self._page_table(staged)
                resident = Resident(table, staged.factors, staged.num_expanded)
                self._residents.add(resident)
            try:
                with nullcontext() if self._copies is None else self._copies.copying():
                    sizes = [key.rank * key.features for key in staged.factors]
                    parts = self._to_copy_from(staged.numbers).split_with_sizes(sizes)
                    for key, numbers in zip(staged.factors, parts, strict=True):
                        if key in new:
                            self._write(key, numbers.view(key.rank, key.features))
            except BaseException:
                self.release(resident)
                raise
        return resident

    def release(self, resident: Resident) -> None:
        """Give a resident's references back; pages that nobody else uses are free at once.

        Kernels that read them were launched: `place` waits for those before it writes.
        """
        with self._lock:
            assert resident in self._residents, "a resident was released twice"
            self._residents.remove(resident)
            self._num_expanded -= resident._num_expanded
            for key in resident._factors:
                factor = self._factors[key]
                factor.num_references -= 1
                if factor.num_references == 0:
                    del self._factors[key]
                    self._allocator.free(key.features, factor.pages)
                    self._num_used -= key.num_elements

    def stats(self) -> PoolStats:
        """Counts and bytes at this moment."""
        with self._lock:
            return PoolStats(
                num_adapters=len(self._residents),
                num_factors=len(self._factors),
                used_bytes=self._num_used * self.dtype.itemsize,
                expanded_bytes=self._num_expanded * self.dtype.itemsize,
                capacity_bytes=self.arena.nbytes,
            )

    def check_integrity(self) -> None:
        """Recount references, pages and bytes; raise AssertionError with what is off."""
        with self._placing, self._lock:
            references = Counter(chain.from_iterable(r._factors for r in self._residents))
            counted = {key: factor.num_references for key, factor in self._factors.items()}
            assert references == counted, "reference counts differ from a recount"
            live: dict[int, list[int]] = {features: [] for features in self._feature_counts}
            for key, factor in self._factors.items():
                assert len(factor.pages) == key.num_pages, "a factor has too many or few pages"
                live[key.features] += factor.pages
            self._allocator.check_integrity(live)
            num_used = sum(key.num_elements for key in self._factors)
            assert self._num_used == num_used, "used bytes differ from a recount"
            num_expanded = sum(resident._num_expanded for resident in self._residents)
            assert self._num_expanded == num_expanded, "expanded bytes differ from a recount"
            zeros = self.arena[: self._allocator.num_reserved]
            assert not zeros.any(), "page 0 is no longer all zeros"

    def _new_allocator(self) -> PageAllocator:
        return PageAllocator(self.arena.numel(), self._feature_counts)

    def _allocate(
        self, factors: Collection[FactorKey]
    ) -> tuple[dict[FactorKey, None], dict[int, Iterator[int]]]:
        """Those that are not there yet, and pages for them; raises as `place` does."""
        new = dict.fromkeys(key for key in factors if key not in self._factors)
        try:
            return new, self._allocator.allocate(_page_counts(new))
        except PoolFullError:
            self._check_fits(_page_counts(factors))
            raise

    def _check_fits(self, counts: Mapping[int, int]) -> None:
        """With the lock held: AdapterInvalidError if an empty pool of this size had no room."""
        try:
            self._new_allocator().allocate(self._num_pinned + Counter(counts))
        except PoolFullError:
            pinned = self._num_bytes(self._num_pinned)
            beside = f" beside {pinned} for the merged adapter" if pinned else ""
            raise AdapterInvalidError(
                f"the adapter needs {self._num_bytes(counts)} bytes of adapter memory, "
                f"more than a pool of {self.arena.nbytes} bytes can give it{beside}; "
                "raise --adapter-memory or lower the adapter's rank"
            ) from None

    def _num_bytes(self, counts: Mapping[int, int]) -> int:
        elements = sum(count * PAGE_RANK * features for features, count in counts.items())
        return elements * self.dtype.itemsize

    def _page_table(self, staged: StagedAdapter) -> PageTable:
        pages = [self._factors[key].pages for key in staged.factors]
        a_pages = chain.from_iterable(pages[a] for a in staged.pairs[:, 0])
        b_pages = chain.from_iterable(pages[b] for b in staged.pairs[:, 1])
        return PageTable(
            offsets=staged.offsets,
            a_pages=np.fromiter(a_pages, dtype=np.int32),
            b_pages=np.fromiter(b_pages, dtype=np.int32),
            scaling=staged.scaling,
        )

    def _to_copy_from(self, numbers: Tensor) -> Tensor:
        return numbers if self._copies is None else self._copies.page_locked(numbers)

    def _write(self, key: FactorKey, rows: Tensor) -> None:
        """Copy a factor into its pages, a run of neighbours at a time, and zero the padding."""
        pages, view = self._factors[key].pages, self._rows[key.features]
        start = 0
        for end in range(1, len(pages) + 1):
            if end < len(pages) and pages[end] == pages[end - 1] + 1:
                continue
            run = view[pages[start] * PAGE_RANK : (pages[end - 1] + 1) * PAGE_RANK]
            last = min(end * PAGE_RANK, key.rank)
            if padding := end * PAGE_RANK - last:
                run[-padding:].zero_()
                run = run[:-padding]
            run.copy_(rows[start * PAGE_RANK : last], non_blocking=True)
            start = end


def _page_counts(keys: Collection[FactorKey]) -> Counter[int]:
    counts = Counter[int]()
    for key in keys:
        counts[key.features] += key.num_pages
    return counts


def _pages_alone(adapter: Adapter) -> Counter[int]:
    """Pages of each width that the adapter takes with nothing to share but its own factors."""
    counts = Counter[int]()
    for _, rows in distinct_factors(adapter).values():
        rank, features = rows.shape
        counts[features] += -(-rank // PAGE_RANK)
    return counts


def _new_arena(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.empty(num_elements, dtype=dtype, device=device)
    return streamed(num_elements, dtype)
