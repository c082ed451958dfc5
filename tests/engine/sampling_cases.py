"""Requests and logits for the tests of the sampler."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.sampler import SampledToken, Sampler
from sharelora_serve.errors import ServeError

CPU = torch.device("cpu")
EOS = frozenset({1, 2})

# The first example imports and warms what the others use, and other tests share the machine.
no_deadline = settings(deadline=None)
seeds = st.integers(0, 2**32 - 1)
vocab_sizes = st.integers(3, 600)  # below, at and above the block of the two-stage argmax


def make_request(
    request_id: str = "request",
    *,
    prompt_ids: Sequence[int] = (0,),
    output_ids: Sequence[int] = (),
    **sampling: Any,
) -> Request:
    return Request(
        request_id=request_id,
        adapter=None,
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(**{"max_tokens": 100, **sampling}),
        arrived_at=0.0,
        deliver=lambda output: None,  # noqa: ARG005
        output_ids=list(output_ids),
    )


def make_sampler(vocab_size: int, eos_token_ids: frozenset[int] = EOS) -> Sampler:
    return Sampler(vocab_size, eos_token_ids, CPU)


def draw_logits(*shape: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def draw_tied_logits(*shape: int, seed: int) -> Tensor:
    """Few distinct values, so that most tokens tie, as many do in float16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def token_ids_of(results: Sequence[SampledToken | ServeError]) -> list[int]:
    tokens = [result for result in results if isinstance(result, SampledToken)]
    assert len(tokens) == len(results), f"errors among {results}"
    return [token.token_id for token in tokens]


def sample_one(sampler: Sampler, logits: Tensor, request: Request) -> SampledToken | ServeError:
    (result,) = sampler.sample(logits[None], [request])
    return result


def ranked(values: Sequence[float]) -> list[int]:
    """Indices from the largest value to the smallest, the lowest index first among equals."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))
