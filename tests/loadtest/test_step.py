"""The parts of a step, timed one by one: they compute what the server does."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.step import ADAPTERS, PARTS, PYTHON, measure_steps
from loadtest.timed_kernels import PRODUCTS, TimedKernels
from sharelora_serve.engine.sampler import Sampler
from tests.golden.bases import Base, open_base
from tests.golden.serving import running_engine, serve_together


@pytest.fixture(scope="module")
def base(seed: int) -> Iterator[Base]:
    with open_base("qwen3", seed) as opened:
        yield opened


@pytest.mark.parametrize("is_split", [False, True])
def test_timed_kernels_give_the_right_tokens(base: Base, is_split: bool) -> None:
    kernels = TimedKernels()
    kernels.is_split = kernels.is_reading = is_split
    with running_engine(base.config(), kernels) as loaded:
        answers = serve_together(loaded, base.cases)
    for case, served in zip(base.cases, answers, strict=True):
        base.assert_right(case, served)
    assert kernels.num_steps > 0
    assert (ADAPTERS in kernels.milliseconds()) is is_split
    assert len(kernels.reads) == (kernels.num_steps if is_split else 0)
    assert all(seconds > 0 for seconds in kernels.reads)


def test_every_load_is_measured_on_the_base_and_on_adapters(base: Base) -> None:
    times = measure_steps(
        base.adapters_folder,
        streams=[1, 3],
        threads=2,
        adapter_memory="64MiB",
        num_tokens=40,  # half are measured; with adapters or without, in turn
        rounds=2,
        model=str(base.folder),
    )
    loads = [(step.streams, step.num_adapters) for step in times.steps]
    assert loads == [(1, 0), (1, 1), (3, 0), (3, 3)]
    for step in times.steps:
        assert set(step.parts) == set(PARTS)
        assert step.total > 0
        assert step.parts[PRODUCTS] > 0
        assert (step.parts[ADAPTERS] > 0) is (step.num_adapters > 0)
        assert step.parts[PYTHON] >= 0
        assert 0 < step.product_share <= 1
    assert times.read_weights > 0
    written = json.loads(json.dumps(times.as_dict()))
    assert [step["streams"] for step in written["steps"]] == [1, 1, 3, 3]
    assert times.as_markdown().count("\n| 3 |") == 2


def test_too_few_adapters_are_told(base: Base, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(RuntimeError, match="2 streams need 2 adapters; there are 0"):
        measure_steps(
            tmp_path / "none",
            streams=[2],
            threads=1,
            adapter_memory="64MiB",
            num_tokens=4,
            rounds=1,
            model=str(base.folder),
        )


def test_a_stream_that_breaks_off_is_told(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError("no numbers today")

    monkeypatch.setattr(Sampler, "sample", fail)
    with pytest.raises(RuntimeError, match="2 of 2 streams broke off, such as the base: the"):
        measure_steps(
            None,
            streams=[2],
            threads=1,
            adapter_memory="64MiB",
            num_tokens=8,
            rounds=1,
            model=str(base.folder),
        )


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["step", "--adapters", str(tmp_path / "missing")])
    assert result.exit_code == 1
    assert "missing" in result.stderr
