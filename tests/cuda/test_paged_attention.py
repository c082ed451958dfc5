"""What torch's attention over pages is told means what plain torch computes."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.paged_attention import (
    PAGE_SIZE,
    PagedRows,
    flash_attention,
    gathered_attention,
)
from tests.kernels.batches import attention_batch

HEADS, KV_HEADS, DIM = 6, 2, 16


def documented_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """varlen_attn as torch documents it, and what its kernels check of their arguments."""
    assert {t.dtype for t in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert keys.shape[1] % 256 == 0, "FlashAttention 2 takes no other pages"
    assert enable_gqa
    assert num_splits == 1, "torch 2.13 loses rows when it splits"
    starts, counts = cu_seq_q.tolist(), cu_seq_q.diff().tolist()
    assert starts[0] == 0
    assert starts[-1] == len(query)
    assert cu_seq_k.diff().tolist() == seqused_k.tolist()
    assert max(counts) <= max_q
    assert max_q == 1 or max(counts) > 1, "a batch of decodes is not known to be one"
    assert int(seqused_k.max()) <= max_k
    out = torch.empty_like(query)
    left, right = window_size
    assert right == 0
    for sequence, (start, count) in enumerate(zip(starts, counts, strict=False)):
        used = int(seqused_k[sequence])
        its_keys = keys[block_table[sequence].long()].flatten(0, 1)[:used]
        its_values = values[block_table[sequence].long()].flatten(0, 1)[:used]
        for row in range(count):
            place = used - count + row  # the causal mask is aligned to the bottom right
            first = 0 if left < 0 else max(0, place - left)
            for head in range(HEADS):
                kv = head // (HEADS // KV_HEADS)
                scores = its_keys[first : place + 1, kv] @ query[start + row, head] / DIM**0.5
                out[start + row, head] = scores.softmax(0) @ its_values[first : place + 1, kv]
    return out


@pytest.mark.parametrize("window", [0, 1, 24, 300])
@pytest.mark.parametrize("kind", ["decodes", "mixed"])
def test_flash_attention_is_told_what_the_plain_one_computes(
    window: int, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    calls: list[Any] = []

    def documented(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return documented_attention(*args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    blocks = list(range(1, 9))
    drawn.shuffle(blocks)
    counts = [1, 1, 1, 1] if kind == "decodes" else drawn.sample([1, 1, 7, 40], 4)
    runs = [
        (drawn.choice([0, 3, 254, 255, 256, 400]), count, blocks[2 * at : 2 * at + 2])
        for at, count in enumerate(counts)
    ]
    rows = PagedRows.of(attention_batch(runs))
    keys, values = (torch.randn(9, PAGE_SIZE, KV_HEADS, DIM, generator=generator) for _ in range(2))
    query = torch.randn(len(rows.positions), HEADS, DIM, generator=generator)
    found = flash_attention(query, keys, values, rows, window)
    assert len(calls) == 1
    torch.testing.assert_close(
        gathered_attention(query, keys, values, rows, window), found, rtol=0, atol=2e-5
    )
