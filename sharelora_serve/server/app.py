"""The application: routes, handlers of errors, and the engine's life within the server's."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from sharelora_serve import __version__
from sharelora_serve.config import ServeConfig
from sharelora_serve.engine.load import Loaded
from sharelora_serve.errors import EngineStoppedError, ServeError
from sharelora_serve.server.adapters import AdapterRoutes
from sharelora_serve.server.auth import AuthenticationMiddleware
from sharelora_serve.server.body import answer_validation_error
from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.drain import Drain, DrainMiddleware
from sharelora_serve.server.errors import ErrorAnswer, answer_http_error, answer_serve_error
from sharelora_serve.server.generation import GenerationContext
from sharelora_serve.server.keys import KeyFile
from sharelora_serve.server.mailbox import Mailbox
from sharelora_serve.server.metrics import Metrics
from sharelora_serve.server.middleware import RequestIdMiddleware
from sharelora_serve.server.openai import OpenAIRoutes
from sharelora_serve.server.operations import router as operations_router


def create_app(loaded: Loaded, config: ServeConfig) -> FastAPI:
    """The HTTP application around an engine, which it starts and stops.

    Until the engine is warm the server does not accept connections; /ready tells when it stops.
    Its `state.drain` is the Drain that whoever stops the server begins, and `state.stop_changes`
    is to be called when that is over.
    Raises ConfigurationError if the file of API keys cannot be used.
    """

    engine, registry = loaded

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.context = GenerationContext(
            engine=engine,
            registry=registry,
            codec=TextCodec(engine.tokenizer),
            mailbox=Mailbox(asyncio.get_running_loop()),
            metrics=Metrics(engine, registry, config.metrics_adapters),
        )
        try:
            await asyncio.to_thread(engine.start)
            if not engine.is_ready:
                raise EngineStoppedError("the engine failed while it warmed up; its log says why")
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    refusals: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorAnswer, "description": "Refused; the message says why."},
        "5XX": {"model": ErrorAnswer, "description": "Failed; nothing is wrong with the request."},
    }
    app = FastAPI(
        title="ShareLoRA Serve",
        version=__version__,
        lifespan=lifespan,
        responses=refusals,
        redirect_slashes=False,  # to where a proxy's clients may not go, and without TLS
    )
    app.state.drain = Drain(config.drain_seconds, config.drain_delay_seconds)
    app.include_router(OpenAIRoutes(config, int(time.time())).router)
    adapter_routes = AdapterRoutes(config)
    app.state.stop_changes = adapter_routes.stop
    app.include_router(adapter_routes.router)
    app.include_router(operations_router)
    app.add_exception_handler(ServeError, answer_serve_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    # The last one added is the outermost: a refused request has its id too.
    app.add_middleware(
        AuthenticationMiddleware, keys=KeyFile(config.api_keys) if config.api_keys else None
    )
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(DrainMiddleware, drain=app.state.drain)
    return app
