"""A scheduler with its caches and a stand-in for the model, to be driven step by step."""

import math
import random
from collections import Counter, OrderedDict

import numpy as np

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.batch import Batch
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.scheduler import Scheduler
from sharelora_serve.engine.speculation import Speculator
from sharelora_serve.errors import AdapterUnavailableError, ServeError

BLOCK = 4
VERSIONS = [AdapterVersion(f"tenant-{index}", f"{index:064x}") for index in range(1, 31)]
A, B, C = VERSIONS[:3]


class Shelf:
    """A small adapter cache: room for some adapters, each of which takes some ticks to load.

    What is loaded for a queued request is kept for it until it is acquired or cancelled.
    """

    def __init__(self, room: int = 1000, load_ticks: int = 0) -> None:
        self.room = room
        self.load_ticks = load_ticks
        self.sizes: dict[str, int] = {}  # 1 for those that are not here
        self.broken: set[str] = set()
        self.num_holders: OrderedDict[str, int] = OrderedDict()  # resident ones, oldest first
        self.ticks_left: dict[str, int] = {}  # loading ones
        self.kept: set[str] = set()
        self.answers: dict[str, Waiting] = {}  # since the last tick

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        digest = version.digest
        if digest in self.broken:
            raise AdapterUnavailableError(f"adapter '{version.name}' cannot be read")
        self.prefetch(version)
        if digest in self.num_holders:
            self.num_holders[digest] += 1
            self.num_holders.move_to_end(digest)
            self.kept.discard(digest)
            offsets, pages = np.zeros(1, np.int32), np.zeros(0, np.int32)
            return PageTable(offsets, pages, pages, np.zeros(0, np.float32))
        self.answers[digest] = Waiting.LOADING if digest in self.ticks_left else Waiting.NO_ROOM
        return self.answers[digest]

    def release(self, version: AdapterVersion) -> None:
        assert self.num_holders[version.digest] > 0, f"{version.name} released too often"
        self.num_holders[version.digest] -= 1

    def cancel(self, version: AdapterVersion) -> None:
        self.kept.discard(version.digest)
        self.ticks_left.pop(version.digest, None)

    def prefetch(self, version: AdapterVersion) -> None:
        digest = version.digest
        if digest in self.num_holders or digest in self.ticks_left:
            return
        idle = [d for d, num in self.num_holders.items() if num == 0 and d not in self.kept]
        num_needed = self.size(digest) + sum(map(self.size, [*self.num_holders, *self.ticks_left]))
        if num_needed - sum(map(self.size, idle)) > self.room:
            return
        while num_needed > self.room:
            num_needed -= self.size(idle[0])
            del self.num_holders[idle.pop(0)]
        self.ticks_left[digest] = self.load_ticks
        self.kept.add(digest)
        self.finish_loads()

    def size(self, digest: str) -> int:
        return self.sizes.get(digest, 1)

    def tick(self) -> None:
        self.answers.clear()
        self.ticks_left = {digest: ticks - 1 for digest, ticks in self.ticks_left.items()}
        self.finish_loads()

    def finish_loads(self) -> None:
        for digest in [digest for digest, ticks in self.ticks_left.items() if ticks <= 0]:
            del self.ticks_left[digest]
            self.num_holders[digest] = 0

    @property
    def num_acquired(self) -> int:
        return sum(self.num_holders.values())


