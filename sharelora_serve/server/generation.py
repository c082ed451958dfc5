"""One HTTP request's generations in the engine: submitted together, followed, ended together."""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.engine.engine import Engine
from sharelora_serve.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from sharelora_serve.errors import ServeError
from sharelora_serve.server.choice import Choice, ChoiceOptions
from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.mailbox import Mailbox
from sharelora_serve.server.metrics import Metrics
from sharelora_serve.server.usage import Counts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is generated from: token ids, and the prompt's text where the answer repeats it."""

    token_ids: list[int]
    echo: str | None
    max_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationContext:
    """What every generation of a server works with."""

    engine: Engine
    registry: AdapterRegistry
    codec: TextCodec
    mailbox: Mailbox
    metrics: Metrics


class Generation:
    """All choices of one HTTP request. Lives on the event loop; `close` must be called once."""

    def __init__(
        self,
        context: GenerationContext,
        *,
        request_fields: dict[str, object],
        model: str,
        adapter: AdapterVersion | None,
        tenant: str | None,
        prompts: Sequence[Prompt],
        num_choices: int,
        options: ChoiceOptions,
        sampling: Callable[[Prompt, int], SamplingParams],
    ) -> None:
        """`adapter` was bound for this and is let go of by `close`; None is the base.

        `sampling(prompt, i)` is what the engine is asked for choice i of a prompt.

        `request_fields` name the HTTP request in the log; the engine's ids are new ones, since a
        client may send the same x-request-id twice.
        """
        self.model = model
        self.is_cancelled = False  # whether the client has gone
        self.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._context = context
        self._request_fields = request_fields
        self._adapter = adapter
        self._arrived_at = time.monotonic()
        self._num_choices = num_choices
        self._account = context.metrics.usage.account(
            context.engine.base_name if adapter is None else adapter.name
        )
        self._news = asyncio.Event()
        self._requests: list[Request] = []
        self.choices: list[Choice] = []
        unique = uuid.uuid4().hex
        for prompt in prompts:
            for index in range(num_choices):
                choice = Choice(
                    len(self.choices), context.codec, prompt.token_ids, options, echo=prompt.echo
                )
                request = Request(
                    request_id=f"{unique}-{choice.index}",
                    adapter=adapter,
                    prompt_ids=list(prompt.token_ids),
                    sampling=sampling(prompt, index),
                    arrived_at=self._arrived_at,
                    deliver=context.mailbox.deliver_to(self._receiver(choice)),
                    tenant=tenant,
                )
                self.choices.append(choice)
                self._requests.append(request)

    def _receiver(self, choice: Choice) -> Callable[[RequestOutput], None]:
        metrics, account = self._context.metrics, self._account

        def receive(output: RequestOutput) -> None:
            num_before = choice.num_tokens
            choice.accept(output)
            account.add(Counts(completion_tokens=choice.num_tokens - num_before))
            if num_before == 0 and choice.first_token_at is not None:
                metrics.time_to_first_token.observe(choice.first_token_at - self._arrived_at)
            if choice.finish_reason is not None and output.finish_reason is None:
                # A stop string, which the engine knows nothing of.
                self._context.engine.abort(self._requests[choice.index].request_id)
            self._news.set()

        return receive

    def submit(self) -> None:
        """Queue every choice. Raises what Engine.submit raises; `close` then frees the others."""
        self._context.engine.submit(*self._requests)
        self._account.add(Counts(requests=1, prompt_tokens=self.num_prompt_tokens))

    async def wait(self) -> None:
        """Wait until a choice has something new or the client has gone.

        Raises the error of the first choice that failed, which ends the whole request.
        """
        await self._news.wait()
        self._news.clear()
        if not self.is_cancelled:
            self.check()

    def check(self) -> None:
        """Raise the error of the first choice that failed, if one has."""
        for choice in self.choices:
            if choice.finish_reason is FinishReason.ERROR:
                assert choice.error is not None, "a failed request says why"
                raise choice.error

    def cancel(self) -> None:
        """The client has gone: free everything at once, and wake whoever waits for news."""
        self.is_cancelled = True
        self._abort_unfinished()
        self._news.set()

    def close(self, error: Exception | None) -> None:
        """Free what is still running, count the request and log it. `error` is why it failed."""
        if not self.is_cancelled:
            self._abort_unfinished()
        if self._adapter is not None:
            self._context.registry.unbind(self._adapter)
        seconds = time.monotonic() - self._arrived_at
        metrics, outcome = self._context.metrics, self._outcome(error)
        metrics.requests.labels(outcome=outcome).inc()
        metrics.request_time.observe(seconds)
        first_token_at = None
        for choice in self.choices:
            if choice.first_token_at is None or choice.last_token_at is None:
                continue
            if choice.num_tokens > 1:
                decoding = choice.last_token_at - choice.first_token_at
                metrics.time_per_output_token.observe(decoding / (choice.num_tokens - 1))
            first_token_at = min(choice.first_token_at, first_token_at or choice.first_token_at)
        first_token_seconds = None if first_token_at is None else first_token_at - self._arrived_at
        logger.info(
            "generation ended",
            extra={
                **self.log_fields,
                "outcome": outcome,
                "error": None if error is None else getattr(error, "code", ServeError.code),
                "first_token_seconds": first_token_seconds,
                "total_seconds": seconds,
            },
        )

    @property
    def log_fields(self) -> dict[str, object]:
        """What a line of the log says about this generation, of whatever is known by now."""
        return {
            **self._request_fields,
            "model": self.model,
            "version": version_text(self._adapter),
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
        }

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_completion_tokens(self) -> int:
        """New tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held, for the first choice of each prompt."""
        return sum(choice.num_cached_tokens for choice in self.choices[:: self._num_choices])

    def _abort_unfinished(self) -> None:
        for choice, request in zip(self.choices, self._requests, strict=True):
            if choice.finish_reason is None:
                self._context.engine.abort(request.request_id)

    def _outcome(self, error: Exception | None) -> str:
        if error is not None:
            is_refused = isinstance(error, ServeError) and error.status < 500
            return "refused" if is_refused else "error"
        if not self.is_finished:
            return "abort"
        reasons = {choice.finish_reason for choice in self.choices}
        return "length" if FinishReason.LENGTH in reasons else "stop"


def version_text(adapter: AdapterVersion | None) -> str:
    """The version as the header x-adapter-version and the log show it."""
    return "base" if adapter is None else adapter.digest
