"""The log of a whole run."""

import json
import signal
from datetime import datetime
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.test_completions import PROMPT, complete

SECRET = "Nobody shall read this"


def test_the_log_names_a_request_by_its_id_and_does_not_quote_it(
    server: ServerProcess, client: OpenAI
) -> None:
    complete(client, SECRET, extra_headers={"x-request-id": "find-me"}, model="acme")
    server.wait_until_idle()
    line = next(line for line in server.log.splitlines() if "request_id=find-me" in line)
    for part in ("tenant=none", "model=acme", "completion_tokens=24", "outcome=length"):
        assert f" {part} " in line
    assert SECRET not in server.log


def test_a_json_log_is_one_object_a_line_from_the_start_to_the_end(
    model_folder: Path, adapters_folder: Path, tmp_path: Path
) -> None:
    arguments = (
        *("--model", str(model_folder), "--adapters", str(adapters_folder), "--threads", "1"),
        *("--log-format", "json", "--log-level", "debug", "--drain-seconds", "0.2"),
    )
    with running_server(tmp_path / "log", *arguments) as server, server.openai() as client:
        answer = complete(client, SECRET, extra_headers={"x-request-id": "whole"}, model="acme")
        assert httpx.get(f"{server.url}/unknown").status_code == 404
        stream = client.completions.create(
            model=BASE,
            prompt=PROMPT,
            max_tokens=400,
            n=24,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers={"x-request-id": "cut"},
        )
        next(stream)
        server.send(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            list(stream)
        assert server.wait() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"]
        assert datetime.fromisoformat(line["time"]).utcoffset() is not None
    assert SECRET not in server.log
    assert any(line["logger"].startswith("uvicorn") for line in lines)

    (ended,) = [line for line in lines if line.get("request_id") == "whole"]
    assert answer.usage is not None
    expected = {
        "tenant": None,
        "model": "acme",
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "outcome": "length",
        "error": None,
    }
    assert {key: ended[key] for key in expected} == expected
    assert 0 < ended["first_token_seconds"] <= ended["total_seconds"]
    assert ended["version"] not in ("base", "acme")

    failed, ended = [line for line in lines if line.get("request_id") == "cut"]
    assert failed["message"].startswith("a stream failed after its start: ")
    assert (failed["level"], failed["model"], failed["version"]) == ("WARNING", BASE, "base")
    assert (ended["outcome"], ended["error"]) == ("error", "engine_stopped")

    for name in NAMES:
        assert any(f"adapter {name}: " in line["message"] for line in lines)
    (serving,) = [line for line in lines if line["message"] == "serving"]
    assert (serving["model"], serving["url"]) == (BASE, server.url)
