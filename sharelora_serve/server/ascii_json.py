"""JSON as this server writes it."""

import json
from typing import Any

from starlette.responses import JSONResponse


def dump(content: Any) -> bytes:  # noqa: ANN401 - JSON is any value
    """Compact JSON in ASCII.

    Escaping everything else costs a few bytes and spares clients: some split a stream's lines at
    U+2028 and its like, and half a surrogate pair that a message repeats could not be encoded.
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class AsciiJSONResponse(JSONResponse):
    """An answer in JSON."""

    def render(self, content: Any) -> bytes:  # noqa: ANN401 - JSON is any value
        """The body."""
        return dump(content)
