"""Every form of an adapter reads as the same adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file

from sharelora_serve.adapters.adapter import FactorPair
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.errors import AdapterInvalidError
from tests.adapters.samples import (
    NUM_LAYERS,
    QKV_MODULES,
    compact_tensors,
    make_adapter,
    mlx_tensors,
    peft_config,
    peft_tensors,
    random_adapter,
    read,
    tiny_llama,
    write_folder,
)

# PEFT 0.21 asks transformers 5.23 for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ALL_LINEAR = [module.rpartition(".")[2] for module in MODULES]


def peft_model(seed: int, adapter_name: str = "default", **settings: Any) -> PeftModel:
    """A tiny LLaMA with factors that PEFT made, B's drawn instead of zero."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, **settings})
    torch.manual_seed(seed)
    model = get_peft_model(tiny_llama(seed), config, adapter_name=adapter_name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def lora_layers(model: PeftModel) -> dict[tuple[int, str], LoraLinear]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            layer, _, rest = name.partition(".layers.")[2].partition(".")
            found[int(layer), rest] = module
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 13, "lora_alpha": 5},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(gate|down)_proj"},
        {"layers_to_transform": [0, 2]},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 8, "mlp.up_proj": 3}},
        {"alpha_pattern": {"self_attn.k_proj": 3, r"layers\.[12]\.mlp\.down_proj": 1}},
        {
            "rank_pattern": {"down_proj": 6, "layers.0.self_attn.o_proj": 1},
            "alpha_pattern": {"o_proj": 7, ".*down_proj": 9},
            "use_rslora": True,
        },
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "exclude_modules": ["o_proj"]},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_what_peft_saves_reads_with_its_own_factors_and_scales(
    settings: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    model = peft_model(seed, **settings)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    layers = lora_layers(model)
    assert adapter.pairs.keys() == layers.keys()
    for place, pair in adapter.pairs.items():
        assert torch.equal(pair.a, layers[place].lora_A["default"].weight)
        assert torch.equal(pair.b, layers[place].lora_B["default"].weight)
        assert pair.scaling == pytest.approx(layers[place].scaling["default"], rel=1e-12)


def test_sharea_tied_in_training_and_saved_by_peft_reads_as_its_compact_form(
    tmp_path: Path, seed: int
) -> None:
    model = peft_model(seed)
    layers = lora_layers(model)
    for (_, module), lora in layers.items():
        lora.lora_A["default"].weight = layers[0, module].lora_A["default"].weight
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft")
    summary = summarise(adapter)
    assert summary.sharing == "ShareA"
    assert summary.num_factors == len(MODULES) * (1 + NUM_LAYERS)
    config = peft_config(adapter, peft_type="SHARELORA", share="A")
    compact = write_folder(tmp_path / "compact", config, compact_tensors(adapter, "A"))
    assert read(compact).digest == adapter.digest


def test_an_adapter_that_peft_saved_under_a_name_is_found_in_its_subfolder(
    tmp_path: Path, seed: int
) -> None:
    peft_model(seed, adapter_name="acme").save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert len(read(tmp_path).pairs) == NUM_LAYERS * len(MODULES)


@pytest.mark.parametrize(
    ("share", "share_qkv", "sharing"),
    [
        ("A", False, "ShareA"),
        ("B", False, "ShareB"),
        ("AB", False, "ShareAB"),
        ("A", True, "ShareA"),
        ("AB", True, "ShareAB"),
    ],
)
@pytest.mark.parametrize("modules", [MODULES, QKV_MODULES, MODULES[1:2], MODULES[2:5]])
def test_compact_reads_as_the_plain_lora_it_stands_for(
    share: str,
    share_qkv: bool,
    sharing: str,
    modules: tuple[str, ...],
    tmp_path: Path,
    seed: int,
) -> None:
    adapter = random_adapter(seed, share, share_qkv=share_qkv, modules=modules)
    plain = write_folder(tmp_path / "plain", peft_config(adapter), peft_tensors(adapter))
    joined = share_qkv and bool(set(modules) & set(QKV_MODULES))
    config = peft_config(adapter, peft_type="SHARELORA", share=share, share_qkv=joined)
    tensors = compact_tensors(adapter, share, share_qkv=joined)
    if joined and share == "AB":  # nothing else says which of q, k and v the A serves
        assert {f"shared.{m}.lora_B.weight" for m in modules} <= tensors.keys()
    compact = read(write_folder(tmp_path / "compact", config, tensors))
    assert compact.digest == read(plain).digest == adapter.digest
    for path_read in (compact, read(plain)):
        summary = summarise(path_read)
        assert summary.sharing == sharing
        assert summary.shares_qkv == (share_qkv and len(set(modules) & set(QKV_MODULES)) > 1)
        assert summary.num_factors == len(
            {id(factor) for pair in adapter.pairs.values() for factor in (pair.a, pair.b)}
        )
        assert summary.stored_bytes < summary.expanded_bytes


def test_compact_with_both_factors_shared_applies_in_layers_to_transform(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, "AB", layers=(0, 2))
    config = peft_config(adapter, peft_type="SHARELORA", share="AB", layers_to_transform=[0, 2])
    folder = write_folder(tmp_path / "acme", config, compact_tensors(adapter, "AB"))
    assert read(folder).digest == adapter.digest


def wrapped(prefix: str, suffix: str = "weight") -> Callable[[str], str]:
    def rename(key: str) -> str:
        return prefix + key.removeprefix("base_model.model.model.").replace("weight", suffix)

    return rename


@pytest.mark.parametrize(
    "rename",
    [
        wrapped("base_model.model.model.language_model."),
        wrapped("base_model.model.language_model.model."),
        wrapped("base_model.model.model.text_model."),
        wrapped("base_model.model.model.", "default.weight"),
        wrapped("base_model.model.model.", "acme.weight"),
        wrapped("_orig_mod.base_model.model.model."),
        wrapped("base_model.model._orig_mod.model."),
        wrapped("module.base_model.model.model."),
        wrapped("_fsdp_wrapped_module.base_model.model._checkpoint_wrapped_module.model."),
        wrapped("model."),
        wrapped(""),
        lambda key: key.replace("self_attn.", "self_attn._orig_mod."),
    ],
)
def test_wrappers_around_the_trained_model_change_nothing(
    rename: Callable[[str], str], tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    tensors = {rename(key): tensor for key, tensor in peft_tensors(adapter).items()}
    assert tensors.keys() != peft_tensors(adapter).keys()
    assert read(write_folder(tmp_path / "acme", peft_config(adapter), tensors)).digest == (
        adapter.digest
    )


@pytest.mark.parametrize("scale", [20.0, 20])
def test_mlx_factors_are_transposed_and_keep_their_own_scale(
    scale: float, tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, scaling=20.0, layers=(1, 2))
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,  # of three: the last two
        "lora_parameters": {"rank": 4, "scale": scale, "dropout": 0.0},
        "learning_rate": 1e-5,
    }
    folder = write_folder(
        tmp_path / "acme", config, mlx_tensors(adapter), file="adapters.safetensors"
    )
    assert read(folder).digest == adapter.digest
    assert {type(pair.scaling) for pair in read(folder).pairs.values()} == {float}


def test_one_safetensors_file_carries_its_configuration_in_its_metadata(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, "A")
    config = peft_config(adapter, peft_type="SHARELORA", share="A")
    file = tmp_path / "acme.safetensors"
    metadata = {"format": "pt", "adapter_config": json.dumps(config)}
    save_file(compact_tensors(adapter, "A"), file, metadata=metadata)
    assert read(file).digest == adapter.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_keep_the_files_own_type(dtype: torch.dtype, tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed, "A", dtype=dtype)
    folder = write_folder(tmp_path / "acme", peft_config(adapter), peft_tensors(adapter))
    assert read(folder).digest == adapter.digest
    assert {pair.a.dtype for pair in read(folder).pairs.values()} == {dtype}


def test_modules_that_change_nothing_are_left_out(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    tensors = peft_tensors(adapter)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].zero_()
    tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"].zero_()
    found = read(write_folder(tmp_path / "acme", peft_config(adapter), tensors))
    unchanged = {(1, "mlp.up_proj"), (2, "self_attn.q_proj")}
    assert found.pairs.keys() == adapter.pairs.keys() - unchanged


def test_equal_factors_are_one_tensor_and_almost_equal_ones_are_not(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, "A", modules=("mlp.up_proj", "mlp.down_proj"))
    tensors = peft_tensors(adapter)
    whole = read(write_folder(tmp_path / "whole", peft_config(adapter), tensors))
    assert summarise(whole).sharing == "ShareA"
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] += 1e-3
    almost = read(write_folder(tmp_path / "almost", peft_config(adapter), tensors))
    assert summarise(almost).sharing == "LoRA"
    assert summarise(almost).num_factors == summarise(whole).num_factors + 1


