"""Every route of the application asks for a key, before it reads what was sent."""

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.routing import BaseRoute

from sharelora_serve.config import ServeConfig
from sharelora_serve.server.app import create_app
from sharelora_serve.server.auth import ADMIN_PATHS, OPEN_PATHS
from sharelora_serve.server.caller import ANONYMOUS_ADMIN, Caller
from sharelora_serve.server.keys import create_key
from tests.server.silent_engine import NO_ENGINE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def admin(file: Path) -> str:
    return f"Bearer {create_key(file, None, None)[1]}"


@pytest.fixture
def tenant(file: Path) -> str:
    return f"Bearer {create_key(file, 'acme', None)[1]}"


def make_app(file: Path | None) -> tuple[FastAPI, list[Caller]]:
    """The application with a route that keeps who called it."""
    app, callers = create_app(NO_ENGINE, ServeConfig(api_keys=file)), []

    @app.get("/who")
    async def who(request: Request) -> dict[str, str]:
        callers.append(request.state.caller)
        return {}

    return app, callers


def call(
    app: FastAPI, path: str, *authorization: str, method: str = "GET"
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer; reading the request's body fails the test."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        pytest.fail("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", value.encode()) for value in authorization]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "query_string": b"",
        "headers": headers,
        "state": {},
    }
    asyncio.run(app(scope, receive, send))
    start, *bodies = sent
    body = b"".join(message["body"] for message in bodies)
    is_json = b"json" in dict(start["headers"]).get(b"content-type", b"")
    shown = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], shown, json.loads(body) if is_json else body


def paths(routes: list[BaseRoute]) -> Iterator[str]:
    for route in routes:
        yield getattr(route, "path", "/")


def assert_refused(answer: tuple[int, dict[str, str], Any], status: int, code: str) -> None:
    given_status, headers, content = answer
    assert (given_status, content["error"]["code"]) == (status, code)
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert len(headers["x-request-id"]) == 32
    assert headers.get("www-authenticate") == ("Bearer" if status == 401 else None)


def test_every_route_but_health_and_readiness_needs_a_key(file: Path, admin: str) -> None:
    app, _ = make_app(file)
    known = {*paths(app.routes), *app.openapi()["paths"]}
    assert known > OPEN_PATHS | ADMIN_PATHS
    for path in (*(known - OPEN_PATHS), "/unknown", "/health/", "//health", "/ready/x", ""):
        for method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS"):
            for keys in ((), ("Bearer x",), (admin, admin), (admin.swapcase(),)):
                answer = call(app, path, *keys, method=method)
                assert_refused(answer, 401, "invalid_api_key")


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_what_tells_of_everybody_is_for_admins(
    path: str, file: Path, admin: str, tenant: str
) -> None:
    app, _ = make_app(file)
    assert_refused(call(app, path, tenant), 403, "permission_denied")
    if path != "/metrics":  # whose figures are the engine's
        assert call(app, path, admin)[0] == 200


def test_a_route_knows_its_caller(file: Path, admin: str, tenant: str) -> None:
    app, callers = make_app(file)
    for key in (admin, tenant):
        assert call(app, "/who", key)[0] == 200
    assert callers == [Caller(None), Caller("acme")]


def test_without_a_file_everybody_is_an_admin() -> None:
    app, callers = make_app(None)
    for keys in ((), ("Bearer x",)):
        assert call(app, "/who", *keys)[0] == 200
    assert callers == [ANONYMOUS_ADMIN] * 2
    assert call(app, "/docs")[0] == 200


def test_a_refused_key_is_in_no_log(
    file: Path, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app, _ = make_app(file)
    answers = [call(app, "/who", tenant + "x"), call(app, "/metrics", tenant)]
    for answer, code in zip(answers, ("invalid_api_key", "permission_denied"), strict=True):
        assert f"request {answer[1]['x-request-id']} refused: {code}" in caplog.text
    assert "slk_" not in caplog.text + repr(answers)
