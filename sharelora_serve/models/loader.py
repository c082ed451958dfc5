"""The base's weights: from safetensors files to packed layers, every tensor accounted for."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sharelora_serve.errors import UnsupportedModelError
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.models.config import ModelConfig

Fold = Callable[[int, str, Tensor], Tensor]
"""(layer, module, float32 weight) -> the weight with an adapter folded in."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; q, k, v and gate, up are fused. Norms and biases are float32.

    q_norm, k_norm  (head_dim,), empty where the model has none
    """

    input_norm: Tensor
    qkv: Any
    qkv_bias: Tensor | None
    q_norm: Tensor
    k_norm: Tensor
    o: Any
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Any
    gate_up_bias: Tensor | None
    down: Any
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole base. `embedding` and `head` are one object where the model ties them."""

    embedding: Any
    layers: list[LayerWeights]
    norm: Tensor
    head: Any


class _Checkpoint:
    """Every tensor of a folder's safetensors files, by name; remembers which were taken."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in files if not (folder / name).exists()]
        if missing:
            raise UnsupportedModelError(
                f"{folder} lacks {', '.join(missing)}; expected a Hugging Face folder with "
                "safetensors weights (pickled .bin files are not read)"
            )
        self.folder = folder
        self._files = {}
        for name in files:
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
    fold: Fold | None,
    on_layer: Callable[[int], None],
) -> ModelWeights:
    """Read and pack a base.

    device     where they are put
    dtype      in which the linear layers and the embedding are stored
    fold       applied to each adaptable weight before it is packed
    on_layer   called after each layer, for a progress bar

    Raises UnsupportedModelError for tensors that are missing, misshapen, not understood, or too
    large for the dtype.
    """
    files = _Checkpoint(folder)
    shapes = config.layout("").shapes

    def vector(name: str, size: int) -> Tensor:
        return files.take(name, (size,)).float().to(device)

    def pack(weight: Tensor, name: str) -> Any:  # noqa: ANN401 - as the kernels lay it out
        return kernels.pack(_cast(weight, dtype, name).to(device))

    def fused(prefix: str, modules: list[str], layer: int) -> tuple[Any, Tensor | None]:
        weights, biases = [], []
        for module in modules:
            name = f"{prefix}{module}"
            inputs, outputs = shapes[module]
            weight = files.take(f"{name}.weight", (outputs, inputs)).float()
            weights.append(weight if fold is None else fold(layer, module, weight))
            if f"{name}.bias" in files:
                biases.append(vector(f"{name}.bias", outputs))
        if biases and len(biases) < len(modules):
            raise UnsupportedModelError(f"{prefix}: only some of {', '.join(modules)} have a bias")
        return pack(torch.cat(weights), f"{prefix}{modules[0]}.weight"), torch.cat(
            biases
        ) if biases else None

    def load_layer(layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        qkv, qkv_bias = fused(prefix, [f"self_attn.{x}_proj" for x in "qkv"], layer)
        o, o_bias = fused(prefix, ["self_attn.o_proj"], layer)
        gate_up, gate_up_bias = fused(prefix, ["mlp.gate_proj", "mlp.up_proj"], layer)
        down, down_bias = fused(prefix, ["mlp.down_proj"], layer)
        head_norm = config.head_dim if config.qk_norm else 0
        norms = [
            vector(f"{prefix}self_attn.{side}_norm.weight", head_norm)
            if head_norm
            else torch.empty(0, device=device)
            for side in "qk"
        ]
        return LayerWeights(
            input_norm=vector(f"{prefix}input_layernorm.weight", config.hidden_size),
            qkv=qkv,
            qkv_bias=qkv_bias,
            q_norm=norms[0],
            k_norm=norms[1],
            o=o,
            o_bias=o_bias,
            post_norm=vector(f"{prefix}post_attention_layernorm.weight", config.hidden_size),
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
        )

    table = (config.vocab_size, config.hidden_size)
    name = "model.embed_tokens.weight"
    embedding = pack(files.take(name, table), name)
    layers = []
    for layer in range(config.num_layers):
        layers.append(load_layer(layer))
        on_layer(layer)
    norm = vector("model.norm.weight", config.hidden_size)
    head = embedding
    if config.tied:
        files.take("lm_head.weight", table) if "lm_head.weight" in files else None
    else:
        head = pack(files.take("lm_head.weight", table), "lm_head.weight")
    unused = list(files.unused())
    if unused:
        raise UnsupportedModelError(
            f"{folder}: {len(unused)} tensors are not understood, such as {', '.join(unused[:5])}"
        )
    return ModelWeights(embedding, layers, norm, head)


def _cast(weight: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = weight.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise UnsupportedModelError(
            f"{name} holds values that {dtype} cannot; serve it with --dtype float32"
        )
    return cast
