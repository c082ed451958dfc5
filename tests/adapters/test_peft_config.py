"""adapter_config.json: whatever stands in it, it is understood or refused, never a crash."""

import re
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from sharelora_serve.adapters.json_object import parse_json_object
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.naming import canonical_path
from sharelora_serve.adapters.peft_config import parse_config, scaling_fits
from sharelora_serve.errors import AdapterInvalidError

PEFT: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "share",
    "share_qkv", "layers_to_transform", "init_lora_weights", "use_dora", "modules_to_save",
    "lora_parameters", "fine_tune_type", "num_layers", "lora_layers", "new",
)  # fmt: skip
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["A", "LORA", "none"]) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*FIELDS, "rank", "scale"]) | st.text(), inner, max_size=3
        )
    ),
    max_leaves=6,
)
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), VALUES).flatmap(
    lambda fields: st.sampled_from(
        [fields, {**PEFT, **fields}, {**fields, "peft_type": "SHARELORA"}]
    )
)


@given(CONFIGS)
def test_any_configuration_is_understood_or_refused_with_a_reason(raw: dict[str, Any]) -> None:
    with suppress(AdapterInvalidError):  # by form_of
        config, problems = parse_config(raw)
        assert (config is None) == bool(problems)
        assert all(len(problem) < 1000 for problem in problems)
        if config is not None:
            for module in MODULES:
                rank = config.rank_of(canonical_path(1, module))
                assert rank >= 1
                scaling_fits(config.scaling_of(canonical_path(1, module), rank))


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_a_json_object_or_refused(text: bytes) -> None:
    with suppress(AdapterInvalidError):
        assert isinstance(parse_json_object(text), dict)


PIECES = st.sampled_from(
    ["q_proj", "layers", "1", "12", r"\.", ".", ".*", ".+", "[0-9]", r"\d", "(a|q_proj)", "mlp",
     "(self_attn|mlp)", "[qv]_proj", "?", "(?:k|v)_proj", "model", "^", "$", "|", r"\w*", "a*"]
)  # fmt: skip


@given(
    patterns=st.lists(
        st.lists(PIECES, min_size=1, max_size=6).map("".join), min_size=1, max_size=4, unique=True
    ),
    layer=st.integers(0, 30),
    module=st.sampled_from(MODULES),
)
def test_patterns_that_are_taken_match_as_peft_matches_them_and_soon(
    patterns: list[str], layer: int, module: str
) -> None:
    pattern = {pattern: rank for rank, pattern in enumerate(patterns, start=100)}
    config, problems = parse_config({**PEFT, "rank_pattern": pattern, "alpha_pattern": pattern})
    if config is None:
        assert all("takes too long" in text or "regular expression" in text for text in problems)
        return
    path = canonical_path(layer, module)
    started_at = time.monotonic()
    rank = config.rank_of(path)
    assert time.monotonic() - started_at < 1
    assert rank == pattern.get(get_pattern_key(list(pattern), path), PEFT["r"])
    assert config.scaling_of(path, rank) == (16 if rank == 8 else rank) / rank


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", ".*mlp.*", r"layers\.[0-9]+\..*_proj"],
)
def test_patterns_as_people_write_them_are_taken(pattern: str) -> None:
    assert re.compile(pattern)
    config, problems = parse_config({**PEFT, "rank_pattern": {pattern: 4}})
    assert config is not None, problems


def test_every_module_of_a_large_base_may_have_a_pattern_of_its_own() -> None:
    ranks = {canonical_path(layer, module): 4 for layer in range(126) for module in MODULES}
    config, problems = parse_config({**PEFT, "rank_pattern": ranks, "alpha_pattern": ranks})
    assert config is not None, problems
