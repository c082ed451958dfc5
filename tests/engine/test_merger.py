"""Merging by traffic in a running engine: what is exchanged, held, given back and told."""

import json
import logging
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.engine.merge_policy import MergePolicy
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.models.loader import ModelWeights
from tests.engine.stepping import Answer, SteppedEngine, TinyModel
from tests.golden.adapters import write_adapters
from tests.golden.reference import load_reference
from tests.tiny_models import write_tiny_model

NAMES = ("lora", "share-a", "attention-only")
OTHERS = (None, "share-a", "attention-only")
PATIENCE_SECONDS = 60.0
PROMPT = list(range(100, 130))
GREEDY = {"temperature": 0.0, "ignore_eos": True, "logprobs": 2}

PRODUCTS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Tiny:
    folder: Path
    model: TinyModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Tiny:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", seed)
    write_adapters(folder / "adapters", load_reference(folder), seed, 0.5, NAMES)
    return Tiny(folder, TinyModel(folder, folder / "adapters", torch.float32))


def eager(**thresholds: Any) -> MergePolicy:
    """Merges after a few tokens, and never rests."""
    chosen = {"merge_seconds": 0.0, "others_seconds": 0.0, "min_tokens": 1, "rest_seconds": 0.0}
    return MergePolicy(**{**chosen, **thresholds})


def never_again() -> MergePolicy:
    """Merges after a few tokens, once; the others' share never un-merges it."""
    return eager(others_share=1.0, rest_seconds=1e9)


def greedy(engine: SteppedEngine, adapter: str | None, max_tokens: int = 6) -> Answer:
    """An answer that the engine gives after whatever happened before."""
    name = f"{len(engine.answers)} to {adapter}"
    answer = engine.alone(name, adapter, PROMPT, max_tokens=max_tokens, **GREEDY)
    assert answer.error is None
    assert len(answer.token_ids) == max_tokens
    return answer


def merge(engine: SteppedEngine, name: str = "lora") -> None:
    """Traffic that merges an adapter."""
    greedy(engine, name)
    assert engine.engine.stats().merged_adapter == name


def bits(weights: ModelWeights) -> list[bytes]:
    return [getattr(weights.layers, product).tobytes() for product in PRODUCTS]


def test_what_is_merged_or_not_the_same_tokens_come_from_all(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES, prefix_caching=False) as engine:
        expected = {name: greedy(engine, name).token_ids for name in (None, *NAMES)}
    with tiny.model.engine(NAMES, prefix_caching=False, merge_policy=never_again()) as engine:
        merge(engine)
        for name in (None, *NAMES):
            assert greedy(engine, name).token_ids == expected[name], name
        for name in (None, *NAMES):  # and in one batch
            engine.submit(f"beside {name}", name, PROMPT, max_tokens=6, **GREEDY)
        engine.drain()
        for name in (None, *NAMES):
            assert engine.answers[f"beside {name}"].token_ids == expected[name], name
        assert engine.engine.stats().merged_adapter == "lora"
        engine.check_that_nothing_is_held()


def test_unmerging_restores_weights_and_logits_of_the_base_bit_for_bit(tiny: Tiny) -> None:
    decoder = tiny.model.decoder
    with tiny.model.engine(NAMES, prefix_caching=False, merge_policy=eager()) as engine:
        base, before = decoder.weights, bits(decoder.weights)
        first = greedy(engine, None)
        merge(engine)
        assert decoder.weights is not base
        assert all(now != was for now, was in zip(bits(decoder.weights), before, strict=True))
        assert bits(base) == before
        greedy(engine, None)  # nothing but others: the base is back with the first of them
        assert engine.engine.stats().merged_adapter is None
        assert decoder.weights is base
        assert bits(base) == before
        assert greedy(engine, None).told == first.told  # log probabilities to the last bit
        stats = engine.engine.stats()
        assert (stats.num_merges, stats.num_unmerges) == (1, 1)
        engine.check_that_nothing_is_held()


def test_weights_that_an_adapter_does_not_touch_are_shared_with_the_base(tiny: Tiny) -> None:
    decoder = tiny.model.decoder
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        base = decoder.weights
        merge(engine, "attention-only")
        assert decoder.weights.layers.qkv is not base.layers.qkv
        for product in ("o", "gate_up", "down", "input_norm", "cosine"):
            assert getattr(decoder.weights.layers, product) is getattr(base.layers, product)
        assert decoder.weights.embedding is base.embedding
        assert decoder.weights.head is base.head


