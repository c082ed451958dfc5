"""Which requests need an API key, and the refusal of those that lack it."""

import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sharelora_serve.errors import AuthenticationError, PermissionDeniedError
from sharelora_serve.server.caller import ANONYMOUS_ADMIN, Caller, require_admin
from sharelora_serve.server.errors import error_response
from sharelora_serve.server.keys import KeyFile

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What an orchestrator asks, which has no key."""

ADMIN_PATHS = frozenset({"/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""What tells of all tenants, or of routes that are not theirs."""


class AuthenticationMiddleware:
    """Finds out who asks, before anything else of a request is looked at or read.

    The Caller is in `request.state.caller` of every route outside OPEN_PATHS. A request that is
    refused never reaches a route, known or not.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile | None) -> None:
        """Wrap `app`; without `keys` everybody is an admin."""
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or answer it with a 401 or 403."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._authenticate(scope)
            if scope["path"] in ADMIN_PATHS:
                require_admin(caller)
        except (AuthenticationError, PermissionDeniedError) as error:
            logger.info("request %s refused: %s", scope["state"]["request_id"], error.code)
            await error_response(error)(scope, receive, send)
            return
        scope["state"]["caller"] = caller
        await self._app(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> Caller:
        if self._keys is None:
            return ANONYMOUS_ADMIN
        await self._keys.follow()
        # Joined as HTTP has it, so that of two headers neither is chosen: together they are no key.
        headers = Headers(scope=scope).getlist("authorization")
        return self._keys.authenticate(", ".join(headers) if headers else None)
