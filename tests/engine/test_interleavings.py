"""Whatever else is in the engine, each request gets the very answer that it gets alone."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numba
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharelora_serve.engine.request import Request
from sharelora_serve.engine.speculation import Speculator
from tests.engine.stepping import ROOMY_BYTES, Answer, SteppedEngine, TinyModel
from tests.golden.adapters import write_adapters
from tests.golden.reference import load_reference
from tests.tiny_models import write_tiny_model

OWNERS = (None, "lora", "share-a", "share-ab", "common-a-1", "common-a-2", "attention-only")
NAMES = tuple(name for name in OWNERS if name is not None)
MERGED = "share-qkv"

# One token in 11 ends an answer, so that some end early.
EOS_TOKEN_IDS = frozenset(range(5, 49152, 11))

SAMPLINGS = MappingProxyType(
    {
        "greedy": {"temperature": 0.0, "ignore_eos": True},
        "greedy with logprobs": {"temperature": 0.0, "ignore_eos": True, "logprobs": 2},
        "greedy to an end token": {"temperature": 0.0},
        "sampled": {"seed": 1},
        "sampled hot": {"temperature": 2.5, "seed": 2, "min_p": 0.01, "ignore_eos": True},
        "sampled without a seed": {"ignore_eos": True, "logprobs": 0},
        "nucleus": {"top_p": 0.8, "top_k": 50, "seed": 3, "min_tokens": 3},
        "penalised": {
            "temperature": 0.7,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.4,
            "logit_bias": {7: 4.0, 9: -50.0},
            "seed": 4,
        },
        "stopped by token ids": {
            "temperature": 0.0,
            "ignore_eos": True,
            "stop_token_ids": frozenset(range(0, 49152, 5)),
        },
        "echoed": {"temperature": 0.0, "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1},
    }
)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: which prompt and how many of its tokens, and what is to come after them."""

    owner: str | None
    text: int
    length: int
    max_tokens: int
    sampling: str


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancel the request that was submitted so many before the last."""

    back: int


@dataclass(frozen=True, slots=True)
class Room:
    """How tight the engine is. Four KV blocks are what the longest request needs.

    adapter_memory  times what the largest adapter needs
    """

    num_blocks: int
    adapter_memory: int
    host_bytes: int
    max_running: int
    spare_batch_tokens: int
    prefill_chunk: int
    prefix_caching: bool
    speculative_rows: int


class Prophet(Speculator):
    """Knows the answers by request id, and drafts them, but for every third token or so."""

    def __init__(self, max_rows: int, answers: dict[str, Answer]) -> None:
        super().__init__(max_rows)
        self._answers = answers
        self._drawn = random.Random(max_rows)

    def _draft(self, request: Request, most: int) -> list[int]:
        at = len(request.output_ids)
        coming = self._answers[request.request_id].token_ids[at : at + most]
        return [
            token_id if self._drawn.random() < 0.7 else self._drawn.randrange(49152)
            for token_id in coming + [0] * (most - len(coming))
        ]


ASKS = st.builds(
    Ask,
    owner=st.sampled_from(OWNERS),
    text=st.integers(0, 1),
    length=st.sampled_from([1, 2, 13, 14, 15, 16, 17, 30, 31, 32, 33, 48, 50]),
    max_tokens=st.sampled_from([0, 1, 2, 6, 10, 14]),
    sampling=st.sampled_from(sorted(SAMPLINGS)),
)
EVENTS = st.one_of(
    st.lists(ASKS, min_size=1, max_size=8), st.builds(Abort, st.integers(0, 5)), st.integers(1, 6)
)
ROOMS = st.builds(
    Room,
    num_blocks=st.integers(4, 9),
    adapter_memory=st.sampled_from([1, 2, 16]),
    host_bytes=st.sampled_from([1, 300_000, ROOMY_BYTES]),
    max_running=st.integers(1, 8),
    spare_batch_tokens=st.integers(0, 40),
    prefill_chunk=st.integers(1, 20),
    prefix_caching=st.booleans(),
    speculative_rows=st.sampled_from([0, 2, 8, 20]),
)


class Alone:
    """What a model answers to each request when nothing else is there, nor was before it."""

    def __init__(self, model: TinyModel, engine: SteppedEngine, texts: list[list[int]]) -> None:
        self.model = model
        self.texts = texts
        self._engine = engine
        self._answers: dict[tuple[Ask, str], Answer] = {}

    def submit(self, engine: SteppedEngine, ask: Ask, request_id: str) -> None:
        prompt_ids = self.texts[ask.text][: ask.length]
        sampling: dict[str, Any] = SAMPLINGS[ask.sampling]
        engine.submit(request_id, ask.owner, prompt_ids, max_tokens=ask.max_tokens, **sampling)

    def answer(self, ask: Ask, request_id: str) -> Answer:
        """Without a seed the draws are those of the id, so it counts."""
        key = ask, request_id if ask.sampling == "sampled without a seed" else ""
        if key not in self._answers:
            self.submit(self._engine, ask, request_id)
            self._engine.drain()
            self._answers[key] = self._engine.answers[request_id]
        return self._answers[key]


@contextmanager
def one_thread() -> Iterator[None]:
    """Batches are so small here that threads would mostly wait for each other."""
    num_torch, num_numba = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(num_torch)
    numba.set_num_threads(num_numba)


@pytest.fixture(
    scope="module",
    params=[("float32", None), ("float16", None), ("float32", MERGED), ("bfloat16", None)],
    ids=["float32", "float16", "float32-merged", "bfloat16"],
)
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> Iterator[Alone]:
    dtype, merged = request.param
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "base", "llama3-rope", seed)
    write_adapters(folder / "adapters", load_reference(folder / "base"), seed, strength=0.5)
    model = TinyModel(
        folder / "base",
        folder / "adapters",
        getattr(torch, dtype),
        merged=merged,
        eos_token_ids=EOS_TOKEN_IDS,
    )
    drawn = random.Random(seed)
    first = [drawn.randrange(3, 49152) for _ in range(50)]
    # The second begins as the first does, so that both share cached blocks.
    second = first[:20] + [drawn.randrange(3, 49152) for _ in range(30)]
    with model.engine(NAMES, prefix_caching=False) as engine, one_thread():
        yield Alone(model, engine, [first, second])


def test_any_interleaving_gives_each_request_the_answer_it_gets_alone(alone: Alone) -> None:
    happened: Counter[str] = Counter()

    @settings(max_examples=50, deadline=None)
    @given(room=ROOMS, events=st.lists(EVENTS, min_size=3, max_size=16))
    @example(
        room=Room(
            num_blocks=5,
            adapter_memory=1,
            host_bytes=1,
            max_running=4,
            spare_batch_tokens=40,
            prefill_chunk=20,
            prefix_caching=True,
            speculative_rows=8,
        ),
        events=[
            [Ask(None, 0, 30, 14, "greedy"), Ask(None, 1, 30, 14, "sampled hot")],
            [Ask("lora", 0, 17, 2, "greedy"), Ask("share-a", 0, 17, 2, "greedy")],
            60,
            [Ask("lora", 0, 17, 2, "greedy"), Ask("share-a", 0, 17, 2, "greedy")],
            60,
            [Ask("share-a", 0, 31, 2, "greedy")],
        ],
    )
    @example(  # with room for drafts
        room=Room(
            num_blocks=9,
            adapter_memory=16,
            host_bytes=ROOMY_BYTES,
            max_running=2,
            spare_batch_tokens=40,
            prefill_chunk=20,
            prefix_caching=True,
            speculative_rows=8,
        ),
        events=[[Ask(None, 0, 17, 14, "greedy"), Ask("lora", 1, 13, 14, "sampled hot")], 60],
    )
    def run(room: Room, events: list[list[Ask] | Abort | int]) -> None:
        happened.update(check_interleaving(alone, room, events))

    run()
    # Otherwise this would prove less than it says; the examples alone have them all.
    assert all(
        happened[what] > 0
        for what in ("preemptions", "evictions", "disk loads", "hits", "accepted", "rejected")
    )


def check_interleaving(
    alone: Alone, room: Room, events: list[list[Ask] | Abort | int]
) -> dict[str, int]:
    """Run the events and compare every request with itself alone; how often what happened."""
    all_asks = [ask for event in events if isinstance(event, list) for ask in event]
    expected = {
        f"request-{number}": alone.answer(ask, f"request-{number}")
        for number, ask in enumerate(all_asks)
    }
    asks: dict[str, Ask] = {}
    aborted_after: dict[str, int] = {}  # how much had been told by then
    with alone.model.engine(
        NAMES,
        num_blocks=room.num_blocks,
        adapter_bytes=room.adapter_memory * alone.model.least_adapter_bytes(NAMES),
        host_bytes=room.host_bytes,
        max_running=room.max_running,
        max_batch_tokens=room.max_running + room.spare_batch_tokens,
        prefill_chunk=min(room.prefill_chunk, room.max_running + room.spare_batch_tokens),
        prefix_caching=room.prefix_caching,
        speculator=Prophet(room.speculative_rows, expected),
    ) as engine:
        for event in events:
            if isinstance(event, list):
                for ask in event:
                    request_id = f"request-{len(asks)}"
                    asks[request_id] = ask
                    alone.submit(engine, ask, request_id)
            elif isinstance(event, Abort):
                if event.back < len(asks):
                    request_id = list(asks)[-1 - event.back]
                    engine.engine.abort(request_id)
                    num_told = len(engine.answers[request_id].told)
                    aborted_after.setdefault(request_id, num_told)
            else:
                for _ in range(event):
                    engine.step()
        engine.drain()
        engine.check_that_nothing_is_held()
        answers = engine.answers
        stats, adapters = engine.engine.stats(), engine.engine.adapters.stats()
    for request_id in asks:
        found, told = answers[request_id], expected[request_id].told
        if request_id in aborted_after:
            num_told = aborted_after[request_id]
            assert len(found.told) == num_told, "told something after its abort"
        else:
            num_told = len(told)
            assert found.finish_reason is not None
        assert found.error is None
        # Log probabilities too, to the last bit.
        assert found.told == told[:num_told]
    return {
        "preemptions": stats.num_preemptions,
        "evictions": adapters.device_evictions,
        "disk loads": adapters.disk_loads,
        "hits": stats.prefix_cache_hits_tokens,
        "accepted": stats.num_accepted_tokens,
        "rejected": stats.num_draft_tokens - stats.num_accepted_tokens,
    }
