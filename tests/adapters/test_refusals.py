"""What cannot be served is refused by the name of the field or tensor, with the way out."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.adapters.samples import (
    Config,
    Tensors,
    assert_says,
    compact_tensors,
    mlx_tensors,
    peft_config,
    peft_tensors,
    random_adapter,
    read,
    refusal,
    write_folder,
)

P = "base_model.model.model."
Q = f"{P}layers.0.self_attn.q_proj"
UP = f"{P}layers.2.mlp.up_proj"


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("use_dora", True, ["DoRA", "train without it"]),
        ("bias", "all", ["bias='none'"]),
        ("bias", "lora_only", ["bias='none'"]),
        ("lora_bias", True, ["train without it"]),
        ("modules_to_save", ["lm_head"], ["train LoRA factors only"]),
        ("init_lora_weights", "pissa", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "pissa_niter_16", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "olora", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "corda", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "loftq", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "lora_ga", ["path_initial_model_for_weight_conversion"]),
        ("init_lora_weights", "new_idea", ["expected true, false or one of"]),
        ("trainable_token_indices", [3], ["train without them"]),
        ("target_parameters", ["mlp.experts"], ["use target_modules"]),
        ("layer_replication", [[0, 3], [1, 3]], ["other layers than the base"]),
        ("use_qalora", True, ["train without it"]),
        ("alora_invocation_tokens", [1, 2], ["aLoRA"]),
        ("arrow_config", {"top_k": 2}, ["serve one of them"]),
        ("use_bdlora", {"nblocks": 2}, ["train without it"]),
        ("kasa_config", {"beta": 1}, ["train without it"]),
        ("monteclora_config", {"a": 1}, ["train without it"]),
        ("velora_config", {"a": 1}, ["set it to null"]),
        ("new_mathematics", 3, ["may change what the adapter computes", "remove it"]),
        ("share", "A", ["is not a field this server understands"]),  # needs SHARELORA
        ("peft_type", "VERA", ["save_as_lora"]),
        ("peft_type", None, ["'LORA' and 'SHARELORA'"]),
        ("r", None, ["is missing"]),
        ("r", 0, ["not a positive integer"]),
        ("r", True, ["is not a number"]),
        ("lora_alpha", "16", ["is not a number"]),
        ("lora_alpha", 1e39, ["too large"]),
        ("lora_alpha", 10**39, ["too large"]),
        ("r", 10**400, ["too large"]),
        ("use_rslora", "no", ["neither true nor false"]),
        ("rank_pattern", ["q_proj"], ["not an object of module names"]),
        ("rank_pattern", {"q_proj": -2}, ["'q_proj'", "not a positive integer"]),
        ("alpha_pattern", {"q_proj": None}, ["'q_proj'", "is not a number"]),
        ("alpha_pattern", {"q_proj(": 1}, ["'q_proj('", "not a regular expression"]),
        ("layers_to_transform", "all", ["neither an integer nor a list"]),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused_by_name(
    field: str, value: object, parts: list[str], tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    config = peft_config(adapter, **{field: value})
    message = refusal(write_folder(tmp_path / "acme", config, peft_tensors(adapter)))
    assert_says(message, "1 problem in adapter_config.json", field, *parts)


def test_what_is_not_used_or_says_nothing_about_the_mathematics_is_taken(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    unused = {"use_dora": False, "modules_to_save": None, "new_mathematics": {}, "arrow_config": []}
    harmless = {"peft_version": "9", "target_modules": "x", "task_type": "Y", "lora_dropout": 0.5}
    config = peft_config(adapter, **unused, **harmless, init_lora_weights="gaussian")
    folder = write_folder(tmp_path / "acme", config, peft_tensors(adapter))
    assert read(folder).digest == adapter.digest


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        (f"{Q}.lora_magnitude_vector", "train without use_dora"),
        (f"{Q}.lora_magnitude_vector.weight", "train without use_dora"),
        (f"{Q}.lora_B.bias", "train without lora_bias"),
        (f"{Q}.base_layer.bias", "train with bias='none'"),
        (f"{P}layers.0.self_attn.k_proj.bias", "train with bias='none'"),
        (f"{Q}.base_layer.weight", "save with PEFT's save_pretrained"),
        (f"{Q}.lora_A", "save it with PEFT's save_pretrained"),
        (f"{Q}.lora_diag", "PEFT's save_as_lora"),
        (f"{P}layers.0.input_layernorm.weight", "save the adapter alone"),
        (f"{P}layers.0.mlp.nothing.lora_A.weight", "the modules that can be adapted are"),
        (f"{P}layers.0.mlp.experts.lora_A.weight", "mixture of experts"),
        (f"{P}norm.lora_A.weight", "names no decoder layer"),
        ("base_model.model.lm_head.weight", "train linear layers only"),
        ("base_model.model.lm_head.modules_to_save.weight", "train without modules_to_save"),
        ("base_model.model.lm_head.lora_A.weight", "train linear layers only"),
        (f"{P}embed_tokens.weight", "save_embedding_layers=False"),
        (f"{P}embed_tokens.lora_embedding_A", "train linear layers only"),
        (f"{P}embed_tokens.lora_embedding_B", "train linear layers only"),
        (
            f"{P}embed_tokens.token_adapter.trainable_tokens_delta",
            "train without trainable_token_indices",
        ),
        (f"{P}vision_tower.layers.0.self_attn.q_proj.lora_A.weight", "not the base's text decoder"),
        ("shared.mlp.up_proj.lora_A.weight", '"peft_type": "SHARELORA"'),
        (f"{P}layers.99999999.self_attn.q_proj.lora_A.weight", "names no decoder layer"),
        (f"{P}layers.-1.self_attn.q_proj.lora_A.weight", "names no decoder layer"),
        ("x" * 300, "longer than 160 characters"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(
    key: str, way_out: str, tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    tensors = peft_tensors(adapter) | {key: torch.ones(4, 24)}
    message = refusal(write_folder(tmp_path / "acme", peft_config(adapter), tensors))
    assert_says(message, "1 problem in adapter_model.safetensors", key[:160], way_out)


def rename(tensors: Tensors, old: str, new: str) -> None:
    for key in [key for key in tensors if key.startswith(old)]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def poke(tensors: Tensors, key: str, value: float) -> None:
    tensors[key][0, 0] = value


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 25)}),
            [f"{Q}.lora_A.weight", "(4, 25), expected (r, 24) for base 'tiny'", "another base?"],
        ),
        (
            lambda t: t.update({f"{UP}.lora_B.weight": torch.ones(4, 40)}),
            [f"{UP}.lora_B.weight", "(4, 40), expected (40, r)", "another base?"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4 * 24)}),
            [f"{Q}.lora_A.weight", "(96,), expected a matrix", "gather sharded parameters"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0, 24)}),
            [f"{Q}.lora_A.weight", "(0, 24) is empty", "at least 1"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 24, dtype=torch.float64)}),
            [f"{Q}.lora_A.weight", "F64, expected F32, F16 or BF16"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)}),
            [f"{Q}.lora_A.weight", "I8, expected"],
        ),
        (
            lambda t: poke(t, f"{UP}.lora_B.weight", float("nan")),
            [f"{UP}.lora_B.weight", "1 value is NaN or infinite", "finite checkpoint"],
        ),
        (
            lambda t: poke(t, f"{UP}.lora_A.weight", float("-inf")),
            [f"{UP}.lora_A.weight", "1 value is NaN or infinite"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 24)}),
            [f"{Q}.lora_A.weight", "rank 3, but", f"{Q}.lora_B.weight has rank 4"],
        ),
        (
            lambda t: t.update(
                {f"{Q}.lora_A.weight": torch.ones(3, 24), f"{Q}.lora_B.weight": torch.ones(24, 3)}
            ),
            [
                "rank 3, but adapter_config.json says 4",
                "model.layers.0.self_attn.q_proj",
                "correct r",
            ],
        ),
        (
            lambda t: t.pop(f"{Q}.lora_B.weight"),
            [f"{Q}.lora_A.weight", "has no lora_B beside it"],
        ),
        (
            lambda t: t.pop(f"{Q}.lora_A.weight"),
            [f"{Q}.lora_B.weight", "has no lora_A beside it"],
        ),
        (
            lambda t: rename(t, f"{P}layers.2.", f"{P}layers.3."),
            ["layer 3, but base 'tiny' has layers 0 to 2", "another base?"],
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(4, 24)}),
            [f"{Q}.lora_A.default.weight", f"the same place as {Q}.lora_A"],
        ),
        (
            lambda t: rename(t, f"{Q}.lora_A.weight", f"{Q}.lora_A.other.weight"),
            ["more than one adapter ('', 'other')", "keep one"],
        ),
        (
            lambda t: rename(t, f"{P}layers.2.", f"{P}language_model.layers.2."),
            ["more than one model ('model.', 'model.language_model.')"],
        ),
        (
            lambda t: [t[key].zero_() for key in t if "lora_B" in key],
            ["the adapter changes nothing", "saved before training?"],
        ),
        (lambda t: t.clear(), ["the adapter changes nothing"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[Tensors], object], parts: list[str], tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    tensors = peft_tensors(adapter)
    change(tensors)
    message = refusal(write_folder(tmp_path / "acme", peft_config(adapter), tensors))
    assert_says(message, "adapter_model.safetensors", *parts)


@pytest.mark.parametrize(
    ("change", "config", "parts"),
    [
        (lambda _: None, {"share": None}, ["share: ", "expected 'A', 'B' or 'AB'"]),
        (lambda _: None, {"share": "AB"}, ["'shared.MODULE.lora_B.weight'", '"peft_type": "LORA"']),
        (lambda _: None, {"share": "B"}, ["is shared, but share is 'B'"]),
        (lambda _: None, {"share_qkv": True}, ["no tensor 'shared.self_attn.qkv.lora_A.weight'"]),
        (lambda _: None, {"share_qkv": "x"}, ["share_qkv", "neither true nor false"]),
        (lambda _: None, {"share": "B", "share_qkv": True}, ["use 'A' or 'AB'"]),
        (lambda _: None, {"layers_to_transform": [0, 3]}, ["layer 3, but", "layers 0 to 2"]),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 24)}),
            {},
            ["shared.self_attn.q_proj.lora_A.weight: is stored again as", "keep one"],
        ),
        (
            lambda t: t.update({"shared.self_attn.qkv.lora_A.weight": torch.ones(4, 24)}),
            {"share_qkv": True},
            ["shared.self_attn.qkv.lora_A.weight: is stored again as"],
        ),
        (
            lambda t: (
                [rename(t, f"{P}layers.{n}.mlp.up_proj", "gone") for n in range(3)]
                + [t.pop("gone.lora_B.weight")]
            ),
            {},
            ["shared.mlp.up_proj.lora_A.weight", "has no lora_B beside it in any layer"],
        ),
        (
            lambda t: rename(t, "shared.self_attn.q_proj", "shared.self_attn.qkv"),
            {},
            ["serves q, k and v, but share_qkv is not true"],
        ),
        (
            lambda t: t.update({"shared.self_attn.qkv.lora_B.weight": torch.ones(24, 4)}),
            {"share": "AB"},
            ["shared.self_attn.qkv.lora_B.weight"],
        ),
    ],
)
def test_a_compact_file_that_contradicts_itself_is_refused(
    change: Callable[[Tensors], object],
    config: Config,
    parts: list[str],
    tmp_path: Path,
    seed: int,
) -> None:
    adapter = random_adapter(seed, "A")
    tensors = compact_tensors(adapter, "A")
    change(tensors)
    raw = peft_config(adapter, **{"peft_type": "SHARELORA", "share": "A", **config})
    assert_says(refusal(write_folder(tmp_path / "acme", raw, tensors)), *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"fine_tune_type": "dora"}, ["fine_tune_type: 'dora'", "only 'lora'"]),
        ({"lora_parameters": None}, ["lora_parameters: is missing"]),
        ({"lora_parameters": {"rank": 4}}, ["scale: is missing"]),
        (
            {"lora_parameters": {"rank": 4, "scale": 2, "alpha": 8}},
            ["'alpha'", "product as 'scale'"],
        ),
        ({"lora_parameters": {"rank": 4, "scale": 2, "x": 8}}, ["'x' is not understood"]),
        ({"lora_parameters": {"rank": 3, "scale": 2}}, ["says 3", "correct lora_parameters"]),
        ({"num_layers": 2}, ["layer 0 is not among the last 2", "another base?"]),
        ({"num_layers": "2"}, ["num_layers: '2' is not an integer"]),
        ({"use_dora": True}, ["use_dora: DoRA"]),
    ],
)
def test_an_mlx_configuration_that_is_not_understood_is_refused(
    config: Config, parts: list[str], tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    raw = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0}, **config}
    folder = write_folder(tmp_path / "acme", raw, mlx_tensors(adapter), "adapters.safetensors")
    assert_says(refusal(folder), *parts)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "patterns",
    [
        ["(a+)+"],
        ["(.*)*x"],
        ["(a|a)" * 60],
        [".*" * 20 + "x"],
        [r"(.*)\1\1\1"],
        ["(?=(.*.*.*.*.*))x"],
        ["((((.*)?)?)?)?"],
        [".{0,50}" * 9],
        [f".*.*{n}" for n in range(1000)],
        ["[]" + ".*" * 20 + "]" + ".*" * 8 + "x"],
        [".*" * 200],
        ["x" * 900 + str(n) for n in range(300)],
    ],
)
def test_a_pattern_that_could_match_for_ever_is_refused_at_once(
    patterns: list[str], field: str, tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    config = peft_config(adapter, **{field: dict.fromkeys(patterns, 4)})
    folder = write_folder(tmp_path / "acme", config, peft_tensors(adapter))
    started_at = time.monotonic()
    assert_says(refusal(folder), field, "takes too long to match", "write module names out")
    assert time.monotonic() - started_at < 5


def test_a_rank_above_the_widest_layer_is_refused_and_that_wide_is_taken(
    tmp_path: Path, seed: int
) -> None:
    # It exceeds what k_proj, of 24 and 8 features, can use: one rank may serve all modules.
    adapter = random_adapter(seed, rank=40, modules=("self_attn.k_proj",), layers=(0,))
    folder = write_folder(tmp_path / "wide", peft_config(adapter), peft_tensors(adapter))
    assert read(folder).digest == adapter.digest
    adapter = random_adapter(seed, rank=41, modules=("self_attn.k_proj",), layers=(0,))
    folder = write_folder(tmp_path / "wider", peft_config(adapter), peft_tensors(adapter))
    assert_says(refusal(folder), "rank 41, more than the 40 features", "with a smaller rank")


def test_a_layer_named_very_often_counts_once(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed, "AB", layers=(0, 2))
    layers = [2, 0] * 50_000
    config = peft_config(adapter, peft_type="SHARELORA", share="AB", layers_to_transform=layers)
    folder = write_folder(tmp_path / "acme", config, compact_tensors(adapter, "AB"))
    started_at = time.monotonic()
    assert read(folder).digest == adapter.digest
    assert time.monotonic() - started_at < 5


@pytest.mark.parametrize("shape", [(0, 2**63 - 1, 2**63 - 1), (0, 2**64 - 1), (1,) * 1000])
def test_a_shape_that_no_tensor_can_have_is_refused(
    shape: tuple[int, ...], tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    folder = write_folder(tmp_path / "acme", peft_config(adapter), {})
    end = 0 if 0 in shape else 4
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({f"{Q}.lora_A.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(end)
    (folder / "adapter_model.safetensors").write_bytes(content)
    message = refusal(folder)
    assert_says(message, f"{Q}.lora_A.weight", "shape (")
    assert len(message) < 1000


def test_a_number_that_json_reads_as_infinite_is_refused(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    text = json.dumps(peft_config(adapter, lora_dropout=0.5)).replace("0.5", "1e400")
    folder = write_folder(tmp_path / "acme", text, peft_tensors(adapter))
    assert_says(refusal(folder), "1e400 is too large a number")


def test_names_in_messages_cannot_break_the_line_or_fill_the_log(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    config = peft_config(adapter, **{"evil\nfield" + "x" * 500: "y" * 5000})
    tensors = peft_tensors(adapter) | {"evil\nkey\x1b[2J": torch.ones(1)}
    message = refusal(write_folder(tmp_path / "acme", config, tensors))
    assert len(message.splitlines()) == 3
    assert message.replace("\n", "").isprintable()
    assert len(message) < 1000
