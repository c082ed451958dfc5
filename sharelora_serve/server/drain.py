"""Stopping without hurting anybody: what is open ends, what is new is sent elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sharelora_serve.errors import DrainingError

logger = logging.getLogger(__name__)

UNCOUNTED_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Requests about the server itself, for which it need not go on."""


class Drain:
    """The open work of a server, and whether it takes more. Lives on the event loop.

    Work is whatever should end before the server does; a request is counted by DrainMiddleware.
    """

    def __init__(self, seconds: float, delay_seconds: float) -> None:
        """Once begun it lasts `delay_seconds` at least and `seconds` at most."""
        self.num_open = 0
        self._seconds = seconds
        self._delay_seconds = delay_seconds
        self._began_at: float | None = None  # time.monotonic()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Work that the server waits for before it stops."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def begin(self) -> None:
        """Take nothing new from now on."""
        assert self._began_at is None, "a server is drained once"
        self._began_at = time.monotonic()
        logger.info(
            "draining: new requests are refused, %d open ones have %g seconds; a second signal "
            "ends the server at once",
            self.num_open,
            self._seconds,
        )

    @property
    def has_begun(self) -> bool:
        """Whether the server is about to stop."""
        return self._began_at is not None

    @property
    def is_over(self) -> bool:
        """Whether the server may stop now: nothing is open any more, or the time is up."""
        if self._began_at is None:
            return False
        seconds = time.monotonic() - self._began_at
        return seconds >= (self._seconds if self.num_open else self._delay_seconds)

    def check(self) -> None:
        """Raise DrainingError once the server takes nothing new."""
        if self.has_begun:
            raise DrainingError(
                "the server is stopping and takes nothing new; try another server",
                retry_after_seconds=1.0,
            )


class DrainMiddleware:
    """Counts every request as open work, those to UNCOUNTED_PATHS excepted.

    While the server drains, answers end their connections: a client or a load balancer that kept
    one would only send its next request here again.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        """Wrap `app`."""
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_part(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.has_begun:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        if scope["path"] in UNCOUNTED_PATHS:
            await self._app(scope, receive, send_and_part)
            return
        with self._drain.work():
            await self._app(scope, receive, send_and_part)
