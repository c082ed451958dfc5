"""Which trainings the comparison of forms consists of."""

import math
import random

from adapters.quality import FORMS, RATES, SEEDS, TASKS, Results, Run, best_rate, next_run


def test_every_form_is_swept_past_its_best_rate_and_repeated_there(seed: int) -> None:
    rng = random.Random(seed)
    task = rng.choice(list(TASKS))
    score = TASKS[task].score
    peaks = {form: rng.choice(RATES) for form in FORMS}
    results: Results = {}
    while (run := next_run(results, task)) is not None:
        assert run not in results
        distance = abs(math.log(run.rate / peaks[run.form]))
        results[run] = {score: 50 - distance + rng.random() * 0.1}
    for form in FORMS:
        assert best_rate(results, task, form) == peaks[form]
        tried = [rate for rate in RATES if Run(task, form, rate, SEEDS[0]) in results]
        at = RATES.index(peaks[form])
        assert set(RATES[max(0, at - 1) : at + 2]) <= set(tried)
        for again in SEEDS[1:]:
            rates = [run.rate for run in results if (run.form, run.seed) == (form, again)]
            assert rates == [peaks[form]]
