"""The kernels in plain torch: what each computes, on any device, to hold the fast ones against."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from sharelora_serve.kernels.batch import BLOCK_SIZE, PAGE_RANK, AdapterBatch, AttentionBatch
from sharelora_serve.kernels.layers import Buffers, LayerWeights


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm times weight (arXiv 1910.07467)."""
    return rms_norm(x, weight.shape, weight, eps)


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads (num_tokens, num_heads, head_dim); cosine, sine (num_tokens, 1, head_dim / 2)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Places(NamedTuple):
    """Where the rows of a batch stand; worked out once for all layers.

    rows          AttentionBatch, or what a subclass makes of it
    cosine, sine  (num_tokens, 1, head_dim / 2) of the rows' rotary angles (arXiv 2104.09864)
    """

    rows: Any
    cosine: Tensor
    sine: Tensor


class ReferenceKernels:
    """The kernels that `models` calls, as the formulas have them.

    `layers` is made of the others: kernels for another device override those.
    """

    name = "reference"
    block_size = BLOCK_SIZE
    activations = torch.float32

    def make_weights(
        self,
        num_layers: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """(num_layers, out_features, in_features)."""
        return torch.empty(num_layers, out_features, in_features, dtype=dtype, device=device)

    def pack(self, weight: Tensor, to: Any) -> None:
        """Store a weight (out, in) as it is."""
        to.copy_(weight)

    def unpack(self, packed: Any, out_features: int, dtype: torch.dtype) -> Tensor:
        """The stored weight itself, not a copy."""
        assert packed.shape[0] == out_features, "a weight has other outputs than it was packed with"
        assert packed.dtype == dtype, "a weight has another dtype than it was packed with"
        weight: Tensor = packed
        return weight

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """out[:, :out_features] = x W^T; `out` may be wider."""
        out[:, : weight.shape[0]] = linear(x, weight.to(x.dtype))

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = row token_ids[t] of a weight."""
        out.copy_(weight[token_ids])

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """x += delta; out = root-mean-square norm of x times weight (arXiv 1910.07467)."""
        x += delta[:, : x.shape[1]]
        out.copy_(_norm(x, weight, eps))

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up, the two halves of gate_up (arXiv 2002.05202)."""
        inner = out.shape[1]
        gate, up = gate_up[:, :inner], gate_up[:, inner : 2 * inner]
        torch.mul(silu(gate), up, out=out)

    def make_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
        """Keys and values, both (layers, blocks, block_size, kv_heads, head_dim)."""
        shape = (num_layers, num_blocks, self.block_size, num_kv_heads, head_dim)
        return (
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )

    def locate(self, batch: AttentionBatch, cosine: Tensor, sine: Tensor) -> Places:
        """What `attend` is told of the rows; cosine, sine (max_positions, head_dim / 2)."""
        place = batch.positions.long()
        return Places(batch, cosine[place].unsqueeze(1), sine[place].unsqueeze(1))

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        places: Places,
        window: int,
        keys: Any,
        values: Any,
        out: Tensor,
    ) -> Tensor:
        """Rotate q and k, store k and v, attend causally over each row's own blocks.

        qkv      (num_tokens, (heads + 2 kv_heads) * head_dim or more)
        q_norm   (head_dim,)   norm of each query head before rotation; empty for none; so k_norm
        window   how many tokens a row sees, itself included; 0 for all
        out      (num_tokens, heads * head_dim)

        Returns what was attended: `out`, or another tensor where a kernel makes its own.
        """
        batch: AttentionBatch = places.rows
        query, key, value = self.split(qkv, q_norm, k_norm, eps, places, keys, out)
        place = batch.positions.long()
        blocks = batch.block_tables[batch.row_sequence.long(), place // BLOCK_SIZE].long()
        keys[blocks, place % BLOCK_SIZE] = key.to(keys.dtype)
        values[blocks, place % BLOCK_SIZE] = value.to(values.dtype)
        for first, count in batch.tasks.tolist():
            rows = slice(first, first + count)
            table = batch.block_tables[batch.row_sequence[first].long()].long()
            end = int(place[first + count - 1]) + 1
            table = table[: -(-end // BLOCK_SIZE)]
            seen_keys = keys[table].flatten(0, 1)[:end].float().transpose(0, 1)
            seen_values = values[table].flatten(0, 1)[:end].float().transpose(0, 1)
            distance = place[rows].unsqueeze(1) - torch.arange(end, device=place.device)
            visible = distance >= 0
            if window:
                visible &= distance < window
            answer = scaled_dot_product_attention(
                query[rows].transpose(0, 1).unsqueeze(0),
                seen_keys.unsqueeze(0),
                seen_values.unsqueeze(0),
                attn_mask=visible,
                enable_gqa=True,
            )
            out[rows] = answer[0].transpose(0, 1).reshape(count, -1)
        return out

    def split(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        places: Places,
        keys: Tensor,
        out: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of q and k in float32, after their norms and rotation, and of v as they are.

        Each (num_tokens, its heads, head_dim); the rest is as in `attend`.
        """
        kv_heads, dim = keys.shape[-2:]
        heads = out.shape[1] // dim
        parts = qkv[:, : (heads + 2 * kv_heads) * dim].view(len(qkv), -1, dim)
        query, key, value = parts.split([heads, kv_heads, kv_heads], dim=1)
        query, key = (
            _rotate(
                _norm(part.float(), norm, eps) if len(norm) else part.float(),
                places.cosine,
                places.sine,
            )
            for part, norm in ((query, q_norm), (key, k_norm))
        )
        return query, key, value

    def add_adapters(
        self, x: Tensor, out: Tensor, batch: AdapterBatch, entry: int, columns: Tensor
    ) -> None:
        """out[t, module] += scaling * B A x[t], every row with its own pages (arXiv 2106.09685).

        entry    of the page table, of the first module whose outputs stand in `out`
        columns  (num_modules + 1,) int64, where the outputs of each begin
        """
        width = x.shape[1]
        borders = columns.tolist()
        for adapter in batch.row_adapter.unique().tolist():
            rows = (batch.row_adapter == adapter).nonzero().squeeze(1)
            for module, (column, end) in enumerate(pairwise(borders)):
                features = end - column
                first = entry + module
                begin, end = batch.offsets[adapter, first : first + 2].tolist()
                if begin == end:
                    continue
                a = _pages(batch.arena, batch.a_pages[begin:end], width)
                b = _pages(batch.arena, batch.b_pages[begin:end], features)
                scaling = batch.scaling[begin:end].repeat_interleave(PAGE_RANK)
                answer = (x[rows] @ a.T * scaling) @ b
                out[rows, column : column + features] += answer

    def adapted_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor,
        out: Tensor,
        batch: AdapterBatch | None,
        entry: int,
        columns: Tensor,
    ) -> None:
        """`linear`, plus a bias unless it is empty, plus what adapters add."""
        self.linear(x, weight, out)
        if len(bias):
            out[:, : len(bias)] += bias
        if batch is not None:
            self.add_adapters(x, out, batch, entry, columns)

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """Every decoder layer: norm, attention, norm, gated MLP (arXiv 2302.13971)."""
        b, w = buffers, weights
        places = self.locate(attention, w.cosine, w.sine)

        keys, values = kv_cache
        entry = 0
        for layer, window in enumerate(w.windows.tolist()):
            self.add_and_norm(b.x, b.delta, w.input_norm[layer], w.norm_eps, b.normed)
            self.adapted_linear(
                b.normed, w.qkv[layer], w.qkv_bias[layer], b.qkv, adapters, entry, w.qkv_columns
            )
            entry += 3
            attended = self.attend(
                b.qkv,
                w.q_norm[layer],
                w.k_norm[layer],
                w.norm_eps,
                places,
                window,
                keys[layer],
                values[layer],
                b.attended,
            )
            self.adapted_linear(
                attended, w.o[layer], w.o_bias[layer], b.delta, adapters, entry, w.o_columns
            )
            entry += 1
            self.add_and_norm(b.x, b.delta, w.post_norm[layer], w.norm_eps, b.normed)
            self.adapted_linear(
                b.normed,
                w.gate_up[layer],
                w.gate_up_bias[layer],
                b.gate_up,
                adapters,
                entry,
                w.gate_up_columns,
            )
            entry += 2
            self.silu_and_multiply(b.gate_up, b.inner)
            self.adapted_linear(
                b.inner, w.down[layer], w.down_bias[layer], b.delta, adapters, entry, w.down_columns
            )
            entry += 1


def _pages(arena: Tensor, page_ids: Tensor, width: int) -> Tensor:
    """Rank rows (num_pages * 8, width) in float32."""
    size = PAGE_RANK * width
    view = arena[: len(arena) // size * size].view(-1, PAGE_RANK, width)
    return view[page_ids.long()].float().flatten(0, 1)
