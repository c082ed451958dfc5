"""The linear layers of any model that transformers knows, from its configuration alone."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from sharelora_serve.errors import ConfigurationError, UnsupportedModelError

_IN_A_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.(.+)")
_QKV = re.compile(r"(q_proj|k_proj|v_proj|query|key|value|c_attn(\.[qkv])?)$")


@dataclass(frozen=True, slots=True)
class LinearShapes:
    """The linear layers that every layer of a model has.

    num_layers  layers of the model
    shapes      module, such as self_attn.q_proj -> (in_features, out_features)
    parts       what --modules may name too: the q, k and v of a fused layer, each with its own
                factors, as loralib has them and PEFT has not
    """

    num_layers: int
    shapes: dict[str, tuple[int, int]]
    parts: dict[str, tuple[int, int]]

    def choose(self, modules: str) -> dict[str, tuple[int, int]]:
        """The shapes of the modules that a text names; see choose_modules."""
        names = choose_modules(modules, (*self.shapes, *self.parts), self.shapes)
        return {name: {**self.shapes, **self.parts}[name] for name in names}


def choose_modules(text: str, known: Iterable[str], all_linear: Iterable[str]) -> tuple[str, ...]:
    """The known modules that a text names, such as "q_proj,v_proj", in their order.

    "all-linear" is what it says. A name may be the last part of a module's alone, without _proj
    too. Raises ConfigurationError, with what is known, if one names none.
    """
    if text == "all-linear":
        return tuple(all_linear)
    known = tuple(known)
    chosen: set[str] = set()
    for name in (name.strip() for name in text.split(",")):
        ending = f".{name.removesuffix('_proj')}"
        found = {module for module in known if f".{module}".removesuffix("_proj").endswith(ending)}
        if not found:
            raise ConfigurationError(
                f"there is no module {name!r}; name some of {', '.join(known)}, or all-linear"
            )
        chosen |= found
    return tuple(module for module in known if module in chosen)


def reads_as_qkv(module: str) -> bool:
    """Whether a module is q, k or v, which read the same input."""
    return _QKV.search(module) is not None


def read_linear_shapes(folder: Path) -> LinearShapes:
    """The linear layers of the model whose config.json is in the folder; no weights are needed.

    Raises UnsupportedModelError if transformers does not know the model, or its layers differ.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} is not the configuration of a model: {error}"
        ) from error
    of_module: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
    stacks: set[str] = set()
    for name, module in model.named_modules():
        place = _IN_A_LAYER.search(name)
        if place is not None and (shape := _shape(module)) is not None:
            of_module[place[2]][int(place[1])] = shape
            stacks.add(name[: place.start(1)])
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{folder / 'config.json'} has layers in {', '.join(sorted(stacks))}; expected one "
            "stack of layers, an encoder's or a decoder's"
        )
    num_layers = max((len(layers) for layers in of_module.values()), default=0)
    uneven = [
        module
        for module, layers in of_module.items()
        if len(layers) < num_layers or len(set(layers.values())) > 1
    ]
    if not of_module or uneven:
        raise UnsupportedModelError(
            f"{folder / 'config.json'}: expected layers that all have the same linear modules; "
            + (f"{', '.join(uneven)} differ from layer to layer" if uneven else "it has none")
        )
    shapes = {module: layers[0] for module, layers in of_module.items()}
    return LinearShapes(num_layers, shapes, _parts(shapes))


def _shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _parts(shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The three outputs of GPT-2's fused c_attn."""
    return {
        f"{module}.{part}": (in_features, out_features // 3)
        for module, (in_features, out_features) in shapes.items()
        if module.endswith("c_attn")
        for part in "qkv"
    }
