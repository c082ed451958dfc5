"""Errors as HTTP answers: OpenAI's shape, one place for the status, the headers and the words."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request

from sharelora_serve.errors import AuthenticationError, InvalidRequestError, ServeError
from sharelora_serve.server.ascii_json import AsciiJSONResponse

INTERNAL_MESSAGE = (
    "The server failed while answering. Nothing in the request is known to be wrong: try again, "
    "and give the x-request-id header of this answer when you report it."
)

MAX_PROBLEMS = 20
"""Problems that one message lists; a client's bug may be in each of a thousand values."""


@dataclass(frozen=True, slots=True)
class ErrorContent:
    """What went wrong, for people (`message`) and for programs (`code`, `param`)."""

    message: str
    type: str
    param: str | None
    code: str


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """OpenAI's shape of an answer to what failed or was refused."""

    error: ErrorContent


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a request's body.

    param    the field at fault, such as `messages[0].role`; None for the body as a whole
    code     invalid_json | missing_required_parameter | unknown_parameter | invalid_type |
             invalid_value | unsupported_parameter | unsupported_value
    message  what was refused, what was expected and what to do, without the field's name
    """

    param: str | None
    code: str
    message: str

    def __str__(self) -> str:
        return self.message if self.param is None else f"{self.param}: {self.message}"


class BodyError(InvalidRequestError):
    """One or more fields of a request's body are refused; the message names MAX_PROBLEMS of them.

    `param` and `code` are the first problem's, since OpenAI's shape has room for one.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a refusal needs a reason"
        message = "\n".join(str(problem) for problem in problems[:MAX_PROBLEMS])
        if len(problems) > MAX_PROBLEMS:
            message += f"\nand {len(problems) - MAX_PROBLEMS} more"
        if len(problems) > 1:
            message = f"{len(problems)} problems in the request:\n{message}"
        super().__init__(message, param=problems[0].param)
        self.code = problems[0].code


def shortened(value: object, limit: int = 60) -> str:
    """`value` as a message quotes it: one line, at most `limit` characters."""
    # A huge value is cut before it is turned into text, so that quoting it costs nothing.
    text = repr(value[: limit + 1] if isinstance(value, str | list | bytes) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def error_content(error: Exception) -> dict[str, Any]:
    """The JSON body for `error`; what is not a ServeError is not shown to the client."""
    if isinstance(error, ServeError):
        message, kind, param, code = error.message, error.error_type, error.param, error.code
    else:
        message, kind, param, code = (
            INTERNAL_MESSAGE,
            ServeError.error_type,
            None,
            ServeError.code,
        )
    return _content(message, kind, param, code)


def error_response(error: Exception) -> AsciiJSONResponse:
    """The whole answer for `error`: Retry-After where waiting helps, WWW-Authenticate for a key."""
    status, headers = ServeError.status, {}
    if isinstance(error, ServeError):
        status = error.status
        if error.retry_after_seconds is not None:
            headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return AsciiJSONResponse(error_content(error), status_code=status, headers=headers)


async def answer_serve_error(_request: Request, error: Exception) -> AsciiJSONResponse:
    """Exception handler for ServeError and its kin."""
    return error_response(error)


async def answer_http_error(request: Request, error: Exception) -> AsciiJSONResponse:
    """Exception handler for unknown routes (404), wrong methods (405) and the like."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    path, method = shortened(request.url.path), request.method
    if error.status_code == 404:
        code, message = "not_found", f"There is no {method} {path} on this server."
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("allow", "another method")
        code, message = "method_not_allowed", f"{path} takes {allowed}, not {method}."
    else:
        code, message = "http_error", str(error.detail)
    content = _content(message, InvalidRequestError.error_type, None, code)
    return AsciiJSONResponse(content, status_code=error.status_code, headers=error.headers)


def _content(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return asdict(ErrorAnswer(ErrorContent(message, kind, param, code)))
