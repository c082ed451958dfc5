"""Read an adapter folder or file of any supported form into an Adapter, or say why not."""

import hashlib
import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.adapter_files import (
    CONFIG_FILE,
    METADATA_KEY,
    StoredTensor,
    find_files,
    read_weights,
)
from sharelora_serve.adapters.json_object import MAX_CONFIG_BYTES, parse_json_object
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.naming import (
    QKV,
    QKV_MODULES,
    FactorKey,
    Side,
    canonical_path,
    parse_key,
    parse_mlx_key,
    shown,
)
from sharelora_serve.adapters.peft_config import (
    AdapterConfig,
    Form,
    form_of,
    parse_config,
    scaling_fits,
)
from sharelora_serve.errors import AdapterInvalidError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MAX_LISTED = 20  # problems spelled out in one message; the rest are counted
_MAX_NAMES = 5  # names listed in one problem


class _Factor(NamedTuple):
    """A tensor at its place, shaped as in FactorPair; equal ones are one Tensor."""

    key: str
    place: FactorKey
    tensor: Tensor
    is_zero: bool


class _Problems:
    """Everything found wrong, with the files it is in, so that one error can say it all."""

    def __init__(self, adapter_name: str) -> None:
        self._adapter_name = adapter_name
        self._texts: list[str] = []
        self._files: list[str] = []

    def add(self, file: str, *texts: str) -> None:
        self._texts.extend(texts)
        if texts and file not in self._files:
            self._files.append(file)

    def __bool__(self) -> bool:
        return bool(self._texts)

    def error(self) -> AdapterInvalidError:
        """One error with every problem, one to a line."""
        count = "1 problem" if len(self._texts) == 1 else f"{len(self._texts)} problems"
        lines = [
            f"adapter {self._adapter_name!r} cannot be served: {count} in "
            + " and ".join(self._files),
            *(f"  {text}" for text in self._texts[:_MAX_LISTED]),
        ]
        if len(self._texts) > _MAX_LISTED:
            lines.append(f"  ... and {len(self._texts) - _MAX_LISTED} more")
        return AdapterInvalidError("\n".join(lines), param="file")


def read_adapter(path: Path, layout: BaseLayout, *, name: str) -> Adapter:
    """Read the adapter at `path`, which clients will call `name`, and check it against a base.

    path is a folder with adapter_config.json and adapter_model.safetensors (PEFT, or compact
    ShareLoRA) or adapters.safetensors (MLX), a folder that holds exactly one such folder, or a
    single .safetensors file with its configuration in the metadata key `adapter_config`.

    Equal factors come out as one Tensor, in the file's own type; pairs that change nothing are
    left out; the digest is the same for every form of the same adapter. Nothing is unpickled.

    Raises AdapterInvalidError with every problem found: missing files, configuration fields,
    tensors without a place, wrong shapes, types or values, an adapter that changes nothing.
    """
    problems = _Problems(name)
    file = shown(path.name)
    try:
        config_text, weights_path = find_files(path)
        file = shown(weights_path.name)
        weights = read_weights(weights_path)
        if config_text is None:
            config_file = f"the metadata of {file}"
            text: str | bytes | None = weights.metadata.get(METADATA_KEY)
        else:
            config_file, text = CONFIG_FILE, config_text
        if text is None:
            raise AdapterInvalidError(
                f"the metadata key {METADATA_KEY!r} is missing; put the text of {CONFIG_FILE} "
                "there, or give the folder that holds both files"
            )
        file, weights_file = config_file, file
        if len(text) > MAX_CONFIG_BYTES:
            raise AdapterInvalidError(f"has more than {MAX_CONFIG_BYTES} bytes")
        raw = parse_json_object(text)
        form = form_of(raw)
    except AdapterInvalidError as error:
        problems.add(file, error.message)
        raise problems.error() from None
    except OSError as error:
        problems.add(file, f"cannot be read: {error.strerror}")
        raise problems.error() from None

    config, config_problems = parse_config(raw)
    problems.add(config_file, *config_problems)
    tensor_problems: list[str] = []
    factors = _place(weights.tensors, form, layout, tensor_problems)
    pairs: dict[tuple[int, str], FactorPair] = {}
    if config is not None:
        pairs = _Pairing(config, layout, tensor_problems).pair_up(factors)
    problems.add(weights_file, *tensor_problems)
    if not problems and not pairs:
        problems.add(
            weights_file,
            "the adapter changes nothing: no module has A, B and scale that are all nonzero; "
            "was it saved before training?",
        )
    if problems:
        raise problems.error()
    return Adapter(name=name, digest=adapter_digest(pairs), pairs=pairs, config=raw)


