"""/v1/completions through the official client."""

from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion, CompletionChoice

from sharelora_serve.server.codec import TextCodec
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE

PROMPT = "Once upon a time there was"
EOS = 2

# Greedy answers of random weights, as long as they may be, whatever tokens come.
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
# Random weights also choose special tokens, which text leaves out and logprobs do not.
ALL_SHOWN = {"ignore_eos": True, "skip_special_tokens": False}


def complete(client: OpenAI, prompt: Any, **fields: Any) -> Completion:
    return client.completions.create(**{"model": BASE, "prompt": prompt, **GREEDY, **fields})


def choice(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> CompletionChoice:
    (only,) = complete(client, prompt, **fields).choices
    return only


def answer(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> str:
    return choice(client, prompt, **fields).text


def test_text_and_its_token_ids_get_the_same_answer_alone_and_in_lists(
    client: OpenAI, codec: TextCodec
) -> None:
    texts = [PROMPT, "The sea", "1, 2, 3, 4"]
    token_ids = [codec.encode(text, add_special_tokens=True) for text in texts]
    expected = [answer(client, text) for text in texts]
    assert len(set(expected)) == len(texts)
    for text, ids, one in zip(texts, token_ids, expected, strict=True):
        assert answer(client, ids) == one
        assert answer(client, [text]) == answer(client, [ids]) == one
    for prompts in texts, token_ids:
        completion = complete(client, prompts)
        assert [item.text for item in completion.choices] == expected
        assert [item.index for item in completion.choices] == [0, 1, 2]
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == sum(map(len, token_ids))
        assert completion.usage.completion_tokens == 3 * GREEDY["max_tokens"]


def test_a_completion_has_openais_form(client: OpenAI) -> None:
    completion = complete(client, PROMPT)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert completion.model == BASE
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is None
    assert completion.usage is not None
    assert completion.usage.total_tokens == (
        completion.usage.prompt_tokens + completion.usage.completion_tokens
    )


def test_sixteen_tokens_are_the_default(client: OpenAI) -> None:
    body = {"model": BASE, "prompt": PROMPT, "extra_body": {"ignore_eos": True}}
    completion = client.completions.create(**body)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16


def test_n_answers_of_each_prompt_stand_together_and_are_counted_once_in_the_prompt(
    client: OpenAI,
) -> None:
    prompts = [PROMPT, "The sea"]
    one, three = complete(client, prompts), complete(client, prompts, n=3, best_of=3)
    expected = [item.text for item in one.choices for _ in range(3)]
    assert [item.text for item in three.choices] == expected
    assert [item.index for item in three.choices] == list(range(6))
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.usage.completion_tokens


def test_a_stop_string_ends_the_text_before_itself(client: OpenAI) -> None:
    shown = choice(client, logprobs=0)
    assert shown.logprobs is not None
    assert shown.logprobs.text_offset is not None
    text = shown.text
    for boundary in shown.logprobs.text_offset[3:20:4]:  # stop strings across two tokens
        stop = text[boundary - 2 : boundary + 2]
        kept = text[: text.index(stop)]
        for given in stop, ["never found", stop], [stop, text[-1] + "!"]:
            stopped = choice(client, stop=given)
            assert stopped.text == kept
            assert stopped.finish_reason == "stop"
        body = {"ignore_eos": True, "include_stop_str_in_output": True}
        assert answer(client, stop=stop, extra_body=body) == kept + stop


def test_a_stop_string_that_is_only_begun_is_shown(client: OpenAI) -> None:
    text = answer(client)
    shown = choice(client, stop=[text[-3:] + "never found", "neither"])
    assert shown.text == text
    assert shown.finish_reason == "length"


def test_the_answer_up_to_a_stop_string_counts_its_tokens(client: OpenAI) -> None:
    stopped = complete(client, PROMPT, stop=answer(client, max_tokens=8)[-2:])
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens <= 8


def test_a_stop_token_ends_the_text_before_itself(client: OpenAI, codec: TextCodec) -> None:
    (red,) = codec.encode(" red", add_special_tokens=False)
    only_red = {"logit_bias": {str(red): 100}, "extra_body": {"ignore_eos": True}}
    assert answer(client, **only_red) == " red" * GREEDY["max_tokens"]
    body = {"stop_token_ids": [red], "ignore_eos": True}
    stopped = choice(client, logit_bias=only_red["logit_bias"], extra_body=body)
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    body["include_stop_str_in_output"] = True
    stopped = choice(client, logit_bias=only_red["logit_bias"], extra_body=body)
    assert (stopped.text, stopped.finish_reason) == (" red", "stop")


def test_the_models_own_end_is_heard_unless_it_is_ignored(client: OpenAI) -> None:
    only_end = {"logit_bias": {str(EOS): 100}}
    ended = choice(client, **only_end, extra_body={})
    assert (ended.text, ended.finish_reason) == ("", "stop")
    completion = complete(client, PROMPT, **only_end, extra_body={"ignore_eos": True})
    assert completion.usage is not None
    assert completion.usage.completion_tokens == GREEDY["max_tokens"]
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].text == "", "special tokens are not shown"
    body = {"ignore_eos": True, "skip_special_tokens": False}
    assert answer(client, **only_end, extra_body=body) == "<|im_end|>" * GREEDY["max_tokens"]


def test_min_tokens_holds_back_ends_stop_tokens_and_stop_strings(
    client: OpenAI, codec: TextCodec
) -> None:
    completion = complete(
        client, PROMPT, logit_bias={str(EOS): 100}, logprobs=0, extra_body={"min_tokens": 5}
    )
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens.index("<|im_end|>") == 5
    (red,) = codec.encode(" red", add_special_tokens=False)
    bias = {str(red): 100}
    body = {"min_tokens": 4, "stop_token_ids": [red]}
    assert " red" not in answer(client, logit_bias=bias, extra_body=body)
    assert answer(client, logit_bias=bias, stop="red", extra_body={"min_tokens": 4}) == (
        " red" * 3 + " "
    )


@pytest.mark.parametrize("model", [BASE, *NAMES])
def test_logprobs_tell_the_tokens_of_the_text_and_the_likeliest_ones(
    model: str, client: OpenAI
) -> None:
    shown = choice(client, model=model, logprobs=5, extra_body=ALL_SHOWN)
    logprobs = shown.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    num_tokens = GREEDY["max_tokens"]
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == num_tokens
    assert len(logprobs.top_logprobs) == len(logprobs.text_offset) == num_tokens
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert logprob is not None
        assert logprob < 0
        assert top is not None
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
        assert len(top) <= 5
    if all(not token.startswith("bytes:") for token in logprobs.tokens):
        assert "".join(logprobs.tokens) == shown.text


def test_echo_begins_the_text_with_the_prompt_and_gives_its_logprobs(
    client: OpenAI, codec: TextCodec
) -> None:
    token_ids = codec.encode(PROMPT, add_special_tokens=True)
    plain = choice(client, logprobs=2)
    echoed = choice(client, echo=True, logprobs=2)
    assert echoed.text == PROMPT + plain.text
    assert echoed.logprobs is not None
    assert plain.logprobs is not None
    assert echoed.logprobs.tokens == (
        [codec.token_text(token) for token in token_ids] + (plain.logprobs.tokens or [])
    )
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert None not in echoed.logprobs.token_logprobs[1:]
    for offset, token in zip(
        echoed.logprobs.text_offset or [], echoed.logprobs.tokens[: len(token_ids)], strict=False
    ):
        assert PROMPT.startswith(token, offset)
    assert answer(client, token_ids, echo=True) == echoed.text


def test_no_new_tokens_with_echo_scores_the_prompt(client: OpenAI) -> None:
    scored = complete(client, PROMPT, echo=True, logprobs=1, max_tokens=0)
    shown = scored.choices[0]
    assert (shown.text, shown.finish_reason) == (PROMPT, "length")
    longer = choice(client, echo=True, logprobs=1)
    assert shown.logprobs is not None
    assert longer.logprobs is not None
    assert shown.logprobs.token_logprobs is not None
    assert longer.logprobs.token_logprobs is not None
    num_tokens = len(shown.logprobs.token_logprobs)
    for found, expected in zip(
        shown.logprobs.token_logprobs[1:],
        longer.logprobs.token_logprobs[1:num_tokens],
        strict=True,
    ):
        assert found == pytest.approx(expected, abs=1e-4)
    assert scored.usage is not None
    assert scored.usage.completion_tokens == 0
    assert answer(client, echo=True, max_tokens=0) == PROMPT
