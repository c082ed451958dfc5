"""adapter_config.json: what it says about the mathematics, and what cannot be served."""

import math
import re
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sharelora_serve.errors import AdapterInvalidError

_CONVERT = "convert it with PEFT's save_as_lora (PEFT 0.19 or later)"
_CONVERT_INIT = (
    "save it again with save_pretrained(path_initial_model_for_weight_conversion=...), "
    "which writes plain LoRA"
)

# fmt: off
# PEFT's fields that say how an adapter was trained or where, and nothing about what it computes.
# target_modules and the like are among them: the tensors themselves are the truth.
_HARMLESS_FIELDS = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_pattern", "lora_dropout",
    "fan_in_fan_out", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "enable_lora", "merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
})
_UNDERSTOOD_FIELDS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "bias", "init_lora_weights",
})
# fmt: on
_COMPACT_FIELDS = frozenset({"share", "share_qkv"})

_REFUSED_FIELDS = {
    "use_dora": "DoRA also rescales the base's output; train without it",
    "lora_bias": "a bias of the factors is not served; train without it",
    "modules_to_save": "fully trained modules are not served; train LoRA factors only",
    "trainable_token_indices": "trained token rows are not served; train without them",
    "target_parameters": "adapts bare parameters, not linear layers; use target_modules",
    "layer_replication": "the adapter is for a model with other layers than the base",
    "use_qalora": "QALoRA pools its input; train without it",
    "alora_invocation_tokens": "aLoRA acts on part of the prompt only; train without it",
    "alora_invocation_string": "aLoRA acts on part of the prompt only; train without it",
    "arrow_config": "Arrow routes between adapters; serve one of them",
    "use_bdlora": "BD-LoRA's factors are block-diagonal; train without it",
    "monteclora_config": "MonteCLoRA samples its factors; train without it",
    "velora_config": "VeLoRA changes training only: set it to null and save again",
    "kasa_config": "KaSA truncates the base's weights; train without it",
}

_HARMLESS_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MLX_FIELDS = frozenset({"rank", "scale", "dropout", "keys"})

_NAME_LENGTH = 100.0  # characters of a module's name, generously
_MAX_MATCH_STEPS = 200_000  # of all patterns of a field on one name: up to a millisecond
_MAX_REPETITIONS = 8  # in one pattern

_Number = TypeVar("_Number", int, float)


class Form(StrEnum):
    """Who wrote an adapter file, and so how its tensors are named."""

    PEFT = "PEFT LoRA"
    COMPACT = "compact ShareLoRA"
    MLX = "MLX LoRA"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A validated adapter_config.json.

    rank, alpha     of the modules that no pattern matches
    rank_pattern    (compiled pattern, rank), in file order; the first that matches counts
    alpha_pattern   likewise, looked up on its own
    mlx_scale       MLX's scale, which takes the place of alpha / rank; None in other files
    share           which sides have shared tensors: "", "A", "B" or "AB"
    share_qkv       q, k and v read one A
    layers          the layers of modules whose factors are both shared; None for all
    last_layers     MLX: how many layers are adapted, counted from the last; None for all
    """

    form: Form
    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    mlx_scale: float | None = None
    share: str = ""
    share_qkv: bool = False
    layers: tuple[int, ...] | None = None
    last_layers: int | None = None

    def rank_of(self, module_path: str) -> int:
        """The rank that the file promises for a module, by its name in the training model."""
        return _first_match(self.rank_pattern, module_path, self.rank)

    def scaling_of(self, module_path: str, rank: int) -> float:
        """The module's s in delta W = s * B A, from its own alpha and its own rank."""
        if self.mlx_scale is not None:
            return self.mlx_scale
        alpha = _first_match(self.alpha_pattern, module_path, self.alpha)
        return scaling(alpha, rank, use_rslora=self.use_rslora)


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """s = alpha / rank (LoRA, arXiv 2106.09685), alpha / sqrt(rank) for rsLoRA (2312.03732)."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def scaling_fits(value: float) -> bool:
    """Whether a scale survives as float32, which is what kernels multiply by."""
    try:
        return math.isfinite(struct.unpack("<f", struct.pack("<f", value))[0])
    except (OverflowError, struct.error):  # a float and an integer that are too large
        return False


def form_of(raw: dict[str, Any]) -> Form:
    """Which tool's configuration `raw` is.

    Raises AdapterInvalidError for an adapter that is not LoRA, with how to convert it.
    """
    if "peft_type" not in raw:
        if "lora_parameters" in raw or "fine_tune_type" in raw:
            return Form.MLX
        raise AdapterInvalidError("peft_type: is missing; expected 'LORA' or 'SHARELORA'")
    match raw["peft_type"]:
        case "LORA":
            return Form.PEFT
        case "SHARELORA":
            return Form.COMPACT
        case other:
            raise AdapterInvalidError(
                f"peft_type: {_value(other)} is not served, only 'LORA' and 'SHARELORA'; {_CONVERT}"
            )


def parse_config(raw: dict[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The validated configuration, and every problem found; None when there is a problem.

    Raises AdapterInvalidError as form_of does.
    """
    form = form_of(raw)
    problems: list[str] = []
    config = _parse_mlx(raw, problems) if form is Form.MLX else _parse_peft(form, raw, problems)
    return (None if problems else config), problems


