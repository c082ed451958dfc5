"""Fresh random adapters of every form that is served, written to disk as other tools write them.

What each of them computes is known from how it was drawn: the server's reader takes no part.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sharelora_serve.adapters.adapter import Adapter, FactorPair

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ALL = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Form:
    """One adapter, but for its values.

    rank, alpha     of the modules that no pattern names
    rank_pattern    the end of a module's name -> its rank; no two name the same module
    alpha_pattern   likewise
    layers          those adapted; None for all
    share           the sides that all layers of a module share: "", "A", "B" or "AB"
    share_qkv       one A for q, k and v
    common_a        A is the same in every form that has this and the same rank
    compact         shared factors are stored once; else as PEFT does, a clone for each layer
    dtype           of the file
    """

    rank: int
    alpha: float
    modules: tuple[str, ...] = ALL
    layers: tuple[int, ...] | None = None
    share: str = ""
    share_qkv: bool = False
    common_a: bool = False
    compact: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def rank_of(self, layer: int, module: str) -> int:
        return _named(self.rank_pattern, layer, module, self.rank)

    def scaling_of(self, layer: int, module: str) -> float:
        """s of LoRA (arXiv 2106.09685, section 4.1) or of rsLoRA (2312.03732)."""
        rank = self.rank_of(layer, module)
        alpha = _named(self.alpha_pattern, layer, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


# Every rank but one is no multiple of a page's 8 rows. Layers 0 to 2 are in every base.
FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "lora": Form(rank=5, alpha=16),
        "lora-rank-1": Form(rank=1, alpha=2),
        "lora-rank-61": Form(rank=61, alpha=32, modules=("self_attn.v_proj", "mlp.up_proj")),
        "lora-bfloat16": Form(rank=16, alpha=16, dtype=torch.bfloat16),
        "share-a": Form(rank=13, alpha=26, share="A", compact=True),
        "share-a-in-peft": Form(rank=11, alpha=22, share="A"),
        "share-b": Form(rank=9, alpha=9, share="B", compact=True),
        "share-ab": Form(rank=27, alpha=16, share="AB", compact=True),
        "share-qkv": Form(rank=6, alpha=12, share="A", share_qkv=True, compact=True),
        "share-qkv-ab": Form(rank=14, alpha=7, share="AB", share_qkv=True, compact=True),
        "common-a-1": Form(rank=10, alpha=20, share="A", common_a=True, compact=True),
        "common-a-2": Form(rank=10, alpha=5, share="A", common_a=True, compact=True),
        "common-a-in-peft": Form(rank=10, alpha=20, share="A", common_a=True),
        "rslora": Form(rank=12, alpha=8, use_rslora=True),
        "rslora-share-a": Form(rank=20, alpha=8, use_rslora=True, share="A", compact=True),
        "patterns": Form(
            rank=7,
            alpha=14,
            rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 19},
            alpha_pattern={"v_proj": 3, "layers.0.self_attn.q_proj": 9, "1.mlp.down_proj": 5},
        ),
        "patterns-share-ab": Form(
            rank=4,
            alpha=8,
            share="AB",
            compact=True,
            rank_pattern={"mlp.up_proj": 23},
            alpha_pattern={"mlp.up_proj": 11, "o_proj": 2},
        ),
        "some-layers": Form(rank=15, alpha=15, layers=(1, 2)),
        "some-layers-share-ab": Form(rank=3, alpha=9, layers=(0, 2), share="AB", compact=True),
        "attention-only": Form(rank=2, alpha=8, modules=("self_attn.q_proj", "self_attn.v_proj")),
        "mlp-only-share-a": Form(
            rank=18, alpha=9, modules=("mlp.gate_proj", "mlp.down_proj"), share="A", compact=True
        ),
    }
)
"""The forms of one golden batch, by the adapter's name."""

PEFT_NAMES = tuple(name for name, form in FORMS.items() if not form.compact)
"""Those that PEFT itself can read."""


