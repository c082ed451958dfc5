"""OpenAI's routes: models, completions and chat completions."""

import asyncio
import logging
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.config import ServeConfig
from sharelora_serve.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError, ServeError
from sharelora_serve.server.ascii_json import AsciiJSONResponse
from sharelora_serve.server.body import parse_body, read_body
from sharelora_serve.server.choice import ChoiceOptions
from sharelora_serve.server.delivery import GenerationResponse
from sharelora_serve.server.errors import BodyError
from sharelora_serve.server.generation import (
    Generation,
    GenerationContext,
    Prompt,
    version_text,
)
from sharelora_serve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)
from sharelora_serve.server.shapes import ChatShape, CompletionShape, Shape

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""New tokens of /v1/completions where the client does not say, as OpenAI's."""


class OpenAIRoutes:
    """The routes under /v1 of one server."""

    def __init__(self, config: ServeConfig, started_at: int) -> None:
        """`started_at`, Unix seconds, is the `created` of every model."""
        self._config = config
        self._started_at = started_at
        self.router = APIRouter(prefix="/v1")
        self.router.add_api_route("/models", self.list_models, methods=["GET"])
        self.router.add_api_route("/models/{model:path}", self.show_model, methods=["GET"])
        self.router.add_api_route("/completions", self.complete, methods=["POST"])
        self.router.add_api_route("/chat/completions", self.chat, methods=["POST"])

    async def list_models(self, request: Request) -> Response:
        """The base, then every adapter by name."""
        context: GenerationContext = request.app.state.context
        versions = sorted(context.engine.adapters.versions(), key=lambda version: version.name)
        models = [self._model(context, version) for version in (None, *versions)]
        return AsciiJSONResponse({"object": "list", "data": models})

    async def show_model(self, request: Request, model: str) -> Response:
        """One of them."""
        context: GenerationContext = request.app.state.context
        return AsciiJSONResponse(self._model(context, self._resolve(context, model)))

    async def complete(self, request: Request) -> Response:
        """Continue one or several prompts."""
        return await self._generate(request, CompletionRequest, CompletionShape)

    async def chat(self, request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await self._generate(request, ChatCompletionRequest, ChatShape)
