"""A stream is an answer only if it is whole."""

import asyncio
import json

import httpx
import pytest

from loadtest.client import Timeline, stream


def event(text: str, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


def ask(status: int, body: str) -> Timeline:
    """What the client makes of a server's answer."""

    async def run() -> Timeline:
        transport = httpx.MockTransport(
            lambda _: httpx.Response(status, text=body, headers={"x-adapter-version": "3f9a"})
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await stream(client, "acme", "red dog", 2)

    return asyncio.run(run())


def test_a_whole_stream_has_its_text_its_version_and_a_time_for_each_token() -> None:
    body = event("big ") + event("cat") + event("", "length") + "data: [DONE]\n\n"
    timeline = ask(200, body)
    assert (timeline.text, timeline.version) == ("big cat", "3f9a")
    assert len(timeline.tokens_at) == 2


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (503, "draining", "503: draining"),
        (200, event("big "), "breaks off after 1 tokens"),
        (200, event("big ") + 'data: {"error": {"code": "engine_stopped"}}\n\n', "engine_stopped"),
    ],
)
def test_what_is_refused_fails_or_breaks_off_is_no_answer(
    status: int, body: str, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        ask(status, body)
