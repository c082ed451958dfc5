"""What a set of kernels offers; `reference` defines what each one computes."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.layers import Buffers, LayerWeights


class Kernels(Protocol):
    """Kernels for one kind of device. Outputs are written in place."""

    @property
    def name(self) -> str:
        """As `--kernels` has it."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""

    @property
    def activations(self) -> torch.dtype:
        """Of what stands in the buffers, but for `x`, which is float32."""

    def make_weights(
        self,
        num_layers: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Any:
        """Room for one weight of each layer; index it by layer."""

    def pack(self, weight: Tensor, to: Any) -> None:
        """Store a weight (out, in), in its stored dtype, in one layer's room."""

    def unpack(self, packed: Any, out_features: int, dtype: torch.dtype) -> Tensor:
        """The weight (out_features, in) that was packed, in its stored dtype."""

    def linear(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """out[:, :out_features] = x W^T; `out` may be wider, by less than a block."""

    def embed(self, weight: Any, token_ids: Tensor, out: Tensor) -> None:
        """out[t] = row token_ids[t] of a weight."""

    def add_and_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor
    ) -> None:
        """x += delta; out = root-mean-square norm of x times weight (arXiv 1910.07467)."""

    def make_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> tuple[Any, Any]:
        """Keys and values of all layers, the layer and then the block being the first indices."""

    def layers(
        self,
        buffers: Buffers,
        weights: LayerWeights,
        kv_cache: tuple[Any, Any],
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
    ) -> None:
        """All decoder layers: x and delta in the buffers, keys and values in the cache.

        adapters is None when every row is the base's own: then nothing of adapters is run.
        """
