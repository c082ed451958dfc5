"""A server with room for little: one running request, two that wait, one adapter at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.test_completions import PROMPT

LONG = {"prompt": PROMPT, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
SHORT = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}


@pytest.fixture(scope="module")
def small_server(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, adapters_folder: Path
) -> Iterator[ServerProcess]:
    settings = {
        "--model": str(model_folder),
        "--adapters": str(adapters_folder),
        "--adapter-memory": "160KiB",
        "--dtype": "float32",
        "--max-queue": "2",
        "--max-running": "1",
        "--threads": "1",
    }
    log = tmp_path_factory.mktemp("small") / "log"
    with running_server(log, *(word for pair in settings.items() for word in pair)) as process:
        yield process


@pytest.fixture
def small(small_server: ServerProcess) -> Iterator[openai.OpenAI]:
    small_server.wait_until_idle()
    with small_server.openai() as client:
        yield client


def test_a_full_queue_asks_the_next_client_to_come_again_and_serves_those_that_wait(
    small: openai.OpenAI, small_server: ServerProcess
) -> None:
    alone = small.completions.create(model="acme", **SHORT)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(small.completions.create, model=BASE, **LONG)
        small_server.wait_for(lambda figures: figures["sharelora_requests_running"] == 1)
        waiting = pool.submit(small.completions.create, model="acme", n=2, **SHORT)
        small_server.wait_for(lambda figures: figures["sharelora_requests_waiting"] == 2)
        for streams in False, True:
            with pytest.raises(openai.RateLimitError) as caught:
                small.completions.create(model=BASE, **SHORT, stream=streams)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "queue_full"
            assert caught.value.type == "rate_limit_error"
        assert running.result().choices[0].finish_reason == "length"
        assert [c.text for c in waiting.result().choices] == [alone.choices[0].text] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"prompt": ["a", "b"], "n": 2}, "n"),
        ({"prompt": ["a", "b", "c"]}, "prompt"),
        ({"prompt": ["a"] * 1000, "n": 128}, "prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_more_answers_than_may_wait_are_refused_before_any_is_begun(
    fields: dict[str, object], param: str, small: openai.OpenAI, small_server: ServerProcess
) -> None:
    before = small_server.metrics()
    with pytest.raises(openai.BadRequestError) as caught:
        small.completions.create(**{"model": BASE, **SHORT, **fields})
    assert caught.value.param == param
    assert "at most 2 answers (--max-queue)" in caught.value.message
    steps = "sharelora_steps_total"
    assert small_server.metrics()[steps] == before[steps]


def test_a_client_that_leaves_frees_its_adapters_place(
    small: openai.OpenAI, small_server: ServerProcess
) -> None:
    with small.completions.create(model="acme", **LONG, stream=True) as stream:
        next(iter(stream))
        figures = small_server.metrics()
        assert figures["sharelora_adapters_resident{tier=device}"] == 1
    small_server.wait_until_idle()
    answers = {name: small.completions.create(model=name, **SHORT) for name in NAMES}
    assert len({answer.choices[0].text for answer in answers.values()}) == len(NAMES)
    after = small_server.metrics()
    evictions = "sharelora_adapter_evictions_total{tier=device}"
    assert after[evictions] >= figures[evictions] + 2
