"""The registry and the watched folder when the disk fails, or a process ends in between."""

import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.folder import AdapterFolder
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.errors import AdapterExistsError, StorageError
from tests.adapters.disks import files_limited
from tests.adapters.shelves import LAYOUT, wait_until
from tests.adapters.store_model import write_contents

RED = AdapterName(None, "red")
NO_REGISTRY_BYTES = 20_000  # files of factors fit, the registry's log does not


@contextmanager
def opened(folder: Path, pool_bytes: int = 1 << 20) -> Iterator[AdapterRegistry]:
    """A registry on the store in `folder`."""
    store = AdapterStore(folder, LAYOUT)
    pool = MatrixPool(pool_bytes, LAYOUT.feature_counts, torch.float32, "cpu")
    cache = AdapterCache(
        LAYOUT, pool, 1 << 20, lambda version: store.read(version.digest), on_change=lambda: None
    )
    registry = AdapterRegistry(LAYOUT, store, pool, cache, keep_versions=3)
    try:
        yield registry
    finally:
        registry.close()
        cache.close()
        store.close()


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Folders of CONTENTS."""
    return write_contents(tmp_path / "contents")


def names(registry: AdapterRegistry) -> list[str]:
    return sorted(published.name.text for published in registry.adapters())


def test_files_of_a_publication_that_was_refused_are_collected(
    tmp_path: Path, paths: list[Path]
) -> None:
    factors = tmp_path / "store" / "factors"
    with opened(tmp_path / "store") as registry:
        registry.publish(RED, paths[0])
        time.sleep(2.5)  # the collection after the publication has been
        before = set(factors.iterdir())
        with files_limited(NO_REGISTRY_BYTES), pytest.raises(StorageError):
            registry.publish(RED, paths[3])
        assert set(factors.iterdir()) > before
        wait_until(lambda: set(factors.iterdir()) == before)


def test_a_folder_that_goes_while_the_disk_is_full_does_not_end_the_watching(
    tmp_path: Path, paths: list[Path]
) -> None:
    watched = tmp_path / "watched"
    shutil.copytree(paths[0], watched / "red")
    with opened(tmp_path / "store") as registry:
        folder = AdapterFolder(watched, registry)
        folder.publish_all()
        folder.start()
        shutil.rmtree(watched / "red")
        with files_limited(NO_REGISTRY_BYTES):
            time.sleep(2.5)
        assert names(registry) == ["red"]
        shutil.copytree(paths[1], watched / "blue")
        wait_until(lambda: names(registry) == ["blue", "red"])
        folder.close()
    with opened(tmp_path / "store") as registry:
        AdapterFolder(watched, registry).publish_all()
        assert names(registry) == ["blue"]


def test_a_link_to_itself_in_one_folder_keeps_no_other_from_being_served(
    tmp_path: Path, paths: list[Path]
) -> None:
    watched = tmp_path / "watched"
    for path, name in zip(paths, ("blue", "red"), strict=False):
        shutil.copytree(path, watched / name)
    (watched / "blue" / "loop").symlink_to("loop")
    with opened(tmp_path / "store") as registry:
        AdapterFolder(watched, registry).publish_all()
        assert names(registry) == ["blue", "red"]


def test_a_folder_does_not_take_a_name_that_was_uploaded_while_it_was_read(
    tmp_path: Path, paths: list[Path]
) -> None:
    with opened(tmp_path / "store") as registry, ThreadPoolExecutor() as pool:
        blocker = sqlite3.connect(tmp_path / "store" / "registry.sqlite3", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        uploaded = pool.submit(registry.publish, RED, paths[0])
        time.sleep(0.2)
        from_folder = pool.submit(registry.publish_folder, "red", paths[1], "a fingerprint")
        time.sleep(0.2)
        blocker.execute("ROLLBACK")
        blocker.close()
        assert not uploaded.result().is_from_folder
        with pytest.raises(AdapterExistsError, match="was uploaded already"):
            from_folder.result()
        assert registry.find(RED) == uploaded.result()
        assert registry.folders() == {}


def test_an_adapter_that_was_unpinned_while_it_had_no_room_stays_unpinned(
    tmp_path: Path, paths: list[Path]
) -> None:
    with opened(tmp_path / "store") as registry:
        registry.publish(RED, paths[3])
        registry.set_pinned(RED, True)
    with opened(tmp_path / "store", pool_bytes=6 * 1024) as registry:
        assert not registry.find(RED).is_pinned  # there is no room to pin it again
        registry.set_pinned(RED, False)
    with opened(tmp_path / "store") as registry:
        assert not registry.find(RED).is_pinned
