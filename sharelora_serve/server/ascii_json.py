"""JSON as this server writes it."""

import json
from collections.abc import Iterator
from typing import Any

from starlette.responses import JSONResponse

# Of an answer: itself, its choices, one, its logprobs, their list. Below, one token's.
_NUM_LEVELS = 5


def dump(content: Any) -> bytes:  # noqa: ANN401 - JSON is any value
    """Compact JSON in ASCII.

    Escaping everything else costs a few bytes and spares clients: some split a stream's lines at
    U+2028 and its like, and half a surrogate pair that a message repeats could not be encoded.
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


def dump_large(content: Any) -> bytes:  # noqa: ANN401 - JSON is any value
    """The same as `dump`, for a worker thread: it lets other threads run in between.

    json's encoder keeps the GIL from its first byte to its last, for seconds where an answer has
    the logprobs of many tokens.
    """
    return b"".join(_pieces(content, _NUM_LEVELS))


def _pieces(content: Any, num_levels: int) -> Iterator[bytes]:  # noqa: ANN401
    if num_levels == 0 or not content or not isinstance(content, dict | list):
        yield dump(content)
        return
    is_object = isinstance(content, dict)
    separator = b"{" if is_object else b"["
    for item in content:
        yield separator
        separator = b","
        if is_object:
            yield dump(item) + b":"
        yield from _pieces(content[item] if is_object else item, num_levels - 1)
    yield b"}" if is_object else b"]"


class AsciiJSONResponse(JSONResponse):
    """An answer in JSON."""

    def render(self, content: Any) -> bytes:  # noqa: ANN401 - JSON is any value
        """The body."""
        return dump(content)
