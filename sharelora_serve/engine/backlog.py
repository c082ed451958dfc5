"""Which requests may wait: none that the queue has no room for, or that would start too late."""

import math
from collections import deque
from collections.abc import Sequence

from sharelora_serve.engine.request import Request
from sharelora_serve.errors import OverloadedError, QueueFullError

# Over how many admissions a client's pace is measured, and from how many on it is known.
_PACE_ADMISSIONS = 16
_LEAST_ADMISSIONS = 4

_RETRY_SECONDS = 1.0


class _Line:
    """Requests of one client from their arrival to their admission."""

    def __init__(self, now: float) -> None:
        self.groups: list[list[Request]] = []  # as they came, of which some still wait
        self.waiting: dict[str, list[Request]] = {}  # a request's group, by its id
        self.seconds: deque[float] = deque(maxlen=_PACE_ADMISSIONS)
        self.last = now  # admission, or when the client began to wait

    def note_admission(self, request: Request, now: float) -> None:
        """Measure how long a place took: not since before the request was there to take it."""
        self.seconds.append(now - max(self.last, request.arrived_at))
        self.last = now

    def seconds_until(self, num_requests: int, now: float) -> float:
        """When so many more would all have started, by the pace of the last ones."""
        standstill = now - self.last
        if len(self.seconds) < _LEAST_ADMISSIONS:
            return standstill
        each = sum(self.seconds) / len(self.seconds)
        return max(standstill, (len(self.waiting) + num_requests) * each)


class Backlog:
    """Who waits to be admitted. Not thread-safe: the engine calls it under its lock.

    Times are time.monotonic(), in seconds.
    """

    def __init__(self, max_queue: int, max_first_token_seconds: float | None) -> None:
        """Limits: requests that wait, and for how long one may have to; None is for ever."""
        self._max_queue = max_queue
        self._max_seconds = max_first_token_seconds
        self._lines: dict[str, _Line] = {}  # by client; none is empty
        self._num_waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    def add(self, requests: Sequence[Request], now: float) -> list[list[Request]]:
        """Let requests of one client wait, all or none; returns those that make room for them.

        When the queue is full these are the newest of the client with most waiting, as long as it
        then still has more than this one: so nobody fills the queue for the others. What was added
        together goes together, and stays if any of it was admitted.
        Raises QueueFullError and OverloadedError, both with when to try again.
        """
        client = requests[0].client
        line = self._lines.get(client)
        if line is not None and self._max_seconds is not None:
            seconds = line.seconds_until(len(requests), now)
            if seconds > self._max_seconds:
                raise OverloadedError(
                    f"{len(line.waiting)} requests like this are waiting already, so it would "
                    f"start in about {math.ceil(seconds)} s, which is more than the "
                    f"{self._max_seconds:g} s that the server allows; send fewer at once, or try "
                    "again later",
                    retry_after_seconds=max(_RETRY_SECONDS, seconds - self._max_seconds),
                )
        dropped = self._room_for(len(requests), client)
        for request in (request for group in dropped for request in group):
            self.remove(request)
        line = self._lines.setdefault(client, _Line(now))
        group = list(requests)
        line.groups.append(group)
        line.waiting |= {request.request_id: group for request in group}
        self._num_waiting += len(requests)
        return dropped

    def admit(self, request: Request, now: float) -> None:
        """A request has been admitted; of one that was before, and was preempted, nothing."""
        line = self._lines.get(request.client)
        if line is not None and request.request_id in line.waiting:
            line.note_admission(request, now)
            self.remove(request)

    def remove(self, request: Request) -> None:
        """A request waits no longer, if it did."""
        line = self._lines.get(request.client)
        group = None if line is None else line.waiting.pop(request.request_id, None)
        if line is None or group is None:
            return
        self._num_waiting -= 1
        if not any(each.request_id in line.waiting for each in group):
            line.groups.remove(group)
        if not line.waiting:
            del self._lines[request.client]

    def _room_for(self, num_requests: int, client: str) -> list[list[Request]]:
        """The groups without which so many more fit; QueueFullError if they may not."""
        num_missing = self._num_waiting + num_requests - self._max_queue
        if num_missing <= 0:
            return []
        own = self._lines.get(client)
        num_own = num_requests + (len(own.waiting) if own is not None else 0)
        longest = max(self._lines.values(), key=_length, default=None)
        dropped: list[list[Request]] = []
        num_dropped = 0
        if longest is not None and longest is not own:
            for group in reversed(longest.groups):
                if num_dropped < num_missing and all(
                    r.request_id in longest.waiting for r in group
                ):
                    dropped.append(group)
                    num_dropped += len(group)
        if longest is None or num_dropped < num_missing or _length(longest) - num_dropped < num_own:
            raise QueueFullError(
                f"{self._num_waiting} requests are waiting already, of {self._max_queue} that "
                "may; try again later",
                retry_after_seconds=_RETRY_SECONDS,
            )
        return dropped


def dropped_error(max_queue: int) -> QueueFullError:
    """What a request is told that made room for another client's."""
    return QueueFullError(
        f"the queue of {max_queue} requests is full, and nobody has more waiting in it than you; "
        "send fewer at once, or try again later",
        retry_after_seconds=_RETRY_SECONDS,
    )


def _length(line: _Line) -> int:
    return len(line.waiting)