def test_the_copy_of_the_weights_is_freed_with_the_unmerge(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        merge(engine)
        copies = [
            weakref.ref(getattr(tiny.model.decoder.weights.layers, product)) for product in PRODUCTS
        ]
        greedy(engine, None)
        assert engine.engine.stats().num_unmerges == 1
        assert [copy() for copy in copies] == [None] * len(PRODUCTS)


def test_an_adapter_merged_at_run_time_has_the_weights_of_one_merged_at_the_start(
    tiny: Tiny,
) -> None:
    at_start = TinyModel(tiny.folder, tiny.folder / "adapters", torch.float32, merged="lora")
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        merge(engine)
        assert bits(tiny.model.decoder.weights) == bits(at_start.decoder.weights)


def test_the_merged_adapter_is_never_evicted(tiny: Tiny) -> None:
    least = tiny.model.least_adapter_bytes(NAMES)
    with tiny.model.engine(NAMES, adapter_bytes=3 * least, merge_policy=never_again()) as engine:
        merge(engine)
        pages = engine.fold.pages
        for name in ("share-a", "attention-only", "share-a", None):
            greedy(engine, name)
        version = engine.versions["lora"]
        assert engine.engine.adapters.acquire(version) is pages
        engine.engine.adapters.release(version)


def test_the_merged_adapter_gives_way_to_one_that_finds_no_room_beside_it(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES) as engine:
        expected = greedy(engine, "share-a").token_ids
    least = tiny.model.least_adapter_bytes(NAMES)
    with tiny.model.engine(NAMES, adapter_bytes=least, merge_policy=never_again()) as engine:
        merge(engine)
        assert greedy(engine, "share-a").token_ids == expected
        assert engine.engine.stats().merged_adapter is None
        engine.check_that_nothing_is_held()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_merged_adapter_that_is_removed_or_replaced_is_unmerged_and_its_requests_go_on(
    tiny: Tiny, is_replaced: bool
) -> None:
    with tiny.model.engine(NAMES) as engine:
        expected = {name: greedy(engine, name, 12).token_ids for name in ("lora", None, "share-a")}
    # Whoever has the most tokens of a step is merged: in its first the first prompt fills it.
    policy = eager(merge_share=0.0, others_share=1.0, rest_seconds=1e9)
    with tiny.model.engine(NAMES, merge_policy=policy) as engine:
        for name in expected:
            engine.submit(f"to {name}", name, PROMPT, max_tokens=12, **GREEDY)
        while engine.engine.stats().merged_adapter is None:
            engine.step()
        assert engine.engine.stats().merged_adapter == "lora"
        if is_replaced:
            engine.publish("lora", tiny.folder / "adapters" / "share-a")
        else:
            engine.remove("lora")
        engine.step()
        assert engine.engine.stats().merged_adapter is None
        assert not engine.answers["to lora"].finish_reason
        engine.drain()
        for name, token_ids in expected.items():
            assert engine.answers[f"to {name}"].token_ids == token_ids, name
        if is_replaced:
            assert greedy(engine, "lora", 12).token_ids == expected["share-a"]
        engine.check_that_nothing_is_held()


def test_an_idle_server_unmerges_what_is_removed(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES, merge_policy=never_again()) as engine:
        merge(engine)
        assert not engine.step()
        assert engine.engine.stats().merged_adapter == "lora"
        engine.remove("lora")
        assert not engine.step()
        assert engine.engine.stats().merged_adapter is None
        assert engine.engine.adapters.stats().num_on_host == len(NAMES) - 1
        engine.check_that_nothing_is_held()


def test_others_that_come_while_it_is_folded_call_it_off(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        expected = greedy(engine, None).token_ids
        may_go_on = hold_folds(engine)
        greedy_without_waiting(engine, "lora")
        fold = engine.fold
        assert fold.merged_at is None
        greedy_without_waiting(engine, None)
        assert engine.fold is None
        may_go_on.set()
        assert fold.weights.result(PATIENCE_SECONDS) is None
        assert greedy(engine, None).token_ids == expected
        stats = engine.engine.stats()
        assert (stats.num_merges, stats.num_unmerges) == (0, 0)
        assert "adapter lora" in caplog.text
        assert "is not merged after all: others have 100% of the tokens" in caplog.text
        engine.check_that_nothing_is_held()


def hold_folds(engine: SteppedEngine) -> threading.Event:
    """Make folding wait for the event that is returned."""
    merger: Any = engine.engine._merger
    fold_weights, may_go_on = merger._fold_weights, threading.Event()

    def fold_later(adapter: Adapter, is_wanted: Callable[[], bool]) -> ModelWeights | None:
        while is_wanted() and not may_go_on.wait(0.01):
            pass
        weights: ModelWeights | None = fold_weights(adapter, is_wanted)
        return weights

    merger._fold_weights = fold_later
    return may_go_on


def greedy_without_waiting(engine: SteppedEngine, adapter: str | None) -> None:
    """Traffic beside a fold that does not end."""
    name = f"{len(engine.answers)} to {adapter}"
    engine.submit(name, adapter, PROMPT, max_tokens=4, **GREEDY)
    while engine.answers[name].finish_reason is None:
        engine.engine._take_inbox()
        engine.engine._step()
        time.sleep(0.001)


def test_a_fold_that_goes_on_changes_nothing_until_it_is_done(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES, merge_policy=never_again()) as engine:
        may_go_on = hold_folds(engine)
        base = tiny.model.decoder.weights
        for name in ("lora", None, "share-a", "lora"):
            greedy_without_waiting(engine, name)
            assert tiny.model.decoder.weights is base
            assert engine.engine.stats().merged_adapter is None
        may_go_on.set()
        engine.step()
        engine.step()
        assert engine.engine.stats().merged_adapter == "lora"


def test_an_adapter_too_large_for_the_weights_is_told_once_and_served_unmerged(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loud = shutil.copytree(tiny.folder / "adapters" / "lora", tmp_path / "loud")
    tensors = load_file(loud / "adapter_model.safetensors")
    louder = {key: tensor * 500 for key, tensor in tensors.items()}
    save_file(louder, loud / "adapter_model.safetensors")
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        engine.publish("loud", loud)
        for _ in range(3):
            greedy(engine, "loud")
        assert engine.engine.stats().merged_adapter is None
        told = [record.message for record in caplog.records if "cannot be merged" in record.message]
        assert len(told) == 1
        assert "times as large" in told[0]
        merge(engine, "lora")  # others may be
        engine.check_that_nothing_is_held()


def test_a_fold_that_fails_is_told_and_nothing_changes(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny.folder / "adapters" / "lora", tmp_path / "fragile")
    with tiny.model.engine([], host_bytes=1, merge_policy=never_again()) as engine:
        engine.publish("fragile", folder)
        engine.submit("one", "fragile", PROMPT, max_tokens=6, **GREEDY)
        engine.step()  # it is loaded
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "OTHER"}))
        engine.drain()
        assert engine.answers["one"].error is None
        assert len(engine.answers["one"].token_ids) == 6
        assert engine.engine.stats().merged_adapter is None
        assert "adapter fragile" in caplog.text
        assert "was not merged" in caplog.text
        engine.check_that_nothing_is_held()


