"""What the next forward pass computes: admission, prefill chunks, preemption, in plain integers."""

from bisect import insort
from dataclasses import dataclass, field
from typing import Protocol

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request
from sharelora_serve.errors import ServeError

# How many requests may be admitted past one whose adapter finds no room. Enough that requests with
# resident adapters fill the batch meanwhile, and few enough that the wait stays within a second or
# so of theirs.
MAX_OVERTAKEN = 16

# How many waiting requests one step looks at: bounds its cost when thousands wait for adapters.
LOOK_AHEAD = 64

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


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Tokens at positions request.num_computed to request.num_computed + num_tokens.

    Valid until Scheduler.complete, which moves num_computed on.
    """

    request: Request
    num_tokens: int

    @property
    def needs_logits(self) -> bool:
        """Whether the chunk reaches the request's last token, so that the next one is sampled."""
        return self.num_tokens == self.request.num_uncomputed


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that left the queue because its adapter cannot be had."""

    request: Request
    error: ServeError


@dataclass(slots=True)
class Batch:
    """One step's work. Rows of one adapter stand together, the base's first.

    `scheduled` is empty when all that happened is that requests failed.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    failed: list[FailedRequest] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass."""
        return sum(scheduled.num_tokens for scheduled in self.scheduled)


@dataclass(slots=True, eq=False)
class _Entry:
    """A request in the scheduler's hands."""

    request: Request
    order: int  # of arrival
    num_overtaken: int = 0  # requests admitted past it for lack of room for its adapter

    @property
    def must_be_next(self) -> bool:
        return self.num_overtaken >= MAX_OVERTAKEN


