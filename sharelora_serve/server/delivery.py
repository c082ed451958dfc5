"""Sending an answer while the engine makes it, and stopping the engine when nobody listens."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sharelora_serve.errors import ServeError
from sharelora_serve.server.ascii_json import AsciiJSONResponse, dump, dump_large
from sharelora_serve.server.errors import error_content
from sharelora_serve.server.generation import Generation
from sharelora_serve.server.shapes import Shape

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class GenerationResponse(Response):
    """The answer to a generation: one JSON object, or server-sent events.

    Nothing is sent before the engine's first answer, so that what fails before the first token
    (a full queue, an adapter that cannot be loaded) has its own status and not a broken stream's.
    A client that goes away ends the generation at once, whether it streams or not.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, shape: Shape, *, streams: bool) -> None:
        """Nothing is submitted before the response is called."""
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._shape = shape
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the generation and send its answer; raises what failed before anything was sent."""
        generation = self._generation
        watcher = asyncio.create_task(self._watch(receive))
        failure: Exception | None = None
        try:
            generation.submit()
            await generation.wait()
            if self._streams:
                failure = await self._send_events(send)
            else:
                while not (generation.is_finished or generation.is_cancelled):
                    await generation.wait()
                if not generation.is_cancelled:
                    # The logprobs of a long answer take a while, in which other streams go on.
                    body = await asyncio.to_thread(self._whole_answer)
                    answer = Response(body, media_type=AsciiJSONResponse.media_type)
                    await answer(scope, receive, send)
        except Exception as error:
            failure = error
            raise
        finally:
            watcher.cancel()
            generation.close(failure)

    def _whole_answer(self) -> bytes:
        """In a worker thread: whatever the engine still delivers, a finished choice takes none."""
        return dump_large(self._shape.answer(self._generation))

    async def _watch(self, receive: Receive) -> None:
        """Cancel the generation when the client disconnects."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._generation.cancel()

    async def _send_events(self, send: Send) -> Exception | None:
        """Send the stream. The status is out, so what fails now is an event, and is returned."""
        generation, shape = self._generation, self._shape
        if generation.is_cancelled:
            return None
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events = _events(shape.first_chunks(generation.choices))
        running = list(generation.choices)
        try:
            generation.check()  # a choice may have failed while the client took in the start
            while True:
                # One write for all that is ready: under load that is several choices' chunks.
                for choice in [choice for choice in running if choice.has_news]:
                    events += _events(shape.chunks(choice))
                    if choice.finish_reason is not None:
                        running.remove(choice)
                if not running:
                    break
                if events:
                    await _send_body(send, events, more=True)
                    events = b""
                await generation.wait()
                if generation.is_cancelled:
                    return None
        except Exception as error:
            is_bug = not isinstance(error, ServeError)
            logger.warning(
                "a stream failed after its start: %s",
                error,
                exc_info=is_bug,
                extra=generation.log_fields,
            )
            await _send_body(send, _events([error_content(error)]) + DONE, more=False)
            return error
        await _send_body(send, events + _events(shape.last_chunks(generation)) + DONE, more=False)
        return None


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _events(chunks: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + dump(chunk) + b"\n\n" for chunk in chunks)
