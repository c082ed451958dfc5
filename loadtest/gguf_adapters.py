"""Adapters in llama.cpp's form."""

from collections.abc import Mapping
from pathlib import Path

import gguf
from torch import Tensor

from sharelora_serve.models.config import ModelConfig

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    a: Mapping[tuple[int, str], Tensor],
    b: Mapping[tuple[int, str], Tensor],
    rank: int,
    config: ModelConfig,
) -> None:
    """Write one adapter, of alpha = 2 rank, in float32.

    a and b are (layer, module) -> (rank, in_features) and (out_features, rank).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * rank)
    heads = {
        "self_attn.q_proj": config.num_heads,
        "self_attn.k_proj": config.num_kv_heads,
    }
    for (layer, module), factor in a.items():
        name = f"blk.{layer}.{_NAMES[module]}.weight"
        expand = b[layer, module]
        if module in heads:
            expand = _interleaved(expand, heads[module])
        writer.add_tensor(f"{name}.lora_a", factor.float().numpy())
        writer.add_tensor(f"{name}.lora_b", expand.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(b: Tensor, num_heads: int) -> Tensor:
    """The rows of every head as llama.cpp rotates them: the two halves in turn."""
    return b.view(num_heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)
