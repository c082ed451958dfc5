"""What every answer gets: its request id, its adapter's version, and a 500 that tells nothing."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sharelora_serve.server.errors import error_response
from sharelora_serve.server.logs import request_fields

logger = logging.getLogger(__name__)

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class RequestIdMiddleware:
    """Gives every request an id: the client's own `x-request-id` if it is sane, else a new one.

    The id is in `request.state.request_id` and in the answer's header; so is the version that a
    route wrote into `request.state.adapter_version`, as `x-adapter-version`.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        # A new dictionary: the one from the lifespan is shared by all requests.
        state = scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        is_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if "adapter_version" in state:
                    headers["x-adapter-version"] = state["adapter_version"]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            logger.info("a client left while sending its request", extra=request_fields(state))
        except Exception as error:
            logger.exception("a request failed", extra=request_fields(state))
            if is_started:
                raise  # all that is left is to break the connection, so that it looks broken
            await error_response(error)(scope, receive, send_with_headers)
