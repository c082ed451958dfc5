"""When an adapter is merged: the rules, held against a recount of everything that was told."""

from collections import Counter
from collections.abc import Iterable, Mapping

from hypothesis import example, given
from hypothesis import strategies as st

from sharelora_serve.engine.merge_policy import (
    LONGEST_STEP_SECONDS,
    MERGE_SECONDS,
    MERGE_SHARE,
    MIN_TOKENS,
    OTHERS_SECONDS,
    OTHERS_SHARE,
    REST_SECONDS,
    Merge,
    MergePolicy,
    Unmerge,
)

OWNERS = (None, "acme", "bolt", "cargo")

STEPS = st.dictionaries(st.sampled_from(OWNERS), st.integers(1, 60), min_size=1)
# Long stretches of one kind of step, since nothing is decided before many steps agree.
STRETCHES = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from(["acme", "bolt", None]).map(lambda owner: {owner: 3}),
            st.just({"acme": 97, None: 3}),
            st.just({"acme": 60, "bolt": 40}),
            STEPS,
        ),
        st.sampled_from([1 / 64, 0.25, 1.0, 7.0, 300.0]),  # seconds between steps, exact in binary
        st.integers(1, 60),  # steps
    ),
    max_size=12,
)


class Watched:
    """A policy, and all that it was told and said."""

    def __init__(self) -> None:
        self.policy = MergePolicy()
        self.now = 1000.0
        self.busy = 0.0
        self.steps: list[tuple[float, Mapping[str | None, int]]] = []
        self.merges: list[tuple[float, str]] = []
        self.unmerged_at: list[float] = []
        self.merged: str | None = None

    def step(self, num_tokens: Mapping[str | None, int], seconds: float) -> Merge | Unmerge | None:
        """A step, so long after the one before; what it says is checked."""
        self.now += seconds
        if self.steps:
            self.busy += min(seconds, LONGEST_STEP_SECONDS)
        self.steps.append((self.busy, num_tokens))
        said = self.policy.observe(self.now, num_tokens)
        if isinstance(said, Merge):
            assert self.merged is None
            self.merged = said.adapter
            self.merges.append((self.now, said.adapter))
        elif isinstance(said, Unmerge):
            assert self.merged is not None
            self.merged = None
            self.unmerged_at.append(self.now)
        return said

    def counts(self, seconds: float) -> Counter[str | None]:
        """Tokens of the last so many busy seconds, by owner."""
        counted = Counter[str | None]()
        for at, num_tokens in self.steps:
            if at >= self.busy - seconds:
                counted.update(num_tokens)
        return counted

    def share(self, owner: str | None, seconds: float) -> float:
        counted = self.counts(seconds)
        return counted[owner] / counted.total()

    def repeat(
        self, num_tokens: Mapping[str | None, int], count: int, seconds: float = 0.12525
    ) -> list[Merge | Unmerge]:
        """Equal steps; what was said to them."""
        said = [self.step(num_tokens, seconds) for _ in range(count)]
        return [one for one in said if one is not None]


def steps_of(
    stretches: Iterable[tuple[Mapping[str | None, int], float, int]],
) -> Iterable[tuple[Mapping[str | None, int], float]]:
    return ((step, seconds) for step, seconds, count in stretches for _ in range(count))


@given(STRETCHES)
@example([({"acme": 97, None: 3}, 0.25, 60), ({None: 40}, 0.25, 30), ({"acme": 40}, 1.0, 90)])
def test_only_an_adapter_with_nearly_all_of_the_traffic_for_a_while_is_merged(
    stretches: list[tuple[Mapping[str | None, int], float, int]],
) -> None:
    watched = Watched()
    for num_tokens, seconds in steps_of(stretches):
        said = watched.step(num_tokens, seconds)
        if isinstance(said, Merge):
            assert num_tokens[said.adapter] > 0
            assert watched.busy >= MERGE_SECONDS
            assert watched.share(said.adapter, MERGE_SECONDS) >= MERGE_SHARE
            assert watched.counts(MERGE_SECONDS)[said.adapter] >= MIN_TOKENS


