"""All that a server does on a GPU, of every base, on one that stores nothing: see fake_device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sharelora_serve.adapters import pool
from sharelora_serve.adapters.adapter import PageTable
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.config import ServeConfig
from sharelora_serve.engine import device, load
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.load import Loaded, load_engine
from sharelora_serve.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from tests.cuda.fake_device import fake_cuda
from tests.golden.adapters import write_adapters
from tests.golden.reference import load_reference
from tests.tiny_models import ARCHITECTURES, write_tiny_model

ADAPTERS = ("lora", "share-a", "share-qkv-ab", "lora-rank-61", "some-layers")
MAX_STEPS = 500


class CopiesAtOnce:
    """In place of adapters.transfer.CopyStream, which needs a driver."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def page_locked(self, numbers: Tensor) -> Tensor:
        return numbers

    def copying(self) -> Any:
        return nullcontext()


@contextmanager
def fake_server(
    folder: Path, architecture: str, seed: int, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Iterator[Loaded]:
    """An engine on the fake device: one thread steps it and loads, as fakes are not for several."""
    write_tiny_model(folder / "base", architecture, seed)
    model = load_reference(folder / "base")
    write_adapters(folder / "adapters", model, seed, 0.5, names=ADAPTERS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(pool, "CopyStream", CopiesAtOnce)
    monkeypatch.setattr(load, "AdapterCache", partial(AdapterCache, num_loader_threads=0))
    monkeypatch.setattr(device, "cuda_graph", lambda _: lambda step: step)
    config = ServeConfig(
        **{
            "model": str(folder / "base"),
            "adapters": folder / "adapters",
            "store": folder / "store",
            "device": "cuda",
            "dtype": "bfloat16",
            "kv_memory": "32MiB",
            "max_running": 3,
            "max_batch_tokens": 64,
            "prefill_chunk": 24,
            **settings,
        }
    )
    with fake_cuda():
        loaded = load_engine(config)
        try:
            yield loaded
        finally:
            loaded.engine.stop()


def submit(
    loaded: Loaded, adapter: str | None, length: int, **sampling: Any
) -> list[RequestOutput]:
    """Queue a request; what it will have been told."""
    outputs: list[RequestOutput] = []
    version = None
    if adapter is not None:
        version = loaded.registry.find(AdapterName(None, adapter)).version
    loaded.engine._inbox.append(
        Request(
            request_id=f"{adapter}-{length}-{time.monotonic_ns()}",
            adapter=version,
            prompt_ids=[5] * length,
            sampling=SamplingParams(**{"max_tokens": 3, "ignore_eos": True, **sampling}),
            arrived_at=time.monotonic(),
            deliver=outputs.append,
        )
    )
    return outputs


def work(adapters: AdapterCache) -> None:
    """What the loader thread would do."""
    while adapters._num_jobs.acquire(blocking=False):
        adapters._next_job()()


def drain(engine: Engine) -> None:
    """Step until nothing is left."""
    for _ in range(MAX_STEPS):
        if engine.stats().num_running + engine.stats().num_waiting == 0:
            return
        engine._take_inbox()
        engine._step()
        work(engine.adapters)
    raise AssertionError("requests do not end")


def serve_some(loaded: Loaded) -> None:
    """A prompt in chunks beside decodes, then decodes, of the base and adapters."""
    answers = [submit(loaded, name, length) for name, length in ((None, 5), ("share-a", 40))]
    drain(loaded.engine)
    check(answers)


def serve_all(loaded: Loaded) -> None:
    """More adapters than there is room for, and every way to sample."""
    answers = [submit(loaded, name, 7) for name in ADAPTERS]
    answers += [
        submit(loaded, "lora", 70, logprobs=3, prompt_logprobs=2),
        submit(loaded, None, 7, temperature=0.7, top_k=20, top_p=0.9, min_p=0.1),
        submit(
            loaded,
            "share-a",
            9,
            temperature=1.0,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={3: 1.0},
            min_tokens=2,
        ),
    ]
    drain(loaded.engine)
    check(answers)


def check(answers: list[list[RequestOutput]]) -> None:
    for outputs in answers:
        assert outputs, "a request was told nothing"
        assert outputs[-1].error is None, outputs[-1].error
        assert outputs[-1].finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(
    ("architecture", "dtype", "adapter_dtype"),
    [
        *((architecture, "bfloat16", "auto") for architecture in ARCHITECTURES),
        ("qwen3", "float16", "auto"),
        ("qwen3", "float32", "auto"),
        ("qwen3", "bfloat16", "int8"),
    ],
)
def test_every_base_is_loaded_and_served(
    architecture: str,
    dtype: str,
    adapter_dtype: str,
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    with fake_server(tmp_path, architecture, seed, monkeypatch, **settings) as loaded:
        runner = loaded.engine._runner
        assert {part.device.type for part in runner._decoder._kv_cache} == {"cuda"}
        assert runner._arena.device.type == "cuda"
        serve_some(loaded)


@pytest.mark.parametrize("adapter_dtype", ["auto", "int8"])
def test_a_server_warms_up_evicts_merges_and_unmerges(
    adapter_dtype: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {"auto": 220 * 1024, "int8": 110 * 1024}[adapter_dtype]
    settings = {"adapter_dtype": adapter_dtype, "adapter_memory": room, "merge": "auto"}
    with fake_server(tmp_path, "smollm", seed, monkeypatch, **settings) as loaded:
        engine, runner = loaded.engine, loaded.engine._runner
        merger = engine._merger
        assert merger is not None
        engine._prepare_thread()
        serve_all(loaded)
        assert engine.adapters.stats().device_evictions > 0
        version = loaded.registry.find(AdapterName(None, "share-a")).version
        while not isinstance(pages := engine.adapters.acquire(version), PageTable):
            work(engine.adapters)
        with torch.inference_mode():
            folded = merger._fold_weights(engine.adapters.adapter(version), lambda: True)
        assert folded is not None
        runner.exchange(folded, (version, pages))
        serve_some(loaded)
        runner.exchange(merger._base, None)
        engine.adapters.release(version)
        serve_some(loaded)


def test_a_tensor_left_on_the_cpu_is_found(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_server(tmp_path, "llama", seed, monkeypatch) as loaded:
        decoder = loaded.engine._runner._decoder
        layers = decoder.weights.layers
        cosine = torch.zeros(layers.cosine.shape)
        decoder.weights = replace(decoder.weights, layers=replace(layers, cosine=cosine))
        outputs = submit(loaded, None, 5)
        with pytest.raises(RuntimeError, match="found at least two devices"):  # and the engine ends
            drain(loaded.engine)
    assert outputs[-1].finish_reason == FinishReason.ERROR


def test_a_type_that_no_product_takes_is_found(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_server(tmp_path, "llama", seed, monkeypatch) as loaded:
        decoder = loaded.engine._runner._decoder
        head = torch.zeros(decoder.weights.head.shape, device="cuda:0")
        decoder.weights = replace(decoder.weights, head=head)
        outputs = submit(loaded, None, 5)
        with pytest.raises(TypeError, match=r"aten\.mm"):
            drain(loaded.engine)
    assert outputs[-1].finish_reason == FinishReason.ERROR
