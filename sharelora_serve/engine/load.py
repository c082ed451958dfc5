"""From a configuration to an engine that is ready to start: base, adapters, memory, threads."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, PageTable
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.folder import AdapterFolder
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.config import ServeConfig
from sharelora_serve.engine.batch import padding
from sharelora_serve.engine.device import (
    choose_device,
    choose_dtype,
    choose_graphs,
    choose_kernels,
    choose_prefill_chunk,
    choose_speculative_rows,
)
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.merge import fold_adapter
from sharelora_serve.engine.merge_policy import MergePolicy
from sharelora_serve.engine.merger import Merger
from sharelora_serve.engine.runner import Runner
from sharelora_serve.engine.sampler import Sampler
from sharelora_serve.engine.scheduler import Scheduler
from sharelora_serve.engine.speculation import Speculator
from sharelora_serve.errors import ConfigurationError, ModelNotFoundError, UnsupportedModelError
from sharelora_serve.kernels.batch import PAGE_RANK as KERNELS_PAGE_RANK
from sharelora_serve.kernels.cpu import CpuKernels
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.models.config import ModelConfig, load_model_config
from sharelora_serve.models.decoder import Decoder
from sharelora_serve.models.loader import ModelWeights, fold_weights, load_weights
from sharelora_serve.models.source import base_folder

logger = logging.getLogger(__name__)

# Rows of the batches that compile and touch everything before the first request: one decode, a
# few, and more than one task of attention.
_WARM_UP_TOKENS = (1, 3, 40)


@dataclass(frozen=True, slots=True)
class _Merged:
    """The adapter that is folded in, and its pages, which are never released."""

    version: AdapterVersion
    adapter: Adapter
    pages: PageTable


class Loaded(NamedTuple):
    """An engine, not started yet, and the names of the adapters that it serves.

    The engine's `stop` closes both.
    """

    engine: Engine
    registry: AdapterRegistry


def load_engine(
    config: ServeConfig, console: Console | None = None, *, kernels: Kernels | None = None
) -> Loaded:
    """Read the base and the adapters that changed, and assemble an engine.

    Progress goes to the console, if there is one. Adapters that cannot be served are logged and
    left out; the one that --merge names must be there. `kernels` compute instead of those that
    the configuration chooses.
    Raises ConfigurationError and UnsupportedModelError.
    """
    console = console or Console(quiet=True)
    folder = base_folder(config.model, console)
    model = load_model_config(folder)
    tokenizer = _tokenizer(folder)
    device = choose_device(config)
    dtype = choose_dtype(config, model, device)
    adapter_dtype = torch.int8 if config.adapter_dtype == "int8" else dtype
    kernels = kernels or choose_kernels(config, model, dtype, device)
    # The compiled kernels share torch's OpenMP runtime. Its threads spin while they wait for work,
    # but only as long as there are no more of them than processors: torch must not add its own.
    torch.set_num_threads(1 if isinstance(kernels, CpuKernels) else config.num_threads)
    layout = model.layout(config.base_name)
    wake = threading.Event()
    assert PAGE_RANK == KERNELS_PAGE_RANK, "the pool's pages are not those that the kernels read"
    pool = MatrixPool(config.adapter_memory, layout.feature_counts, adapter_dtype, device)
    store = AdapterStore(config.store_folder, layout)
    adapters = AdapterCache(
        layout,
        pool,
        config.adapter_host_memory,
        lambda version: store.read(version.digest),
        on_change=wake.set,
    )
    registry = AdapterRegistry(layout, store, pool, adapters, keep_versions=config.adapter_versions)
    watched = None if config.adapters is None else AdapterFolder(config.adapters, registry)

    def close() -> None:
        if watched is not None:
            watched.close()
        registry.close()
        adapters.close()
        store.close()

    try:
        # First: what the others may take is what it leaves.
        merged = _merge(config.merged_adapter, registry, watched, adapters, pool, wake)
        if watched is not None:
            _publish_folder(watched, console)
            watched.start()
        kv_cache, kv_memory_bytes = _kv_cache(config, model, kernels, dtype)
        max_model_len = _max_model_len(config, model, kv_cache.max_tokens)
        fold = None if merged is None else fold_adapter(merged.adapter, dtype, adapter_dtype)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("Loading the layers", total=model.num_layers)
            weights = load_weights(
                folder,
                model,
                dtype,
                kernels,
                device=device,
                max_positions=max_model_len,
                fold=fold,
                on_layer=lambda layer: progress.update(task, completed=layer + 1),
            )
        graphs = choose_graphs(kernels, device, config.max_running, max_model_len)
        decoder = Decoder(
            model,
            weights,
            kernels,
            dtype=dtype,
            device=device,
            kv_blocks=kv_cache.num_blocks + 1,  # and the padding block
            max_tokens=config.max_batch_tokens,
            graphs=graphs,
        )
    except BaseException:
        close()
        raise
    folded = None if merged is None else (merged.version, merged.pages)
    runner = Runner(decoder, pool.arena, folded, device)
    merger = None
    if config.merge == "auto":

        def fold_again(adapter: Adapter, is_wanted: Callable[[], bool]) -> ModelWeights | None:
            return fold_weights(
                weights,
                model,
                dtype,
                kernels,
                device=device,
                modules={module for _, module in adapter.pairs},
                fold=fold_adapter(adapter, dtype, adapter_dtype),
                is_wanted=is_wanted,
            )

        merger = Merger(
            runner,
            weights,
            adapters,
            MergePolicy(),
            fold_weights=fold_again,
        )
    eos_token_ids = _eos_token_ids(folder, model, tokenizer)
    logger.info(
        "base %s: %s, kernels %s, %s on %s, adapters %s, context %d, KV cache %d tokens",
        config.base_name,
        model.architecture,
        kernels.name,
        str(dtype).removeprefix("torch."),
        device,
        str(adapter_dtype).removeprefix("torch."),
        max_model_len,
        kv_cache.max_tokens,
    )

    def prepare_thread() -> None:
        numba.set_num_threads(min(config.num_threads, int(numba.config.NUMBA_NUM_THREADS)))
        with torch.inference_mode():
            decode_sizes = graphs.sizes if graphs is not None else []
            _warm_up(runner, layout, config.max_batch_tokens, kernels.block_size, decode_sizes)

    prefill_chunk, prefill_per_decode = choose_prefill_chunk(config, device)
    engine = Engine(
        base_name=config.base_name,
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        max_queue=config.max_queue,
        max_first_token_seconds=config.max_first_token_seconds,
        adapters=adapters,
        kv_cache=kv_cache,
        kv_memory_bytes=kv_memory_bytes,
        scheduler=Scheduler(
            kv_cache,
            adapters,
            max_running=config.max_running,
            max_batch_tokens=config.max_batch_tokens,
            prefill_chunk=prefill_chunk,
            prefill_per_decode=prefill_per_decode,
            speculator=Speculator(choose_speculative_rows(config, dtype, device)),
            are_rows_costly=device.type == "cpu",
        ),
        runner=runner,
        sampler=Sampler(model.vocab_size, eos_token_ids, device),
        merger=merger,
        prepare_thread=prepare_thread,
        wake=wake,
        close=close,
    )
    return Loaded(engine, registry)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise UnsupportedModelError(
            f"{folder} has no tokenizer.json; save the base's tokenizer there as a fast one"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast), "tokenizer.json is a fast tokenizer's"
    return tokenizer


def _max_model_len(config: ServeConfig, model: ModelConfig, kv_tokens: int) -> int:
    """What one request can have, prompt and answer together."""
    if config.max_model_len is None:
        if kv_tokens < model.max_model_len:
            logger.warning(
                "the context is %d tokens, not the base's %d: the KV cache holds no more; "
                "raise --kv-memory",
                kv_tokens,
                model.max_model_len,
            )
        return min(kv_tokens, model.max_model_len)
    if config.max_model_len > model.max_model_len:
        raise ConfigurationError(
            f"max_model_len = {config.max_model_len}: base {config.base_name!r} was trained for "
            f"{model.max_model_len} tokens; should be at most that"
        )
    if config.max_model_len > kv_tokens:
        raise ConfigurationError(
            f"max_model_len = {config.max_model_len}: the KV cache holds {kv_tokens} tokens; "
            "raise --kv-memory or lower --max-model-len"
        )
    return config.max_model_len


def _publish_folder(folder: AdapterFolder, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        folder.publish_all(lambda names: progress.track(names, description="Reading the adapters"))


def _merge(
    name: str | None,
    registry: AdapterRegistry,
    folder: AdapterFolder | None,
    adapters: AdapterCache,
    pool: MatrixPool,
    wake: threading.Event,
) -> _Merged | None:
    """Keep the adapter that --merge names on the device for good."""
    if name is None:
        return None
    if folder is not None and name in folder.names():
        folder.publish(name)
    parsed = AdapterName.parse(name)
    try:
        version = registry.find(*[parsed] if parsed is not None else []).version
    except ModelNotFoundError:
        there = [published.name.text for published in registry.adapters()]
        there += [] if folder is None else set(folder.names()) - {name, *there}
        raise ConfigurationError(
            f"merge = {name!r}: there is no such adapter that can be served; there are: "
            f"{', '.join(sorted(there)[:20]) or 'none'}"
        ) from None
    adapter = adapters.adapter(version)
    adapters.pin(version)  # else a request that fits only without it would wait for it for ever
    while True:
        wake.clear()
        pages = adapters.acquire(version)
        if not isinstance(pages, Waiting):
            pool.pin(pages)
            return _Merged(version, adapter, pages)
        wake.wait()


def _kv_cache(
    config: ServeConfig, model: ModelConfig, kernels: Kernels, dtype: torch.dtype
) -> tuple[KVCache, int]:
    """The book of the KV cache, and the bytes that the cache takes."""
    one_block: tuple[Any, ...] = kernels.make_kv_cache(
        model.num_layers, 1, model.num_kv_heads, model.head_dim, dtype, torch.device("cpu")
    )
    block_bytes = sum(part.nbytes for part in one_block)
    num_blocks = config.kv_memory // block_bytes
    cache = KVCache(num_blocks, kernels.block_size, prefix_caching=config.prefix_cache)
    return cache, num_blocks * block_bytes


def _eos_token_ids(
    folder: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerFast
) -> frozenset[int]:
    """What ends an answer: generation_config.json says, else config.json; and the tokenizer's."""
    found: set[int] = set()
    if (folder / "generation_config.json").is_file():
        listed = GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        listed = model.hf_config.eos_token_id
    for token_id in (listed if isinstance(listed, list) else [listed], [tokenizer.eos_token_id]):
        found |= {int(t) for t in token_id if t is not None}
    return frozenset(t for t in found if 0 <= t < model.vocab_size)


def _warm_up(
    runner: Runner,
    layout: BaseLayout,
    max_batch_tokens: int,
    block_size: int,
    decode_sizes: Sequence[int],
) -> None:
    """Compile every kernel and touch every weight, in the padding block that nobody reads.

    decode_sizes  rows of the decode steps that are recorded
    """
    num_entries = layout.num_layers * len(MODULES)
    zeros = np.zeros(num_entries, np.int32)
    table = PageTable(
        offsets=np.arange(num_entries + 1, dtype=np.int32),
        a_pages=zeros,
        b_pages=zeros,
        scaling=np.ones(num_entries, np.float32),
    )
    # Rows of each request: one prompt, or as many requests of one row each.
    batches = [[min(num_tokens, max_batch_tokens)] for num_tokens in _WARM_UP_TOKENS]
    batches += [[1] * size for size in decode_sizes]
    # With an adapter first: CpuKernels then know the pool's type, and compile once.
    for adapter, page_table in ((AdapterVersion("", ""), table), (None, None)):
        for batch in batches:
            runner.run([padding(count, block_size, adapter, page_table) for count in batch])
