"""From the scheduler's choice to logits: one packed batch of prefill chunks and decodes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.engine.batch import ScheduledRequest, padding
from sharelora_serve.engine.merge import subtract_pages
from sharelora_serve.engine.request import Request
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.models.decoder import Decoder
from sharelora_serve.models.loader import ModelWeights

# Query rows that one task of attention holds in registers and caches, over its grouped heads.
_TASK_ROWS = 24

# Page tables kept beside a merged adapter, so that a decode step need not make them again.
_MAX_SUBTRACTED = 256


class Runner:
    """Builds the batch of a step and runs it. Used by the engine thread alone.

    arena   the matrix pool's memory
    merged  the version folded into the weights and its pages, which stay resident; None if none
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: Tensor,
        merged: tuple[AdapterVersion, PageTable] | None,
        device: torch.device,
    ) -> None:
        self._device = device
        self._decoder = decoder
        self._arena = arena
        self._merged = merged
        self._task_rows = max(1, _TASK_ROWS // decoder.config.num_queries_per_kv)
        self._num_entries = len(decoder.config.layout("").shapes) * decoder.config.num_layers
        self._tables: list[PageTable] = []  # those of the last batch, and what they packed to
        self._packed: AdapterBatch | None = None
        self._subtracted: dict[str | None, tuple[PageTable | None, PageTable]] = {}

    @property
    def merged(self) -> AdapterVersion | None:
        """The version that is folded into the weights."""
        return self._merged[0] if self._merged is not None else None

    def exchange(
        self, weights: ModelWeights, merged: tuple[AdapterVersion, PageTable] | None
    ) -> None:
        """Compute the next steps with other weights; merged is what is folded into those."""
        self._decoder.weights = weights
        self._merged = merged
        self._subtracted.clear()

    def run(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, list[slice]]:
        """Logits of a batch, and for each scheduled request its rows among them.

        A request has the row of its last token and those of its draft if it needs them, after
        those of the prompt positions in its chunk if it asked for prompt_logprobs; else an empty
        slice.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        row_sequence: list[int] = []
        tasks: list[tuple[int, int]] = []
        logit_rows: list[int] = []
        slices: list[slice] = []
        for sequence, item in enumerate(scheduled):
            request, count, first = item.request, item.num_rows, len(token_ids)
            start = request.num_computed
            token_ids += request.tokens(start, start + item.num_tokens)
            token_ids += item.draft_ids
            positions += range(start, start + count)
            row_sequence += [sequence] * count
            tasks += [
                (first + at, min(self._task_rows, count - at))
                for at in range(0, count, self._task_rows)
            ]
            begin = len(logit_rows)
            if request.sampling.prompt_logprobs is not None:
                last = min(count, len(request.prompt_ids) - 1 - start)
                logit_rows += range(first, first + last)
            if item.needs_logits:
                logit_rows += range(first + item.num_tokens - 1, first + count)
            slices.append(slice(begin, len(logit_rows)))
        width = max(len(item.request.block_table) for item in scheduled)
        tables = np.zeros((len(scheduled), width), np.int32)
        for sequence, item in enumerate(scheduled):
            tables[sequence, : len(item.request.block_table)] = item.request.block_table
        attention = AttentionBatch(
            positions=torch.tensor(positions, dtype=torch.int32, device=self._device),
            row_sequence=torch.tensor(row_sequence, dtype=torch.int32, device=self._device),
            block_tables=self._from_numpy(tables),
            tasks=torch.tensor(tasks, dtype=torch.int32, device=self._device),
        )
        logits = self._decoder.forward(
            torch.tensor(token_ids, dtype=torch.int64, device=self._device),
            attention,
            self._adapters(scheduled, len(token_ids)),
            torch.tensor(logit_rows, dtype=torch.int64, device=self._device),
        )
        return logits, slices

    def check(self) -> None:
        """Compute a token of the base, in the block that nobody reads.

        Raises what the device does if it is at fault itself, and not a batch.
        """
        logits, _ = self.run([padding(1, 1)])
        logits.cpu()  # waits for the device

    def _from_numpy(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _adapters(
        self, scheduled: Sequence[ScheduledRequest], num_tokens: int
    ) -> AdapterBatch | None:
        """The page tables of the batch's rows; None when every row is as the weights are."""
        tables: list[PageTable] = []
        index: dict[int, int] = {}
        row_adapter = np.zeros(num_tokens, np.int32)
        row = 0
        for item in scheduled:
            table = self._table(item.request)
            if table is not None:
                if id(table) not in index:
                    tables.append(table)
                    index[id(table)] = len(tables)
                row_adapter[row : row + item.num_rows] = index[id(table)]
            row += item.num_rows
        if not tables:
            return None
        packed = self._packed
        same = len(tables) == len(self._tables) and all(
            new is old for new, old in zip(tables, self._tables, strict=True)
        )
        if packed is None or not same:
            packed = self._pack(tables)
            self._tables, self._packed = tables, packed
        return replace(packed, row_adapter=self._from_numpy(row_adapter))

    def _table(self, request: Request) -> PageTable | None:
        """A request's pages beside what is folded into the weights."""
        if self._merged is None:
            return request.page_table
        version, pages = self._merged
        key = request.adapter.key if request.adapter is not None else None
        if key == version.key:
            return None
        known = self._subtracted.get(key)
        if known is None or known[0] is not request.page_table:
            if len(self._subtracted) >= _MAX_SUBTRACTED:
                self._subtracted.clear()
            known = (request.page_table, subtract_pages(request.page_table, pages))
            self._subtracted[key] = known
        return known[1]

    def _pack(self, tables: list[PageTable]) -> AdapterBatch:
        offsets = np.zeros((len(tables) + 1, self._num_entries + 1), np.int32)
        start = 0
        for row, table in enumerate(tables, start=1):
            offsets[row] = table.offsets + start
            start += int(table.offsets[-1])
        return AdapterBatch(
            row_adapter=torch.empty(0, dtype=torch.int32),
            offsets=self._from_numpy(offsets),
            a_pages=self._from_numpy(np.concatenate([table.a_pages for table in tables])),
            b_pages=self._from_numpy(np.concatenate([table.b_pages for table in tables])),
            scaling=self._from_numpy(np.concatenate([table.scaling for table in tables])),
            arena=self._arena,
            max_pages=max(int(np.diff(table.offsets).max()) for table in tables),
        )
