"""The one decoder of the LLaMA family: tokens and adapters in, logits out."""

import torch
from torch import Tensor

from sharelora_serve.kernels.batch import AdapterBatch, AttentionBatch
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.layers import Buffers
from sharelora_serve.models.config import ModelConfig
from sharelora_serve.models.graphs import DecodeGraphs
from sharelora_serve.models.loader import ModelWeights

_PADDING = 16  # outputs of a packed block: products write whole ones


class Decoder:
    """A base with its KV cache. `forward` is the only thing that runs while serving.

    kv_blocks   blocks of the KV cache, in every layer
    max_tokens  rows of the largest batch
    graphs      that run its decode steps, on a device that gains by it; None for none
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
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.config = config
        self._weights = weights
        self._kernels = kernels
        self._graphs = graphs
        self._kv_cache = kernels.make_kv_cache(
            config.num_layers, kv_blocks, config.num_kv_heads, config.head_dim, dtype, device
        )

        def buffer(width: int) -> Tensor:
            padded = -(-width // _PADDING) * _PADDING
            return torch.zeros(max_tokens, padded, dtype=activations, device=device)

        def exact_buffer(width: int) -> Tensor:
            return torch.zeros(max_tokens, width, dtype=activations, device=device)

        activations = kernels.activations
        attention = config.num_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        self._buffers = Buffers(
            x=torch.zeros(max_tokens, hidden, device=device),
            delta=buffer(hidden),
            normed=exact_buffer(hidden),
            qkv=buffer(attention + 2 * config.num_kv_heads * config.head_dim),
            attended=exact_buffer(attention),
            gate_up=buffer(2 * inner),
            inner=exact_buffer(inner),
        )

    @property
    def weights(self) -> ModelWeights:
        """What the next `forward` computes with; may be exchanged between two of them."""
        return self._weights

    @weights.setter
    def weights(self, weights: ModelWeights) -> None:
        self._weights = weights
        if self._graphs is not None:
            self._graphs.forget()

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
        logit_rows  (num_logits,) int64, the rows whose next token is wanted, in order

        Returns logits (num_logits, vocab_size) float32; the next `forward` may overwrite them.
        """
        graphs = self._graphs
        if graphs is not None and graphs.fits(token_ids, attention, logit_rows):
            return graphs.run(self._step, token_ids, attention, adapters)
        return self._step(token_ids, attention, adapters, logit_rows)

    def _step(
        self,
        token_ids: Tensor,
        attention: AttentionBatch,
        adapters: AdapterBatch | None,
        logit_rows: Tensor | None = None,
    ) -> Tensor:
        """As forward; logits of every row without logit_rows."""
        kernels, config, weights = self._kernels, self.config, self._weights
        buffers = self._buffers.rows(len(token_ids))
        kernels.embed(weights.embedding, token_ids, buffers.x)
        buffers.delta.zero_()
        kernels.layers(buffers, weights.layers, self._kv_cache, attention, adapters)
        x, delta = buffers.x, buffers.delta
        if logit_rows is not None:
            x, delta = x[logit_rows], delta[logit_rows]
        normed = torch.empty_like(x, dtype=kernels.activations)
        kernels.add_and_norm(x, delta, weights.norm, config.norm_eps, normed)
        logits = x.new_empty(len(x), -(-config.vocab_size // _PADDING) * _PADDING)
        kernels.linear(normed, weights.head, logits)
        return logits[:, : config.vocab_size]
