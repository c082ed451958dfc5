"""The commands for a server whose adapters come, change and go, against one with a tiny base."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loadtest.__main__ import app
from loadtest.adapters import Kind, write_adapters
from tests.e2e.server_process import ServerProcess, running_server
from tests.tiny_models import write_tiny_model

NUM_ADAPTERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    """A tiny base and adapters for it."""
    folder = tmp_path_factory.mktemp("live")
    model = write_tiny_model(folder / "tiny", "smollm", seed)
    write_adapters(folder / "adapters", NUM_ADAPTERS, Kind("A", (4,)), model=str(model))
    # One strong enough that with its sign changed no few tokens stay the same.
    config = folder / "adapters" / "t001" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "lora_alpha": 20 * settings["lora_alpha"]}))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    words = ("--model", folder / "tiny", "--adapters", folder / "adapters", "--dtype", "float32")
    with running_server(folder / "log", *map(str, words), "--threads", "1") as process:
        yield process


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def line(*words: object) -> dict[str, float]:
    """What a command printed as one line of JSON."""
    result = call(*words)
    assert result.exit_code == 0, result.output
    found: dict[str, float] = json.loads(result.output.splitlines()[-1])
    return found


def test_memory_and_pool_are_lines_of_json(server: ServerProcess) -> None:
    amount = ("--num-adapters", NUM_ADAPTERS, "--requests", 20)
    memory = line("memory", server.pid, "--url", server.url, *amount)
    assert all(value >= 0 for value in memory.values())
    pool = line("pool", "--url", server.url)
    assert pool


def test_gaps_fail_with_one_message_where_nobody_answers() -> None:
    result = call("gaps", "--url", "http://127.0.0.1:1", "--streams", 1)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)


def test_uploads_and_reloads_answer_and_leave_nothing_behind(
    server: ServerProcess, folder: Path
) -> None:
    about = ("--url", server.url, "--adapter", folder / "adapters" / "t001")
    result = call("uploads", *about, "--rounds", 3, "--prompt-words", 4)
    assert result.exit_code == 0, result.output
    amount = ("--rounds", 1, "--publications", 4, "--roll-backs", 1, "--quiet-seconds", 1)
    lengths = ("--streams", 2, "--prompt-words", 4, "--new-tokens", 4)
    result = call("reloads", *about, *amount, *lengths)
    assert result.exit_code == 0, result.output
    assert "wrong answers" in result.output
    with server.openai() as client:
        names = {model.id for model in client.models.list()}
    assert names == {"tiny", *(f"t{index:03d}" for index in range(NUM_ADAPTERS))}


def test_tiers_compares_every_answer_and_fails_for_adapters_that_are_not_there(
    server: ServerProcess,
) -> None:
    about = ("tiers", "--url", server.url, "--rounds", 1, "--streams", 2, "--new-tokens", 3)
    result = call(*about, "--num-adapters", NUM_ADAPTERS, "--requests", 10)
    assert result.exit_code == 0, result.output
    assert "wrong answers" in result.output
    missing = call(*about, "--num-adapters", 2000, "--requests", 1, "--exponent", 1, "--seed", 3)
    assert missing.exit_code == 1
    assert missing.exception is None or isinstance(missing.exception, SystemExit)


def test_training_is_compared_on_the_same_rows(folder: Path, tmp_path: Path, seed: int) -> None:
    drawn = random.Random(seed)
    rows = [{"prompt": f"{drawn.random()}", "completion": f"{drawn.random()}"} for _ in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = ("training", data, "--model", folder / "tiny", "--rank", 2, "--batch-size", 3)
    result = call(*about, "--steps", 1, "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert result.output.count("(1.00 to 1.00)") >= 1
    refused = call(*about, "--user", "{prompt}")
    assert refused.exit_code == 1
    assert "go together" in refused.output
