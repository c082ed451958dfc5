"""The command line: serve, chat, adapters and keys.

sharelora-serve serve      one base and its adapters over HTTP
sharelora-serve chat       talk to a model of a running server
sharelora-serve adapters   list, inspect, convert and export adapters
sharelora-serve keys       create, list and revoke API keys
"""

import typer

from sharelora_serve import __version__
from sharelora_serve.cli.adapters import adapters
from sharelora_serve.cli.chat import chat
from sharelora_serve.cli.keys import keys
from sharelora_serve.cli.serve import serve

app = typer.Typer(
    name="sharelora-serve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback is a bug of ours: show it as it is
    help="Serve one base language model and thousands of ShareLoRA adapters of it.",
)
app.command()(serve)
app.command()(chat)
app.add_typer(adapters, name="adapters")
app.add_typer(keys, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; the console script's entry point."""
    app()
