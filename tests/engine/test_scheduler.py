"""What each step computes, who waits, who passes and who steps aside."""

import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine import scheduler as scheduler_module
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.scheduler import MAX_OVERTAKEN, PREFETCH_AHEAD, Batch, Scheduler
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
    ) -> None:
        self.kv_cache = KVCache(num_blocks, BLOCK)
        self.shelf = shelf or Shelf()
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.prefill_chunk = prefill_chunk
        self.scheduler = Scheduler(
            self.kv_cache,
            self.shelf,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            prefill_chunk=prefill_chunk,
        )
        self.requests: list[Request] = []  # in order of arrival
        self.finished: set[Request] = set()
        self.errors: dict[Request, ServeError] = {}
        self.slots: dict[tuple[int, int], tuple[str, list[int]]] = {}

    def add(
        self, prompt: int | list[int], adapter: AdapterVersion | None = None, max_tokens: int = 5
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
        )
        assert len(prompt) + max_tokens <= self.kv_cache.max_tokens
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    @property
    def running(self) -> list[Request]:
        return [request for request in self.requests if request.block_table]

    def step(self) -> dict[Request, int] | None:
        """Schedule, compute, sample and finish; the tokens computed for each request."""
        self.shelf.tick()
        batch = self.scheduler.schedule()
        self.check_books()
        if batch is None:
            return None
        for failed in batch.failed:
            self.errors[failed.request] = failed.error
        needs_logits = self.compute(batch)
        self.scheduler.complete(batch)
        for request in needs_logits:
            request.output_ids.append(next_token(request))
            if len(request.output_ids) == request.sampling.max_tokens:
                self.scheduler.finish(request)
                self.finished.add(request)
        self.check_books()
        return {scheduled.request: scheduled.num_tokens for scheduled in batch.scheduled}

    def compute(self, batch: Batch) -> list[Request]:
        """Run the stand-in model; the requests that need a token sampled."""
        for scheduled in batch.scheduled:
            request, start = scheduled.request, scheduled.request.num_computed
            assert (request.page_table is None) == (request.adapter is None)
            for position in range(start, start + scheduled.num_tokens):
                self.slots[self.slot(request, position)] = content(request, position)
        for scheduled in batch.scheduled:
            request, start = scheduled.request, scheduled.request.num_computed
            for position in range(start + scheduled.num_tokens):
                assert self.slots[self.slot(request, position)] == content(request, position)
        return [scheduled.request for scheduled in batch.scheduled if scheduled.needs_logits]

    def slot(self, request: Request, position: int) -> tuple[int, int]:
        return request.block_table[position // BLOCK], position % BLOCK

    def check_books(self) -> None:
        self.kv_cache.check_integrity(self.requests)
        assert self.scheduler.num_running == len(self.running)
        holders = Counter(request.adapter.digest for request in self.running if request.adapter)
        held = {digest: num for digest, num in self.shelf.num_holders.items() if num}
        assert held == holders

    def run(self, until: Request | None = None) -> None:
        """Step until nothing is left to do, or one request has finished."""
        for _ in range(1000):
            if not self.scheduler.has_work or until in self.finished:
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


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_long_prompt_never_stalls_a_stream(rig: Rig) -> None:
    stream = rig.add(3, max_tokens=50)
    rig.step()
    prompt = rig.add(30)
    steps = [rig.step() for _ in range(4)]
    assert [step and step[stream] for step in steps] == [1, 1, 1, 1]
    assert [step and step[prompt] for step in steps] == [8, 8, 8, 6]
    assert len(prompt.output_ids) == 1


def test_without_streams_a_prompt_takes_the_whole_budget(rig: Rig) -> None:
    prompt = rig.add(50)
    assert rig.step() == {prompt: 32}
    assert rig.step() == {prompt: 18}


def test_several_prompts_share_what_streams_leave_in_order_of_arrival(rig: Rig) -> None:
    stream = rig.add(3, max_tokens=50)
    rig.step()
    first, second, third = rig.add(5), rig.add(6), rig.add(3)
    assert rig.step() == {stream: 1, first: 5, second: 3}
    assert rig.step() == {stream: 1, first: 1, second: 3, third: 3}


def test_running_prompt_goes_before_waiting_ones(rig: Rig) -> None:
    first, second = rig.add(40), rig.add(40)
    assert rig.step() == {first: 32}
    assert rig.step() == {first: 8, second: 24}


def test_streams_at_the_limit_of_running_requests_leave_others_waiting() -> None:
    rig = Rig(max_running=2)
    rig.add(3), rig.add(3), rig.add(3)
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)


