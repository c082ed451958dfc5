"""The kernels one by one: what `Kernels.layers` is made of, in the same words for each set."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sharelora_serve.kernels import attention, elementwise, product
from sharelora_serve.kernels.adapted_product import adapted_product, count_later
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.cpu import NOTHING_ADDED, CpuKernels, pages_of
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.reference import ReferenceKernels

_CPU = torch.device("cpu")


class Parts(Protocol):
    """A set of kernels, and those of its parts that have no method of their own in all sets."""

    @property
    def kernels(self) -> Kernels:
        """Those that the model calls."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor, out: Tensor) -> None:
        """out = x W^T + bias; an empty bias is none."""

    def adapted_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor,
        out: Tensor,
        batch: AdapterBatch,
        entry: int,
        columns: Tensor,
    ) -> None:
        """As linear, plus scaling * B A x of each row's own adapter; see add_adapters."""

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        """See ReferenceKernels."""

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cosine: Tensor,
        sine: Tensor,
        batch: AttentionBatch,
        window: int,
        keys: Any,
        values: Any,
        out: Tensor,
    ) -> None:
        """See ReferenceKernels; cosine, sine as LayerWeights have them."""


class ReferenceParts:
    """Plain torch."""

    def __init__(self) -> None:
        self.kernels = ReferenceKernels()
        self.silu_and_multiply = self.kernels.silu_and_multiply
        self.adapted_linear = self.kernels.adapted_linear

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cosine: Tensor,
        sine: Tensor,
        batch: AttentionBatch,
        window: int,
        keys: Any,
        values: Any,
        out: Tensor,
    ) -> None:
        places = self.kernels.locate(batch, cosine, sine)
        self.kernels.attend(qkv, q_norm, k_norm, eps, places, window, keys, values, out)

    def linear(self, x: Tensor, weight: Any, bias: Tensor, out: Tensor) -> None:
        self.kernels.linear(x, weight, out)
        out[:, : len(bias)] += bias


class CpuParts:
    """Compiled by numba."""

    def __init__(self) -> None:
        self.kernels = CpuKernels()

    def linear(self, x: Tensor, weight: Any, bias: Tensor, out: Tensor) -> None:
        product.product(x.numpy(), weight, bias.numpy(), out.numpy())

    def adapted_linear(
        self,
        x: Tensor,
        weight: Any,
        bias: Tensor,
        out: Tensor,
        batch: AdapterBatch,
        entry: int,
        columns: Tensor,
    ) -> None:
        pages = pages_of(batch)
        rows = count_later(x.shape[0], weight, pages)
        added = torch.zeros_like(out)[:rows]
        added[batch.row_adapter[:rows] > 0] = torch.nan  # all of it must be written
        adapted_product(
            x.numpy(),
            weight,
            bias.numpy(),
            out.numpy(),
            added.numpy(),
            pages,
            entry,
            columns.numpy(),
        )
        out[:rows, : columns[-1]] += added[:, : columns[-1]]

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        elementwise.silu_and_multiply(gate_up.numpy(), NOTHING_ADDED, out.numpy())

    def attend(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cosine: Tensor,
        sine: Tensor,
        batch: AttentionBatch,
        window: int,
        keys: Any,
        values: Any,
        out: Tensor,
    ) -> None:
        positions, tasks = batch.positions.numpy(), batch.tasks.numpy()
        # Two threads, whatever the machine has: how rows are shared out depends on it.
        items = attention.make_items(tasks, positions, keys.shape[1], 2)
        attention.attend(
            qkv.numpy(),
            NOTHING_ADDED,
            q_norm.numpy(),
            k_norm.numpy(),
            np.float32(eps),
            cosine.numpy(),
            sine.numpy(),
            positions,
            batch.row_sequence.numpy(),
            batch.block_tables.numpy(),
            tasks,
            items,
            window,
            keys,
            values,
            out.numpy(),
        )


PARTS: dict[str, Parts] = {"cpu": CpuParts(), "reference": ReferenceParts()}
"""Every set of kernels that this machine can run, by name."""


def packed(parts: Parts, weight: Tensor) -> Any:
    """A weight as these kernels lay it out."""
    room = parts.kernels.make_weights(1, *weight.shape, weight.dtype, _CPU)[0]
    parts.kernels.pack(weight, room)
    return room


def empty_kv_cache(
    parts: Parts, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Any, Any]:
    """Keys and values of one layer, as these kernels lay them out."""
    keys, values = parts.kernels.make_kv_cache(1, num_blocks, num_kv_heads, head_dim, dtype, _CPU)
    return keys[0], values[0]
