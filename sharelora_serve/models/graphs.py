"""Decode steps recorded once for each size of batch and replayed: one launch instead of hundreds.

What a recorded step reads must lie where it lay when it was recorded. So there are buffers for the
inputs of the largest batch; a step of fewer rows is copied into their beginnings and padded: a
padding row is token 0 of a sequence whose table is the padding block, without an adapter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""A step, already run once -> what runs it again; its result lies in one place for ever."""

RunStep = Callable[[Tensor, AttentionBatch, AdapterBatch | None], Tensor]
"""(token_ids, attention, adapters) -> logits (num_tokens, vocab_size) of every row."""

_FEWEST_PAGES = 2  # of an entry of the adapters that a step with adapters is recorded for


def cuda_graph(device: torch.device) -> Record:
    """Record into CUDA graphs, all of which take their memory from one pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on loading adapters meanwhile: what they call must not fail.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay

    return record


def batch_sizes(max_running: int) -> list[int]:
    """Rows of the steps that are recorded: 1, 2, 4, 8 and so on, the last being max_running."""
    return [2**n for n in range(max_running.bit_length()) if 2**n < max_running] + [max_running]


class _Shape(NamedTuple):
    """What the batches that one recorded step serves have in common; powers of two.

    max_pages  of the adapters, see AdapterBatch; 0 where all rows are the base's
    """

    num_rows: int
    max_pages: int


@dataclass(frozen=True, slots=True)
class _Recorded:
    replay: Callable[[], Tensor]
    adapters: AdapterBatch | None  # that it reads


class DecodeGraphs:
    """Runs batches that have one row for each sequence, and need the logits of every row.

    Used by the engine's thread alone.

    sizes  rows of what is recorded, see batch_sizes
    """

    def __init__(
        self,
        record: Record,
        *,
        max_running: int,
        max_blocks: int,
        device: torch.device,
    ) -> None:
        """Nothing is recorded yet.

        max_running  rows of the largest batch
        max_blocks   of the longest sequence
        """
        self._record = record
        self.sizes = batch_sizes(max_running)
        self._token_ids = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._attention = AttentionBatch(
            positions=torch.zeros(max_running, dtype=torch.int32, device=device),
            row_sequence=torch.arange(max_running, dtype=torch.int32, device=device),
            block_tables=torch.zeros(max_running, max_blocks, dtype=torch.int32, device=device),
            tasks=torch.zeros(0, 2, dtype=torch.int32, device=device),
        )
        self._recorded: dict[_Shape, _Recorded] = {}

    def fits(self, token_ids: Tensor, attention: AttentionBatch, logit_rows: Tensor) -> bool:
        """Whether this is a batch that `run` takes."""
        num_rows = len(token_ids)
        return (
            num_rows == len(attention.block_tables) == len(logit_rows)
            and num_rows <= self.sizes[-1]
            and attention.block_tables.shape[1] <= self._attention.block_tables.shape[1]
        )

    def run(
        self,
        step: RunStep,
        token_ids: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> Tensor:
        """The step's logits, which the next step overwrites.

        step  must compute with the same weights, caches and arena each time, until `forget`
        """
        num_rows = len(token_ids)
        size = next(size for size in self.sizes if size >= num_rows)
        room = self._attention
        rows = AttentionBatch(
            room.positions[:size], room.row_sequence[:size], room.block_tables[:size], room.tasks
        )
        for kept, new in (
            (self._token_ids[:size], token_ids),
            (rows.positions, attention.positions),
            (rows.block_tables, attention.block_tables),
        ):
            kept.zero_()
            kept[tuple(slice(length) for length in new.shape)] = new
        shape = _Shape(size, 0)
        if adapters is not None:
            max_pages = max(_FEWEST_PAGES, adapters.max_pages)
            shape = _Shape(size, 1 << (max_pages - 1).bit_length())
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._record_step(step, shape, self._token_ids[:size], rows, adapters)
            self._recorded[shape] = recorded
        elif adapters is not None:
            assert recorded.adapters is not None, "a step with adapters was recorded with some"
            recorded.adapters.refill(adapters)
        return recorded.replay()[:num_rows]

    def forget(self) -> None:
        """Record anew: the weights are others."""
        self._recorded.clear()

    def _record_step(
        self,
        step: RunStep,
        shape: _Shape,
        token_ids: Tensor,
        rows: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> _Recorded:
        kept = None
        if adapters is not None:
            num_entries = adapters.offsets.shape[1] - 1
            kept = AdapterBatch.reserve(
                shape.num_rows, num_entries, shape.max_pages, adapters.arena
            )
            kept.refill(adapters)
        step(token_ids, rows, kept)  # compiles what is not compiled yet
        return _Recorded(self._record(lambda: step(token_ids, rows, kept)), kept)
