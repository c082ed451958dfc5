"""/v1/chat/completions through the official client."""

from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.e2e.conftest import BASE
from tests.e2e.test_completions import ALL_SHOWN, GREEDY, answer

MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "What is the capital of France?"},
]


def chat(client: OpenAI, messages: Any = MESSAGES, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(
        **{"model": BASE, "messages": messages, **GREEDY, **fields}
    )


def reply(client: OpenAI, messages: Any = MESSAGES, **fields: Any) -> str | None:
    return chat(client, messages, **fields).choices[0].message.content


def test_a_chat_is_answered_as_its_template_says(client: OpenAI) -> None:
    completion = chat(client)
    assert completion.id.startswith("chatcmpl-")
    assert completion.object == "chat.completion"
    only = completion.choices[0]
    assert (only.finish_reason, only.message.role, only.logprobs) == ("length", "assistant", None)
    prompt = (
        "<|im_start|>system\nYou are brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    body = {"ignore_eos": True, "add_special_tokens": False}
    assert only.message.content == answer(client, prompt, extra_body=body)


def test_text_parts_and_developer_are_other_words_for_the_same(client: OpenAI) -> None:
    parts = [
        {"role": "developer", "content": "You are brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "What is the capital of France?"}],
        },
    ]
    assert reply(client, parts) == reply(client)


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    message = chat(client).choices[0].message
    followed = chat(client, [*MESSAGES, message, {"role": "user", "content": "And of Spain?"}])
    assert followed.choices[0].message.content != message.content


def test_max_completion_tokens_is_the_newer_name_of_max_tokens(client: OpenAI) -> None:
    body = {"model": BASE, "messages": MESSAGES, "temperature": 0}
    extra = {"ignore_eos": True}
    newer = client.chat.completions.create(**body, max_completion_tokens=7, extra_body=extra)
    older = client.chat.completions.create(**body, max_tokens=7, extra_body=extra)
    assert newer.choices[0].message.content == older.choices[0].message.content
    assert newer.usage is not None
    assert newer.usage.completion_tokens == 7


@pytest.mark.parametrize("num_top", [None, 0, 4])
def test_logprobs_are_true_and_top_logprobs_as_many(num_top: int | None, client: OpenAI) -> None:
    top = {} if num_top is None else {"top_logprobs": num_top}
    shown = chat(client, logprobs=True, extra_body=ALL_SHOWN, **top).choices[0]
    assert shown.logprobs is not None
    tokens = shown.logprobs.content
    assert tokens is not None
    assert len(tokens) == GREEDY["max_tokens"]
    for token in tokens:
        assert len(token.top_logprobs) == (num_top or 0)
        assert all(other.logprob <= token.logprob for other in token.top_logprobs)
        if token.top_logprobs:
            assert token.top_logprobs[0].token == token.token
    content = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert content.decode(errors="replace").rstrip("\N{REPLACEMENT CHARACTER}") == (
        shown.message.content or ""
    ).rstrip("\N{REPLACEMENT CHARACTER}")


def test_n_answers_of_a_chat_are_numbered(client: OpenAI) -> None:
    choices = chat(client, n=3, temperature=1.0, seed=1).choices
    assert [item.index for item in choices] == [0, 1, 2]
    assert len({item.message.content for item in choices}) == 3


def test_without_a_limit_a_chat_goes_on_to_the_end_of_the_context(client: OpenAI) -> None:
    body = {"model": BASE, "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    completion = client.chat.completions.create(**body)
    assert completion.usage is not None
    assert completion.usage.total_tokens == 512
    assert completion.choices[0].finish_reason == "length"
