"""OpenAI's routes: models, completions and chat completions."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.published import Published
from sharelora_serve.config import ServeConfig
from sharelora_serve.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelNotFoundError,
    ServeError,
)
from sharelora_serve.server.ascii_json import AsciiJSONResponse
from sharelora_serve.server.body import parse_body, read_body
from sharelora_serve.server.caller import Caller
from sharelora_serve.server.choice import ChoiceOptions
from sharelora_serve.server.delivery import GenerationResponse
from sharelora_serve.server.document import takes_json
from sharelora_serve.server.drain import Drain
from sharelora_serve.server.errors import BodyError
from sharelora_serve.server.generation import (
    Generation,
    GenerationContext,
    Prompt,
    version_text,
)
from sharelora_serve.server.logs import request_fields
from sharelora_serve.server.permissions import visible
from sharelora_serve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationFields,
)
from sharelora_serve.server.shapes import ChatShape, CompletionShape, Shape

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
        for path, answer, model in (
            ("/completions", self.complete, CompletionRequest),
            ("/chat/completions", self.chat, ChatCompletionRequest),
        ):
            self.router.add_api_route(
                path, answer, methods=["POST"], openapi_extra=takes_json(model)
            )

    async def list_models(self, request: Request) -> Response:
        """The base, then every adapter by name."""
        context: GenerationContext = request.app.state.context
        seen = visible(request.state.caller, context.registry)
        models = [self._base(context), *(self._model(context, n, seen[n]) for n in sorted(seen))]
        return AsciiJSONResponse({"object": "list", "data": models})

    async def show_model(self, request: Request, model: str) -> Response:
        """One of them."""
        context: GenerationContext = request.app.state.context
        if model == context.engine.base_name:
            return AsciiJSONResponse(self._base(context))
        caller: Caller = request.state.caller
        try:
            published = context.registry.find(*caller.candidates(model))
        except ModelNotFoundError:
            raise self._unknown(context, model) from None
        name = caller.shown(published.name)
        return AsciiJSONResponse(self._model(context, name, published))

    async def complete(self, request: Request) -> Response:
        """Continue one or several prompts."""
        return await self._generate(request, CompletionRequest, CompletionShape)

    async def chat(self, request: Request) -> Response:
        """Answer the last message of a conversation."""
        return await self._generate(request, ChatCompletionRequest, ChatShape)

    async def _generate(
        self, request: Request, model: type[GenerationFields], shape: type[Shape]
    ) -> Response:
        context: GenerationContext = request.app.state.context
        drain: Drain = request.app.state.drain
        try:
            content = await read_body(request, self._config.max_request_bytes)
            # After the body: the connection ends with this answer, and what a client has not sent
            # by then would take the answer with it.
            drain.check()
            # Parsing and tokenizing a long body take a while, in which other streams go on.
            body, adapter, prompts = await asyncio.to_thread(
                self._understand, context, request.state.caller, content, model
            )
        except ServeError:
            context.metrics.requests.labels(outcome="refused").inc()
            raise
        except ClientDisconnect:
            raise  # there was no request yet
        except Exception:
            context.metrics.requests.labels(outcome="error").inc()
            raise
        request.state.adapter_version = version_text(adapter)
        generation = Generation(
            context,
            request_fields=request_fields(request.scope["state"]),
            model=body.model,
            adapter=adapter,
            tenant=request.state.caller.tenant,
            prompts=prompts,
            num_choices=body.num_choices,
            options=ChoiceOptions(
                stop_strings=tuple(body.stop or ()),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special=body.skip_special_tokens is not False,
                min_tokens=body.min_tokens or 0,
            ),
            sampling=lambda prompt, choice: body.sampling(
                max_tokens=prompt.max_tokens, choice=choice
            ),
        )
        answer = shape(
            context.codec,
            body.model,
            has_logprobs=body.num_logprobs is not None,
            includes_usage=body.includes_usage,
        )
        return GenerationResponse(generation, answer, streams=bool(body.stream))

    def _understand(
        self,
        context: GenerationContext,
        caller: Caller,
        content: bytes,
        model: type[GenerationFields],
    ) -> tuple[GenerationFields, AdapterVersion | None, list[Prompt]]:
        """The request in a body, the version bound for it and its prompts; or what refuses it."""
        body = parse_body(content, model)
        adapter = self._bind(context, caller, body.model)
        try:
            return body, adapter, self._checked_prompts(context, body)
        except BaseException:
            if adapter is not None:
                context.registry.unbind(adapter)
            raise

    def _checked_prompts(self, context: GenerationContext, body: GenerationFields) -> list[Prompt]:
        problems = [
            *body.too_many(self._config.max_queue),
            *body.tokens_out_of_range(context.engine.vocab_size),
        ]
        if problems:
            raise BodyError(problems)
        return self._prompts(context, body)

    def _prompts(self, context: GenerationContext, body: GenerationFields) -> list[Prompt]:
        """Every prompt of the body as tokens, each with room for its answer."""
        codec = context.codec
        if isinstance(body, ChatCompletionRequest):
            token_ids = codec.encode_conversation(body.conversation())
            return [self._prompt(context, body, token_ids, None, "messages")]
        assert isinstance(body, CompletionRequest), "there are two routes"
        add_special_tokens = body.add_special_tokens is not False
        prompts = []
        given_prompts: Sequence[str | list[int]] = body.prompt
        for index, given in enumerate(given_prompts):
            param = f"prompt[{index}]" if len(body.prompt) > 1 else "prompt"
            if isinstance(given, str):
                token_ids = codec.encode(given, add_special_tokens=add_special_tokens)
            else:
                token_ids = given
            echo = None
            if body.echo:
                echo = (
                    given
                    if isinstance(given, str)
                    else codec.decode(
                        given, skip_special_tokens=body.skip_special_tokens is not False
                    )
                )
            prompts.append(self._prompt(context, body, token_ids, echo, param))
        return prompts

    def _prompt(
        self,
        context: GenerationContext,
        body: GenerationFields,
        token_ids: list[int],
        echo: str | None,
        param: str,
    ) -> Prompt:
        limit = context.engine.max_model_len
        if not token_ids:
            raise InvalidRequestError(f"{param}: is empty; give at least one token", param=param)
        room = limit - len(token_ids)
        if room < (1 if body.new_tokens is None else min(1, body.new_tokens)):
            raise ContextLengthError(
                f"{param}: has {len(token_ids)} tokens, but the model's context is {limit} tokens, "
                "prompt and answer together; shorten it",
                param=param,
            )
        wanted = body.new_tokens
        if wanted is None:
            is_chat = isinstance(body, ChatCompletionRequest)
            wanted = room if is_chat else min(DEFAULT_COMPLETION_TOKENS, room)
        elif wanted > room:
            raise ContextLengthError(
                f"{body.new_tokens_param}: {wanted} and the {len(token_ids)} tokens of {param} "
                f"exceed the model's context of {limit} tokens; ask for at most {room}",
                param=body.new_tokens_param,
            )
        return Prompt(token_ids, echo, wanted)

    def _bind(
        self, context: GenerationContext, caller: Caller, model: str
    ) -> AdapterVersion | None:
        """The version that `model` stands for, bound, or None for the base.

        ModelNotFoundError for neither, and for what is not the caller's.
        """
        if model == context.engine.base_name:
            return None
        try:
            return context.registry.bind(*caller.candidates(model))
        except ModelNotFoundError:
            raise self._unknown(context, model) from None

    def _unknown(self, context: GenerationContext, model: str) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"the model {model[:200]!r} does not exist: it is neither the base "
            f"{context.engine.base_name!r} nor an adapter; /v1/models lists what is served",
            param="model",
        )

    def _base(self, context: GenerationContext) -> dict[str, Any]:
        """The base as OpenAI lists a model, with vLLM's `root` and `parent`."""
        name = context.engine.base_name
        return {
            "id": name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "sharelora-serve",
            "root": name,
            "parent": None,
            "max_model_len": context.engine.max_model_len,
        }

    def _model(self, context: GenerationContext, name: str, published: Published) -> dict[str, Any]:
        """An adapter likewise."""
        return self._base(context) | {
            "id": name,
            "created": int(published.created_at),
            "owned_by": published.name.owner or "sharelora-serve",
            "root": published.version.digest,
            "parent": context.engine.base_name,
        }
