"""Loads of the adapter cache: from disk and host memory, who waits for them, and for how long a
version lives.
"""

import shutil
import time
from pathlib import Path
from threading import get_ident

import pytest

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Tier, Waiting
from sharelora_serve.errors import AdapterInvalidError, AdapterUnavailableError
from tests.adapters.shelves import BYTES, ONE, ROOM_FOR_TWO, THREE, TWO, Shelf


def test_acquire_never_waits_for_a_load(shelf: Shelf) -> None:
    version = shelf.publish("one", ONE)
    with shelf.loader_held():
        used_bytes = shelf.pool.stats().used_bytes
        assert shelf.cache.acquire(version) is Waiting.LOADING
        assert shelf.cache.acquire(version) is Waiting.LOADING
        assert shelf.cache.stats().loads_in_progress == 1  # the second joins the first
        assert shelf.pool.stats().used_bytes == used_bytes
    shelf.wait_for_loads()
    table = shelf.cache.acquire(version)
    assert isinstance(table, PageTable)
    shelf.assert_reads_back(table, ONE)
    assert get_ident() not in shelf.changed_by


def test_all_who_waited_get_the_table_of_the_one_load(shelf: Shelf) -> None:
    version = shelf.publish("one", ONE)
    with shelf.loader_held():
        num_loads = shelf.cache.stats().host_hits
        assert [shelf.cache.acquire(version) for _ in range(3)] == [Waiting.LOADING] * 3
    shelf.wait_for_loads()
    tables = [shelf.cache.acquire(version) for _ in range(3)]
    assert tables[0] is tables[1] is tables[2]
    assert shelf.cache.stats().host_hits == num_loads + 1
    assert shelf.cache.stats().device_hits == 2  # the first was waited for
    for _ in range(3):
        shelf.cache.release(version)
    with pytest.raises(AssertionError, match="released more often"):
        shelf.cache.release(version)


