"""A base's configuration: what the one decoder must know of a LLaMA-family model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.errors import UnsupportedModelError

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""What config.json may name; SmolLM and SmolLM2 are LlamaForCausalLM."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder and the choices in which the family's members differ.

    windows         for each layer, how many tokens a row attends to, itself included; 0 for all
    qk_norm         whether each query and key head is normed before rotation (Qwen3)
    max_model_len   the context the model was trained for, in tokens
    hf_config       the Hugging Face configuration, for the rotary tables
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    windows: tuple[int, ...]
    qk_norm: bool
    tied: bool
    max_model_len: int
    dtype: torch.dtype
    hf_config: Any

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share a key and value head."""
        return self.num_heads // self.num_kv_heads

    def layout(self, name: str) -> BaseLayout:
        """The shapes that adapters of this base, which users know as `name`, must fit."""
        hidden, inner = self.hidden_size, self.intermediate_size
        attention, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return BaseLayout(
            name=name,
            num_layers=self.num_layers,
            shapes={
                "self_attn.q_proj": (hidden, attention),
                "self_attn.k_proj": (hidden, kv),
                "self_attn.v_proj": (hidden, kv),
                "self_attn.o_proj": (attention, hidden),
                "mlp.gate_proj": (hidden, inner),
                "mlp.up_proj": (hidden, inner),
                "mlp.down_proj": (inner, hidden),
            },
        )

    def rotary_tables(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles, both (num_positions, head_dim / 2) float32."""
        rope_type = self.hf_config.rope_parameters["rope_type"]
        if rope_type == "default":
            theta = self.hf_config.rope_parameters["rope_theta"]
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
            frequencies, attention_scaling = 1.0 / theta**exponents, 1.0
        else:
            frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](
                self.hf_config, torch.device("cpu")
            )
        angles = torch.outer(torch.arange(num_positions).float(), frequencies.float())
        return angles.cos() * attention_scaling, angles.sin() * attention_scaling


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json of a Hugging Face folder.

    Raises UnsupportedModelError, naming what is not supported and what is.
    """
    path = folder / "config.json"
    try:
        architecture = (json.loads(path.read_bytes()).get("architectures") or ["none"])[0]
    except (OSError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{path} cannot be read: {error}; expected a Hugging Face model folder"
        ) from error
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {architecture!r} in {path} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{path} is not understood by transformers: {error}") from error
    problems = []
    if getattr(config, "quantization_config", None):
        problems.append(
            "quantization_config: quantised weights; give a checkpoint in 16 or 32 bits"
        )
    if config.hidden_act != "silu":
        problems.append(f"hidden_act: {config.hidden_act!r}, expected 'silu'")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        problems.append(f"rope type {rope_type!r}, expected one of {', '.join(_ROPE_TYPES)}")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor: only part of each head is rotated")
    if problems:
        raise UnsupportedModelError(f"{path} cannot be served:\n  " + "\n  ".join(problems))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        norm_eps=config.rms_norm_eps,
        windows=_windows(config),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tied=config.tie_word_embeddings,
        max_model_len=config.max_position_embeddings,
        dtype=config.dtype or torch.float32,
        hf_config=config,
    )


def _windows(config: Any) -> tuple[int, ...]:  # noqa: ANN401 - any Hugging Face configuration
    window: int = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    if not getattr(config, "use_sliding_window", True):
        window = 0
    return (window,) * int(config.num_hidden_layers)
