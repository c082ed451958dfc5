"""The command line: serve, chat, adapters, keys, train, evaluate and params.

sharelora-serve serve      one base and its adapters over HTTP
sharelora-serve chat       talk to a model of a running server
sharelora-serve adapters   of a running server, of files and of a store
sharelora-serve keys       create, list and revoke API keys
sharelora-serve train      from a data file to an adapter
sharelora-serve evaluate   how well a served model does a data set
sharelora-serve params     what each form of an adapter costs
"""

import typer

from sharelora_serve import __version__
from sharelora_serve.cli.adapters import adapters
from sharelora_serve.cli.chat import chat
from sharelora_serve.cli.evaluate import evaluate
from sharelora_serve.cli.keys import keys
from sharelora_serve.cli.params import params
from sharelora_serve.cli.published import published
from sharelora_serve.cli.serve import serve
from sharelora_serve.cli.train import train

app = typer.Typer(
    name="sharelora-serve",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich's tables cut long option names, values and texts
    pretty_exceptions_enable=False,  # a traceback is a bug of ours: show it as it is
    help="Serve one base language model and thousands of ShareLoRA adapters of it.",
)
app.command()(serve)
app.command()(chat)
all_adapters = typer.Typer(
    no_args_is_help=True, help="List, publish, inspect, convert and check adapters."
)
all_adapters.add_typer(published)
all_adapters.add_typer(adapters)
app.add_typer(all_adapters, name="adapters")
app.add_typer(keys, name="keys")
app.command()(train)
app.command()(evaluate)
app.command()(params)


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