class Scheduler:
    """Continuous batching with chunked prefill over one KV cache and one adapter cache.

    Used by the engine thread alone: add, then schedule, compute, complete, append the sampled
    tokens to output_ids, and finish what has ended. A request is known here from add to finish
    or abort, or until it comes back in Batch.failed.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        adapters: AdapterSource,
        *,
        max_running: int,
        max_batch_tokens: int,
        prefill_chunk: int,
    ) -> None:
        """Limits: requests running at once, tokens per step, prompt tokens beside decodes."""
        assert max_batch_tokens >= max_running >= 1, "every running request must get its token"
        assert prefill_chunk >= 1, "without prompt tokens no request would ever start"
        self._kv_cache = kv_cache
        self._adapters = adapters
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk = prefill_chunk
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []  # in order of arrival, after those that were preempted
        self._running: list[_Entry] = []  # in order of arrival
        self._asked: dict[str, AdapterVersion] = {}  # by key: waited for or prefetched
        self._num_arrived = 0
        self.num_preemptions = 0  # since the start
        self.lacks_room = False  # whether the last step had no room for some request's adapter

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet, and preempted ones."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold KV blocks and their adapter's pages."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._entries)

    def add(self, request: Request) -> None:
        """Queue a request. It must fit kv_cache.max_tokens, prompt and answer together."""
        assert request.request_id not in self._entries, f"{request.request_id} is here already"
        entry = _Entry(request, self._num_arrived)
        self._num_arrived += 1
        self._entries[request.request_id] = entry
        self._waiting.append(entry)

    def abort(self, request_id: str) -> Request | None:
        """Drop a waiting or running request with all it holds; None when it is not here."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._remove(entry)
        return entry.request if entry is not None else None

    def finish(self, request: Request) -> None:
        """Give back the blocks and the adapter of a request that has ended."""
        self._remove(self._entries[request.request_id])

    def schedule(self) -> Batch | None:
        """Choose the tokens of the next forward pass, or None when nothing can run.

        Every running request that decodes gets its one token. Prompts are computed in chunks with
        what is left of `max_batch_tokens`: running requests first, then waiting ones, each in
        order of arrival. While any request decodes, prompt chunks take `prefill_chunk` tokens
        together at most, so a long prompt never stalls a stream.

        A waiting request is admitted when a place is free, its adapter's pages are there, and so
        are KV blocks for all its tokens besides those that running requests still need for their
        prompts and next tokens. Blocks are waited for in order of arrival. Adapters are not:
        while one loads, requests behind pass. When one finds no room, at most MAX_OVERTAKEN pass,
        then nobody until it is admitted. An adapter that cannot be had fails its request alone.

        When KV blocks run out, the running request that arrived last is preempted, be it the one
        that needs them: it gives up its blocks and its adapter, is queued before all others, and
        is computed again later, output included. So the first to arrive always moves on. A step
        that preempts admits nobody.
        """
        batch = Batch()
        num_running = len(self._running)
        num_prompt_tokens_left = self._schedule_running(batch)
        if len(self._running) == num_running:
            self._admit(batch, num_prompt_tokens_left)
        batch.scheduled.sort(key=_adapter_key)
        return batch if batch.scheduled or batch.failed else None

    def complete(self, batch: Batch) -> None:
        """After the forward pass: count its tokens as computed and offer full blocks to others.

        Requests that were aborted since schedule are passed over.
        """
        for scheduled in batch.scheduled:
            request = scheduled.request
            if request.block_table:
                request.num_computed += scheduled.num_tokens
                self._kv_cache.commit(request)

    def _schedule_running(self, batch: Batch) -> int:
        """Give running requests their tokens; return the prompt tokens left for waiting ones."""
        num_decodes = sum(entry.request.num_uncomputed == 1 for entry in self._running)
        num_left = self._max_batch_tokens - num_decodes
        if num_decodes:
            num_left = min(num_left, self._prefill_chunk)
        index = 0
        while index < len(self._running):  # preemption takes from the end
            entry = self._running[index]
            decodes = entry.request.num_uncomputed == 1
            num_tokens = 1 if decodes else min(num_left, entry.request.num_uncomputed)
            if num_tokens and self._make_room(entry, num_tokens):
                batch.scheduled.append(ScheduledRequest(entry.request, num_tokens))
                num_left -= 0 if decodes else num_tokens
            index += 1
        return num_left

    def _make_room(self, entry: _Entry, num_tokens: int) -> bool:
        """Give the request KV blocks, preempting from the end; False when it was itself last."""
        while not self._kv_cache.grow(entry.request, num_tokens):
            assert len(self._running) > 1, f"{entry.request.request_id} exceeds the KV cache"
            last = self._running.pop()
            self.num_preemptions += 1
            self._give_back(last.request)
            self._waiting.insert(0, last)
            if last is entry:
                return False
        return True

    def _admit(self, batch: Batch, num_tokens_left: int) -> None:
        """Move waiting requests into the batch while prompt tokens, places and blocks last."""
        asked: dict[str, Waiting] = {}  # one answer per adapter and step
        overtaken: list[_Entry] = []
        for entry in self._waiting[:LOOK_AHEAD]:
            if any(passed.must_be_next for passed in overtaken):
                break
            if num_tokens_left == 0 or len(self._running) == self._max_running:
                break
            request = entry.request
            if not self._kv_cache.can_start(request, self._num_reserved_blocks()):
                break
            if request.adapter is not None:
                pages: PageTable | Waiting | None = asked.get(request.adapter.key)
                try:
                    if pages is None:
                        pages = self._acquire(request.adapter)
                except ServeError as error:
                    self._remove(entry)
                    batch.failed.append(FailedRequest(request, error))
                    continue
                if isinstance(pages, Waiting):
                    asked[request.adapter.key] = pages
                    if pages is Waiting.NO_ROOM or entry.must_be_next:
                        overtaken.append(entry)
                    continue
                request.page_table = pages
            for passed in overtaken:
                passed.num_overtaken += 1
            entry.num_overtaken = 0
            self._waiting.remove(entry)
            insort(self._running, entry, key=_order)
            num_tokens_left -= self._start(request, num_tokens_left, batch)
        self.lacks_room = Waiting.NO_ROOM in asked.values()
        self._load_ahead(asked)

    def _acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        self._asked.pop(version.key, None)
        pages = self._adapters.acquire(version)
        if isinstance(pages, Waiting):
            self._asked[version.key] = version
        return pages

    def _start(self, request: Request, max_tokens: int, batch: Batch) -> int:
        """Take the blocks of an admitted request and schedule its first chunk; its tokens."""
        self._kv_cache.match_prefix(request)
        num_tokens = min(max_tokens, request.num_uncomputed)
        has_blocks = self._kv_cache.grow(request, num_tokens)
        assert has_blocks, f"{request.request_id} was admitted without blocks"
        batch.scheduled.append(ScheduledRequest(request, num_tokens))
        return num_tokens

    def _num_reserved_blocks(self) -> int:
        """Blocks that running requests still need for the tokens they have and the next one."""
        return sum(
            self._kv_cache.num_missing_blocks(entry.request, entry.request.num_tokens + 1)
            for entry in self._running
        )

    def _load_ahead(self, asked: dict[str, Waiting]) -> None:
        """Have the adapters loaded that the next waiting requests will need.

        Behind a request that must be next nothing is loaded any more: it needs the room first.
        """
        seen: set[str] = set()
        num_prefetched = 0
        for entry in self._waiting[:LOOK_AHEAD]:
            version = entry.request.adapter
            if version is not None and version.key not in seen:
                seen.add(version.key)
                if version.key not in asked and num_prefetched < PREFETCH_AHEAD:
                    num_prefetched += 1
                    self._asked[version.key] = version
                    self._adapters.prefetch(version)
            if entry.must_be_next:
                for key in self._asked.keys() - seen:
                    self._adapters.cancel(self._asked.pop(key))
                break

    def _remove(self, entry: _Entry) -> None:
        """Forget a request and give back all it holds."""
        del self._entries[entry.request.request_id]
        if entry in self._running:
            self._running.remove(entry)
            self._give_back(entry.request)
            return
        self._waiting.remove(entry)
        version = entry.request.adapter
        if version is not None and version.key in self._asked:
            keys = {_key(other.request) for other in self._waiting}
            if version.key not in keys:
                self._adapters.cancel(self._asked.pop(version.key))

    def _give_back(self, request: Request) -> None:
        """Release a running request's blocks and adapter."""
        self._kv_cache.free(request)
        if request.adapter is not None:
            request.page_table = None
            self._adapters.release(request.adapter)


def _order(entry: _Entry) -> int:
    return entry.order


def _key(request: Request) -> str:
    return request.adapter.key if request.adapter is not None else ""  # sorts first


def _adapter_key(scheduled: ScheduledRequest) -> str:
    return _key(scheduled.request)
