"""A server with API keys, which come, go and break while it runs."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from sharelora_serve.server.keys import create_key, revoke_key
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, run_to_its_end, running_server
from tests.e2e.test_completions import PROMPT, complete

NOTICED_SECONDS = 2.0
"""A change of the file is followed within this, as the docs say."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    create_key(file, None, None)
    return file


@pytest.fixture(scope="module")
def tenant_key(file: Path) -> str:
    return create_key(file, "acme", None)[1]


@pytest.fixture(scope="module")
def admin_key(file: Path) -> str:
    return create_key(file, None, None)[1]


@pytest.fixture(scope="module")
def locked(
    file: Path,
    tenant_key: str,
    admin_key: str,
    model_folder: Path,
    adapters_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """The server, whose keys were there before it."""
    assert tenant_key != admin_key
    log = tmp_path_factory.mktemp("locked") / "log"
    settings = {
        "--model": str(model_folder),
        "--adapters": str(adapters_folder),
        "--dtype": "float32",
        "--threads": "1",
        "--api-keys": str(file),
        "--log-level": "debug",
    }
    with running_server(log, *(word for pair in settings.items() for word in pair)) as process:
        yield process
        for key in (tenant_key, admin_key):
            assert key not in process.log
        assert "slk_" not in process.log
        assert "Traceback" not in process.log


def is_let_in(server: ServerProcess, key: str) -> bool:
    status = httpx.get(
        f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}
    ).status_code
    assert status in (200, 401)
    return status == 200


def wait_until(server: ServerProcess, key: str, *, is_valid: bool) -> None:
    deadline = time.monotonic() + NOTICED_SECONDS
    while is_let_in(server, key) != is_valid:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_official_client_is_served_with_its_key(locked: ServerProcess, tenant_key: str) -> None:
    with locked.openai(tenant_key) as client:
        assert [model.id for model in client.models.list()] == [BASE, *NAMES]
        completion = complete(client, PROMPT, model=NAMES[0])
        stream = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=5, stream=True)
        assert len(list(stream)) > 1
    assert completion.usage is not None
    assert completion.usage.completion_tokens > 0


@pytest.mark.parametrize("key", ["none", "slk_0123456789ab_" + "a" * 43])
def test_the_official_client_is_told_that_its_key_is_wrong(locked: ServerProcess, key: str) -> None:
    with locked.openai(key) as client, pytest.raises(openai.AuthenticationError) as caught:
        complete(client, PROMPT)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert caught.value.response.headers["x-request-id"]
    assert key not in caught.value.response.text


def test_figures_are_for_admins(locked: ServerProcess, tenant_key: str, admin_key: str) -> None:
    with locked.http() as http:
        for key, status in ((tenant_key, 403), (admin_key, 200)):
            headers = {"authorization": f"Bearer {key}"}
            assert http.get("/metrics", headers=headers).status_code == status
        assert http.get("/metrics").status_code == 401


def test_an_orchestrator_needs_no_key(locked: ServerProcess) -> None:
    with locked.http() as http:
        for route in ("/health", "/ready"):
            assert http.get(route).status_code == 200


def test_a_long_body_without_a_key_is_answered_and_not_kept(locked: ServerProcess) -> None:
    with locked.http() as http:
        answer = http.post("/v1/completions", content=b" " * 20_000_000)
        assert answer.status_code == 401
        assert http.get("/health").status_code == 200


def test_a_body_that_never_comes_is_not_waited_for(locked: ServerProcess) -> None:
    address = httpx.URL(locked.url)
    with socket.create_connection((address.host, address.port), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_new_key_works_and_a_revoked_one_fails_without_a_restart(
    locked: ServerProcess, file: Path, tenant_key: str
) -> None:
    key, text = create_key(file, "bolt", None)
    wait_until(locked, text, is_valid=True)
    with locked.openai(text) as client:
        complete(client, PROMPT)
        revoke_key(file, key.id)
        wait_until(locked, text, is_valid=False)
        with pytest.raises(openai.AuthenticationError):
            complete(client, PROMPT)
    assert is_let_in(locked, tenant_key)


def test_a_revoked_key_does_not_cut_an_answer_that_has_begun(
    locked: ServerProcess, file: Path
) -> None:
    key, text = create_key(file, "bolt", None)
    wait_until(locked, text, is_valid=True)
    with locked.openai(text) as client:
        stream = client.completions.create(
            model=BASE,
            prompt=PROMPT,
            max_tokens=200,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        revoke_key(file, key.id)
        wait_until(locked, text, is_valid=False)
        *_, last = stream
    assert last.choices[0].finish_reason == "length"


def test_a_broken_file_keeps_the_keys_and_is_followed_when_it_is_whole_again(
    locked: ServerProcess, file: Path, tenant_key: str
) -> None:
    content = file.read_bytes()
    file.write_text("{")
    time.sleep(NOTICED_SECONDS)
    for _ in range(3):
        assert is_let_in(locked, tenant_key)
        assert not is_let_in(locked, "slk_other")
    told = "the API keys known before stay valid"
    assert locked.log.count(told) == 1
    assert "line 1: should be one JSON object" in locked.log
    file.write_bytes(content)
    _, text = create_key(file, "bolt", None)
    wait_until(locked, text, is_valid=True)
    assert is_let_in(locked, tenant_key)
    assert locked.log.count(told) == 1


def test_a_file_that_is_broken_from_the_start_is_one_message(
    model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.jsonl"
    file.write_text("slk_0123456789ab_secret\n")
    ended = run_to_its_end("--model", str(model_folder), "--api-keys", str(file))
    assert ended.returncode == 2
    assert f"Error: {file} is no file of API keys" in ended.stderr
    assert "line 1: should be one JSON object" in ended.stderr
    assert "slk_" not in ended.stderr
    assert "Traceback" not in ended.stderr


def notice(log: str) -> str:
    (line,) = [line for line in log.splitlines() if "no API keys" in line]
    return line


def test_a_server_without_keys_says_that_this_machine_can_reach_it(server: ServerProcess) -> None:
    line = notice(server.log)
    assert " INFO " in line
    assert "no API keys: everyone on this machine may use and change everything" in line


def test_a_server_without_keys_for_every_network_warns(model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(model_folder), "--threads", "1", "--host", "0.0.0.0")
    with running_server(tmp_path / "log", *arguments) as open_server:
        line = notice(open_server.log)
    assert " WARNING " in line
    assert "--host 0.0.0.0 is not this machine alone: everyone who reaches port" in line
