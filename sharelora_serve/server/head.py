"""An end to the heads of requests, which uvicorn would collect for as long as a client sends."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1024**2
"""Request line and headers together. Above what one read from the network may bring."""


class BoundedHeadProtocol(HttpToolsProtocol):
    """uvicorn's HTTP on one connection, which ends with a 400 when a head exceeds MAX_HEAD_BYTES.

    So it does for what may follow a body. It needs no API key to send either.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:  # noqa: ANN401 - uvicorn's
        super().__init__(*arguments, **settings)
        self._num_bytes = 0  # since the last that was of a body

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, but no more of a head than it may have."""
        self._num_bytes += len(data)
        if self._num_bytes > MAX_HEAD_BYTES:
            self.send_400_response(
                f"The request's line and headers exceed {MAX_HEAD_BYTES} bytes; send less."
            )
            return
        super().data_received(data)

    def on_body(self, body: bytes) -> None:
        """A piece of a body, whose bounds are the routes' concern."""
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Whatever comes next is another request's."""
        self._num_bytes = 0
        super().on_message_complete()