def test_nothing_to_do_is_no_batch(rig: Rig) -> None:
    assert not rig.scheduler.has_work
    assert rig.scheduler.schedule() is None


def test_only_the_chunk_that_reaches_the_last_token_needs_logits(rig: Rig) -> None:
    rig.add(40)
    first = rig.scheduler.schedule()
    assert first is not None
    assert [scheduled.needs_logits for scheduled in first.scheduled] == [False]
    rig.scheduler.complete(first)
    second = rig.scheduler.schedule()
    assert second is not None
    assert [scheduled.needs_logits for scheduled in second.scheduled] == [True]
    assert second.num_tokens == 8


def test_rows_of_one_adapter_stand_together_and_the_base_comes_first() -> None:
    rig = Rig(max_batch_tokens=64)
    for adapter in [B, None, A, B, None, A]:
        rig.add(3, adapter)
    rig.step()
    rig.add(3, A)
    rig.add(3)
    batch = rig.scheduler.schedule()
    assert batch is not None
    adapters = [scheduled.request.adapter for scheduled in batch.scheduled]
    assert adapters == [None, None, None, A, A, A, B, B]


def test_prompt_in_the_prefix_cache_is_computed_from_its_end(rig: Rig) -> None:
    rig.add(list(range(12)), A)
    rig.run()
    other, same = rig.add(list(range(12)), B), rig.add(list(range(12)), A)
    assert rig.step() == {other: 12, same: 4}
    assert (other.num_cached_tokens, same.num_cached_tokens) == (0, 8)


def test_request_whose_adapter_loads_is_passed_and_enters_when_it_is_there() -> None:
    rig = Rig(shelf=Shelf(load_ticks=3))
    loading, base = rig.add(3, A), rig.add(3, max_tokens=20)
    assert rig.step() == {base: 3}
    assert rig.step() == {base: 1}
    assert rig.step() == {base: 1}
    assert rig.step() == {base: 1, loading: 3}


def test_adapters_of_queued_requests_load_while_every_place_is_taken() -> None:
    rig = Rig(max_running=1, shelf=Shelf(load_ticks=3))
    rig.add(3, max_tokens=10)
    rig.step()
    for version in VERSIONS[:10]:
        rig.add(3, version)
    rig.step()
    assert list(rig.shelf.ticks_left) == [v.digest for v in VERSIONS[:PREFETCH_AHEAD]]


def test_adapter_that_cannot_be_had_fails_its_request_alone(rig: Rig) -> None:
    rig.shelf.broken.add(A.digest)
    broken, whole = rig.add(3, A), rig.add(3, B)
    assert rig.step() == {whole: 3}
    assert "tenant-1" in str(rig.errors[broken])
    rig.run()
    assert rig.finished == {whole}


def test_failure_is_reported_even_when_nothing_can_run(rig: Rig) -> None:
    rig.shelf.broken.add(A.digest)
    broken = rig.add(3, A)
    assert rig.step() == {}
    assert list(rig.errors) == [broken]
    assert not rig.scheduler.has_work


def test_request_without_room_is_not_overtaken_for_ever() -> None:
    rig = Rig(shelf=Shelf(room=1), max_running=4)
    rig.add(3, A)
    rig.step()
    starved = rig.add(3, B)
    later = []
    while not starved.block_table:
        later.append(rig.add(3, A))  # whose adapter is always there
        rig.step()
        assert len(later) < 200, "still waiting"
    assert sum(request.num_tokens > 3 for request in later) == MAX_OVERTAKEN
    rig.run()
    assert rig.finished == set(rig.requests)


def test_scheduler_tells_that_an_adapter_finds_no_room_and_when_that_is_over() -> None:
    rig = Rig(shelf=Shelf(room=1), max_running=4)
    rig.add(3, A, max_tokens=9)
    rig.step()
    assert not rig.scheduler.lacks_room
    waiting = rig.add(3, B)
    rig.step()
    assert rig.scheduler.lacks_room
    while not waiting.block_table:
        assert waiting not in rig.finished
        rig.step()
    assert not rig.scheduler.lacks_room


