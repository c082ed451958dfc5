"""The commands on adapters of this machine: adapters inspect, convert, export and verify."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.progress import MofNCompleteColumn
from rich.table import Table

from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import NUM_DIGEST_CHARACTERS, named_values, progress_bar, show
from sharelora_serve.config import (
    EMBEDDED_MODEL_NAME,
    ServeConfig,
    environment_variable,
    format_bytes,
)
from sharelora_serve.errors import ServeError

if TYPE_CHECKING:  # slow imports, which --help need not wait for
    from sharelora_serve.adapters.adapter import Adapter
    from sharelora_serve.adapters.layout import BaseLayout
    from sharelora_serve.adapters.summary import AdapterSummary

adapters = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(
        help="Base that the adapter must fit: a Hugging Face folder or hub id, of which only "
        f"config.json is read, such as ./llama; without it the embedded {EMBEDDED_MODEL_NAME}.",
        envvar=environment_variable("model"),
    ),
]
Source = Annotated[
    Path,
    typer.Argument(
        help="Adapter to read, such as adapters/acme-support: a folder of PEFT, MLX or compact "
        "ShareLoRA, or a .safetensors file; it is left as it is."
    ),
]
Target = Annotated[
    Path,
    typer.Argument(
        help="Folder to write, such as adapters/acme-compact; one that exists is never replaced."
    ),
]


class Form(StrEnum):
    """What convert can write."""

    COMPACT = "compact"
    PEFT = "peft"


@adapters.command("inspect")
def inspect_adapters(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Adapters to read, such as adapters/*; several are also counted together, as a "
            "server stores them: equal matrices once.",
        ),
    ],
    model: Model = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with sizes in bytes.")
    ] = False,
) -> None:
    """Show what adapters are made of and whether a base serves them.

    All is found in their bytes. Ends with exit code 2 if one of them cannot be served; the others
    are shown all the same.
    """
    with one_message():
        layout = _layout(model)
        together = _Together(layout.name)
        problems = []
        for path in paths:
            try:
                together.add(path, _read(path, layout))
            except ServeError as error:
                problems.append(error.message)
        if as_json:
            show(json.dumps(together.as_json(), indent=2))
        elif len(paths) == 1:
            for report in together.reports:
                show(_one(report, layout.name))
        elif together.reports:
            show(_row_table(together.reports))
            show(_all_together(together))
        if problems:
            raise ServeError("\n".join(problems))


@adapters.command("convert")
def convert_adapter(
    source: Source,
    target: Target,
    to: Annotated[
        Form,
        typer.Option(
            help="Form to write: compact stores what all layers share once, for this server; "
            "peft is plain LoRA, for PEFT and vLLM. Both compute the same."
        ),
    ],
    model: Model = None,
) -> None:
    """Write an adapter in another form; its digest stays the same."""
    from sharelora_serve.adapters.writer import write_compact, write_peft

    _convert(source, target, model, write_compact if to is Form.COMPACT else write_peft)


@adapters.command("export")
def export_adapter(source: Source, target: Target, model: Model = None) -> None:
    """Write an adapter as plain PEFT LoRA, which PEFT and vLLM load."""
    from sharelora_serve.adapters.writer import write_peft

    _convert(source, target, model, write_peft)


@adapters.command("verify")
def verify_adapters(
    store: Annotated[
        Path | None,
        typer.Option(
            help="Folder of what was published, such as /var/lib/sharelora; without it the one "
            "that a server of the base uses. A server may have it open.",
            envvar=environment_variable("store"),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base whose store is meant where --store is not given, as a server's --model, "
            f"such as ./llama; without it the embedded {EMBEDDED_MODEL_NAME}.",
            envvar=environment_variable("model"),
        ),
    ] = None,
) -> None:
    """Check every digest in a server's store, and change nothing.

    Ends with exit code 1 if anything is wrong, and a line for each of that.
    """
    from sharelora_serve.adapters.verify import verify_store

    with one_message():
        folder = ServeConfig(model=model, store=store).store_folder
        with progress_bar(MofNCompleteColumn()) as progress:
            task = progress.add_task("Checking versions", total=0)
            problems = verify_store(
                folder, lambda done, total: progress.update(task, completed=done, total=total)
            )
        if problems:
            show("\n".join(problems))
            raise typer.Exit(1)
        show(f"{folder}: {progress.tasks[task].completed:.0f} versions, every digest is right")


def _convert(
    source: Path,
    target: Path,
    model: str | None,
    write: Callable[["Adapter", "BaseLayout", Path], None],
) -> None:
    with one_message():
        layout = _layout(model)
        adapter = _read(source, layout)
        write(adapter, layout, target)
        before, after = _num_bytes(source), _num_bytes(target)
        show(f"Wrote {target}: {format_bytes(after)}, was {format_bytes(before)}.")


def _layout(model: str | None) -> "BaseLayout":
    from sharelora_serve.models.config import load_model_config
    from sharelora_serve.models.source import base_folder

    name = ServeConfig(model=model).base_name
    return load_model_config(base_folder(model, config_only=True)).layout(name)


def _read(path: Path, layout: "BaseLayout") -> "Adapter":
    from sharelora_serve.adapters.format import read_adapter

    # Named as a server names the folders of its --adapters.
    name = path.stem if path.is_file() else path.resolve().name
    return read_adapter(path, layout, name=name)


def _num_bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True, slots=True)
class _Report:
    path: Path
    name: str
    digest: str
    summary: "AdapterSummary"


@dataclass(slots=True)
class _Together:
    """Adapters counted as one server holds them, without keeping their factors in memory.

    base     name of the base they were checked against
    a, b     digest -> bytes of every distinct factor of either side
    """

    base: str
    reports: list[_Report] = field(default_factory=list)
    a: dict[str, int] = field(default_factory=dict)
    b: dict[str, int] = field(default_factory=dict)

    def add(self, path: Path, adapter: "Adapter") -> None:
        from sharelora_serve.adapters.format import factor_digest
        from sharelora_serve.adapters.summary import summarise

        self.reports.append(_Report(path, adapter.name, adapter.digest, summarise(adapter)))
        for factors, sides in (
            (self.a, {id(pair.a): pair.a for pair in adapter.pairs.values()}),
            (self.b, {id(pair.b): pair.b for pair in adapter.pairs.values()}),
        ):
            factors.update((factor_digest(of), of.nbytes) for of in sides.values())

    @property
    def expanded_bytes(self) -> int:
        """As plain LoRA: every adapter and layer with its own A and B."""
        return sum(report.summary.expanded_bytes for report in self.reports)

    @property
    def stored_bytes(self) -> int:
        """Every adapter by itself, what its layers share stored once."""
        return sum(report.summary.stored_bytes for report in self.reports)

    @property
    def distinct_bytes(self) -> int:
        """Over all adapters, every distinct factor once; an A that equals a B is one factor."""
        return sum((self.a | self.b).values())

    @property
    def dedupe_ratio(self) -> float:
        """How many times larger the adapters are as plain LoRA; 1 for none."""
        return self.expanded_bytes / self.distinct_bytes if self.reports else 1.0

    def as_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "adapters": [
                {
                    "path": str(report.path),
                    "name": report.name,
                    "digest": report.digest,
                    **asdict(report.summary),
                }
                for report in self.reports
            ],
            "together": {
                "num_adapters": len(self.reports),
                "num_distinct_a": len(self.a),
                "num_distinct_b": len(self.b),
                "expanded_bytes": self.expanded_bytes,
                "stored_bytes": self.stored_bytes,
                "distinct_bytes": self.distinct_bytes,
                "dedupe_ratio": self.dedupe_ratio,
            },
        }


def _one(report: _Report, base: str) -> str:
    summary = report.summary
    return named_values(
        ("adapter", report.name),
        ("digest", report.digest),
        ("base", f"{base} (fits)"),
        ("sharing", summary.sharing + (", one A for q, k and v" if summary.shares_qkv else "")),
        ("rank", _ranks(summary)),
        ("modules", ", ".join(module.rpartition(".")[2] for module in summary.modules)),
        ("layers", str(summary.num_layers)),
        ("distinct matrices", str(summary.num_factors)),
        ("bytes as stored", format_bytes(summary.stored_bytes)),
        ("bytes as plain LoRA", format_bytes(summary.expanded_bytes)),
    )


def _row_table(reports: Iterable[_Report]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Adapter", overflow="fold")
    table.add_column("Sharing", no_wrap=True)
    for heading in ("Rank", "Layers", "Stored", "As LoRA"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("Digest", no_wrap=True)
    for report in reports:
        summary = report.summary
        table.add_row(
            report.name,
            summary.sharing,
            _ranks(summary),
            str(summary.num_layers),
            format_bytes(summary.stored_bytes),
            format_bytes(summary.expanded_bytes),
            report.digest[:NUM_DIGEST_CHARACTERS],
        )
    return table


def _all_together(together: _Together) -> str:
    return named_values(
        ("adapters that fit", f"{len(together.reports)} of base {together.base}"),
        ("distinct A", str(len(together.a))),
        ("distinct B", str(len(together.b))),
        ("bytes as plain LoRA", format_bytes(together.expanded_bytes)),
        ("bytes stored one by one", format_bytes(together.stored_bytes)),
        ("bytes with equal matrices once", format_bytes(together.distinct_bytes)),
        ("dedupe ratio", f"{together.dedupe_ratio:.2f}"),
    )


def _ranks(summary: "AdapterSummary") -> str:
    return ", ".join(map(str, summary.ranks))
