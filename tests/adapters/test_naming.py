"""Where a tensor belongs is read from its key, whatever stands around it."""

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.naming import (
    QKV,
    FactorKey,
    canonical_path,
    parse_key,
    parse_mlx_key,
    shown,
)
from sharelora_serve.errors import AdapterInvalidError

WORDS = st.sampled_from(
    ["base_model", "model", "layers", "0", "12", "self_attn", "q_proj", "mlp", "up_proj", "lora_A",
     "lora_B", "lora_a", "weight", "bias", "shared", "qkv", "default", "_orig_mod", "experts",
     "language_model", "embed_tokens", "lora_embedding_A", "\u00e9"]
)  # fmt: skip
KEYS = st.one_of(st.text(), st.lists(WORDS | st.text(max_size=3), max_size=9).map(".".join))


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (
            "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight",
            FactorKey(7, "mlp.up_proj", "A", "model.layers.7.mlp.up_proj", ""),
        ),
        (
            "base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_B.weight",
            FactorKey(
                0, "self_attn.v_proj", "B", "model.language_model.layers.0.self_attn.v_proj", ""
            ),
        ),
        (
            "module.base_model.model._orig_mod.model.layers.3.mlp.down_proj.lora_B.acme.weight",
            FactorKey(3, "mlp.down_proj", "B", "model.layers.3.mlp.down_proj", "acme"),
        ),
        (
            "layers.12.self_attn.o_proj.lora_A.weight",
            FactorKey(12, "self_attn.o_proj", "A", "layers.12.self_attn.o_proj", ""),
        ),
        (
            "shared.self_attn.q_proj.lora_A.weight",
            FactorKey(None, "self_attn.q_proj", "A", None, ""),
        ),
        ("shared.self_attn.qkv.lora_A.weight", FactorKey(None, QKV, "A", None, "")),
        (
            "base_model.model.shared.mlp.up_proj.lora_B.weight",
            FactorKey(None, "mlp.up_proj", "B", None, ""),
        ),
    ],
)
def test_a_key_gives_its_place_and_the_name_that_patterns_match(key: str, place: FactorKey) -> None:
    assert parse_key(key) == place


@given(
    layer=st.integers(0, 999_999), module=st.sampled_from(MODULES), side=st.sampled_from(["A", "B"])
)
def test_the_keys_written_here_are_read_back(layer: int, module: str, side: str) -> None:
    path = canonical_path(layer, module)
    place = parse_key(f"base_model.model.{path}.lora_{side}.weight")
    assert (place.layer, place.module, place.side, place.module_path) == (layer, module, side, path)
    mlx = parse_mlx_key(f"{path}.lora_{side.lower()}")
    assert (mlx.layer, mlx.module, mlx.side) == (layer, module, side)


def test_q_k_and_v_together_have_no_layer_of_their_own() -> None:
    with pytest.raises(AdapterInvalidError, match=r"adapts 'self_attn\.qkv'"):
        parse_key("base_model.model.model.layers.0.self_attn.qkv.lora_A.weight")


@pytest.mark.parametrize("key", ["shared.mlp.up_proj.lora_a", "model.norm.weight", ""])
def test_mlx_keys_name_a_layer_and_a_factor(key: str) -> None:
    with pytest.raises(AdapterInvalidError):
        parse_mlx_key(key)


@example("_orig_mod")  # nothing but a wrapper
@given(KEYS)
def test_any_key_has_a_place_or_a_reason(key: str) -> None:
    for parse in (parse_key, parse_mlx_key):
        with suppress(AdapterInvalidError):
            place = parse(key)
            assert place.layer is None or place.layer >= 0
            assert place.module in (*MODULES, QKV)


@given(st.text())
def test_a_shown_key_is_printable_and_not_endless(key: str) -> None:
    assert shown(key).isprintable()
    assert len(shown(key)) <= 163
