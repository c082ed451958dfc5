"""What commands print for people: tables, and lines of a name and a value."""

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table

NUM_DIGEST_CHARACTERS = 12
"""Of a digest in tables of several adapters."""


def show(what: Table | str) -> None:
    """Print to standard output; text, and what is in a table's cells, as it is."""
    if isinstance(what, str):
        typer.echo(what)
    else:
        Console(markup=False, emoji=False, highlight=False).print(what)


def named_values(*rows: tuple[str, str]) -> str:
    """One line for each; never broken, so that a digest can be copied."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on standard error, and what else it shows; none where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
