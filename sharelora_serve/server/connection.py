"""Ends to what a client may send that no route asks for, which uvicorn reads for ever.

It needs no API key to send it: it comes before one is looked at, or after the refusal.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1024**2
"""Request line and headers, or trailers. Above what one read from the network may bring."""

MAX_UNREAD_BYTES = 64 * 1024**2
"""Of a body that goes on when its request has been answered: enough for a client to notice."""


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which ends a connection that exceeds either; a long head with a 400."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(*arguments, **settings)
        self._num_head_bytes = 0  # at most: since the last that was of a body
        self._num_unread_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, but no more of a head than it may have."""
        self._num_head_bytes += len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(
                f"The request's line and headers exceed {MAX_HEAD_BYTES} bytes; send less."
            )
            return
        super().data_received(data)

    def on_body(self, body: bytes) -> None:
        """A piece of a body, which its route bounds until it has answered."""
        self._num_head_bytes = 0
        if self.cycle.response_complete:
            self._num_unread_bytes += len(body)
            if self._num_unread_bytes > MAX_UNREAD_BYTES:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Whatever comes next is another request's."""
        self._num_head_bytes = self._num_unread_bytes = 0
        super().on_message_complete()
