"""The commands that start servers of the embedded base themselves, at their smallest."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.__main__ import app
from loadtest.comparison import DRAFTING, MERGED, OURS, OURS_HALF, PEFT
from loadtest.peers import LlamaCpp, LlamaCppBase, LlamaCppOne, Peer, VllmCpu

pytestmark = pytest.mark.slow


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_sweep_has_a_line_and_a_point_for_every_value(tmp_path: Path) -> None:
    words = ("--rounds", 1, "--requests", 1, "--most", 1)
    output = call("sweep", "batch", *words, "--out", tmp_path)
    assert (tmp_path / "batch.md").read_text().strip() in output
    points = json.loads((tmp_path / "batch.json").read_text())["points"]
    assert [point["value"] for point in points] == [0, 1]
    assert all(value > 0 for point in points for value in list(point.values())[1:])
    assert (tmp_path / "batch.png").is_file()


def test_flood_tells_the_others_waiting_with_and_without_it(tmp_path: Path) -> None:
    output = call("flood", "--tenants", 3, "--rounds", 1, "--requests", 12, "--out", tmp_path)
    assert "times that, median of the rounds, and each" in output
    assert "wrong answers" not in output  # none is compared with anything
    assert re.search(r"failed requests *│ 0 of \d\d", output)


def test_registered_tells_what_many_adapters_cost(tmp_path: Path) -> None:
    words = ("--count", 20, "--rank", "8,16", "--rounds", 1, "--requests", 8)
    output = call("registered", *words, "--out", tmp_path)
    assert "20 adapters, all in host memory" in output
    assert "20 adapters, room for 10%" in output


def test_compare_goes_on_without_peers_and_says_who_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(_peer: Peer) -> None:
        raise RuntimeError("no registry is in reach")

    monkeypatch.setattr(Peer, "prepare", prepare)
    amount = ("--rounds", 1, "--requests", 32, "--new-tokens", 2)
    output = call("compare", *amount, "--peers", tmp_path / "peers", "--out", tmp_path)
    for name in (VllmCpu.name, LlamaCpp.name, LlamaCppOne.name, LlamaCppBase.name):
        assert f"left out: {name}: no registry is in reach" in output
    cases = json.loads((tmp_path / "compare.json").read_text())["cases"]
    measured = [case["server"] for case in cases if case["rounds"]]
    ours = list(dict.fromkeys((OURS, OURS_HALF)))
    assert measured == [*ours, PEFT, MERGED, DRAFTING, OURS, *ours]
