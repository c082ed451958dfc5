"""Singular values of the products s B A of adapters, per layer: the paper's figure, with numbers.

PYTHONPATH=. python adapters/singular_values.py PLOT.png ADAPTER_FOLDER ...
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import typer
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console

from loadtest.markdown import table
from sharelora_serve.adapters.adapter import FactorPair
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.source import base_folder

_PLOTTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")

Values = dict[str, list[list[float]]]
"""By module: of each layer, descending."""


def read_values(folder: Path) -> Values:
    """Of an adapter of the embedded base."""
    layout = load_model_config(base_folder(None)).layout("base")
    pairs = read_adapter(folder, layout, name=folder.name).pairs
    return {
        module: [singular_values(pairs[layer, module]) for layer in range(layout.num_layers)]
        for module in MODULES
    }


def singular_values(pair: FactorPair) -> list[float]:
    """Of scaling * B A, from the triangles of its factors' QR decompositions alone."""
    of_a, of_b = (torch.linalg.qr(each.float()).R for each in (pair.a.T, pair.b))
    values: list[float] = (pair.scaling * torch.linalg.svdvals(of_b @ of_a.T)).tolist()
    return values


def effective_rank(values: Sequence[float]) -> float:
    """(sum s)^2 / sum s^2: as many as there are if all are equal, 1 if one outweighs the rest."""
    return sum(values) ** 2 / sum(value**2 for value in values)


def plot(adapters: dict[str, Values], path: Path) -> None:
    """A row for each adapter, a column for each module, a line for each layer."""
    figure = Figure(figsize=(12, 3 * len(adapters)), layout="constrained")
    grid = figure.subplots(len(adapters), len(_PLOTTED), sharex=True, sharey="col", squeeze=False)
    for row, (name, modules) in zip(grid, adapters.items(), strict=True):
        for axes, module in zip(row, _PLOTTED, strict=True):
            for layer, values in enumerate(modules[module]):
                colour = colormaps["viridis"](layer / len(modules[module]))
                axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=0.8)
            axes.set(yscale="log", title=f"{name}, {module.rpartition('.')[2]}")
    figure.supxlabel("singular value (dark: first layer, bright: last)")
    figure.savefig(path, dpi=110)


def main(path: Path, folders: list[Path]) -> None:
    """Plot them, and print the effective ranks, medians over layers."""
    adapters = {folder.name: read_values(folder) for folder in folders}
    plot(adapters, path)
    lines = []
    for module in MODULES:
        ranks = (statistics.median(map(effective_rank, each[module])) for each in adapters.values())
        lines.append((module.rpartition(".")[2], *(f"{rank:.1f}" for rank in ranks)))
    Console(soft_wrap=True, markup=False, highlight=False).print(
        table(("module", *adapters), lines)
    )


if __name__ == "__main__":
    typer.run(main)
