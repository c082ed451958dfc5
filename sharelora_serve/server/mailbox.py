"""The way from the engine's thread to the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable

from sharelora_serve.engine.request import RequestOutput

Receiver = Callable[[RequestOutput], None]


class Mailbox:
    """Hands outputs over to the event loop, waking it once for all that a step brings.

    Waking the loop costs a system call. With 64 running streams every step delivers 64 outputs;
    those that arrive before the loop has woken are handled in the same turn.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outputs: deque[tuple[Receiver, RequestOutput]] = deque()
        self._is_waking = False

    def deliver_to(self, receiver: Receiver) -> Receiver:
        """A function for any thread that has `receiver` called on the event loop, in order."""

        def deliver(output: RequestOutput) -> None:
            self._outputs.append((receiver, output))
            if not self._is_waking:
                self._is_waking = True
                self._wake()

        return deliver

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            # The loop is closed: the server has gone, and with it everyone who could listen.
            self._outputs.clear()

    def _drain(self) -> None:
        # Reset first: what is appended from here on is either seen below or wakes the loop again.
        self._is_waking = False
        while self._outputs:
            receiver, output = self._outputs.popleft()
            receiver(output)
