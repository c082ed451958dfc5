"""What the store refuses to open, what it heals, and what a failed change leaves."""

import dataclasses
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.database import VERSION
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.errors import ConfigurationError, StorageError
from tests.adapters.shelves import LAYOUT
from tests.adapters.store_model import (
    NAMES,
    Operation,
    StoreModel,
    files_in,
    problems_in,
)

RED = AdapterName(None, "red")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[AdapterStore]:
    opened = AdapterStore(folder, LAYOUT)
    yield opened
    opened.close()


def publish(
    store: AdapterStore, adapter: Adapter, name: AdapterName = RED, keep_versions: int = 3
) -> float:
    return store.publish(name, adapter, summarise(adapter), keep_versions=keep_versions)


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        AdapterStore(folder, LAYOUT)
    assert repr(str(folder)) in caught.value.message
    return caught.value.message


def test_two_contents_with_a_common_a_share_its_file(
    store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    publish(store, contents[0])
    publish(store, contents[1], AdapterName("acme", "red"))
    assert len(files_in(folder)) == 3  # the A, and the B's of either


def test_a_new_version_keeps_the_day_on_which_the_name_was_created(
    store: AdapterStore, contents: list[Adapter]
) -> None:
    created_at = publish(store, contents[0])
    assert publish(store, contents[1]) == created_at
    (stored,) = store.adapters()
    assert stored.created_at == created_at
    assert stored.summary == summarise(contents[1])
    assert stored.digest == contents[1].digest


def test_a_store_that_is_open_is_refused_and_stays_open(
    store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    with store.scratch() as scratch:
        (scratch / "upload").write_bytes(b"half an upload")
        assert "another server has it open" in refusal(folder)
        assert (scratch / "upload").exists()
    publish(store, contents[0])
    assert "another server has it open" in refusal(folder)


def test_a_store_that_another_thread_closed_can_be_opened(folder: Path) -> None:
    store = AdapterStore(folder, LAYOUT)
    closing = Thread(target=store.close)
    closing.start()
    closing.join()
    AdapterStore(folder, LAYOUT).close()


@pytest.mark.parametrize("change", ["name", "num_layers", "shapes"])
def test_a_store_of_another_base_is_refused_and_left_as_it_is(
    change: str, folder: Path, contents: list[Adapter]
) -> None:
    changes = {"name": "other", "num_layers": 5, "shapes": {"self_attn.q_proj": (8, 8)}}
    other = AdapterStore(folder, dataclasses.replace(LAYOUT, **{change: changes[change]}))
    publish(other, contents[0])
    before = StoreModel.of(other)
    other.close()
    assert "holds adapters of base" in refusal(folder)
    again = AdapterStore(folder, dataclasses.replace(LAYOUT, **{change: changes[change]}))
    assert StoreModel.of(again) == before
    again.close()


def test_a_store_of_a_newer_version_is_refused(folder: Path) -> None:
    AdapterStore(folder, LAYOUT).close()
    database = sqlite3.connect(folder / "registry.sqlite3")
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.close()
    assert "newer version of this server" in refusal(folder)


def test_a_store_of_version_1_is_migrated_and_loses_nothing(
    folder: Path, contents: list[Adapter]
) -> None:
    store = AdapterStore(folder, LAYOUT)
    for choice, name in enumerate(NAMES):
        Operation("publish_folder", name, choice).run(store, contents)
    store.roll_back(NAMES[0], contents[0].digest)
    before = StoreModel.of(store)
    store.close()
    with closing(sqlite3.connect(folder / "registry.sqlite3")) as database:
        database.executescript(
            "CREATE TABLE old (name TEXT PRIMARY KEY, fingerprint TEXT NOT NULL) WITHOUT ROWID;"
            "INSERT INTO old SELECT name, fingerprint FROM folders;"
            "DROP TABLE folders; ALTER TABLE old RENAME TO folders; PRAGMA user_version = 1"
        )
    for _ in range(2):
        store = AdapterStore(folder, LAYOUT)
        assert StoreModel.of(store) == before
        store.collect(())
        store.close()
    assert problems_in(folder) == []
    store = AdapterStore(folder, LAYOUT)
    red, adapter = NAMES[0], contents[0]
    assert not store.renew_folder(red.name, adapter, summarise(adapter), "new")  # not known then
    Operation("publish_folder", red, 0).run(store, contents)
    assert store.renew_folder(red.name, adapter, summarise(adapter), "new")
    assert store.folders()[red.name] == "new"
    store.close()


def test_a_file_where_the_store_should_be_is_refused(folder: Path) -> None:
    folder.write_text("a file")
    assert "should be a folder" in refusal(folder)
    assert folder.read_text() == "a file"


def test_a_registry_that_is_no_database_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "registry.sqlite3").write_bytes(b"not a database " * 1000)
    assert "cannot be opened" in refusal(folder)


def test_a_database_of_something_else_is_refused_every_time(folder: Path) -> None:
    folder.mkdir()
    database = sqlite3.connect(folder / "registry.sqlite3")
    database.execute("CREATE TABLE adapters (of_somebody_else TEXT)")
    database.close()
    for _ in range(2):
        assert "cannot be opened" in refusal(folder)


def test_what_a_killed_process_left_half_written_is_gone(
    folder: Path, contents: list[Adapter]
) -> None:
    store = AdapterStore(folder, LAYOUT)
    publish(store, contents[0])
    store.close()
    (folder / "incoming" / "file").write_bytes(b"half")
    (folder / "incoming" / "upload").mkdir()
    (folder / "incoming" / "upload" / "adapter.zip").write_bytes(b"half")
    (folder / "factors" / ("0" * 64)).write_bytes(b"moved in without a row")
    store = AdapterStore(folder, LAYOUT)
    assert not list((folder / "incoming").iterdir())
    assert store.collect(()) == (1, len(b"moved in without a row"), 0)
    assert problems_in(folder) == []
    store.close()


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped", "removed", "empty"])
def test_a_damaged_file_is_found_and_publishing_a_good_copy_heals_it(
    damage: str, store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    adapter = contents[0]
    publish(store, adapter)
    largest, other = sorted((folder / "factors").iterdir(), key=lambda path: -path.stat().st_size)
    content = largest.read_bytes()
    match damage:
        case "cut":
            largest.write_bytes(content[: len(content) // 2])
        case "flipped":
            largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "swapped":  # for one that is whole and has fewer rows
            shutil.copy(other, largest)
        case "removed":
            largest.unlink()
        case "empty":
            largest.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        store.read(adapter.digest)
    assert str(folder) not in caught.value.message
    problems = problems_in(folder)
    assert any("version of: red" in problem for problem in problems), problems
    publish(store, adapter, AdapterName("acme", "red"))
    assert store.read(adapter.digest).digest == adapter.digest
    assert problems_in(folder) == []


def test_a_change_that_the_disk_refuses_changes_nothing_and_works_later(
    folder: Path, store: AdapterStore, contents: list[Adapter]
) -> None:
    publish(store, contents[0])
    before, files = StoreModel.of(store), files_in(folder)
    shutil.rmtree(folder / "incoming")
    with pytest.raises(StorageError, match="could not be written: No such file") as caught:
        publish(store, contents[2])
    assert str(folder) not in caught.value.message
    with pytest.raises(StorageError), store.scratch():
        pass
    assert StoreModel.of(store) == before
    assert files_in(folder) == files
    (folder / "incoming").mkdir()
    publish(store, contents[2])
    assert problems_in(folder) == []


def test_a_store_that_is_closed_refuses_every_call_by_saying_so(
    store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    publish(store, contents[0])
    store.close()
    for call in (
        lambda: publish(store, contents[2]),
        lambda: store.remove(RED),
        lambda: store.collect(()),
        lambda: store.read(contents[0].digest),
        store.adapters,
    ):
        with pytest.raises(StorageError, match="the server is stopping"):
            call()
    assert not list((folder / "incoming").iterdir())


def test_a_reader_that_stays_in_the_registry_holds_up_no_change(
    folder: Path, store: AdapterStore, contents: list[Adapter]
) -> None:
    publish(store, contents[0])
    reader = sqlite3.connect(f"{(folder / 'registry.sqlite3').as_uri()}?mode=ro", uri=True)
    reading = reader.execute("SELECT file FROM content_files")
    reading.fetchone()  # and is not finished: it sees the store as it is now
    for content in contents:
        publish(store, content, keep_versions=1)
    store.collect(())
    assert len(reading.fetchall()) == 1
    reader.close()
    assert problems_in(folder) == []


def test_a_store_that_was_deleted_under_the_server_takes_no_change(
    store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    """SQLite alone would write to the deleted file and say that all is well."""
    publish(store, contents[0])
    shutil.rmtree(folder)
    for is_replaced in (False, True):
        if is_replaced:
            folder.mkdir()
            sqlite3.connect(folder / "registry.sqlite3").close()
        for change in (
            lambda: store.remove(RED),
            lambda: store.set_pinned(RED, True),
            lambda: store.roll_back(RED, contents[0].digest),
            lambda: publish(store, contents[2]),
            lambda: store.collect(()),
        ):
            with pytest.raises(StorageError, match="nothing was changed"):
                change()


def test_a_collection_overwrites_what_a_failed_commit_left_in_the_log(
    store: AdapterStore, folder: Path
) -> None:
    """With nothing to delete it writes all the same; every write does away with the rest."""
    reader = sqlite3.connect(folder / "registry.sqlite3")
    before = reader.execute("PRAGMA data_version").fetchone()
    store.collect(())
    assert reader.execute("PRAGMA data_version").fetchone() != before
    reader.close()


def test_what_is_no_file_of_factors_holds_up_no_collection(
    store: AdapterStore, folder: Path, contents: list[Adapter]
) -> None:
    (folder / "factors" / "lost+found").mkdir()
    publish(store, contents[0])
    store.remove(RED)
    assert store.collect(())[0] == 2
    assert [path.name for path in (folder / "factors").iterdir()] == ["lost+found"]
    assert problems_in(folder) == []


def test_a_folder_that_is_gone_takes_its_own_adapter_along_and_no_other(
    store: AdapterStore, contents: list[Adapter]
) -> None:
    for choice, name in enumerate(NAMES):
        Operation("publish_folder" if choice == 0 else "publish", name, choice).run(store, contents)
    store.forget_folder(NAMES[0].name)
    assert [stored.name for stored in store.adapters()] == sorted(
        NAMES[1:], key=lambda name: (name.owner, name.name)
    )
    assert store.folders() == {}
    publish(store, contents[0], NAMES[0])  # uploaded, not from a folder
    store.forget_folder(NAMES[0].name)
    assert len(store.adapters()) == len(NAMES)


def test_a_registry_without_a_store_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no store in that folder"):
        problems_in(tmp_path)


def test_a_registry_that_is_damaged_is_told_by_verify(
    folder: Path, contents: list[Adapter]
) -> None:
    store = AdapterStore(folder, LAYOUT)
    for content in contents:
        publish(store, content)
    store.close()
    path = folder / "registry.sqlite3"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    problems = problems_in(folder)
    assert any(problem.startswith("registry: ") for problem in problems), problems
    path.write_bytes(b"\xff" * len(content))
    assert any(problem.startswith("registry: ") for problem in problems_in(folder))
