"""An engine that computes nothing: a test delivers what its requests get."""

from types import SimpleNamespace
from typing import Any, cast

from sharelora_serve.engine.request import Request
from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.generation import GenerationContext
from sharelora_serve.server.mailbox import Mailbox
from sharelora_serve.server.metrics import Metrics

NO_ENGINE: Any = (None, None)
"""What create_app may be given: an engine is touched when the server starts, not before."""


class SilentEngine:
    """As much of an engine as requests meet."""

    base_name = "tiny"
    vocab_size = 256
    max_model_len = 64
    adapters = SimpleNamespace(tier=lambda _version: "disk")

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def submit(self, *requests: Request) -> None:
        self.requests += requests

    def abort(self, request_id: str) -> None:
        """Nothing is computed."""

    def stop(self) -> None:
        """Nothing runs."""


def silent_context(
    engine: SilentEngine, codec: TextCodec, mailbox: Mailbox | None = None, registry: Any = None
) -> GenerationContext:
    """What requests are answered with; without what a test does not need."""
    metrics = Metrics(cast(Any, engine), registry, num_named_adapters=9)
    return GenerationContext(cast(Any, engine), registry, codec, cast(Any, mailbox), metrics)


def outcomes(context: GenerationContext) -> dict[str, float]:
    """How requests ended and how many, as /metrics counts them."""
    (metric,) = context.metrics.requests.collect()
    return {
        sample.labels["outcome"]: sample.value
        for sample in metric.samples
        if sample.name.endswith("_total") and sample.value
    }
