"""Clients that ask for more than their share, and what the others notice."""

import random
from itertools import groupby

import pytest

from sharelora_serve.engine import fair_queue
from sharelora_serve.engine.fair_queue import (
    OUTPUT_WEIGHT,
    PROMPT_PIECE,
    PROMPT_WEIGHT,
    FairQueue,
)
from sharelora_serve.engine.request import Request
from sharelora_serve.engine.scheduler import LOOK_AHEAD, MAX_PAUSES
from tests.engine.rig import A, B, Rig, Shelf, alone


def client_tokens(rig: Rig, client: str) -> int:
    return sum(
        PROMPT_WEIGHT * min(request.num_computed, len(request.prompt_ids))
        + OUTPUT_WEIGHT * len(request.output_ids)
        for request in rig.requests
        if request.tenant == client
    )


def test_clients_that_always_ask_are_served_the_same_whatever_they_ask_for() -> None:
    rig = Rig(num_blocks=300, max_running=4, max_batch_tokens=64)
    lengths = random.Random()
    for client, prompt, new in (("short", 3, 2), ("long", 20, 12), ("mixed", 0, 0)):
        for _ in range(100):
            tokens = (prompt or lengths.randint(1, 25), new or lengths.randint(1, 15))
            rig.add(tokens[0], max_tokens=tokens[1], tenant=client)
    for _ in range(150):
        rig.step()
    assert rig.scheduler.num_waiting > 100
    served = [client_tokens(rig, client) for client in ("short", "long", "mixed")]
    # Four of them run at once, and each is at most 25 + 2 * 15 tokens.
    assert max(served) - min(served) <= 4 * 55, served


def test_who_asks_now_and_then_goes_before_who_never_stops() -> None:
    rig = Rig(max_running=2)
    for _ in range(20):
        rig.add(4, tenant="flood")
    for _ in range(12):
        rig.step()
    for _ in range(3):
        request = rig.add(4, tenant="quiet")
        num_waiting = rig.scheduler.num_waiting
        while not request.block_table:
            rig.step()
            assert rig.scheduler.num_waiting >= num_waiting - 1, "somebody went before"
        rig.run(until=request)


def test_adapters_are_the_clients_where_nobody_has_a_key() -> None:
    rig = Rig(max_running=1, shelf=Shelf())
    for _ in range(5):
        rig.add(4, A, tenant=None)
    rig.step()
    other = rig.add(4, B, tenant=None)
    base = rig.add(4, tenant=None)
    rig.run(until=other)
    rig.run(until=base)
    assert len(rig.finished) == 3


def test_a_request_of_who_runs_much_and_had_much_makes_way() -> None:
    rig = Rig(max_running=4, max_batch_tokens=64)
    flood = [rig.add(4, tenant="flood", max_tokens=30) for _ in range(6)]
    for _ in range(10):
        rig.step()
    quiet = rig.add(6, tenant="quiet")
    step = rig.step()
    assert step is not None
    assert quiet in step
    assert rig.scheduler.num_preemptions == 1
    assert [bool(request.block_table) for request in flood] == [True] * 3 + [False] * 3
    rig.run()
    assert all(request.output_ids == alone(request) for request in rig.requests)


def test_blocks_are_made_free_for_who_had_little() -> None:
    rig = Rig(num_blocks=17, max_batch_tokens=64)  # 16 usable
    for _ in range(5):
        rig.add(4, tenant="flood", max_tokens=12)
    for _ in range(7):
        rig.step()
    quiet = rig.add(20, tenant="quiet", max_tokens=2)
    rig.step()
    assert quiet.block_table
    assert rig.scheduler.num_preemptions > 0
    rig.run()
    assert rig.finished == set(rig.requests)


def test_nobody_makes_way_for_who_was_served_alike() -> None:
    rig = Rig(max_running=4, max_batch_tokens=64)
    for _ in range(4):
        rig.add(4, tenant="one", max_tokens=30)
    rig.add(4, tenant="other", max_tokens=30)
    rig.scheduler._waiting.charge("other/", 50)
    rig.step()
    waiting = rig.add(4, tenant="other")
    for _ in range(5):
        rig.step()
    assert not waiting.block_table
    assert rig.scheduler.num_preemptions == 0


