"""Commands of a running server's adapters, as no one server makes them do at will."""

import json

from click.testing import Result
from typer.testing import CliRunner

from sharelora_serve.cli import app
from tests.cli.http_server import error, scripted_server


def run(*arguments: str, command: str = "list") -> Result:
    return CliRunner().invoke(app, ["adapters", command, *arguments], env={"COLUMNS": "80"})


def adapter(name: str) -> dict[str, object]:
    return {
        "name": name,
        "version": "0123456789abcdef" * 4,
        "sharing": "ShareAB",
        "ranks": [4, 8, 128],
        "bytes_stored": 1023 * 1024**2,
        "residency": "device",
        "pinned": True,
    }


def test_list_goes_through_all_pages() -> None:
    names = [f"a{index}" for index in range(5)]
    pages = [
        {"data": [adapter(name) for name in part], "has_more": more, "last_id": part[-1]}
        for part, more in ((names[:2], True), (names[2:4], True), (names[4:], False))
    ]
    with scripted_server(*((200, page) for page in pages)) as server:
        result = run("--json", "--url", server.url)
    assert result.exit_code == 0, result.stderr
    assert [each["name"] for each in json.loads(result.stdout)] == names
    assert [path for _, path, _ in server.requests] == [
        "/v1/adapters?limit=1000",
        "/v1/adapters?limit=1000&after=a1",
        "/v1/adapters?limit=1000&after=a3",
    ]


def test_the_widest_row_fits_80_columns_and_names_stay_as_they_are() -> None:
    names = ["n" * 128, "legal[bold]:tv:"]
    page = {"data": [adapter(name) for name in names], "has_more": False, "last_id": names[-1]}
    with scripted_server((200, page)) as server:
        result = run("--url", server.url)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("n") for line in lines[3:]) >= 128
    assert "legal[bold]:tv:" in result.stdout
    (row,) = (line for line in lines if "legal" in line)
    assert row.split() == [
        "legal[bold]:tv:", "0123456789ab", "ShareAB", "4-128", "1023MiB", "device,", "pinned"
    ]  # fmt: skip


def test_list_says_when_there_are_no_adapters_and_when_the_server_refuses() -> None:
    page = {"data": [], "has_more": False, "last_id": None}
    with scripted_server((200, page), (503, error("starting"))) as server:
        assert "serves no adapters" in run("--url", server.url).stdout
        result = run("--url", server.url)
    assert result.exit_code == 2
    assert "Error: starting" in result.stderr


def test_a_change_that_was_done_is_shown_though_the_server_cannot_tell_the_versions() -> None:
    details = {"base": "tiny", "shares_qkv": False, "modules": ["q_proj"], "num_layers": 1}
    answer = adapter("acme") | details | {"bytes_expanded": 1024, "versions": None}
    with scripted_server((200, answer)) as server:
        result = run("acme", "--url", server.url, command="pin")
    assert result.exit_code == 0, result.stderr
    assert "device, pinned" in result.stdout
