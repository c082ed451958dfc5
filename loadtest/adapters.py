"""Synthetic adapters of any rank and sharing, on all seven modules of every layer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from loadtest.gguf_adapters import write_gguf
from loadtest.workloads import adapter_name
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder

Share = Literal["none", "A", "B", "AB"]

Factors = dict[tuple[int, str], Tensor]
"""(layer, module) -> factor in float16; a shared one is the same tensor in every layer."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What adapters are like.

    share     the factors of which all layers have the same one
    ranks     of the adapters in turn
    common_a  all adapters have the same A's; of a lower rank, the first rows of it
    expanded  as plain PEFT LoRA, every layer with its own copy of what is shared
    """

    share: Share
    ranks: tuple[int, ...]
    common_a: bool = False
    expanded: bool = False

    @classmethod
    def parse(cls, share: str, ranks: str, *, common_a: bool, expanded: bool) -> "Kind":
        """From a command line; RuntimeError if there are no such adapters."""
        if share not in get_args(Share):
            raise RuntimeError(f"share: {share!r} is none of {', '.join(get_args(Share))}")
        words = ranks.split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            raise RuntimeError(f"rank: {ranks!r} should be such as 16, or 8,64")
        return cls(cast(Share, share), tuple(map(int, words)), common_a, expanded)


def write_adapters(
    folder: Path, count: int, kind: Kind, *, gguf: Path | None = None, model: str | None = None
) -> None:
    """Write adapters t000, t001, ... of random factors in float16 into a folder.

    The same arguments give the same bytes. The folder `gguf`, if given, gets the same adapters as
    llama.cpp reads them.
    """
    config = load_model_config(base_folder(model, config_only=True))
    layout = config.layout("base")
    for number in range(count):
        rank = kind.ranks[number % len(kind.ranks)]
        a, b = _factors(number, rank, kind, layout)
        _write(folder / adapter_name(number), a, b, rank, kind)
        if gguf is not None:
            write_gguf(gguf / f"{adapter_name(number)}.gguf", a, b, rank, config)


def _factors(number: int, rank: int, kind: Kind, layout: BaseLayout) -> tuple[Factors, Factors]:
    generator = torch.Generator().manual_seed(number)
    # Drawn at the highest rank, so that all ranks have the first rows in common.
    a_generator = torch.Generator().manual_seed(0) if kind.common_a else generator
    a_rank = max(kind.ranks) if kind.common_a else rank
    a: Factors = {}
    b: Factors = {}
    for module in MODULES:
        in_features, out_features = layout.shapes[module]
        for layer in range(layout.num_layers):
            if layer == 0 or "A" not in kind.share:
                drawn = torch.randn(a_rank, in_features, generator=a_generator) / in_features**0.5
                a[layer, module] = drawn[:rank].half().contiguous()
            if layer == 0 or "B" not in kind.share:
                drawn = torch.randn(out_features, rank, generator=generator) * 0.02
                b[layer, module] = drawn.half()
            a.setdefault((layer, module), a[0, module])
            b.setdefault((layer, module), b[0, module])
    return a, b


def _write(folder: Path, a: Factors, b: Factors, rank: int, kind: Kind) -> None:
    is_compact = kind.share != "none" and not kind.expanded
    tensors: dict[str, Tensor] = {}
    for side, factors in (("A", a), ("B", b)):
        is_shared = is_compact and side in kind.share
        tensors |= dict(_named(side, factors, is_shared=is_shared))
    config = {
        "peft_type": "SHARELORA" if is_compact else "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "task_type": "CAUSAL_LM",
        "target_modules": [module.split(".")[1] for module in MODULES],
    }
    if is_compact:
        config["share"] = kind.share
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config) + "\n")
    save_file(tensors, folder / "adapter_model.safetensors")


def _named(side: str, factors: Factors, *, is_shared: bool) -> Iterator[tuple[str, Tensor]]:
    for (layer, module), factor in factors.items():
        if not is_shared:
            name = f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight"
            # A copy of its own: safetensors refuses one tensor under two names.
            yield name, factor.clone()
        elif layer == 0:
            yield f"shared.{module}.lora_{side}.weight", factor
