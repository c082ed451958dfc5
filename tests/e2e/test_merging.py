"""--merge auto in a real server: traffic merges an adapter and un-merges it, tokens stay."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from sharelora_serve.engine.merge_policy import MERGE_SECONDS
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.test_completions import PROMPT, complete

PATIENCE_SECONDS = 120.0


@pytest.fixture
def merging_server(
    tmp_path: Path, model_folder: Path, adapters_folder: Path
) -> Iterator[ServerProcess]:
    arguments = ("--model", str(model_folder), "--adapters", str(adapters_folder))
    settings = ("--merge", "auto", "--dtype", "float32", "--threads", "1")
    with running_server(tmp_path / "log", *arguments, *settings) as process:
        yield process


def merged(server: ServerProcess) -> list[str]:
    """Who is merged, as /metrics has it."""
    name = "sharelora_merged_adapter{adapter="
    return [key.removeprefix(name)[:-1] for key in server.metrics() if key.startswith(name)]


@pytest.mark.slow  # the windows are those of a real server
def test_traffic_to_one_adapter_merges_it_and_traffic_to_others_unmerges_it(
    merging_server: ServerProcess,
) -> None:
    server = merging_server
    with server.openai() as client:

        def answer(model: str) -> str:
            return complete(client, PROMPT, model=model).choices[0].text

        expected = {name: answer(name) for name in (BASE, *NAMES)}
        assert len(set(expected.values())) == len(expected)
        begun_at = time.monotonic()
        while merged(server) != ["acme"]:
            assert answer("acme") == expected["acme"]
            assert time.monotonic() < begun_at + PATIENCE_SECONDS, server.log
        assert time.monotonic() > begun_at + MERGE_SECONDS / 2
        assert answer(BASE) == expected[BASE]
        assert answer("acme") == expected["acme"]
        ask_all_together(client, expected)
        for _ in range(200):  # the others outweigh it
            for name in (BASE, "bolt", "cargo"):
                assert answer(name) == expected[name]
            if not merged(server):
                break
        ask_all_together(client, expected)
        figures = server.wait_until_idle()
    assert merged(server) == []
    assert figures["sharelora_merges_total"] == figures["sharelora_unmerges_total"] == 1
    assert figures["sharelora_requests_total{outcome=error}"] == 0
    assert "merged adapter acme (version " in server.log
    assert "un-merged adapter acme (version " in server.log


def ask_all_together(client: OpenAI, expected: dict[str, str]) -> None:
    """Requests to everybody in one batch."""
    names = [*expected] * 3
    with ThreadPoolExecutor(len(names)) as threads:
        answers = threads.map(
            lambda name: complete(client, PROMPT, model=name).choices[0].text, names
        )
        for name, text in zip(names, answers, strict=True):
            assert text == expected[name], name


def test_an_adapter_merged_at_the_start_is_told_and_stays_merged(
    tmp_path: Path, model_folder: Path, adapters_folder: Path
) -> None:
    arguments = ("--model", str(model_folder), "--adapters", str(adapters_folder))
    with (
        running_server(tmp_path / "log", *arguments, "--merge", "bolt", "--threads", "1") as server,
        server.openai() as client,
    ):
        for name in (BASE, *NAMES):
            complete(client, PROMPT, model=name)
        assert merged(server) == ["bolt"]
        assert server.metrics()["sharelora_merges_total"] == 0
