"""The kernels of an NVIDIA GPU: torch's products and attention, Triton's shrink and expand.

Weights and the activations between products are of one 16-bit type, each product's sums and the
residual stream, norms, rotation and logits are float32. So a served number differs from
`reference`'s, which holds all activations in float32, by one rounding for every product, bias,
adapter, norm and attention on its way: by about 2^-8 of its size in bfloat16, 2^-11 in float16. In
float32 nothing is rounded in between and only sums come in another order.

A row's bits may depend on how many rows the batch has, since cuBLAS chooses its algorithm by that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.paged_attention import PAGE_SIZE, PagedAttention, PagedRows
from sharelora_serve.kernels.reference import Places, ReferenceKernels

AddAdapters = Callable[[Tensor, Tensor, AdapterBatch, int, tuple[int, ...]], None]
"""(x, out, batch, entry, columns): see triton_adapted."""


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
        # Else cuBLAS may add up the parts of a long sum in 16 bits.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        self._attention = attention
        self._add_adapters = add_adapters

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """out[:, :out_features] = x W^T; out is of x's type, or float32 and then not rounded."""
        product = out[:, : weight.shape[0]]
        if out.dtype == x.dtype:
            torch.mm(x, weight.t(), out=product)
        elif x.device.type == "cuda":
            torch.mm(x, weight.t(), out_dtype=out.dtype, out=product)
        else:
            torch.mm(x.to(out.dtype), weight.t().to(out.dtype), out=product)

    def locate(self, batch: AttentionBatch, cosine: Tensor, sine: Tensor) -> Places:
        """The rows as attention over pages wants to know them: PagedRows."""
        return super().locate(batch, cosine, sine)._replace(rows=PagedRows.of(batch))

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
        """See ReferenceKernels; the answer has memory of its own."""
        rows: PagedRows = places.rows
        query, key, value = self.split(qkv, q_norm, k_norm, eps, places, keys, out)
        keys.flatten(0, 1)[rows.slots] = key.to(keys.dtype)
        values.flatten(0, 1)[rows.slots] = value.to(values.dtype)
        return self._attention(query.to(keys.dtype), keys, values, rows, window).flatten(1)

    def add_adapters(
        self, x: Tensor, out: Tensor, batch: AdapterBatch, entry: int, columns: Tensor
    ) -> None:
        """See ReferenceKernels; nothing is read from the device."""
        self._add_adapters(x, out, batch, entry, tuple(columns.tolist()))
