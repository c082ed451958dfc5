"""Greedy requests through a real engine, all in flight at once, compared with reference answers."""

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.config import ServeConfig
from sharelora_serve.engine.load import Loaded, load_engine
from sharelora_serve.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from sharelora_serve.kernels.interface import Kernels
from tests.golden.reference import TOLERANCE, ReferenceAnswer

NUM_TOP = 5
"""Alternatives compared at every step, besides the chosen token."""

DEADLINE_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Case:
    """A greedy request: `num_tokens` after `prompt_ids` from an adapter, or None for the base."""

    adapter: str | None
    prompt_ids: list[int]
    num_tokens: int


@dataclass(slots=True)
class Served:
    """What the engine answered to a Case.

    first_order, last_order: where its first and last outputs stand among those of all cases
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    first_order: int | None = None
    last_order: int | None = None


@contextmanager
def running_engine(config: ServeConfig, kernels: Kernels | None = None) -> Iterator[Loaded]:
    """A started engine with a store of its own, stopped on leaving; see load_engine."""
    with TemporaryDirectory() as store:
        own = config.model_copy(update={"store": Path(store)})
        loaded = load_engine(own, kernels=kernels)
        loaded.engine.start()
        try:
            yield loaded
        finally:
            loaded.engine.stop()


def serve_together(loaded: Loaded, cases: Sequence[Case]) -> list[Served]:
    """Submit all cases before waiting for any; their answers in the same order.

    End tokens are ignored, so that every answer has its full length.
    """
    answers = [Served() for _ in cases]
    outputs: queue.SimpleQueue[tuple[int, RequestOutput]] = queue.SimpleQueue()
    for index, case in enumerate(cases):
        loaded.engine.submit(_request(loaded, index, case, outputs))
    num_left = len(cases)
    order = 0
    while num_left:
        index, output = outputs.get(timeout=DEADLINE_SECONDS)
        if output.error is not None:
            raise output.error
        answer = answers[index]
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs or []
        answer.num_cached_tokens = max(answer.num_cached_tokens, output.num_cached_tokens)
        if answer.first_order is None:
            answer.first_order = order
        answer.last_order = order
        order += 1
        if output.finish_reason is not None:
            assert output.finish_reason == FinishReason.LENGTH, f"{cases[index]}: {output}"
            num_left -= 1
    return answers


def version_of(loaded: Loaded, name: str) -> AdapterVersion:
    """What a public adapter's name stands for."""
    return loaded.registry.find(AdapterName(None, name)).version


def assert_equal(
    case: Case, served: Served, reference: ReferenceAnswer, tolerance: float = TOLERANCE
) -> None:
    """Tokens are the reference's, and log probabilities about that, as far as it is clear."""
    assert len(served.token_ids) == len(served.logprobs) == case.num_tokens
    num_clear = reference.count_clear(tolerance)
    who = f"{case.adapter or 'the base'}, prompt of {len(case.prompt_ids)} tokens"
    assert served.token_ids[:num_clear] == reference.token_ids[:num_clear], who
    for step, (found, expected) in enumerate(
        zip(served.logprobs[:num_clear], reference.logprobs[:num_clear], strict=True)
    ):
        assert found.token_id == served.token_ids[step], f"{who}, step {step}"
        token_ids = torch.tensor([found.token_id, *(token_id for token_id, _ in found.top)])
        logprobs = torch.tensor([found.logprob, *(logprob for _, logprob in found.top)])
        error = (logprobs - expected[token_ids]).abs().max()
        assert error < tolerance, f"{who}, step {step}: logprobs are off by {error:.1e}"
        # Not only right values for some tokens: they must be the likeliest tokens there are.
        error = (logprobs[1:] - expected.topk(NUM_TOP).values).abs().max()
        assert error < tolerance, f"{who}, step {step}: the top ones are off by {error:.1e}"


def _request(
    loaded: Loaded,
    index: int,
    case: Case,
    outputs: queue.SimpleQueue[tuple[int, RequestOutput]],
) -> Request:
    return Request(
        request_id=f"case-{index}",
        adapter=None if case.adapter is None else version_of(loaded, case.adapter),
        prompt_ids=case.prompt_ids,
        sampling=SamplingParams(
            max_tokens=case.num_tokens, temperature=0.0, ignore_eos=True, logprobs=NUM_TOP
        ),
        arrived_at=time.monotonic(),
        deliver=lambda output: outputs.put((index, output)),
    )
