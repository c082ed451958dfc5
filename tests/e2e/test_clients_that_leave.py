"""A client that goes away frees what its request held."""

from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_completions import PROMPT, answer

# Far more than is computed before the client has gone.
LONG = {"prompt": PROMPT, "max_tokens": 480, "n": 16, "ignore_eos": True}
NUM_ASKED = LONG["max_tokens"] * LONG["n"]


@pytest.mark.parametrize("model", [BASE, "acme"])
def test_a_client_that_leaves_its_stream_ends_its_request(
    model: str, server: ServerProcess, client: OpenAI
) -> None:
    alone = answer(client)
    before = server.wait_until_idle()
    with server.http() as http:
        body = {**LONG, "model": model, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            while '"text"' not in next(lines):
                pass
            assert server.metrics()["sharelora_requests_running"] == LONG["n"]
    _assert_it_was_aborted(before, server, model)
    assert answer(client) == alone


@pytest.mark.parametrize("model", [BASE, "acme"])
def test_a_client_that_does_not_wait_for_its_answer_ends_its_request(
    model: str, server: ServerProcess
) -> None:
    before = server.wait_until_idle()
    with server.http(timeout=0.4) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={**LONG, "model": model})
    _assert_it_was_aborted(before, server, model)


def _assert_it_was_aborted(before: dict[str, float], server: ServerProcess, model: str) -> None:
    figure = "sharelora_requests_total{outcome=abort}"
    server.wait_for(lambda figures: figures[figure] == before[figure] + 1)
    after = server.wait_until_idle()
    tokens = f"sharelora_adapter_completion_tokens_total{{adapter={model}}}"
    assert after[tokens] - before[tokens] < NUM_ASKED / 2
    assert (
        after["sharelora_requests_total{outcome=error}"]
        == (before["sharelora_requests_total{outcome=error}"])
    )


def test_a_client_that_leaves_while_it_sends_its_request_harms_nobody(
    server: ServerProcess, client: OpenAI
) -> None:
    alone = answer(client)

    def half() -> Iterator[bytes]:
        yield b'{"model": "tiny", "prompt": "'
        raise ConnectionError

    with server.http() as http, pytest.raises(ConnectionError):
        http.post("/v1/completions", content=half())
    assert answer(client) == alone
    assert "Traceback" not in server.log
