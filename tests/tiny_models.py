"""Tiny random base models of every supported architecture, as Hugging Face model folders.

Each is a few megabytes, speaks the embedded base's vocabulary, and is drawn so that its greedy
answers vary from token to token and from prompt to prompt: a wrong kernel changes tokens.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sharelora_serve.models.embedded import embedded_base_folder

SLIDING_WINDOW = 24
"""Tokens that a sliding layer sees: fewer than the long test prompts have."""

MAX_MODEL_LEN = 512
"""Context of every tiny model, in tokens."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_LOGITS_STD = 2.5  # wide enough for clear winners, narrow enough that float32 rounds below 1e-4

_SIZES: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_MODEL_LEN,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
)


def _llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **changes}))


def _rope(rope_type: str, **parameters: float) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}


def _qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_SIZES, **changes}))


def _qwen3() -> PreTrainedModel:
    # head_dim is not hidden_size / heads: q_proj is wider than the hidden state.
    return Qwen3ForCausalLM(Qwen3Config(**{**_SIZES, "head_dim": 32}))


_MODELS: Mapping[str, Callable[[], PreTrainedModel]] = MappingProxyType(
    {
        "llama": lambda: _llama(num_key_value_heads=4),
        "llama-bias": lambda: _llama(attention_bias=True, mlp_bias=True),
        # Original contexts below the test prompts' lengths, so that scaling changes the answers.
        "llama3-rope": lambda: _llama(
            num_hidden_layers=4,
            rope_parameters=_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        "llama-linear-rope": lambda: _llama(rope_parameters=_rope("linear", factor=4.0)),
        "llama-yarn": lambda: _llama(
            rope_parameters=_rope("yarn", factor=8.0, original_max_position_embeddings=64)
        ),
        "smollm": lambda: _llama(num_hidden_layers=4, tie_word_embeddings=True),
        "mistral-sliding": lambda: MistralForCausalLM(
            MistralConfig(**_SIZES, sliding_window=SLIDING_WINDOW)
        ),
        "qwen2": lambda: _qwen2(tie_word_embeddings=True),
        "qwen2-sliding": lambda: _qwen2(
            use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=1
        ),
        "qwen3": _qwen3,
    }
)

ARCHITECTURES = tuple(_MODELS)
"""The names that write_tiny_model takes: one for every way in which supported bases differ.

llama              multi-head attention, untied head
llama-bias         biases on all seven linear modules
llama3-rope        grouped-query attention, LLaMA 3's rope scaling
llama-linear-rope  rope positions divided by a factor
llama-yarn         YaRN rope scaling
smollm             tied head
mistral-sliding    every layer sees SLIDING_WINDOW tokens
qwen2              biases on q, k and v, tied head
qwen2-sliding      the first layer sees everything, the others SLIDING_WINDOW tokens
qwen3              norms on q and k, head_dim apart from hidden_size / heads
"""


def write_tiny_model(
    folder: Path, architecture: str, seed: int, *, tokenizer_folder: Path | None = None
) -> Path:
    """Write a random float32 model of `architecture`, one of ARCHITECTURES, and return its folder.

    The folder is made if need be, and holds what a model from the hub holds: config.json,
    generation_config.json, model.safetensors, and the tokenizer's files and chat template, copied
    from `tokenizer_folder` or, without it, from the embedded base. The same seed gives the same
    weights.
    """
    model = _MODELS[architecture]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, generator))
    model.save_pretrained(folder)
    source = embedded_base_folder() if tokenizer_folder is None else tokenizer_folder
    for file in _TOKENIZER_FILES:
        shutil.copyfile(source / file, folder / file)
    return folder


def _draw(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random values for one parameter, chosen so that no part of the model drowns another.

    The usual initialisation (std 0.02) would leave so little in attention and MLP that a tied
    model only repeats its last token. Here a layer adds about as much as stands in the residual
    stream, and the head's rows make logits of standard deviation _LOGITS_STD.
    """
    normal = torch.randn(parameter.shape, generator=generator)
    if name.endswith("norm.weight"):
        return normal.mul_(0.2).add_(1)
    if name.endswith(".bias"):
        return normal.mul_(0.25)
    gain = _LOGITS_STD if name.endswith(("embed_tokens.weight", "lm_head.weight")) else 1.2
    return normal.mul_(gain / math.sqrt(parameter.shape[1]))
