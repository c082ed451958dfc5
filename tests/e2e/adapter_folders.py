"""Random adapters of a base, as folders that a server reads."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sharelora_serve.models.config import load_model_config

NAMES = ("acme", "bolt", "cargo")
"""acme is ShareA, bolt plain LoRA, cargo plain LoRA of q and v only."""

_RANKS = (8, 5, 13)


def write_adapters(folder: Path, model_folder: Path, seed: int) -> Path:
    """One subfolder for each of NAMES; their answers differ from the base's and each other's."""
    generator = torch.Generator().manual_seed(seed)
    layout = load_model_config(model_folder).layout("base")
    for name, rank in zip(NAMES, _RANKS, strict=True):
        tensors = {}
        modules = [m for m in layout.shapes if name != "cargo" or m.endswith(("q_proj", "v_proj"))]
        for module in modules:
            in_features, out_features = layout.shapes[module]
            factors = torch.randn(layout.num_layers, rank, in_features, generator=generator)
            for layer, factor in enumerate(factors):
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                if name != "acme":
                    tensors[f"{prefix}.lora_A.weight"] = factor.clone()
                elif layer == 0:
                    tensors[f"shared.{module}.lora_A.weight"] = factor.clone()
                b = (
                    torch.randn(out_features, rank, generator=generator)
                    / (in_features * rank) ** 0.5
                )
                tensors[f"{prefix}.lora_B.weight"] = b
        config = {
            **(
                {"peft_type": "SHARELORA", "share": "A"}
                if name == "acme"
                else {"peft_type": "LORA"}
            ),
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [module.rpartition(".")[2] for module in modules],
        }
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "adapter_model.safetensors")
    return folder
