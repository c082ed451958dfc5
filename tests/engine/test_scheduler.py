"""What each step computes, who waits, who passes and who steps aside."""

import pytest

from sharelora_serve.engine.adapter_demand import PREFETCH_AHEAD
from sharelora_serve.engine.fair_queue import MAX_OVERTAKEN
from tests.engine.rig import VERSIONS, A, B, C, Rig, Shelf, alone


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_long_prompt_never_stalls_a_stream(rig: Rig) -> None:
    stream = rig.add(3, max_tokens=50)
    rig.step()
    prompt = rig.add(30)
    steps = [rig.step() for _ in range(4)]
    assert [step and step[stream] for step in steps] == [1, 1, 1, 1]
    assert [step and step[prompt] for step in steps] == [8, 8, 8, 6]
    assert len(prompt.output_ids) == 1


def test_more_streams_make_room_for_more_of_a_prompt_in_proportion() -> None:
    rig = Rig(prefill_chunk=5, prefill_per_decode=2)
    streams = [rig.add(1, max_tokens=50) for _ in range(4)]
    rig.step()
    prompt = rig.add(23)
    assert rig.step() == {**dict.fromkeys(streams, 1), prompt: 8}
    for stream in streams[2:]:
        rig.scheduler.abort(stream.request_id)
    assert rig.step() == {**dict.fromkeys(streams[:2], 1), prompt: 5}


def test_without_streams_a_prompt_takes_the_whole_budget(rig: Rig) -> None:
    prompt = rig.add(50)
    assert rig.step() == {prompt: 32}
    assert rig.step() == {prompt: 18}


def test_several_prompts_share_what_streams_leave_in_order_of_arrival(rig: Rig) -> None:
    stream = rig.add(3, max_tokens=50)
    rig.step()
    first, second, third = rig.add(5), rig.add(6), rig.add(3)
    assert rig.step() == {stream: 1, first: 5, second: 3}
    assert rig.step() == {stream: 1, first: 1, second: 3, third: 3}


def test_running_prompt_goes_before_waiting_ones(rig: Rig) -> None:
    first, second = rig.add(40), rig.add(40)
    assert rig.step() == {first: 32}
    assert rig.step() == {first: 8, second: 24}


def test_streams_at_the_limit_of_running_requests_leave_others_waiting() -> None:
    rig = Rig(max_running=2)
    rig.add(3), rig.add(3), rig.add(3)
    rig.step()
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)


def test_nothing_to_do_is_no_batch(rig: Rig) -> None:
    assert not rig.has_work
    assert rig.scheduler.schedule() is None


def test_only_the_chunk_that_reaches_the_last_token_needs_logits(rig: Rig) -> None:
    rig.add(40)
    first = rig.scheduler.schedule()
    assert first is not None
    assert [scheduled.needs_logits for scheduled in first.scheduled] == [False]
    rig.scheduler.complete(first)
    second = rig.scheduler.schedule()
    assert second is not None
    assert [scheduled.needs_logits for scheduled in second.scheduled] == [True]
    assert [scheduled.num_tokens for scheduled in second.scheduled] == [8]


def test_rows_of_one_adapter_stand_together_and_the_base_comes_first() -> None:
    rig = Rig(max_batch_tokens=64)
    for adapter in [B, None, A, B, None, A]:
        rig.add(3, adapter)
    rig.step()
    rig.add(3, A)
    rig.add(3)
    batch = rig.scheduler.schedule()
    assert batch is not None
    adapters = [scheduled.request.adapter for scheduled in batch.scheduled]
    assert adapters == [None, None, None, A, A, A, B, B]


def test_prompt_in_the_prefix_cache_is_computed_from_its_end(rig: Rig) -> None:
    rig.add(list(range(12)), A)
    rig.run()
    other, same = rig.add(list(range(12)), B), rig.add(list(range(12)), A)
    assert rig.step() == {other: 12, same: 4}
    assert (other.num_cached_tokens, same.num_cached_tokens) == (0, 8)


def test_request_whose_adapter_loads_is_passed_and_enters_when_it_is_there() -> None:
    rig = Rig(shelf=Shelf(load_ticks=3))
    loading, base = rig.add(3, A), rig.add(3, max_tokens=20)
    assert rig.step() == {base: 3}
    assert rig.step() == {base: 1}
    assert rig.step() == {base: 1}
    assert rig.step() == {base: 1, loading: 3}


def test_adapters_of_queued_requests_load_while_every_place_is_taken() -> None:
    rig = Rig(max_running=1, shelf=Shelf(load_ticks=3))
    rig.add(3, max_tokens=10)
    rig.step()
    for version in VERSIONS[:10]:
        rig.add(3, version)
    rig.step()
    assert list(rig.shelf.ticks_left) == [v.digest for v in VERSIONS[:PREFETCH_AHEAD]]


def test_adapter_that_cannot_be_had_fails_its_request_alone(rig: Rig) -> None:
    rig.shelf.broken.add(A.digest)
    broken, whole = rig.add(3, A), rig.add(3, B)
    assert rig.step() == {whole: 3}
    assert "tenant-1" in str(rig.errors[broken])
    rig.run()
    assert rig.finished == {whole}


def test_failure_is_reported_even_when_nothing_can_run(rig: Rig) -> None:
    rig.shelf.broken.add(A.digest)
    broken = rig.add(3, A)
    assert rig.step() == {}
    assert list(rig.errors) == [broken]
    assert not rig.has_work


