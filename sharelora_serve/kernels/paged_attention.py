"""Attention of a packed batch over block tables: torch's flash kernels, and what they compute.

Both take the same arguments and nothing of them is read on the host, so that either fits into a
CUDA graph; what decides about launches are shapes alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AttentionBatch

PAGE_SIZE = 256
"""Tokens in a block: FlashAttention 2, which torch brings, takes multiples of 256 and no others."""

_GATHERED_ROWS = 32  # rows whose keys and values are copied together by the plain twin


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Where the rows of a batch stand, as attention over pages wants to know it; for all layers.

    positions     (num_tokens,)                int64, the row's place in its sequence
    slots         (num_tokens,)                int64, where its key goes, block * PAGE_SIZE + place
    row_sequence  (num_tokens,)                int32, the row of block_tables
    block_tables  (num_sequences, max_blocks)  int32
    starts        (num_sequences + 1,)         int32, first row of each sequence; last their number
    key_starts    (num_sequences + 1,)         int32, the same of the tokens that they attend to
    lengths       (num_sequences,)             int32, tokens of each, those of this batch included
    max_rows      at least the rows of any one sequence; exact where each has one
    """

    positions: Tensor
    slots: Tensor
    row_sequence: Tensor
    block_tables: Tensor
    starts: Tensor
    key_starts: Tensor
    lengths: Tensor
    max_rows: int

    @classmethod
    def of(cls, batch: AttentionBatch) -> "PagedRows":
        """Worked out on the device that the batch is on, without waiting for it."""
        tables, place = batch.block_tables, batch.positions.long()
        num_sequences = tables.shape[0]
        numbers = torch.arange(num_sequences + 1, dtype=torch.int32, device=tables.device)
        starts = torch.searchsorted(batch.row_sequence, numbers, out_int32=True)
        lengths = batch.positions[starts[1:].long() - 1] + 1
        key_starts = torch.zeros_like(numbers)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=key_starts[1:])
        blocks = tables[batch.row_sequence.long(), place // PAGE_SIZE].long()
        return cls(
            positions=place,
            slots=blocks * PAGE_SIZE + place % PAGE_SIZE,
            row_sequence=batch.row_sequence,
            block_tables=tables,
            starts=starts,
            key_starts=key_starts,
            lengths=lengths,
            max_rows=len(place) - num_sequences + 1,  # all others have at least one
        )


PagedAttention = Callable[[Tensor, Tensor, Tensor, PagedRows, int], Tensor]
"""(query, keys, values, rows, window) -> attended; see gathered_attention."""


def flash_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, window: int
) -> Tensor:
    """See gathered_attention; query, keys and values are of one 16-bit type, on a CUDA device.

    Never split over a sequence's keys: which splits there are would depend on the rest of the
    batch, and with pages torch 2.13 loses rows when it splits (pytorch/pytorch#194167).
    """
    # Not at the top: it brings in torch's compiler, which a server on a CPU need not wait for.
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(
        query,
        keys,
        values,
        rows.starts,
        rows.key_starts,
        rows.max_rows,
        rows.block_tables.shape[1] * PAGE_SIZE,
        # What torch calls a window are the tokens to the left of the row's own.
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=True,
        seqused_k=rows.lengths,
        block_table=rows.block_tables,
        num_splits=1,
    )
    assert isinstance(attended, Tensor), "only the attended values were asked for"
    return attended


def gathered_attention(
    query: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, window: int
) -> Tensor:
    """Causal attention of each row to the tokens of its own block table, in plain torch.

    query   (num_tokens, heads, head_dim)                  rotated
    keys    (num_blocks, PAGE_SIZE, kv_heads, head_dim)    this batch's own are there; so values
    window  how many tokens a row sees, itself included; 0 for all

    Returns (num_tokens, heads, head_dim) in the query's type; computed in float32, any device.
    """
    answers = []
    tables = rows.block_tables[rows.row_sequence.long()].long()
    seen = torch.arange(tables.shape[1] * PAGE_SIZE, device=query.device)
    for some, table, place in zip(
        query.split(_GATHERED_ROWS),
        tables.split(_GATHERED_ROWS),
        rows.positions.split(_GATHERED_ROWS),
        strict=True,
    ):
        distance = place.unsqueeze(1) - seen
        visible = distance >= 0
        if window:
            visible &= distance < window
        # A block holds whatever its last owner left: even infinite numbers must not matter.
        hidden = ~visible[:, None, :, None]
        its_keys, its_values = (
            stored[table].flatten(1, 2).float().transpose(1, 2).masked_fill(hidden, 0.0)
            for stored in (keys, values)
        )
        answer = torch.nn.functional.scaled_dot_product_attention(
            some.float().unsqueeze(2),
            its_keys,
            its_values,
            attn_mask=visible[:, None, None, :],
            enable_gqa=True,
        )
        answers.append(answer.squeeze(2).to(query.dtype))
    return torch.cat(answers)
