"""Several adapters at once: each answers as itself."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.models.config import load_model_config
from sharelora_serve.server.codec import TextCodec
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.test_completions import PROMPT, answer, choice
from tests.golden.reference import load_reference, reference_greedy

NUM_TOKENS = 32
PROMPTS = (PROMPT, "The sea", "def main():", "日本の")


def test_adapters_in_one_batch_answer_as_each_does_alone_and_differently(client: OpenAI) -> None:
    cases = [(model, prompt) for prompt in PROMPTS for model in (BASE, *NAMES)]

    def ask(case: tuple[str, str]) -> str:
        model, prompt = case
        return answer(client, prompt, model=model, max_tokens=NUM_TOKENS)

    alone = [ask(case) for case in cases]
    assert len(set(alone)) == len(cases)
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(3):
            assert list(pool.map(ask, cases)) == alone


@pytest.mark.parametrize("name", [None, *NAMES])
def test_an_adapters_answer_is_that_of_the_base_with_the_adapter_folded_in(
    name: str | None,
    client: OpenAI,
    codec: TextCodec,
    model_folder: Path,
    adapters_folder: Path,
) -> None:
    layout = load_model_config(model_folder).layout(BASE)
    adapter = None if name is None else read_adapter(adapters_folder / name, layout, name=name)
    prompt_ids = codec.encode(PROMPT, add_special_tokens=True)
    expected = reference_greedy(load_reference(model_folder), adapter, prompt_ids, NUM_TOKENS)
    shown = choice(client, model=name or BASE, max_tokens=NUM_TOKENS, logprobs=0)
    assert shown.logprobs is not None
    assert shown.logprobs.tokens is not None
    clear = slice(expected.count_clear())
    assert shown.logprobs.tokens[clear] == [codec.token_text(i) for i in expected.token_ids[clear]]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_the_version_that_answered_is_in_a_header(
    route: str, streams: bool, http: httpx.Client, client: OpenAI
) -> None:
    for name in (BASE, *NAMES):
        body = {"model": name, "max_tokens": 2, "stream": streams}
        given = (
            {"prompt": PROMPT}
            if route == "completions"
            else {"messages": [{"role": "user", "content": "Hello"}]}
        )
        response = http.post(f"/v1/{route}", json=body | given)
        version = response.headers["x-adapter-version"]
        if name == BASE:
            assert version == "base"
        else:
            assert len(version) == 64
            assert version == client.models.retrieve(name).to_dict()["root"]
