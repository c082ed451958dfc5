"""How the next token is chosen, seen from outside."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from openai import OpenAI

from sharelora_serve.server.codec import TextCodec
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.test_completions import PROMPT, answer, choice, complete


def test_a_seed_repeats_its_answer_whatever_else_is_running(client: OpenAI) -> None:
    def draw(seed: int, model: str = BASE, **fields: object) -> str:
        return answer(client, model=model, temperature=1.0, seed=seed, **fields)

    cases = [(seed, model) for seed in range(4) for model in (BASE, *NAMES)]
    alone = [draw(*case) for case in cases]
    assert len(set(alone)) == len(cases)
    with ThreadPoolExecutor(len(cases)) as pool:
        others = [pool.submit(draw, seed, BASE, max_tokens=60) for seed in range(100, 104)]
        assert list(pool.map(draw, *zip(*reversed(cases), strict=True))) == alone[::-1]
        assert len({other.result() for other in others}) == 4


def test_without_a_seed_answers_differ(client: OpenAI) -> None:
    assert answer(client, temperature=1.0) != answer(client, temperature=1.0)
    texts = [item.text for item in complete(client, PROMPT, temperature=1.0, n=4).choices]
    assert len(set(texts)) == 4


def test_n_answers_of_a_seed_are_those_of_the_seeds_that_follow(client: OpenAI) -> None:
    together = complete(client, PROMPT, temperature=1.0, seed=7, n=3)
    assert [item.text for item in together.choices] == [
        answer(client, temperature=1.0, seed=seed) for seed in (7, 8, 9)
    ]


def test_top_k_of_one_top_p_near_zero_and_min_p_of_one_are_greedy(client: OpenAI) -> None:
    greedy = answer(client)
    hot = {"temperature": 2.0, "seed": 3}
    assert answer(client, **hot) != greedy
    for field in {"top_k": 1}, {"min_p": 1.0}:
        assert answer(client, **hot, extra_body={"ignore_eos": True, **field}) == greedy
    assert answer(client, **hot, top_p=1e-9) == greedy


def test_top_k_draws_from_the_likeliest_only(client: OpenAI) -> None:
    shown = choice(
        client,
        temperature=2.0,
        logprobs=3,
        max_tokens=60,
        extra_body={"top_k": 3, "ignore_eos": True},
    )
    logprobs = shown.logprobs
    assert logprobs is not None
    assert all(len(top or {}) <= 3 for top in logprobs.top_logprobs or [])


def test_logit_bias_forces_and_forbids(client: OpenAI, codec: TextCodec) -> None:
    (red,) = codec.encode(" red", add_special_tokens=False)
    (blue,) = codec.encode(" blue", add_special_tokens=False)
    assert answer(client, logit_bias={str(red): 100}, max_tokens=3) == " red red red"
    bias = {str(red): 100, str(blue): 100}
    assert set(answer(client, logit_bias=bias, max_tokens=20, temperature=1.0).split()) <= {
        "red",
        "blue",
    }
    first = choice(client, logprobs=0, max_tokens=1).logprobs
    assert first is not None
    assert first.tokens is not None
    token_ids = codec.encode(first.tokens[0], add_special_tokens=False)
    if len(token_ids) == 1:  # else a part of a character
        forbidden = choice(client, logprobs=0, logit_bias={str(token_ids[0]): -100}).logprobs
        assert forbidden is not None
        assert first.tokens[0] not in (forbidden.tokens or [])


def test_penalties_end_a_repetition(client: OpenAI, codec: TextCodec) -> None:
    (red,) = codec.encode(" red", add_special_tokens=False)
    forced = {"logit_bias": {str(red): 30}, "max_tokens": 24}
    assert answer(client, **forced) == " red" * 24
    by_frequency = answer(client, **forced, frequency_penalty=2.0)
    assert by_frequency.startswith(" red red")
    assert 2 <= by_frequency.count(" red") < 24


def test_presence_penalties_change_the_choice_only_for_tokens_that_were_there(
    client: OpenAI, codec: TextCodec
) -> None:
    (red,) = codec.encode(" red", add_special_tokens=False)
    body = {"logit_bias": {str(red): 11}, "max_tokens": 24}

    def tokens(presence_penalty: float) -> list[str]:
        logprobs = choice(client, **body, logprobs=0, presence_penalty=presence_penalty).logprobs
        assert logprobs is not None
        return logprobs.tokens or []

    plain, lowered, raised = tokens(0.0), tokens(2.0), tokens(-2.0)
    for other, seen in ((lowered, plain), (raised, raised)):
        differs = [at for at in range(24) if plain[at : at + 1] != other[at : at + 1]]
        if differs:  # a penalty dethrones a token that was there, a negative one crowns it
            assert seen[differs[0]] in seen[: differs[0]]


def test_a_repetition_penalty_keeps_tokens_of_prompt_and_answer_from_coming_again(
    client: OpenAI, codec: TextCodec
) -> None:
    body = {"ignore_eos": True, "repetition_penalty": 100.0}
    shown = choice(client, echo=True, logprobs=0, max_tokens=100, extra_body=body).logprobs
    assert shown is not None
    num_prompt = len(codec.encode(PROMPT, add_special_tokens=True))
    counts = Counter(token for token in shown.tokens or [] if not token.startswith("bytes:"))
    new_tokens = set((shown.tokens or [])[num_prompt:])
    assert all(counts[token] <= 1 for token in new_tokens)


def test_temperature_widens_the_choice(client: OpenAI) -> None:
    greedy = choice(client, logprobs=0).logprobs
    assert greedy is not None
    assert greedy.token_logprobs is not None
    assert all(one is not None and one < 0 for one in greedy.token_logprobs)
    texts = [answer(client, temperature=temperature, seed=1) for temperature in (0, 1e-6, 1.0, 2.0)]
    assert texts[0] == texts[1], "a temperature next to zero is greedy"
    assert all(a != b for a, b in pairwise(texts[1:]))
