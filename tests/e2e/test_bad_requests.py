"""Bad requests are refused in OpenAI's shape, and the next good one is answered as before."""

import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.e2e.bad_requests import (
    CHAT,
    COMPLETIONS,
    GOOD,
    GOOD_CHAT,
    BadRequest,
    bad_requests,
)
from tests.e2e.conftest import BASE, MAX_REQUEST_BYTES
from tests.e2e.server_process import ServerProcess

ROWS = bad_requests()
JSON = {"content-type": "application/json"}


def good_answer(http: httpx.Client) -> bytes:
    """The answer to a good request, byte for byte but for its own id and time."""
    response = http.post(COMPLETIONS, json=GOOD)
    assert response.status_code == 200
    return re.sub(rb'"id":"cmpl-[0-9a-f]{32}","created":[0-9]+', b"", response.content)


@pytest.fixture(scope="module")
def good(http: httpx.Client) -> bytes:
    return good_answer(http)


def assert_refused(response: httpx.Response, row: BadRequest) -> None:
    assert response.status_code == row.status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"], error["param"]) == (
        "invalid_request_error",
        row.code,
        row.param,
    ), error
    assert row.says in error["message"]
    assert len(error["message"]) < 3000
    if row.param is not None and row.code != "model_not_found":
        assert row.param in error["message"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name[:60])
def test_a_bad_request_is_refused_and_the_next_good_one_answered_as_before(
    row: BadRequest, http: httpx.Client, good: bytes
) -> None:
    assert_refused(http.post(row.path, content=row.content, headers=JSON), row)
    assert good_answer(http) == good


def test_bad_requests_do_not_disturb_those_that_run(http: httpx.Client, good: bytes) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(good_answer, http) for _ in range(30)]
        for row in ROWS:
            assert_refused(http.post(row.path, content=row.content, headers=JSON), row)
        assert {answer.result() for answer in answers} == {good}


def test_streamed_requests_are_refused_alike(http: httpx.Client, good: bytes) -> None:
    for row in ROWS:
        if (
            isinstance(row.body, dict)
            and "stream" not in row.body
            and row.param != "stream_options"
        ):
            content = json.dumps({**row.body, "stream": True})
            assert_refused(http.post(row.path, content=content, headers=JSON), row)
    assert good_answer(http) == good


def test_the_table_names_no_row_twice() -> None:
    places = [(row.name, row.path) for row in ROWS]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("num_bytes", [MAX_REQUEST_BYTES + 1, 20 * MAX_REQUEST_BYTES])
@pytest.mark.parametrize("chunk", [1_000, 65_536, 2 * MAX_REQUEST_BYTES])
def test_a_body_in_chunks_is_too_large_as_soon_as_it_is(
    num_bytes: int, chunk: int, http: httpx.Client, good: bytes
) -> None:
    def chunks() -> Iterator[bytes]:
        for start in range(0, num_bytes, chunk):
            yield b" " * min(chunk, num_bytes - start)

    response = http.post(COMPLETIONS, content=chunks(), headers=JSON)
    row = BadRequest("chunks", b"", "request_too_large", None, status=413)
    assert_refused(response, row)
    assert response.elapsed.total_seconds() < 4, "nothing more was to be waited for"
    assert good_answer(http) == good


def test_a_body_as_large_as_allowed_is_read(http: httpx.Client) -> None:
    content = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    padded = content + b" " * (MAX_REQUEST_BYTES - len(content))
    assert http.post(COMPLETIONS, content=padded, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("PUT", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/completions", 404, "not_found"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
    ],
)
def test_a_wrong_method_or_path_is_told_in_the_same_shape(
    method: str, path: str, status: int, code: str, http: httpx.Client
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert path.rpartition("/")[2] in error["message"]
    if status == 405:
        assert response.headers["allow"]


def test_several_mistakes_are_told_at_once(http: httpx.Client) -> None:
    body = {**GOOD, "temperature": 3, "top_p": 0, "n": "2", "mood": "good"}
    message = http.post(COMPLETIONS, json=body).json()["error"]["message"]
    assert message.startswith("4 problems in the request:")
    for field in ("temperature", "top_p", "n", "mood"):
        assert f"\n{field}: " in message


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"prompt": ""}, openai.BadRequestError),
        ({"temperature": 3}, openai.BadRequestError),
        ({"n": 200}, openai.BadRequestError),
        ({"max_tokens": 10_000}, openai.BadRequestError),
        ({"prompt": "a" * MAX_REQUEST_BYTES}, openai.APIStatusError),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_official_client_raises_the_right_exception(
    fields: dict[str, Any], kind: type[openai.APIStatusError], client: OpenAI
) -> None:
    with pytest.raises(kind) as completed:
        client.completions.create(**{**GOOD, **fields})
    assert type(completed.value) is kind
    if "prompt" not in fields:
        with pytest.raises(kind):
            client.chat.completions.create(**{**GOOD_CHAT, **fields})


def test_what_is_no_http_harms_nobody(
    server: ServerProcess, http: httpx.Client, good: bytes
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for content in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(content)
    assert good_answer(http) == good
    assert BASE in http.get("/v1/models").text