def test_merging_and_unmerging_are_told_with_reason_and_seconds(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with tiny.model.engine(NAMES, merge_policy=eager()) as engine:
        merge(engine)
        greedy(engine, "share-a")
        messages = [r.message for r in caplog.records if r.name.endswith(".merger")]
    assert "merged adapter lora (version " in messages[0]
    assert "it has 100% of the tokens of the last 0 s; it took " in messages[0]
    assert "un-merged adapter lora (version " in messages[1]
    assert "others have 100% of the tokens" in messages[1]


def test_stop_does_not_wait_for_a_fold_to_end(tiny: Tiny) -> None:
    with tiny.model.engine(NAMES, merge_policy=never_again()) as stepped:
        hold_folds(stepped)  # for ever
        engine, done = stepped.engine, threading.Event()
        engine.start()
        engine.submit(
            Request(
                request_id="one",
                adapter=stepped.versions["lora"],
                prompt_ids=PROMPT,
                sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
                arrived_at=time.monotonic(),
                deliver=lambda output: done.set() if output.finish_reason else None,
            )
        )
        assert done.wait(PATIENCE_SECONDS)
        assert stepped.fold is not None
        assert not stepped.fold.weights.done()
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        stopping.join(PATIENCE_SECONDS)
        assert not stopping.is_alive()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_folded_as_they_are_stored(tiny: Tiny, dtype: torch.dtype) -> None:
    model = TinyModel(tiny.folder, tiny.folder / "adapters", dtype)
    with model.engine(NAMES, merge_policy=eager()) as engine:
        base, layout = model.decoder.weights, model.layout
        merge(engine)
        adapter = engine.engine.adapters.adapter(engine.versions["lora"])
        kernels: Any = model.decoder._kernels
        inputs, outputs = layout.shapes["mlp.down_proj"]
        for layer in range(layout.num_layers):
            pair = adapter.pairs[layer, "mlp.down_proj"]
            product = pair.b.to(dtype).float() @ pair.a.to(dtype).float()
            before = kernels.unpack(base.layers.down[layer], outputs, dtype)
            after = kernels.unpack(model.decoder.weights.layers.down[layer], outputs, dtype)
            assert after.shape == (outputs, inputs)
            assert torch.equal(after, (before.float() + pair.scaling * product).to(dtype))
            assert not torch.equal(after, before)