def test_request_without_room_is_not_overtaken_for_ever() -> None:
    rig = Rig(shelf=Shelf(room=1), max_running=4)
    rig.add(3, A)
    rig.step()
    starved = rig.add(3, B)
    later = []
    while not starved.block_table:
        later.append(rig.add(3, A))  # whose adapter is always there
        rig.step()
        assert len(later) < 200, "still waiting"
    assert sum(request.num_tokens > 3 for request in later) == MAX_OVERTAKEN
    rig.run()
    assert rig.finished == set(rig.requests)


def test_scheduler_tells_that_an_adapter_finds_no_room_and_when_that_is_over() -> None:
    rig = Rig(shelf=Shelf(room=1), max_running=4)
    rig.add(3, A, max_tokens=9)
    rig.step()
    assert not rig.scheduler.lacks_room
    waiting = rig.add(3, B)
    rig.step()
    assert rig.scheduler.lacks_room
    while not waiting.block_table:
        assert waiting not in rig.finished
        rig.step()
    assert not rig.scheduler.lacks_room


def test_room_that_a_starved_request_needs_is_not_kept_for_those_behind() -> None:
    rig = Rig(shelf=Shelf(room=2, load_ticks=2), max_running=3)
    rig.shelf.sizes[C.digest] = 2
    rig.add(3, A, max_tokens=90)
    while not rig.running:
        rig.step()
    starved = rig.add(3, C, max_tokens=1)
    behind = [rig.add(3, version, max_tokens=1) for version in VERSIONS[3:]]
    rig.run(until=starved)
    assert sum(request in rig.finished for request in behind) == MAX_OVERTAKEN


def test_newest_request_is_preempted_and_computed_again_with_its_output() -> None:
    rig = Rig(num_blocks=7, max_batch_tokens=64)  # 6 usable
    oldest, newest = rig.add(7, max_tokens=10), rig.add(7, max_tokens=10)
    rig.step()
    while newest.block_table:
        rig.step()
    assert newest.num_computed == 0
    assert 0 < len(newest.output_ids) < 10
    rig.run()
    assert rig.finished == {oldest, newest}
    assert newest.output_ids == alone(newest)


def test_newest_request_that_needs_blocks_itself_steps_aside() -> None:
    rig = Rig(num_blocks=5, max_batch_tokens=64)  # 4 usable
    oldest, newest = rig.add(5, max_tokens=10), rig.add(6, max_tokens=10)
    for _ in range(3):  # the newest fills its two blocks first
        rig.step()
    assert rig.step() == {oldest: 1}
    assert newest.block_table == []
    rig.run()
    assert newest.output_ids == alone(newest)


def test_preempted_request_gives_up_its_adapter_and_goes_first() -> None:
    rig = Rig(num_blocks=7, max_batch_tokens=64, max_running=2)
    rig.add(7, max_tokens=10)
    preempted = rig.add(7, A, max_tokens=10)
    rig.step()
    rig.add(3, B)
    while preempted.block_table:
        rig.step()
    assert preempted.page_table is None
    assert rig.shelf.num_acquired == 0
    while not preempted.block_table:
        assert rig.scheduler.num_waiting == 2  # the one behind does not slip in before it
        rig.step()


def test_admission_leaves_the_blocks_that_running_requests_need_next() -> None:
    rig = Rig(num_blocks=5, max_batch_tokens=64)  # 4 usable
    running = rig.add(8, max_tokens=4)
    rig.step()  # 2 blocks; the next token takes a third
    waiting = rig.add(7, max_tokens=1)
    rig.step()
    assert waiting.block_table == []
    rig.run()
    assert rig.finished == {running, waiting}


def test_request_that_lacks_blocks_is_not_overtaken_by_smaller_ones() -> None:
    rig = Rig(num_blocks=9, max_batch_tokens=64)  # 8 usable
    rig.add(15, max_tokens=4)
    rig.step()
    large, small = rig.add(20, max_tokens=4), rig.add(2, max_tokens=1)
    while not large.block_table:
        assert small.output_ids == []
        rig.step()


def test_request_that_lacks_blocks_does_not_use_its_adapter_meanwhile() -> None:
    rig = Rig(num_blocks=9, max_batch_tokens=64)  # 8 usable
    rig.add(20, max_tokens=8)
    rig.step()
    asked = []
    acquire = rig.shelf.acquire
    rig.shelf.acquire = lambda version: asked.append(version) or acquire(version)  # type: ignore
    waiting = rig.add(20, A, max_tokens=4)
    while not waiting.block_table:
        rig.step()
    assert asked == [A]


def test_abort_frees_a_running_request_at_once(rig: Rig) -> None:
    rig.add(9, A)
    rig.step()
    rig.scheduler.abort("request-0")
    assert (rig.kv_cache.num_used_blocks, rig.shelf.num_acquired) == (0, 0)
    assert not rig.has_work
    rig.scheduler.abort("request-0")


def test_abort_between_schedule_and_complete_leaves_the_rest_of_the_batch(rig: Rig) -> None:
    gone, stays = rig.add(9, A), rig.add(9, B)
    batch = rig.scheduler.schedule()
    assert batch is not None
    rig.scheduler.abort(gone.request_id)
    rig.scheduler.complete(batch)
    assert (gone.num_computed, stays.num_computed) == (0, 9)
    rig.check_books()


def test_abort_of_the_last_request_that_waits_for_a_load_cancels_it() -> None:
    rig = Rig(shelf=Shelf(load_ticks=5))
    first, second = rig.add(3, A), rig.add(3, A)
    rig.step()
    rig.scheduler.abort(first.request_id)
    assert list(rig.shelf.ticks_left) == [A.digest]
    rig.scheduler.abort(second.request_id)
    assert not rig.shelf.ticks_left
