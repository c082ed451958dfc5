"""Checkpoints that cannot be served say which file or tensor is wrong, and what to do."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sharelora_serve.errors import UnsupportedModelError
from sharelora_serve.kernels.reference import ReferenceKernels
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.loader import load_weights
from tests.tiny_models import write_tiny_model


def load(folder: Path, dtype: torch.dtype = torch.float16) -> None:
    load_weights(
        folder,
        load_model_config(folder),
        dtype,
        ReferenceKernels(),
        device=torch.device("cpu"),
        max_positions=32,
        fold=None,
        on_layer=lambda _: None,
    )


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    return write_tiny_model(tmp_path / "tiny", "qwen3", seed)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_value_beyond_the_type_is_told_of_its_own_tensor(folder: Path, name: str) -> None:
    change(folder, lambda tensors: tensors[name][3].fill_(1e6))
    message = f"{name} has values that torch.float16 cannot hold; serve it with --dtype float32"
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        load(folder)
    load(folder, torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_in_every_type(folder: Path, name: str, value: float) -> None:
    change(folder, lambda tensors: tensors[name][0].fill_(value))
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(UnsupportedModelError, match=f"{name} has infinite values or NaN"):
            load(folder, dtype)


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_norm", "mlp.down_proj"])
def test_a_missing_tensor_is_called_by_its_name(folder: Path, name: str) -> None:
    name = f"model.layers.0.{name}.weight"
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(UnsupportedModelError, match=f"tensor '{name}' is missing"):
        load(folder)


def test_a_truncated_file_is_told_as_damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match=r"safetensors is damaged.*download it again"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_told_as_damaged(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"index\.json is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "what"), ("hidden_size", "wide"), ("rope_parameters", 3)]
)
def test_a_configuration_that_transformers_refuses_is_told(
    folder: Path, key: str, value: object
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UnsupportedModelError, match=r"config\.json is not understood"):
        load(folder)
