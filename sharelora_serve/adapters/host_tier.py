"""Adapters in host memory, bounded in bytes: the least recently used leave."""

from collections import OrderedDict

from sharelora_serve.adapters.residency import Entry
from sharelora_serve.adapters.staging import StagedAdapter


class HostTier:
    """Keeps adapters ready for the pool. Not thread-safe: the cache calls it with its lock held."""

    def __init__(self, capacity_bytes: int) -> None:
        self.num_bytes = self.num_evictions = 0
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Entry, None] = OrderedDict()  # oldest use first

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, entry: Entry, staged: StagedAdapter) -> None:
        """Keep an adapter if there is room for it, which others leave to it."""
        num_bytes = staged.num_bytes
        if entry.staged is None and num_bytes <= self._capacity_bytes:
            entry.staged, entry.host_bytes = staged, num_bytes
            self._entries[entry] = None
            self.num_bytes += num_bytes
        while self.num_bytes > self._capacity_bytes:
            self.drop(next(iter(self._entries)))
            self.num_evictions += 1

    def touch(self, entry: Entry) -> None:
        """It is used, and leaves after all others."""
        self._entries.move_to_end(entry)

    def drop(self, entry: Entry) -> None:
        """Let go of an entry's adapter, which is here."""
        del self._entries[entry]
        entry.staged = None
        self.num_bytes -= entry.host_bytes
