"""The golden answers with the kernels of a GPU: their twins everywhere, they themselves on one."""

from collections.abc import Iterator

import pytest
import torch

from sharelora_serve.engine import load
from sharelora_serve.models.graphs import DecodeGraphs
from tests.cuda.recorded import record
from tests.cuda.steps import twin_kernels
from tests.golden.bases import EMBEDDED, Base, open_base
from tests.golden.reference import TOLERANCE, TOLERANCE_WHILE_MERGED
from tests.golden.serving import Case, Served, running_engine, serve_together
from tests.tiny_models import ARCHITECTURES, MAX_MODEL_LEN

MAX_RUNNING = 16


def assert_all_right(
    base: Base, cases: list[Case], answers: list[Served], tolerance: float = TOLERANCE
) -> None:
    for case, served in zip(cases, answers, strict=True):
        base.assert_right(case, served, tolerance)


def test_twins_of_the_kernels_and_of_graphs_give_these_tokens(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = twin_kernels(torch.float32)
    cpu = torch.device("cpu")
    graphs = DecodeGraphs(
        record,
        max_running=MAX_RUNNING,
        max_blocks=MAX_MODEL_LEN // kernels.block_size,
        device=cpu,
    )
    monkeypatch.setattr(load, "choose_graphs", lambda *_: graphs)
    with open_base("qwen2-sliding", seed) as base:
        cases = base.cases[::2]
        with running_engine(base.config(max_running=MAX_RUNNING), kernels) as loaded:
            answers = serve_together(loaded, cases)
        assert_all_right(base, cases, answers)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, EMBEDDED])
def base(request: pytest.FixtureRequest, seed: int) -> Iterator[Base]:
    with open_base(request.param, seed) as opened:
        yield opened


@pytest.mark.cuda
def test_every_form_on_a_gpu_gives_the_tokens_of_its_folded_model(base: Base) -> None:
    with running_engine(base.config(device="cuda", kv_memory="2GiB")) as loaded:
        answers = serve_together(loaded, base.cases)
    assert_all_right(base, base.cases, answers)


@pytest.mark.cuda
def test_chunks_eviction_and_reload_on_a_gpu_change_no_token(base: Base) -> None:
    tight = base.tight_config().model_copy(update={"device": "cuda", "kv_memory": 2 * 1024**3})
    with running_engine(tight) as loaded:
        answers = serve_together(loaded, base.cases)
        stats = loaded.engine.adapters.stats()
    assert_all_right(base, base.cases, answers)
    assert stats.device_evictions > 0


@pytest.mark.cuda
@pytest.mark.parametrize("merge", ["lora", "share-a"])
def test_beside_a_merged_adapter_on_a_gpu_everybody_gets_their_own_tokens(
    base: Base, merge: str
) -> None:
    with running_engine(base.config(device="cuda", kv_memory="2GiB", merge=merge)) as loaded:
        answers = serve_together(loaded, base.cases)
    assert_all_right(base, base.cases, answers, TOLERANCE_WHILE_MERGED)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_replayed_steps_equal_those_that_were_not_recorded(
    base: Base, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One request: a batch of one row is the same computation in both.
    config = base.config(device="cuda", dtype=dtype, kv_memory="2GiB", prefix_cache=False)
    with running_engine(config) as loaded:
        replayed = [serve_together(loaded, [case])[0] for case in base.shared_cases]
    monkeypatch.setattr(load, "choose_graphs", lambda *_: None)
    with running_engine(config) as loaded:
        eager = [serve_together(loaded, [case])[0] for case in base.shared_cases]
    for one, other in zip(replayed, eager, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
