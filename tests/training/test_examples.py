"""The adapters that `make serve` comes up with."""

from pathlib import Path

import pytest
import torch

from adapters.examples import EXAMPLES, FOLDER
from adapters.sources import COMMON_A
from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder

_MOST_BYTES = 30_000_000


def read(folder: Path) -> Adapter:
    layout = load_model_config(base_folder(None)).layout("base")
    return read_adapter(folder, layout, name=folder.name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_it_was_asked_to_be_and_has_a_card(name: str) -> None:
    adapter = read(FOLDER / name)
    options = EXAMPLES[name][1]
    rank = options[options.index("--rank") + 1] if "--rank" in options else "16"
    assert adapter.config["r"] == int(rank)
    share = options[options.index("--share") + 1] if "--share" in options else "A"
    expected = "LoRA" if share == "none" else f"Share{share}"
    assert summarise(adapter).sharing == expected
    card = (FOLDER / name / "README.md").read_text()
    assert card.startswith(f"# {name}\n")
    assert " ".join(options) in card


def test_examples_are_small_and_the_fleet_has_one_a() -> None:
    files = [path for name in EXAMPLES for path in (FOLDER / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < _MOST_BYTES
    common = read(COMMON_A)
    fleet = [read(FOLDER / name) for name in EXAMPLES if name.startswith("fleet-")]
    assert len(fleet) >= 3
    for adapter in fleet:
        for place, pair in adapter.pairs.items():
            assert torch.equal(pair.a, common.pairs[place].a)