def test_room_that_a_starved_request_needs_is_not_kept_for_those_behind() -> None:
    rig = Rig(shelf=Shelf(room=2, load_ticks=2), max_running=3)
    rig.shelf.sizes[C.digest] = 2
    rig.add(3, A, max_tokens=90)
    while not rig.running:
        rig.step()
    starved = rig.add(3, C, max_tokens=1)
    behind = [rig.add(3, version, max_tokens=1) for version in VERSIONS[3:]]
    rig.run(until=starved)
    assert sum(request in rig.finished for request in behind) == MAX_OVERTAKEN


def test_newest_request_is_preempted_and_computed_again_with_its_output() -> None:
    rig = Rig(num_blocks=7, max_batch_tokens=64)  # 6 usable
    oldest, newest = rig.add(7, max_tokens=10), rig.add(7, max_tokens=10)
    rig.step()
    while newest.block_table:
        rig.step()
    assert newest.num_computed == 0
    assert 0 < len(newest.output_ids) < 10
    rig.run()
    assert rig.finished == {oldest, newest}
    assert newest.output_ids == alone(newest)


def test_newest_request_that_needs_blocks_itself_steps_aside() -> None:
    rig = Rig(num_blocks=5, max_batch_tokens=64)  # 4 usable
    oldest, newest = rig.add(5, max_tokens=10), rig.add(6, max_tokens=10)
    for _ in range(3):  # the newest fills its two blocks first
        rig.step()
    assert rig.step() == {oldest: 1}
    assert newest.block_table == []
    rig.run()
    assert newest.output_ids == alone(newest)


def test_preempted_request_gives_up_its_adapter_and_goes_first() -> None:
    rig = Rig(num_blocks=7, max_batch_tokens=64, max_running=2)
    rig.add(7, max_tokens=10)
    preempted = rig.add(7, A, max_tokens=10)
    rig.step()
    rig.add(3, B)
    while preempted.block_table:
        rig.step()
    assert preempted.page_table is None
    assert rig.shelf.num_acquired == 0
    while not preempted.block_table:
        assert rig.scheduler.num_waiting == 2  # the one behind does not slip in before it
        rig.step()


def test_admission_leaves_the_blocks_that_running_requests_need_next() -> None:
    rig = Rig(num_blocks=5, max_batch_tokens=64)  # 4 usable
    running = rig.add(8, max_tokens=4)
    rig.step()  # 2 blocks; the next token takes a third
    waiting = rig.add(7, max_tokens=1)
    rig.step()
    assert waiting.block_table == []
    rig.run()
    assert rig.finished == {running, waiting}


def test_request_that_lacks_blocks_is_not_overtaken_by_smaller_ones() -> None:
    rig = Rig(num_blocks=9, max_batch_tokens=64)  # 8 usable
    rig.add(15, max_tokens=4)
    rig.step()
    large, small = rig.add(20, max_tokens=4), rig.add(2, max_tokens=1)
    while not large.block_table:
        assert small.output_ids == []
        rig.step()


def test_abort_frees_a_running_request_at_once(rig: Rig) -> None:
    running = rig.add(9, A)
    rig.step()
    assert rig.scheduler.abort("request-0") is running
    assert (rig.kv_cache.num_used_blocks, rig.shelf.num_acquired) == (0, 0)
    assert not rig.scheduler.has_work
    assert rig.scheduler.abort("request-0") is None


def test_abort_between_schedule_and_complete_leaves_the_rest_of_the_batch(rig: Rig) -> None:
    gone, stays = rig.add(9, A), rig.add(9, B)
    batch = rig.scheduler.schedule()
    assert batch is not None
    rig.scheduler.abort(gone.request_id)
    rig.scheduler.complete(batch)
    assert (gone.num_computed, stays.num_computed) == (0, 9)
    rig.check_books()


def test_abort_of_the_last_request_that_waits_for_a_load_cancels_it() -> None:
    rig = Rig(shelf=Shelf(load_ticks=5))
    first, second = rig.add(3, A), rig.add(3, A)
    rig.step()
    rig.scheduler.abort(first.request_id)
    assert list(rig.shelf.ticks_left) == [A.digest]
    rig.scheduler.abort(second.request_id)
    assert not rig.shelf.ticks_left


