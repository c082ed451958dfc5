"""The signal to stop: traffic is sent elsewhere, and whoever is being answered is told the end."""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.test_completions import PROMPT

AT_ONCE_SECONDS = 20.0
"""Python and torch take seconds to unload on a busy machine; the drains below take 120."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def stop_signal(request: pytest.FixtureRequest) -> signal.Signals:
    return signal.Signals(request.param)


@contextmanager
def server_with(model_folder: Path, tmp_path: Path, *arguments: str) -> Iterator[ServerProcess]:
    fixed = ("--model", str(model_folder), "--threads", "1")
    with running_server(tmp_path / "log", *fixed, *arguments) as server:
        yield server


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


def wait_until_draining(server: ServerProcess) -> httpx.Response:
    """The first answer of /ready that sends traffic elsewhere."""
    deadline = time.monotonic() + 10
    while (answer := httpx.get(f"{server.url}/ready")).status_code == 200:
        assert time.monotonic() < deadline, "the signal changed nothing"
        time.sleep(0.01)
    return answer


def test_open_requests_end_and_new_ones_are_sent_elsewhere(
    model_folder: Path, tmp_path: Path, stop_signal: signal.Signals
) -> None:
    with (
        server_with(model_folder, tmp_path, "--drain-seconds", "120") as server,
        server.openai() as client,
        server.http() as kept,
        ThreadPoolExecutor() as pool,
    ):
        assert kept.get("/ready").headers.get("connection") is None
        whole = pool.submit(client.completions.create, **fields(8))
        stream = client.completions.create(**fields(8), stream=True)
        next(stream)
        wait_until_running(server, 16)
        server.send(stop_signal)
        answer = wait_until_draining(server)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert httpx.get(f"{server.url}/health").status_code == 200
        for streams in False, True:
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(**fields(1), stream=streams)
            assert (refused.value.status_code, refused.value.code) == (503, "draining")
            assert int(refused.value.response.headers["retry-after"]) >= 1
        for _ in range(3):
            large = httpx.post(f"{server.url}/v1/completions", content=b"x" * 4_000_000)
            assert large.json()["error"]["code"] == "draining"
        assert kept.get("/v1/models").headers["connection"] == "close"
        assert server.metrics()["sharelora_requests_running"] == 16
        ends = {chunk.choices[0].finish_reason for chunk in stream if chunk.choices}
        assert ends == {None, "length"}
        assert {choice.finish_reason for choice in whole.result().choices} == {"length"}
        ended_at = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - ended_at < AT_ONCE_SECONDS, "it waited though nothing was open"
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    assert "Traceback" not in server.log
    assert server.log.endswith("Stopped.\n")


@pytest.mark.parametrize("seconds", ["0.2", "0"])
def test_requests_that_take_too_long_fail_and_say_so(
    model_folder: Path, tmp_path: Path, seconds: str
) -> None:
    with (
        server_with(model_folder, tmp_path, "--drain-seconds", seconds) as server,
        server.openai() as client,
        ThreadPoolExecutor() as pool,
    ):
        whole = pool.submit(client.completions.create, **fields(24))
        stream = client.completions.create(**fields(24), stream=True)
        next(stream)
        wait_until_running(server, 48)
        server.send(signal.SIGTERM)
        with pytest.raises(openai.APIError) as streamed:
            list(stream)
        with pytest.raises(openai.InternalServerError) as answered:
            whole.result()
        assert server.wait() == 0
    assert "Traceback" not in server.log
    assert answered.value.status_code == 503
    assert answered.value.code == streamed.value.code == "engine_stopped"


def test_an_idle_server_is_not_ready_for_the_delay_and_then_ends(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments = ("--drain-seconds", "120", "--drain-delay-seconds", "2")
    with server_with(model_folder, tmp_path, *arguments) as server:
        server.send(signal.SIGTERM)
        signalled_at = time.monotonic()
        wait_until_draining(server)
        while time.monotonic() < signalled_at + 1.5:
            assert httpx.get(f"{server.url}/ready").json()["error"]["code"] == "draining"
            assert httpx.get(f"{server.url}/health").status_code == 200
            time.sleep(0.1)
        assert server.wait() == 0
        assert time.monotonic() - signalled_at < AT_ONCE_SECONDS


def test_a_second_signal_ends_the_server_at_once(model_folder: Path, tmp_path: Path) -> None:
    with (
        server_with(model_folder, tmp_path, "--drain-seconds", "120") as server,
        server.openai() as client,
    ):
        stream = client.completions.create(**fields(48), stream=True)
        next(stream)
        server.send(signal.SIGTERM)
        wait_until_draining(server)
        time.sleep(0.5)
        server.send(signal.SIGINT)
        signalled_at = time.monotonic()
        assert server.wait() == 128 + signal.SIGINT
        assert time.monotonic() - signalled_at < AT_ONCE_SECONDS
        with pytest.raises(openai.APIConnectionError):
            list(stream)


def test_an_echo_of_the_first_signal_is_not_a_second_one(
    model_folder: Path, tmp_path: Path
) -> None:
    with (
        server_with(model_folder, tmp_path, "--drain-seconds", "120") as server,
        server.openai() as client,
    ):
        stream = client.completions.create(**fields(8), stream=True)
        next(stream)
        for _ in range(3):
            server.send(signal.SIGTERM)
        ends = {chunk.choices[0].finish_reason for chunk in stream if chunk.choices}
        assert ends == {None, "length"}
        assert server.wait() == 0


def test_a_client_that_sends_no_more_does_not_keep_the_server(
    model_folder: Path, tmp_path: Path
) -> None:
    with server_with(model_folder, tmp_path, "--drain-seconds", "0.5") as server:
        url = httpx.URL(server.url)
        assert url.port is not None
        with socket.create_connection((url.host, url.port)) as stalled:
            stalled.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
            )
            httpx.get(f"{server.url}/v1/models")
            server.send(signal.SIGTERM)
            signalled_at = time.monotonic()
            assert server.wait() == 0
            assert 0.4 < time.monotonic() - signalled_at < AT_ONCE_SECONDS
    assert "Traceback" not in server.log
