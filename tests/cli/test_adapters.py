"""The commands adapters inspect, convert and export."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from sharelora_serve.adapters.adapter import FactorPair
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.cli import app
from tests.adapters.samples import (
    NUM_LAYERS,
    make_adapter,
    peft_config,
    peft_tensors,
    random_adapter,
    read,
    tiny_llama,
    write_folder,
)

WIDE = {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the shapes of LAYOUT: only its config.json is needed."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_llama(0).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)], env=WIDE)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def shown_value(output: str, key: str) -> str:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{key}  "))
    return line.removeprefix(key).strip()


def plain_folder(folder: Path, seed: int, share: str = "") -> Path:
    adapter = random_adapter(seed, share)
    return write_folder(folder, peft_config(adapter), peft_tensors(adapter))


def test_inspect_shows_the_sharing_found_in_a_peft_file(
    base: Path, tmp_path: Path, seed: int
) -> None:
    folder = plain_folder(tmp_path / "acme", seed, "A")
    result = run("inspect", folder, "--model", base)
    assert result.exit_code == 0, result.stderr
    assert shown_value(result.stdout, "adapter") == "acme"
    assert shown_value(result.stdout, "sharing") == "ShareA"
    assert shown_value(result.stdout, "rank") == "4"
    assert shown_value(result.stdout, "base").startswith("tiny")
    assert shown_value(result.stdout, "digest") == read(folder).digest
    assert shown_value(result.stdout, "distinct matrices") == str(len(MODULES) * (1 + NUM_LAYERS))


def test_inspect_in_json_has_bytes_as_numbers(base: Path, tmp_path: Path, seed: int) -> None:
    folder = plain_folder(tmp_path / "acme", seed, "AB")
    report = run_json("inspect", folder, "--model", base)
    assert report["base"] == "tiny"
    (adapter,) = report["adapters"]
    assert adapter["digest"] == read(folder).digest
    assert adapter["sharing"] == "ShareAB"
    assert adapter["modules"] == list(MODULES)
    assert adapter["expanded_bytes"] == NUM_LAYERS * adapter["stored_bytes"]
    assert report["together"]["dedupe_ratio"] == pytest.approx(NUM_LAYERS)


def test_many_adapters_with_one_frozen_a_are_one_a_and_many_bs(
    base: Path, tmp_path: Path, seed: int
) -> None:
    module, num_tenants = "self_attn.q_proj", 40
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 24, generator=generator)
    for tenant in range(num_tenants):
        b = torch.randn(24, 4, generator=generator)  # also one for all layers: one B per tenant
        pairs = {(layer, module): FactorPair(a, b, 2.0) for layer in range(NUM_LAYERS)}
        adapter = make_adapter(pairs)
        write_folder(tmp_path / f"t{tenant}", peft_config(adapter), peft_tensors(adapter))
    folders = sorted(tmp_path.iterdir())
    together = run_json("inspect", *folders, "--model", base)["together"]
    assert together["num_adapters"] == num_tenants
    assert together["num_distinct_a"] == 1
    assert together["num_distinct_b"] == num_tenants
    size = a.nbytes  # B is as large
    assert together["distinct_bytes"] == (1 + num_tenants) * size
    assert together["stored_bytes"] == 2 * num_tenants * size
    assert together["expanded_bytes"] == 2 * num_tenants * NUM_LAYERS * size
    output = run("inspect", *folders, "--model", base).stdout
    assert shown_value(output, "distinct A") == "1"
    assert shown_value(output, "distinct B") == str(num_tenants)
    assert shown_value(output, "dedupe ratio") == f"{together['dedupe_ratio']:.2f}"
    assert all(folder.name in output for folder in folders)


def test_inspect_shows_the_good_adapters_and_names_the_bad_ones(
    base: Path, tmp_path: Path, seed: int
) -> None:
    good = plain_folder(tmp_path / "good", seed)
    dora = random_adapter(seed)
    write_folder(tmp_path / "dora", peft_config(dora, use_dora=True), peft_tensors(dora))
    result = run("inspect", good, tmp_path / "dora", tmp_path / "absent", "--model", base)
    assert result.exit_code == 2
    assert "good" in result.stdout
    assert "adapter 'dora' cannot be served" in result.stderr
    assert "use_dora" in result.stderr
    assert "adapter 'absent' cannot be served" in result.stderr


@pytest.mark.parametrize("share", ["A", "B", "AB"])
def test_convert_to_compact_and_export_back_keep_the_digest(
    share: str, base: Path, tmp_path: Path, seed: int
) -> None:
    plain = plain_folder(tmp_path / "plain", seed, share)
    compact, again = tmp_path / "compact", tmp_path / "again"
    result = run("convert", plain, compact, "--to", "compact", "--model", base)
    assert result.exit_code == 0, result.stderr
    assert str(compact) in result.stdout
    assert run("export", compact, again, "--model", base).exit_code == 0
    assert read(compact).digest == read(again).digest == read(plain).digest
    sizes = [(path / "adapter_model.safetensors").stat().st_size for path in (plain, compact)]
    assert sizes[1] < sizes[0]
    result = run("convert", compact, tmp_path / "peft", "--to", "peft", "--model", base)
    assert result.exit_code == 0
    written = (tmp_path / "peft" / "adapter_config.json").read_text()
    assert written == (again / "adapter_config.json").read_text()


def test_convert_refuses_what_shares_nothing_and_a_target_that_exists(
    base: Path, tmp_path: Path, seed: int
) -> None:
    plain = plain_folder(tmp_path / "plain", seed)
    result = run("convert", plain, tmp_path / "new", "--to", "compact", "--model", base)
    assert result.exit_code == 2
    assert "cannot be written as compact ShareLoRA" in result.stderr
    assert not (tmp_path / "new").exists()
    result = run("export", plain, plain, "--model", base)
    assert result.exit_code == 2
    assert "exists; remove it or give another target" in result.stderr


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(1)
    tensors = {
        key: torch.ones(4, 576) if "lora_A" in key else tensor
        for key, tensor in peft_tensors(adapter).items()
    }
    folder = write_folder(tmp_path / "acme", peft_config(adapter), tensors)
    result = run("inspect", folder, "--model", base)
    assert result.exit_code == 2
    assert "expected (r, 24) for base 'tiny'; was it trained on another base?" in result.stderr


def test_a_model_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    result = run("inspect", tmp_path, "--model", tmp_path / "absent")
    assert result.exit_code == 2
    assert "neither a folder nor a hub id" in result.stderr


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from sharelora_serve.cli import app\n"
        "try: app(['adapters', 'inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numba'} & sys.modules.keys()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
