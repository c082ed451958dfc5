"""How far half precision is from float32, over the whole vocabulary, on the embedded base."""

import queue
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sharelora_serve.config import ServeConfig
from sharelora_serve.engine.batch import ScheduledRequest
from sharelora_serve.engine.load import Loaded
from sharelora_serve.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from sharelora_serve.models.embedded import embedded_base_folder
from tests.golden.adapters import write_adapters
from tests.golden.bases import QUESTION, STORY
from tests.golden.reference import folded, load_reference
from tests.golden.serving import DEADLINE_SECONDS, running_engine, version_of

OWNERS = (None, "lora", "lora-rank-61", "share-a", "share-ab", "rslora")
TEXTS = (
    STORY,
    QUESTION,
    "<|im_start|>user\nWrite a function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1)",
)
SEED = 16
"""Of the adapters: not fresh, since docs/performance.md states what is measured here."""

NUM_LIKELY = 20
"""Tokens compared at each position for their log probability: those that sampling draws."""

MAX_DIFFERENCE = {
    ("float16", "auto"): (0.15, 0.1),
    ("bfloat16", "auto"): (1.0, 0.6),
    ("float16", "int8"): (0.6, 0.35),
}
"""Of any logit, and of the log probability of a likely token, from float32's; by type of the base
and of adapters.

Two to three times what is measured, since other processors round in another order.
"""


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of each text under each owner, and the float32 logits of Hugging Face for them."""

    adapters_folder: Path
    texts: list[tuple[str | None, list[int]]]
    logits: list[Tensor]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = embedded_base_folder()
    model, tokenizer = load_reference(folder), AutoTokenizer.from_pretrained(folder)
    adapters_folder = tmp_path_factory.mktemp("adapters")
    names = [name for name in OWNERS if name is not None]
    adapters = write_adapters(adapters_folder, model, SEED, strength=0.4, names=names)
    asked: list[tuple[str | None, list[int]]] = []
    logits: list[Tensor] = []
    for owner in OWNERS:
        with folded(model, None if owner is None else adapters[owner]), torch.inference_mode():
            for text in TEXTS:
                token_ids: list[int] = tokenizer.encode(text)
                asked.append((owner, token_ids))
                logits.append(model(torch.tensor([token_ids])).logits[0])
    return Texts(adapters_folder, asked, logits)


def served_logits(
    loaded: Loaded, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tensor]:
    """The logits at every position of each text, all computed together, by the real engine."""
    chunks: defaultdict[str, list[Tensor]] = defaultdict(list)
    engine = loaded.engine
    run = engine._runner.run

    def run_and_record(scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, list[slice]]:
        logits, rows = run(scheduled)
        for item, its_rows in zip(scheduled, rows, strict=True):
            chunks[item.request.request_id].append(logits[its_rows].clone())
        return logits, rows

    monkeypatch.setattr(engine._runner, "run", run_and_record)
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    for index, (owner, token_ids) in enumerate(texts.texts):
        engine.submit(
            Request(
                request_id=str(index),
                adapter=None if owner is None else version_of(loaded, owner),
                prompt_ids=token_ids,
                sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
                arrived_at=time.monotonic(),
                deliver=outputs.put,
            )
        )
    for _ in texts.texts:
        output = outputs.get(timeout=DEADLINE_SECONDS)
        assert output.finish_reason is FinishReason.LENGTH, output.error
    for index in range(len(texts.texts)):
        yield torch.cat(chunks[str(index)])


@pytest.mark.parametrize(("dtype", "adapter_dtype"), MAX_DIFFERENCE)
def test_half_precision_stays_near_float32(
    texts: Texts, dtype: str, adapter_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(
        adapters=texts.adapters_folder,
        device="cpu",
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        threads=2,
    )
    max_logit = max_logprob = total = 0.0
    num_positions = num_same_choice = 0
    with running_engine(config) as loaded:
        for found, expected in zip(
            served_logits(loaded, texts, monkeypatch), texts.logits, strict=True
        ):
            assert found.shape == expected.shape
            difference = (found - expected).abs()
            likely = expected.topk(NUM_LIKELY).indices
            logprobs = found.log_softmax(-1) - expected.log_softmax(-1)
            max_logit = max(max_logit, float(difference.max()))
            max_logprob = max(max_logprob, float(logprobs.gather(1, likely).abs().max()))
            total += float(difference.mean(1).sum())
            num_positions += len(found)
            num_same_choice += int((found.argmax(1) == expected.argmax(1)).sum())
    measured = (
        f"{dtype}, adapters {adapter_dtype}: logits differ by up to {max_logit:.2g} "
        f"({total / num_positions:.2g} on average), log probabilities of likely tokens by up to "
        f"{max_logprob:.2g}; {num_same_choice} of {num_positions} greedy choices are the same"
    )
    logit_bound, logprob_bound = MAX_DIFFERENCE[dtype, adapter_dtype]
    assert max_logit < logit_bound, measured
    assert max_logprob < logprob_bound, measured
