"""The commands on the adapters of a running server: list, show, add, remove, pin and rollback."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich import box
from rich.progress import DownloadColumn, TransferSpeedColumn
from rich.table import Table

from sharelora_serve.adapters.naming import NAME_RULE, AdapterName
from sharelora_serve.cli.connection import DEFAULT_URL, ApiKey, Url, connect, parse_answer
from sharelora_serve.cli.failure import one_message
from sharelora_serve.cli.output import NUM_DIGEST_CHARACTERS, named_values, progress_bar, show
from sharelora_serve.cli.package import Package, open_package
from sharelora_serve.config import format_bytes
from sharelora_serve.errors import AdapterExistsError, InvalidRequestError

_PAGE_LENGTH = 1000  # adapters in one answer, the most that a server gives

published = typer.Typer()

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of the adapter, such as acme-support; to an admin, one of tenant acme is "
        "acme/support.",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the server's JSON, with all digits and bytes.")
]


@published.command("list")
def list_adapters(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the adapters of a running server."""
    with one_message():
        with connect(url, api_key) as client:
            listed = _all_pages(client)
        if as_json:
            show(json.dumps(listed, indent=2))
        else:
            show(_table(listed) if listed else f"{url} serves no adapters, only its base.")


@published.command("show")
def show_adapter(
    name: Name, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None
) -> None:
    """Show an adapter of a running server, with its versions."""
    with one_message():
        with connect(url, api_key) as client:
            adapter = parse_answer(client.get(_path(name)))
        show(json.dumps(adapter, indent=2) if as_json else _details(adapter))


@published.command("add")
def add_adapter(
    name: Name,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            exists=True,
            help="Adapter to upload, such as adapters/acme-support: a folder, of which only the "
            "configuration and the weights are sent, or a .safetensors, .zip or .tar.gz file.",
        ),
    ],
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Publish a new version if there is an adapter of that name; running requests "
            "end on theirs.",
        ),
    ] = False,
    if_version: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST",
            help="Replace only this version, as 'adapters show' prints it, so that nobody else's "
            "is lost; needs --replace.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter to a running server, which serves it at once."""
    with one_message():
        headers = {} if if_version is None else {"if-match": _entity_tag(if_version, replace)}
        with connect(url, api_key) as client, open_package(path) as package:
            # First, so that a long upload is not in vain for want of a key or of a free name.
            is_there = _is_there(client, name)
            if is_there and not replace:
                raise AdapterExistsError(
                    f"there is an adapter {name!r} already; publish a new version of it with "
                    "--replace, or choose another name"
                )
            adapter = _upload(client, name, package, headers, is_there=is_there)
        show(_details(adapter))
        show(f"\nAsk it:\n{_curl_line(adapter['name'], str(client.base_url), api_key)}")


