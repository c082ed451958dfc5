"""Which pages of the pool's arena are free; no tensor is touched here."""

import math
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import chain

PAGE_RANK = 8
"""Rank rows of one page: the granularity of a factor's memory."""

_CHUNK_PAGES = 64  # widest pages per chunk: few enough chunks to search, small enough to drain
_MIN_CHUNKS = 16  # so that a small pool can still serve all its widths


class PoolFullError(Exception):
    """There is no room now; there may be once residents are released. Nothing was changed."""


@dataclass(slots=True, eq=False)
class _Chunk:
    features: int  # the width that it is lent to
    num_pages: int
    free: list[int]  # heap: lowest page first


class PageAllocator:
    """Which pages are free. The arena is cut into chunks, each lent to one width at a time.

    Page p of width f spans elements p * 8f to (p + 1) * 8f. A chunk whose size is a multiple of
    every 8f wastes nothing; otherwise pages are aligned inside it and its rims stay unused. The
    first `num_reserved` elements are never handed out.
    """

    def __init__(self, num_elements: int, feature_counts: Sequence[int]) -> None:
        """An arena of so many elements, all free, for pages of these widths."""
        widest = PAGE_RANK * max(feature_counts)
        largest = max(widest, min(_CHUNK_PAGES * widest, num_elements // _MIN_CHUNKS))
        unit = PAGE_RANK * math.lcm(*feature_counts)
        if unit > largest:  # widths with hardly a common divisor: only the widest fit exactly
            unit = widest
        self.num_reserved = widest
        self._num_elements = num_elements
        self._chunk_size = largest // unit * unit
        self._free_chunks = list(range(-(-num_elements // self._chunk_size)))  # ascending
        self._lent: dict[int, _Chunk] = {}

    def allocate(self, counts: Mapping[int, int]) -> dict[int, Iterator[int]]:
        """Take counts[features] pages of each width, or raise PoolFullError and take none."""
        plan: list[tuple[int, int, int]] = []  # features, chunk, pages to take from it
        free_chunks = list(self._free_chunks)
        for features in sorted(counts, reverse=True):
            missing = counts[features]
            empty = self._empty(features, free_chunks)
            for index, room in chain(self._partly_filled(features), empty):
                if missing == 0:
                    break
                taken = min(missing, room)
                plan.append((features, index, taken))
                missing -= taken
                if index not in self._lent:
                    free_chunks.remove(index)
            if missing:
                raise PoolFullError(f"{missing} more pages of {features} features are needed")
        pages: dict[int, list[int]] = {features: [] for features in counts}
        for features, index, taken in plan:
            chunk = self._lent.get(index) or self._lend(index, features)
            pages[features] += [heappop(chunk.free) for _ in range(taken)]
        return {features: iter(taken_pages) for features, taken_pages in pages.items()}

    def free(self, features: int, pages: Sequence[int]) -> None:
        """Take pages back; a chunk of which all pages are free serves any width again."""
        for page in pages:
            index = page * PAGE_RANK * features // self._chunk_size
            chunk = self._lent[index]
            heappush(chunk.free, page)
            if len(chunk.free) == chunk.num_pages:
                del self._lent[index]
                insort(self._free_chunks, index)

    def check_integrity(self, live: Mapping[int, list[int]]) -> None:
        """Raise AssertionError unless exactly the pages of `live` are taken, each once."""
        taken = {(features, page) for features, pages in live.items() for page in pages}
        assert len(taken) == sum(map(len, live.values())), "a page belongs to two factors"
        free = set[tuple[int, int]]()
        whole = set[tuple[int, int]]()
        for index, chunk in self._lent.items():
            assert len(chunk.free) < chunk.num_pages, "a chunk is lent without a live page"
            free |= {(chunk.features, page) for page in chunk.free}
            whole |= {(chunk.features, page) for page in self._page_range(index, chunk.features)}
        assert not taken & free, "a live page is also free"
        assert taken | free == whole, "a page of a lent chunk is neither live nor free"
        assert not set(self._lent) & set(self._free_chunks), "a lent chunk is also free"
        num_chunks = -(-self._num_elements // self._chunk_size)
        assert len(self._lent) + len(self._free_chunks) == num_chunks, "a chunk is lost"

    def _partly_filled(self, features: int) -> list[tuple[int, int]]:
        """Chunks of this width with free pages, fullest first, so that the emptiest drain."""
        chunks = self._lent.items()
        rooms = [(len(c.free), i) for i, c in chunks if c.features == features and c.free]
        return [(index, room) for room, index in sorted(rooms)]

    def _empty(self, features: int, free_chunks: list[int]) -> Iterator[tuple[int, int]]:
        for index in list(free_chunks):
            if room := len(self._page_range(index, features)):
                yield index, room

    def _lend(self, index: int, features: int) -> _Chunk:
        self._free_chunks.remove(index)
        pages = list(self._page_range(index, features))  # ascending, hence a heap
        chunk = self._lent[index] = _Chunk(features, len(pages), pages)
        return chunk

    def _page_range(self, index: int, features: int) -> range:
        """Pages of this width that lie wholly inside the chunk."""
        start = max(index * self._chunk_size, self.num_reserved)
        end = min((index + 1) * self._chunk_size, self._num_elements)
        page = PAGE_RANK * features
        return range(-(-start // page), end // page)
