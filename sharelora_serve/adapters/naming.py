"""What adapters are called, and where a tensor of their files belongs, read from its key alone."""

import re
from dataclasses import dataclass
from typing import Literal, Self

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.errors import AdapterInvalidError

Side = Literal["A", "B"]

QKV = "self_attn.qkv"
"""Stands for q_proj, k_proj and v_proj together where one A serves all three (`share_qkv`)."""

QKV_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# What may stand before `layers.N`: a text decoder by one of its usual names. Anything else, such
# as `vision_tower.encoder`, numbers the layers of another model.
_DECODER_PREFIXES = frozenset(
    {"base_model", "module", "model", "language_model", "text_model", "llm", "thinker"}
)

_REASONS = {
    "lora_magnitude_vector": "DoRA's magnitudes; train without use_dora",
    "lora_embedding_A": "adapts the embeddings or the head; train linear layers only",
    "lora_embedding_B": "adapts the embeddings or the head; train linear layers only",
    "modules_to_save": "a fully trained module; train without modules_to_save",
    "original_module": "a copy of the base's own weights; save with PEFT's save_pretrained",
    "token_adapter": "trained token rows; train without trainable_token_indices",
    "trainable_tokens_delta": "trained token rows; train without trainable_token_indices",
    "experts": "adapts a mixture of experts, which no supported base has",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

NAME_RULE = (
    "a name has 1 to 128 of A-Z, a-z, 0-9, '.', '_' and '-', and begins with a letter or a digit"
)
"""What is_name asks for, as a message says it."""

_MAX_KEY_LENGTH = 160  # characters; real keys have less than 100


@dataclass(frozen=True, slots=True)
class FactorKey:
    """The place of one factor.

    layer         its decoder layer; None for a factor that all layers share
    module        of MODULES; QKV for an A that q, k and v share
    side          A (rank, in_features) or B (out_features, rank)
    module_path   the module's name in the training model, without PEFT's and wrappers' prefixes:
                  what rank_pattern and alpha_pattern match; None where layer is None
    adapter_name  the name that hand-saved keys carry (`lora_A.default.weight`); "" without one
    """

    layer: int | None
    module: str
    side: Side
    module_path: str | None
    adapter_name: str

    @property
    def path_prefix(self) -> str | None:
        """What stands before `layers` in module_path."""
        return None if self.module_path is None else self.module_path.partition("layers.")[0]


@dataclass(frozen=True, slots=True)
class AdapterName:
    """Which adapter is meant: names are unique among those of one owner.

    owner  the tenant to whom it belongs; None for a public one
    name   what the owner calls it
    """

    owner: str | None
    name: str

    @property
    def text(self) -> str:
        """`owner/name`, or `name` for a public one."""
        return self.name if self.owner is None else f"{self.owner}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The name that is written as `text`; None if no adapter can have it."""
        owner, slash, name = text.rpartition("/")
        if not is_name(name) or (slash and not is_name(owner)):
            return None
        return cls(owner if slash else None, name)


def is_name(text: str) -> bool:
    """Whether an adapter or a tenant can be called so."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str, base_name: str, owner: str | None = None) -> None:
    """Raise AdapterInvalidError if clients cannot call an owner's adapter by that name."""
    if not is_name(name):
        raise AdapterInvalidError(
            f"{name[:_MAX_KEY_LENGTH]!r} cannot name an adapter: {NAME_RULE}",
            param="name",
        )
    if base_name in (name, AdapterName(owner, name).text):
        raise AdapterInvalidError(
            f"{name!r} cannot name an adapter: it is the name of the base; choose another",
            param="name",
        )


def shown(key: str) -> str:
    """`key` as a message may show it: printable and not endless."""
    text = key if key.isprintable() else repr(key)
    return text if len(text) <= _MAX_KEY_LENGTH else text[:_MAX_KEY_LENGTH] + "..."


def canonical_path(layer: int, module: str) -> str:
    """The module's name in a Hugging Face decoder, which the files written here use."""
    return f"model.layers.{layer}.{module}"


def parse_key(key: str) -> FactorKey:
    """The place of a tensor called `key` in a PEFT or compact ShareLoRA file.

    Raises AdapterInvalidError, with the reason and the way out but without the key, when the
    tensor is no factor of a linear layer that a base has.
    """
    parts = _parts(key)
    for index, part in enumerate(parts):
        if part in ("lora_A", "lora_B"):
            path, rest = parts[:index], parts[index + 1 :]
            break
    else:
        raise AdapterInvalidError(_why_not_a_factor(parts))
    if not rest:
        raise AdapterInvalidError(
            "has no '.weight': a loralib file, which stores neither rank nor alpha; "
            "save it with PEFT's save_pretrained"
        )
    if rest[-1] == "bias":
        raise AdapterInvalidError("a bias of a factor; train without lora_bias")
    if rest[-1] != "weight" or len(rest) > 2:
        raise AdapterInvalidError("is not understood; expected '...lora_A.weight'")
    adapter_name = rest[0] if len(rest) == 2 else ""
    return _place(path, "A" if parts[index] == "lora_A" else "B", adapter_name)


def parse_mlx_key(key: str) -> FactorKey:
    """The place of a tensor called `key` in an MLX file; the tensor itself is transposed there.

    Raises AdapterInvalidError as parse_key does.
    """
    parts = _parts(key)
    if parts[-1] not in ("lora_a", "lora_b"):
        raise AdapterInvalidError(_why_not_a_factor(parts))
    place = _place(parts[:-1], "A" if parts[-1] == "lora_a" else "B", "")
    if place.layer is None:
        raise AdapterInvalidError("MLX files have no shared factors")
    return place


def _parts(key: str) -> list[str]:
    if len(key) > _MAX_KEY_LENGTH:
        raise AdapterInvalidError(f"is longer than {_MAX_KEY_LENGTH} characters")
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    if not parts:
        raise AdapterInvalidError("names no tensor; expected '...layers.N.MODULE...'")
    return parts


def _why_not_a_factor(parts: list[str]) -> str:
    for part in parts:
        if part in _REASONS:
            return _REASONS[part]
    if "embed_tokens" in parts or "lm_head" in parts:
        # It would be harmless if equal to the base's, but nothing here holds the base's weights.
        return (
            "the embeddings or the head: trained with modules_to_save, or copied by PEFT; "
            "train linear layers only and save with save_embedding_layers=False"
        )
    if parts[-1] == "bias":
        return "a trained bias; train with bias='none'"
    if "base_layer" in parts:
        return "a copy of the base's own weights; save with PEFT's save_pretrained"
    return "is no LoRA factor; convert it with PEFT's save_as_lora, or save the adapter alone"


def _place(path: list[str], side: Side, adapter_name: str) -> FactorKey:
    for part in path:
        if part in _REASONS:
            raise AdapterInvalidError(_REASONS[part])
    if "embed_tokens" in path or "lm_head" in path:
        raise AdapterInvalidError(_REASONS["lora_embedding_A"])
    for index in range(len(path) - 1):
        number = path[index + 1]
        # Six digits are more layers than any model has, and int() of thousands would be slow.
        if path[index] == "layers" and number.isascii() and number.isdigit() and len(number) < 7:
            prefix, layer, module = path[:index], int(number), ".".join(path[index + 2 :])
            break
    else:
        if "shared" not in path:
            raise AdapterInvalidError("names no decoder layer; expected '...layers.N.MODULE...'")
        index = path.index("shared")
        prefix, layer, module = path[:index], None, ".".join(path[index + 1 :])
    strange = [part for part in prefix if part not in _DECODER_PREFIXES]
    if strange:
        raise AdapterInvalidError(
            f"stands under {shown('.'.join(prefix))!r}, which is not the base's text decoder; "
            "train its linear layers only"
        )
    known = (*MODULES, QKV) if layer is None else MODULES
    if module not in known:
        raise AdapterInvalidError(
            f"adapts {shown(module)!r}; the modules that can be adapted are {', '.join(known)}"
        )
    if layer is None:
        return FactorKey(None, module, side, None, adapter_name)
    if prefix[:1] == ["module"]:  # DistributedDataParallel around the whole
        prefix = prefix[1:]
    if prefix[:2] == ["base_model", "model"]:
        prefix = prefix[2:]
    module_path = ".".join([*prefix, "layers", str(layer), module])
    return FactorKey(layer, module, side, module_path, adapter_name)
