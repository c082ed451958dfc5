"""Write what was trained as an adapter's folder, in the form that this server stores."""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.adapter_files import CONFIG_FILE, PEFT_FILE
from sharelora_serve.adapters.cast import lost_in_cast
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import canonical_path
from sharelora_serve.adapters.writer import write_compact, write_peft
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.training.factors import Factors
from sharelora_serve.training.settings import TrainSettings


def export(
    factors: Factors,
    layout: BaseLayout,
    settings: TrainSettings,
    base: str,
    folder: Path,
    dtype: torch.dtype,
) -> Adapter:
    """Write the factors, rounded to dtype, as compact ShareLoRA, or as PEFT LoRA if none is shared.

    base  what base_model_name_or_path says. The folder must not exist; it appears whole or not at
    all. Raises ConfigurationError if the factors do not fit dtype, FileExistsError, OSError.
    """
    rounded: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for (layer, module), pair in factors.pairs.items():
        for side, factor in zip("AB", pair, strict=True):
            key = f"base_model.model.{canonical_path(layer, module)}.lora_{side}.weight"
            if id(factor) not in rounded:
                rounded[id(factor)] = _round(factor.detach(), dtype, key)
            tensors[key] = rounded[id(factor)].clone()  # a file has no two tensors that are one
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "target_modules": [module.rpartition(".")[2] for module in settings.modules],
    }
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary)
        (whole / CONFIG_FILE).write_text(json.dumps(config))
        save_file(tensors, whole / PEFT_FILE)
        adapter = read_adapter(whole, layout, name=folder.name)
        write = write_compact if settings.method.share else write_peft
        write(adapter, layout, folder)
    return adapter


def _round(factor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    stored = factor.to(dtype)
    if lost := lost_in_cast(factor, stored):
        raise ConfigurationError(
            f"the adapter does not fit {str(dtype).removeprefix('torch.')}: {key}: {lost}; give "
            "--resume --dtype float32"
        )
    return stored
