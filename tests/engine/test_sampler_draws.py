"""What the sampler may draw, how often it does, and the promises of a seed."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.sampler import LIKELIEST_WEIGHT, apply_penalties, candidates
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
)

# What may be drawn

truncations = {
    "temperature": st.floats(0.5, 3.0),
    "top_k": st.integers(0, 60),
    "top_p": st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    "min_p": st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
}


def probabilities(scores: Tensor, request: Request) -> Tensor:
    """What candidates gives each token of the vocabulary, float64."""
    token_ids, weights = candidates(scores, float(scores.max()), request.sampling)
    dense = torch.zeros(len(scores), dtype=torch.float64)
    dense[torch.arange(len(scores)) if token_ids is None else token_ids] = weights.double()
    return dense / dense.sum()


@no_deadline
@given(vocab_size=st.integers(3, 50), seed=seeds, **truncations)
def test_probabilities_equal_transformers_warpers(
    vocab_size: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = draw_logits(vocab_size, seed=seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(torch.LongTensor([[0]]), scores[None].double())[0].softmax(0)
    request = make_request(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(probabilities(scores, request), expected, rtol=1e-4, atol=1e-9)


def allowed(scores: Sequence[float], sampling: SamplingParams) -> set[int]:
    """The definition, by a full sort."""
    best = max(scores)
    chances = [math.exp((score - best) / sampling.temperature) for score in scores]
    kept = ranked(chances)
    if sampling.top_k > 0:
        kept = kept[: sampling.top_k]
    total = math.fsum(chances[token_id] for token_id in kept)
    reached = list(accumulate(chances[token_id] for token_id in kept))
    num_below = sum(mass < sampling.top_p * total for mass in reached)
    kept = kept[: num_below + 1]
    return {token_id for token_id in kept if chances[token_id] >= sampling.min_p}


@no_deadline
@given(vocab_size=st.integers(3, 200), seed=seeds, **truncations)
def test_the_tokens_kept_equal_the_definition_even_among_ties(
    vocab_size: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = draw_tied_logits(vocab_size, seed=seed)

    def keep(top_p: float, min_p: float) -> set[int]:
        sampling = SamplingParams(1, temperature, top_p, top_k, min_p)
        return allowed(scores.tolist(), sampling)

    request = make_request(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = set(probabilities(scores, request).nonzero().flatten().tolist())
    # A limit may fall on a token to within rounding; then both answers are right.
    rounding = 1e-5 if top_p < 1.0 else 0.0
    assert kept <= keep(top_p + rounding, min_p * (1 - 1e-5))
    assert kept >= keep(top_p - rounding, min_p * (1 + 1e-5))


def test_a_mass_reached_exactly_needs_no_further_token() -> None:
    scores = torch.zeros(8)
    for top_p, num_kept in [(0.25, 2), (0.250001, 3), (0.5, 4), (1.0, 8)]:
        kept = probabilities(scores, make_request(top_p=top_p)).nonzero().flatten()
        assert kept.tolist() == list(range(num_kept))


def test_weights_are_exact_at_the_ends_of_their_range() -> None:
    scores = torch.tensor([0.0, 5.0, -math.inf, -1000.0])
    _, weights = candidates(scores, 5.0, make_request(temperature=1e-5).sampling)
    assert weights.tolist() == [0, LIKELIEST_WEIGHT, 0, 0]


# Draws


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.4, "presence_penalty": 1.0, "logit_bias": {3: 2.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["seed", "position", "request_id"])
def test_draws_follow_the_probabilities(sampling: dict[str, Any], varied: str) -> None:
    """Chi-square, at one false alarm in 10**6; fixed seeds, but for requests without one."""
    num_draws, vocab_size = 2000, 16
    logits = draw_logits(vocab_size, seed=5, spread=1.5)
    sampler = make_sampler(vocab_size)
    output_ids = [3, 3, 4]

    def request(number: int) -> Request:
        if varied == "seed":
            return make_request(output_ids=output_ids, seed=number, **sampling)
        if varied == "request_id":
            return make_request(f"request-{number}", output_ids=output_ids, **sampling)
        return make_request(output_ids=[0] * number, seed=11, **sampling)

    if varied == "position":  # these outputs all hold token 0 alone
        output_ids = [0]
    scores = logits.clone()
    apply_penalties(scores, make_request(output_ids=output_ids, **sampling))
    expected = probabilities(scores, make_request(**sampling)) * num_draws

    first = 1 if varied == "position" else 0
    results = sampler.sample(
        logits.expand(num_draws, -1), [request(first + number) for number in range(num_draws)]
    )
    observed = torch.bincount(torch.tensor(token_ids_of(results)), minlength=vocab_size).double()

    assert not observed[expected == 0].any(), "a token outside the support was drawn"
    common = expected >= 5
    deviations = (observed - expected)[common].square() / expected[common]
    rare, rare_expected = observed[~common].sum(), expected[~common].sum()
    if rare_expected >= 5:
        deviations = torch.cat([deviations, ((rare - rare_expected) ** 2 / rare_expected)[None]])
    # Wilson and Hilferty's cube-root approximation; 4.75 standard deviations is 1e-6, one-sided.
    freedom = len(deviations) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert float(deviations.sum()) < limit, (observed.tolist(), expected.tolist())


# Seeds and batches

request_strategy = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_k": st.sampled_from([0, 0, 5]),
        "top_p": st.sampled_from([1.0, 1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "seed": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([{}, {3: 4.0}]),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 0, 4]),
        "output_ids": st.lists(st.integers(0, 99), max_size=4),
    }
)


@no_deadline
@given(
    rows=st.lists(request_strategy, min_size=1, max_size=6),
    vocab_size=st.sampled_from([100, 256, 997]),
    tied=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_each_request_gets_alone_what_it_gets_in_any_batch(
    rows: list[dict[str, Any]], vocab_size: int, tied: bool, seed: int, data: st.DataObject
) -> None:
    sampler = make_sampler(vocab_size)
    draw = draw_tied_logits if tied else draw_logits
    logits = draw(len(rows), vocab_size, seed=seed)
    requests = [make_request(f"request-{row}", **given_) for row, given_ in enumerate(rows)]
    alone = [sample_one(sampler, logits[row], request) for row, request in enumerate(requests)]
    order = data.draw(st.permutations(range(len(rows))))
    together = sampler.sample(logits[order], [requests[row] for row in order])
    assert together == [alone[row] for row in order]


def test_a_seed_gives_the_same_tokens_after_a_restart_and_among_strangers() -> None:
    vocab_size, num_tokens = 500, 20
    steps = draw_logits(num_tokens, vocab_size, seed=1)

    def generate(num_strangers: int) -> list[int]:
        sampler = make_sampler(vocab_size)
        request = make_request(f"request-{num_strangers}", seed=42)
        for step in steps:
            strangers = [make_request(f"stranger-{n}") for n in range(num_strangers)]
            logits = torch.cat([draw_logits(num_strangers, vocab_size, seed=2), step[None]])
            sampled = token_ids_of(sampler.sample(logits, [*strangers, request]))
            request.output_ids.append(sampled[-1])
        return request.output_ids

    assert generate(0) == generate(3)
    assert len(set(generate(0))) > 10, "the draws of one seed should differ by position"


def test_without_a_seed_draws_differ_between_requests_and_samplers_but_repeat() -> None:
    logits = torch.zeros(1000, 1000)
    requests = [make_request(f"request-{number}") for number in range(1000)]
    first, second = make_sampler(1000), make_sampler(1000)
    tokens = token_ids_of(first.sample(logits, requests))
    assert tokens == token_ids_of(first.sample(logits, requests)), "a preempted request is redone"
    assert len(set(tokens)) > 550  # 632 are expected of 1000 independent draws
    same = sum(
        a == b for a, b in zip(tokens, token_ids_of(second.sample(logits, requests)), strict=True)
    )
    assert same < 20  # 1 is expected
