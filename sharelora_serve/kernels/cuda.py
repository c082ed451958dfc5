"""The kernels of an NVIDIA GPU: torch's products and attention, Triton's shrink and expand.

Weights and the activations between products are of one 16-bit type, each product's sums and the
residual stream, norms, rotation and logits are float32. So a served number differs from
`reference`'s, which holds all activations in float32, by one rounding for every product, norm and
attention on its way: by about 2^-8 of its size in bfloat16, 2^-11 in float16. In float32 nothing
is rounded in between and only sums come in another order.

A row's bits may depend on how many rows the batch has, since cuBLAS chooses its algorithm by that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from sharelora_serve.kernels.adapted_plan import AdaptedPlan, make_plan
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.layers import Buffers, LayerWeights
from sharelora_serve.kernels.paged_attention import PAGE_SIZE, PagedAttention, PagedRows
from sharelora_serve.kernels.reference import ReferenceKernels

AddAdapters = Callable[[Tensor, Tensor, AdaptedPlan, Tensor, int, tuple[int, ...]], None]
"""(x, out, plan, arena, entry, columns): see plain_adapted."""


@dataclass(frozen=True, slots=True)
class CountedAdapters(AdapterBatch):
    """An AdapterBatch of which it is known that no entry has more than max_pages pages."""

    max_pages: int


class CudaKernels(ReferenceKernels):
    """The kernels that `models` calls. Weights lie as `reference`'s do.

    activations  the type of weights, activations, keys and values
    """

    name = "cuda"
    block_size = PAGE_SIZE

    def __init__(
        self, dtype: torch.dtype, attention: PagedAttention, add_adapters: AddAdapters
    ) -> None:
        """Compute in `dtype` with these parts, which may be twins that run on any device."""
        self.activations = dtype
        self._attention = attention
        self._add_adapters = add_adapters
        self._counted: tuple[Tensor | None, int] = (None, 0)  # offsets, and their max_pages

    def max_pages(self, adapters: AdapterBatch) -> int:
        """No entry of the batch has more pages.

        Waits for the device where that is not known and the tables are others than the last time.
        """
        if isinstance(adapters, CountedAdapters):
            return adapters.max_pages
        offsets, count = self._counted
        if offsets is not adapters.offsets:
            count = int(adapters.offsets.diff(dim=1).max())
            self._counted = adapters.offsets, count
        return count

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """out[:, :out_features] = x W^T; out is of x's type, or float32 and then not rounded."""
        product = out[:, : weight.shape[0]]
        if out.dtype == x.dtype:
            torch.mm(x, weight.t(), out=product)
        elif x.device.type == "cuda":
            torch.mm(x, weight.t(), out_dtype=out.dtype, out=product)
        else:
            torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=product)

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """x += delta; out = root-mean-square norm of x times weight (arXiv 1910.07467)."""
        x += delta[:, : x.shape[1]]
        out.copy_(rms_norm(x, weight.shape, weight, eps))

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        """out = silu(gate) * up, the two halves of gate_up (arXiv 2002.05202)."""
        inner = out.shape[1]
        torch.mul(silu(gate_up[:, :inner]), gate_up[:, inner : 2 * inner], out=out)

    def make_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
        """Keys and values, both (layers, blocks, 256, kv_heads, head_dim)."""
        shape = (num_layers, num_blocks, PAGE_SIZE, num_kv_heads, head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return keys, values

    def store_and_attend(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor],
        eps: float,
        angles: tuple[Tensor, Tensor],
        rows: PagedRows,
        window: int,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Rotate q and k, store k and v, attend: (num_tokens, heads * head_dim); see reference.

        norms   of each head of q and of k, (head_dim,); empty for none
        angles  cosine and sine of every row, (num_tokens, 1, head_dim / 2)
        """
        kv_heads, dim = keys.shape[2:]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        split = qkv.view(len(qkv), -1, dim)
        query, key = (
            _rotate(
                part.float() if not len(norm) else rms_norm(part.float(), (dim,), norm, eps),
                *angles,
            )
            for part, norm in zip(
                (split[:, :heads], split[:, heads : heads + kv_heads]), norms, strict=True
            )
        )
        keys.flatten(0, 1)[rows.slots] = key.to(keys.dtype)
        values.flatten(0, 1)[rows.slots] = split[:, heads + kv_heads :].to(values.dtype)
        return self._attention(query.to(keys.dtype), keys, values, rows, window).flatten(1)

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """Every decoder layer: norm, attention, norm, gated MLP (arXiv 2302.13971).

        Nothing is read from the device but the number of pages, if that is not known.
        """
        b, w = buffers, weights
        plan = None
        if adapters is not None:
            plan = make_plan(adapters, self.max_pages(adapters))
        rows = PagedRows.of(attention)
        angles = (w.cosine[rows.positions].unsqueeze(1), w.sine[rows.positions].unsqueeze(1))
        fused = {
            "qkv": (w.qkv, w.qkv_bias, _borders(w.qkv_columns)),
            "o": (w.o, w.o_bias, _borders(w.o_columns)),
            "gate_up": (w.gate_up, w.gate_up_bias, _borders(w.gate_up_columns)),
            "down": (w.down, w.down_bias, _borders(w.down_columns)),
        }

        def product(name: str, x: Tensor, out: Tensor) -> None:
            weight, bias, columns = fused[name]
            self.linear(x, weight[layer], out)
            if bias.shape[1]:
                out[:, : bias.shape[1]] += bias[layer]
            if adapters is not None and plan is not None:
                self._add_adapters(x, out, plan, adapters.arena, entry, columns)

        keys, values = kv_cache
        entry = 0
        width = int(w.qkv.shape[1])
        for layer, window in enumerate(w.windows.tolist()):
            norms = (w.q_norm[layer], w.k_norm[layer])
            self.add_and_norm(b.x, b.delta, w.input_norm[layer], w.norm_eps, b.normed)
            product("qkv", b.normed, b.qkv)
            entry += 3
            attended = self.store_and_attend(
                b.qkv[:, :width],
                norms,
                w.norm_eps,
                angles,
                rows,
                window,
                keys[layer],
                values[layer],
            )
            product("o", attended, b.delta)
            entry += 1
            self.add_and_norm(b.x, b.delta, w.post_norm[layer], w.norm_eps, b.normed)
            product("gate_up", b.normed, b.gate_up)
            entry += 2
            self.silu_and_multiply(b.gate_up, b.inner)
            product("down", b.inner, b.delta)
            entry += 1


def _borders(columns: Tensor) -> tuple[int, ...]:
    """Where the modules of a fused product begin; on the host, as weights keep them."""
    return tuple(columns.tolist())


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """heads (num_tokens, num_heads, head_dim) float32, turned by the rows' angles."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
