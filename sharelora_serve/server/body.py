"""From the bytes of a request to a checked request, or to a refusal that names every problem."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterable
from typing import Any, NoReturn, Protocol, Self, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request

from sharelora_serve.errors import RequestTimeoutError, RequestTooLargeError
from sharelora_serve.server.ascii_json import AsciiJSONResponse
from sharelora_serve.server.errors import BodyError, Problem, error_response, shortened

DISCARDED_BYTES = 64 * 1024**2
DISCARD_SECONDS = 5.0
STALL_SECONDS = 20.0

MAX_FIELDS = 2_000
"""Fields of one JSON object; the largest there is a use for is a logit_bias."""
MAX_NAME_LENGTH = 100
"""Characters of a field's name that a message repeats."""


class CheckedModel(Protocol):
    """A pydantic model that also checks what involves more than one of its fields."""

    @classmethod
    def model_validate(cls, obj: Any, /) -> Self:  # noqa: ANN401 - JSON is any value
        """Raise ValidationError or return the model."""

    def disagreements(self) -> Iterable[Problem]:
        """Problems between fields that are right by themselves."""


Model = TypeVar("Model", bound=CheckedModel)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; RequestTooLargeError if it exceeds `max_bytes`."""
    body = bytearray()
    async for piece in body_pieces(request, max_bytes, "--max-request-bytes"):
        body += piece
    return bytes(body)


async def body_pieces(request: Request, max_bytes: int, setting: str) -> AsyncGenerator[bytes]:
    """The body as it arrives; RequestTooLargeError if it exceeds `max_bytes`, as `setting` says.

    What exceeds it is read on for a while and not kept: a client that is still sending when the
    connection closes sees a broken pipe, not the answer. Raises RequestTimeoutError when nothing
    arrives for STALL_SECONDS.
    """
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdecimal() and int(declared) > max_bytes
    num_bytes, stream = 0, request.stream()
    loop = asyncio.get_running_loop()
    discard_until = loop.time() + DISCARD_SECONDS
    while num_bytes <= max_bytes + DISCARDED_BYTES:
        patience = discard_until - loop.time() if is_too_large else STALL_SECONDS
        try:
            async with asyncio.timeout(patience):
                piece = await anext(stream, None)
        except TimeoutError:
            if is_too_large:
                break
            raise RequestTimeoutError(
                f"Nothing of the body arrived for {STALL_SECONDS:g} seconds; send it again."
            ) from None
        if piece is None:
            break
        num_bytes += len(piece)
        if num_bytes > max_bytes and not is_too_large:
            is_too_large, discard_until = True, loop.time() + DISCARD_SECONDS
        if not is_too_large:
            yield piece
    if is_too_large:
        raise RequestTooLargeError(
            f"The body is larger than {max_bytes} bytes, the most this server accepts; "
            f"send less, or raise {setting}."
        )


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises BodyError for anything else; for NaN, Infinity and a field given twice as well.
    """
    try:
        content = json.loads(
            body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_fields
        )
    except UnicodeDecodeError as error:
        raise _invalid_json(f"is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _invalid_json(f"is not JSON: {reason}") from None
    if not isinstance(content, dict):
        message = f"the body must be a JSON object, not {shortened(content)}"
        raise BodyError([Problem(None, "invalid_type", message)])
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python's parser would keep the last of fields of one name."""
    if len(pairs) > MAX_FIELDS:
        raise ValueError(f"an object has {len(pairs)} fields, more than {MAX_FIELDS}")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {shortened(twice)} is there twice")
    return fields


def _invalid_json(reason: str) -> BodyError:
    return BodyError([Problem(None, "invalid_json", f"the body {reason}")])


def parse_body(body: bytes, model: type[Model]) -> Model:
    """The request in `body`. Raises BodyError that lists everything wrong with it."""
    try:
        parsed = model.model_validate(parse_json(body))
    except ValidationError as error:
        raise BodyError([_problem(item) for item in error.errors()]) from None
    if problems := list(parsed.disagreements()):
        raise BodyError(problems)
    return parsed


async def answer_validation_error(_request: Request, error: Exception) -> AsciiJSONResponse:
    """Exception handler for what FastAPI finds wrong with a query's parameters."""
    assert isinstance(error, RequestValidationError), "registered for RequestValidationError"
    return error_response(
        BodyError([_problem({**item, "loc": item["loc"][1:]}) for item in error.errors()])
    )


OWN_CODES = frozenset({"unsupported_parameter", "unsupported_value", "invalid_type"})
"""Problem codes that validators of our own raise as they are."""


def _problem(item: Any) -> Problem:  # noqa: ANN401 - pydantic's ErrorDetails
    """One of pydantic's findings in OpenAI's words."""
    kind, param = item["type"], _path(item["loc"]) or None
    if kind == "missing":
        return Problem(param, "missing_required_parameter", "must be given")
    if kind == "extra_forbidden":
        message = "Unrecognized request argument supplied; this server has none of that name"
        return Problem(param, "unknown_parameter", message)
    if kind in OWN_CODES:
        return Problem(param, kind, item["msg"])
    message = re.sub(r"^(Value error, |\w+ (?=should ))| after validation", "", item["msg"])
    if kind in ("model_type", "dict_type"):
        message = "should be an object"
    if ", not" not in message:  # those of length give the length
        message += f", not {shortened(item['input'])}"
    is_wrong_type = kind.endswith("_type") or kind == "int_from_float"
    return Problem(param, "invalid_type" if is_wrong_type else "invalid_value", message)


def _path(location: tuple[int | str, ...]) -> str:
    """('messages', 0, 'role') as messages[0].role."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step[:MAX_NAME_LENGTH]}"
    return path.removeprefix(".")
