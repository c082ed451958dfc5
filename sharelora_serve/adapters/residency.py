"""Where one version of an adapter is, and what the whole cache says of itself."""

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.pool import PoolStats, Resident


class Waiting(Enum):
    """Why a page table is not there yet; ask again after the next change."""

    LOADING = auto()
    NO_ROOM = auto()  # everything on the device is used by running requests or reserved


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the start, and what each tier holds at this moment.

    device_hits        acquires that found the adapter on the device without waiting
    host_hits          loads from host memory to the device
    disk_loads         adapters read from disk again after they were published
    device_evictions   adapters whose pages made room for another's
    host_evictions     adapters that left host memory for another
    failures           loads that failed
    loads_in_progress  loads that are queued or running
    num_published      names
    num_on_host        versions in host memory, of host_bytes in all
    host_capacity_bytes  the bound of host_bytes
    pool               the device tier
    """

    device_hits: int
    host_hits: int
    disk_loads: int
    device_evictions: int
    host_evictions: int
    failures: int
    loads_in_progress: int
    num_published: int
    num_on_host: int
    host_bytes: int
    host_capacity_bytes: int
    pool: PoolStats


@dataclass(slots=True, eq=False)
class Entry:
    """One version, by digest: the same content under two names is one entry."""

    digest: str
    sources: dict[str, Path] = field(default_factory=dict)  # name -> folder it can be read from
    is_named: bool = True  # False once every name moved on; the last source then stays
    adapter: Adapter | None = None  # the host tier
    host_bytes: int = 0
    resident: Resident | None = None  # the device tier
    num_uses: int = 0  # running requests; never evicted above 0
    num_bound: int = 0  # requests that may still come to acquire it
    is_wanted: bool = False  # an acquire waits for it; once resident, this reserves it
    is_prefetched: bool = False  # loaded ahead of its request: no other prefetch evicts it
    is_loading: bool = False
    failure: str | None = None  # for the next acquire to raise
    refused_at: int | None = None  # the cache's epoch when the pool had no room for it
