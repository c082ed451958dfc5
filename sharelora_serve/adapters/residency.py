"""Where one version of an adapter is, and what the whole cache says of itself."""

from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.pool import PoolStats, Resident
from sharelora_serve.adapters.staging import FactorKey, StagedAdapter

# A load that failed is tried again after this many seconds, then after twice as many, and so on.
_FIRST_RETRY_SECONDS = 0.5
_LAST_RETRY_SECONDS = 30.0


class Waiting(Enum):
    """Why a page table is not there yet; ask again after the next change."""

    LOADING = auto()
    NO_ROOM = auto()  # everything on the device is used by running requests or reserved


class Tier(StrEnum):
    """The fastest place that holds a version."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the start, and what each tier holds at this moment.

    device_hits        acquires that found the adapter on the device without waiting
    host_hits          loads from host memory to the device
    disk_loads         adapters read from disk to be loaded
    device_evictions   adapters whose pages made room for another's
    host_evictions     adapters that left host memory for another
    failures           loads that failed
    loads_in_progress  loads that are queued or running
    num_pinned         versions that stay on the device
    num_on_host        versions in host memory, of host_bytes in all
    pool               the device tier
    """

    device_hits: int
    host_hits: int
    disk_loads: int
    device_evictions: int
    host_evictions: int
    failures: int
    loads_in_progress: int
    num_pinned: int
    num_on_host: int
    host_bytes: int
    pool: PoolStats


@dataclass(slots=True, eq=False)
class Entry:
    """One version, by its key: the same content under two names of one owner is one entry."""

    version: AdapterVersion  # as the first of its names has it
    num_names: int = 0  # names that stand for it now
    num_pins: int = 0  # those of them that are pinned
    staged: StagedAdapter | None = None  # the host tier
    host_bytes: int = 0
    resident: Resident | None = None  # the device tier
    num_uses: int = 0  # running requests; never evicted above 0
    num_bound: int = 0  # requests that may still come to acquire it
    is_wanted: bool = False  # an acquire waits for it; once resident, this reserves it
    is_prefetched: bool = False  # loaded ahead of its request: no other prefetch evicts it
    is_loading: bool = False
    refused_at: int | None = None  # the cache's epoch when the pool had no room for it
    factors: tuple[FactorKey, ...] | None = None  # for which it had none, while one waits for it
    failure: str | None = None  # of the last load
    num_failures: int = 0  # in a row
    retry_at: float = 0.0  # time.monotonic(); until then the failure stands

    @property
    def tier(self) -> Tier:
        """The fastest place that holds it."""
        if self.resident is not None:
            return Tier.DEVICE
        return Tier.HOST if self.staged is not None else Tier.DISK

    @property
    def is_held(self) -> bool:
        """Whether it must stay on the device if it is there."""
        return self.num_uses > 0 or self.is_wanted or self.num_pins > 0

    @property
    def is_awaited(self) -> bool:
        """Whether it is loaded again as soon as there is room."""
        return self.is_held or self.is_prefetched

    @property
    def is_needed(self) -> bool:
        """Whether it must stay known."""
        return self.is_held or self.num_names > 0 or self.num_bound > 0 or self.is_loading

    @property
    def may_be_read(self) -> bool:
        """Whether its files may be needed, as they are not for what is merged and has no name."""
        return self.num_names > 0 or self.num_bound > 0 or self.is_loading

    @property
    def urgency(self) -> int:
        """Of its load: a request that waits for it goes before a pin, a pin before a guess."""
        return 2 if self.is_wanted else int(self.num_pins > 0)

    def forget_failures(self) -> None:
        """The next load is tried at once."""
        self.failure, self.num_failures = None, 0

    def note_failure(self, failure: str, now: float) -> None:
        """A load failed; the wait until it may be tried again doubles each time."""
        self.failure = failure
        seconds = _FIRST_RETRY_SECONDS * 2 ** min(self.num_failures, 16)
        self.retry_at = now + min(seconds, _LAST_RETRY_SECONDS)
        self.num_failures += 1
