"""Which adapters are known and where each is: device pages, host memory or only on disk.

Every tier is inclusive of those above it and bounded in bytes; the least recently used leave first.
What runs on the engine thread only looks up and counts: files are read, factors hashed and pages
written by loader threads.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, PageTable
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import check_name
from sharelora_serve.adapters.pages import PoolFullError
from sharelora_serve.adapters.pool import MatrixPool, Resident, StagedAdapter
from sharelora_serve.adapters.residency import CacheStats, Entry, Waiting
from sharelora_serve.adapters.summary import AdapterSummary, summarise
from sharelora_serve.errors import AdapterUnavailableError, ModelNotFoundError, ServeError

logger = logging.getLogger(__name__)


class AdapterCache:
    """The tiers above the adapters' folders, shared by server, engine and loader threads.

    `publish`, `remove`, `resolve` and `describe` read files or look up names; what the engine
    thread calls, `bind` to `prefetch`, never does file IO, hashes or copies. All are thread-safe.
    """

    def __init__(
        self,
        layout: BaseLayout,
        pool: MatrixPool,
        host_memory_bytes: int,
        *,
        num_loader_threads: int = 1,
        on_change: Callable[[], None],
    ) -> None:
        """on_change() is called on a loader thread whenever a load ended or room was made."""
        self._layout = layout
        self._pool = pool
        self._host_memory_bytes = host_memory_bytes
        self._on_change = on_change
        self._lock = Lock()  # held for bookkeeping only; guards everything below
        self._published: dict[str, tuple[AdapterVersion, AdapterSummary]] = {}
        self._entries: dict[str, Entry] = {}
        self._idle: OrderedDict[str, Entry] = OrderedDict()  # may be evicted; oldest use first
        self._host: OrderedDict[str, Entry] = OrderedDict()  # oldest use first
        self._host_bytes = 0
        # Counts the moments at which room may have appeared, so that a load which found none is
        # tried again only when that can make a difference.
        self._epoch = 0
        self._device_hits = self._host_hits = self._disk_loads = self._failures = 0
        self._device_evictions = self._host_evictions = 0
        self._loads_in_progress = 0
        self._is_closed = False
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._work, name=f"adapter-loader-{index}", daemon=True)
            for index in range(num_loader_threads)
        ]
        for thread in self._threads:
            thread.start()

    def publish(self, name: str, path: Path) -> AdapterVersion:
        """Read and check the adapter at path, in this thread, and let the name stand for it.

        A version that the name stood for before lives on while requests need it. Raises
        AdapterInvalidError, and then leaves the name as it was.
        """
        check_name(name, self._layout.name)
        adapter = read_adapter(path, self._layout, name=name)
        self._pool.check(adapter)
        version, summary = AdapterVersion(name, adapter.digest), summarise(adapter)
        host_bytes = adapter.num_bytes
        with self._lock:
            previous = self._published.get(name)
            entry = self._entries.setdefault(version.digest, Entry(version.digest))
            if not entry.is_named:
                entry.sources.clear()
            entry.is_named = True
            entry.sources[name] = path
            entry.failure = None
            self._published[name] = version, summary
            self._keep_on_host(entry, adapter, host_bytes)
            if previous is not None and previous[0].digest != version.digest:
                self._unname(previous[0])
        return version

    def remove(self, name: str) -> None:
        """Forget a name. Its version leaves all tiers when the last request is done with it.

        Raises ModelNotFoundError.
        """
        version = self.resolve(name)
        with self._lock:
            if self._published.pop(name, None) is not None:
                self._unname(version)

    def versions(self) -> list[AdapterVersion]:
        """What every name stands for now, by name."""
        with self._lock:
            return [self._published[name][0] for name in sorted(self._published)]

    def resolve(self, name: str) -> AdapterVersion:
        """The version that the name stands for now, or ModelNotFoundError."""
        return self._find(name)[0]

    def describe(self, name: str) -> AdapterSummary:
        """What the name's version is made of, or ModelNotFoundError."""
        return self._find(name)[1]

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
            entry = self._entries[version.digest]
            assert entry.num_bound > 0, "a version was unbound more often than bound"
            entry.num_bound -= 1
            self._settle(entry)

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        """Count one use and return where the adapter is on the device, or start its load.

        The table is valid until `release`. After LOADING or NO_ROOM ask again when something
        changed, or `cancel`: once loaded the adapter is kept for the one who waits. Raises
        AdapterUnavailableError if its load failed; the next acquire tries again.
        """
        with self._lock:
            entry = self._entry(version)
            if entry.resident is not None:
                self._device_hits += not entry.is_wanted
                entry.is_wanted = entry.is_prefetched = False
                entry.num_uses += 1
                self._idle.pop(entry.digest, None)
                return entry.resident.page_table
            if entry.failure is not None:
                failure, entry.failure = entry.failure, None
                entry.is_wanted = False
                self._settle(entry)
                raise AdapterUnavailableError(failure)
            if not entry.is_wanted:
                entry.is_wanted = True
                entry.refused_at = None  # of a prefetch, which may evict less
            if not entry.is_loading:
                if entry.refused_at == self._epoch:
                    return Waiting.NO_ROOM
                self._start_load(entry)
            return Waiting.LOADING

    def release(self, version: AdapterVersion) -> None:
        """End one use; no kernel that reads the adapter's pages may still be queued."""
        with self._lock:
            entry = self._entries[version.digest]
            assert entry.num_uses > 0, "an adapter was released more often than acquired"
            entry.num_uses -= 1
            self._rest(entry)
            self._settle(entry)

    def cancel(self, version: AdapterVersion) -> None:
        """The request that waited after `acquire` or `prefetch` is gone.

        Another one that waits for the same version keeps its place by asking again.
        """
        with self._lock:
            entry = self._entries.get(version.digest)
            if entry is not None:
                entry.is_wanted = entry.is_prefetched = False
                entry.failure = None
                self._rest(entry)
                self._settle(entry)

    def prefetch(self, version: AdapterVersion) -> None:
        """Load a queued request's adapter if idle ones leave room; no promise is made.

        Nothing in use, reserved or itself prefetched is evicted.
        """
        with self._lock:
            entry = self._entries.get(version.digest)
            if entry is None or entry.resident is not None or entry.is_loading:
                return
            if entry.failure is None and entry.refused_at != self._epoch:
                entry.is_prefetched = True
                self._start_load(entry)

    def adapter(self, version: AdapterVersion) -> Adapter:
        """A version's factors, from host memory or disk; raises AdapterUnavailableError."""
        self.bind(version)
        try:
            return self._adapter(self._entries[version.digest])[0]
        finally:
            self.unbind(version)

    def stats(self) -> CacheStats:
        """Counters and tiers at this moment."""
        pool = self._pool.stats()
        with self._lock:
            return CacheStats(
                device_hits=self._device_hits,
                host_hits=self._host_hits,
                disk_loads=self._disk_loads,
                device_evictions=self._device_evictions,
                host_evictions=self._host_evictions,
                failures=self._failures,
                loads_in_progress=self._loads_in_progress,
                num_published=len(self._published),
                num_on_host=len(self._host),
                host_bytes=self._host_bytes,
                host_capacity_bytes=self._host_memory_bytes,
                pool=pool,
            )

    def close(self) -> None:
        """Stop the loader threads; loads that are queued never happen."""
        self._is_closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    # The rest of the public calls' work, with the lock held.

    def _entry(self, version: AdapterVersion) -> Entry:
        entry = self._entries.get(version.digest)
        if entry is None:
            raise AdapterUnavailableError(
                f"version {version.digest[:12]} of adapter {version.name!r} was replaced or "
                "removed before this request started; send the request again"
            )
        return entry

    def _unname(self, version: AdapterVersion) -> None:
        entry = self._entries[version.digest]
        if len(entry.sources) > 1:
            del entry.sources[version.name]
        else:
            entry.is_named = False
            self._settle(entry)

    def _start_load(self, entry: Entry) -> None:
        entry.is_loading = True
        self._loads_in_progress += 1
        self._jobs.put(partial(self._load, entry))

    def _rest(self, entry: Entry) -> None:
        """If nobody uses or awaits a resident any more, it may be evicted, after all others."""
        if entry.resident is not None and entry.num_uses == 0 and not entry.is_wanted:
            self._idle[entry.digest] = entry
            self._epoch += 1

    def _settle(self, entry: Entry) -> None:
        """Forget a version without a name as soon as nobody needs it."""
        is_needed = entry.num_uses or entry.num_bound or entry.is_wanted or entry.is_loading
        if entry.is_named or is_needed:
            return
        del self._entries[entry.digest]
        self._idle.pop(entry.digest, None)
        if entry.adapter is not None:
            self._drop_from_host(entry)
        if entry.resident is not None:
            self._jobs.put(partial(self._discard, entry.resident))

    def _keep_on_host(self, entry: Entry, adapter: Adapter, host_bytes: int) -> None:
        if entry.adapter is None and host_bytes <= self._host_memory_bytes:
            entry.adapter, entry.host_bytes = adapter, host_bytes
            self._host[entry.digest] = entry
            self._host_bytes += host_bytes
        while self._host_bytes > self._host_memory_bytes:
            self._drop_from_host(next(iter(self._host.values())))
            self._host_evictions += 1

    def _drop_from_host(self, entry: Entry) -> None:
        del self._host[entry.digest]
        entry.adapter = None
        self._host_bytes -= entry.host_bytes

    def _evict(self, entry: Entry) -> Resident | None:
        """Take the least recently used adapter that this load may replace from the device."""
        for victim in self._idle.values():
            if entry.is_wanted or not victim.is_prefetched:
                resident = victim.resident
                del self._idle[victim.digest]
                victim.resident, victim.is_prefetched = None, False
                self._device_evictions += 1
                return resident
        return None

    # On the loader threads, without the lock.

    def _find(self, name: str) -> tuple[AdapterVersion, AdapterSummary]:
        with self._lock:
            published = self._published.get(name)
        if published is None:
            raise ModelNotFoundError(
                f"the model {name!r} does not exist: it is neither the base "
                f"{self._layout.name!r} nor an adapter; /v1/models lists what is served",
                param="model",
            )
        return published

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closed:
            job()
            self._on_change()

    def _discard(self, resident: Resident) -> None:
        self._pool.release(resident)
        with self._lock:
            self._epoch += 1

    def _load(self, entry: Entry) -> None:
        """Bring an entry to the device, or note on it why that was not possible."""
        resident, failure, is_from_host = None, None, False
        try:
            adapter, is_from_host = self._adapter(entry)
            resident = self._place(entry, self._pool.stage(adapter, self._layout))
        except Exception as error:  # whatever it was, it fails this adapter's requests only
            reason = error.message if isinstance(error, ServeError) else repr(error)
            with self._lock:  # publish may be replacing the sources
                name = next(iter(entry.sources), entry.digest[:12])
            failure = f"adapter {name!r} could not be loaded: {reason}"
            logger.warning(failure)
        with self._lock:
            entry.is_loading = False
            self._loads_in_progress -= 1
            if resident is not None:
                entry.resident = resident
                self._host_hits += is_from_host
            if failure is not None:
                self._failures += 1
                if entry.is_wanted:
                    entry.failure = failure
                else:
                    entry.refused_at = self._epoch  # nobody waits: do not prefetch it in a loop
            self._rest(entry)
            self._settle(entry)

    def _adapter(self, entry: Entry) -> tuple[Adapter, bool]:
        """The entry's factors, and whether they were in host memory."""
        with self._lock:
            if entry.adapter is not None:
                self._host.move_to_end(entry.digest)
                return entry.adapter, True
            sources = dict(entry.sources)
        adapter = self._read(entry.digest, sources)
        host_bytes = adapter.num_bytes
        with self._lock:
            self._disk_loads += 1
            self._keep_on_host(entry, adapter, host_bytes)
        return adapter, False

    def _read(self, digest: str, sources: Mapping[str, Path]) -> Adapter:
        """Read the version from any of its folders; another version there is never served."""
        problems = []
        for name, path in sources.items():
            try:
                adapter = read_adapter(path, self._layout, name=name)
            except (ServeError, OSError) as error:
                logger.warning("%s cannot be read any more: %s", path, error)
                problems.append(f"the folder of {name!r} cannot be read any more")
                continue
            if adapter.digest == digest:
                return adapter
            problems.append(
                f"the folder of {name!r} changed on disk: it holds version "
                f"{adapter.digest[:12]}, expected {digest[:12]}; restart the server to serve that"
            )
        raise AdapterUnavailableError("\n  ".join(problems))

    def _place(self, entry: Entry, staged: StagedAdapter) -> Resident | None:
        """Place an adapter, evicting what may be evicted until it fits; None if it cannot now."""
        while True:
            with self._lock:
                epoch = self._epoch
            try:
                return self._pool.place(staged)
            except PoolFullError:
                with self._lock:
                    victim = self._evict(entry)
                    if victim is None and self._epoch == epoch:
                        entry.refused_at = epoch
                        return None
            if victim is not None:
                self._pool.release(victim)
