"""What a checked request asks of the engine."""

from typing import Any

import pytest

from sharelora_serve.engine.request import SamplingParams
from sharelora_serve.server.protocol import ChatCompletionRequest, CompletionRequest

MESSAGE = {"role": "user", "content": "a"}


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "tiny", "prompt": "a", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "t", "messages": [MESSAGE], **fields})


def sampling(**fields: Any) -> SamplingParams:
    return completion(**fields).sampling(max_tokens=5, choice=0)


def test_what_is_not_given_or_null_is_the_default() -> None:
    expected = SamplingParams(max_tokens=5)
    assert sampling() == expected
    optional = CompletionRequest.model_fields.keys() - {"model", "prompt"}
    assert sampling(**dict.fromkeys(optional)) == expected
    assert chat(logprobs=False).sampling(max_tokens=5, choice=0) == expected


def test_every_field_reaches_the_engine() -> None:
    same = {
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": 9,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": 4,
    }
    found = sampling(**same, temperature=2, stop_token_ids=[7, 8], logit_bias={"5": -3})
    assert {name: getattr(found, name) for name in same} == same
    assert found.temperature == 2.0
    assert found.stop_token_ids == {7, 8}
    assert found.logit_bias == {5: -3.0}
    assert found.prompt_logprobs is None
    assert sampling(logprobs=4, echo=True).prompt_logprobs == 4


@pytest.mark.parametrize("top_k", [-1, 0])
def test_two_spellings_of_top_k_keep_all(top_k: int) -> None:
    assert sampling(top_k=top_k).top_k == 0


@pytest.mark.parametrize("seed", [-(2**63) + 1, -1, 0, 2**63 - 1])
def test_each_answer_has_a_seed_of_its_own_that_is_in_range(seed: int) -> None:
    request = completion(seed=seed, n=3)
    seeds = [request.sampling(max_tokens=1, choice=choice).seed for choice in range(3)]
    assert len(set(seeds)) == 3
    assert all(one is not None and 0 <= one < 2**63 for one in seeds)


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2)]
)
def test_prompts_are_counted_and_answers_bounded_over_all_of_them(
    prompt: Any, num_prompts: int
) -> None:
    request = completion(prompt=prompt, n=4)
    assert request.num_prompts == num_prompts
    assert list(request.too_many(4 * num_prompts)) == []
    (problem,) = request.too_many(4 * num_prompts - 1)
    assert problem.param == "n"
    assert str(4 * num_prompts) in problem.message


def test_more_prompts_than_answers_are_the_prompts_fault() -> None:
    (problem,) = completion(prompt=["a", "b"]).too_many(1)
    assert problem.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "num_alternatives"),
    [({}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)
def test_a_chats_logprobs_are_true_and_a_number(
    fields: dict[str, Any], num_alternatives: int | None
) -> None:
    assert chat(**fields).num_logprobs == num_alternatives


def test_the_limit_is_named_as_the_client_named_it() -> None:
    assert (chat(max_tokens=3).new_tokens, chat(max_tokens=3).new_tokens_param) == (3, "max_tokens")
    newer = chat(max_completion_tokens=4)
    assert (newer.new_tokens, newer.new_tokens_param) == (4, "max_completion_tokens")


def test_a_conversation_is_plain_text_with_the_roles_that_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts, "name": "Ann"}, MESSAGE]
    assert chat(messages=messages).conversation() == [
        {"role": "system", "content": "a\nb", "name": "Ann"},
        MESSAGE,
    ]


def test_empty_values_of_what_is_not_supported_are_no_request_for_it() -> None:
    for empty in (None, [], "", {}, False):
        chat(tools=empty, functions=empty, audio=empty)
