"""Who may wait, who is refused, and who makes room."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.engine.backlog import Backlog
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.errors import OverloadedError, QueueFullError


def make_request(name: str, tenant: str = "one", arrived_at: float = 0.0) -> Request:
    return Request(
        name,
        None,
        [1],
        SamplingParams(max_tokens=1),
        arrived_at,
        deliver=lambda output: None,  # noqa: ARG005
        tenant=tenant,
    )


def test_pace_is_that_of_the_last_admissions() -> None:
    backlog = Backlog(1000, 10.0)
    requests = [make_request(str(index)) for index in range(60)]
    for request in requests[:40]:
        backlog.add([request], 0.0)
    for second, request in enumerate(requests[:30], start=1):
        backlog.admit(request, float(second))
    assert len(backlog) == 10
    # One a second: the next would be the eleventh.
    with pytest.raises(OverloadedError, match="10 requests like this") as refused:
        backlog.add([requests[40]], 30.0)
    assert refused.value.retry_after_seconds == pytest.approx(1.0)
    backlog.admit(requests[30], 31.0)
    backlog.admit(requests[31], 32.0)
    assert backlog.add([requests[41]], 32.0) == []


def test_standstill_makes_the_wait_longer_and_others_are_not_concerned() -> None:
    backlog = Backlog(1000, 10.0)
    backlog.add([make_request("first")], 0.0)
    assert backlog.add([make_request("second")], 10.0) == []
    with pytest.raises(OverloadedError, match=r"2 requests like this.*about 11 s"):
        backlog.add([make_request("third")], 11.0)
    assert backlog.add([make_request("other", "other")], 11.0) == []


def test_one_that_hangs_has_nobody_refused_who_starts_at_once() -> None:
    backlog = Backlog(1000, 10.0)
    backlog.add([make_request("hangs")], 0.0)
    for second in range(2, 40, 2):
        request = make_request(str(second), arrived_at=float(second))
        assert backlog.add([request], float(second)) == []
        backlog.admit(request, second + 0.1)
    burst = [make_request(f"burst-{index}", arrived_at=40.0) for index in range(50)]
    assert backlog.add(burst, 40.0) == []


def test_who_had_nobody_waiting_starts_anew() -> None:
    backlog = Backlog(1000, 10.0)
    first = make_request("first")
    backlog.add([first], 0.0)
    backlog.admit(first, 100.0)
    backlog.add([make_request("second")], 101.0)
    assert backlog.add([make_request("third")], 102.0) == []


def test_without_a_limit_everybody_waits() -> None:
    backlog = Backlog(1000, None)
    backlog.add([make_request("first")], 0.0)
    assert backlog.add([make_request("second")], 1e6) == []


def test_choices_of_one_request_wait_all_or_none() -> None:
    backlog = Backlog(3, None)
    backlog.add([make_request(f"few-{index}", "few") for index in range(2)], 0.0)
    with pytest.raises(QueueFullError, match="2 requests are waiting already, of 3"):
        backlog.add([make_request(f"two-{index}", "two") for index in range(2)], 0.0)
    assert len(backlog) == 2


def test_what_came_together_is_dropped_together_and_stays_once_it_has_begun() -> None:
    backlog = Backlog(6, None)
    first = [make_request(f"first-{index}", "many") for index in range(3)]
    second = [make_request(f"second-{index}", "many") for index in range(3)]
    backlog.add(first, 0.0)
    backlog.add(second, 0.0)
    assert backlog.add([make_request("one", "few")], 0.0) == [second]
    assert len(backlog) == 4
    backlog.add([make_request("two", "other"), make_request("three", "other")], 0.0)
    backlog.admit(first[0], 1.0)
    backlog.add([make_request("four", "another")], 1.0)
    with pytest.raises(QueueFullError):
        backlog.add([make_request("five", "last")], 1.0)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), max_size=60),
)
def test_queue_is_never_above_its_bound_and_nobody_is_pushed_out_by_the_longer_line(
    max_queue: int, arrivals: list[tuple[str, int, bool]]
) -> None:
    backlog = Backlog(max_queue, None)
    waiting: dict[str, list[Request]] = {"a": [], "b": [], "c": []}
    for number, (tenant, count, leaves) in enumerate(arrivals):
        requests = [make_request(f"{number}-{index}", tenant) for index in range(count)]
        before = sum(map(len, waiting.values()))
        try:
            dropped = backlog.add(requests, 0.0)
        except QueueFullError:
            assert before + count > max_queue
        else:
            waiting[tenant] += requests
            for group in dropped:
                other = group[0].tenant or ""
                assert other != tenant
                assert group == waiting[other][-len(group) :]
                del waiting[other][-len(group) :]
                assert len(waiting[other]) >= len(waiting[tenant])
        if leaves:
            for request in requests:
                backlog.remove(request)
            waiting[tenant] = [each for each in waiting[tenant] if each not in requests]
        assert len(backlog) == sum(map(len, waiting.values())) <= max_queue
