"""What a server that is to stop waits for."""

import time

import pytest

from sharelora_serve.errors import DrainingError
from sharelora_serve.server.drain import Drain


def test_a_server_takes_work_until_it_drains_and_stops_when_none_is_open() -> None:
    drain = Drain(seconds=60, delay_seconds=0)
    drain.check()
    with drain.work():
        assert not drain.is_over
        with drain.work():
            drain.begin()
            with pytest.raises(DrainingError):
                drain.check()
        assert not drain.is_over
    assert drain.is_over


def test_work_that_fails_is_not_open_any_more() -> None:
    drain = Drain(seconds=60, delay_seconds=0)
    with pytest.raises(ValueError, match="torn"), drain.work():
        raise ValueError("torn")
    drain.begin()
    assert drain.is_over


def test_work_has_its_time_and_no_more() -> None:
    drain = Drain(seconds=0.05, delay_seconds=0)
    with drain.work():
        drain.begin()
        assert not drain.is_over
        time.sleep(0.06)
        assert drain.is_over


def test_a_server_with_nothing_open_stays_for_the_delay() -> None:
    drain = Drain(seconds=60, delay_seconds=0.05)
    drain.begin()
    assert not drain.is_over
    time.sleep(0.06)
    assert drain.is_over
