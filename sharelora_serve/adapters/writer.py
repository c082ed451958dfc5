"""Write an adapter's folder: as plain LoRA for PEFT and vLLM, or as compact ShareLoRA."""

import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.adapter_files import CONFIG_FILE, PEFT_FILE
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import QKV, QKV_MODULES, Side, canonical_path
from sharelora_serve.errors import AdapterInvalidError

_Pairs = Mapping[tuple[int, str], FactorPair]
_Value = TypeVar("_Value", float, tuple[int, ...])

_FOLDER_MODE = 0o755  # mkdtemp's own lets nobody else read what is meant to be passed on


def write_peft(adapter: Adapter, layout: BaseLayout, folder: Path) -> None:
    """Write an adapter of a base as plain PEFT LoRA, every layer with its own A and B.

    The folder must not exist; it appears whole or not at all, and reads back as the same digest.
    Raises AdapterInvalidError if the form cannot hold the adapter, FileExistsError, OSError.
    """
    tensors: dict[str, Tensor] = {}
    for (layer, module), pair in adapter.pairs.items():
        tensors[_own_key(layer, module, "A")] = pair.a
        tensors[_own_key(layer, module, "B")] = pair.b
    config = {"peft_type": "LORA", **_config(adapter), **_targets(adapter.pairs, layout)}
    _write(adapter, layout, folder, config, tensors)


def write_compact(adapter: Adapter, layout: BaseLayout, folder: Path) -> None:
    """Write an adapter of a base as compact ShareLoRA, what all layers share only once.

    The folder must not exist; it appears whole or not at all, and reads back as the same digest.
    Raises AdapterInvalidError if nothing is shared or the form cannot hold the adapter,
    FileExistsError, OSError.
    """
    shared, layers = _sharing(adapter.pairs)
    if not shared:
        raise AdapterInvalidError(
            f"adapter {adapter.name!r} cannot be written as compact ShareLoRA: in no module do "
            "several layers have the same A or B, bit for bit; write it as plain PEFT LoRA"
        )
    tensors = {f"shared.{module}.lora_{side}.weight": of for (module, side), of in shared.items()}
    for (layer, module), pair in adapter.pairs.items():
        if not _is_shared(shared, module, "A"):
            tensors[_own_key(layer, module, "A")] = pair.a
        if not _is_shared(shared, module, "B"):
            tensors[_own_key(layer, module, "B")] = pair.b
    config = {
        "peft_type": "SHARELORA",
        "share": "".join(sorted({side for _, side in shared})),
        "share_qkv": (QKV, "A") in shared,
        **_config(adapter),
        "target_modules": _short_names(adapter.pairs),
        "layers_to_transform": None if layers == (*range(layout.num_layers),) else layers,
    }
    _write(adapter, layout, folder, config, tensors)


def _sharing(pairs: _Pairs) -> tuple[dict[tuple[str, Side], Tensor], tuple[int, ...] | None]:
    """What the compact form stores once, and the layers of modules that share both A and B.

    Nothing but `layers_to_transform` tells where such a module applies, and there is one list for
    all: a module with other layers than most stores its B in each of them.
    """
    of_module: dict[str, dict[int, FactorPair]] = defaultdict(dict)
    for (layer, module), pair in pairs.items():
        of_module[module][layer] = pair
    shared: dict[tuple[str, Side], Tensor] = {}
    for module, of_layer in of_module.items():
        if len(of_layer) > 1:
            if (a := _only([pair.a for pair in of_layer.values()])) is not None:
                shared[module, "A"] = a
            if (b := _only([pair.b for pair in of_layer.values()])) is not None:
                shared[module, "B"] = b
    attention = [pair.a for (_, module), pair in pairs.items() if module in QKV_MODULES]
    if len(of_module.keys() & set(QKV_MODULES)) > 1 and (a := _only(attention)) is not None:
        for module in QKV_MODULES:
            shared.pop((module, "A"), None)
        shared[QKV, "A"] = a

    in_full = {
        module: tuple(sorted(of_layer))
        for module, of_layer in of_module.items()
        if _is_shared(shared, module, "A") and _is_shared(shared, module, "B")
    }
    if not in_full:
        return shared, None
    layers = _most_common(in_full.values())
    for module, own in in_full.items():
        if own != layers:
            del shared[module, "B"]
    return shared, layers


