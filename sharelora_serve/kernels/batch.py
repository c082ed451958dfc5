"""What the kernels are told about a batch besides its activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16
"""Tokens in a block of the KV cache."""

PAGE_RANK = 8
"""Rank rows in a page of the matrix pool."""


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each row of a packed batch stands in its sequence and in the KV cache.

    positions        (num_tokens,)                 int32, the row's place in its sequence
    row_sequence     (num_tokens,)                 int32, which row of block_tables is its own
                                                   (rows of a sequence stand together, in order)
    block_tables     (num_sequences, max_blocks)   int32, KV block ids in token order
    tasks            (num_tasks, 2)                int32, (first row, number of rows): short runs
                                                   of one sequence's rows, attended to together
    """

    positions: Tensor
    row_sequence: Tensor
    block_tables: Tensor
    tasks: Tensor


@dataclass(frozen=True, slots=True)
class AdapterBatch:
    """The rank pages of every adapter in a batch, as in PageTable, one after the other.

    row_adapter  (num_tokens,)                        int32, row of `offsets`; 0 is no adapter
    offsets      (1 + num_adapters, num_entries + 1)  int32, into the next three; row 0 is zeros
    a_pages      (num_pages,)                         int32
    b_pages      (num_pages,)                         int32
    scaling      (num_pages,)                         float32
    arena        (num_elements,)                      the pool's memory, in its own dtype; page p of
                                                      width f starts at element p * 8 * f
    max_pages    no entry has more: a GPU's kernels have room for so many
    """

    row_adapter: Tensor
    offsets: Tensor
    a_pages: Tensor
    b_pages: Tensor
    scaling: Tensor
    arena: Tensor
    max_pages: int

    @classmethod
    def reserve(
        cls, num_rows: int, num_entries: int, max_pages: int, arena: Tensor
    ) -> "AdapterBatch":
        """Room for any batch of so many rows, whose tensors a CUDA graph can keep; see refill."""
        device, num_pages = arena.device, num_rows * num_entries * max_pages
        return cls(
            row_adapter=torch.zeros(num_rows, dtype=torch.int32, device=device),
            offsets=torch.zeros(1 + num_rows, num_entries + 1, dtype=torch.int32, device=device),
            a_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
            b_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
            scaling=torch.zeros(num_pages, dtype=torch.float32, device=device),
            arena=arena,
            max_pages=max_pages,
        )

    def refill(self, batch: "AdapterBatch") -> None:
        """Copy a batch in, of no more than there is room for; rows it lacks have no adapter."""
        assert batch.max_pages <= self.max_pages, "an entry has more pages than there is room for"
        num_tokens = len(batch.row_adapter)
        self.row_adapter[:num_tokens].copy_(batch.row_adapter, non_blocking=True)
        self.row_adapter[num_tokens:].zero_()
        for room, tensor in (
            (self.offsets, batch.offsets),
            (self.a_pages, batch.a_pages),
            (self.b_pages, batch.b_pages),
            (self.scaling, batch.scaling),
        ):
            room[: len(tensor)].copy_(tensor, non_blocking=True)