def start_streams(rig: Rig, num_streams: int) -> list[Request]:
    streams = [rig.add(2, tenant="flood", max_tokens=40) for _ in range(num_streams)]
    for _ in range(5):
        rig.step()
    return streams


@pytest.mark.parametrize(("num_tokens", "pauses"), [(8, False), (9, True), (14, True), (15, False)])
def test_streams_pause_for_a_prompt_that_their_tokens_complete(
    num_tokens: int, pauses: bool
) -> None:
    rig = Rig(prefill_chunk=8)
    streams = start_streams(rig, 6)
    quiet = rig.add(num_tokens, tenant="quiet")
    step = rig.step()
    assert step is not None
    assert step[quiet] == (num_tokens if num_tokens < 15 else 8)
    assert [stream in step for stream in streams] == [not pauses] * 6
    step = rig.step()
    assert step is not None
    assert all(stream in step for stream in streams)


@pytest.mark.parametrize("are_rows_costly", [False, True])
def test_streams_pause_for_a_prompt_that_its_chunk_completes_where_rows_are_costly(
    are_rows_costly: bool,
) -> None:
    rig = Rig(prefill_chunk=8, are_rows_costly=are_rows_costly)
    streams = start_streams(rig, 6)
    quiet = rig.add(8, tenant="quiet")
    step = rig.step()
    assert step is not None
    assert step[quiet] == 8
    assert [stream in step for stream in streams] == [not are_rows_costly] * 6


@pytest.mark.parametrize(("num_streams", "pauses"), [(1, False), (2, True)])
def test_streams_pause_only_for_clients_that_run_fewer_requests(
    num_streams: int, pauses: bool
) -> None:
    rig = Rig(prefill_chunk=8, are_rows_costly=True)
    streams = start_streams(rig, num_streams)
    rig.add(8, tenant="newcomer")
    step = rig.step()
    assert step is not None
    assert [stream in step for stream in streams] == [not pauses] * num_streams


def test_streams_of_the_same_client_never_pause() -> None:
    rig = Rig(prefill_chunk=8)
    streams = start_streams(rig, 6)
    rig.add(12, tenant="flood")
    step = rig.step()
    assert step is not None
    assert all(stream in step for stream in streams)


def test_streams_pause_for_a_few_steps_in_a_row_at_most() -> None:
    rig = Rig(prefill_chunk=8)
    streams = start_streams(rig, 6)
    steps = []
    for index in range(3 * MAX_PAUSES):
        rig.add(12, tenant=f"quiet-{index}", max_tokens=1)
        steps.append(rig.step())
    paused = [step is not None and streams[0] not in step for step in steps]
    assert max(len(list(same)) for pauses, same in groupby(paused) if pauses) == MAX_PAUSES


def test_nobody_is_preempted_where_that_would_not_make_enough_room() -> None:
    rig = Rig(num_blocks=17, max_batch_tokens=64)  # 16 usable
    rig.add(20, tenant="other", max_tokens=20)  # which nobody may take from
    for _ in range(3):
        rig.add(4, tenant="flood", max_tokens=12)
    for _ in range(7):
        rig.step()
    rig.add(60, tenant="quiet", max_tokens=1)
    rig.step()
    assert rig.scheduler.num_preemptions == 0
    rig.run()
    assert rig.finished == set(rig.requests)


def test_many_requests_that_wait_for_an_adapter_hide_nobody() -> None:
    rig = Rig(shelf=Shelf(load_ticks=1000))
    for _ in range(2 * LOOK_AHEAD):
        rig.add(4, A, tenant="loading")
    base = rig.add(4, tenant="quiet")
    rig.step()
    assert base.block_table


def test_those_that_wait_in_great_number_hide_no_prompt_that_has_begun() -> None:
    rig = Rig(num_blocks=500, max_running=8, max_batch_tokens=16)
    for number in range(8 + 2 * LOOK_AHEAD):
        rig.add(30, tenant=f"tenant-{number}", max_tokens=2)
    while rig.has_work:
        assert rig.step() is not None
    assert rig.finished == set(rig.requests)