@given(STRETCHES)
@example([({"acme": 97, None: 3}, 0.25, 60), ({None: 40}, 0.25, 30), ({"acme": 40}, 1.0, 90)])
def test_it_stays_merged_just_as_long_as_the_others_are_few(
    stretches: list[tuple[Mapping[str | None, int], float, int]],
) -> None:
    watched = Watched()
    for num_tokens, seconds in steps_of(stretches):
        merged = watched.merged
        said = watched.step(num_tokens, seconds)
        if merged is not None:
            others = 1 - watched.share(merged, OTHERS_SECONDS)
            assert isinstance(said, Unmerge) == (others > OTHERS_SHARE)


@given(STRETCHES)
@example([({"acme": 97, None: 3}, 0.25, 60), ({None: 40}, 0.25, 30), ({"acme": 40}, 1.0, 90)])
def test_whatever_the_traffic_nothing_is_merged_within_the_rest_after_an_unmerge(
    stretches: list[tuple[Mapping[str | None, int], float, int]],
) -> None:
    watched = Watched()
    for num_tokens, seconds in steps_of(stretches):
        watched.step(num_tokens, seconds)
    for merged_at, _ in watched.merges:
        before = [at for at in watched.unmerged_at if at <= merged_at]
        assert all(merged_at - at >= REST_SECONDS for at in before)


def test_traffic_that_flaps_between_two_adapters_merges_at_most_once_a_minute() -> None:
    watched = Watched()
    for _ in range(24):  # ten minutes
        watched.repeat({"acme": 10}, 110)
        watched.repeat({"bolt": 10}, 90)
    assert 5 <= len(watched.merges) <= 10
    assert len(watched.merges) - len(watched.unmerged_at) <= 1


def test_one_adapters_traffic_merges_it_once_and_for_good() -> None:
    watched = Watched()
    assert watched.repeat({"acme": 2}, 80) == []
    (merge,) = watched.repeat({"acme": 2}, 10_000)
    assert isinstance(merge, Merge)
    assert merge.adapter == "acme"
    assert "100% of the tokens of the last 10 s" in merge.reason


def test_the_base_is_never_merged() -> None:
    assert Watched().repeat({None: 50}, 1000) == []


def test_a_trickle_is_not_merged() -> None:
    assert Watched().repeat({"acme": 1}, 1000) == []


def test_a_request_to_another_adapter_now_and_then_undoes_nothing() -> None:
    watched = Watched()
    watched.repeat({"acme": 4}, 200)
    assert watched.merged == "acme"
    for _ in range(20):
        assert watched.repeat({"acme": 4, "bolt": 1}, 20) == []
        assert watched.repeat({"acme": 4}, 100) == []


def test_a_crowd_of_others_restores_the_base_at_once() -> None:
    watched = Watched()
    watched.repeat({"acme": 4}, 200)
    assert watched.merged == "acme"
    crowd = {"acme": 4, "bolt": 10, "cargo": 10, None: 10}
    (unmerge,) = watched.repeat(crowd, 3)
    assert isinstance(unmerge, Unmerge)
    assert "of the last 5 s" in unmerge.reason


def test_a_night_without_requests_changes_nothing() -> None:
    watched = Watched()
    watched.repeat({"acme": 4}, 200)
    watched.now += 8 * 3600
    assert watched.repeat({None: 20}, 1) == []  # the first request of the day is another's
    assert watched.repeat({"acme": 4}, 500) == []
    assert watched.merged == "acme"


def test_a_night_without_requests_merges_nothing_either() -> None:
    watched = Watched()
    watched.repeat({"acme": 40}, 50)
    watched.now += 8 * 3600
    assert watched.repeat({"acme": 40}, 1) == []


def test_a_version_that_was_refused_is_not_asked_for_again_but_others_are() -> None:
    watched = Watched()
    watched.repeat({"acme": 4}, 200)
    watched.policy.refuse("acme")
    watched.merged = None
    assert watched.repeat({"acme": 4}, 2000) == []
    assert [said for said in watched.repeat({"bolt": 4}, 200) if isinstance(said, Merge)]
    assert watched.merged == "bolt"


def test_what_was_given_up_for_another_reason_rests_as_well() -> None:
    watched = Watched()
    watched.repeat({"acme": 4}, 200)
    given_up_at = watched.now
    watched.policy.unmerged(given_up_at)
    watched.merged = None
    watched.repeat({"acme": 4}, 2000)
    assert watched.merges[-1][0] >= given_up_at + REST_SECONDS
