"""Which rows a step learns from: a function of the seed and the step, so a run can be resumed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharelora_serve.training.data import Row

_POOLED_BATCHES = 32  # whose rows are sorted by length together: little padding, much chance


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side, padded on the right, where causal attention never looks.

    tokens      (num_rows, width) int64
    labelled    (num_rows, width) bool, the tokens of answers
    num_tokens  without padding
    num_common  tokens that all rows begin with, such as the chat template's; less than a prompt has
    """

    tokens: Tensor
    labelled: Tensor
    num_tokens: int
    num_common: int


class Batches:
    """The batch of every step. Every row comes once in an epoch."""

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[Row]] = []
        self.num_in_epoch = -(-len(rows) // batch_size)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, the first being 0."""
        epoch, index = divmod(step, self.num_in_epoch)
        if epoch != self._epoch:
            self._batches = self._draw(epoch)
            self._epoch = epoch
        return collate(self._batches[index])

    def _draw(self, epoch: int) -> list[list[Row]]:
        drawn = random.Random(f"batches {self._seed} {epoch}")
        rows = drawn.sample(self._rows, len(self._rows))
        pooled = _POOLED_BATCHES * self._batch_size
        batches = []
        for start in range(0, len(rows), pooled):
            pool = sorted(rows[start : start + pooled], key=lambda row: row.num_tokens)
            batches += [
                pool[at : at + self._batch_size] for at in range(0, len(pool), self._batch_size)
            ]
        drawn.shuffle(batches)
        return batches


def collate(rows: Sequence[Row]) -> Batch:
    """Put rows side by side."""
    width = max(row.num_tokens for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labelled = torch.zeros(len(rows), width, dtype=torch.bool)
    for at, row in enumerate(rows):
        tokens[at, : row.num_tokens] = torch.tensor(row.prompt_ids + row.answer_ids)
        labelled[at, len(row.prompt_ids) : row.num_tokens] = True
    shortest = min(len(row.prompt_ids) for row in rows)
    differs = (tokens[:, : shortest - 1] != tokens[0, : shortest - 1]).any(dim=0)
    num_common = int(differs.nonzero()[0]) if differs.any() else shortest - 1
    return Batch(tokens, labelled, sum(row.num_tokens for row in rows), num_common)


def in_order_of_length(rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """All rows once, in batches with little padding; for validation."""
    ordered = sorted(rows, key=lambda row: row.num_tokens)
    return [collate(ordered[at : at + batch_size]) for at in range(0, len(ordered), batch_size)]