def _only(factors: list[Tensor]) -> Tensor | None:
    """The one Tensor that all of them are, or None; equal factors of an Adapter are one."""
    return factors[0] if len({id(factor) for factor in factors}) == 1 else None


def _is_shared(shared: Mapping[tuple[str, Side], Tensor], module: str, side: Side) -> bool:
    if side == "A" and module in QKV_MODULES and (QKV, "A") in shared:
        return True
    return (module, side) in shared


def _own_key(layer: int, module: str, side: Side) -> str:
    return f"base_model.model.{canonical_path(layer, module)}.lora_{side}.weight"


def _config(adapter: Adapter) -> dict[str, Any]:
    """The fields that both forms have."""
    pairs = adapter.pairs
    ranks = {place: pair.a.shape[0] for place, pair in pairs.items()}
    alphas = {place: _alpha(pair.scaling, ranks[place]) for place, pair in pairs.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    base = adapter.config.get("base_model_name_or_path")
    return {
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        "use_rslora": False,  # alpha is the one that gives the same scale without it
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _alpha(scaling: float, rank: int) -> float:
    """The alpha with alpha / rank = scaling, whole where a whole one gives it.

    Dividing may give a neighbour of scaling among the float64 numbers, but never one that rounds
    to another float32: a bound between two of those, times a rank, is exact.
    """
    alpha = scaling * rank
    return round(alpha) if round(alpha) / rank == scaling else alpha


def _pattern(values: Mapping[tuple[int, str], float], default: float) -> dict[str, float]:
    """rank_pattern or alpha_pattern: the values that are not the default, by module name.

    A name is a module's where all its layers agree, else one layer's.
    """
    of_module: dict[str, set[float]] = defaultdict(set)
    for (_, module), value in values.items():
        of_module[module].add(value)
    return {
        module if len(of_module[module]) == 1 else canonical_path(layer, module): value
        for (layer, module), value in sorted(values.items())
        if value != default
    }


def _most_common(values: Iterable[_Value]) -> _Value:
    """The least of them, so that what is written does not depend on the order of the pairs."""
    return Counter(sorted(values)).most_common(1)[0][0]


def _targets(pairs: _Pairs, layout: BaseLayout) -> dict[str, Any]:
    """Where PEFT is to make factors: exactly where the adapter has some."""
    layers = sorted({layer for layer, _ in pairs})
    modules = {module for _, module in pairs}
    if len(pairs) < len(layers) * len(modules):  # not every module in every layer: name each
        return {
            "target_modules": [canonical_path(*place) for place in sorted(pairs)],
            "layers_to_transform": None,
        }
    return {
        "target_modules": _short_names(pairs),
        "layers_to_transform": None if len(layers) == layout.num_layers else layers,
    }


def _short_names(pairs: _Pairs) -> list[str]:
    return sorted({module.rpartition(".")[2] for _, module in pairs})


def _write(
    adapter: Adapter,
    layout: BaseLayout,
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    # Clones: safetensors refuses tensors that share memory, as the same factor of two layers does.
    stored = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    with _new_folder(folder) as partial:
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(stored, partial / PEFT_FILE, metadata={"format": "pt"})
        # Refuses what the form cannot hold, such as a rank * scaling beyond float32.
        written = read_adapter(partial, layout, name=adapter.name)
        assert written.digest == adapter.digest, "what was written reads as another adapter"


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside target that becomes target, synced, if the body succeeds; else it goes."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists; remove it or give another target")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps a server that watches the parent from reading it half written.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(_FOLDER_MODE)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already if it was renamed


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
