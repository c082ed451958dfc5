"""An engine stepped by hand: what happens between two steps is for the test to say."""

import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, PageTable
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.pages import PoolFullError
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.merge import fold_adapter
from sharelora_serve.engine.merge_policy import MergePolicy
from sharelora_serve.engine.merger import Merger
from sharelora_serve.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from sharelora_serve.engine.runner import Runner
from sharelora_serve.engine.sampler import Sampler
from sharelora_serve.engine.scheduler import Scheduler
from sharelora_serve.engine.speculation import Speculator
from sharelora_serve.errors import AdapterInvalidError
from sharelora_serve.kernels.batch import BLOCK_SIZE
from sharelora_serve.kernels.cpu import CpuKernels
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.decoder import Decoder
from sharelora_serve.models.loader import ModelWeights, fold_weights, load_weights

MAX_BLOCKS = 64
"""KV blocks that the model has; an engine may be given fewer."""

MAX_BATCH_TOKENS = 128
MAX_MODEL_LEN = 512
CPU = torch.device("cpu")
ROOMY_BYTES = 16 * 1024**2

_NAN_BITS = {"float32": np.nan, "uint16": 0x7E00, "int16": 0x7FC0}  # as kernels.cpu stores types
_PATIENCE_SECONDS = 60.0
_MAX_STEPS = 5000


@dataclass(slots=True)
class Answer:
    """All that one request was told."""

    outputs: list[RequestOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for output in self.outputs for token_id in output.token_ids]

    @property
    def told(self) -> list[tuple[Any, ...]]:
        """What was said of each token, without what depends on the company it was computed in.

        With the last one, and alone if there is none, the finish reason.
        """
        told: list[tuple[Any, ...]] = []
        for output in self.outputs:
            if output.prompt_logprobs is not None:
                told.append(("prompt", output.prompt_logprobs))
            logprobs = output.logprobs or [None] * len(output.token_ids)
            told += zip(output.token_ids, logprobs, strict=True)
            if output.finish_reason is not None:
                told.append(("end", output.finish_reason))
        return told

    @property
    def prompt_logprobs(self) -> list[list[TokenLogprobs | None]]:
        """Those of every output that has some; a request is to be told once."""
        given = [output.prompt_logprobs for output in self.outputs]
        return [item for item in given if item is not None]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[-1].finish_reason if self.outputs else None

    @property
    def error(self) -> Exception | None:
        return self.outputs[-1].error if self.outputs else None


