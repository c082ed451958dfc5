"""Where each version of an adapter is: device pages, host memory or only on disk.

What is loaded from disk is in both tiers above it; each is bounded in bytes, and the least recently
used leave first.
What runs on the engine thread only looks up and counts: files are read, factors cast and hashed,
and pages written by loader threads.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from threading import Lock, Semaphore, Thread

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, PageTable
from sharelora_serve.adapters.host_tier import HostTier
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.pages import PoolFullError
from sharelora_serve.adapters.pool import MatrixPool, Resident
from sharelora_serve.adapters.residency import CacheStats, Entry, Tier, Waiting
from sharelora_serve.adapters.staging import StagedAdapter
from sharelora_serve.errors import AdapterUnavailableError, ServeError
from sharelora_serve.priority import lower_priority

logger = logging.getLogger(__name__)

# Of loads: with 3 they get a third of a busy core. With 10 a cold adapter's first token took three
# to eight times as long under traffic, and those that ran gained little.
_NICENESS = 3


class AdapterCache:
    """The tiers above the durable store, shared by server, engine and loader threads.

    A version is known here while a name stands for it (`admit`, `dismiss`) or a request is bound
    to it. No call reads files, hashes or copies, but `adapter`; all are thread-safe.
    """

    def __init__(
        self,
        layout: BaseLayout,
        pool: MatrixPool,
        host_memory_bytes: int,
        read: Callable[[AdapterVersion], Adapter],
        *,
        num_loader_threads: int = 1,
        on_change: Callable[[], None],
    ) -> None:
        """read(version) gives a version's factors from disk, or raises ServeError or OSError.

        on_change() is called on a loader thread whenever a load ended or room was made.
        """
        self._layout = layout
        self._pool = pool
        self._read = read
        self._on_change = on_change
        self._lock = Lock()  # held for bookkeeping only; guards everything below
        self._entries: dict[str, Entry] = {}
        self._idle: OrderedDict[Entry, None] = OrderedDict()  # may be evicted; oldest use first
        self._host = HostTier(host_memory_bytes)
        self._homeless: set[Entry] = set()  # pinned, and without room so far
        # Counts the moments at which room may have appeared, so that a load which found none is
        # tried again only when that can make a difference.
        self._epoch = 0
        self._device_hits = self._host_hits = self._disk_loads = self._failures = 0
        self._device_evictions = 0
        self._loads_in_progress = self._num_discarding = 0
        self._is_closed = False
        self._to_discard: deque[Resident] = deque()
        self._to_load: dict[Entry, None] = {}  # in the order in which their loads were asked for
        self._num_jobs = Semaphore(0)  # in both of them, or a thread to stop
        self._threads = [
            Thread(target=self._work, name=f"adapter-loader-{index}", daemon=True)
            for index in range(num_loader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def admit(self, version: AdapterVersion, staged: StagedAdapter | None = None) -> None:
        """A name stands for the version from now on; `staged` is its content, if at hand."""
        with self._lock:
            entry = self._entries.setdefault(version.key, Entry(version))
            entry.num_names += 1
            entry.forget_failures()
            if staged is not None:
                self._host.keep(entry, staged)

    def dismiss(self, version: AdapterVersion) -> None:
        """A name no longer stands for it; it leaves when the last request is done with it."""
        with self._lock:
            entry = self._entries[version.key]
            assert entry.num_names > 0, "a version was dismissed more often than admitted"
            entry.num_names -= 1
            self._settle(entry)

    def pin(self, version: AdapterVersion) -> None:
        """Load a version that is known, and keep it on the device until `unpin`."""
        with self._lock:
            entry = self._entries[version.key]
            entry.num_pins += 1
            self._idle.pop(entry, None)
            if entry.resident is None and not entry.is_loading:
                self._start_load(entry)

    def unpin(self, version: AdapterVersion) -> None:
        """Let a pinned version be evicted again."""
        with self._lock:
            entry = self._entries[version.key]
            assert entry.num_pins > 0, "a version was unpinned more often than pinned"
            entry.num_pins -= 1
            self._rest(entry)
            self._settle(entry)

    def is_named(self, version: AdapterVersion) -> bool:
        """Whether new requests may still ask for the version."""
        with self._lock:
            entry = self._entries.get(version.key)
            return entry is not None and entry.num_names > 0

    def tier(self, version: AdapterVersion) -> Tier:
        """The fastest place that holds the version now."""
        with self._lock:
            entry = self._entries.get(version.key)
            return Tier.DISK if entry is None else entry.tier

    def digests(self) -> set[str]:
        """Of all versions whose files a request may still need."""
        with self._lock:
            return {entry.version.digest for entry in self._entries.values() if entry.may_be_read}

    def adapter(self, version: AdapterVersion) -> Adapter:
        """A known version's factors, read from disk in this thread.

        Raises AdapterUnavailableError if the version is not known, and what reading raises.
        """
        with self._lock:
            entry = self._entry(version)
        return self._read_from_disk(entry)

    def bind(self, version: AdapterVersion) -> None:
        """Keep a version known for a request that may acquire it later, until `unbind`.

        Without it a version that is replaced while the request queues may be gone when its turn
        comes. Raises AdapterUnavailableError if it is gone already.
        """
        with self._lock:
            self._entry(version).num_bound += 1

    def unbind(self, version: AdapterVersion) -> None:
        """The request that was bound has ended."""
        with self._lock:
            entry = self._entries[version.key]
            assert entry.num_bound > 0, "a version was unbound more often than bound"
            entry.num_bound -= 1
            self._settle(entry)

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        """Count one use and return where the adapter is on the device, or start its load.

        The table is valid until `release`. After LOADING or NO_ROOM ask again when something
        changed, or `cancel`: once loaded the adapter is kept for the one who waits. Raises
        AdapterUnavailableError if its load failed, and until it is time to try again.
        """
        with self._lock:
            entry = self._entry(version)
            if entry.resident is not None:
                self._device_hits += not entry.is_wanted
                entry.is_wanted = entry.is_prefetched = False
                entry.num_uses += 1
                self._idle.pop(entry, None)
                return entry.resident.page_table
            if entry.failure is not None:
                seconds = entry.retry_at - time.monotonic()
                if seconds > 0:
                    entry.is_wanted = False
                    self._settle(entry)
                    raise AdapterUnavailableError(entry.failure, retry_after_seconds=seconds)
                entry.failure = None
            if not entry.is_wanted:
                entry.is_wanted = True
                entry.refused_at = None  # of a prefetch, which may evict less
            if not entry.is_loading:
                if entry.refused_at == self._epoch:
                    return Waiting.NO_ROOM
                self._start_load(entry)
            return Waiting.LOADING

    def release(self, version: AdapterVersion) -> None:
        """End one use; every kernel that reads the adapter's pages has been launched."""
        with self._lock:
            entry = self._entries[version.key]
            assert entry.num_uses > 0, "an adapter was released more often than acquired"
            entry.num_uses -= 1
            self._rest(entry)
            self._settle(entry)

    def cancel(self, version: AdapterVersion) -> None:
        """The request that waited after `acquire` or `prefetch` is gone.

        Another one that waits for the same version keeps its place by asking again.
        """
        with self._lock:
            entry = self._entries.get(version.key)
            if entry is not None:
                entry.is_wanted = entry.is_prefetched = False
                self._rest(entry)
                self._settle(entry)

    def prefetch(self, version: AdapterVersion, *, is_reserved: bool = True) -> None:
        """Load an adapter that is likely to be asked for if idle ones leave room; no promise.

        Nothing in use or reserved is evicted. What is reserved, since a queued request is known to
        come for it, no other prefetch evicts until `acquire` or `cancel`.
        """
        with self._lock:
            entry = self._entries.get(version.key)
            if entry is None or entry.resident is not None or entry.is_loading:
                return
            if entry.failure is None and entry.refused_at != self._epoch:
                entry.is_prefetched = is_reserved
                self._start_load(entry)

    def stats(self) -> CacheStats:
        """Counters and tiers at this moment."""
        pool = self._pool.stats()
        with self._lock:
            return CacheStats(
                device_hits=self._device_hits,
                host_hits=self._host_hits,
                disk_loads=self._disk_loads,
                device_evictions=self._device_evictions,
                host_evictions=self._host.num_evictions,
                failures=self._failures,
                loads_in_progress=self._loads_in_progress,
                num_pinned=sum(entry.num_pins > 0 for entry in self._entries.values()),
                num_on_host=len(self._host),
                host_bytes=self._host.num_bytes,
                pool=pool,
            )

    def close(self) -> None:
        """Stop the loader threads; loads that are queued never happen."""
        self._is_closed = True
        for _ in self._threads:
            self._num_jobs.release()
        for thread in self._threads:
            thread.join()

    # The rest of the public calls' work, with the lock held.

    def _entry(self, version: AdapterVersion) -> Entry:
        entry = self._entries.get(version.key)
        if entry is None:
            raise AdapterUnavailableError(
                f"version {version.digest[:12]} of adapter {version.name!r} was replaced or "
                "removed before this request started; send the request again"
            )
        return entry

    def _start_load(self, entry: Entry) -> None:
        entry.is_loading = True
        self._loads_in_progress += 1
        self._to_load[entry] = None
        self._num_jobs.release()

    def _rest(self, entry: Entry) -> None:
        """If nobody holds a resident any more, it may be evicted, after all others."""
        if entry.resident is not None and not entry.is_held:
            self._idle[entry] = None
            self._note_room()

    def _note_room(self) -> None:
        """Room may have appeared: pinned versions that found none try again."""
        self._epoch += 1
        homeless, self._homeless = self._homeless, set()
        for entry in homeless:
            if entry.num_pins and entry.resident is None and not entry.is_loading:
                self._start_load(entry)

    def _settle(self, entry: Entry) -> None:
        """Forget a version as soon as nobody needs it, and its factors when it waits no more."""
        if entry.resident is not None or not entry.is_awaited:
            entry.factors = None
        if entry.is_needed:
            return
        del self._entries[entry.version.key]
        self._idle.pop(entry, None)
        if entry.staged is not None:
            self._host.drop(entry)
        if entry.resident is not None:
            self._num_discarding += 1
            self._to_discard.append(entry.resident)
            self._num_jobs.release()

    def _evict(self, entry: Entry) -> Resident | None:
        """Take the least recently used adapter that this load may replace from the device."""
        for victim in self._idle:
            if entry.is_held or not victim.is_prefetched:
                resident = victim.resident
                del self._idle[victim]
                victim.resident, victim.is_prefetched = None, False
                self._device_evictions += 1
                return resident
        return None

    def _will_have_room(self, entry: Entry) -> bool:
        """Whether anything may still leave the device, so that waiting for room makes sense."""
        return self._num_discarding > 0 or any(
            other is not entry
            and not other.num_pins
            and (other.is_loading or (other.resident is not None and other.is_held))
            for other in self._entries.values()
        )

    # On the loader threads, without the lock.

    def _work(self) -> None:
        lower_priority(_NICENESS)
        while self._num_jobs.acquire() and not self._is_closed:
            self._next_job()()
            self._on_change()

    def _next_job(self) -> Callable[[], None]:
        """What makes room first, then the load that is most urgent, of such the oldest."""
        with self._lock:
            if self._to_discard:
                return partial(self._discard, self._to_discard.popleft())
            entry = max(self._to_load, key=lambda entry: entry.urgency)
            del self._to_load[entry]
            return partial(self._load, entry)

    def _discard(self, resident: Resident) -> None:
        self._pool.release(resident)
        with self._lock:
            self._num_discarding -= 1
            self._note_room()

    def _load(self, entry: Entry) -> None:
        """Bring an entry to the device, or note on it why that was not possible."""
        resident, failure, is_from_host = None, None, False
        try:
            resident, is_from_host = self._place(entry)
        except Exception as error:  # whatever it was, it fails this adapter's requests only
            reason = error.message if isinstance(error, ServeError) else repr(error)
            failure = f"adapter {entry.version.name!r} could not be loaded: {reason}"
            logger.warning(failure, exc_info=not isinstance(error, ServeError | OSError))
        with self._lock:
            entry.is_loading = False
            self._loads_in_progress -= 1
            if resident is not None:
                entry.resident = resident
                self._host_hits += is_from_host
                entry.forget_failures()
            if failure is not None:
                self._failures += 1
                entry.note_failure(failure, time.monotonic())
            self._rest(entry)
            self._settle(entry)

    def _read_from_disk(self, entry: Entry) -> Adapter:
        return replace(self._read(entry.version), name=entry.version.name)

    def _stage(self, entry: Entry) -> tuple[StagedAdapter, bool]:
        """The entry's adapter ready for the pool, and whether it was in host memory."""
        with self._lock:
            if entry.staged is not None:
                self._host.touch(entry)
                return entry.staged, True
        adapter = self._read_from_disk(entry)
        with self._lock:
            self._disk_loads += 1
        staged = self._pool.stage(adapter, self._layout)
        with self._lock:
            if self._entries.get(entry.version.key) is entry:  # else it was forgotten meanwhile
                self._host.keep(entry, staged)
        return staged, False

    def _place(self, entry: Entry) -> tuple[Resident | None, bool]:
        """Place an adapter, evicting what may be evicted until it fits; None if it cannot now.

        And whether it was in host memory. One that was refused before is not read again until its
        factors find room: with many that wait, room for one is for one.
        """
        staged, is_from_host = None, False
        while True:
            with self._lock:
                epoch, factors = self._epoch, entry.factors
            try:
                if staged is None:
                    if factors is not None:
                        self._pool.check_room(factors)
                    staged, is_from_host = self._stage(entry)
                return self._pool.place(staged), is_from_host
            except PoolFullError:
                with self._lock:
                    victim = self._evict(entry)
                    if victim is None and self._epoch == epoch:
                        entry.refused_at = epoch
                        entry.factors = factors if staged is None else staged.factors
                        if entry.num_pins:
                            self._homeless.add(entry)
                        if entry.is_wanted and not self._will_have_room(entry):
                            raise AdapterUnavailableError(
                                "it needs more device memory than the pinned adapters leave; "
                                "raise --adapter-memory or unpin some"
                            ) from None
                        return None, is_from_host
            if victim is not None:
                self._pool.release(victim)
