"""Counts of trained parameters: the table of the method's reference, and what torch counts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)
from typer.testing import CliRunner

from sharelora_serve.cli import app


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=128,
    )


MODELS = {
    "RoBERTa-base": RobertaConfig(),
    "RoBERTa-large": RobertaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    "GPT-2 medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "LLaMA-7B": llama(4096, 11008, 32, 32, 32),
    "LLaMA-13B": llama(5120, 13824, 40, 40, 40),
    "LLaMA-3-8B": llama(4096, 14336, 32, 32, 8),
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3),
}

# LoRA, ShareA, ShareB, ShareAB, one A for q, k, v, sharing in q, k, v only, only B; per rank.
PER_RANK = {
    ("RoBERTa-base", "query,value"): (36864, 19968, 19968, 3072, 19200, 19968, 18432),
    ("RoBERTa-large", "query,value"): (98304, 51200, 51200, 4096, 50176, 51200, 49152),
    ("GPT-2 medium", "c_attn.q,c_attn.v"): (98304, 51200, 51200, 4096, 50176, 51200, 49152),
    ("GPT-2 large", "c_attn.q,c_attn.v"): (184320, 94720, 94720, 5120, 93440, 94720, 92160),
    ("GPT-2 medium", "c_attn"): (98304, 74752, 27648, 4096, 74752, 74752, 73728),
    ("LLaMA-7B", "q_proj,v_proj"): (524288, 270336, 270336, 16384, 266240, 270336, 262144),
    ("LLaMA-7B", "all-linear"): (2498560, 1395456, 1181184, 78080, 1387264, 2117632, 1359872),
    ("LLaMA-13B", "q_proj,v_proj"): (819200, 419840, 419840, 20480, 414720, 419840, 409600),
    ("LLaMA-13B", "all-linear"): (3911680, 2174464, 1835008, 97792, 2164224, 3312640, 2129920),
    ("LLaMA-3-8B", "q_proj,v_proj"): (425984, 172032, 267264, 13312, 167936, 172032, 163840),
    ("LLaMA-3-8B", "all-linear"): (2621440, 1415168, 1288192, 81920, 1406976, 2240512, 1376256),
    ("SmolLM2-135M", "q_proj,v_proj"): (57600, 24192, 35328, 1920, 23616, 24192, 23040),
    ("SmolLM2-135M", "all-linear"): (305280, 160512, 154944, 10176, 159360, 255168, 155520),
}


def counted(config: PretrainedConfig, folder: Path, *options: str) -> list[int]:
    config.save_pretrained(folder)
    result = CliRunner().invoke(app, ["params", str(folder), "--json", *options])
    assert result.exit_code == 0, result.stderr
    methods = json.loads(result.stdout)["methods"]
    assert all(method["bytes"] == 2 * method["parameters"] for method in methods.values())
    return [method["parameters"] for method in methods.values()]


@pytest.mark.parametrize(("model", "modules"), PER_RANK)
def test_the_counts_are_those_of_the_reference(
    model: str, modules: str, tmp_path: Path, seed: int
) -> None:
    rank = random.Random(seed).randrange(1, 65)
    found = counted(MODELS[model], tmp_path, "--modules", modules, "--rank", str(rank))
    assert found == [rank * count for count in PER_RANK[model, modules]]


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (Qwen2Config(hidden_size=48, intermediate_size=80, num_hidden_layers=3, vocab_size=64,
                     num_attention_heads=4, num_key_value_heads=2), "q_proj,down_proj"),
        (GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=64), "c_attn,c_fc"),
        (RobertaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, vocab_size=64), "query,intermediate.dense"),
    ],
)  # fmt: skip
def test_lora_counts_as_peft_does(
    config: PretrainedConfig, modules: str, tmp_path: Path, seed: int
) -> None:
    rank = random.Random(seed).randrange(1, 9)
    lora = LoraConfig(
        r=rank, target_modules=modules.split(","), fan_in_fan_out=isinstance(config, GPT2Config)
    )
    model: Any = get_peft_model(AutoModel.from_config(config), lora)
    found = counted(config, tmp_path, "--modules", modules, "--rank", str(rank))
    assert found[0] == model.get_nb_trainable_parameters()[0]


def test_a_module_that_the_model_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    MODELS["GPT-2 medium"].save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["params", str(tmp_path), "--modules", "w_proj"])
    assert result.exit_code == 2
    assert "no module 'w_proj'; name some of attn.c_attn, attn.c_proj" in result.stderr
    assert "attn.c_attn.q" in result.stderr


def test_a_model_of_an_encoder_and_a_decoder_is_refused(tmp_path: Path) -> None:
    BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=64).save_pretrained(
        tmp_path
    )
    result = CliRunner().invoke(app, ["params", str(tmp_path)])
    assert result.exit_code == 2
    assert "has layers in decoder.layers., encoder.layers.; expected one stack" in result.stderr


def test_the_table_is_one_for_people(tmp_path: Path) -> None:
    MODELS["LLaMA-7B"].save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["params", str(tmp_path), "--rank", "64"])
    assert result.exit_code == 0
    assert "32 layers, rank 64, 7 modules" in result.stdout
    assert "159,907,840" in result.stdout
    assert "89,309,184" in result.stdout


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    result = CliRunner().invoke(app, ["params", str(tmp_path)])
    assert result.exit_code == 2
    assert "is not the configuration of a model" in result.stderr
