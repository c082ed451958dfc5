"""Synthetic ShareA adapters of any rank, with an A of their own or one common to all."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder


def write_adapters(
    folder: Path, count: int, rank: int, *, common_a: bool, expanded: bool, model: str | None
) -> None:
    """Write adapters t000, t001, ... of random factors in float16 into a folder.

    common_a  all adapters have the same A
    expanded  as plain PEFT LoRA, every layer with its own copy of A; else compact ShareLoRA
    """
    layout = load_model_config(base_folder(model)).layout("base")
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        a_generator = torch.Generator().manual_seed(0) if common_a else generator
        tensors: dict[str, Tensor] = {}
        for module in MODULES:
            in_features, out_features = layout.shapes[module]
            a = (torch.randn(rank, in_features, generator=a_generator) / in_features**0.5).half()
            if not expanded:
                tensors[f"shared.{module}.lora_A.weight"] = a
            for layer in range(layout.num_layers):
                name = f"base_model.model.model.layers.{layer}.{module}"
                b = torch.randn(out_features, rank, generator=generator) * 0.02
                tensors[f"{name}.lora_B.weight"] = b.half()
                if expanded:
                    tensors[f"{name}.lora_A.weight"] = a.clone()
        _write(folder / f"t{number:03d}", tensors, rank, expanded)


def _write(folder: Path, tensors: dict[str, Tensor], rank: int, expanded: bool) -> None:
    config = {
        "peft_type": "LORA" if expanded else "SHARELORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "task_type": "CAUSAL_LM",
        "target_modules": [module.split(".")[1] for module in MODULES],
    }
    if not expanded:
        config["share"] = "A"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors")
