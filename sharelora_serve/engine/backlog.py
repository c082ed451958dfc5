"""Which requests may wait: none for whom the queue is full, or whose first token would be late."""

import math
from collections import deque
from collections.abc import Sequence

from sharelora_serve.engine.request import Request
from sharelora_serve.errors import OverloadedError, QueueFullError

# Over how many admissions a client's pace is measured.
_PACE_ADMISSIONS = 16

_RETRY_SECONDS = 1.0


class _Line:
    """Requests of one client from their arrival to their admission."""

    def __init__(self, now: float) -> None:
        self.waiting: dict[str, Request] = {}  # by id, the newest last
        # When the last ones were admitted; first, when the client began to wait.
        self.moments = deque([now], maxlen=_PACE_ADMISSIONS + 1)

    def seconds_each(self, now: float) -> float:
        """How long one admission has taken lately; grows while there is none."""
        return (now - self.moments[0]) / max(1, len(self.moments) - 1)


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

    def add(self, requests: Sequence[Request], now: float) -> list[Request]:
        """Let requests of one client wait, all or none; returns those that make room for them.

        When the queue is full, the newest requests of the client with most of them waiting do,
        as long as that is another one and has more than this one then has: so nobody fills the
        queue for the others.
        Raises QueueFullError and OverloadedError, both with when to try again.
        """
        client = requests[0].client
        line = self._lines.get(client)
        if line is not None and self._max_seconds is not None:
            seconds = (len(line.waiting) + 1) * line.seconds_each(now)
            if seconds > self._max_seconds:
                raise OverloadedError(
                    f"{len(line.waiting)} of your requests are waiting already, so this one would "
                    f"start in about {math.ceil(seconds)} s, which is more than the "
                    f"{self._max_seconds:g} s that the server allows; send fewer at once, or try "
                    "again later",
                    retry_after_seconds=max(_RETRY_SECONDS, seconds - self._max_seconds),
                )
        dropped = self._room_for(len(requests), client)
        for request in dropped:
            self.remove(request)
        line = self._lines.setdefault(client, _Line(now))
        for request in requests:
            line.waiting[request.request_id] = request
        self._num_waiting += len(requests)
        return dropped

    def admit(self, request: Request, now: float) -> None:
        """A request has been admitted; of one that was before, and was preempted, nothing."""
        line = self._lines.get(request.client)
        if line is not None and request.request_id in line.waiting:
            line.moments.append(now)
            self.remove(request)

    def remove(self, request: Request) -> None:
        """A request waits no longer, if it did."""
        line = self._lines.get(request.client)
        if line is None or line.waiting.pop(request.request_id, None) is None:
            return
        self._num_waiting -= 1
        if not line.waiting:
            del self._lines[request.client]

    def _room_for(self, num_requests: int, client: str) -> list[Request]:
        """The requests without which so many more fit; QueueFullError if they may not."""
        num_missing = self._num_waiting + num_requests - self._max_queue
        if num_missing <= 0:
            return []
        longest = max(self._lines.items(), key=_length, default=None)
        own = self._lines.get(client)
        num_own = num_requests + (len(own.waiting) if own is not None else 0)
        if longest is None or len(longest[1].waiting) - num_missing < num_own:
            raise QueueFullError(
                f"{self._num_waiting} requests are waiting already, of {self._max_queue} that "
                "may; try again later",
                retry_after_seconds=_RETRY_SECONDS,
            )
        return list(longest[1].waiting.values())[-num_missing:]


def dropped_error(max_queue: int) -> QueueFullError:
    """What a request is told that made room for another client's."""
    return QueueFullError(
        f"the queue of {max_queue} requests is full, and most of them are yours; send fewer at "
        "once, or try again later",
        retry_after_seconds=_RETRY_SECONDS,
    )


def _length(named_line: tuple[str, _Line]) -> int:
    return len(named_line[1].waiting)