def _parse_peft(form: Form, raw: dict[str, Any], problems: list[str]) -> AdapterConfig:
    for field, reason in _REFUSED_FIELDS.items():
        if raw.get(field):
            problems.append(f"{field}: {_value(raw[field])} cannot be served; {reason}")
    known = _HARMLESS_FIELDS | _UNDERSTOOD_FIELDS | _REFUSED_FIELDS.keys()
    if form is Form.COMPACT:
        known |= _COMPACT_FIELDS
    for field in sorted(raw.keys() - known):
        if raw[field]:  # null, false and empty are what writers leave for "not used"
            problems.append(
                f"{_value(field)}: is not a field this server understands, and "
                f"{_value(raw[field])} may change what the adapter computes; "
                "remove it if it does not"
            )
    if raw.get("bias") not in (None, "none"):
        problems.append(f"bias: {_value(raw['bias'])} cannot be served; train with bias='none'")
    _check_init(raw.get("init_lora_weights", True), problems)
    _reject_non_booleans(raw, ("use_rslora", "share_qkv"), problems)
    share = raw.get("share") or ""
    if form is Form.COMPACT and share not in ("A", "B", "AB"):
        problems.append(f"share: {_value(share)}, expected 'A', 'B' or 'AB'")
    if form is Form.COMPACT and raw.get("share_qkv") and share == "B":
        problems.append("share_qkv: q, k and v can share an A, and share is 'B'; use 'A' or 'AB'")
    rank = _number(raw, "r", problems, integer=True)
    return AdapterConfig(
        form=form,
        rank=int(rank),
        alpha=_number(raw, "lora_alpha", problems),
        use_rslora=bool(raw.get("use_rslora")),
        rank_pattern=tuple(
            (pattern, int(value))
            for pattern, value in _patterns(raw, "rank_pattern", problems, integer=True)
        ),
        alpha_pattern=tuple(_patterns(raw, "alpha_pattern", problems)),
        share=share if isinstance(share, str) else "",
        share_qkv=bool(raw.get("share_qkv")),
        layers=_layers(raw.get("layers_to_transform"), problems),
    )


def _parse_mlx(raw: dict[str, Any], problems: list[str]) -> AdapterConfig:
    """mlx-lm writes every training argument; only those read here say what is computed."""
    if raw.get("fine_tune_type", "lora") != "lora":
        problems.append(
            f"fine_tune_type: {_value(raw['fine_tune_type'])} cannot be served, only 'lora'"
        )
    if raw.get("use_dora"):
        problems.append("use_dora: DoRA also rescales the base's output; train without it")
    parameters = raw.get("lora_parameters")
    if not isinstance(parameters, dict):
        problems.append("lora_parameters: is missing; expected {'rank': ..., 'scale': ...}")
        parameters = {"rank": 1, "scale": 1.0}
    if "alpha" in parameters:
        problems.append(
            "lora_parameters: older mlx-lm multiplies scale by alpha / rank and newer ones ignore "
            "alpha; remove 'alpha' and write the product as 'scale'"
        )
    for field in sorted(parameters.keys() - _MLX_FIELDS - {"alpha"}):
        problems.append(f"lora_parameters: {_value(field)} is not understood; remove it")
    # 0 and below mean all layers (mlx-lm); lora_layers is the name before mlx-lm 0.20.
    last_layers = raw.get("num_layers", raw.get("lora_layers", -1))
    if not isinstance(last_layers, int) or isinstance(last_layers, bool):
        problems.append(f"num_layers: {_value(last_layers)} is not an integer")
        last_layers = -1
    scale = float(_number(parameters, "scale", problems))
    return AdapterConfig(
        form=Form.MLX,
        rank=int(_number(parameters, "rank", problems, integer=True)),
        alpha=scale,
        mlx_scale=scale,
        last_layers=last_layers if last_layers > 0 else None,
    )


