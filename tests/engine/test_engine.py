"""Every way out of the engine: finished, aborted, refused, failed or stopped, one at a time."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.engine.batch import ScheduledRequest
from sharelora_serve.engine.request import FinishReason, Request
from sharelora_serve.engine.sampler import SampledToken
from sharelora_serve.engine.speculation import Speculator
from sharelora_serve.errors import (
    AdapterUnavailableError,
    SamplingError,
    ServeError,
)
from tests.engine.stepping import SteppedEngine, TinyModel
from tests.golden.adapters import write_adapters
from tests.golden.reference import folded, load_reference
from tests.tiny_models import write_tiny_model

NAMES = ["lora", "share-a", "share-ab"]
PATIENCE_SECONDS = 60.0
PROMPT = list(range(100, 150))


@dataclass(frozen=True, slots=True)
class Tiny:
    folder: Path
    model: TinyModel
    adapters: dict[str, Adapter]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Tiny:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", seed)
    adapters = write_adapters(folder / "adapters", load_reference(folder), seed, strength=0.5)
    return Tiny(folder, TinyModel(folder, folder / "adapters", torch.float32), adapters)


@pytest.fixture
def stepped(tiny: Tiny) -> Iterator[SteppedEngine]:
    with tiny.model.engine(NAMES) as engine:
        yield engine


def greedy(engine: SteppedEngine, adapter: str | None) -> list[int]:
    """An answer that the engine gives after whatever happened before."""
    answer = engine.alone(
        f"after-{len(engine.answers)}", adapter, PROMPT[:20], max_tokens=5, temperature=0.0
    )
    assert answer.error is None
    assert len(answer.token_ids) == 5
    engine.check_that_nothing_is_held()
    return answer.token_ids


def write_overflowing_adapter(folder: Path, hidden_size: int, kv_size: int) -> Path:
    """Finite factors, whose product with any input is not."""
    prefix = "base_model.model.model.layers.0.self_attn.v_proj"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, hidden_size), 1e30),
        f"{prefix}.lora_B.weight": torch.full((kv_size, 1), 1e30),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("adapter", [None, "share-a"])
def test_an_abort_frees_blocks_and_adapter_at_the_next_step(
    stepped: SteppedEngine, adapter: str | None
) -> None:
    stepped.submit("one", adapter, PROMPT, max_tokens=50, temperature=0.0)
    for _ in range(6):
        stepped.step()
    num_told = len(stepped.answers["one"].outputs)
    assert num_told > 0
    assert stepped.engine.stats().kv_blocks_used == 4
    stepped.engine.abort("one")
    stepped.step()
    stepped.check_that_nothing_is_held()
    stepped.step()
    assert len(stepped.answers["one"].outputs) == num_told


def test_an_abort_before_the_first_step_and_of_an_unknown_request_do_no_harm(
    stepped: SteppedEngine,
) -> None:
    stepped.submit("one", "lora", PROMPT, max_tokens=5)
    stepped.engine.abort("one")
    stepped.engine.abort("nobody")
    stepped.drain()
    assert stepped.answers["one"].outputs == []
    stepped.check_that_nothing_is_held()


def test_an_adapter_that_fails_to_load_fails_its_requests_alone(tiny: Tiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny.folder / "adapters" / "share-qkv", tmp_path / "damaged")
    weights = path / "adapter_model.safetensors"
    with tiny.model.engine(NAMES, host_bytes=1) as engine:  # so that each load reads the disk
        expected = {name: greedy(engine, name) for name in (None, "lora")}
        engine.publish("damaged", path)
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-100])
        for name in ("damaged", "lora", None):
            engine.submit(f"beside {name}", name, PROMPT[:20], max_tokens=5, temperature=0.0)
        engine.drain()
        failed = engine.answers["beside damaged"]
        assert failed.finish_reason is FinishReason.ERROR
        assert isinstance(failed.error, AdapterUnavailableError)
        assert failed.error.status == 503
        assert "damaged" in failed.error.message
        assert failed.token_ids == []
        for name in ("lora", None):
            assert engine.answers[f"beside {name}"].token_ids == expected[name]
            assert greedy(engine, name) == expected[name]
        weights.write_bytes(whole)
        engine.publish("damaged", path)  # so that it is tried again at once
        assert greedy(engine, "damaged") != expected[None]


def test_a_failing_step_fails_the_requests_in_its_batch_and_the_engine_goes_on(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.model.engine(NAMES, max_running=2) as engine:
        expected = greedy(engine, "share-ab")
        run = engine.engine._runner.run

        def fail(scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, list[slice]]:
            if any(item.request.request_id in ("first", "second") for item in scheduled):
                raise RuntimeError("injected")
            return run(scheduled)

        for request_id in ("first", "second", "third"):
            engine.submit(request_id, "share-ab", PROMPT[:20], max_tokens=5, temperature=0.0)
        engine.step()
        engine.step()
        assert engine.engine.stats().num_running == 2
        monkeypatch.setattr(engine.engine._runner, "run", fail)
        engine.step()
        monkeypatch.setattr(engine.engine._runner, "run", run)
        for request_id in ("first", "second"):
            assert engine.answers[request_id].finish_reason is FinishReason.ERROR
            error = engine.answers[request_id].error
            assert isinstance(error, ServeError)
            assert error.status == 500
            assert "injected" not in error.message  # what went wrong inside is for the log
        engine.drain()
        assert engine.answers["third"].token_ids == expected
        assert greedy(engine, "share-ab") == expected


class Scripted(Speculator):
    """Drafts one request's answer, which it knows."""

    def __init__(self, request_id: str, token_ids: list[int]) -> None:
        super().__init__(8)
        self._request_id = request_id
        self._token_ids = token_ids

    def _draft(self, request: Request, most: int) -> list[int]:
        at = len(request.output_ids)
        return self._token_ids[at : at + most] if request.request_id == self._request_id else []


