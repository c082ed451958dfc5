"""SIGTERM: whoever is being answered is told how it ends."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE
from tests.e2e.server_process import COMMAND, ServerProcess, running_server
from tests.e2e.test_completions import PROMPT

# The server's own command with less patience.
IMPATIENT = (
    COMMAND[0],
    "-c",
    "import sys, sharelora_serve.cli as cli;"
    "sys.modules['sharelora_serve.cli.serve'].GRACE_SECONDS = 0.2;"
    "cli.main()",
    *COMMAND[3:],
)


def fields(num_answers: int) -> dict[str, object]:
    body = {"ignore_eos": True}
    return {
        "model": BASE,
        "prompt": PROMPT,
        "max_tokens": 400,
        "n": num_answers,
        "extra_body": body,
    }


def wait_until_running(server: ServerProcess, num_answers: int) -> None:
    server.wait_for(lambda figures: figures["sharelora_requests_running"] == num_answers)


def test_running_requests_are_answered_and_new_ones_refused(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(model_folder), "--threads", "1")
    with (
        running_server(tmp_path / "log", *arguments) as server,
        server.openai() as client,
        ThreadPoolExecutor() as pool,
    ):
        whole = pool.submit(client.completions.create, **fields(1))
        stream = client.completions.create(**fields(1), stream=True)
        next(stream)
        wait_until_running(server, 2)
        server.terminate()
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert whole.result().choices[0].finish_reason == "length"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert server.wait() == 0
    assert "Traceback" not in server.log
    assert server.log.endswith("Stopped.\n")


def test_requests_that_take_too_long_fail_and_say_so(model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model_folder), "--threads", "1")
    with (
        running_server(tmp_path / "log", *arguments, command=IMPATIENT) as server,
        server.openai() as client,
        ThreadPoolExecutor() as pool,
    ):
        whole = pool.submit(client.completions.create, **fields(24))
        stream = client.completions.create(**fields(24), stream=True)
        next(stream)
        wait_until_running(server, 48)
        server.terminate()
        with pytest.raises(openai.APIError) as streamed:
            list(stream)
        with pytest.raises(openai.InternalServerError) as answered:
            whole.result()
        assert server.wait() == 0
    assert "Traceback" not in server.log
    assert answered.value.status_code == 503
    assert answered.value.code == streamed.value.code == "engine_stopped"
