"""Workloads follow their distributions, and a file replays them exactly."""

import math
import random
import statistics
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest

from loadtest.questions import QUESTIONS
from loadtest.workload import Workload
from loadtest.workloads import KINDS, Settings, draw, gamma_arrivals, popularity


@pytest.fixture
def settings(seed: int) -> Settings:
    return Settings(
        base="base",
        num_requests=200,
        num_adapters=16,
        rate=5.0,
        cv=2.0,
        exponent=0.5,
        prompt_words=(8, 24),
        new_tokens=(4, 40),
        seed=seed,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_workload_is_drawn_again_and_replayed_exactly(
    kind: str, settings: Settings, tmp_path: Path
) -> None:
    workload = draw(kind, settings)
    assert workload == draw(kind, settings)
    assert workload != draw(kind, replace(settings, seed=settings.seed + 1))
    workload.save(tmp_path / "folder" / "workload.jsonl")
    assert Workload.load(tmp_path / "folder" / "workload.jsonl") == workload


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_are_in_order_and_lengths_in_their_ranges(kind: str, settings: Settings) -> None:
    requests = draw(kind, settings).requests
    arrivals = [request.arrival_seconds or 0.0 for request in requests]
    assert all(earlier <= later for earlier, later in pairwise([0.0, *arrivals]))
    if kind == "questions":  # which are what they are, each asked as often as the others
        assert [request.prompt for request in requests[:32]] == [*QUESTIONS, *QUESTIONS]
    else:
        assert {len(request.prompt.split()) for request in requests} <= set(range(8, 25))
    assert {request.new_tokens for request in requests} <= set(range(4, 41))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_variation_of_the_gamma_distribution(
    cv: float, seed: int
) -> None:
    count, rate = 40_000, 4.0
    arrivals = list(islice(gamma_arrivals(rate, cv, random.Random(seed)), count))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *arrivals])]
    mean = statistics.fmean(gaps)
    # Six standard errors: of the mean cv / sqrt(n), of the variance from the fourth moment,
    # whose excess is 6 cv^2.
    assert mean * rate == pytest.approx(1, abs=6 * cv / math.sqrt(count))
    error = math.sqrt((2 + 6 * cv**2) / count)
    assert statistics.pvariance(gaps, mean) * (rate / cv) ** 2 == pytest.approx(1, abs=6 * error)


def test_lengths_are_uniform(settings: Settings) -> None:
    count = 20_000
    requests = draw("slora", replace(settings, num_requests=count)).requests
    found = Counter(request.new_tokens for request in requests)
    expected = count / 37
    assert len(found) == 37
    for times in found.values():
        assert times == pytest.approx(expected, abs=6 * math.sqrt(expected))


@pytest.mark.parametrize("num_requests", [1, 2, 7, 64, 500])
def test_popularity_counts_every_request_once(num_requests: int) -> None:
    for kind in ("identical", "distinct", "uniform", "zipf"):
        counts = popularity(kind, num_requests, num_adapters=1000)
        assert sum(counts) == num_requests
        assert min(counts) > 0
        assert counts == sorted(counts, reverse=True)


def test_popularity_is_punicas() -> None:
    assert popularity("identical", 64, 1000) == [64]
    assert popularity("distinct", 64, 1000) == [1] * 64
    assert popularity("distinct", 5, 3) == [2, 2, 1]
    assert popularity("uniform", 64, 1000) == [8] * 8
    assert popularity("uniform", 60, 1000) == [8] * 4 + [7] * 4
    # 1, 1.5, 2.25, 3.375, ... rounded down, and what is left.
    assert sorted(popularity("zipf", 64, 1000)) == [1, 1, 2, 3, 5, 7, 11, 17, 17]
    assert popularity("zipf", 64, 3) == [62, 1, 1]


def test_neighbours_in_a_distinct_workload_share_no_adapter(settings: Settings) -> None:
    models = [request.model for request in draw("distinct", settings).requests]
    for start in range(len(models) - 15):
        assert len(set(models[start : start + 16])) == 16


def test_a_flood_leaves_the_other_tenants_requests_as_they_are(settings: Settings) -> None:
    calm = draw("burst", replace(settings, num_requests=2000, cv=1.0, flood=1.0))
    flood = draw("burst", replace(settings, num_requests=2000, cv=1.0, flood=10.0))
    own = {"calm": 0, "flood": 0}
    others = {}
    for name, workload in (("calm", calm), ("flood", flood)):
        own[name] = sum(request.tenant == "t000" for request in workload.requests)
        others[name] = [request for request in workload.requests if request.tenant != "t000"]
    assert others["calm"] == others["flood"]
    share = 2000 / settings.num_adapters
    assert own["calm"] == pytest.approx(share, abs=6 * math.sqrt(share))
    assert own["flood"] == pytest.approx(10 * share, abs=6 * math.sqrt(10 * share))
    assert len(others["calm"]) == pytest.approx(15 * share, abs=6 * math.sqrt(15 * share))


def test_without_a_rate_nothing_has_an_arrival(settings: Settings) -> None:
    closed = replace(settings, rate=None)
    assert not draw("slora", closed).has_arrivals
    assert draw("slora", settings).has_arrivals
    with pytest.raises(RuntimeError, match="needs a rate"):
        draw("burst", closed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_adapters": 0}, "give --num-adapters"),
        ({"prompt_words": (8, 4)}, "prompt words: 8 to 4"),
        ({"new_tokens": (0, 4)}, "new tokens: 0 to 4"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    changes: dict[str, int], message: str, settings: Settings
) -> None:
    with pytest.raises(RuntimeError, match=message):
        draw("slora", replace(settings, **changes))


@pytest.mark.parametrize("kind", ["base", "questions"])
def test_the_base_is_asked_where_there_are_no_adapters(kind: str, settings: Settings) -> None:
    requests = draw(kind, replace(settings, num_adapters=0)).requests
    assert {request.model for request in requests} == {settings.base}


LINE = '{"arrival_seconds": null, "model": "a", "prompt": "b", "new_tokens": 1, "tenant": "c"}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        '{"name": "slora"}',
        '{"workload": "slora"}\n{"model": "a"}',
        '{"workload": "slora"}\n' + LINE.replace("1", '"1"'),
        '{"workload": "slora"}\n' + LINE.replace("1", "true"),
        '{"workload": "slora"}\n' + LINE[:-4],
    ],
)
def test_a_file_that_is_no_workload_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "workload.jsonl"
    path.write_text(text)
    with pytest.raises(RuntimeError, match=r"workload\.jsonl"):
        Workload.load(path)
    path.write_text('{"workload": "slora"}\n' + LINE)
    assert len(Workload.load(path).requests) == 1
