"""What the decoder layers are computed with: their weights, all layers stacked, and buffers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The decoder layers of a base, the layer being the first index of everything.

    q, k, v and gate, up are fused. What a base lacks (biases, norms of q and k) has no columns.
    Columns and windows are in host memory, all else where the base is.

    qkv, o, gate_up, down  as Kernels.make_weights laid them out
    *_bias                 (num_layers, out_features) float32
    *_norm                 (num_layers, features) float32; q_norm and k_norm of each head
    *_columns              (num_modules + 1,) int64, where the outputs of each fused module begin
    windows                (num_layers,) int64, tokens that a row sees, itself included; 0 for all
    cosine, sine           (max_positions, head_dim / 2) float32 of the rotary angles
    """

    input_norm: Tensor
    qkv: Any
    qkv_bias: Tensor
    qkv_columns: Tensor
    q_norm: Tensor
    k_norm: Tensor
    o: Any
    o_bias: Tensor
    o_columns: Tensor
    post_norm: Tensor
    gate_up: Any
    gate_up_bias: Tensor
    gate_up_columns: Tensor
    down: Any
    down_bias: Tensor
    down_columns: Tensor
    windows: Tensor
    norm_eps: float
    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, slots=True)
class Buffers:
    """Activations of a batch, (num_tokens, features); widths padded to whole blocks.

    All are of `Kernels.activations` but one:

    x      the residual stream, float32
    delta  what the last layer part adds to it, not added yet
    """

    x: Tensor
    delta: Tensor
    normed: Tensor
    qkv: Tensor
    attended: Tensor
    gate_up: Tensor
    inner: Tensor

    def rows(self, count: int) -> "Buffers":
        """The first `count` rows of each."""
        return Buffers(
            self.x[:count],
            self.delta[:count],
            self.normed[:count],
            self.qkv[:count],
            self.attended[:count],
            self.gate_up[:count],
            self.inner[:count],
        )
