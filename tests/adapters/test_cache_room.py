"""Room in the adapter cache: who stays, who leaves, and who waits for whom."""

from pathlib import Path

import pytest

from sharelora_serve.adapters.adapter import PageTable
from sharelora_serve.adapters.residency import Tier, Waiting
from sharelora_serve.errors import AdapterUnavailableError
from tests.adapters.shelves import FOUR, ONE, ROOM_FOR_TWO, THREE, TWO, Shelf


def test_least_recently_used_leaves_the_device_first(narrow: Shelf) -> None:
    cache = narrow.cache
    first, second = narrow.publish("one", ONE), narrow.publish("two", TWO)
    for version in (first, second, first):
        narrow.load(version)
        cache.release(version)
    third = narrow.publish("three", THREE)
    narrow.assert_reads_back(narrow.load(third), THREE)
    assert cache.stats().device_evictions == 1
    assert isinstance(cache.acquire(first), PageTable)
    assert cache.acquire(second) is Waiting.LOADING


def test_nobody_is_evicted_while_running_and_room_comes_with_a_release(narrow: Shelf) -> None:
    cache = narrow.cache
    running = [narrow.publish("one", ONE), narrow.publish("two", TWO)]
    tables = [narrow.load(version) for version in running]
    waiting = narrow.publish("three", THREE)
    assert cache.acquire(waiting) is Waiting.LOADING
    narrow.wait_for_loads()
    assert cache.acquire(waiting) is Waiting.NO_ROOM
    assert cache.acquire(waiting) is Waiting.NO_ROOM
    assert cache.stats().loads_in_progress == 0  # not tried again for nothing
    narrow.assert_reads_back(tables[0], ONE)
    narrow.assert_reads_back(tables[1], TWO)
    cache.release(running[0])
    assert cache.acquire(waiting) is Waiting.LOADING
    narrow.wait_for_loads()
    narrow.assert_reads_back(narrow.load(waiting), THREE)
    narrow.assert_reads_back(tables[1], TWO)
    assert cache.stats().device_evictions == 1


def test_adapter_that_found_no_room_is_read_again_only_once_there_is_some(tmp_path: Path) -> None:
    with Shelf(tmp_path, pool_bytes=ROOM_FOR_TWO, host_bytes=0) as shelf:
        cache = shelf.cache
        running = [shelf.publish("one", ONE), shelf.publish("two", TWO)]
        for version in running:
            shelf.load(version)
        waiting = [shelf.publish("three", THREE), shelf.publish("four", FOUR)]
        for is_room in (False, True):
            if is_room:  # for one of them
                num_read = cache.stats().disk_loads
                cache.release(running[0])
            for version in waiting:
                assert cache.acquire(version) is Waiting.LOADING
            shelf.wait_for_loads()
        assert cache.stats().disk_loads == num_read + 1
        shelf.assert_reads_back(shelf.load(waiting[0]), THREE)
        cache.release(running[1])
        shelf.assert_reads_back(shelf.load(waiting[1]), FOUR)
        assert cache.stats().disk_loads == num_read + 2


def test_adapter_stays_until_the_last_of_those_who_use_it_releases_it(narrow: Shelf) -> None:
    cache = narrow.cache
    shared, other = narrow.publish("one", ONE), narrow.publish("two", TWO)
    tables = [narrow.load(version) for version in (shared, shared, other)]
    cache.release(shared)
    cache.cancel(shared)  # of a third, which waited for the load and went away
    waiting = narrow.publish("three", THREE)
    cache.acquire(waiting)
    narrow.wait_for_loads()
    assert cache.acquire(waiting) is Waiting.NO_ROOM
    narrow.assert_reads_back(tables[1], ONE)
    cache.release(shared)
    narrow.load(waiting)
    narrow.assert_reads_back(tables[2], TWO)


def test_what_is_loaded_for_one_who_waits_is_kept_until_it_comes_or_cancels(
    narrow: Shelf,
) -> None:
    cache = narrow.cache
    first, second = narrow.publish("one", ONE), narrow.publish("two", TWO)
    third = narrow.publish("three", THREE)
    for version in (first, second, third):
        cache.acquire(version)
    narrow.wait_for_loads()
    assert cache.acquire(third) is Waiting.NO_ROOM
    cache.cancel(first)
    narrow.load(third)
    assert isinstance(cache.acquire(second), PageTable)
    assert cache.acquire(first) is Waiting.LOADING


