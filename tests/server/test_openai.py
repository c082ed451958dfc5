"""How requests are counted that never become generations."""

import pytest
from starlette.testclient import TestClient

from sharelora_serve.config import ServeConfig
from sharelora_serve.server.app import create_app
from tests.server.silent_engine import NO_ENGINE, SilentEngine, outcomes, silent_context
from tests.server.tokenizers import byte_level

REQUEST = {"model": "tiny", "prompt": "zero"}


def test_a_bug_before_a_request_is_queued_is_counted_as_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app, codec = create_app(NO_ENGINE, ServeConfig()), byte_level()
    app.state.context = context = silent_context(SilentEngine(), codec)

    def encode(_text: str, *, add_special_tokens: bool) -> list[int]:
        raise RuntimeError(f"a bug, special tokens or not: {add_special_tokens}")

    monkeypatch.setattr(codec, "encode", encode)
    answer = TestClient(app).post("/v1/completions", json=REQUEST)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert outcomes(context) == {"error": 1}


def test_what_is_wrong_with_a_request_is_counted_as_refused() -> None:
    app = create_app(NO_ENGINE, ServeConfig())
    app.state.context = context = silent_context(SilentEngine(), byte_level())
    for body in {"model": "tiny"}, REQUEST | {"prompt": ""}, REQUEST | {"max_tokens": 10**6}:
        assert TestClient(app).post("/v1/completions", json=body).status_code == 400
    assert outcomes(context) == {"refused": 3}
