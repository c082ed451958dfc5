"""What queued requests want of the adapter cache, from the first question until they have it."""

from collections.abc import Collection, Iterable
from typing import Protocol

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.fair_queue import Entry

# For how many distinct adapters of queued requests, besides those asked for in the step itself,
# loading is started. More would only push out adapters that are still in use.
PREFETCH_AHEAD = 4


class AdapterSource(Protocol):
    """What the scheduler needs of the adapter cache. No call blocks."""

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        """Pages that stay until release, or why they are not there yet; ask again next step.

        Raises ServeError when the adapter cannot be loaded at all.
        """
        ...

    def release(self, version: AdapterVersion) -> None:
        """Give back what one successful acquire gave."""
        ...

    def cancel(self, version: AdapterVersion) -> None:
        """Forget that a queued request asked for it, or had it prefetched."""
        ...

    def prefetch(self, version: AdapterVersion) -> None:
        """Start loading what a queued request will ask for, if there is room."""
        ...


class AdapterDemand:
    """Adapters that were asked for or prefetched and not had yet, which keep room in the cache."""

    def __init__(self, adapters: AdapterSource) -> None:
        """Nothing is asked for yet."""
        self._adapters = adapters
        self._asked: dict[str, AdapterVersion] = {}  # by key

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        """As AdapterSource; what is not there yet is asked for from now on."""
        self._asked.pop(version.key, None)
        pages = self._adapters.acquire(version)
        if isinstance(pages, Waiting):
            self._asked[version.key] = version
        return pages

    def load_ahead(self, waiting: Iterable[Entry], asked: Collection[str]) -> None:
        """Have the adapters loaded that the next waiting requests will need.

        What was asked for others is let go of: it would keep the room. Behind a request that must
        be next nothing is loaded any more: it needs the room first.

        asked  keys of adapters that were asked for in this step
        """
        seen: set[str] = set()
        num_prefetched = 0
        for entry in waiting:
            version = entry.request.adapter
            if version is not None and version.key not in seen:
                seen.add(version.key)
                if version.key not in asked and num_prefetched < PREFETCH_AHEAD:
                    num_prefetched += 1
                    self._asked[version.key] = version
                    self._adapters.prefetch(version)
            if entry.must_be_next:
                break
        for key in self._asked.keys() - seen:
            self.let_go(key)

    def is_asked(self, key: str) -> bool:
        """Whether the adapter of this key was asked for or prefetched, and not had yet."""
        return key in self._asked

    def let_go(self, key: str) -> None:
        """Nobody waits any more for the adapter of this key, which is asked for."""
        self._adapters.cancel(self._asked.pop(key))
