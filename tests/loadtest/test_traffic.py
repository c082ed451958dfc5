"""What the measuring commands draw, count and judge; the servers are elsewhere."""

import asyncio
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load, save_file

from loadtest.client import Timeline, percentile
from loadtest.publishing import Example
from loadtest.reloads import Plan
from loadtest.report import Report
from loadtest.tiers import Load
from loadtest.traffic import Question, Traffic, closed_loop, power_law


@pytest.mark.parametrize("exponent", [0.1, 0.3, 1.0])
def test_power_law_gives_the_first_k_of_n_indices_their_share(exponent: float, seed: int) -> None:
    count, num_draws = 100, 20_000
    drawn = list(islice(power_law(count, exponent, random.Random(seed)), num_draws))
    assert 0 <= min(drawn) <= max(drawn) < count
    for first in (1, 10, 50):
        share = sum(index < first for index in drawn) / num_draws
        assert share == pytest.approx((first / count) ** exponent, abs=0.03)


def test_percentile_is_a_value_that_so_many_do_not_exceed(seed: int) -> None:
    values = random.Random(seed).sample(range(1000), 100)
    ordered = sorted(values)
    assert percentile(values, 99) == ordered[98]
    assert percentile(values, 50) == ordered[49]
    assert percentile(values, 100) == ordered[-1]
    assert percentile(values[:1], 99) == values[0]


def test_a_closed_loop_takes_an_item_only_when_a_stream_is_free(seed: int) -> None:
    generator = random.Random(seed)
    num_streams, num_items = generator.randint(1, 6), generator.randint(6, 40)
    num_running = num_taken = num_over = most_running = 0

    def items() -> Iterator[int]:
        nonlocal num_taken
        for item in range(num_items):
            num_taken += 1
            assert num_taken - num_over <= num_streams
            yield item

    async def ask(item: int) -> int:
        nonlocal num_running, num_over, most_running
        num_running += 1
        most_running = max(most_running, num_running)
        for _ in range(generator.randint(1, 5)):
            await asyncio.sleep(0)
        num_running -= 1
        num_over += 1
        return -item

    results = asyncio.run(closed_loop(items(), num_streams, ask))
    assert results == [-item for item in range(num_items)]
    assert most_running == num_streams


def answer(text: str, version: str) -> Timeline:
    return Timeline(sent_at=0.0, tokens_at=[1.0, 1.5], text=text, version=version)


def test_an_answer_is_right_only_if_it_is_that_of_the_version_it_names() -> None:
    question, other = Question("acme", "red"), Question("acme", "dog")
    alone = Traffic([(question, answer("one", "a")), (question, answer("two", "b"))])
    traffic = Traffic(
        [
            (question, answer("one", "a")),
            (question, answer("two", "b")),
            (question, answer("two", "a")),  # the other version's
            (question, answer("one", "c")),  # of a version that was never published
            (question, answer("on", "a")),  # cut off
            (other, answer("one", "a")),  # never asked alone
        ]
    )
    assert traffic.num_wrong(alone.by_version) == 4


def test_traffic_without_an_answer_says_why() -> None:
    with pytest.raises(RuntimeError, match="503"):
        _ = Traffic(failures=["acme: 503: draining"]).gaps


def test_the_rounds_of_a_plan_make_all_of_its_changes(seed: int) -> None:
    generator = random.Random(seed)
    rounds = generator.randint(1, 5)
    publications, roll_backs = generator.randint(10, 120), generator.randint(0, 30)
    plan = Plan(
        rounds=rounds,
        publications=publications,
        roll_backs=roll_backs,
        pause_seconds=0.0,
        quiet_seconds=0.0,
        streams=1,
        prompt_words=1,
        new_tokens=1,
    )
    changes = [back for number in range(rounds) for back in plan.changes(number)]
    assert changes.count(True) == roll_backs
    assert changes.count(False) == publications


def test_a_load_asks_every_adapter_the_same_each_time(seed: int) -> None:
    load_of = Load(
        num_adapters=20,
        exponent=0.5,
        requests=100,
        rounds=2,
        streams=1,
        prompt_words=8,
        new_tokens=1,
        seed=seed,
    )
    drawn = load_of.draw()
    assert len(drawn) == 200
    assert drawn == load_of.draw()
    assert len(set(drawn)) == len({question.model for question in drawn}) <= 20


def test_a_scaled_example_shares_no_factor_with_the_original(tmp_path: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    tensors = {
        f"layers.0.q_proj.lora_{side}.weight": generator.normal(size=(8, 8)).astype(np.float16)
        for side in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    example = Example.read(tmp_path)
    assert example.num_bytes == 2 * 8 * 8 * 2
    scaled = load(example.scaled(1.25, 0.8))
    a, b = sorted(tensors)
    assert not any(np.array_equal(tensors[key], scaled[key]) for key in tensors)
    product = tensors[b].astype(np.float32) @ tensors[a].astype(np.float32)
    found = scaled[b].astype(np.float32) @ scaled[a].astype(np.float32)
    np.testing.assert_allclose(found, product, atol=0.05)
    for key, tensor in load(example.scaled(1, -1)).items():
        np.testing.assert_array_equal(tensor, tensors[key] * (-1 if key == b else 1))


@pytest.mark.parametrize(("num_wrong", "failures"), [(1, []), (0, ["acme: 503"])])
def test_a_wrong_answer_or_a_failed_request_fails_the_command(
    num_wrong: int, failures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("a measure")
    report.check(10, num_wrong, failures)
    with pytest.raises(typer.Exit) as ended:
        report.end()
    assert ended.value.exit_code == 1
    assert all(failure in capsys.readouterr().out for failure in failures)


def test_a_slow_figure_is_told_and_fails_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("a measure")
    report.add("gap", "9 s", "< 1 s", is_met=False)
    report.check(10, 0, [])
    report.end()
    assert "missed" in capsys.readouterr().out
