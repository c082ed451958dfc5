"""Random steps of a few sequences: prompts in chunks and decodes, of the base and adapters."""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, FactorPair, PageTable
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.engine.batch import ScheduledRequest
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.runner import Runner
from sharelora_serve.kernels.cuda import CudaKernels
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.paged_attention import gathered_attention
from sharelora_serve.models.config import ModelConfig, load_model_config
from sharelora_serve.models.decoder import Decoder
from sharelora_serve.models.graphs import DecodeGraphs, Record
from sharelora_serve.models.loader import load_weights
from tests.cuda.plain_adapted import add_adapters
from tests.kernels.batches import draw_adapter
from tests.tiny_models import MAX_MODEL_LEN, write_tiny_model

MAX_RUNNING = 5
MAX_TOKENS = 700
_LENGTHS = (1, 60, 255, 257, 300)  # around the edge of a page, and beyond windows


@dataclass(frozen=True, slots=True)
class World:
    """A tiny base on disk, adapters in a pool whose other memory is NaN, and sequences of theirs.

    owners  of each sequence, an index of tables; None for the base
    """

    folder: Path
    config: ModelConfig
    pool: MatrixPool
    tables: list[PageTable]
    tokens: list[list[int]]
    owners: list[int | None]

    def runner(
        self, kernels: Kernels, *, record: Record | None = None, device: torch.device
    ) -> Runner:
        """A runner of these kernels; caches hold NaN where nothing was written."""
        weights = load_weights(
            self.folder,
            self.config,
            self.pool.dtype,
            kernels,
            device=device,
            max_positions=MAX_MODEL_LEN,
            fold=None,
            on_layer=lambda _: None,
        )
        graphs = None
        if record is not None:
            blocks = MAX_MODEL_LEN // kernels.block_size
            graphs = DecodeGraphs(record, max_running=MAX_RUNNING, max_blocks=blocks, device=device)
        decoder = Decoder(
            self.config,
            weights,
            kernels,
            dtype=self.pool.dtype,
            device=device,
            kv_blocks=1 + len(self.tokens) * (MAX_MODEL_LEN // kernels.block_size),
            max_tokens=MAX_TOKENS,
            graphs=graphs,
        )
        for part in decoder._kv_cache:
            part.fill_(torch.nan)
        return Runner(decoder, self.pool.arena, None, device)


def twin_kernels(dtype: torch.dtype) -> CudaKernels:
    """What a GPU runs, with plain torch for what only it can run."""
    return CudaKernels(dtype, gathered_attention, add_adapters)


def draw_world(folder: Path, architecture: str, dtype: torch.dtype, seed: int) -> World:
    """A base, adapters of every kind of sharing, and sequences of many lengths."""
    drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    write_tiny_model(folder, architecture, seed)
    config = load_model_config(folder)
    layout = config.layout("tiny")
    pool = MatrixPool(16 << 20, layout.feature_counts, dtype, "cpu")
    pool.arena[PAGE_RANK * max(layout.feature_counts) :] = torch.nan
    tables = [
        pool.place(
            pool.stage(_mild(draw_adapter(share, layout, share, generator, exact=False)), layout)
        ).page_table
        for share in ("", "A", "B", "AB")
    ]
    return World(
        folder,
        config,
        pool,
        tables,
        tokens=[
            [drawn.randrange(3, config.vocab_size) for _ in range(MAX_MODEL_LEN)] for _ in _LENGTHS
        ],
        owners=[drawn.choice([None, *range(len(tables))]) for _ in _LENGTHS],
    )


def _mild(adapter: Adapter) -> Adapter:
    """With factors that move a layer's outputs by about as much as they are."""
    return replace(
        adapter,
        pairs={
            place: FactorPair(
                pair.a / pair.a.shape[1] ** 0.5, pair.b / pair.b.shape[1] ** 0.5, pair.scaling / 4
            )
            for place, pair in adapter.pairs.items()
        },
    )


Script = list[list[tuple[int, int]]]
"""Of each step the sequences in it and how many tokens of each; every sequence once at most."""


def draw_script(seed: int, num_decodes: int) -> Script:
    """Prompts of all sequences in chunks, some decode meanwhile; then batches of decodes alone."""
    drawn = random.Random(seed)
    script: Script = []
    left = list(_LENGTHS)
    while any(left):
        step = []
        for sequence, length in enumerate(left):
            if length and drawn.random() < 0.5:
                count = min(length, drawn.choice([1, 40, 90, 257]))
                left[sequence] -= count
                step.append((sequence, count))
            elif not length and drawn.random() < 0.5:
                step.append((sequence, 1))
        script += [step] if step else []
    for _ in range(num_decodes):
        chosen = drawn.sample(range(len(_LENGTHS)), drawn.randint(1, MAX_RUNNING))
        script.append([(sequence, 1) for sequence in chosen])
    return script


def run_script(
    world: World, runner: Runner, block_size: int, script: Script, seed: int
) -> list[Tensor]:
    """Logits of the last row of every sequence in every step, (sequences, vocab_size)."""
    per_sequence = MAX_MODEL_LEN // block_size
    blocks = list(range(1, 1 + len(world.tokens) * per_sequence))
    random.Random(seed).shuffle(blocks)
    places = [0] * len(world.tokens)
    answers = []
    for step in script:
        scheduled = []
        for sequence, count in step:
            end = places[sequence] + count
            first = sequence * per_sequence
            owner = world.owners[sequence]
            request = Request(
                request_id="",
                adapter=None if owner is None else AdapterVersion(str(owner), str(owner)),
                prompt_ids=world.tokens[sequence][:end],
                sampling=SamplingParams(max_tokens=1),
                arrived_at=0.0,
                deliver=lambda _: None,
                block_table=blocks[first : first + -(-end // block_size)],
                num_computed=places[sequence],
                page_table=None if owner is None else world.tables[owner],
            )
            scheduled.append(ScheduledRequest(request, count))
            places[sequence] = end
        with torch.inference_mode():
            logits, _ = runner.run(scheduled)
            answers.append(logits.cpu().clone())
    return answers
