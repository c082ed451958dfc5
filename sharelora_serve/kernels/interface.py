"""What a set of kernels offers; `reference` defines what each one computes."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch


class Kernels(Protocol):
    """Kernels for one kind of device. Activations are float32, `out` is written in place."""

    @property
    def name(self) -> str:
        """As `--kernels` has it."""

    def pack(self, weight: Tensor) -> Any:
        """See ReferenceKernels."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None, out: Tensor) -> None:
        """See ReferenceKernels."""

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:
        """See ReferenceKernels."""

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """See ReferenceKernels."""

    def silu_and_multiply(self, gate_up: Tensor, out: Tensor) -> None:
        """See ReferenceKernels."""

    def make_kv_cache(
        self,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
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
        """See ReferenceKernels."""

    def add_adapters(self, x: Tensor, out: Tensor, batch: AdapterBatch, modules: Tensor) -> None:
        """See ReferenceKernels."""