def alone(request: Request) -> list[int]:
    """The output that the request's prompt gets with nothing else in flight."""
    rig = Rig()
    single = rig.add(request.prompt_ids, request.adapter, request.sampling.max_tokens)
    rig.run()
    return single.output_ids


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, steps and aborts: everyone gets the tokens it gets alone."""

    def __init__(self) -> None:
        super().__init__()
        # Few, so that short runs reach the bound; restored in teardown.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(scheduler_module, "MAX_OVERTAKEN", 2)
        self.num_overtaken: Counter[Request] = Counter()
        self.admitted: set[Request] = set()
        self.aborted: set[Request] = set()

    @initialize(
        num_blocks=st.integers(7, 20),
        max_running=st.integers(1, 5),
        num_extra_tokens=st.integers(0, 20),
        prefill_chunk=st.integers(1, 8),
        sizes=st.lists(st.integers(1, 3), min_size=4, max_size=4),
        num_extra_room=st.integers(0, 2),
    )
    def make_rig(
        self,
        num_blocks: int,
        max_running: int,
        num_extra_tokens: int,
        prefill_chunk: int,
        sizes: list[int],
        num_extra_room: int,
    ) -> None:
        shelf = Shelf(max(sizes) + num_extra_room)
        shelf.sizes = {version.digest: size for version, size in zip(VERSIONS, sizes, strict=False)}
        max_batch_tokens = max_running + num_extra_tokens
        self.rig = Rig(num_blocks, max_running, max_batch_tokens, prefill_chunk, shelf)

    @rule(
        prompt_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14),  # often alike
        adapter=st.sampled_from([None, *VERSIONS[:4]]),
        max_tokens=st.integers(1, 10),
    )
    def add(self, prompt_ids: list[int], adapter: AdapterVersion | None, max_tokens: int) -> None:
        self.rig.add(prompt_ids, adapter, max_tokens)

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step_once()

    def step_once(self) -> None:
        rig = self.rig
        streams = [request for request in rig.requests if decoding(request)]
        oldest = next(iter(rig.running), None)
        before = set(rig.running)
        step = rig.step()
        self.admitted |= before
        if step is None:
            return
        # A stream that is not in the step was preempted in it.
        assert all(step.get(stream) == 1 or not stream.block_table for stream in streams)
        assert oldest is None or oldest in step
        assert sum(step.values()) <= rig.max_batch_tokens
        if streams:
            num_prompt_tokens = sum(num for request, num in step.items() if request not in streams)
            assert num_prompt_tokens <= rig.prefill_chunk
        self.count_overtaken([request for request in step if request not in self.admitted])
        self.admitted |= step.keys()

    def count_overtaken(self, newcomers: list[Request]) -> None:
        """Arrivals admitted for the first time past one that was told that there is no room."""
        order = {request: number for number, request in enumerate(self.rig.requests)}
        for request in self.rig.requests:
            waits = request not in self.admitted and request not in newcomers
            if waits and request not in self.aborted and request.adapter is not None:
                if self.rig.shelf.answers.get(request.adapter.digest) is Waiting.NO_ROOM:
                    self.num_overtaken[request] += sum(
                        order[newcomer] > order[request] for newcomer in newcomers
                    )
                assert self.num_overtaken[request] <= scheduler_module.MAX_OVERTAKEN

    @rule(load_ticks=st.integers(0, 4))
    def change_load_time(self, load_ticks: int) -> None:
        self.rig.shelf.load_ticks = load_ticks

    @precondition(lambda self: self.rig.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        here = [r for r in self.rig.requests if r not in self.rig.finished | self.aborted]
        request = data.draw(st.sampled_from(here))
        assert self.rig.scheduler.abort(request.request_id) is request
        self.aborted.add(request)
        self.rig.check_books()

    def teardown(self) -> None:
        try:
            if hasattr(self, "rig"):
                self.finish_everything()
        finally:
            self.patch.undo()

    def finish_everything(self) -> None:
        rig = self.rig
        for _ in range(100 + 60 * len(rig.requests)):
            if not rig.scheduler.has_work:
                break
            self.step_once()
        assert rig.finished == set(rig.requests) - self.aborted
        assert (rig.kv_cache.num_used_blocks, rig.shelf.num_acquired) == (0, 0)
        assert not rig.shelf.kept, "loads that nobody waits for"
        for request in rig.finished:
            assert request.output_ids == alone(request)


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestSchedulerGivesEveryoneItsTokens = SchedulerMachine.TestCase
