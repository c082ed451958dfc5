"""How far half precision is from float32, over the whole vocabulary, on the embedded base."""

import queue
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
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
    """Token ids of each text under each owner, and the logits of Hugging Face for them.

    logits    in float32
    bfloat16  of the same model in bfloat16, adapters folded in before it was rounded
    """

    adapters_folder: Path
    texts: list[tuple[str | None, list[int]]]
    logits: list[Tensor]
    bfloat16: list[Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """Of logits from those of float32, and of the log probabilities of likely tokens."""

    max_logit: float
    mean_logit: float
    max_logprob: float
    num_same_choice: int
    num_positions: int

    def __str__(self) -> str:
        return (
            f"logits differ by up to {self.max_logit:.2g} ({self.mean_logit:.2g} on average), log "
            f"probabilities of likely tokens by up to {self.max_logprob:.2g}; "
            f"{self.num_same_choice} of {self.num_positions} greedy choices are the same"
        )


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> Difference:
    """How far the logits of all texts are from those of float32."""
    max_logit = max_logprob = total = 0.0
    num_positions = num_same_choice = 0
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        apart = (ours - exact).abs()
        likely = exact.topk(NUM_LIKELY).indices
        logprobs = ours.log_softmax(-1) - exact.log_softmax(-1)
        max_logit = max(max_logit, float(apart.max()))
        max_logprob = max(max_logprob, float(logprobs.gather(1, likely).abs().max()))
        total += float(apart.mean(1).sum())
        num_positions += len(ours)
        num_same_choice += int((ours.argmax(1) == exact.argmax(1)).sum())
    mean = total / num_positions
    return Difference(max_logit, mean, max_logprob, num_same_choice, num_positions)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    folder = embedded_base_folder()
    model, tokenizer = load_reference(folder), AutoTokenizer.from_pretrained(folder)
    adapters_folder = tmp_path_factory.mktemp("adapters")
    names = [name for name in OWNERS if name is not None]
    adapters = write_adapters(adapters_folder, model, SEED, strength=0.4, names=names)
    asked: list[tuple[str | None, list[int]]] = []
    logits: list[Tensor] = []
    bfloat16: list[Tensor] = []
    for owner in OWNERS:
        with folded(model, None if owner is None else adapters[owner]), torch.inference_mode():
            rounded = deepcopy(model)
            for parameter in rounded.parameters():  # not the rotary frequencies, as when loaded so
                parameter.data = parameter.data.bfloat16()
            for text in TEXTS:
                token_ids: list[int] = tokenizer.encode(text)
                asked.append((owner, token_ids))
                logits.append(model(torch.tensor([token_ids])).logits[0])
                bfloat16.append(rounded(torch.tensor([token_ids])).logits[0].float())
    return Texts(adapters_folder, asked, logits, bfloat16)


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
    with running_engine(config) as loaded:
        found = difference(served_logits(loaded, texts, monkeypatch), texts.logits)
    measured = f"{dtype}, adapters {adapter_dtype}: {found}"
    logit_bound, logprob_bound = MAX_DIFFERENCE[dtype, adapter_dtype]
    assert found.max_logit < logit_bound, measured
    assert found.max_logprob < logprob_bound, measured
    if dtype == "bfloat16":
        usual = difference(texts.bfloat16, texts.logits)
        assert found.mean_logit < usual.mean_logit, f"{measured}; Hugging Face: {usual}"