class Rig:
    """A scheduler with its caches and a stand-in for the model, driven as the engine drives it.

    The model's memory is simulated: computing a token writes, into its slot, the digest and every
    token up to it; computing a chunk reads the slots of every position before its end.
    """

    def __init__(
        self,
        num_blocks: int = 100,
        max_running: int = 8,
        max_batch_tokens: int = 32,
        prefill_chunk: int = 8,
        shelf: Shelf | None = None,
        prefill_per_decode: int = 0,
        *,
        are_rows_costly: bool = False,
        speculative_rows: int = 0,
    ) -> None:
        self.kv_cache = KVCache(num_blocks, BLOCK)
        self.shelf = shelf or Shelf()
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.prefill_chunk = prefill_chunk
        self.prefill_per_decode = prefill_per_decode
        self.scheduler = Scheduler(
            self.kv_cache,
            self.shelf,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=prefill_chunk,
            prefill_per_decode=prefill_per_decode,
            speculator=Speculator(speculative_rows),
            are_rows_costly=are_rows_costly,
        )
        self.requests: list[Request] = []  # in order of arrival
        self.finished: set[Request] = set()
        self.errors: dict[Request, ServeError] = {}
        self.slots: dict[tuple[int, int], tuple[str, list[int]]] = {}

    def add(
        self,
        prompt: int | list[int],
        adapter: AdapterVersion | None = None,
        max_tokens: int = 5,
        tenant: str | None = "all",
    ) -> Request:
        """Queue a request; a number stands for a prompt of so many tokens like no other."""
        number = len(self.requests)
        if isinstance(prompt, int):
            prompt = [1000 * number + position for position in range(prompt)]
        request = Request(
            f"request-{number}",
            adapter,
            prompt,
            SamplingParams(max_tokens=max_tokens),
            float(number),
            deliver=lambda output: None,  # noqa: ARG005
            tenant=tenant,
        )
        assert len(prompt) + max_tokens <= self.kv_cache.max_tokens
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    @property
    def has_work(self) -> bool:
        return self.scheduler.num_waiting + self.scheduler.num_running > 0

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request.block_table]

    def turn(self, request: Request) -> tuple[float, int]:
        """Sorts requests as the scheduler does; those that ended are last."""
        entry = self.scheduler._entries.get(request.request_id)
        return (math.inf, 0) if entry is None else self.scheduler._waiting.rank(entry)

    def step(self) -> dict[Request, int] | None:
        """Schedule, compute, sample and finish; the tokens computed for each request."""
        self.shelf.tick()
        batch = self.scheduler.schedule()
        self.check_books()
        if batch is None:
            return None
        for failed in batch.failed:
            self.errors[failed.request] = failed.error
        self.compute(batch)
        self.scheduler.complete(batch)
        for scheduled in batch.scheduled:
            if scheduled.request.num_uncomputed == 0:
                self.sample(scheduled.request, scheduled.draft_ids)
        self.check_books()
        return {scheduled.request: scheduled.num_tokens for scheduled in batch.scheduled}

    def sample(self, request: Request, draft_ids: list[int]) -> None:
        """Append the request's next token, and the next as long as the draft has that one."""
        for draft_id in (*draft_ids, None):
            token_id = next_token(request)
            request.output_ids.append(token_id)
            if len(request.output_ids) == request.sampling.max_tokens:
                self.scheduler.finish(request)
                self.finished.add(request)
                return
            if token_id != draft_id:
                return
            self.scheduler.accept(request)

    def compute(self, batch: Batch) -> None:
        """Run the stand-in model."""
        for scheduled in batch.scheduled:
            request, start = scheduled.request, scheduled.request.num_computed
            assert (request.page_table is None) == (request.adapter is None)
            end = start + scheduled.num_tokens
            for position in range(start, end):
                self.slots[self.slot(request, position)] = content(request, position)
            for position in range(end, end + len(scheduled.draft_ids)):
                digest, token_ids = content(request, end - 1)
                token_ids = token_ids + scheduled.draft_ids[: position + 1 - end]
                self.slots[self.slot(request, position)] = digest, token_ids
        for scheduled in batch.scheduled:
            request, start = scheduled.request, scheduled.request.num_computed
            for position in range(start + scheduled.num_tokens):
                assert self.slots[self.slot(request, position)] == content(request, position)

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_table[position // BLOCK], position % BLOCK

    def check_books(self) -> None:
        self.kv_cache.check_integrity(self.requests)
        assert self.scheduler.num_running == len(self.running)
        here = {entry.request for entry in self.scheduler._entries.values()}
        assert self.scheduler.speculator._drafters.keys() <= here
        holders = Counter(request.adapter.digest for request in self.running if request.adapter)
        held = {digest: num for digest, num in self.shelf.num_holders.items() if num}
        assert held == holders

    def run(self, until: Request | None = None) -> None:
        """Step until nothing is left to do, or one request has finished."""
        for _ in range(1000):
            if not self.has_work or until in self.finished:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.num_waiting} requests still wait")


def content(request: Request, position: int) -> tuple[str, list[int]]:
    digest = request.adapter.digest if request.adapter else ""
    return digest, request.tokens(0, position + 1)


def next_token(request: Request) -> int:
    """The stand-in model's greedy choice: depends on the adapter and on every token so far."""
    return random.Random(repr(content(request, request.num_tokens - 1))).randrange(3)


def decoding(request: Request) -> bool:
    return bool(request.block_table) and request.num_uncomputed == 1


def alone(request: Request) -> list[int]:
    """The output that the request's prompt gets with nothing else in flight."""
    rig = Rig()
    single = rig.add(request.prompt_ids, request.adapter, request.sampling.max_tokens)
    rig.run()
    return single.output_ids
