"""The commands keys create, list and revoke, which work on a server's file of API keys."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import show
from sharelora_serve.config import environment_variable
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.server.keys import CHECK_SECONDS, create_key, read_keys, revoke_key

keys = typer.Typer(no_args_is_help=True, help="Create, list and revoke the API keys of a server.")

KeyFilePath = Annotated[
    Path,
    typer.Option(
        help="The server's file of API keys, its --api-keys, such as ./keys.jsonl.",
        envvar=environment_variable("api_keys"),
    ),
]


@keys.command("create")
def create(
    file: KeyFilePath,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Tenant whose key it is, such as acme: it reaches the public adapters and the "
            "tenant's own. Several keys may be of one tenant."
        ),
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Make an admin's key, which may do everything.")
    ] = False,
    comment: Annotated[
        str | None, typer.Option(help="What the list says about it, such as 'for the web shop'.")
    ] = None,
) -> None:
    """Make an API key and print it, this once.

    The file, made if it is not there, has its hash. A running server takes it within a second or
    so.
    """
    with one_message():
        if admin == (tenant is not None):
            raise ConfigurationError("whose key shall it be? Give either --tenant NAME or --admin")
        key, text = create_key(file, tenant, comment)
        _say(
            f"Key {key.id} of {key.owner} is in {file}. It is shown once and cannot be found out "
            "again:"
        )
        typer.echo(text)


@keys.command("list")
def list_keys(
    file: KeyFilePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the keys of a file: ids and owners, never the keys."""
    with one_message():
        stored = read_keys(file)
        if as_json:
            shown = [key.model_dump(mode="json", exclude={"sha256"}) for key in stored]
            typer.echo(json.dumps(shown, indent=2))
            return
        if not stored:
            show(f"{file} holds no keys.")
            return
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("Id", "Role", "Tenant", "Created", "Comment"):
            table.add_column(heading, overflow="fold")
        for key in stored:
            created = f"{key.created_at:%Y-%m-%d %H:%M %Z}"
            table.add_row(key.id, key.role, key.tenant, created, key.comment)
        show(table)


@keys.command("revoke")
def revoke(
    file: KeyFilePath,
    key_id: Annotated[
        str,
        typer.Argument(metavar="ID", help="Id of the key, such as 3f9a1c07b2d4, from the list."),
    ],
) -> None:
    """Remove a key; a running server refuses it after a second or so."""
    with one_message():
        key = revoke_key(file, key_id)
        _say(
            f"Revoked key {key.id} of {key.owner}; servers that read {file} refuse it after "
            f"{CHECK_SECONDS:.0f} second."
        )


def _say(message: str) -> None:
    """Print to standard error, which is not piped on with the key."""
    typer.echo(message, err=True)
