"""Sending an answer: what a client sees while its generation goes on, and others meanwhile."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.engine.request import FinishReason, RequestOutput, SamplingParams
from sharelora_serve.errors import EngineStoppedError
from sharelora_serve.server import ascii_json
from sharelora_serve.server.ascii_json import dump, dump_large
from sharelora_serve.server.choice import ChoiceOptions
from sharelora_serve.server.delivery import GenerationResponse
from sharelora_serve.server.generation import Generation, Prompt
from sharelora_serve.server.mailbox import Mailbox
from sharelora_serve.server.shapes import ChatShape
from tests.server.silent_engine import SilentEngine, outcomes, silent_context
from tests.server.tokenizers import byte_level

Send = Callable[[Any], Awaitable[None]]

WHOLE = RequestOutput("", [40], finish_reason=FinishReason.LENGTH)
BEGUN = RequestOutput("", [40])
FAILED = RequestOutput("", [], finish_reason=FinishReason.ERROR, error=EngineStoppedError("gone"))

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


async def deliver(
    engine: SilentEngine, first: RequestOutput, send: Send, *, streams: bool, num_choices: int = 1
) -> dict[str, float]:
    """Send an answer whose choices begin with `first`; how it ended."""
    context = silent_context(engine, byte_level(), Mailbox(asyncio.get_running_loop()))
    generation = Generation(
        context,
        request_fields={},
        model="tiny",
        adapter=None,
        tenant=None,
        prompts=[Prompt([40], None, 9)],
        num_choices=num_choices,
        options=ChoiceOptions(),
        sampling=lambda prompt, _choice: SamplingParams(prompt.max_tokens),
    )
    shape = ChatShape(context.codec, "tiny", has_logprobs=False, includes_usage=False)
    scope = {"type": "http", "method": "POST", "headers": []}
    response = GenerationResponse(generation, shape, streams=streams)
    answer = asyncio.create_task(response(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    for request in engine.requests:
        request.deliver(first)
    await answer
    return outcomes(context)


def test_a_choice_that_fails_before_the_first_event_ends_the_stream_with_its_error() -> None:
    engine, body = SilentEngine(), b""

    async def send(message: Any) -> None:
        nonlocal body
        if message["type"] == "http.response.start":  # the client takes its time
            engine.requests[0].deliver(FAILED)
            await asyncio.sleep(0.01)
        body += message.get("body", b"")

    ended = asyncio.run(deliver(engine, BEGUN, send, streams=True))
    *_, last, done, _ = body.decode().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
    assert '"finish_reason":"error"' not in body.decode()
    assert ended == {"error": 1}


def test_a_whole_answer_is_written_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    written_by, body = set(), b""
    written = ChatShape.answer

    def answer(shape: ChatShape, generation: Generation) -> dict[str, Any]:
        written_by.add(threading.get_ident())
        return written(shape, generation)

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    monkeypatch.setattr(ChatShape, "answer", answer)
    ended = asyncio.run(deliver(SilentEngine(), WHOLE, send, streams=False, num_choices=3))
    assert len(json.loads(body)["choices"]) == 3
    assert ended == {"length": 1}
    assert threading.get_ident() not in written_by


@given(JSON)
def test_a_large_answer_is_the_same_json(content: Any) -> None:
    assert dump_large(content) == dump(content)


def test_a_large_answer_is_encoded_a_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    token = {"token": "a", "logprob": -1.5, "bytes": [97]}
    tokens = [token | {"top_logprobs": [token] * 20}] * 500
    choice = {"index": 0, "logprobs": {"content": tokens, "refusal": None}}
    content = {"object": "chat.completion", "choices": [choice] * 3}
    expected, most = dump(content), 0

    def measured(part: Any) -> bytes:
        nonlocal most
        encoded = dump(part)
        most = max(most, len(encoded))
        return encoded

    monkeypatch.setattr(ascii_json, "dump", measured)
    assert dump_large(content) == expected
    assert most == len(dump(tokens[0]))
