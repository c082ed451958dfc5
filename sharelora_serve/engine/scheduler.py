"""What the next forward pass computes: admission, prefill chunks, preemption, in plain integers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sharelora_serve.adapters.adapter import PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.adapter_demand import AdapterDemand, AdapterSource
from sharelora_serve.engine.batch import Batch, FailedRequest, ScheduledRequest
from sharelora_serve.engine.fair_queue import OUTPUT_WEIGHT, PROMPT_WEIGHT, Entry, FairQueue
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request
from sharelora_serve.engine.speculation import Speculator
from sharelora_serve.errors import ServeError

# How many waiting requests one step looks at: bounds its cost when thousands wait for adapters.
LOOK_AHEAD = 64

# How many times what another client was served is far more: its streams may be paused or preempted
# for the other's. With less, clients that are served alike would disturb each other.
_FAR_MORE = 2

MAX_PAUSES = 4  # in a row, of a stream: they are short steps


@dataclass(slots=True)
class _Admission:
    """What one step has found out about waiting requests.

    asked      by the key of an adapter, why it is not there
    overtaken  requests that have been passed for lack of room
    """

    batch: Batch
    is_open: bool  # whether any more may be admitted
    asked: dict[str, Waiting] = field(default_factory=dict)
    overtaken: list[Entry] = field(default_factory=list)


class Scheduler:
    """Continuous batching with chunked prefill over one KV cache and one adapter cache.

    Used by the engine thread alone: add, then schedule, compute, complete, append the sampled
    tokens to output_ids, accept draft tokens that were sampled, and finish what has ended. A
    request is known here from add to finish or abort, or until it comes back in Batch.failed.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        adapters: AdapterSource,
        *,
        max_running: int,
        max_batch_tokens: int,
        prefill_chunk: int,
        prefill_per_decode: int,
        speculator: Speculator,
        are_rows_costly: bool,
    ) -> None:
        """Limits: requests running at once, tokens per step, prompt tokens beside decodes.

        Rows are costly where each makes a step longer, as on a CPU.
        """
        assert max_batch_tokens >= max_running >= 1, "every running request must get its token"
        assert prefill_chunk >= 1, "without prompt tokens no request would ever start"
        self._kv_cache = kv_cache
        self._adapters = adapters
        self._demand = AdapterDemand(adapters)
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk = prefill_chunk
        self._prefill_per_decode = prefill_per_decode
        self.speculator = speculator
        self._are_rows_costly = are_rows_costly
        self._entries: dict[str, Entry] = {}
        self._waiting = FairQueue()
        self._running: list[Entry] = []
        self._paused: dict[Request, int] = {}  # in the last step, for how many in a row
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

    def add(self, request: Request) -> None:
        """Queue a request. It must fit kv_cache.max_tokens, prompt and answer together."""
        assert request.request_id not in self._entries, f"{request.request_id} is here already"
        entry = Entry(request, self._num_arrived)
        self._num_arrived += 1
        self._entries[request.request_id] = entry
        self._waiting.append(entry)

    def abort(self, request_id: str) -> None:
        """Drop a waiting or running request with all it holds; one that is not here is fine."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._remove(entry)

    def finish(self, request: Request) -> None:
        """Give back the blocks and the adapter of a request that has ended."""
        self._remove(self._entries[request.request_id])

    def schedule(self) -> Batch | None:
        """Choose the tokens of the next forward pass, or None when nothing can run.

        Every running request that decodes gets its one token. Prompts are computed in chunks with
        what is left of `max_batch_tokens`, those of running and of waiting requests in the order
        of the FairQueue. While any request decodes, prompt chunks take at most `prefill_chunk`
        tokens together, or `prefill_per_decode` for each that decodes if those are more: so a long
        prompt makes a step longer by a few times at most, and never stalls a stream. What is more
        is not for clients that were served far more than another that runs, who would wait for it.

        A waiting request is admitted when a place is free, its adapter's pages are there, and so
        are KV blocks for all its tokens besides those that running requests still need for their
        prompts and next tokens. Places and blocks are waited for in order. Adapters are not:
        while one loads, requests behind pass. When one finds no room, at most MAX_OVERTAKEN pass,
        then nobody whose turn comes after. An adapter that cannot be had fails its request alone.

        A preempted request gives up its blocks and its adapter, is queued before all others of
        its client, and is computed again later, output included. When KV blocks run out, it is
        the running request whose turn comes last, be it the one that needs them: so the first in
        turn always moves on. A step in which a stream needs that admits nobody. When somebody
        waits for a place or for blocks, it is the last ones of clients that run more requests and
        were served far more, as many as it takes.

        A prompt that is first in turn and needs a little more than its chunk to be complete gets
        the tokens of streams whose clients run more requests and were served far more: they pause
        for the step, but for MAX_PAUSES in a row at most. Where rows are costly they pause too for
        one that its chunk completes: the step is shorter without them.

        Rows that a small step has left go to drafts, see `Speculator`.
        """
        batch = Batch()
        num_preemptions = self.num_preemptions
        num_decodes = self._schedule_decodes(batch)
        num_left, num_more = self._max_batch_tokens - num_decodes, 0
        if num_decodes:
            num_left = min(num_left, self._most_beside(num_decodes))
            num_more = max(0, num_left - self._prefill_chunk)
        may_admit = self.num_preemptions == num_preemptions
        self._schedule_prompts(batch, num_left, num_more, may_admit=may_admit)
        self.speculator.extend(batch, self._kv_cache)
        batch.scheduled.sort(key=_adapter_key)
        return batch if batch.scheduled or batch.failed else None

    def complete(self, batch: Batch) -> None:
        """After the forward pass: count its tokens as computed and offer full blocks to others.

        Requests that were aborted since schedule are passed over.
        """
        for scheduled in batch.scheduled:
            request = scheduled.request
            if request.block_table:
                if scheduled.needs_logits:
                    self._waiting.charge(request.client, OUTPUT_WEIGHT)
                self._entries[request.request_id].count_pieces()
                request.num_computed += scheduled.num_tokens
                self._kv_cache.commit(request)

    def accept(self, request: Request) -> None:
        """Count a draft token as computed, now that it has been appended to output_ids."""
        self.speculator.num_accepted += 1
        self._waiting.charge(request.client, OUTPUT_WEIGHT)
        request.num_computed += 1
        self._kv_cache.commit(request)

    def _schedule_decodes(self, batch: Batch) -> int:
        """Give every running request that decodes its token; return how many there are."""
        decoding = [entry for entry in self._running if entry.request.num_uncomputed == 1]
        for entry in sorted(decoding, key=self._waiting.rank):
            if entry.is_running and self._make_room(entry, 1, batch):
                batch.scheduled.append(ScheduledRequest(entry.request, 1))
        return len(batch.scheduled)

    def _make_room(self, entry: Entry, num_tokens: int, batch: Batch) -> bool:
        """Give the request KV blocks, preempting others; False when its own turn was the last."""
        while not self._kv_cache.grow(entry.request, num_tokens):
            assert len(self._running) > 1, f"{entry.request.request_id} exceeds the KV cache"
            last = max(self._running, key=self._waiting.rank)
            self._preempt(last, batch)
            if last is entry:
                return False
        return True

    def _preempt(self, entry: Entry, batch: Batch) -> None:
        """Queue a running request again, and take it out of the step."""
        self.num_preemptions += 1
        self._running.remove(entry)
        batch.scheduled = [item for item in batch.scheduled if item.request is not entry.request]
        batch.admitted = [request for request in batch.admitted if request is not entry.request]
        self._give_back(entry.request)
        self._waiting.put_back(entry)

    def _schedule_prompts(
        self, batch: Batch, num_left: int, num_more: int, *, may_admit: bool
    ) -> None:
        """Spend the prompt tokens that are left, and admit while places and blocks last too.

        `num_more` of them are not for clients that were served far more than others.
        """
        admission = _Admission(batch, is_open=may_admit)
        clients = {entry.request.client for entry in self._running}
        least = min(map(self._waiting.served, clients), default=0.0)
        started = [entry for entry in self._running if entry.request.num_uncomputed > 1]
        prompts: list[Request] = []
        for entry in self._waiting.in_order(LOOK_AHEAD, started):
            if num_left == 0:
                break
            most = num_left
            if num_more and self._had_far_more(entry, least):
                most -= num_more
            if most <= 0 or not (entry.is_running or self._admit(entry, admission)):
                continue
            request = entry.request
            num_tokens = min(most, request.num_uncomputed)
            if self._make_room(entry, num_tokens, batch):
                prompts.append(request)
                batch.scheduled.append(ScheduledRequest(request, num_tokens))
                num_left -= num_tokens
                self._charge_prompt(entry, num_tokens)
        self._cut_chunks(batch, prompts)
        # Unless it was preempted after it.
        first = next((item for item in batch.scheduled if item.request in prompts[:1]), None)
        self._paused = {} if first is None else self._pause_for(first, batch)
        self.lacks_room = Waiting.NO_ROOM in admission.asked.values()
        self._demand.load_ahead(self._waiting.in_order(LOOK_AHEAD), admission.asked)

    def _most_beside(self, num_decodes: int) -> int:
        """Prompt tokens in a step beside so many streams, of which there is one at least."""
        return max(self._prefill_chunk, self._prefill_per_decode * num_decodes)

    def _cut_chunks(self, batch: Batch, prompts: list[Request]) -> None:
        """Leave prompts what is theirs beside the streams that none of them preempted."""
        num_decodes = sum(item.request not in prompts for item in batch.scheduled)
        if not num_decodes:
            return
        scheduled, num_left = [], self._most_beside(num_decodes)
        for item in batch.scheduled:
            num_tokens = item.num_tokens
            if item.request in prompts:
                num_tokens = min(num_tokens, num_left)
                num_left -= num_tokens
            if num_tokens:
                scheduled.append(ScheduledRequest(item.request, num_tokens))
        batch.scheduled = scheduled

    def _admit(self, entry: Entry, admission: _Admission) -> bool:
        """Move a waiting request to the running ones, if it may go now; it has no blocks yet."""
        if not admission.is_open:
            return False
        request = entry.request
        is_barred = any(passed.must_be_next for passed in admission.overtaken)
        in_the_way = [] if is_barred else self._in_the_way(request)
        if is_barred or not (in_the_way or self._has_room(request)):
            admission.is_open = False
            return False
        if not self._take_adapter(entry, admission):
            return False
        for last in in_the_way:
            self._preempt(last, admission.batch)
        for passed in admission.overtaken:
            passed.num_overtaken += 1
        entry.num_overtaken = 0
        self._waiting.remove(entry)
        self._running.append(entry)
        admission.batch.admitted.append(request)
        self._kv_cache.match_prefix(request)
        return True

    def _has_room(self, request: Request, without: Sequence[Entry] = ()) -> bool:
        """Whether a place is free, and blocks besides those that running requests need next.

        `without` are running requests that are taken as preempted.
        """
        if len(self._running) - len(without) == self._max_running:
            return False
        num_reserved = sum(
            self._kv_cache.num_missing_blocks(entry.request, entry.request.num_tokens + 1)
            for entry in self._running
            if entry not in without
        )
        num_freed = sum(len(entry.request.block_table) for entry in without)
        return self._kv_cache.can_start(request, num_reserved - num_freed)

    def _in_the_way(self, request: Request) -> list[Entry]:
        """Whom to preempt for a waiting request: none if it has room or would still have none."""
        last: list[Entry] = []
        if self._has_room(request):
            return last
        num_running = Counter(entry.request.client for entry in self._running)
        least = num_running[request.client] + 2  # one fewer must not be less than one more
        served = self._waiting.served(request.client)
        for entry in sorted(self._running, key=self._waiting.rank, reverse=True):
            client = entry.request.client
            if num_running[client] >= least and self._had_far_more(entry, served):
                last.append(entry)
                num_running[client] -= 1
                if self._has_room(request, last):
                    return last
        return []

    def _had_far_more(self, entry: Entry, served: float) -> bool:
        return self._waiting.rank(entry)[0] > _FAR_MORE * served

    def _take_adapter(self, entry: Entry, admission: _Admission) -> bool:
        """Give a waiting request its adapter's pages, if they are there."""
        adapter = entry.request.adapter
        if adapter is None:
            return True
        pages: PageTable | Waiting | None = admission.asked.get(adapter.key)
        try:
            if pages is None:
                pages = self._demand.acquire(adapter)
        except ServeError as error:
            self._remove(entry)
            admission.batch.failed.append(FailedRequest(entry.request, error))
            return False
        if isinstance(pages, Waiting):
            admission.asked[adapter.key] = pages
            if pages is Waiting.NO_ROOM or entry.must_be_next:
                admission.overtaken.append(entry)
            return False
        entry.request.page_table = pages
        return True

    def _charge_prompt(self, entry: Entry, num_tokens: int) -> None:
        """Count prompt tokens as served, but for those that were before it was preempted."""
        request = entry.request
        end = min(request.num_computed + num_tokens, len(request.prompt_ids))
        num_new = end - max(entry.num_charged, request.num_computed)
        if num_new > 0:
            self._waiting.charge(request.client, PROMPT_WEIGHT * num_new)
            entry.num_charged = end

    def _pause_for(self, first: ScheduledRequest, batch: Batch) -> dict[Request, int]:
        """Complete a prompt in place of streams that may pause; returned as in `_paused`."""
        request, num_tokens = first.request, first.request.num_uncomputed
        served = self._waiting.served(request.client)
        num_running = Counter(entry.request.client for entry in self._running)
        pausing = {
            item.request: self._paused.get(item.request, 0) + 1
            for item in batch.scheduled
            if item.request.num_uncomputed == 1
            and num_running[item.request.client] > num_running[request.client]
            and self._paused.get(item.request, 0) < MAX_PAUSES
            and self._had_far_more(self._entries[item.request.request_id], served)
        }
        num_missing = num_tokens - first.num_tokens
        is_worth_it = num_missing > 0 or self._are_rows_costly
        if not (pausing and is_worth_it and num_missing <= len(pausing)):
            return {}
        if not self._kv_cache.grow(request, num_tokens):
            return {}
        self._charge_prompt(self._entries[request.request_id], num_tokens)
        batch.scheduled = [
            item for item in batch.scheduled if item.request not in {request, *pausing}
        ]
        batch.scheduled.append(ScheduledRequest(request, num_tokens))
        return pausing

    def _remove(self, entry: Entry) -> None:
        """Forget a request and give back all it holds."""
        del self._entries[entry.request.request_id]
        self.speculator.forget(entry.request)
        if entry.is_running:
            self._running.remove(entry)
            self._give_back(entry.request)
            return
        self._waiting.remove(entry)
        version = entry.request.adapter
        if version is None or not self._demand.is_asked(version.key):
            return
        if not self._waiting.waits_for(version.key):
            self._demand.let_go(version.key)

    def _give_back(self, request: Request) -> None:
        """Release a running request's blocks and adapter."""
        self._kv_cache.free(request)
        if request.adapter is not None:
            request.page_table = None
            self._adapters.release(request.adapter)


def _adapter_key(scheduled: ScheduledRequest) -> str:
    adapter = scheduled.request.adapter
    return adapter.key if adapter is not None else ""  # sorts first
