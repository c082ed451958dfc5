"""The card of a trained adapter: what it is, what it learnt from, and how that went."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.config import format_bytes
from sharelora_serve.training.checkpoint import CurvePoint
from sharelora_serve.training.counts import Method, num_trained
from sharelora_serve.training.data import Template
from sharelora_serve.training.settings import TrainSettings
from sharelora_serve.training.trainer import Trained

_NUM_POINTS = 12  # of the curve


@dataclass(frozen=True, slots=True)
class DataSource:
    """What the card says of the data. name and licence are the user's words."""

    file: Path
    digest: str
    num_rows: int
    num_held_out: int
    template: Template | None
    name: str | None
    licence: str | None


def write_card(
    folder: Path,
    layout: BaseLayout,
    settings: TrainSettings,
    data: DataSource,
    trained: Trained,
    stored_bytes: int,
    command: str,
) -> None:
    """Write README.md into an adapter's folder."""
    shapes = {module: layout.shapes[module] for module in settings.modules}
    count = num_trained(layout.num_layers, shapes, settings.rank, settings.method)
    plain = num_trained(layout.num_layers, shapes, settings.rank, Method(""))
    modules = ", ".join(module.rpartition(".")[2] for module in settings.modules)
    num_seen = min(trained.num_steps * settings.batch_size, data.num_rows)
    last = trained.curve[-1]
    mean = sum(point.loss for point in trained.curve[-20:]) / len(trained.curve[-20:])
    rows = [
        ("Base", layout.name),
        ("Form", _form(settings.method)),
        ("Rank, alpha", f"{settings.rank}, {settings.alpha:g}{_rslora(settings)}"),
        ("Modules", modules),
        ("Trained parameters", f"{count:,}; plain LoRA would have {plain:,}"),
        ("Stored", format_bytes(stored_bytes)),
        ("Data", _data(data)),
        ("Licence of the data", data.licence or "not given"),
        ("Rows", f"{num_seen:,} of {data.num_rows:,} trained on, {data.num_held_out:,} held out"),
        (
            "Training",
            f"{trained.num_steps:,} steps of {settings.batch_size} rows, "
            f"{trained.num_tokens:,} tokens, {trained.seconds / 60:.1f} minutes",
        ),
        (
            "Optimiser",
            f"AdamW, learning rate {settings.learning_rate:g}, {settings.schedule}, warm-up "
            f"{settings.warm_up:.0%}, dropout {settings.dropout:g}, seed {settings.seed}",
        ),
        ("Loss, mean of the last 20 steps", f"{mean:.4f}"),
    ]
    if last.validation_loss is not None:
        rows.append(("Loss on held-out rows", f"{last.validation_loss:.4f}"))
    lines = [f"# {folder.name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    if data.template is not None:
        lines += ["", "It was asked in one user message, and answers as the assistant:", ""]
        lines += [f"    {data.template.user}", "", f"    {data.template.assistant}"]
    lines += ["", "## Curve", "", *_curve(trained.curve)]
    lines += ["", "## Made with", "", f"    {command}", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _form(method: Method) -> str:
    if not method.share:
        name = "LoRA"
    else:
        name = f"Share{method.share}"
        if method.share_only is not None:
            only = ", ".join(module.rpartition(".")[2] for module in method.share_only)
            name += f" of {only}, the rest LoRA"
        if method.share_qkv:
            name += ", one A for q, k and v"
    return name + (", A frozen" if method.freeze_a else "")


def _rslora(settings: TrainSettings) -> str:
    return ", rsLoRA" if settings.rslora else ""


def _data(data: DataSource) -> str:
    name = data.name or data.file.name
    return f"{name} (sha256 of {data.file.name} {data.digest[:12]})"


def _curve(curve: Sequence[CurvePoint]) -> list[str]:
    """Losses at up to so many steps; each is the mean since the one before."""
    lines = ["| step | loss | held out |", "| ---: | ---: | ---: |"]
    ends = sorted({round(len(curve) * n / _NUM_POINTS) for n in range(1, _NUM_POINTS + 1)} - {0})
    for begin, end in zip([0, *ends], ends, strict=False):
        points = curve[begin:end]
        known = [point.validation_loss for point in points if point.validation_loss is not None]
        held_out = f"{known[-1]:.4f}" if known else ""
        loss = sum(point.loss for point in points) / len(points)
        lines.append(f"| {points[-1].step} | {loss:.4f} | {held_out} |")
    return lines
