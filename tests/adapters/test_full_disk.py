"""A disk that is full, or may not be written: a refusal, no trace of it, and success later."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.factor_files import FactorFiles
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.errors import ConfigurationError, StorageError
from tests.adapters.disks import files_limited, fill, mounted, read_only
from tests.adapters.shelves import LAYOUT
from tests.adapters.store_model import (
    NAMES,
    Kind,
    Operation,
    StoreModel,
    files_in,
    problems_in,
)

CHANGES: tuple[Kind, ...] = ("publish", "publish_folder", "remove", "roll_back", "pin")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=4m", "none"):
        yield folder


def publish_two(store: AdapterStore, contents: list[Adapter]) -> None:
    for choice in (0, 1):
        Operation("publish", NAMES[0], choice).run(store, contents)


def assert_refuses_everything(
    store: AdapterStore, folder: Path, contents: list[Adapter], reason: str
) -> None:
    before = StoreModel.of(store)
    for kind in CHANGES:
        with pytest.raises(StorageError, match=reason) as caught:
            Operation(kind, NAMES[0], 3).run(store, contents)
        assert str(folder) not in caught.value.message
        assert "nothing was changed" in caught.value.message
    assert StoreModel.of(store) == before
    assert not list((folder / "incoming").iterdir())
    for adapter in contents[:2]:
        store.read(adapter.digest)


def assert_takes_everything(store: AdapterStore, folder: Path, contents: list[Adapter]) -> None:
    model = StoreModel.of(store)
    for kind in CHANGES:
        operation = Operation(kind, NAMES[0], 3)
        operation.run(store, contents)
        model = operation.after(model, contents)
        assert StoreModel.of(store) == model
    assert problems_in(folder) == []


@pytest.mark.parametrize("num_bytes", [100, 20_000])
def test_a_change_that_does_not_fit_is_refused_and_fits_later(
    num_bytes: int, tmp_path: Path, contents: list[Adapter]
) -> None:
    """100 bytes are too few for a file of factors, 20 000 for the registry only."""
    folder = tmp_path / "store"
    store = AdapterStore(folder, LAYOUT)
    publish_two(store, contents)
    files = files_in(folder)
    with files_limited(num_bytes):
        assert_refuses_everything(store, folder, contents, "File too large|disk I/O error")
    store.collect(())
    assert files_in(folder) == files
    store.close()
    store = AdapterStore(folder, LAYOUT)  # what was refused does not come back
    assert StoreModel.of(store).adapters[NAMES[0]].current == contents[1].digest
    assert_takes_everything(store, folder, contents)
    store.close()


def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(
    small_disk: Path, contents: list[Adapter]
) -> None:
    folder = small_disk / "store"
    store = AdapterStore(folder, LAYOUT)
    publish_two(store, contents)
    before, files = StoreModel.of(store), files_in(folder)
    ballast = fill(small_disk)
    message = "could not be written: No space left on device; nothing was changed"
    with pytest.raises(StorageError, match=message), store.scratch() as scratch:
        (scratch / "upload").write_bytes(bytes(100_000))
    with pytest.raises(StorageError, match=message):
        Operation("publish", NAMES[0], 2).run(store, contents)
    assert StoreModel.of(store) == before
    assert files_in(folder) == files
    assert not list((folder / "incoming").iterdir())
    ballast.unlink()
    assert_takes_everything(store, folder, contents)
    store.close()


def test_a_store_that_may_not_be_written_is_not_opened(
    tmp_path: Path, contents: list[Adapter]
) -> None:
    folder = tmp_path / "store"
    store = AdapterStore(folder, LAYOUT)
    publish_two(store, contents)
    before = StoreModel.of(store)
    store.close()
    with read_only(folder), pytest.raises(ConfigurationError) as caught:
        AdapterStore(folder, LAYOUT)
    assert repr(str(folder)) in caught.value.message
    assert "may be read and written" in caught.value.message
    store = AdapterStore(folder, LAYOUT)
    assert StoreModel.of(store) == before
    store.close()


def test_files_that_cannot_be_deleted_hide_no_refusal_and_go_at_the_next_start(
    tmp_path: Path, contents: list[Adapter]
) -> None:
    files = FactorFiles(tmp_path)
    files.clear_incoming()
    refusal = pytest.raises(StorageError, match="the registry's")
    with ExitStack() as disk, refusal, files.incoming(contents[0]):
        disk.enter_context(read_only(tmp_path / "incoming"))
        raise StorageError("the registry's")
    assert list((tmp_path / "incoming").iterdir())
    files.clear_incoming()
    assert not list((tmp_path / "incoming").iterdir())
