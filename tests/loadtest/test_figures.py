"""The arithmetic of reports, on timelines that are made up."""

import math
import random

import pytest

from loadtest.client import Timeline
from loadtest.comparison import CASES, Comparison
from loadtest.figures import Figures, jain_index, satisfaction, summarize
from loadtest.flood import others_wait
from loadtest.markdown import figure, table
from loadtest.player import Outcome
from loadtest.results import report
from loadtest.workload import Request


def outcome(tenant: str, sent_at: float, *tokens_at: float, **fields: object) -> Outcome:
    timeline = Timeline(sent_at, list(tokens_at), status=200, num_tokens=len(tokens_at))
    for name, value in fields.items():
        setattr(timeline, name, value)
    return Outcome(Request(None, tenant, "red dog", 4, tenant), timeline)


@pytest.fixture
def found() -> Figures:
    return summarize(
        [
            outcome("acme", 100.0, 101.0, 102.0, 103.0),
            outcome("acme", 100.0, 103.0, 103.5),
            outcome("bolt", 104.0, 111.0, num_tokens=1),
            outcome("bolt", 105.0, 106.0, 110.0, error="the answer breaks off"),
            outcome("bolt", 106.0, status=429, error="429: come again"),
            outcome("coil", 107.0, status=None, error="the connection failed"),
        ]
    )


def test_refused_requests_are_no_failures(found: Figures) -> None:
    assert (found.num_requests, found.num_answered) == (6, 3)
    assert (found.num_refused, found.num_failed) == (1, 2)
    assert found.errors == {"the answer breaks off": 1, "the connection failed": 1}


def test_throughput_is_over_the_time_from_the_first_request_to_the_last_token(
    found: Figures,
) -> None:
    assert found.seconds == 11.0
    assert found.tokens_per_second == pytest.approx(8 / 11)
    assert found.requests_per_second == pytest.approx(3 / 11)


def test_waiting_is_for_the_first_token_and_then_for_each(found: Figures) -> None:
    first, step = found.first_token_seconds, found.time_per_token_seconds
    assert (first.p50, first.p90, first.p99) == (1.0, 7.0, 7.0)
    assert (step.p50, step.p90, step.p99) == (0.5, 1.0, 1.0)


def test_a_request_without_a_first_token_attains_nothing(found: Figures) -> None:
    assert found.attainment == pytest.approx(3 / 6)
    assert found.satisfaction == pytest.approx((2 * (1 - 1 / 36) + (1 - 9 / 36)) / 6)


def test_fairness_is_over_the_satisfaction_of_each_tenant(found: Figures) -> None:
    assert {name: each.num_tokens for name, each in found.tenants.items()} == {
        "acme": 5,
        "bolt": 3,
        "coil": 0,
    }
    acme, bolt = (1 - 1 / 36 + 1 - 9 / 36) / 2, (1 - 1 / 36) / 3
    assert found.fairness == pytest.approx((acme + bolt) ** 2 / (3 * (acme**2 + bolt**2)))
    assert found.tenants["acme"].first_token_seconds.p99 == 3.0
    assert found.tenants["coil"].first_token_seconds.p99 is None


def test_others_that_a_flood_got_refused_have_waited_for_ever() -> None:
    answered = [outcome("t001", 0.0, 1.0 + number / 100) for number in range(98)]
    flooding = [outcome("t000", 0.0, status=429, error="429")] * 50
    refused = [outcome("t002", 0.0, status=429, error="429")]
    assert others_wait(answered + flooding) == pytest.approx(1.97)
    assert others_wait(answered + flooding + refused) == math.inf
    assert others_wait([*answered, *answered, *refused]) == pytest.approx(1.97)


def test_several_tokens_in_one_event_are_several_tokens() -> None:
    found = summarize([outcome("acme", 0.0, 1.0, 3.0, num_tokens=9)])
    assert found.tokens_per_second == pytest.approx(9 / 3)
    assert found.time_per_token_seconds.p50 == pytest.approx(2 / 8)


def test_jain_index_is_one_for_equal_shares_and_one_nth_for_a_single_one(seed: int) -> None:
    generator = random.Random(seed)
    share, count = generator.uniform(1, 1000), generator.randint(2, 50)
    assert jain_index([share] * count) == pytest.approx(1)
    assert jain_index([share] + [0.0] * (count - 1)) == pytest.approx(1 / count)
    shares = [generator.uniform(0, 100) for _ in range(count)]
    assert 1 / count <= jain_index(shares) <= 1
    assert jain_index([7 * each for each in shares]) == pytest.approx(jain_index(shares))
    assert jain_index([0, 0]) == 1


def test_satisfaction_falls_from_one_to_nothing_at_six_seconds() -> None:
    assert [satisfaction(wait) for wait in (0.0, 3.0, 6.0, 60.0)] == [1.0, 0.75, 0.0, 0.0]


def test_a_report_has_every_tenant_and_every_error(found: Figures) -> None:
    text = report("a run", found)
    assert "| answered, refused with 429, failed | 3, 1, 2 |" in text
    assert "| acme | 2 | 2 | 5 | 1 | 3 |" in text
    assert "| coil | 1 | 0 | 0 | - | - |" in text
    assert "| 1 | the answer breaks off |" in text


def test_nothing_was_answered_is_a_report_too() -> None:
    found = summarize([outcome("acme", 1.0, status=None, error="the connection failed")])
    assert (found.tokens_per_second, found.attainment, found.fairness) == (0.0, 0.0, 1.0)
    assert "the connection failed" in report("a run", found)


def test_figures_have_three_digits() -> None:
    shown = [figure(each) for each in (12345.6, 1234.5, 12.345, 1.0, 0.0012345, 0.0, None)]
    assert shown == ["12346", "1234", "12.3", "1", "0.00123", "0", "-"]


def test_a_cell_cannot_break_its_table() -> None:
    assert table(("a",), [("x | y",)]).splitlines()[-1] == "| x \\| y |"


def test_ratios_are_of_rounds_that_both_have() -> None:
    comparison = Comparison()
    case = CASES[0]
    ours, *_, vllm, llama, _ = (contender.server for contender in case.contenders)
    comparison.values[case.name, ours] = {1: 200.0, 2: 300.0, 3: 400.0}
    comparison.values[case.name, vllm] = {1: 50.0, 3: 80.0}
    comparison.leave_out(llama, RuntimeError("no network"))
    assert comparison.ratios(case, vllm) == [4.0, 5.0]
    text = comparison.markdown()
    assert f"| {ours} | 300 (200 to 400) tokens/s |  |  |" in text
    assert f"| {vllm} | 65 (50 to 80) tokens/s | 4.5 (4 to 5) | >= 7 |" in text
    assert f"| {llama} | not measured |  | >= 6 |" in text
    assert f"left out: {llama}: no network" in text
