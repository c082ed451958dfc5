"""The command adapters verify, on real stores."""

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.cli import app
from tests.adapters.samples import LAYOUT, random_adapter


@pytest.fixture
def store(tmp_path: Path, seed: int) -> Path:
    """A closed store of two adapters, one of them of a tenant with two versions."""
    publish(tmp_path / "store", seed)
    return tmp_path / "store"


def publish(folder: Path, seed: int) -> None:
    store = AdapterStore(folder, LAYOUT)
    acme, bolt = AdapterName(None, "acme"), AdapterName("bolt", "x")
    for number, (name, share) in enumerate(((acme, "A"), (bolt, ""), (bolt, "B"))):
        adapter = random_adapter(seed + number, share, modules=("self_attn.q_proj",))
        store.publish(name, adapter, summarise(adapter), keep_versions=10)
    store.close()


def verify(store: Path) -> Result:
    arguments = ["adapters", "verify", "--store", str(store)]
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})


def problems(store: Path) -> list[str]:
    result = verify(store)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stderr == ""
    return result.stdout.splitlines()


def contents(store: Path) -> dict[str, bytes]:
    """Of every file but those that SQLite keeps beside its database while it is read."""
    files = (path for path in store.rglob("*") if path.is_file())
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in files
        if path.suffix not in (".sqlite3-wal", ".sqlite3-shm")
    }


def test_a_whole_store_is_one_line_and_is_left_as_it_is(store: Path) -> None:
    before = contents(store)
    result = verify(store)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert str(store) in line
    assert "3 versions" in line
    assert contents(store) == before


def test_a_store_that_a_server_has_open_is_verified_too(store: Path) -> None:
    opened = AdapterStore(store, LAYOUT)
    assert verify(store).exit_code == 0
    adapter = random_adapter(1, "AB")
    opened.publish(AdapterName(None, "new"), adapter, summarise(adapter), keep_versions=1)
    assert "4 versions" in verify(store).stdout
    opened.close()


def test_any_changed_byte_of_any_factor_file_is_found(store: Path, seed: int) -> None:
    chooser = random.Random(seed)
    for path in sorted((store / "factors").iterdir()):
        content = path.read_bytes()
        header_bytes = 8 + int.from_bytes(content[:8], "little")
        positions = {chooser.randrange(len(content)), chooser.randrange(header_bytes)}
        for position in positions:
            changed = bytearray(content)
            changed[position] ^= 1 << chooser.randrange(8)
            path.write_bytes(changed)
            found = problems(store)
            assert any(f"factors/{path.name}: holds bytes of another" in line for line in found)
            assert all("version of: " in line for line in found[:-1])
            path.write_bytes(content)
    assert verify(store).exit_code == 0


def test_a_damaged_version_is_named_with_its_adapters(store: Path) -> None:
    (store / "factors").joinpath(sole_file(store, "bolt")).write_bytes(b"")
    found = problems(store)
    assert len(found) == 2
    assert found[0].startswith("version ")
    assert "is damaged on disk" in found[0]
    assert found[0].endswith("(version of: bolt/x)")


def test_what_is_published_again_from_a_good_copy_is_whole(store: Path, seed: int) -> None:
    for file in (store / "factors").iterdir():
        file.write_bytes(b"damaged")
    with closing(sqlite3.connect(store / "registry.sqlite3")) as database, database:
        database.execute("UPDATE contents SET manifest = '{}'")
    assert problems(store)
    publish(store, seed)
    assert verify(store).exit_code == 0


def test_a_missing_file_is_found(store: Path) -> None:
    file = sole_file(store, "")
    (store / "factors" / file).unlink()
    (problem,) = problems(store)
    assert problem.startswith(f"factors/{file} of version ")
    assert problem.endswith("No such file or directory (version of: acme)")
    shutil.rmtree(store / "factors")
    assert len(problems(store)) == 3


def sole_file(store: Path, owner: str) -> str:
    """A file that one version of the owner's adapter needs."""
    with closing(sqlite3.connect(store / "registry.sqlite3")) as database:
        row = database.execute(
            "SELECT file FROM content_files JOIN versions USING (digest) "
            "JOIN adapters ON id = adapter WHERE owner = ?",
            (owner,),
        ).fetchone()
    return str(row[0])


def test_a_registry_that_is_no_database_is_found(store: Path) -> None:
    (store / "registry.sqlite3").write_bytes(b"no database, but long enough for one" * 40)
    (problem,) = problems(store)
    assert problem == "registry: file is not a database"


def test_a_damaged_registry_never_ends_in_a_traceback(store: Path, seed: int) -> None:
    chooser = random.Random(seed)
    content = (store / "registry.sqlite3").read_bytes()
    for _ in range(40):
        changed = bytearray(content)
        for _ in range(30):  # not all of which are found: SQLite has no checksums
            changed[chooser.randrange(len(changed))] = chooser.randrange(256)
        (store / "registry.sqlite3").write_bytes(changed)
        assert verify(store).exception is None or problems(store)
        del changed[chooser.randrange(len(changed) // 2) :]
        (store / "registry.sqlite3").write_bytes(changed)
        assert problems(store)


def test_a_manifest_that_is_none_is_found(store: Path) -> None:
    for manifest in (
        "{}",
        "[]",
        "no JSON",
        '{"files": 1, "factors": 2, "entries": 3, "config": 4}',
    ):
        with closing(sqlite3.connect(store / "registry.sqlite3")) as database, database:
            database.execute("UPDATE contents SET manifest = ?", (manifest,))
        found = problems(store)
        assert len(found) == 3
        assert all("damaged" in line for line in found)


def test_a_folder_without_a_store_is_one_message(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        result = verify(folder)
        assert result.exit_code == 2
        assert "there is no store in that folder" in result.stderr


def test_without_a_folder_the_store_of_the_base_is_meant(store: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "sharelora-serve").mkdir(parents=True)
    store.rename(tmp_path / "data" / "sharelora-serve" / "llama")
    result = CliRunner().invoke(
        app,
        ["adapters", "verify", "--model", "meta/llama"],
        env={"XDG_DATA_HOME": str(tmp_path / "data"), "SHARELORA_STORE": None},
    )
    assert result.exit_code == 0, result.output
    assert "llama" in result.stdout
