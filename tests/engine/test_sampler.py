"""The sampler's choices and log-probabilities against slow definitions and transformers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from sharelora_serve.engine.sampler import SampledToken, apply_penalties
from sharelora_serve.errors import InvalidRequestError, SamplingError
from tests.engine.sampling_cases import (
    draw_logits,
    draw_tied_logits,
    make_request,
    make_sampler,
    no_deadline,
    ranked,
    sample_one,
    seeds,
    token_ids_of,
    vocab_sizes,
)

# Greedy


@no_deadline
@given(vocab_size=vocab_sizes, num_rows=st.integers(0, 5), seed=seeds)
def test_greedy_takes_the_lowest_id_of_the_largest_logits(
    vocab_size: int, num_rows: int, seed: int
) -> None:
    logits = draw_tied_logits(num_rows, vocab_size, seed=seed)
    requests = [make_request(temperature=0.0) for _ in range(num_rows)]
    sampled = token_ids_of(make_sampler(vocab_size).sample(logits, requests))
    assert sampled == [row.index(max(row)) for row in logits.tolist()]


@no_deadline
@given(vocab_size=vocab_sizes, seed=seeds)
@pytest.mark.parametrize(
    "narrowed", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"temperature": 1e-9}]
)
def test_the_narrowest_draw_is_the_greedy_choice_even_among_ties(
    narrowed: dict[str, Any], vocab_size: int, seed: int
) -> None:
    logits = draw_tied_logits(2, vocab_size, seed=seed)
    requests = [make_request(temperature=0.0), make_request(**narrowed)]
    logits[1] = logits[0]
    greedy, drawn = token_ids_of(make_sampler(vocab_size).sample(logits, requests))
    assert drawn == greedy


def test_logits_are_left_as_they_were() -> None:
    logits = draw_logits(1, 50, seed=0)
    before = logits.clone()
    everything = make_request(
        output_ids=[3, 3, 4],
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={7: 5.0},
        min_tokens=9,
        logprobs=3,
    )
    make_sampler(50).sample(logits, [everything])
    assert torch.equal(logits, before)


# Penalties


@no_deadline
@given(
    penalty=st.floats(0.1, 3.0),
    prompt_ids=st.lists(st.integers(0, 39), min_size=1, max_size=20),
    output_ids=st.lists(st.integers(0, 39), max_size=20),
    seed=seeds,
)
def test_repetition_penalty_equals_transformers(
    penalty: float, prompt_ids: list[int], output_ids: list[int], seed: int
) -> None:
    scores = draw_logits(40, seed=seed)
    tokens = torch.tensor([prompt_ids + output_ids])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, scores[None].clone())[0]
    apply_penalties(
        scores,
        make_request(prompt_ids=prompt_ids, output_ids=output_ids, repetition_penalty=penalty),
    )
    torch.testing.assert_close(scores, expected)


@no_deadline
@given(
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
    logit_bias=st.dictionaries(st.integers(0, 39), st.floats(-100.0, 100.0), max_size=5),
    output_ids=st.lists(st.integers(0, 39), max_size=20),
    seed=seeds,
)
def test_penalties_equal_their_definition_token_by_token(
    repetition: float,
    presence: float,
    frequency: float,
    logit_bias: dict[int, float],
    output_ids: list[int],
    seed: int,
) -> None:
    prompt_ids = [3, 5, 5]
    scores = draw_logits(40, seed=seed)
    expected = []
    for token_id, score in enumerate(scores.tolist()):
        if token_id in prompt_ids + output_ids:
            score = score / repetition if score > 0 else score * repetition
        if token_id in output_ids:
            score -= presence + frequency * output_ids.count(token_id)
        expected.append(score + logit_bias.get(token_id, 0.0))
    apply_penalties(
        scores,
        make_request(
            prompt_ids=prompt_ids,
            output_ids=output_ids,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=logit_bias,
        ),
    )
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, 7),
        ({"repetition_penalty": 2.0}, 6),
        ({"presence_penalty": 2.0}, 6),
        ({"frequency_penalty": 1.5}, 6),
        ({"frequency_penalty": 0.4}, 7),  # only 0.8 in all: token 7 stays ahead by 0.2
        ({"logit_bias": {4: 11.0}}, 4),
        ({"logit_bias": {7: -100.0}}, 6),
    ],
)
def test_greedy_obeys_each_penalty(sampling: dict[str, Any], expected: int) -> None:
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0, 10.0])
    request = make_request(output_ids=[7, 7], temperature=0.0, **sampling)
    assert token_ids_of([sample_one(make_sampler(8), logits, request)]) == [expected]


def test_output_penalties_leave_prompt_tokens_alone() -> None:
    logits = torch.tensor([1.0, 0.0, 0.0, 0.5])
    request = make_request(
        prompt_ids=[0], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0
    )
    assert token_ids_of([sample_one(make_sampler(4), logits, request)]) == [0]


# End tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_no_end_token_before_min_tokens(temperature: float, ignore_eos: bool) -> None:
    logits = torch.tensor([0.0, 60.0, 59.0, 58.0, 30.0])  # 1 and 2 are eos, 3 a stop token
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "ignore_eos": ignore_eos,
        "min_tokens": 2,
        "stop_token_ids": frozenset({3}),
        "seed": 0,
    }
    sampler = make_sampler(5)
    requests = [make_request(output_ids=[4] * length, **sampling) for length in range(3)]
    sampled = token_ids_of(sampler.sample(logits.repeat(3, 1), requests))
    assert sampled[:2] == [4, 4]
    assert sampled[2] in {1, 2, 3}


def test_ignore_eos_still_allows_the_eos_token_itself() -> None:
    logits = torch.tensor([0.0, 9.0, 0.0])
    request = make_request(temperature=0.0, ignore_eos=True)
    assert token_ids_of([sample_one(make_sampler(3), logits, request)]) == [1]


# Log-probabilities


@no_deadline
@given(vocab_size=vocab_sizes, num_top=st.integers(0, 700), tied=st.booleans(), seed=seeds)
def test_logprobs_are_those_of_the_raw_logits(
    vocab_size: int, num_top: int, tied: bool, seed: int
) -> None:
    draw = draw_tied_logits if tied else draw_logits
    logits = draw(vocab_size, seed=seed)
    expected = logits.double().log_softmax(0).tolist()
    request = make_request(
        prompt_ids=[0, 2],
        temperature=0.6,
        repetition_penalty=1.5,
        logit_bias={1: -5.0},
        seed=seed,
        logprobs=num_top,
    )
    result = sample_one(make_sampler(vocab_size), logits, request)
    assert isinstance(result, SampledToken)
    assert result.logprobs is not None
    assert result.logprobs.token_id == result.token_id
    assert result.logprobs.logprob == pytest.approx(expected[result.token_id], abs=1e-4)
    top_ids = [token_id for token_id, _ in result.logprobs.top]
    assert top_ids == ranked(logits.tolist())[:num_top]
    assert [value for _, value in result.logprobs.top] == pytest.approx(
        [expected[token_id] for token_id in top_ids], abs=1e-4
    )


def test_only_rows_that_ask_get_logprobs() -> None:
    requests = [make_request(logprobs=1), make_request(), make_request(logprobs=0)]
    results = make_sampler(10).sample(torch.zeros(3, 10), requests)
    tops = [r.logprobs and len(r.logprobs.top) for r in results if isinstance(r, SampledToken)]
    assert tops == [1, None, 0]


def test_prompt_logprobs_belong_to_the_token_that_follows_each_row() -> None:
    logits = draw_logits(4, 30, seed=3)
    expected = logits.log_softmax(1)
    results = make_sampler(30).prompt_logprobs(logits, [5, 0, 29, 5], num_top=2)
    for row, (token_id, result) in enumerate(zip([5, 0, 29, 5], results, strict=True)):
        assert result.token_id == token_id
        assert result.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-5)
        values, ids = expected[row].topk(2)
        assert [token for token, _ in result.top] == ids.tolist()
        assert [value for _, value in result.top] == pytest.approx(values.tolist(), abs=1e-5)


# Failures


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"min_tokens": 9}], ids=str)
def test_logits_that_are_not_finite_fail_their_request_alone(
    bad: float, sampling: dict[str, Any]
) -> None:
    sampler = make_sampler(300)
    requests = [make_request(f"request-{row}", logprobs=2, **sampling) for row in range(3)]
    logits = draw_logits(3, 300, seed=4)
    healthy = sampler.sample(logits, requests)
    logits[1, 1] = bad  # 1 is an end token: masking it must not hide that the row is broken
    results = sampler.sample(logits, requests)
    error = results[1]
    assert isinstance(error, SamplingError)
    assert "--dtype float32" in error.message
    assert [results[0], results[2]] == [healthy[0], healthy[2]]


def test_a_row_without_any_possible_token_fails_alone() -> None:
    logits = torch.stack([torch.full((5,), -math.inf), torch.zeros(5)])
    broken, whole = make_sampler(5).sample(logits, [make_request(), make_request()])
    assert isinstance(broken, SamplingError)
    assert isinstance(whole, SampledToken)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_masks_every_token_is_refused_alone(temperature: float) -> None:
    masked = make_request(
        temperature=temperature, min_tokens=5, stop_token_ids=frozenset({0, 3, 4})
    )
    refused, whole = make_sampler(5).sample(torch.zeros(2, 5), [masked, make_request()])
    assert isinstance(refused, InvalidRequestError)
    assert refused.param == "min_tokens"
    assert "min_tokens=5" in refused.message
    assert isinstance(whole, SampledToken)


def test_penalties_that_overflow_are_refused_by_name() -> None:
    request = make_request(prompt_ids=[0], repetition_penalty=1e-38)
    refused = sample_one(make_sampler(3), torch.tensor([9.0, 1.0, 1.0]), request)
    assert isinstance(refused, InvalidRequestError)
    assert "repetition_penalty=1e-38" in refused.message


def test_prompt_logits_that_are_not_finite_are_refused() -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = math.nan
    with pytest.raises(SamplingError, match="in the prompt are not finite"):
        make_sampler(5).prompt_logprobs(logits, [0, 0], num_top=1)
