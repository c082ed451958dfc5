"""An uploaded adapter: from the pieces of a multipart body to a folder that can be published."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sharelora_serve.errors import QueueFullError, RequestTimeoutError, StorageError
from sharelora_serve.server.body import body_pieces
from sharelora_serve.server.errors import BodyError, Problem, shortened

MAX_RECEIVING = 16
"""Uploads that may be under way at once; each may take --max-adapter-bytes of temporary disk."""

MAX_RECEIVING_OF_ONE = 8
"""Of them by one tenant, whose slow uploads would else keep all others out."""

MAX_SECONDS = 900.0
"""How long one upload may take to arrive: a client that sends a byte now and then holds a place."""

_FORM_BYTES = 64 * 1024  # of the body besides the file


class VersionForm(BaseModel):
    """What is sent for a new version of an adapter."""

    model_config = ConfigDict(extra="forbid")

    file: bytes = Field(description="A .safetensors file, a .zip or a .tar.gz of the adapter.")


class AdapterForm(VersionForm):
    """What is sent for a new adapter."""

    name: str


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client sent: the name, if it gave one, and the file, which is anonymous on disk."""

    name: str | None
    file: BinaryIO


class Receiver:
    """Receives uploads of limited number, size and duration. Used on the event loop alone."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._receiving: Counter[str | None] = Counter()  # uploads under way, by tenant

    @asynccontextmanager
    async def receive(self, request: Request, tenant: str | None) -> AsyncIterator[Upload]:
        """The upload in a multipart body; its file is gone when the block is left.

        tenant  who sends it; None is an admin, or anybody where there are no keys

        Raises BodyError for another body, RequestTooLargeError, RequestTimeoutError,
        QueueFullError when too many are under way, and StorageError when the disk is full.
        """
        if self._receiving.total() >= MAX_RECEIVING:
            raise QueueFullError(
                f"{MAX_RECEIVING} uploads are under way already; try again later",
                retry_after_seconds=5.0,
            )
        if tenant is not None and self._receiving[tenant] >= MAX_RECEIVING_OF_ONE:
            raise QueueFullError(
                f"{MAX_RECEIVING_OF_ONE} uploads of yours are under way already; wait for one",
                retry_after_seconds=5.0,
            )
        self._receiving[tenant] += 1
        try:
            form = await self._parse(request)
            try:
                yield _upload(form.multi_items())
            finally:
                await form.close()
        finally:
            self._receiving[tenant] -= 1

    async def _parse(self, request: Request) -> FormData:
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise _malformed(
                f"the body must be multipart/form-data with the fields name and file, not "
                f"{shortened(kind)}"
            )
        pieces = body_pieces(request, self._max_bytes + _FORM_BYTES, "--max-adapter-bytes")
        parser = MultiPartParser(request.headers, pieces, max_files=1, max_fields=1)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                return await parser.parse()
        except MultiPartException as error:
            raise _malformed(f"the body is no multipart/form-data: {error.message}") from None
        except UnicodeError:  # charset=undefined is a codec that refuses everything
            raise _malformed(
                "the charset of the body's fields cannot be read; leave it out"
            ) from None
        except TimeoutError:
            raise RequestTimeoutError(
                f"The upload took longer than {MAX_SECONDS:g} seconds; send it over a faster line."
            ) from None
        except OSError as error:
            raise StorageError(
                f"the upload could not be kept: {error.strerror}; whoever runs the server should "
                "look at its disk for temporary files"
            ) from None


def _upload(items: list[tuple[str, UploadFile | str]]) -> Upload:
    name, file = None, None
    for field, value in items:
        if field not in AdapterForm.model_fields:
            message = "Unrecognized field; the fields are name and file"
            raise BodyError([Problem(shortened(field), "unknown_parameter", message)])
        if field == "name" and isinstance(value, str):
            name = value
        elif field == "file" and isinstance(value, UploadFile):
            file = value.file
        else:
            wanted = "a text" if field == "name" else "a file, such as curl's -F file=@adapter.zip"
            raise BodyError([Problem(field, "invalid_type", f"should be {wanted}")])
    if file is None:
        raise BodyError([Problem("file", "missing_required_parameter", "must be given")])
    return Upload(name, file)


def _malformed(message: str) -> BodyError:
    return BodyError([Problem(None, "invalid_multipart", message)])
