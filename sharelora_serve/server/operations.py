"""The routes for whoever runs the server: health, readiness, version, metrics."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sharelora_serve import __version__
from sharelora_serve.errors import EngineStoppedError
from sharelora_serve.server.ascii_json import AsciiJSONResponse
from sharelora_serve.server.drain import Drain
from sharelora_serve.server.generation import GenerationContext

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while the engine's thread runs: restart the server when it does not."""
    context: GenerationContext = request.app.state.context
    if not context.engine.is_alive:
        raise EngineStoppedError("the engine's thread has ended; restart the server")
    return AsciiJSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken: send traffic elsewhere when it is not."""
    drain: Drain = request.app.state.drain
    drain.check()
    context: GenerationContext = request.app.state.context
    if not context.engine.is_ready:
        raise EngineStoppedError("the engine has stopped; its log says why")
    return AsciiJSONResponse({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    """The server's version."""
    return AsciiJSONResponse({"version": __version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Every figure, in Prometheus' text format."""
    context: GenerationContext = request.app.state.context
    return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)
