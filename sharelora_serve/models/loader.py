"""The base's weights: from safetensors files to packed layers, every tensor accounted for."""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sharelora_serve.errors import UnsupportedModelError
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.layers import LayerWeights
from sharelora_serve.models.config import ModelConfig

_FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}

Fold = Callable[[int, str, Tensor], Tensor]
"""(layer, module, float32 weight) -> the weight with an adapter folded in."""


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole base. `embedding` and `head` are one object where the model ties them."""

    embedding: Any
    layers: LayerWeights
    norm: Tensor
    head: Any


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{path} is damaged: {error!r}; copy or download it again"
        ) from error


class _Checkpoint:
    """Every tensor of a folder's safetensors files, by name; remembers which were taken."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            with _undamaged(index):
                files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in files if not (folder / name).exists()]
        if missing:
            raise UnsupportedModelError(
                f"{folder} lacks {', '.join(missing)}; expected a Hugging Face folder with "
                "safetensors weights (pickled .bin files are not read)"
            )
        self.folder = folder
        self._files = {}
        for name in files:
            with _undamaged(folder / name):
                opened = safe_open(folder / name, framework="pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))
        self._left = set(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise UnsupportedModelError(f"{self.folder}: tensor {name!r} is missing")
        self._left.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise UnsupportedModelError(
                f"{self.folder}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        return tensor

    def unused(self) -> Iterator[str]:
        return (n for n in sorted(self._left) if not n.endswith("rotary_emb.inv_freq"))


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    *,
    device: torch.device,
    max_positions: int,
    fold: Fold | None,
    on_layer: Callable[[int], None],
) -> ModelWeights:
    """Read and pack a base.

    dtype          in which the linear layers and the embedding are stored
    device         where they are put
    max_positions  length of the longest sequence
    fold           applied to each adaptable weight before it is packed
    on_layer       called after each layer, for a progress bar

    Raises UnsupportedModelError for files that are damaged, and for tensors that are missing,
    misshapen, not understood, not finite or too large for the dtype.
    """
    files = _Checkpoint(folder)
    shapes = config.layout("").shapes
    num_layers = config.num_layers

    def table(name: str) -> Any:  # noqa: ANN401 - as the kernels lay it out
        weights = kernels.make_weights(1, config.vocab_size, config.hidden_size, dtype, device)
        weight = files.take(name, (config.vocab_size, config.hidden_size))
        kernels.pack(_cast(weight, dtype, name).to(device), weights[0])
        return weights[0]

    def vector(name: str, size: int) -> Tensor:
        return _cast(files.take(name, (size,)), torch.float32, name)

    def vectors(name: str, size: int) -> Tensor:
        """One vector of each layer; none of them where the first layer has none."""
        if f"model.layers.0.{name}" not in files:
            size = 0
        names = [f"model.layers.{layer}.{name}" for layer in range(num_layers)]
        return torch.stack([vector(n, size) if size else torch.empty(0) for n in names]).to(device)

    def norms(name: str, size: int) -> Tensor:
        name = f"{name}.weight"
        norm = vectors(name, size)
        if norm.shape[1] != size:
            raise UnsupportedModelError(f"{folder}: tensor 'model.layers.0.{name}' is missing")
        return norm

    def biases(modules: tuple[str, ...]) -> Tensor:
        found = [vectors(f"{module}.bias", shapes[module][1]) for module in modules]
        if len({bias.shape[1] > 0 for bias in found}) > 1:
            raise UnsupportedModelError(
                f"{folder}: only some of {', '.join(modules)} have a bias, which is not supported"
            )
        return torch.cat(found, dim=1)

    def columns(modules: tuple[str, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(shapes[module][1] for module in modules)])

    products = {
        fused: kernels.make_weights(
            num_layers, int(columns(modules)[-1]), shapes[modules[0]][0], dtype, device
        )
        for fused, modules in _FUSED.items()
    }
    embedding = table("model.embed_tokens.weight")
    for layer in range(num_layers):
        for fused, modules in _FUSED.items():
            parts = []
            for module in modules:
                inputs, outputs = shapes[module]
                name = f"model.layers.{layer}.{module}.weight"
                weight = files.take(name, (outputs, inputs)).float()
                weight = weight if fold is None else fold(layer, module, weight)
                parts.append(_cast(weight, dtype, name))
            kernels.pack(torch.cat(parts).to(device), products[fused][layer])
        on_layer(layer)
    cosine, sine = config.rotary_tables(max_positions)
    head_norm = config.head_dim if config.qk_norm else 0
    weights = ModelWeights(
        embedding=embedding,
        layers=LayerWeights(
            input_norm=norms("input_layernorm", config.hidden_size),
            q_norm=norms("self_attn.q_norm", head_norm),
            k_norm=norms("self_attn.k_norm", head_norm),
            post_norm=norms("post_attention_layernorm", config.hidden_size),
            **products,
            **{f"{fused}_bias": biases(modules) for fused, modules in _FUSED.items()},
            **{f"{fused}_columns": columns(modules) for fused, modules in _FUSED.items()},
            windows=torch.tensor(config.windows),
            norm_eps=config.norm_eps,
            cosine=cosine.to(device),
            sine=sine.to(device),
        ),
        norm=vector("model.norm.weight", config.hidden_size).to(device),
        head=embedding if config.tied else table("lm_head.weight"),
    )
    if config.tied and "lm_head.weight" in files:  # a copy of the embedding
        files.take("lm_head.weight", (config.vocab_size, config.hidden_size))
    unused = list(files.unused())
    if unused:
        raise UnsupportedModelError(
            f"{folder}: {len(unused)} tensors are not understood, such as {', '.join(unused[:5])}"
        )
    return weights


def fold_weights(
    base: ModelWeights,
    config: ModelConfig,
    dtype: torch.dtype,
    kernels: Kernels,
    *,
    device: torch.device,
    modules: Collection[str],
    fold: Fold,
    is_wanted: Callable[[], bool],
) -> ModelWeights | None:
    """A second set of weights, folded, beside a base that stays as it is.

    modules    the only ones that the fold changes; whatever it leaves alone both sets share
    is_wanted  asked before every weight; once it says no, nothing more is done

    Returns None if it was not wanted to the end. Raises UnsupportedModelError for a sum that is
    too large for the dtype, and what the fold raises.
    """
    shapes = config.layout("").shapes
    products = {}
    for fused, parts in _FUSED.items():
        if not any(module in modules for module in parts):
            continue
        inputs, outputs = shapes[parts[0]][0], [shapes[module][1] for module in parts]
        stacked = getattr(base.layers, fused)
        folded = kernels.make_weights(config.num_layers, sum(outputs), inputs, dtype, device)
        for layer in range(config.num_layers):
            if not is_wanted():
                return None
            weights = kernels.unpack(stacked[layer], sum(outputs), dtype).float().split(outputs)
            changed = [
                _cast(fold(layer, *part), dtype, f"model.layers.{layer}.{part[0]}.weight")
                for part in zip(parts, weights, strict=True)
            ]
            kernels.pack(torch.cat(changed), folded[layer])
        products[fused] = folded
    return replace(base, layers=replace(base.layers, **products))


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype)
    if torch.isfinite(cast).all():
        return cast
    if torch.isfinite(weight).all():
        remedy = f"values that {dtype} cannot hold; serve it with --dtype float32"
    else:
        remedy = "infinite values or NaN, with which nothing can be answered; save it again"
    raise UnsupportedModelError(f"{name} has {remedy}")
