"""Counts by adapter, of which a bounded number has a name of its own."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sharelora_serve.server.usage import OTHER, PROMOTION_FACTOR, Account, Counts, Usage

BASE = "base"
NAMES = ["acme", "bolt", "cargo", "delta", OTHER]

names = st.sampled_from(NAMES)
counts = st.builds(Counts, st.integers(0, 2), st.integers(0, 50), st.integers(0, 50))


class UsageMachine(RuleBasedStateMachine):
    """Whatever is used, deleted, uploaded again and looked at: what is shown adds up."""

    @initialize(num_named=st.integers(0, len(NAMES) + 1))
    def start(self, num_named: int) -> None:
        self.num_named = num_named
        self.usage = Usage(BASE, num_named)
        self.published = set(NAMES)
        self.held: list[tuple[str, Account]] = []
        self.expected: dict[str, Counts] = {}  # of what is there now
        self.total = Counts()
        self.shown: dict[str, Counts] = {}

    @rule(name=names | st.just(BASE), counts=counts)
    def begin_a_request(self, name: str, counts: Counts) -> None:
        if name == BASE or name in self.published:
            self.held.append((name, self.usage.account(name)))
            self.count(name, counts)

    @rule(data=st.data(), counts=counts)
    def go_on_with_a_request(self, data: st.DataObject, counts: Counts) -> None:
        if self.held:
            position = data.draw(st.integers(0, len(self.held) - 1))
            name, account = self.held[position]
            if account is self.usage.account(name):
                self.expected.setdefault(name, Counts()).add(counts)
            account.add(counts)
            self.total.add(counts)

    def count(self, name: str, counts: Counts) -> None:
        self.held[-1][1].add(counts)
        self.expected.setdefault(name, Counts()).add(counts)
        self.total.add(counts)

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.published.discard(name)
        self.usage.forget(name)
        self.expected.pop(name, None)
        self.shown.pop(name, None)  # the next of this name may start at 0

    @rule(name=names)
    def upload(self, name: str) -> None:
        self.published.add(name)

    @rule()
    def look_at_all(self) -> None:
        self.usage.follow(self.published)
        self.expected = {
            name: known
            for name, known in self.expected.items()
            if name == BASE or name in self.published
        }
        before, self.shown = self.shown, self.usage.shown()
        for name in before.keys() & self.shown.keys():
            for field in Counts.__dataclass_fields__:
                assert getattr(self.shown[name], field) >= getattr(before[name], field), name
        total = Counts()
        for shown in self.shown.values():
            total.add(shown)
        assert total == self.total
        by_name = self.shown.keys() - {BASE, OTHER}
        assert (
            len(self.shown) - 2
            == len(by_name)
            == min(self.num_named, len(self.published - {OTHER}))
        )
        assert by_name <= self.published
        assert self.shown[BASE] == self.expected.get(BASE, Counts())
        unnamed = self.published - by_name - {OTHER}
        if by_name and unnamed:
            most = max(self.usage.of(name).num_tokens for name in unnamed)
            fewest = min(self.usage.of(name).num_tokens for name in by_name)
            assert most <= PROMOTION_FACTOR * fewest

    @invariant()
    def every_adapter_has_its_counts_named_or_not(self) -> None:
        for name in (BASE, *NAMES):
            assert self.usage.of(name) == self.expected.get(name, Counts())


TestUsage = UsageMachine.TestCase


def count(usage: Usage, name: str, num_tokens: int) -> None:
    usage.account(name).add(Counts(1, num_tokens, 0))


def test_an_adapter_that_is_used_more_takes_a_name_and_starts_at_0() -> None:
    usage = Usage(BASE, num_named=1)
    count(usage, "idle", 5)
    count(usage, "busy", 10)
    assert usage.shown() == {BASE: Counts(), "idle": Counts(1, 5), OTHER: Counts(1, 10)}
    count(usage, "busy", 1)
    assert usage.shown() == {BASE: Counts(), "busy": Counts(), OTHER: Counts(3, 16)}
    count(usage, "busy", 7)
    assert usage.shown()["busy"] == Counts(1, 7)
    assert usage.of("busy") == Counts(3, 18)


def test_names_do_not_flap_between_adapters_that_are_used_alike() -> None:
    usage = Usage(BASE, num_named=1)
    changes, last = 0, ""
    for position in range(10_000):
        count(usage, ("acme", "bolt")[position % 2], 10)
        name = next(iter(usage.shown().keys() - {BASE, OTHER}))
        changes += name != last
        last = name
    assert changes == 1


def test_an_idle_adapter_keeps_its_name_while_there_is_room() -> None:
    usage = Usage(BASE, num_named=2)
    usage.follow(["idle"])
    for _ in range(1000):
        count(usage, "busy", 10)
    assert usage.shown() == {
        BASE: Counts(),
        "busy": Counts(1000, 10_000),
        "idle": Counts(),
        OTHER: Counts(),
    }


def test_what_a_deleted_adapters_last_request_counts_is_not_its_successors() -> None:
    usage = Usage(BASE, num_named=1)
    account = usage.account("acme")
    account.add(Counts(1, 5))
    usage.forget("acme")
    assert usage.of("acme") == Counts()
    usage.follow(["acme"])
    account.add(Counts(0, 0, 3))
    assert usage.shown() == {BASE: Counts(), "acme": Counts(), OTHER: Counts(1, 5, 3)}