def factor_digest(factor: Tensor) -> str:
    """Hex sha256 of a factor's type, shape and bytes."""
    digest = hashlib.sha256(f"{factor.dtype} {tuple(factor.shape)} ".encode())
    digest.update(factor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_digest(pairs: Mapping[tuple[int, str], FactorPair]) -> str:
    """Hex sha256 of what an adapter computes: places, factors and scales, in sorted order.

    Scales count as float32, the precision that kernels multiply with, so that alpha / rank
    worked out in another way gives the same digest.
    """
    factors = {id(factor): factor for pair in pairs.values() for factor in (pair.a, pair.b)}
    digests = {identity: factor_digest(factor) for identity, factor in factors.items()}
    digest = hashlib.sha256()
    for (layer, module), pair in sorted(pairs.items(), key=lambda item: item[0]):
        digest.update(f"{layer} {module} {digests[id(pair.a)]} {digests[id(pair.b)]} ".encode())
        digest.update(struct.pack("<f", pair.scaling))
    return digest.hexdigest()


def _place(
    tensors: Mapping[str, StoredTensor], form: Form, layout: BaseLayout, problems: list[str]
) -> list[_Factor]:
    """Every tensor at its place; those without a place, or unfit for it, go into problems."""
    factors: list[_Factor] = []
    taken: dict[tuple[int | None, str, Side], str] = {}
    unique: dict[str, Tensor] = {}
    for key, stored in tensors.items():
        try:
            place = parse_mlx_key(key) if form is Form.MLX else parse_key(key)
            if place.layer is None and form is not Form.COMPACT:
                raise AdapterInvalidError(
                    'is shared by all layers, which needs "peft_type": "SHARELORA"'
                )
            other = taken.setdefault((place.layer, place.module, place.side), key)
            if other != key:
                raise AdapterInvalidError(f"has the same place as {shown(other)}; keep one")
            if stored.dtype not in _DTYPES:
                raise AdapterInvalidError(
                    f"type {stored.dtype}, expected F32, F16 or BF16; save it in one of these"
                )
            _check_shape(stored.shape, place, layout, transposed=form is Form.MLX)
            tensor = torch.frombuffer(stored.data, dtype=_DTYPES[stored.dtype])
            tensor = tensor.reshape(stored.shape)
            if form is Form.MLX:
                tensor = tensor.t().contiguous()
            # One pass for both: NaN is the least and the greatest of what it is in.
            least, greatest = (float(bound) for bound in torch.aminmax(tensor))
            if not (math.isfinite(least) and math.isfinite(greatest)):
                num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                raise AdapterInvalidError(
                    f"{num_bad} {'value is' if num_bad == 1 else 'values are'} NaN or infinite; "
                    "save it again from a finite checkpoint"
                )
        except AdapterInvalidError as error:
            problems.append(f"{shown(key)}: {error.message}")
        else:
            tensor = unique.setdefault(factor_digest(tensor), tensor)
            factors.append(_Factor(key, place, tensor, is_zero=least == greatest == 0))
    for what, found in (
        ("adapter", {factor.place.adapter_name for factor in factors}),
        ("model", {factor.place.path_prefix for factor in factors} - {None}),
    ):
        if len(found) > 1:
            listed = ", ".join(repr(value) for value in sorted(map(str, found))[:_MAX_NAMES])
            listed += ", ..." if len(found) > _MAX_NAMES else ""
            problems.append(f"the tensors belong to more than one {what} ({listed}); keep one")
    return factors


def _check_shape(
    shape: tuple[int, ...], place: FactorKey, layout: BaseLayout, *, transposed: bool
) -> None:
    """Raises AdapterInvalidError when a stored factor does not fit its place in the base."""
    if place.layer is not None and place.layer >= layout.num_layers:
        raise AdapterInvalidError(
            f"layer {place.layer}, but base {layout.name!r} has layers 0 to "
            f"{layout.num_layers - 1}; was it trained on another base?"
        )
    text = shown(str(shape))
    if len(shape) == 2 and 0 in shape:
        raise AdapterInvalidError(f"shape {text} is empty; train it with a rank of at least 1")
    if len(shape) != 2:
        raise AdapterInvalidError(
            f"shape {text}, expected a matrix; gather sharded parameters (ZeRO-3, FSDP) and "
            "save it again"
        )
    module = QKV_MODULES[0] if place.module == QKV else place.module
    in_features, out_features = layout.shapes[module]
    features = in_features if place.side == "A" else out_features
    features_last = (place.side == "A") != transposed
    if shape[1 if features_last else 0] != features:
        expected = f"(r, {features})" if features_last else f"({features}, r)"
        raise AdapterInvalidError(
            f"shape {text}, expected {expected} for base {layout.name!r}; "
            "was it trained on another base?"
        )
    rank = shape[0 if features_last else 1]
    # The kernels keep a value per token and rank. Beyond the features of a module a rank adds
    # nothing, but one rank for all modules, or a shared B's, may exceed those of a narrow one.
    if rank > layout.feature_counts[-1]:
        raise AdapterInvalidError(
            f"rank {rank}, more than the {layout.feature_counts[-1]} features of the widest layer "
            f"of base {layout.name!r}; train it with a smaller rank"
        )


class _Pairing:
    """Brings the two factors of each module together, checking them against the configuration."""

    def __init__(self, config: AdapterConfig, layout: BaseLayout, problems: list[str]) -> None:
        self._config = config
        self._layout = layout
        self._problems = problems

    def pair_up(self, factors: Iterable[_Factor]) -> dict[tuple[int, str], FactorPair]:
        """The pair of each adapted module, without those that change nothing."""
        own: dict[tuple[str, Side], dict[int, _Factor]] = defaultdict(dict)
        shared: dict[tuple[str, Side], _Factor] = {}
        for factor in factors:
            place = factor.place
            if place.layer is None:
                shared[place.module, place.side] = factor
            else:
                own[place.module, place.side][place.layer] = factor
        if self._config.form is Form.COMPACT:
            self._check_sharing(own, shared)

        pairs: dict[tuple[int, str], FactorPair] = {}
        for module in MODULES:
            own_a, own_b = own[module, "A"], own[module, "B"]
            shared_a, shared_b = shared.get((module, "A")), shared.get((module, "B"))
            if module in QKV_MODULES and shared_a is None:
                # Alone it adapts nothing: which of q, k and v it serves is for their B's to say.
                shared_a = shared.get((QKV, "A")) if own_b or shared_b else None
            layers: Iterable[int] = sorted(own_a.keys() | own_b.keys())
            if shared_a and shared_b and not layers:
                layers = self._layers_of_shared()
            elif (alone := shared_a or shared_b) and not layers:
                self._add(alone, f"has no lora_{_other(alone)} beside it in any layer")
            for layer in layers:
                a, b = own_a.get(layer, shared_a), own_b.get(layer, shared_b)
                if a and b:
                    if pair := self._pair(layer, module, a, b):
                        pairs[layer, module] = pair
                elif alone := a or b:
                    self._add(alone, f"has no lora_{_other(alone)} beside it")
        return pairs

    def _pair(self, layer: int, module: str, a: _Factor, b: _Factor) -> FactorPair | None:
        """The checked pair, or None when it changes nothing or is at fault."""
        config = self._config
        rank = a.tensor.shape[0]
        path = a.place.module_path or b.place.module_path or canonical_path(layer, module)
        first_layer = self._layout.num_layers - (config.last_layers or self._layout.num_layers)
        if rank != b.tensor.shape[1]:
            self._add(a, f"rank {rank}, but {shown(b.key)} has rank {b.tensor.shape[1]}")
        elif rank != (promised := config.rank_of(path)):
            field = "lora_parameters" if config.form is Form.MLX else "r or rank_pattern"
            self._add(
                a,
                f"rank {rank}, but {CONFIG_FILE} says {promised} for {path}; "
                f"correct {field} there, since the scale depends on it",
            )
        elif layer < first_layer:
            self._add(
                a,
                f"layer {layer} is not among the last {config.last_layers} of base "
                f"{self._layout.name!r}, as num_layers says; was it trained on another base?",
            )
        elif not scaling_fits(scaling := config.scaling_of(path, rank)):
            self._add(a, f"its scale {scaling} is too large; correct lora_alpha or alpha_pattern")
        elif scaling and not a.is_zero and not b.is_zero:
            return FactorPair(a.tensor, b.tensor, scaling)
        return None

    def _layers_of_shared(self) -> list[int]:
        """The layers of a module whose factors both have no layer of their own."""
        if self._config.layers is None:
            return list(range(self._layout.num_layers))
        return [layer for layer in self._config.layers if 0 <= layer < self._layout.num_layers]

    def _check_sharing(
        self,
        own: Mapping[tuple[str, Side], dict[int, _Factor]],
        shared: Mapping[tuple[str, Side], _Factor],
    ) -> None:
        """What a compact file says it shares must be what it holds."""
        config = self._config
        sides = {side for _, side in shared}
        for side in sorted(set(config.share) - sides):
            self._problems.append(
                f"share is {config.share!r}, but there is no tensor 'shared.MODULE.lora_{side}."
                'weight\'; for an adapter that shares nothing use "peft_type": "LORA"'
            )
        for (module, side), factor in shared.items():
            if side not in config.share:
                self._add(factor, f"is shared, but share is {config.share!r}; correct one of them")
            served = QKV_MODULES if module == QKV else (module,)
            twice = [f for m in served for f in own.get((m, side), {}).values()]
            twice += [shared[m, side] for m in served if m != module and (m, side) in shared]
            if twice:
                self._add(factor, f"is stored again as {shown(twice[0].key)}; keep one")
        if qkv := shared.get((QKV, "A")):
            if not config.share_qkv:
                self._add(qkv, "serves q, k and v, but share_qkv is not true; set it")
            if not any(own.get((m, "B")) or (m, "B") in shared for m in QKV_MODULES):
                self._add(qkv, "has no lora_B beside it in q, k or v")
        elif config.share_qkv:
            self._problems.append(
                f"share_qkv is true, but there is no tensor 'shared.{QKV}.lora_A.weight'"
            )
        outside = [n for n in config.layers or () if not 0 <= n < self._layout.num_layers]
        if outside:
            self._problems.append(
                f"layers_to_transform names layer {shown(str(outside[0]))}, but base "
                f"{self._layout.name!r} has layers 0 to {self._layout.num_layers - 1}; "
                "was it trained on another base?"
            )

    def _add(self, factor: _Factor, text: str) -> None:
        self._problems.append(f"{shown(factor.key)}: {text}")


def _other(factor: _Factor) -> Side:
    return "B" if factor.place.side == "A" else "A"
