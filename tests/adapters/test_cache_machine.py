"""Any order of adds, uses, evictions, replacements and removals, on files and loader threads."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from tests.adapters.shelves import Content, Shelf

NAMES = ("red", "green", "blue")
CONTENTS = (  # with the 1024-byte chunks that each takes when it is alone
    Content(1, rank=16, a_seed=1),  # 3
    Content(2, rank=16, a_seed=1),  # 3, of the same A as the first
    Content(3, rank=20),  # 6
    Content(4, rank=11, modules=("self_attn.q_proj", "mlp.up_proj")),  # 10
    Content(5, rank=4, modules=("self_attn.v_proj",)),  # 2
    Content(6, rank=16, modules=("mlp.gate_proj", "mlp.down_proj")),  # 12
)
SMALL = (CONTENTS[4],)  # may be pinned
POOL_BYTES = 15 * 1024  # page 0 and 14 chunks, so that few can be there together


@dataclass(slots=True, eq=False)
class _Request:
    """Bound to its version from beginning to end; running while it has a table."""

    version: AdapterVersion
    content: Content
    table: PageTable | None = None


class CacheMachine(RuleBasedStateMachine):
    """Running requests read their own factors, books balance, and in the end all is freed."""

    @initialize(
        host_bytes=st.sampled_from([0, 6_000, 1 << 20]), num_loader_threads=st.integers(1, 2)
    )
    def open(self, host_bytes: int, num_loader_threads: int) -> None:
        self.temporary = TemporaryDirectory()
        self.shelf = Shelf(
            Path(self.temporary.name),
            pool_bytes=POOL_BYTES,
            host_bytes=host_bytes,
            num_loader_threads=num_loader_threads,
        )
        self.cache = self.shelf.cache
        self.host_bytes = host_bytes
        self.published: dict[str, Content] = {}
        self.requests: list[_Request] = []
        self.pinned: dict[str, AdapterVersion] = {}

    @rule(name=st.sampled_from(NAMES), content=st.sampled_from(CONTENTS))
    def add_or_replace(self, name: str, content: Content) -> None:
        self.unpin(name)
        self.shelf.publish(name, content)
        self.published[name] = content

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        self.unpin(name)
        self.shelf.remove(name)
        del self.published[name]

    @precondition(lambda self: self.published and not self.pinned)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        if self.published[name] in SMALL:  # every other one fits beside it
            self.pinned[name] = self.shelf.names[name]
            self.cache.pin(self.pinned[name])

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin_again(self) -> None:
        self.unpin(*self.pinned)

    @precondition(lambda self: self.published)
    @rule(data=st.data(), num_requests=st.integers(1, 2), patient=st.booleans())
    def arrive(self, data: st.DataObject, num_requests: int, patient: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.published)))
        for _ in range(num_requests):
            request = _Request(self.shelf.names[name], self.published[name])
            self.cache.bind(request.version)
            self.requests.append(request)
            self.ask(request, patient)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), patient=st.booleans())
    def use(self, data: st.DataObject, patient: bool) -> None:
        self.ask(self.draw_request(data), patient)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def prefetch(self, data: st.DataObject) -> None:
        self.cache.prefetch(self.draw_request(data).version)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end_or_cancel(self, data: st.DataObject) -> None:
        self.finish(self.draw_request(data))

    @rule()
    def wait_for_loads(self) -> None:
        self.shelf.wait_for_loads()

    @invariant()
    def running_requests_read_their_own_factors(self) -> None:
        for request in self.running:
            assert request.table is not None
            self.shelf.assert_reads_back(request.table, request.content)

    @invariant()
    def pinned_adapters_stay_on_the_device(self) -> None:
        if self.pinned and not self.running:  # else it may have found no room yet
            self.shelf.wait_for_loads()
            for version in self.pinned.values():
                assert self.cache.tier(version) == "device"

    @invariant()
    def counts_equal_a_recount_and_bytes_are_within_bounds(self) -> None:
        self.shelf.pool.check_integrity()
        stats = self.cache.stats()
        assert stats.pool.used_bytes <= stats.pool.capacity_bytes == POOL_BYTES
        assert stats.host_bytes <= self.host_bytes
        assert stats.pool.num_adapters >= len({r.version.digest for r in self.running})

    def unpin(self, name: str) -> None:
        if name in self.pinned:
            self.cache.unpin(self.pinned.pop(name))

    @property
    def running(self) -> list[_Request]:
        return [request for request in self.requests if request.table is not None]

    def draw_request(self, data: st.DataObject) -> _Request:
        """Any, since which of them run depends on threads, and what is drawn must not."""
        return self.requests[data.draw(st.integers(0, len(self.requests) - 1))]

    def ask(self, request: _Request, patient: bool = False) -> None:
        """Acquire once; a patient one comes again after its load."""
        for _ in range(1 + patient):
            if request.table is None:
                answer = self.cache.acquire(request.version)
                if not isinstance(answer, Waiting):
                    request.table = answer
                elif patient:
                    self.shelf.wait_for_loads()

    def finish(self, request: _Request) -> None:
        self.requests.remove(request)
        if request.table is not None:
            self.cache.release(request.version)
        else:
            self.cache.cancel(request.version)
        self.cache.unbind(request.version)

    def teardown(self) -> None:
        if hasattr(self, "shelf"):
            try:
                with self.shelf:
                    self.everyone_is_served_and_everything_is_freed()
            finally:
                self.temporary.cleanup()

    def everyone_is_served_and_everything_is_freed(self) -> None:
        for _ in range(10 + 3 * len(self.requests)):
            for request in self.requests:
                self.ask(request)
            self.running_requests_read_their_own_factors()
            for request in self.running:
                self.finish(request)
            self.shelf.wait_for_loads()
        assert not self.requests, "a request found no room though nobody was running"
        for name in self.published:
            self.unpin(name)
            self.shelf.remove(name)
        self.shelf.wait_for_residents(0)
        stats = self.cache.stats()
        assert (stats.pool.used_bytes, stats.host_bytes, stats.num_on_host) == (0, 0, 0)
        assert stats.failures == 0


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdapterCache = CacheMachine.TestCase