@published.command("remove")
def remove_adapter(
    name: Name,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Remove an adapter and its versions from a running server.

    Running requests end on it. What a server's --adapters folder holds is there again when its
    files change.
    """
    with one_message():
        path = _path(name)
        if not yes and not sys.stdin.isatty():
            raise InvalidRequestError(
                f"there is no terminal to ask whether {name!r} shall go; give --yes"
            )
        if not yes:
            typer.confirm(f"Remove {name} and all its versions from {url}?", abort=True, err=True)
        with connect(url, api_key) as client:
            parse_answer(client.delete(path))
        show(f"Removed {name}.")


@published.command("pin")
def pin_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Keep an adapter on the device, whatever else is asked for."""
    _change(name, "pin", None, url, api_key)


@published.command("unpin")
def unpin_adapter(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let an adapter make room for others again."""
    _change(name, "unpin", None, url, api_key)


@published.command("rollback")
def roll_back_adapter(
    name: Name,
    version: Annotated[
        str | None,
        typer.Argument(
            metavar="VERSION",
            help="Version to serve again, or the first 8 or more characters of it, such as "
            "3f9a1c07; without it the one before the present one.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Let an adapter be an earlier version again."""
    _change(name, "rollback", {"version": version}, url, api_key)


def _change(
    name: str, change: str, fields: dict[str, Any] | None, url: str, api_key: str | None
) -> None:
    with one_message():
        with connect(url, api_key) as client:
            adapter = parse_answer(client.post(f"{_path(name)}/{change}", json=fields))
        show(_details(adapter))


def _path(name: str) -> str:
    """The route of an adapter; checked, since '..' would be that of something else."""
    if AdapterName.parse(name) is None:
        raise InvalidRequestError(f"{name!r} is not the name of an adapter: {NAME_RULE}")
    return f"/v1/adapters/{name}"


def _entity_tag(version: str, replace: bool) -> str:
    if not replace:
        raise InvalidRequestError("--if-version says what may be replaced; give --replace too")
    if not re.fullmatch("[0-9a-f]{64}", version):
        raise InvalidRequestError(
            f"--if-version: {version!r} is no whole version; give the 64 characters that "
            "'adapters show' prints"
        )
    return f'"{version}"'


def _is_there(client: httpx.Client, name: str) -> bool:
    response = client.get(_path(name))
    if response.status_code == httpx.codes.NOT_FOUND:
        return False
    parse_answer(response)
    return True


def _upload(
    client: httpx.Client, name: str, package: Package, headers: dict[str, str], *, is_there: bool
) -> dict[str, Any]:
    """Publish a new adapter, or a new version of one, while a bar shows how much was sent."""
    with (
        progress_bar(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress,
        progress.wrap_file(
            package.content, total=package.num_bytes, description=f"Uploading {package.file_name}"
        ) as content,
    ):
        response = client.request(
            "PUT" if is_there else "POST",
            _path(name) if is_there else "/v1/adapters",
            data={} if is_there else {"name": name},
            files={"file": (package.file_name, content)},
            headers=headers,
        )
    return parse_answer(response)


def _all_pages(client: httpx.Client) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = []
    parameters: dict[str, str | int] = {"limit": _PAGE_LENGTH}
    while True:
        page = parse_answer(client.get("/v1/adapters", params=parameters))
        listed += page["data"]
        if not page["has_more"]:
            return listed
        parameters["after"] = page["last_id"]


def _table(listed: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Adapter", overflow="fold")
    table.add_column("Version", no_wrap=True)
    table.add_column("Sharing", no_wrap=True)
    table.add_column("Rank", justify="right", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Where", no_wrap=True)
    for adapter in listed:
        lowest, highest = adapter["ranks"][0], adapter["ranks"][-1]
        table.add_row(
            adapter["name"],
            adapter["version"][:NUM_DIGEST_CHARACTERS],
            adapter["sharing"],
            str(lowest) if lowest == highest else f"{lowest}-{highest}",
            format_bytes(adapter["bytes_stored"]),
            _where(adapter),
        )
    return table


def _details(adapter: dict[str, Any]) -> str:
    versions = [
        f"{version['version']}{'  current' * version['is_current']}"
        for version in adapter["versions"] or ()  # null if the disk failed after a change
    ]
    return named_values(
        ("adapter", adapter["name"]),
        ("version", adapter["version"]),
        ("base", adapter["base"]),
        ("sharing", adapter["sharing"] + ", one A for q, k and v" * adapter["shares_qkv"]),
        ("rank", ", ".join(map(str, adapter["ranks"]))),
        ("modules", ", ".join(adapter["modules"])),
        ("layers", str(adapter["num_layers"])),
        ("bytes as stored", format_bytes(adapter["bytes_stored"])),
        ("bytes as plain LoRA", format_bytes(adapter["bytes_expanded"])),
        ("where", _where(adapter)),
        *(("versions" if index == 0 else "", text) for index, text in enumerate(versions)),
    )


def _where(adapter: dict[str, Any]) -> str:
    residency = adapter["residency"] or "not told"  # to a tenant, of a public adapter
    return f"{residency}{', pinned' * adapter['pinned']}"


def _curl_line(model: str, url: str, api_key: str | None) -> str:
    """A command that asks the adapter; the key itself stays out of it."""
    route = url.rstrip("/") + "/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}
    key = ' -H "authorization: Bearer $SHARELORA_API_KEY"' if api_key is not None else ""
    return (
        f"curl {shlex.quote(route)}{key} -H 'content-type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
