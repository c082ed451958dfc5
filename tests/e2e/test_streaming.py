"""Streams through the official client: what they say is what an answer in one piece says."""

import json
from collections import defaultdict
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.test_chat import MESSAGES, chat
from tests.e2e.test_completions import GREEDY, PROMPT, complete


def stream(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> list[Any]:
    body = {"model": BASE, "prompt": prompt, **GREEDY, **fields}
    return list(client.completions.create(**body, stream=True))


def texts(chunks: list[Any]) -> dict[int, str]:
    """The joined pieces of each choice."""
    pieces: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for item in chunk.choices:
            pieces[item.index] += item.text
    return dict(pieces)


@pytest.mark.parametrize("model", [BASE, *NAMES])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 100},
        {"max_tokens": 100, "n": 3, "temperature": 1.0, "seed": 11},
        {"prompt": [PROMPT, "The sea", "日本の"], "max_tokens": 40},
        {"echo": True},
        {"echo": True, "max_tokens": 0},
        {"stop": ["e", "\n\n"], "max_tokens": 60},
        {"logit_bias": {"2": 100}, "extra_body": {}},
    ],
    ids=str,
)
def test_the_pieces_joined_are_the_answer_in_one_piece(
    model: str, fields: dict[str, Any], client: OpenAI
) -> None:
    fields = {"prompt": PROMPT, **fields, "model": model}
    prompt = fields.pop("prompt")
    whole = complete(client, prompt, **fields)
    chunks = stream(client, prompt, **fields)
    joined = texts(chunks)
    assert [joined[item.index] for item in whole.choices] == [item.text for item in whole.choices]
    ends = {c.index: c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason}
    assert ends == {item.index: item.finish_reason for item in whole.choices}
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_comes_token_by_token(client: OpenAI) -> None:
    # Drawn, since a stream that repeats itself is given several of its tokens at once.
    chunks = stream(client, max_tokens=60, temperature=1.0, seed=5)
    assert len(chunks) > 20, "many tokens are parts of characters, but not most"


def test_usage_comes_last_and_only_where_it_is_asked_for(client: OpenAI) -> None:
    *others, last = stream(client, stream_options={"include_usage": True})
    whole = complete(client, PROMPT)
    assert last.choices == []
    assert whole.usage is not None
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in others)


def test_the_logprobs_of_a_stream_are_those_of_the_answer_in_one_piece(client: OpenAI) -> None:
    whole = complete(client, PROMPT, logprobs=2, echo=True).choices[0].logprobs
    chunks = stream(client, logprobs=2, echo=True)
    found: dict[str, list[Any]] = defaultdict(list)
    for chunk in chunks:
        if (logprobs := chunk.choices[0].logprobs) is not None:
            for name in ("tokens", "text_offset"):
                found[name] += getattr(logprobs, name)
    assert whole is not None
    assert found["tokens"] == whole.tokens
    assert found["text_offset"] == whole.text_offset


def test_a_chat_streams_its_role_its_content_and_its_end(client: OpenAI) -> None:
    fields = {"n": 2, "temperature": 1.0, "seed": 3}
    whole = chat(client, **fields)
    body = {"model": BASE, "messages": MESSAGES, **GREEDY, **fields}
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**body, stream=True, stream_options=options)
    for index in range(2):
        choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert choices[0].delta.role == "assistant"
        content = "".join(item.delta.content or "" for item in choices)
        assert content == whole.choices[index].message.content
        assert [item.finish_reason for item in choices[-2:]] == [None, "length"]
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


def test_a_stream_is_server_sent_events_in_ascii_that_end_with_done(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": "日本の", "max_tokens": 30, "stream": True, "echo": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        content = response.read()
    assert response.headers["content-type"].startswith("text/event-stream")
    assert content.isascii()
    *events, done, end = content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert chunks[0]["choices"][0]["text"].startswith("日本の")