def _check_init(init: object, problems: list[str]) -> None:
    """Some initialisations change the base's weights, at training and again at every load."""
    name = str(init).lower()
    if name in _HARMLESS_INITS:
        return
    way_out = (
        f"it changes the base's weights; {_CONVERT_INIT}"
        if name.startswith(_CONVERTIBLE_INITS)
        else f"expected true, false or one of {', '.join(_HARMLESS_INITS[3:])}"
    )
    problems.append(f"init_lora_weights: {_value(init)} cannot be served; {way_out}")


def _reject_non_booleans(raw: dict[str, Any], fields: tuple[str, ...], problems: list[str]) -> None:
    for field in fields:
        if raw.get(field) not in (None, True, False):
            problems.append(f"{field}: {_value(raw[field])} is neither true nor false")


def _number(
    raw: dict[str, Any], field: str, problems: list[str], *, integer: bool = False
) -> float:
    """raw[field], or 1 with a problem noted."""
    if raw.get(field) is None:
        problems.append(f"{field}: is missing; write the value the adapter was trained with")
        return 1
    problem = _number_problem(raw[field], integer=integer)
    if problem:
        problems.append(f"{field}: {problem}")
        return 1
    number: float = raw[field]
    return number


def _number_problem(value: object, *, integer: bool) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{_value(value)} is not a number"
    if integer and (not isinstance(value, int) or value < 1):
        return f"{_value(value)} is not a positive integer"
    if not scaling_fits(value):
        return f"{_value(value)} is too large"
    return None


def _layers(value: object, problems: list[str]) -> tuple[int, ...] | None:
    if value is None or value == []:  # PEFT reads an empty list as all layers
        return None
    listed = value if isinstance(value, list) else [value]
    if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in listed):
        return tuple(sorted(set(listed)))  # a million times layer 0 is layer 0
    problems.append(
        f"layers_to_transform: {_value(value)} is neither an integer nor a list of them"
    )
    return None


def _patterns(
    raw: dict[str, Any], field: str, problems: list[str], *, integer: bool = False
) -> list[tuple[re.Pattern[str], float]]:
    """The compiled items of a pattern field, as PEFT matches them (get_pattern_key)."""
    items = raw.get(field) or {}
    if not isinstance(items, dict):
        problems.append(f"{field}: {_value(items)} is not an object of module names")
        return []
    result: list[tuple[re.Pattern[str], float]] = []
    steps = 0.0
    for pattern, value in items.items():
        problem = _number_problem(value, integer=integer)
        steps += _match_steps(pattern)
        if problem is None and steps > _MAX_MATCH_STEPS:
            problems.append(
                f"{field}: {_value(pattern)}: takes too long to match; write module names out"
            )
            return result
        if problem is None:
            try:
                result.append((re.compile(rf"(.*\.)?({pattern})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                problem = f"is not a regular expression: {error}"
        if problem is not None:
            problems.append(f"{field}: {_value(pattern)}: {problem}")
    return result


def _match_steps(pattern: str) -> float:
    """About how many steps compiling and matching `pattern` can take; infinite if hard to say.

    Patterns come from uploaded files and Python's matcher backtracks, so that a short one can run
    for ever: a repetition may try every position of the name, a group each of its alternatives,
    and all of them multiply.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern).replace("(?:", "(")
    backreference = re.search(r"\\\d", pattern)
    if backreference or re.search(r"\(\?|\)[*+{]", plain) or len(pattern) > 1000:
        return math.inf
    repetitions = 1 + len(re.findall(r"[*+?{][?+]?", plain))  # 1 for the `(.*\.)?` in front
    if repetitions > _MAX_REPETITIONS:
        return math.inf
    steps = _NAME_LENGTH**repetitions / math.factorial(repetitions)
    alternatives = [1]
    for character in plain:
        if character == "(":
            alternatives.append(1)
        elif character == "|":
            alternatives[-1] += 1
        elif character == ")" and len(alternatives) > 1:
            steps *= alternatives.pop()
    return steps * math.prod(alternatives) + len(pattern)


def _first_match(
    patterns: tuple[tuple[re.Pattern[str], _Number], ...], module_path: str, otherwise: _Number
) -> _Number:
    for pattern, value in patterns:
        if pattern.match(module_path):
            return value
    return otherwise


def _value(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