class TinyModel:
    """A base in memory, over which small engines are made; only one may have requests at a time.

    merged  the adapter of adapters_folder that is folded into the weights; None for none
    """

    def __init__(
        self,
        folder: Path,
        adapters_folder: Path,
        dtype: torch.dtype,
        *,
        merged: str | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.config = load_model_config(folder)
        self.adapters_folder = adapters_folder
        self.dtype = dtype
        self.layout = self.config.layout("tiny")
        self.eos_token_ids = eos_token_ids
        self.sampler = Sampler(self.config.vocab_size, eos_token_ids, CPU)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.merged = merged
        fold = None
        if merged is not None:
            adapter = read_adapter(adapters_folder / merged, self.layout, name=merged)
            fold = fold_adapter(adapter, dtype, dtype)
        kernels = CpuKernels()
        weights = load_weights(
            folder,
            self.config,
            dtype,
            kernels,
            device=CPU,
            max_positions=MAX_MODEL_LEN,
            fold=fold,
            on_layer=_ignore,
        )
        self.decoder = Decoder(
            self.config,
            weights,
            kernels,
            dtype=dtype,
            device=CPU,
            kv_blocks=MAX_BLOCKS + 1,
            max_tokens=MAX_BATCH_TOKENS,
        )

    @functools.cache  # noqa: B019 - the few models of a test run may live as long as it does
    def least_adapter_bytes(self, names: tuple[str, ...]) -> int:
        """The smallest adapter memory that holds any one of these, beside a merged one."""
        adapters = [
            read_adapter(self.adapters_folder / name, self.layout, name=name) for name in names
        ]
        merged = [
            read_adapter(self.adapters_folder / name, self.layout, name=name)
            for name in (self.merged,)
            if name is not None
        ]
        num_bytes = 16 * 1024
        while not all(self._fit(num_bytes, [*merged, adapter]) for adapter in adapters):
            num_bytes += 8 * 1024
        return num_bytes

    def _fit(self, num_bytes: int, adapters: list[Adapter]) -> bool:
        pool = MatrixPool(num_bytes, self.layout.feature_counts, self.dtype, CPU)
        try:
            for adapter in adapters:
                pool.place(pool.stage(adapter, self.layout))
        except (PoolFullError, AdapterInvalidError):
            return False
        return True

    @contextmanager
    def engine(
        self,
        names: Sequence[str],
        *,
        num_blocks: int = MAX_BLOCKS,
        adapter_bytes: int = ROOMY_BYTES,
        host_bytes: int = ROOMY_BYTES,
        max_running: int = 32,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        prefill_chunk: int = 32,
        max_queue: int = 1024,
        max_first_token_seconds: float | None = None,
        prefix_caching: bool = True,
        merge_policy: MergePolicy | None = None,
        speculator: Speculator | None = None,
    ) -> Iterator["SteppedEngine"]:
        """An engine with these adapters; memory that it has not written is NaN.

        Nothing is guessed ahead unless there is a speculator.
        With a policy adapters are merged by traffic; whatever happens, the base is restored.
        """
        wake = threading.Event()
        pool = MatrixPool(adapter_bytes, self.layout.feature_counts, self.dtype, CPU)
        pool.arena[pool._allocator.num_reserved :] = torch.nan
        for part in self.decoder._kv_cache:
            part.fill(_NAN_BITS[str(part.dtype)])
        versions: dict[str, AdapterVersion] = {}
        folders: dict[str, Path] = {}  # by digest

        def publish(name: str, folder: Path) -> AdapterVersion:
            adapter = read_adapter(folder, self.layout, name=name)
            pool.check(adapter)
            staged = pool.stage(adapter, self.layout)
            version, previous = AdapterVersion(name, adapter.digest), versions.get(name)
            versions[name], folders[adapter.digest] = version, folder
            adapters.admit(version, staged)
            if previous is not None:
                adapters.dismiss(previous)
            return version

        adapters = AdapterCache(
            self.layout,
            pool,
            host_bytes,
            lambda version: read_adapter(folders[version.digest], self.layout, name=version.name),
            on_change=wake.set,
        )
        base, merger = self.decoder.weights, None
        try:
            for name in names:
                publish(name, self.adapters_folder / name)
            kv_cache = KVCache(num_blocks + 1, BLOCK_SIZE, prefix_caching=prefix_caching)
            merged = None
            if self.merged is not None:
                version = publish(self.merged, self.adapters_folder / self.merged)
                merged = (version, _acquire(adapters, version, wake))
            runner = Runner(self.decoder, pool.arena, merged, CPU)
            if merge_policy is not None:
                merger = Merger(
                    runner,
                    base,
                    adapters,
                    merge_policy,
                    fold_weights=self._fold,
                )
            engine = Engine(
                base_name="tiny",
                tokenizer=self.tokenizer,
                vocab_size=self.config.vocab_size,
                eos_token_ids=self.eos_token_ids,
                max_model_len=MAX_MODEL_LEN,
                max_queue=max_queue,
                max_first_token_seconds=max_first_token_seconds,
                adapters=adapters,
                kv_cache=kv_cache,
                kv_memory_bytes=0,
                scheduler=Scheduler(
                    kv_cache,
                    adapters,
                    max_running=max_running,
                    max_batch_tokens=max_batch_tokens,
                    prefill_chunk=prefill_chunk,
                    prefill_per_decode=2,
                    speculator=speculator or Speculator(0),
                    are_rows_costly=True,
                ),
                runner=runner,
                sampler=self.sampler,
                merger=merger,
                prepare_thread=lambda: None,
                wake=wake,
                close=adapters.close,
            )
            yield SteppedEngine(engine, pool, wake, versions, publish, int(merged is not None))
        finally:
            if merger is not None:
                merger.close()
            self.decoder.weights = base
            adapters.close()

    def _fold(self, adapter: Adapter, is_wanted: Callable[[], bool]) -> ModelWeights | None:
        return fold_weights(
            self.decoder.weights,
            self.config,
            self.dtype,
            self.decoder._kernels,
            device=CPU,
            modules={module for _, module in adapter.pairs},
            fold=fold_adapter(adapter, self.dtype, self.dtype),
            is_wanted=is_wanted,
        )


class SteppedEngine:
    """An engine without its thread; adapters load between steps, so that runs repeat exactly.

    versions  what each adapter's name stands for
    publish   gives a name a folder's adapter
    """

    def __init__(
        self,
        engine: Engine,
        pool: MatrixPool,
        wake: threading.Event,
        versions: dict[str, AdapterVersion],
        publish: Callable[[str, Path], AdapterVersion],
        num_held: int,
    ) -> None:
        self.engine = engine
        self.pool = pool
        self.versions = versions
        self.publish = publish
        self.answers: dict[str, Answer] = {}
        self._wake = wake
        self._num_held = num_held  # adapters that are never released: the merged one

    @property
    def fold(self) -> Any:
        """What is merged by traffic, or on the way to it."""
        return self.engine._merger._fold if self.engine._merger is not None else None

    def submit(
        self, request_id: str, adapter: str | None, prompt_ids: list[int], **sampling: Any
    ) -> Request:
        """Queue a request; it is not seen before the next step."""
        answer = self.answers[request_id] = Answer()
        request = Request(
            request_id=request_id,
            adapter=None if adapter is None else self.versions[adapter],
            prompt_ids=prompt_ids,
            sampling=SamplingParams(**sampling),
            arrived_at=time.monotonic(),
            deliver=answer.outputs.append,
        )
        self.engine._inbox.append(request)
        return request

    def remove(self, name: str) -> None:
        """Take an adapter's name away from its version."""
        self.engine.adapters.dismiss(self.versions.pop(name))

    def step(self) -> bool:
        """What the engine's thread does in one turn, books checked; False if nothing could run."""
        self.engine._take_inbox()
        did_something = self.engine._step()
        self._finish_loads()
        if self.fold is not None:
            concurrent.futures.wait([self.fold.weights], _PATIENCE_SECONDS)
        scheduler = self.engine._scheduler
        live = [entry.request for entry in scheduler._entries.values()]
        self.engine._kv_cache.check_integrity(live)
        return did_something

    def drain(self) -> None:
        """Step until every request has ended; AssertionError if the engine gets stuck."""
        num_idle = 0
        for _ in range(_MAX_STEPS):
            did_something = self.step()
            if self.engine.stats().num_running + self.engine.stats().num_waiting == 0:
                return
            # One turn without a batch asks for an adapter, the next finds it loaded.
            num_idle = 0 if did_something else num_idle + 1
            assert num_idle < 4, "nothing runs, nothing loads, and requests wait"
        raise AssertionError("requests did not end")

    def alone(
        self, request_id: str, adapter: str | None, prompt_ids: list[int], **sampling: Any
    ) -> Answer:
        """The answer to one request with nothing else in the engine."""
        self.submit(request_id, adapter, prompt_ids, **sampling)
        self.drain()
        return self.answers[request_id]

    def check_that_nothing_is_held(self) -> None:
        """With every request gone: no blocks, no adapters in use, no leftovers, sound books."""
        engine = self.engine
        engine._kv_cache.check_integrity([])
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert not engine._requests
        assert not engine._prompt_logprobs
        assert not engine._scheduler.speculator._drafters
        num_held = self._num_held + (self.fold is not None)
        assert sum(entry.num_uses for entry in engine.adapters._entries.values()) == num_held
        self.pool.check_integrity()

    def _finish_loads(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            self._wake.clear()
            if not self.engine.adapters.stats().loads_in_progress:
                return
            assert time.monotonic() < deadline, "a load does not end"
            self._wake.wait(1.0)


def _acquire(adapters: AdapterCache, version: AdapterVersion, wake: threading.Event) -> PageTable:
    while True:
        wake.clear()
        pages = adapters.acquire(version)
        if not isinstance(pages, Waiting):
            return pages
        wake.wait(_PATIENCE_SECONDS)


def _ignore(_: int) -> None:
    """No progress bar."""
