"""From bytes to a checked request."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from sharelora_serve.errors import RequestTooLargeError
from sharelora_serve.server.body import MAX_FIELDS, parse_body, parse_json, read_body
from sharelora_serve.server.errors import MAX_PROBLEMS, BodyError, shortened
from sharelora_serve.server.protocol import ChatCompletionRequest, CompletionRequest

GOOD = {"model": "tiny", "prompt": "a"}
GOOD_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


def refusal(body: dict[str, Any] | bytes, model: Any = CompletionRequest) -> BodyError:
    with pytest.raises(BodyError) as caught:
        parse_body(body if isinstance(body, bytes) else json.dumps(body).encode(), model)
    return caught.value


def read(pieces: list[bytes], max_bytes: int, *, declared: int | None = None) -> bytes:
    """The body of a request whose client stays connected and sends nothing more."""

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.sleep(60)
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    request = Request({"type": "http", "headers": headers}, receive)
    return asyncio.run(asyncio.wait_for(read_body(request, max_bytes), 2))


def test_a_body_is_read_to_its_end_whatever_pieces_it_comes_in() -> None:
    assert read([b"ab", b"", b"cd"], 4) == b"abcd"
    assert read([b""], 4) == b""


@pytest.mark.parametrize(
    ("pieces", "declared"),
    [([b"abcde"], None), ([b"abcd", b"e"], None), ([b"abcde"], 5), ([b"", b"abcde"], 10**30)],
)
def test_a_body_too_large_is_refused_when_it_ends(
    pieces: list[bytes], declared: int | None
) -> None:
    with pytest.raises(RequestTooLargeError, match="4 bytes"):
        read(pieces, 4, declared=declared)


def test_a_client_that_leaves_is_no_request() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(read_body(Request({"type": "http", "headers": []}, receive), 4))


def test_numbers_are_those_of_json() -> None:
    assert parse_json(b'{"a": 1e2, "b": -0.5}') == {"a": 100.0, "b": -0.5}
    for constant in (b"NaN", b"Infinity", b"-Infinity"):
        with pytest.raises(BodyError, match="is not a JSON number"):
            parse_json(b'{"a": ' + constant + b"}")


def test_an_object_has_room_for_the_largest_logit_bias() -> None:
    bias = {str(token): 1 for token in range(1024)}
    assert parse_body(json.dumps({**GOOD, "logit_bias": bias}).encode(), CompletionRequest)
    fields = {str(number): 1 for number in range(MAX_FIELDS + 1)}
    assert f"more than {MAX_FIELDS}" in refusal({**GOOD, "metadata": fields}).message


def test_a_message_lists_some_problems_and_counts_the_rest() -> None:
    error = refusal({**GOOD, "logit_bias": {str(token): "x" for token in range(1000)}})
    assert error.message.startswith("1000 problems in the request:\n")
    assert error.message.endswith(f"\nand {1000 - MAX_PROBLEMS} more")
    assert (error.param, error.code) == ("logit_bias.0", "invalid_type")


def test_of_a_million_wrong_messages_one_is_told() -> None:
    error = refusal({**GOOD_CHAT, "messages": [1] * 1_000_000}, ChatCompletionRequest)
    assert error.message == "messages[0]: should be an object, not 1"


def test_what_is_quoted_is_short_and_printable() -> None:
    for value in ("x" * 10**6, ["y"] * 10**6, b"z" * 10**6, 10**4000, {"a": "b" * 10**6}):
        assert len(shortened(value)) <= 60
    assert shortened("\ud800\n") == repr("\ud800\n")