def write_adapters(
    folder: Path,
    model: PreTrainedModel,
    seed: int,
    strength: float,
    names: Iterable[str] = tuple(FORMS),
    *,
    in_int8: bool = False,
) -> dict[str, Adapter]:
    """Draw an adapter of each form, write it to a folder under its name; what they compute.

    model     the base that they adapt, for its shapes
    strength  how far a module's outputs move, on inputs of mean square 1, whatever the scale
    in_int8   every value is a whole number of steps, at most 127, and each page has one of 127
    """
    return {
        name: _write(
            folder / name, FORMS[name], _draw(FORMS[name], model, seed, index, strength, in_int8)
        )
        for index, name in enumerate(names)
    }


def _write(folder: Path, form: Form, pairs: dict[tuple[int, str], FactorPair]) -> Adapter:
    config: dict[str, Any] = {
        "peft_type": "SHARELORA" if form.compact else "LORA",
        "task_type": "CAUSAL_LM",
        "r": form.rank,
        "lora_alpha": form.alpha,
        "target_modules": [module.rpartition(".")[2] for module in form.modules],
        "layers_to_transform": None if form.layers is None else list(form.layers),
        "use_rslora": form.use_rslora,
        "rank_pattern": dict(form.rank_pattern),
        "alpha_pattern": dict(form.alpha_pattern),
    }
    if form.compact:
        config |= {"share": form.share, "share_qkv": form.share_qkv}
    tensors: dict[str, Tensor] = {}
    for (layer, module), pair in pairs.items():
        for side, factor in ("A", pair.a), ("B", pair.b):
            path = f"base_model.model.model.layers.{layer}.{module}"
            if form.compact and side in form.share:
                path = f"shared.{_group(form, module, side)}"
            tensors[f"{path}.lora_{side}.weight"] = factor.clone()
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Adapter(name=folder.name, digest="", pairs=pairs, config=config)


def _draw(
    form: Form, model: PreTrainedModel, seed: int, index: int, strength: float, in_int8: bool
) -> dict[tuple[int, str], FactorPair]:
    generator = torch.Generator().manual_seed(seed + index)
    a_generator = torch.Generator().manual_seed(seed - 1) if form.common_a else generator
    kept: dict[tuple[str, str], Tensor] = {}
    pairs = {}
    layers = range(len(model.model.layers)) if form.layers is None else form.layers
    for layer in layers:
        for module in form.modules:
            out_features, in_features = model.model.layers[layer].get_submodule(module).weight.shape
            rank, scaling = form.rank_of(layer, module), form.scaling_of(layer, module)
            # Without the scale the outputs move by `strength / scaling`, so a wrong one shows.
            a = torch.randn(rank, in_features, generator=a_generator) / math.sqrt(in_features)
            b = torch.randn(out_features, rank, generator=generator)
            b *= strength / (scaling * math.sqrt(rank))
            if in_int8:
                a, b = _whole_steps(a), _whole_steps(b.T).T.contiguous()
            a, b = a.to(form.dtype), b.to(form.dtype)
            if "A" in form.share:
                a = kept.setdefault((_group(form, module, "A"), "A"), a)
            if "B" in form.share:
                b = kept.setdefault((module, "B"), b)
            pairs[layer, module] = FactorPair(a, b, scaling)
    return pairs


def _whole_steps(rows: Tensor) -> Tensor:
    """Rank rows near these that int8 pages hold exactly, whatever floating point type they have."""
    pages = []
    for page in rows.split(8):
        step = 2.0 ** math.ceil(math.log2(page.abs().max() / 127))
        whole = (page / step).round()
        whole[page.abs() == page.abs().max()] = 127.0
        pages.append(whole * step)
    return torch.cat(pages)


def _group(form: Form, module: str, side: str) -> str:
    """The name under which a shared factor is stored."""
    return "self_attn.qkv" if side == "A" and form.share_qkv and module in QKV else module


def _named(pattern: Mapping[str, Any], layer: int, module: str, otherwise: Any) -> Any:
    path = f"model.layers.{layer}.{module}"
    matching = [value for end, value in pattern.items() if path.endswith(f".{end}")]
    assert len(matching) < 2, f"two patterns name {path}"
    return matching[0] if matching else otherwise
