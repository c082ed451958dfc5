"""Which trainings the comparison of forms consists of."""

import math
import random

import pytest
import torch

from adapters.quality import (
    FORMS,
    MARGIN,
    RATES,
    SEEDS,
    TASKS,
    Results,
    Run,
    best_rate,
    next_run,
)
from adapters.singular_values import effective_rank, singular_values
from sharelora_serve.adapters.adapter import FactorPair


def test_every_form_is_swept_past_its_best_rate_and_repeated_there(seed: int) -> None:
    rng = random.Random(seed)
    task = rng.choice(list(TASKS))
    score = TASKS[task].score
    peaks = {form: rng.choice(RATES) for form in FORMS}
    results: Results = {}
    while (run := next_run(results, task)) is not None:
        assert run not in results
        distance = abs(math.log(run.rate / peaks[run.form]))
        results[run] = {score: 50 - 10 * distance + rng.random() * 0.1}
    for form in FORMS:
        assert best_rate(results, task, form) == peaks[form]
        tried = [rate for rate in RATES if Run(task, form, rate, SEEDS[0]) in results]
        at = RATES.index(peaks[form])
        assert set(RATES[max(0, at - 1) : at + 2]) <= set(tried)
        for again in SEEDS[1:]:
            rates = [run.rate for run in results if (run.form, run.seed) == (form, again)]
            assert rates == [peaks[form]]


def test_rates_that_one_seed_does_not_tell_apart_are_decided_by_all(seed: int) -> None:
    rng = random.Random(seed)
    task = rng.choice(list(TASKS))
    score = TASKS[task].score
    lucky, better, worse = rng.sample((1e-3, 3e-3, 1e-2), 3)
    results: Results = {}
    while (run := next_run(results, task)) is not None:
        of_rate = {lucky: 50 + MARGIN / 2, better: 50.0, worse: 50.0}
        if run.seed != SEEDS[0]:
            of_rate = {lucky: 50 - MARGIN, better: 50.0, worse: 50 - 4 * MARGIN}
        results[run] = {score: of_rate.get(run.rate, 10.0)}
    for form in FORMS:
        assert best_rate(results, task, form) == better
        for rate, seeds in ((lucky, SEEDS), (better, SEEDS), (worse, SEEDS[:2])):
            runs = [run for run in results if (run.form, run.rate) == (form, rate)]
            assert [run.seed for run in runs] == list(seeds)


def test_singular_values_are_those_of_the_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(5, 40, generator=generator), torch.randn(30, 5, generator=generator)
    found = singular_values(FactorPair(a.half(), b.half(), 1.5))
    expected = torch.linalg.svdvals(1.5 * b.half().float() @ a.half().float())
    assert found == pytest.approx(expected[:5].tolist(), rel=1e-4)
    assert effective_rank([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert effective_rank([2.0, 0.0, 0.0]) == pytest.approx(1)
