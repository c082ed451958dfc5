"""The one decoder of the LLaMA family: tokens and adapters in, logits out."""

import torch
from torch import Tensor

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.models.config import ModelConfig
from sharelora_serve.models.loader import ModelWeights

_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class Decoder:
    """A base with its KV cache. `forward` is the only thing that runs while serving.

    kv_blocks     blocks of the KV cache, in every layer
    max_tokens    rows of the largest batch
    max_positions length of the longest sequence
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        kernels: Kernels,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_blocks: int,
        max_tokens: int,
        max_positions: int,
    ) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.cosine, self.sine = (table.to(device) for table in config.rotary_tables(max_positions))
        self.kv_cache = [
            kernels.make_kv_cache(kv_blocks, config.num_kv_heads, config.head_dim, dtype, device)
            for _ in range(config.num_layers)
        ]
        shapes = config.layout("").shapes
        self._modules = [
            {
                fused: torch.tensor(_columns(layer, modules, shapes), dtype=torch.int64)
                for fused, modules in _FUSED.items()
            }
            for layer in range(config.num_layers)
        ]

        def buffer(width: int) -> Tensor:
            return torch.zeros(max_tokens, width, device=device)

        def padded(*modules: str) -> Tensor:
            return buffer(-(-sum(shapes[m][1] for m in modules) // 16) * 16)

        self._x = buffer(config.hidden_size)
        self._normed = buffer(config.hidden_size)
        self._attended = buffer(config.num_heads * config.head_dim)
        self._inner = buffer(config.intermediate_size)
        self._qkv = padded(*_FUSED["qkv"])
        self._gate_up = padded(*_FUSED["gate_up"])
        self._delta = padded(*_FUSED["o"])

    def forward(
        self,
        token_ids: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
        logit_rows: Tensor,
    ) -> Tensor:
        """Run a packed batch and store its keys and values.

        token_ids   (num_tokens,) int64
        adapters    None when every row is the base's own: then nothing of adapters is run
        logit_rows  (num_logits,) int64, the rows whose next token is wanted

        Returns logits (num_logits, vocab_size) float32.
        """
        kernels, config, weights = self.kernels, self.config, self.weights
        rows = len(token_ids)
        x, normed, delta = self._x[:rows], self._normed[:rows], self._delta[:rows]
        qkv, attended = self._qkv[:rows], self._attended[:rows]
        gate_up, inner = self._gate_up[:rows], self._inner[:rows]
        kernels.embed(weights.embedding, token_ids, x)
        delta.zero_()

        def add_adapters(source: Tensor, out: Tensor, modules: Tensor) -> None:
            if adapters is not None:
                kernels.add_adapters(source, out, adapters, modules)

        for layer, modules, window, (keys, values) in zip(
            weights.layers, self._modules, config.windows, self.kv_cache, strict=True
        ):
            kernels.add_and_norm(x, delta, layer.input_norm, config.norm_eps, normed)
            kernels.linear(normed, layer.qkv, layer.qkv_bias, qkv)
            add_adapters(normed, qkv, modules["qkv"])
            kernels.attend(
                qkv,
                layer.q_norm,
                layer.k_norm,
                config.norm_eps,
                self.cosine,
                self.sine,
                attention,
                window,
                keys,
                values,
                attended,
            )
            kernels.linear(attended, layer.o, layer.o_bias, delta)
            add_adapters(attended, delta, modules["o"])
            kernels.add_and_norm(x, delta, layer.post_norm, config.norm_eps, normed)
            kernels.linear(normed, layer.gate_up, layer.gate_up_bias, gate_up)
            add_adapters(normed, gate_up, modules["gate_up"])
            kernels.silu_and_multiply(gate_up, inner)
            kernels.linear(inner, layer.down, layer.down_bias, delta)
            add_adapters(inner, delta, modules["down"])
        kernels.add_and_norm(x, delta, weights.norm, config.norm_eps, normed)
        logits = normed.new_empty(len(logit_rows), -(-config.vocab_size // 16) * 16)
        kernels.linear(normed[logit_rows], weights.head, None, logits)
        return logits[:, : config.vocab_size]


def _columns(
    layer: int, modules: tuple[str, ...], shapes: dict[str, tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """(entry in the page table, first output column, number of output columns) of each module."""
    columns, start = [], 0
    for module in modules:
        entry, width = layer * len(MODULES) + MODULES.index(module), shapes[module][1]
        columns.append((entry, start, width))
        start += width
    return columns