def test_prefetch_evicts_neither_running_nor_reserved_nor_prefetched(narrow: Shelf) -> None:
    cache = narrow.cache
    first, second = narrow.publish("one", ONE), narrow.publish("two", TWO)
    third, fourth = narrow.publish("three", THREE), narrow.publish("four", FOUR)
    table = narrow.load(first)
    cache.acquire(second)
    narrow.wait_for_loads()  # and is reserved
    cache.prefetch(third)
    narrow.wait_for_loads()
    assert cache.stats().device_evictions == 0
    assert isinstance(cache.acquire(second), PageTable)
    cache.release(second)
    cache.prefetch(third)  # the idle one gives way
    narrow.wait_for_loads()
    assert cache.stats().device_evictions == 1
    cache.prefetch(fourth)
    narrow.wait_for_loads()
    assert cache.stats().device_evictions == 1
    narrow.assert_reads_back(table, ONE)
    assert isinstance(cache.acquire(third), PageTable)


def test_adapter_that_nobody_is_known_to_come_for_gives_way_to_a_prefetch(narrow: Shelf) -> None:
    cache = narrow.cache
    for name, content in (("one", ONE), ("two", TWO)):
        cache.prefetch(narrow.publish(name, content), is_reserved=False)
    narrow.wait_for_loads()
    third = narrow.publish("three", THREE)
    cache.prefetch(third)
    narrow.wait_for_loads()
    assert isinstance(cache.acquire(third), PageTable)
    assert cache.stats().device_evictions == 1


def test_load_that_a_request_waits_for_is_the_next_one(narrow: Shelf) -> None:
    cache = narrow.cache
    first, second = narrow.publish("one", ONE), narrow.publish("two", TWO)
    third = narrow.publish("three", THREE)
    with narrow.loader_held():
        cache.prefetch(first)
        cache.prefetch(second)
        cache.acquire(third)
        cache.acquire(second)
    narrow.wait_for_loads()  # of two there is room for, beside the doorstop for none
    assert isinstance(cache.acquire(second), PageTable)
    assert isinstance(cache.acquire(third), PageTable)
    assert cache.tier(first) is Tier.HOST


def test_request_that_waits_for_what_is_merged_fails_and_does_not_wait_for_ever(
    narrow: Shelf,
) -> None:
    cache = narrow.cache
    for name, content in (("merged", ONE), ("pinned", TWO)):
        version = narrow.publish(name, content)
        cache.pin(version)
        if name == "merged":
            narrow.load(version)  # and never released
    narrow.wait_for_loads()
    version = narrow.publish("three", THREE)
    assert cache.acquire(version) is Waiting.LOADING
    narrow.wait_for_loads()
    with pytest.raises(AdapterUnavailableError, match="than the pinned adapters leave"):
        cache.acquire(version)


def test_request_that_runs_now_is_worth_more_than_a_prefetch(narrow: Shelf) -> None:
    cache = narrow.cache
    narrow.load(narrow.publish("one", ONE))
    second, third = narrow.publish("two", TWO), narrow.publish("three", THREE)
    cache.prefetch(second)
    narrow.wait_for_loads()
    narrow.assert_reads_back(narrow.load(third), THREE)
    assert cache.stats().device_evictions == 1


def test_pinned_adapter_is_loaded_at_once_and_never_evicted(narrow: Shelf) -> None:
    cache = narrow.cache
    pinned = narrow.publish("one", ONE)
    cache.pin(pinned)
    narrow.wait_for_loads()
    assert cache.tier(pinned) == "device"
    for content in (TWO, THREE, FOUR, TWO):
        version = narrow.publish("other", content)
        narrow.load(version)
        cache.release(version)
    assert cache.tier(pinned) == "device"
    cache.unpin(pinned)
    for content in (THREE, FOUR):
        version = narrow.publish(f"other-{content.seed}", content)
        narrow.load(version)
        cache.release(version)
    assert cache.tier(pinned) == "host"


def test_pinned_adapter_that_finds_no_room_is_loaded_when_there_is_some(narrow: Shelf) -> None:
    cache = narrow.cache
    running = [narrow.publish("one", ONE), narrow.publish("two", TWO)]
    for version in running:
        narrow.load(version)
    pinned = narrow.publish("three", THREE)
    cache.pin(pinned)
    narrow.wait_for_loads()
    assert cache.tier(pinned) == "host"
    cache.release(running[0])
    narrow.wait_for_loads()
    assert cache.tier(pinned) == "device"


def test_request_that_pins_leave_no_room_for_fails_and_does_not_wait_for_ever(
    narrow: Shelf,
) -> None:
    cache = narrow.cache
    for name, content in (("one", ONE), ("two", TWO)):
        cache.pin(narrow.publish(name, content))
    narrow.wait_for_loads()
    version = narrow.publish("three", THREE)
    assert cache.acquire(version) is Waiting.LOADING
    narrow.wait_for_loads()
    with pytest.raises(AdapterUnavailableError, match="than the pinned adapters leave"):
        cache.acquire(version)
