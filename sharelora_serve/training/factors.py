"""The factors that are trained: PEFT's LoRA layers, tied as ShareLoRA says (arXiv 2406.10785)."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import QKV, QKV_MODULES
from sharelora_serve.errors import AdapterInvalidError, ConfigurationError
from sharelora_serve.training.settings import TrainSettings

_NAME = "default"  # what PEFT calls the one adapter of a model


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a model's adapter.

    pairs    (layer, module) -> A (rank, in_features) and B (out_features, rank), the same
             Parameter wherever it is shared
    trained  every Parameter that is trained, once, by a name
    """

    pairs: dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]]
    trained: dict[str, nn.Parameter]


def add_factors(model: Any, layout: BaseLayout, settings: TrainSettings) -> Factors:  # noqa: ANN401
    """Freeze a decoder and give it factors; B starts at zero, so it computes what it did.

    A is drawn as LoRA draws it, uniform within 1 / sqrt(in_features), from the seed and its place
    alone; a frozen A may be another adapter's. Raises ConfigurationError if that does not fit.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=[module.rpartition(".")[2] for module in settings.modules],
        task_type="CAUSAL_LM",
    )
    decoder = model.model
    get_peft_model(model, config)  # puts its layers into the model that it is given
    factors: dict[tuple[int, str, str], nn.Parameter] = {}
    for owner, holders in _owners(decoder, settings):
        parameter = holders[0].weight
        assert isinstance(parameter, nn.Parameter), "PEFT's factors are parameters"
        for holder in holders[1:]:
            holder.weight = parameter
        factors[owner] = parameter
    pairs = {}
    for number, layer in enumerate(decoder.layers):
        for module in settings.modules:
            linear = layer.get_submodule(module)
            pairs[number, module] = (linear.lora_A[_NAME].weight, linear.lora_B[_NAME].weight)
    _fill(factors, layout, settings)
    trained = {
        f"{module}.{side}" if layer < 0 else f"{layer}.{module}.{side}": parameter
        for (layer, module, side), parameter in factors.items()
        if parameter.requires_grad
    }
    return Factors(pairs, trained)


_ALL_LAYERS = -1


def _owners(
    decoder: Any,  # noqa: ANN401 - a Hugging Face decoder
    settings: TrainSettings,
) -> Iterator[tuple[tuple[int, str, str], list[nn.Linear]]]:
    """Each distinct factor's layer, module and side, and the layers that hold it."""
    holders: dict[tuple[int, str, str], list[nn.Linear]] = {}
    method = settings.method
    for number, layer in enumerate(decoder.layers):
        for module in settings.modules:
            linear = layer.get_submodule(module)
            for side, of_side in (("A", linear.lora_A), ("B", linear.lora_B)):
                at = _ALL_LAYERS if method.shares(module, side) else number
                owner = module
                if side == "A" and at < 0 and method.share_qkv and module in QKV_MODULES:
                    owner = QKV
                holders.setdefault((at, owner, side), []).append(of_side[_NAME])
    yield from holders.items()


def _fill(
    factors: dict[tuple[int, str, str], nn.Parameter], layout: BaseLayout, settings: TrainSettings
) -> None:
    source = settings.freeze_a_from
    given = _read_a(source, layout, settings) if isinstance(source, Path) else None
    seed = source if isinstance(source, int) else settings.seed
    for (layer, module, side), parameter in factors.items():
        if side == "B":
            parameter.data.zero_()
            continue
        if given is None:
            bound = 1 / math.sqrt(parameter.shape[1])
            generator = torch.Generator().manual_seed(_seed_of(seed, layer, module))
            parameter.data.uniform_(-bound, bound, generator=generator)
        else:
            place = _of_qkv(settings)[0] if module == QKV else module
            parameter.data.copy_(given[max(layer, 0), place])
        parameter.requires_grad_(not settings.method.freeze_a)


def _of_qkv(settings: TrainSettings) -> list[str]:
    """Those of q, k and v that are adapted and share their A with all layers."""
    return [
        module
        for module in settings.modules
        if module in QKV_MODULES and settings.method.shares(module, "A")
    ]


def _seed_of(seed: int, layer: int, module: str) -> int:
    """So that a fleet draws the same A whatever other modules a member adapts."""
    return int.from_bytes(hashlib.sha256(f"{seed} {layer} {module}".encode()).digest()[:7])


def _read_a(
    path: Path, layout: BaseLayout, settings: TrainSettings
) -> dict[tuple[int, str], Tensor]:
    """The A of every layer and module of another adapter, checked to be what the run needs."""
    try:
        adapter = read_adapter(path, layout, name=path.name)
    except AdapterInvalidError as error:
        raise ConfigurationError(f"--freeze-a-from {path}: {error.message}") from error
    given = {place: pair.a for place, pair in adapter.pairs.items()}
    for module in settings.modules:
        own = [given.get((layer, module)) for layer in range(layout.num_layers)]
        if any(a is None or a.shape[0] != settings.rank for a in own):
            raise ConfigurationError(
                f"{path} has not an A of rank {settings.rank} for {module} in every layer; leave "
                "the module out, or give its --rank"
            )
        if settings.method.shares(module, "A") and len({id(a) for a in own}) > 1:
            raise ConfigurationError(
                f"{path} has another A of {module} in every layer, so layers cannot share it; "
                "give an adapter that was trained with --share A, or give --share none"
            )
    if settings.method.share_qkv and len({id(given[0, each]) for each in _of_qkv(settings)}) > 1:
        raise ConfigurationError(
            f"{path} has another A for each of q, k and v, so they cannot share it; give an "
            "adapter that was trained with --share-qkv, or leave --share-qkv out"
        )
    return given
