"""The commands that make, list and revoke API keys, and those that send one."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sharelora_serve.cli import app
from sharelora_serve.server.caller import Caller
from sharelora_serve.server.keys import KeyFile
from tests.cli.http_server import error, events, scripted_server

KEY = re.compile(r"slk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys [of] all.jsonl"


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", **environment})


def create(file: Path, *arguments: str) -> tuple[str, str]:
    """The id and the key."""
    result = run("keys", "create", "--file", file, *arguments)
    assert result.exit_code == 0, result.stderr
    matched = KEY.fullmatch(result.stdout.removesuffix("\n"))
    assert matched is not None, "the key is alone on standard output"
    assert matched[0] not in result.stderr
    return matched[1], matched[0]


def test_a_key_is_printed_once_alone_and_works(file: Path) -> None:
    key_id, text = create(file, "--tenant", "acme")
    assert KeyFile(file).authenticate(f"Bearer {text}") == Caller("acme")
    _, text = create(file, "--admin")
    assert KeyFile(file).authenticate(f"Bearer {text}") == Caller(None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shown = run("keys", "list", "--file", file)
    assert key_id in shown.stdout
    assert text not in shown.stdout


def test_what_is_said_about_a_new_key_goes_to_standard_error(file: Path) -> None:
    result = run("keys", "create", "--file", file, "--tenant", "acme")
    assert f"of tenant acme is in {file}" in result.stderr
    assert "shown once" in result.stderr


def test_the_list_names_whose_keys_they_are(file: Path) -> None:
    first, _ = create(file, "--tenant", "acme", "--comment", "for [b]the shop[/b]")
    second, _ = create(file, "--admin")
    table = run("keys", "list", "--file", file).stdout
    for part in (first, second, "acme", "admin", "for [b]the shop[/b]", "UTC"):
        assert part in table
    listed = json.loads(run("keys", "list", "--json", SHARELORA_API_KEYS=str(file)).stdout)
    assert [(key["id"], key["role"], key["tenant"], key["comment"]) for key in listed] == [
        (first, "tenant", "acme", "for [b]the shop[/b]"),
        (second, "admin", None, None),
    ]
    assert set(listed[0]) == {"id", "role", "tenant", "created_at", "comment"}


def test_a_revoked_key_is_gone_and_the_others_stay(file: Path) -> None:
    first, second = create(file, "--tenant", "acme"), create(file, "--tenant", "acme")
    result = run("keys", "revoke", "--file", file, first[0])
    assert result.exit_code == 0
    assert f"Revoked key {first[0]} of tenant acme" in result.stderr
    assert [
        key["id"] for key in json.loads(run("keys", "list", "--file", file, "--json").stdout)
    ] == [second[0]]
    run("keys", "revoke", "--file", file, second[0])
    assert "holds no keys" in run("keys", "list", "--file", file).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create"], "Give either --tenant NAME or --admin"),
        (["create", "--admin", "--tenant", "acme"], "Give either --tenant NAME or --admin"),
        (["create", "--tenant", "../acme"], "a name has 1 to 128"),
        (["create", "--admin", "--comment", "a\nb"], "one line of printable text"),
        (["create", "--admin", "--comment", "\udcff"], "comment: "),
        (["list"], "No such file"),
        (["revoke", "3f9a1c07b2d4"], "holds no key of that id"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_makes_no_file(
    arguments: list[str], message: str, file: Path
) -> None:
    result = run("keys", *arguments, "--file", file)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout
    assert not file.exists()


def test_a_folder_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    result = run("keys", "create", "--admin", "--file", tmp_path / "none" / "keys.jsonl")
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr
    assert not (tmp_path / "none").exists()


def commands(url: str) -> Iterator[list[str]]:
    yield ["adapters", "list", "--url", url]
    yield ["chat", "--model", "acme", "--url", url, "hi"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_command_sends_its_key(index: int) -> None:
    answers = [(200, {"data": [], "has_more": False}), (200, events("ok"))]
    for environment, option in (({}, ["--api-key", "slk_a"]), ({"SHARELORA_API_KEY": "slk_a"}, [])):
        with scripted_server(answers[index]) as server:
            result = run(*list(commands(server.url))[index], *option, **environment)
        assert result.exit_code == 0, result.stderr
        assert server.authorizations == ["Bearer slk_a"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_command_without_a_key_sends_none_and_says_what_the_server_says(index: int) -> None:
    with scripted_server((401, error("This server needs an API key"))) as server:
        result = run(*list(commands(server.url))[index], SHARELORA_API_KEY="")
    assert server.authorizations == [None]
    assert result.exit_code == 2
    assert "Error: This server needs an API key" in result.stderr


@pytest.mark.parametrize(
    "key", ["", "slk_secret\n", "slk_secret x", "slk_secr\xe4t", "slk_secret\0"]
)
@pytest.mark.parametrize("index", [0, 1])
def test_what_is_no_key_is_not_sent_and_not_shown(index: int, key: str) -> None:
    with scripted_server() as server:
        result = run(*list(commands(server.url))[index], "--api-key", key)
    assert not server.requests
    assert result.exit_code == 2
    assert "'sharelora-serve keys create' printed it" in result.stderr
    assert "slk_secr" not in result.stderr