@pytest.mark.parametrize("is_told", [True, False])
def test_what_fails_after_a_drafts_first_token_leaves_nothing_behind(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    with tiny.model.engine(NAMES) as engine:
        expected = greedy(engine, "share-ab")
    with tiny.model.engine(NAMES, speculator=Scripted("long", expected)) as engine:
        sample = engine.engine._sampler.sample

        def fail(logits: Tensor, requests: Sequence[Request]) -> list[SampledToken | ServeError]:
            if [request.request_id for request in requests] != ["long"]:
                return sample(logits, requests)
            if is_told:
                return [SamplingError("injected")]
            raise RuntimeError("injected")

        for request_id, max_tokens in (("long", 5), ("short", 2)):
            engine.submit(
                request_id, "share-ab", PROMPT[:20], max_tokens=max_tokens, temperature=0.0
            )
        while engine.engine.stats().num_running < 2 or not engine.answers["short"].outputs:
            engine.step()
        monkeypatch.setattr(engine.engine._sampler, "sample", fail)
        engine.step()  # "short" ends with it, before the second token of "long" is chosen
        monkeypatch.setattr(engine.engine._sampler, "sample", sample)
        long, short = engine.answers["long"], engine.answers["short"]
        assert long.finish_reason is FinishReason.ERROR
        if is_told:
            assert long.token_ids == expected[:2]
            assert short.token_ids == expected[:2]
            assert short.finish_reason is FinishReason.LENGTH
        else:
            assert short.finish_reason is FinishReason.ERROR
        engine.check_that_nothing_is_held()
        assert greedy(engine, "share-ab") == expected


def test_an_adapter_that_overflows_fails_its_requests_alone_and_leaves_nothing_behind(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny.model.config
    path = write_overflowing_adapter(
        tmp_path / "huge", config.hidden_size, config.num_kv_heads * config.head_dim
    )
    # Few blocks, so that the next requests get those that it filled with NaN.
    with tiny.model.engine(NAMES, num_blocks=10, prefix_caching=False) as engine:
        expected = {name: greedy(engine, name) for name in (None, "lora")}
        engine.publish("huge", path)
        engine.submit("plain", "huge", PROMPT[:20], max_tokens=5, temperature=0.0)
        engine.submit("echoed", "huge", PROMPT[:20], max_tokens=5, prompt_logprobs=0)
        for name in (None, "lora"):
            engine.submit(f"beside {name}", name, PROMPT[:20], max_tokens=5, temperature=0.0)
        engine.drain()
        for request_id in ("plain", "echoed"):
            error = engine.answers[request_id].error
            assert isinstance(error, ServeError)
            assert "not finite" in error.message
        for name in (None, "lora"):
            assert engine.answers[f"beside {name}"].token_ids == expected[name]
            assert greedy(engine, name) == expected[name]


@pytest.mark.parametrize("adapter", [None, "share-ab"])
@pytest.mark.parametrize("length", [1, 2, 16, 50])
def test_no_new_tokens_but_the_prompts_logprobs_are_those_of_the_folded_model(
    tiny: Tiny, stepped: SteppedEngine, adapter: str | None, length: int
) -> None:
    model = load_reference(tiny.folder)
    prompt_ids = PROMPT[:length]
    with folded(model, None if adapter is None else tiny.adapters[adapter]), torch.no_grad():
        logprobs = model(torch.tensor([prompt_ids])).logits[0].log_softmax(-1)
    answer = stepped.alone("one", adapter, prompt_ids, max_tokens=0, prompt_logprobs=2)
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.token_ids == []
    (found,) = answer.prompt_logprobs
    assert len(found) == length
    assert found[0] is None
    for position, item in enumerate(found[1:], start=1):
        expected = logprobs[position - 1]
        assert item is not None
        assert item.token_id == prompt_ids[position]
        assert item.logprob == pytest.approx(float(expected[item.token_id]), abs=1e-4)
        assert [value for _, value in item.top] == pytest.approx(
            expected.topk(2).values.tolist(), abs=1e-4
        )
    stepped.check_that_nothing_is_held()


def test_prompt_logprobs_are_told_once_even_to_a_request_that_was_preempted(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES) as roomy:
        expected = roomy.alone(
            "second", "lora", PROMPT[:30], max_tokens=20, prompt_logprobs=1, temperature=0.0
        )
        assert len(expected.prompt_logprobs) == 1
    with tiny.model.engine(NAMES, num_blocks=5) as engine:
        engine.submit("first", None, PROMPT[:30], max_tokens=20, temperature=0.0)
        engine.submit(
            "second", "lora", PROMPT[:30], max_tokens=20, prompt_logprobs=1, temperature=0.0
        )
        engine.drain()
        assert engine.engine.stats().num_preemptions > 0
        assert engine.answers["second"].told == expected.told
        engine.check_that_nothing_is_held()