def test_failed_load_fails_all_who_wait_for_it_and_is_tried_again_later(
    forgetful: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    cache = forgetful.cache
    version, other = forgetful.publish("one", ONE), forgetful.publish("two", TWO)
    away = forgetful.path("one", ONE).rename(forgetful.folder / "away")
    assert cache.acquire(version) is Waiting.LOADING
    assert cache.acquire(other) is Waiting.LOADING
    forgetful.wait_for_loads()
    for _ in range(3):
        with pytest.raises(AdapterUnavailableError, match="'one' could not be loaded") as caught:
            cache.acquire(version)
        assert 0 < (caught.value.retry_after_seconds or 0) <= 0.5
    assert "'one' could not be loaded" in caplog.text
    assert isinstance(cache.acquire(other), PageTable)
    away.rename(forgetful.path("one", ONE))
    time.sleep(0.5)
    forgetful.assert_reads_back(forgetful.load(version), ONE)
    assert cache.stats().failures == 1


def test_load_that_keeps_failing_is_tried_less_and_less_often(forgetful: Shelf) -> None:
    version = forgetful.publish("one", ONE)
    forgetful.publish("two", TWO)  # pushes the first from the host
    shutil.rmtree(forgetful.path("one", ONE))
    waits = []
    for _ in range(2):
        assert forgetful.cache.acquire(version) is Waiting.LOADING
        forgetful.wait_for_loads()
        with pytest.raises(AdapterUnavailableError) as caught:
            forgetful.cache.acquire(version)
        waits.append(caught.value.retry_after_seconds or 0)
        time.sleep(waits[-1])
    assert waits[1] > 1.5 * waits[0]


def test_publication_under_a_name_makes_a_failed_load_be_tried_at_once(forgetful: Shelf) -> None:
    version = forgetful.publish("one", ONE)
    forgetful.publish("two", TWO)
    away = forgetful.path("one", ONE).rename(forgetful.folder / "away")
    assert forgetful.cache.acquire(version) is Waiting.LOADING
    forgetful.wait_for_loads()
    away.rename(forgetful.path("one", ONE))
    assert forgetful.publish("one", ONE) == version
    forgetful.assert_reads_back(forgetful.load(version), ONE)


def test_version_that_was_replaced_while_its_request_queued_is_still_served(shelf: Shelf) -> None:
    cache = shelf.cache
    old = shelf.publish("tenant", ONE)
    cache.bind(old)
    new = shelf.publish("tenant", TWO)
    assert new != old
    shelf.assert_reads_back(shelf.load(old), ONE)
    shelf.assert_reads_back(shelf.load(new), TWO)
    cache.release(old)
    cache.unbind(old)
    shelf.wait_for_residents(1)
    assert cache.stats().num_on_host == 1
    with pytest.raises(AdapterUnavailableError, match="was replaced or removed"):
        cache.acquire(old)


def test_version_of_a_deleted_name_lives_until_its_last_request_ends(shelf: Shelf) -> None:
    cache = shelf.cache
    version = shelf.publish("tenant", ONE)
    cache.bind(version), cache.bind(version)
    table = shelf.load(version)
    shelf.remove("tenant")
    shelf.assert_reads_back(table, ONE)
    cache.release(version)
    cache.unbind(version)
    assert isinstance(cache.acquire(version), PageTable)  # the second one's turn
    cache.release(version)
    cache.unbind(version)
    shelf.wait_for_residents(0)
    stats = cache.stats()
    assert (stats.host_bytes, stats.pool.used_bytes) == (0, 0)
    with pytest.raises(AdapterUnavailableError):
        cache.bind(version)


def test_name_that_returns_to_a_version_still_in_use_keeps_it(shelf: Shelf) -> None:
    cache = shelf.cache
    first = shelf.publish("tenant", ONE)
    cache.bind(first)
    shelf.load(first)
    shelf.publish("tenant", TWO)
    assert shelf.publish("tenant", ONE) == first
    cache.release(first)
    cache.unbind(first)
    assert isinstance(cache.acquire(first), PageTable)


def test_host_memory_is_bounded_and_what_left_it_is_read_from_disk_again(
    forgetful: Shelf,
) -> None:
    first, second = forgetful.publish("one", ONE), forgetful.publish("two", TWO)
    assert forgetful.cache.stats().host_bytes == BYTES
    assert forgetful.cache.stats().host_evictions == 1
    forgetful.assert_reads_back(forgetful.load(first), ONE)
    forgetful.assert_reads_back(forgetful.load(second), TWO)
    stats = forgetful.cache.stats()
    assert (stats.disk_loads, stats.host_hits, stats.num_on_host) == (2, 0, 1)
    assert stats.host_bytes <= BYTES


def test_what_is_on_the_host_is_neither_read_nor_cast_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Shelf(tmp_path, pool_bytes=ROOM_FOR_TWO, host_bytes=1 << 20) as shelf:
        contents = {"one": ONE, "two": TWO, "three": THREE}
        versions = {name: shelf.publish(name, content) for name, content in contents.items()}
        for name, content in contents.items():
            shutil.rmtree(shelf.path(name, content))
        monkeypatch.setattr(shelf.pool, "stage", None)
        for name in [*contents] * 2:
            shelf.assert_reads_back(shelf.load(versions[name]), contents[name])
            shelf.cache.release(versions[name])
        stats = shelf.cache.stats()
        assert (stats.disk_loads, stats.host_hits, stats.failures) == (0, 6, 0)


def test_host_lets_go_of_what_was_loaded_longest_ago(tmp_path: Path) -> None:
    with Shelf(tmp_path, pool_bytes=ROOM_FOR_TWO, host_bytes=2 * BYTES) as shelf:
        first, second = shelf.publish("one", ONE), shelf.publish("two", TWO)
        shelf.load(first), shelf.cache.release(first)
        shelf.publish("three", THREE)  # the second has to go
        shelf.load(second), shelf.cache.release(second)
        assert shelf.cache.stats().disk_loads == 1


def test_files_of_what_is_merged_and_has_no_name_are_not_needed(shelf: Shelf) -> None:
    version = shelf.publish("merged", ONE)
    shelf.cache.pin(version)
    shelf.load(version)
    assert shelf.cache.digests() == {version.digest}
    shelf.remove("merged")
    assert shelf.cache.digests() == set()
    assert isinstance(shelf.cache.acquire(version), PageTable)
    shelf.cache.release(version)


def test_prefetch_that_failed_is_not_repeated_until_someone_needs_it(forgetful: Shelf) -> None:
    cache = forgetful.cache
    version = forgetful.publish("one", ONE)
    forgetful.publish("two", TWO)
    shutil.rmtree(forgetful.path("one", ONE))
    for _ in range(3):
        cache.prefetch(version)
        forgetful.wait_for_loads()
    assert cache.stats().failures == 1


def test_prefetched_adapter_is_there_for_its_request(shelf: Shelf) -> None:
    version = shelf.publish("one", ONE)
    shelf.cache.prefetch(version)
    shelf.wait_for_loads()
    assert isinstance(shelf.cache.acquire(version), PageTable)
    assert shelf.cache.stats().device_hits == 1


def test_equal_content_under_two_names_is_one_resident(shelf: Shelf) -> None:
    cache = shelf.cache
    one, same = shelf.publish("one", ONE), shelf.publish("same", ONE)
    assert one.digest == same.digest
    assert shelf.load(one) is shelf.load(same)
    stats = cache.stats()
    assert (stats.pool.num_adapters, stats.num_on_host) == (1, 1)
    cache.release(one)
    cache.release(same)
    shelf.remove("one")
    assert isinstance(cache.acquire(same), PageTable)


def test_equal_content_of_two_tenants_shares_pages_and_nothing_that_either_could_see(
    shelf: Shelf,
) -> None:
    cache = shelf.cache
    public = shelf.publish("one", ONE)
    tenants = [AdapterVersion(f"{owner}/one", public.digest, owner) for owner in ("acme", "bolt")]
    for version in tenants:
        cache.admit(version)
    shelf.load(tenants[0])
    used_bytes = shelf.pool.stats().used_bytes
    assert [cache.tier(version) for version in tenants] == [Tier.DEVICE, Tier.DISK]
    shelf.load(tenants[1])
    assert shelf.pool.stats().used_bytes == used_bytes
    assert shelf.pool.stats().num_adapters == 2


def test_tier_is_the_fastest_place_that_holds_a_version(forgetful: Shelf) -> None:
    first, second = forgetful.publish("one", ONE), forgetful.publish("two", TWO)
    assert [forgetful.cache.tier(version) for version in (first, second)] == ["disk", "host"]
    forgetful.load(first)
    assert forgetful.cache.tier(first) == "device"


def test_unbinding_too_often_is_a_bug_that_is_seen(shelf: Shelf) -> None:
    version = shelf.publish("tenant", ONE)
    with pytest.raises(AssertionError, match="unbound more often"):
        shelf.cache.unbind(version)


def test_factors_of_a_version_come_from_disk(forgetful: Shelf) -> None:
    first, second = forgetful.publish("one", ONE), forgetful.publish("two", TWO)
    for version in (first, second):
        assert forgetful.cache.adapter(version).digest == version.digest
    shutil.rmtree(forgetful.path("two", TWO))
    with pytest.raises(AdapterInvalidError, match="'two' cannot be served"):
        forgetful.cache.adapter(second)
    forgetful.remove("two")
    with pytest.raises(AdapterUnavailableError, match="removed"):
        forgetful.cache.adapter(second)
