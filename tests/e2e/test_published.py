"""The commands that talk to a running server, against a real one that asks for API keys."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
from typer.testing import CliRunner

from sharelora_serve.cli import app
from sharelora_serve.server.keys import create_key
from tests.cli.http_server import scripted_server
from tests.e2e.adapter_folders import write_adapters
from tests.e2e.command_line import Shop, commands, packed, refusal, value
from tests.e2e.server_process import running_server


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    _, admin_key = create_key(folder / "keys.jsonl", None, None)
    _, tenant_key = create_key(folder / "keys.jsonl", "acme", None)
    settings = {
        "--model": str(model_folder),
        "--api-keys": str(folder / "keys.jsonl"),
        "--dtype": "float32",
        "--threads": "1",
        "--max-adapter-bytes": "16MiB",
    }
    words = (word for pair in settings.items() for word in pair)
    with running_server(folder / "log", *words) as server:
        yield Shop(server, folder / "store", admin_key, tenant_key)


@pytest.fixture
def folders(tmp_path: Path, model_folder: Path, seed: int) -> list[Path]:
    """Three adapters, which are other ones than those of any other test."""
    folder = write_adapters(tmp_path / "adapters", model_folder, seed + crc32(bytes(tmp_path)))
    return sorted(folder.iterdir())


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name).replace("[", "-").replace("]", "")[-100:].lstrip("_-.")


def test_an_added_adapter_is_told_and_answers_the_line_that_is_printed(
    shop: Shop, folders: list[Path], name: str
) -> None:
    result = shop.run("add", name, folders[0])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    assert value(result.stdout, "adapter") == name
    assert value(result.stdout, "version") == shop.version(name)
    assert value(result.stdout, "sharing") == "ShareA"
    assert value(result.stdout, "rank") == "8"
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"curl {shop.server.url}/v1/chat/completions ")
    assert shop.admin_key not in result.output
    answer = subprocess.run(
        line,
        shell=True,
        env={**os.environ, **shop.environment()},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(answer.stdout)["model"] == name


@pytest.mark.parametrize("form", ["safetensors", "zip", "tar.gz"])
def test_a_folder_and_a_file_of_it_are_the_same_version(
    form: str, shop: Shop, folders: list[Path], tmp_path: Path, name: str
) -> None:
    for index, folder in enumerate(folders):
        assert shop.run("add", f"{name}-{index}", folder).exit_code == 0
        path = packed(folder, tmp_path / f"packed-{index}", form)
        result = shop.run("add", f"{name}-{index}-packed", path)
        assert result.exit_code == 0, result.stderr
        assert value(result.stdout, "version") == shop.version(f"{name}-{index}")


def test_a_bar_on_a_terminal_shows_how_much_was_sent(
    shop: Shop, folders: list[Path], name: str
) -> None:
    terminal, child = pty.openpty()
    finished = subprocess.run(
        [sys.executable, "-m", "sharelora_serve.cli", "adapters", "add", name, str(folders[0])],
        stdout=subprocess.PIPE,
        stderr=child,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm", **shop.environment()},
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=True,
    )
    os.close(child)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert f"Uploading {folders[0].name}.zip" in shown
    assert "KiB" in shown
    assert "Uploading" not in finished.stdout.decode()


def test_of_a_folder_only_the_adapter_is_sent(
    shop: Shop, folders: list[Path], tmp_path: Path, name: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folders[0], checkpoint / "default")  # as PEFT names its folder
    os.utime(checkpoint / "default" / "adapter_model.safetensors", (0, 0))
    with (checkpoint / "optimizer.pt").open("wb") as file:
        file.truncate(1024**3)
    for index in range(300):
        (checkpoint / f"log-{index}").touch()
    result = shop.run("add", name, checkpoint)
    assert result.exit_code == 0, result.stderr
    assert shop.run("add", name, folders[0], "--replace").exit_code == 0
    assert len(shop.json("show", name)["versions"]) == 1


def test_replace_publishes_whatever_is_there_and_if_version_only_over_that_one(
    shop: Shop, folders: list[Path], name: str
) -> None:
    first, second, third = folders
    assert "--replace" in refusal(shop.run("add", name, first, "--if-version", "0" * 64))
    assert shop.run("add", name, first, "--replace").exit_code == 0
    was = shop.version(name)
    assert shop.run("add", name, second, "--replace", "--if-version", was).exit_code == 0
    now = shop.version(name)
    message = refusal(shop.run("add", name, third, "--replace", "--if-version", was))
    assert f"is not at version {was}: it is at {now}" in message
    assert shop.version(name) == now
    assert "no whole version" in refusal(
        shop.run("add", name, third, "--replace", "--if-version", now[:12])
    )
    absent = refusal(shop.run("add", f"{name}-2", third, "--replace", "--if-version", now))
    assert "there is none" in absent


def test_a_name_that_is_taken_is_refused_before_anything_is_sent(
    shop: Shop, folders: list[Path], name: str
) -> None:
    assert shop.run("add", name, folders[0]).exit_code == 0
    was = shop.version(name)
    message = refusal(shop.run("add", name, folders[1]))
    assert f"there is an adapter '{name}' already" in message
    assert "--replace" in message
    assert shop.version(name) == was


def test_an_adapter_that_cannot_be_served_is_refused_with_the_servers_reasons(
    shop: Shop, folders: list[Path], tmp_path: Path, name: str
) -> None:
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    (folders[0] / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    message = refusal(shop.run("add", name, folders[0]))
    assert f"adapter '{name}' cannot be served" in message
    assert "use_dora" in message
    (folders[1] / "adapter_model.safetensors").rename(folders[1] / "adapter_model.bin")
    assert "holds the pickle adapter_model.bin" in refusal(shop.run("add", name, folders[1]))
    (tmp_path / "note.txt").write_text("no adapter")
    assert "neither a whole .safetensors file" in refusal(
        shop.run("add", name, tmp_path / "note.txt")
    )
    with (tmp_path / "large.zip").open("wb") as file:
        file.truncate(40 * 1024**2)
    assert "--max-adapter-bytes" in refusal(shop.run("add", name, tmp_path / "large.zip"))
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refusal(shop.run("add", name, tmp_path / "empty"))
    result = shop.run("add", name, tmp_path / "absent")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert "there is no adapter" in refusal(shop.run("show", name))


def test_without_a_server_or_with_a_wrong_key_every_command_says_so(
    shop: Shop, folders: list[Path], name: str
) -> None:
    with scripted_server() as gone:
        url = gone.url
    for command in commands(name, folders[0]):
        message = refusal(shop.run(*command, "--url", url))
        assert f"no answer from {url}/v1/adapters" in message
        assert "is a server running there?" in message
        for key in ("", "two words"):
            assert "the API key is empty, or has blanks" in refusal(
                shop.run(*command, "--api-key", key)
            )
        for bad_url in (
            "localhost:8000",
            "http://",
            "http://127.0.0.1:no",
            "http://127.0.0.1:99999",
        ):
            assert "is not the address of a server" in refusal(shop.run(*command, "--url", bad_url))
        unknown = refusal(shop.run(*command, key="slk_0000_" + "0" * 43))
        assert "API key" in unknown
        assert "0" * 43 not in unknown


def test_without_a_key_every_command_says_so(shop: Shop, folders: list[Path], name: str) -> None:
    for command in commands(name, folders[0]):
        result = CliRunner().invoke(
            app,
            ["adapters", *map(str, command), "--url", shop.server.url],
            env={"SHARELORA_API_KEY": None},
        )
        assert "API key" in refusal(result)


def test_a_server_of_another_kind_is_one_message(folders: list[Path], name: str) -> None:
    for command in commands(name, folders[0]):
        if command[0] == "remove":  # the other server has no DELETE at all
            continue
        with scripted_server((200, "<html>")) as other:
            result = CliRunner().invoke(
                app, ["adapters", *map(str, command), "--url", other.url], env={"COLUMNS": "200"}
            )
        assert "is another server running there?" in refusal(result)


def test_names_that_no_adapter_can_have_reach_no_other_route(
    shop: Shop, folders: list[Path]
) -> None:
    for bad in ("..", "../models", "a/b/c", "", "a?b"):
        for command in commands(bad, folders[0])[1:]:
            assert "is not the name of an adapter" in refusal(shop.run(*command))


def test_an_unknown_adapter_is_one_message(shop: Shop, folders: list[Path], name: str) -> None:
    for command in commands(name, folders[0]):
        if command[0] not in ("list", "add"):
            assert f"there is no adapter '{name}'" in refusal(shop.run(*command))


def test_rollback_serves_an_earlier_version_again_and_refuses_an_unknown_one(
    shop: Shop, folders: list[Path], name: str
) -> None:
    versions = []
    for folder in folders:
        assert shop.run("add", name, folder, "--replace").exit_code == 0
        versions.append(shop.version(name))
    result = shop.run("rollback", name)
    assert result.exit_code == 0, result.stderr
    assert value(result.stdout, "version") == versions[1] == shop.version(name)
    assert shop.run("rollback", name, versions[2][:8]).exit_code == 0
    assert shop.version(name) == versions[2]
    assert shop.run("rollback", name, versions[0]).exit_code == 0
    assert "no version before the present one" in refusal(shop.run("rollback", name))
    unknown = refusal(shop.run("rollback", name, "0" * 12))
    assert all(version[:12] in unknown for version in versions)
    assert shop.version(name) == versions[0]
    shown = shop.run("show", name).stdout
    assert value(shown, "versions") == versions[2]
    assert f"{versions[0]}  current" in shown
    assert "none" not in shown


def test_a_pinned_adapter_is_on_the_device_and_shown_so(
    shop: Shop, folders: list[Path], name: str
) -> None:
    assert shop.run("add", name, folders[0]).exit_code == 0
    result = shop.run("pin", name)
    assert result.exit_code == 0, result.stderr
    assert "pinned" in value(result.stdout, "where")
    assert shop.json("show", name)["pinned"] is True
    assert "pinned" not in value(shop.run("unpin", name).stdout, "where")
    assert shop.json("show", name)["pinned"] is False


def test_remove_asks_on_a_terminal_and_needs_yes_elsewhere(
    shop: Shop, folders: list[Path], name: str
) -> None:
    assert shop.run("add", name, folders[0]).exit_code == 0
    assert "give --yes" in refusal(shop.run("remove", name))
    for answer, is_there in ((b"n\n", True), (b"y\n", False)):
        terminal, child = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "sharelora_serve.cli", "adapters", "remove", name],
            stdin=child,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **shop.environment()},
            cwd=Path(__file__).parents[2],
        )
        os.close(child)
        os.write(terminal, answer)
        output, question = process.communicate(timeout=60)
        os.close(terminal)
        assert f"Remove {name} and all its versions".encode() in question
        assert output.decode().strip() == ("" if is_there else f"Removed {name}.")
        assert (process.returncode == 0) == (not is_there)
        assert (shop.run("show", name).exit_code == 0) == is_there
    assert shop.run("add", name, folders[0]).exit_code == 0
    assert shop.run("remove", name, "--yes").exit_code == 0
    assert shop.run("show", name).exit_code == 2


def test_a_tenants_adapters_are_its_own_and_an_admins_by_its_name(
    shop: Shop, folders: list[Path], name: str
) -> None:
    assert shop.run("add", name, folders[0], key=shop.tenant_key).exit_code == 0
    own = shop.json("show", name, key=shop.tenant_key)
    assert own["owner"] == "acme"
    assert shop.json("show", f"acme/{name}")["version"] == own["version"]
    assert "there is no adapter" in refusal(shop.run("show", name))
    assert "admin" in refusal(shop.run("pin", name, key=shop.tenant_key))
    assert shop.run("add", f"acme/{name}", folders[1], "--replace").exit_code == 0
    assert shop.json("show", name, key=shop.tenant_key)["version"] != own["version"]
    assert shop.run("remove", f"acme/{name}", "--yes").exit_code == 0
    public = f"{name}-public"
    assert shop.run("add", public, folders[0]).exit_code == 0
    for command in (("remove", public, "--yes"), ("add", public, folders[1], "--replace")):
        assert "only an admin may change it" in refusal(shop.run(*command, key=shop.tenant_key))


def test_list_fits_a_terminal_of_80_columns_and_tells_all_in_json(
    shop: Shop, folders: list[Path]
) -> None:
    names = ["n" * 128, "short", "acme/" + "m" * 60]
    for name, folder in zip(names, folders, strict=True):
        assert shop.run("add", name, folder).exit_code == 0
    output = shop.run("list", columns=80).stdout
    assert max(map(len, output.splitlines())) <= 80
    listed = {adapter["name"]: adapter for adapter in shop.json("list")}
    assert set(names) <= set(listed)
    for name in names:
        assert listed[name]["version"] == shop.version(name)
        assert listed[name]["version"][:12] in output
    assert output.replace("\n", "").replace(" ", "").count("n" * 20) >= 1
    (row,) = (line for line in output.splitlines() if line.strip().startswith("short"))
    assert "LoRA" in row
    tenant = shop.json("list", key=shop.tenant_key)
    assert "m" * 60 in {adapter["name"] for adapter in tenant}


def test_verify_checks_the_store_of_a_running_server(
    shop: Shop, folders: list[Path], name: str
) -> None:
    assert shop.run("add", name, folders[0]).exit_code == 0
    result = shop.run("verify", "--store", shop.store)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{shop.store}: ")
    before = set((shop.store / "factors").iterdir())
    assert shop.run("add", name, folders[1], "--replace").exit_code == 0
    file = max(set((shop.store / "factors").iterdir()) - before)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = shop.run("verify", "--store", shop.store)
    assert result.exit_code == 1
    assert f"(version of: {name})" in result.stdout
    assert f"factors/{file.name}: holds bytes of another digest" in result.stdout
    file.write_bytes(content)
    assert shop.run("verify", "--store", shop.store).exit_code == 0
