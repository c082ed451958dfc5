"""The command line of those who use a real server, and the files that they upload."""

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sharelora_serve.cli import app
from tests.e2e.server_process import ServerProcess


@dataclass
class Shop:
    """A server, and the command line of its admin."""

    server: ServerProcess
    store: Path
    admin_key: str
    tenant_key: str  # of acme

    def run(self, *arguments: str | Path, key: str | None = None, columns: int = 200) -> Result:
        environment = {"COLUMNS": str(columns), **self.environment(key)}
        return CliRunner().invoke(app, ["adapters", *map(str, arguments)], env=environment)

    def environment(self, key: str | None = None) -> dict[str, str]:
        key = self.admin_key if key is None else key
        return {"SHARELORA_URL": self.server.url, "SHARELORA_API_KEY": key}

    def json(self, *arguments: str | Path, key: str | None = None) -> Any:
        result = self.run(*arguments, "--json", key=key)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    def version(self, name: str) -> str:
        return str(self.json("show", name)["version"])


def commands(name: str, path: Path) -> list[tuple[str | Path, ...]]:
    """Every command that talks to a server."""
    return [
        ("list",),
        ("show", name),
        ("add", name, path),
        ("add", name, path, "--replace"),
        ("remove", name, "--yes"),
        ("pin", name),
        ("unpin", name),
        ("rollback", name),
    ]


def value(output: str, key: str) -> str:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{key}  "))
    return line.removeprefix(key).strip()


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    return result.stderr.removeprefix("Error: ").strip()


def single_file(folder: Path, path: Path) -> Path:
    """The adapter of a folder as one .safetensors file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = (folder / "adapter_config.json").read_text()
    save_file(tensors, path, metadata={"adapter_config": config})
    return path


def packed(folder: Path, path: Path, form: str) -> Path:
    if form == "safetensors":
        return single_file(folder, path.with_suffix(".safetensors"))
    if form == "zip":
        return Path(shutil.make_archive(str(path), "zip", folder.parent, folder.name))
    with tarfile.open(path.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(folder, folder.name)
    return path.with_suffix(".tar.gz")
