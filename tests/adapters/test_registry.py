"""What names stand for, while requests are bound to versions, and after a restart."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
import torch

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.naming import AdapterName, check_name
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.adapters.published import Published
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.adapters.store import AdapterStore
from sharelora_serve.adapters.verify import verify_store
from sharelora_serve.errors import (
    AdapterExistsError,
    AdapterInvalidError,
    InvalidRequestError,
    ModelNotFoundError,
    PinsFullError,
    VersionMismatchError,
)
from tests.adapters.shelves import LAYOUT, PATIENCE_SECONDS, Content, wait_until, write_content

ONE, TWO, THREE = (Content(seed, rank=8) for seed in range(1, 4))
ACME = AdapterName(None, "acme")
KEEP_VERSIONS = 3


class Office:
    """A registry over a store in a folder, as a server has it, and how to publish contents."""

    def __init__(self, folder: Path, pool_bytes: int, host_bytes: int) -> None:
        self.folder = folder
        self.store = AdapterStore(folder / "store", LAYOUT)
        self.pool = MatrixPool(pool_bytes, LAYOUT.feature_counts, torch.float32, "cpu")
        self.changed = Event()
        self.cache = AdapterCache(
            LAYOUT,
            self.pool,
            host_bytes,
            lambda version: self.store.read(version.digest),
            on_change=self.changed.set,
        )
        self.registry = AdapterRegistry(
            LAYOUT, self.store, self.pool, self.cache, keep_versions=KEEP_VERSIONS
        )

    def publish(self, name: AdapterName, content: Content, **conditions: object) -> Published:
        path = self.folder / f"{content.seed}-{content.rank}"
        if not path.exists():
            write_content(path, content)
        return self.registry.publish(name, path, **conditions)  # type: ignore[arg-type]

    def load(self, version: AdapterVersion) -> PageTable:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not isinstance(table := self.cache.acquire(version), PageTable):
            assert time.monotonic() < deadline, "it is never loaded"
            self.changed.wait(0.01)
            self.changed.clear()
        return table

    def wait_for_loads(self) -> None:
        wait_until(lambda: self.cache.stats().loads_in_progress == 0)

    def files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "store" / "factors").iterdir())

    def wait_for_collection(self, num_files: int) -> None:
        wait_until(lambda: len(self.files()) == num_files)

    def close(self) -> None:
        self.registry.close()
        self.cache.close()
        self.store.close()
        self.pool.check_integrity()


@contextmanager
def opened(folder: Path, pool_bytes: int = 1 << 16, host_bytes: int = 1 << 20) -> Iterator[Office]:
    office = Office(folder, pool_bytes, host_bytes)
    try:
        yield office
    finally:
        office.close()


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    with opened(tmp_path) as office:
        yield office


def test_request_is_bound_to_one_version_and_the_next_one_gets_the_new(office: Office) -> None:
    old = office.publish(ACME, ONE).version
    assert office.registry.bind(ACME) == old
    new = office.publish(ACME, TWO).version
    assert office.registry.bind(ACME) == new != old
    assert office.load(old) is not office.load(new)
    for version in (old, new):
        office.cache.release(version)
        office.registry.unbind(version)


def test_bound_version_can_be_read_from_disk_although_its_name_is_gone(tmp_path: Path) -> None:
    with opened(tmp_path, host_bytes=1) as office:
        office.publish(ACME, ONE)
        version = office.registry.bind(ACME)
        num_files = len(office.files())
        office.registry.remove(ACME)
        office.publish(AdapterName(None, "other"), TWO)
        time.sleep(3.0)  # for the collector to have had its chance
        office.load(version)
        office.cache.release(version)
        assert len(office.files()) == 2 * num_files
        office.registry.unbind(version)
        office.wait_for_collection(num_files)


def test_name_that_was_removed_is_unknown_and_one_made_later_is_a_new_thing(
    office: Office,
) -> None:
    first = office.publish(ACME, ONE)
    office.publish(ACME, TWO)
    office.registry.remove(ACME)
    for call in (office.registry.bind, office.registry.find, office.registry.remove):
        with pytest.raises(ModelNotFoundError, match="there is no adapter 'acme'"):
            call(ACME)
    again = office.publish(ACME, ONE, must_be_new=True)
    assert again.created_at > first.created_at
    assert len(office.registry.versions(ACME)) == 1
    with pytest.raises(InvalidRequestError, match="no version before"):
        office.registry.roll_back(ACME)


def test_conditions_are_kept_and_refusals_change_nothing(office: Office) -> None:
    with pytest.raises(ModelNotFoundError, match="create it with POST"):
        office.publish(ACME, ONE, must_be_new=False)
    one = office.publish(ACME, ONE, must_be_new=True).version.digest
    with pytest.raises(AdapterExistsError, match="PUT /v1/adapters/acme"):
        office.publish(ACME, TWO, must_be_new=True)
    two = office.publish(ACME, TWO, must_be_new=False, expected=one).version.digest
    with pytest.raises(VersionMismatchError, match=two):
        office.publish(ACME, THREE, expected=one)
    with pytest.raises(VersionMismatchError):
        office.registry.remove(ACME, expected=one)
    with pytest.raises(VersionMismatchError):
        office.registry.roll_back(ACME, one, expected=one)
    assert office.registry.find(ACME).version.digest == two
    office.registry.roll_back(ACME, expected=two)
    office.registry.remove(ACME, expected=one)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "../a", "a b", "a\n", "é", "a" * 129]
)
def test_name_that_could_leave_a_folder_or_confuse_a_log_is_refused(
    office: Office, name: str
) -> None:
    with pytest.raises(AdapterInvalidError, match="cannot name an adapter") as caught:
        office.publish(AdapterName(None, name), ONE)
    assert caught.value.param == "name"
    assert office.registry.adapters() == []


def test_name_of_the_base_is_refused(office: Office) -> None:
    with pytest.raises(AdapterInvalidError, match="the name of the base"):
        office.publish(AdapterName(None, LAYOUT.name), ONE)


def test_name_of_a_base_that_looks_like_a_tenants_adapter_is_refused() -> None:
    with pytest.raises(AdapterInvalidError, match="the name of the base"):
        check_name("llama", "meta/llama", "meta")


@pytest.mark.parametrize("name", ["a", "7", "A.b_c-9", "a" * 128])
def test_ordinary_names_are_served(office: Office, name: str) -> None:
    assert office.publish(AdapterName(None, name), ONE).version.name == name


@pytest.mark.parametrize("fault", ["broken", "too large"])
def test_refused_publication_leaves_the_name_on_its_version_and_says_so(
    office: Office, fault: str
) -> None:
    version = office.publish(ACME, ONE).version
    content = TWO if fault == "broken" else Content(9, rank=32, modules=MODULES)
    path = write_content(office.folder / "next", content)
    if fault == "broken":
        (path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterInvalidError, match=f"{version.digest[:12]} of 'acme' is still"):
        office.registry.publish(ACME, path)
    assert office.registry.find(ACME).version == version
    assert not list((office.folder / "store" / "incoming").iterdir())


def test_rollback_goes_to_the_version_before_or_to_the_one_that_is_named(office: Office) -> None:
    digests = [office.publish(ACME, content).version.digest for content in (ONE, TWO, THREE)]
    assert office.registry.roll_back(ACME).version.digest == digests[1]
    assert office.registry.roll_back(ACME).version.digest == digests[0]
    assert office.registry.roll_back(ACME, digests[2][:8]).version.digest == digests[2]
    assert office.registry.find(ACME).summary.ranks == (8,)
    for wrong in ("", "0" * 64, digests[1][:7], "%"):
        with pytest.raises(InvalidRequestError, match="is not one of this adapter's 3 versions"):
            office.registry.roll_back(ACME, wrong)


def test_only_the_last_versions_are_kept_and_the_files_of_others_go(office: Office) -> None:
    for seed in range(1, 7):
        office.publish(ACME, Content(seed, rank=8, a_seed=5))  # one A for all
    digests = [version.digest for version in office.registry.versions(ACME)]
    assert len(digests) == KEEP_VERSIONS
    assert digests[0] == office.registry.find(ACME).version.digest
    office.wait_for_collection(1 + KEEP_VERSIONS)
    assert verify_store(office.folder / "store", lambda *_: None) == []


def test_two_tenants_have_adapters_of_one_name_and_of_one_content(office: Office) -> None:
    names = [AdapterName(owner, "mine") for owner in ("acme", "bolt", None)]
    published = [office.publish(name, ONE, must_be_new=True) for name in names]
    assert len({item.version.digest for item in published}) == 1
    assert len({item.version.key for item in published}) == 3
    num_files = len(office.files())
    office.registry.remove(names[0])
    office.publish(names[1], TWO)
    assert office.registry.find(names[2]).version == published[2].version
    assert len(office.files()) == 2 * num_files


def test_everything_is_there_after_a_restart_without_reading_a_factor(tmp_path: Path) -> None:
    names = [AdapterName(owner, f"adapter-{n}") for owner in (None, "acme") for n in range(3)]
    with opened(tmp_path) as office:
        for index, name in enumerate(names):
            office.publish(name, Content(index + 1, rank=4 + index))
        office.publish(names[0], THREE)
        office.registry.roll_back(names[0])
        office.registry.set_pinned(names[1], True)
        before = [office.registry.find(name) for name in names]
        versions = [office.registry.versions(name) for name in names]
    with opened(tmp_path) as office:
        assert [office.registry.find(name) for name in names] == before
        assert [office.registry.versions(name) for name in names] == versions
        office.wait_for_loads()
        assert office.cache.stats().disk_loads == 1  # the pinned one's
        version = office.registry.bind(names[2])
        assert isinstance(office.load(version), PageTable)
        office.cache.release(version)
        office.registry.unbind(version)


def test_pin_follows_the_name_to_its_new_version_and_ends_with_it(office: Office) -> None:
    office.publish(ACME, ONE)
    assert office.registry.set_pinned(ACME, True).is_pinned
    assert office.registry.set_pinned(ACME, True).is_pinned  # once more changes nothing
    assert office.publish(ACME, TWO).is_pinned
    assert office.cache.stats().num_pinned == 1
    assert office.registry.roll_back(ACME).is_pinned
    assert office.cache.stats().num_pinned == 1
    office.registry.remove(ACME)
    assert office.cache.stats().num_pinned == 0
    assert not office.publish(ACME, ONE).is_pinned


def test_pins_leave_half_of_the_device_to_the_others(tmp_path: Path) -> None:
    with opened(tmp_path, pool_bytes=5 * ONE.num_bytes) as office:
        others = [AdapterName(None, f"other-{seed}") for seed in (2, 3)]
        for name, content in zip((ACME, *others), (ONE, TWO, THREE), strict=True):
            office.publish(name, content)
        office.registry.set_pinned(ACME, True)
        office.registry.set_pinned(others[0], True)
        with pytest.raises(PinsFullError, match="unpin another"):
            office.registry.set_pinned(others[1], True)
        with pytest.raises(PinsFullError):
            office.publish(ACME, Content(7, rank=20))
        assert not office.registry.find(others[1]).is_pinned
        office.registry.set_pinned(ACME, False)
        office.registry.set_pinned(others[1], True)


def test_what_is_merged_counts_among_the_pins(tmp_path: Path) -> None:
    with opened(tmp_path, pool_bytes=5 * ONE.num_bytes) as office:
        for name, content in (("merged", TWO), ("other", THREE), ("acme", ONE)):
            version = office.publish(AdapterName(None, name), content).version
            if name == "merged":
                office.pool.pin(office.load(version))
        office.registry.set_pinned(AdapterName(None, "other"), True)
        with pytest.raises(PinsFullError, match="unpin another"):
            office.registry.set_pinned(ACME, True)


def test_factors_read_from_the_store_have_the_name_they_were_published_under(
    tmp_path: Path,
) -> None:
    with opened(tmp_path, host_bytes=1) as office:
        assert office.cache.adapter(office.publish(ACME, ONE).version).name == "acme"


def test_every_request_finds_a_version_while_versions_change(office: Office) -> None:
    office.publish(ACME, ONE)
    digests = {office.publish(ACME, content).version.digest for content in (ONE, TWO, THREE)}
    done = Event()

    def request() -> int:
        count = 0
        while not done.is_set():
            version = office.registry.bind(ACME)
            assert version.digest in digests
            assert office.cache.adapter(version).digest == version.digest
            office.registry.unbind(version)
            count += 1
        return count

    with ThreadPoolExecutor(3) as threads:
        requests = [threads.submit(request) for _ in range(3)]
        for index in range(30):
            office.publish(ACME, (ONE, TWO, THREE)[index % 3])
            if index % 5 == 4:
                office.registry.roll_back(ACME)
        done.set()
        assert all(future.result() for future in requests)
    assert all(entry.num_bound == 0 for entry in office.cache._entries.values())