def test_the_digest_tells_every_difference_that_can_change_an_answer(seed: int) -> None:
    adapter = random_adapter(seed)
    (place, pair), *_ = adapter.pairs.items()
    other_a = pair.a.clone()
    other_a[-1, -1] += 1
    digests = {adapter.digest}
    for changed in (
        FactorPair(other_a, pair.b, pair.scaling),
        FactorPair(pair.a, pair.b * 2, pair.scaling),
        FactorPair(pair.a, pair.b, pair.scaling * 1.001),
        FactorPair(pair.a, -pair.b, -pair.scaling),
    ):
        digests.add(make_adapter({**adapter.pairs, place: changed}).digest)
    moved = {((layer + 1) % NUM_LAYERS, m): pair for (layer, m), pair in adapter.pairs.items()}
    digests.add(make_adapter(moved).digest)
    digests.add(make_adapter({p: of for p, of in adapter.pairs.items() if p != place}).digest)
    assert len(digests) == 7
    assert make_adapter(dict(reversed(adapter.pairs.items()))).digest == adapter.digest


def test_every_problem_is_told_at_once_and_long_lists_are_counted(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, modules=("mlp.up_proj",))
    tensors = {key: tensor.mul(float("nan")) for key, tensor in peft_tensors(adapter).items()}
    folder = write_folder(tmp_path / "acme", peft_config(adapter, use_dora=True), tensors)
    with pytest.raises(AdapterInvalidError) as caught:
        read(folder)
    message = caught.value.message
    assert "'acme' cannot be served: 7 problems in adapter_config.json and adapter_model" in message
    assert message.count("NaN or infinite") == 6
    assert caught.value.param == "file"
    many = {f"model.layers.{n}.mlp.nothing.lora_A.weight": torch.ones(1, 1) for n in range(50)}
    folder = write_folder(tmp_path / "many", peft_config(adapter), many)
    with pytest.raises(AdapterInvalidError, match=r"\.\.\. and 30 more"):
        read(folder)