def test_prompt_that_has_begun_is_reached_behind_all_that_lack_room() -> None:
    rig = Rig(num_blocks=500, shelf=Shelf(room=1), max_batch_tokens=300)
    long = rig.add(1500, A, tenant="long")
    rig.step()
    for _ in range(2 * LOOK_AHEAD):
        rig.add(2, B, tenant="short", max_tokens=1)
    while rig.has_work:
        assert rig.step() is not None
    assert rig.finished >= {long}


def first_tokens(rig: Rig, requests: list[Request]) -> list[int]:
    """The steps in which they come."""
    found: dict[Request, int] = {}
    for step in range(1000):
        rig.step()
        found |= {
            request: step for request in requests if request.output_ids and request not in found
        }
        if len(found) == len(requests):
            break
    return [found[request] for request in requests]


def test_short_prompts_of_clients_served_alike_come_one_after_another() -> None:
    rig = Rig(num_blocks=500, max_running=32, prefill_chunk=8)
    rig.add(2, tenant="stream", max_tokens=300)
    rig.step()
    at = first_tokens(rig, [rig.add(16, tenant=f"tenant-{n}", max_tokens=1) for n in range(16)])
    assert at == sorted(at)
    assert sum(at) / len(at) < 0.6 * max(at)


def test_long_prompt_keeps_short_ones_waiting_for_a_piece_alone() -> None:
    rig = Rig(num_blocks=500, prefill_chunk=8)
    rig.add(2, tenant="stream", max_tokens=300)
    rig.step()
    rig.add(1200, tenant="long", max_tokens=1)
    rig.step()
    (at,) = first_tokens(rig, [rig.add(8, tenant="short", max_tokens=1)])
    assert at <= PROMPT_PIECE / 8 + 1


def test_who_has_no_room_holds_up_nobody_whose_turn_is_before() -> None:
    rig = Rig(shelf=Shelf(room=1), max_running=4)
    rig.add(3, A, tenant="flood", max_tokens=90)
    rig.step()
    starved = rig.add(3, B, tenant="flood")
    for _ in range(30):
        rig.add(3, tenant="flood", max_tokens=1)
    for _ in range(40):
        rig.step()
    assert not starved.block_table
    assert rig.scheduler.num_waiting > 1  # it is next of its own
    quiet = rig.add(3, tenant="quiet")
    rig.step()
    assert quiet.block_table


def test_a_prompt_is_charged_once_however_often_it_is_preempted() -> None:
    rig = Rig(num_blocks=9, max_batch_tokens=64, prefill_chunk=4)  # 8 usable
    rig.add(3, tenant="first", max_tokens=26)
    rig.step()
    again = rig.add(18, tenant="again", max_tokens=2)
    rig.run()
    charged = PROMPT_WEIGHT * 18 + OUTPUT_WEIGHT * 2
    assert rig.scheduler._waiting._served[again.client] / rig.scheduler._waiting._scale <= charged


def test_counters_fade_and_the_forgotten_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_queue, "_HALF_LIFE", 100)
    queue = FairQueue()
    queue.charge("early", 1000)
    queue.charge("late", 0.1)
    for _ in range(30):
        queue.charge("late", 100)
    assert queue.served("late") > queue.served("early")
    for _ in range(120):
        queue.charge("other", 100)
    assert queue.served("early") == queue.served("never seen") == 0
    assert list(queue._served) == ["other"]


def test_what_more_streams_add_to_a_chunk_is_not_for_who_was_served_far_more() -> None:
    rig = Rig(num_blocks=500, prefill_chunk=5, prefill_per_decode=2)
    start_streams(rig, 4)
    rig.add(1, max_tokens=99, tenant="quiet")
    rig.step()
    flood = rig.add(40, tenant="flood")
    step = rig.step()
    assert step is not None
    assert step[flood] == 5
    other = rig.add(40, tenant="other")
    step = rig.step()
    assert step is not None
    assert step[other] == 10
