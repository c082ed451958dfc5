"""The adapters of a batch as a GPU's kernels read them, in memory that a CUDA graph can keep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch


@dataclass(frozen=True, slots=True)
class AdaptedPlan:
    """The pages of a batch on the device, as in AdapterBatch; a graph keeps its own and refills it.

    row_adapter  (num_tokens,)                        int32, row of `offsets`; 0 is no adapter
    offsets      (1 + num_adapters, num_entries + 1)  int32, into the next three; row 0 is zeros
    a_pages      (num_pages,)                         int32; page 0 is zeros and is never read
    b_pages      (num_pages,)                         int32; likewise
    scaling      (num_pages,)                         float32
    max_pages    no entry has more
    """

    row_adapter: Tensor
    offsets: Tensor
    a_pages: Tensor
    b_pages: Tensor
    scaling: Tensor
    max_pages: int

    def refill(self, batch: AdapterBatch) -> None:
        """Copy a batch in, of no more rows, adapters or pages than there is room for.

        Rows that the batch lacks have no adapter.
        """
        num_tokens = len(batch.row_adapter)
        self.row_adapter[:num_tokens].copy_(batch.row_adapter, non_blocking=True)
        self.row_adapter[num_tokens:].zero_()
        for room, tensor in (
            (self.offsets, batch.offsets),
            (self.a_pages, batch.a_pages),
            (self.b_pages, batch.b_pages),
            (self.scaling, batch.scaling),
        ):
            assert len(tensor) <= len(room), "a batch has more adapters or pages than its plan"
            room[: len(tensor)].copy_(tensor, non_blocking=True)


def make_plan(batch: AdapterBatch, max_pages: int) -> AdaptedPlan:
    """The plan of one step, on the tensors of its batch.

    max_pages is the most that any entry of the batch has, or a bound of it: the kernels' buffers
    have room for so many, and those of an entry with more would run into the next row's.
    """
    return AdaptedPlan(
        batch.row_adapter, batch.offsets, batch.a_pages, batch.b_pages, batch.scaling, max_pages
    )


def reserve_plan(
    *,
    num_tokens: int,
    num_adapters: int,
    num_entries: int,
    num_pages: int,
    max_pages: int,
    device: torch.device,
) -> AdaptedPlan:
    """A plan without adapters, whose tensors a CUDA graph can keep; refill it before a replay."""
    return AdaptedPlan(
        row_adapter=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        offsets=torch.zeros(1 + num_adapters, num_entries + 1, dtype=torch.int32, device=device),
        a_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
        b_pages=torch.zeros(num_pages, dtype=torch.int32, device=device),
        scaling=torch.zeros(num_pages, dtype=torch.float32, device=device),
        max_pages=max_pages,
    )
