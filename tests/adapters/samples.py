"""Random adapters of a tiny LLaMA, and their files as other tools write them.

Nothing here uses the package's own writer, so that the reader is checked against something else.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.format import adapter_digest, read_adapter
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.errors import AdapterInvalidError

NUM_LAYERS = 3
VOCAB_SIZE = 48
LAYOUT = BaseLayout(
    "tiny",
    NUM_LAYERS,
    {
        "self_attn.q_proj": (24, 24),
        "self_attn.k_proj": (24, 8),
        "self_attn.v_proj": (24, 8),
        "self_attn.o_proj": (24, 24),
        "mlp.gate_proj": (24, 40),
        "mlp.up_proj": (24, 40),
        "mlp.down_proj": (40, 24),
    },
)
QKV_MODULES = MODULES[:3]

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """A random float32 base with the shapes of LAYOUT."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return model


def make_adapter(pairs: Mapping[tuple[int, str], FactorPair], name: str = "acme") -> Adapter:
    return Adapter(name=name, digest=adapter_digest(pairs), pairs=dict(pairs), config={})


def random_adapter(
    seed: int,
    share: str = "",
    *,
    share_qkv: bool = False,
    rank: int = 4,
    scaling: float = 2.0,
    modules: Iterable[str] = MODULES,
    layers: Iterable[int] = range(NUM_LAYERS),
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Nothing shared, or A, B or AB by all layers; share_qkv: one A for q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[tuple[str, str], Tensor] = {}
    pairs = {}
    for layer in layers:
        for module in modules:
            in_features, out_features = LAYOUT.shapes[module]
            a = torch.randn(rank, in_features, generator=generator).to(dtype)
            b = torch.randn(out_features, rank, generator=generator).to(dtype)
            if "A" in share:
                group = "qkv" if share_qkv and module in QKV_MODULES else module
                a = kept.setdefault((group, "A"), a)
            if "B" in share:
                b = kept.setdefault((module, "B"), b)
            pairs[layer, module] = FactorPair(a, b, scaling)
    return make_adapter(pairs)


def peft_config(adapter: Adapter, **changes: Any) -> Config:
    """The configuration of an adapter with one rank and one scale."""
    pair = next(iter(adapter.pairs.values()))
    rank = pair.a.shape[0]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": pair.scaling * rank, **changes}


def peft_tensors(adapter: Adapter) -> Tensors:
    """Every layer's A and B under PEFT's names."""
    tensors = {}
    for (layer, module), pair in adapter.pairs.items():
        prefix = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{prefix}.lora_A.weight"] = pair.a.clone()
        tensors[f"{prefix}.lora_B.weight"] = pair.b.clone()
    return tensors


def compact_tensors(adapter: Adapter, share: str, *, share_qkv: bool = False) -> Tensors:
    """What design section 6 says: a shared factor once, the others under PEFT's names."""
    tensors = {}
    for (layer, module), pair in adapter.pairs.items():
        for side, factor in ("A", pair.a), ("B", pair.b):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            if side in share:
                joined = side == "A" and share_qkv and module in QKV_MODULES
                prefix = "shared.self_attn.qkv" if joined else f"shared.{module}"
            tensors[f"{prefix}.lora_{side}.weight"] = factor.clone()
    return tensors


def mlx_tensors(adapter: Adapter) -> Tensors:
    """mlx-lm's names, both factors transposed."""
    tensors = {}
    for (layer, module), pair in adapter.pairs.items():
        tensors[f"model.layers.{layer}.{module}.lora_a"] = pair.a.t().contiguous()
        tensors[f"model.layers.{layer}.{module}.lora_b"] = pair.b.t().contiguous()
    return tensors


def write_folder(
    folder: Path, config: Config | str, tensors: Tensors, file: str = "adapter_model.safetensors"
) -> Path:
    folder.mkdir(parents=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def read(path: Path) -> Adapter:
    return read_adapter(path, LAYOUT, name="acme")


def refusal(path: Path) -> str:
    with pytest.raises(AdapterInvalidError) as caught:
        read(path)
    assert "adapter 'acme' cannot be served" in caught.value.message
    assert caught.value.param == "file"
    return caught.value.message


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message
