"""Attention over the paged cache: every row sees its own sequence up to itself, and no other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.attention import list_blocks, make_items
from sharelora_serve.kernels.batch import BLOCK_SIZE
from sharelora_serve.kernels.tiles import STRETCH
from tests.kernels.batches import (
    DTYPES,
    attention_batch,
    draw_block_tables,
    same_bits,
    small_integers,
)
from tests.kernels.parts import PARTS, Parts, empty_kv_cache

EPS = 1e-5
MAX_POSITIONS = 160
NUM_BLOCKS = 40
TOLERANCE = 2e-5  # of averages of values near 1; scores of 20 or so round at 1e-6
FORMS = [  # query heads, key heads, head_dim
    (4, 2, 16),
    (3, 1, 32),
    (2, 2, 64),
    (8, 2, 80),
    (6, 3, 10),
    (4, 4, 24),
]


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is fed to attention: for every sequence its rows of q, k and v, and its blocks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv: list[Tensor]
    blocks: list[list[int]]
    q_norm: Tensor
    k_norm: Tensor
    window: int = 0

    def cache(self, parts: Parts, dtype: torch.dtype) -> tuple[Any, Any]:
        return empty_kv_cache(parts, NUM_BLOCKS, self.num_kv_heads, self.head_dim, dtype)

    def step(
        self,
        parts: Parts,
        cache: tuple[Any, Any],
        runs: Sequence[tuple[int, int, int]],
        *,
        task_rows: int = 12,
    ) -> Tensor:
        """One step over (sequence, first position, number of rows); the rows' output."""
        used = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        rows = torch.cat([self.qkv[s][start : start + count] for s, start, count in runs])
        qkv = torch.full((len(rows), -(-used // 16) * 16), float("nan"))  # padding is not read
        qkv[:, :used] = rows
        out = torch.full((len(rows), self.num_heads * self.head_dim), float("nan"))
        # Blocks that a later step will need are in no table yet.
        tables = [
            (start, count, self.blocks[s][: -(-(start + count) // BLOCK_SIZE)])
            for s, start, count in runs
        ]
        parts.attend(
            qkv,
            self.q_norm,
            self.k_norm,
            EPS,
            *rotary_tables(self.head_dim),
            attention_batch(tables, task_rows=task_rows),
            self.window,
            *cache,
            out,
        )
        return out

    def expected(self, sequence: int, dtype: torch.dtype) -> Tensor:
        """The definition, in float64: all rows of one sequence, from nothing but its own."""
        dim, heads, kv_heads = self.head_dim, self.num_heads, self.num_kv_heads
        length = len(self.qkv[sequence])
        split = self.qkv[sequence].double().view(length, heads + 2 * kv_heads, dim)
        q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
        if len(self.q_norm):
            q = q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * self.q_norm.double()
        if len(self.k_norm):
            k = k / (k.square().mean(-1, keepdim=True) + EPS).sqrt() * self.k_norm.double()
        q, k = rotated(q), rotated(k).to(dtype).double()
        v = v.to(dtype).double()
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(dim)
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        is_hidden = (distance < 0) | (distance >= (self.window or length))
        weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1).float()


def rotary_tables(head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 100.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(MAX_POSITIONS).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def rotated(heads: Tensor) -> Tensor:
    """Each half of a head as the real and imaginary parts of numbers that turn with position."""
    cosine, sine = rotary_tables(heads.shape[-1])
    turn = torch.complex(cosine.double(), sine.double())[: len(heads)].unsqueeze(1)
    first, second = heads.chunk(2, dim=-1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def draw_sequences(
    form: tuple[int, int, int],
    lengths: Sequence[int],
    generator: torch.Generator,
    *,
    has_norm: bool = False,
    window: int = 0,
) -> Sequences:
    heads, kv_heads, dim = form
    width = (heads + 2 * kv_heads) * dim
    norms = [torch.randn(dim if has_norm else 0, generator=generator) for _ in range(2)]
    return Sequences(
        *form,
        [torch.randn(length, width, generator=generator) for length in lengths],
        draw_block_tables(lengths, NUM_BLOCKS, generator),
        *norms,
        window,
    )


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("has_norm", "window"), [(False, 0), (True, 0), (False, 21), (True, 1)])
def test_prefill_chunks_and_decodes_together_attend_as_defined(
    parts: str,
    dtype: torch.dtype,
    form: tuple[int, int, int],
    has_norm: bool,
    window: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 70, 17, 33, 90]
    sequences = draw_sequences(form, lengths, generator, has_norm=has_norm, window=window)
    expected = [sequences.expected(s, dtype) for s in range(len(lengths))]
    cache = sequences.cache(PARTS[parts], dtype)
    steps = [  # decodes, chunks that begin and end inside of blocks, and sequences that pause
        [(1, 0, 37), (3, 0, 32)],
        [(3, 32, 1), (1, 37, 20), (2, 0, 16), (4, 0, 5)],
        [(2, 16, 1), (0, 0, 1), (4, 5, 84)],
        [(4, 89, 1), (1, 57, 13)],
    ]
    for runs in steps:
        out = sequences.step(PARTS[parts], cache, runs)
        wanted = torch.cat([expected[s][start : start + count] for s, start, count in runs])
        scale = wanted.abs().clamp(min=1)
        assert (out - wanted).abs().div(scale).max() < _tolerance(dtype), runs


def _tolerance(dtype: torch.dtype) -> float:
    """A key that lies between two stored numbers may be rounded to either."""
    return TOLERANCE if dtype == torch.float32 else 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_fast_kernel_and_reference_agree_when_they_store_the_same(
    dtype: torch.dtype, form: tuple[int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = draw_sequences(form, [50, 20, 1], generator)
    heads, kv_heads, dim = form
    for qkv in sequences.qkv:  # keys that are zero but at position 0 round alike in both
        qkv[1:, heads * dim : (heads + kv_heads) * dim] = 0
    runs = [(0, 0, 50), (1, 0, 20), (2, 0, 1)]
    fast, plain = (
        sequences.step(parts, sequences.cache(parts, dtype), runs) for parts in PARTS.values()
    )
    assert (fast - plain).abs().max() < 1e-5


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 8])
def test_equal_scores_give_the_exact_mean_of_the_visible_values(
    parts: str, dtype: torch.dtype, form: tuple[int, int, int], window: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, dim = form
    sequences = draw_sequences(form, [64, 33], generator, window=window)
    for qkv in sequences.qkv:
        qkv[:, : heads * dim] = 0
        qkv[:, -kv_heads * dim :] = small_integers(len(qkv), kv_heads * dim, generator=generator)
    cache = sequences.cache(PARTS[parts], dtype)
    out = sequences.step(PARTS[parts], cache, [(0, 0, 64), (1, 0, 33)])
    for row, (s, t) in enumerate([(0, t) for t in range(64)] + [(1, t) for t in range(33)]):
        count = min(t + 1, window or t + 1)
        if count & (count - 1):
            continue  # only a power of two divides exactly
        values = sequences.qkv[s][t + 1 - count : t + 1, -kv_heads * dim :]
        mean = (values.sum(0) / count).view(kv_heads, 1, dim)
        expected = mean.expand(kv_heads, heads // kv_heads, dim).flatten()
        assert torch.equal(out[row], expected), f"position {t} of sequence {s}"


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_stored_as_torch_rounds_them(parts: str, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = draw_sequences((1, 1, 80), [1] * 30, generator)
    near = torch.randn(30, 80, generator=generator).to(dtype)
    above = near.float() * (1 + torch.finfo(dtype).eps / 2)  # many of them between two numbers
    scale = 2.0 ** torch.randint(-20, 14, (30, 1), generator=generator)
    for qkv, value in zip(sequences.qkv, above * scale, strict=True):
        qkv[:, -80:] = value
    runs = [(s, 0, 1) for s in range(30)]
    out = sequences.step(PARTS[parts], sequences.cache(PARTS[parts], dtype), runs)
    assert torch.equal(out, (above * scale).to(dtype).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("has_norm", "window"), [(False, 0), (True, 0), (False, 21)])
def test_row_has_the_same_bits_however_its_sequence_is_cut_into_steps(
    dtype: torch.dtype, form: tuple[int, int, int], has_norm: bool, window: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = PARTS["cpu"]
    sequences = draw_sequences(form, [45, 30], generator, has_norm=has_norm, window=window)
    whole = sequences.step(cpu, sequences.cache(cpu, dtype), [(0, 0, 45)])
    for others, task_rows in ((False, 3), (True, 12), (True, 40)):
        cache = sequences.cache(cpu, dtype)
        start = other_start = 0
        while start < 45:
            count = min(45 - start, int(torch.randint(1, 20, (), generator=generator)))
            runs = [(0, start, count)]
            if others and other_start < 28:
                runs = [(1, other_start, 4), *runs]
                other_start += 4
            out = sequences.step(cpu, cache, runs, task_rows=task_rows)
            assert same_bits(out[-count:], whole[start : start + count]), runs
            start += count


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_over", [float("inf"), float("nan"), 6e4])
def test_what_another_sequence_left_in_a_block_is_never_seen(
    parts: str, dtype: torch.dtype, left_over: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = draw_sequences((4, 2, 24), [NUM_BLOCKS // 2 * BLOCK_SIZE // 4] * 2, generator)
    sequences = draw_sequences((4, 2, 24), [37, 2], generator)
    before.qkv[0].fill_(left_over)
    before.qkv[1].fill_(left_over)
    before.blocks[0][:] = sequences.blocks[0] + before.blocks[0][len(sequences.blocks[0]) :]
    before.blocks[1][:] = sequences.blocks[1] + before.blocks[1][len(sequences.blocks[1]) :]
    steps = [[(0, 0, 5), (1, 0, 1)], [(1, 1, 1), (0, 5, 31)], [(0, 36, 1)]]
    clean, used = (sequences.cache(PARTS[parts], dtype) for _ in range(2))
    before.step(PARTS[parts], used, [(0, 0, 80), (1, 0, 80)])
    for runs in steps:
        out = sequences.step(PARTS[parts], clean, runs)
        again = sequences.step(PARTS[parts], used, runs)
        assert out.isfinite().all()
        assert same_bits(out, again), runs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [float("inf"), float("nan"), 6e4])
def test_sequence_whose_numbers_overflow_leaves_those_beside_it_as_they_are(
    dtype: torch.dtype, broken: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = PARTS["cpu"]
    sequences = draw_sequences((4, 2, 24), [37, 20, 50], generator, has_norm=broken == 6e4)
    alone = sequences.step(cpu, sequences.cache(cpu, dtype), [(0, 0, 37), (2, 0, 50)])
    sequences.qkv[1].fill_(broken)
    runs = [(0, 0, 37), (1, 0, 20), (2, 0, 50)]
    beside = sequences.step(cpu, sequences.cache(cpu, dtype), runs)
    assert same_bits(torch.cat([beside[:37], beside[57:]]), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("broken", [float("inf"), float("nan"), 6e4])
@pytest.mark.parametrize("start", [0, 17, 30])
def test_rows_before_one_that_overflows_are_as_they_are_without_it(
    dtype: torch.dtype, broken: float, start: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = PARTS["cpu"]
    sequences = draw_sequences((4, 2, 24), [45], generator, has_norm=broken == 6e4)
    outs = []
    for _ in range(2):  # the second time as a draft that is wrong may be
        cache = sequences.cache(cpu, dtype)
        if start:
            sequences.step(cpu, cache, [(0, 0, start)])
        outs.append(sequences.step(cpu, cache, [(0, start, 45 - start)], task_rows=12))
        sequences.qkv[0][36:] = broken
    assert same_bits(outs[1][: 36 - start], outs[0][: 36 - start])


def test_step_writes_to_no_block_but_its_own(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = draw_sequences((4, 2, 16), [60, 30, 45], generator)
    cpu = PARTS["cpu"]
    cache = sequences.cache(cpu, torch.float32)
    sequences.step(cpu, cache, [(0, 0, 59), (1, 0, 30)])
    before = [part.copy() for part in cache]
    sequences.step(cpu, cache, [(2, 0, 45)])
    for part, old in zip(cache, before, strict=True):
        changed = (part != old).any(axis=tuple(range(1, part.ndim))).nonzero()[0].tolist()
        assert sorted(changed) == sorted(sequences.blocks[2])


@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_listed_for_memory_to_bring_is_what_the_rows_of_an_item_see(
    dtype: torch.dtype, form: tuple[int, int, int], window: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    _, kv_heads, head_dim = form
    keys, values = empty_kv_cache(PARTS["cpu"], NUM_BLOCKS, kv_heads, head_dim, dtype)
    starts = torch.randint(0, 40, (10,), generator=generator).tolist()
    counts = [1] * 8 + [5, 30]  # small rows have an item for all heads, others one for each
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    tables = draw_block_tables(ends, NUM_BLOCKS, generator)
    batch = attention_batch(list(zip(starts, counts, tables, strict=True)))
    positions, row_sequence = batch.positions.numpy(), batch.row_sequence.numpy()
    items = make_items(batch.tasks.numpy(), positions, kv_heads, 2)
    assert {end - first for _, _, first, end, _ in items.tolist()} == {1, kv_heads}
    # Either thread's last item is followed by one of the other, or by none.
    assert [at for at, item in enumerate(items) if not item[4]] == [
        -(-len(items) // 2) - 1,
        len(items) - 1,
    ]
    size = keys[0, 0].size * keys.itemsize
    for item in items:
        first, count, low, high, _ = item.tolist()
        begin, end = positions[first], positions[first + count - 1] + 1
        begin = max(0, begin + 1 - window) if window else 0
        blocks = tables[row_sequence[first]][begin // BLOCK_SIZE : -(-end // BLOCK_SIZE)]
        listed = list_blocks(
            item, positions, row_sequence, batch.block_tables.numpy(), window, keys, values
        )
        expected = [
            cache.ctypes.data + (block * kv_heads + low) * size + byte
            for block in blocks
            for byte in range(0, (high - low) * size, STRETCH)
            for cache in (keys, values)
        ]
        assert listed.tolist() == expected
