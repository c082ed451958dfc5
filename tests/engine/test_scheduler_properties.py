"""Any sequence of arrivals, steps and aborts."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine import fair_queue, scheduler
from sharelora_serve.engine.request import Request
from tests.engine.rig import VERSIONS, Rig, Shelf, alone, decoding


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, steps and aborts: everyone gets the tokens it gets alone."""

    def __init__(self) -> None:
        super().__init__()
        # Few, so that short runs reach the bound; restored in teardown.
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(fair_queue, "MAX_OVERTAKEN", 2)
        self.patch.setattr(fair_queue, "PROMPT_PIECE", 6)
        self.patch.setattr(scheduler, "LOOK_AHEAD", 2)
        self.num_overtaken: Counter[Request] = Counter()
        self.admitted: set[Request] = set()
        self.aborted: set[Request] = set()

    @initialize(
        num_blocks=st.integers(7, 20),
        max_running=st.integers(1, 5),
        num_extra_tokens=st.integers(0, 20),
        prefill_chunk=st.integers(1, 8),
        prefill_per_decode=st.integers(0, 3),
        are_rows_costly=st.booleans(),
        sizes=st.lists(st.integers(1, 3), min_size=4, max_size=4),
        num_extra_room=st.integers(0, 2),
        num_tenants=st.sampled_from([1, 3]),
        speculative_rows=st.sampled_from([0, 3, 8]),
    )
    def make_rig(
        self,
        num_blocks: int,
        max_running: int,
        num_extra_tokens: int,
        prefill_chunk: int,
        prefill_per_decode: int,
        are_rows_costly: bool,
        sizes: list[int],
        num_extra_room: int,
        num_tenants: int,
        speculative_rows: int,
    ) -> None:
        self.num_tenants = num_tenants
        shelf = Shelf(max(sizes) + num_extra_room)
        shelf.sizes = {version.digest: size for version, size in zip(VERSIONS, sizes, strict=False)}
        max_batch_tokens = max_running + num_extra_tokens
        self.rig = Rig(
            num_blocks,
            max_running,
            max_batch_tokens,
            prefill_chunk,
            shelf,
            prefill_per_decode,
            are_rows_costly=are_rows_costly,
            speculative_rows=min(speculative_rows, max_batch_tokens),
        )

    @rule(
        prompt_ids=st.lists(st.integers(0, 1), min_size=1, max_size=14),  # often alike
        adapter=st.sampled_from([None, *VERSIONS[:4]]),
        max_tokens=st.integers(1, 10),
        tenant=st.integers(0, 2),
    )
    def add(
        self, prompt_ids: list[int], adapter: AdapterVersion | None, max_tokens: int, tenant: int
    ) -> None:
        self.rig.add(prompt_ids, adapter, max_tokens, f"tenant-{tenant % self.num_tenants}")

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step_once()

    def step_once(self) -> None:
        rig = self.rig
        streams = [request for request in rig.requests if decoding(request)]
        first = min(rig.running, key=rig.turn, default=None)
        turns = {request: rig.turn(request) for request in rig.requests}
        before = set(rig.running)
        step = rig.step()
        self.admitted |= before
        if step is None:
            assert not before, "what runs goes on"
            return
        # Only a prompt whose turn is before it keeps it out.
        if first is not None and first not in step:
            assert turns[first] > min(turns[request] for request in step)
        assert sum(step.values()) <= rig.max_batch_tokens
        prompts = [request for request in step if request not in streams]
        # A stream that is not in the step was preempted in it, or pauses for somebody's prompt.
        paused = [stream for stream in streams if stream not in step and stream.block_table]
        for stream in paused:
            assert any(turns[stream] > turns[request] for request in prompts)
        assert all(step[stream] == 1 for stream in streams if stream in step)
        num_decodes = len(paused) + sum(stream in step for stream in streams)
        if num_decodes:
            most = max(rig.prefill_chunk, rig.prefill_per_decode * num_decodes)
            assert sum(map(step.__getitem__, prompts)) <= most + len(paused)
        self.count_overtaken([request for request in step if request not in self.admitted])
        self.admitted |= step.keys()

    def count_overtaken(self, newcomers: list[Request]) -> None:
        """Arrivals admitted for the first time past one of their client that finds no room."""
        order = {request: number for number, request in enumerate(self.rig.requests)}
        for request in self.rig.requests:
            waits = request not in self.admitted and request not in newcomers
            if waits and request not in self.aborted and request.adapter is not None:
                if self.rig.shelf.answers.get(request.adapter.digest) is Waiting.NO_ROOM:
                    self.num_overtaken[request] += sum(
                        newcomer.client == request.client and order[newcomer] > order[request]
                        for newcomer in newcomers
                    )
                assert self.num_overtaken[request] <= fair_queue.MAX_OVERTAKEN

    @rule(load_ticks=st.integers(0, 4))
    def change_load_time(self, load_ticks: int) -> None:
        self.rig.shelf.load_ticks = load_ticks

    @precondition(lambda self: self.rig.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        here = [r for r in self.rig.requests if r not in self.rig.finished | self.aborted]
        request = data.draw(st.sampled_from(here))
        self.rig.scheduler.abort(request.request_id)
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
            if not rig.has_work:
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
