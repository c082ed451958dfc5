"""The answers of /v1/completions and /v1/chat/completions, whole and as a stream's chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from sharelora_serve.engine.request import FinishReason
from sharelora_serve.server.choice import Choice, PlacedLogprobs
from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.generation import Generation
from sharelora_serve.server.logprobs import chat_logprobs, completion_logprobs


class Shape(ABC):
    """How one request's answer is written. Plain dictionaries: a chunk is made for every token."""

    id_prefix: str
    object_name: str
    chunk_object_name: str
    _opens_with_role = False

    def __init__(
        self, codec: TextCodec, model: str, *, has_logprobs: bool, includes_usage: bool
    ) -> None:
        """`model` is the name that the client asked for."""
        self._codec = codec
        self._has_logprobs = has_logprobs
        self._includes_usage = includes_usage
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, generation: Generation) -> dict[str, Any]:
        """The whole answer, once every choice has finished."""
        return self._head | {
            "object": self.object_name,
            "choices": [self._choice(choice) for choice in generation.choices],
            "usage": usage(generation),
        }

    def chunks(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """What a choice has become since the last call; its last chunk has no text."""
        piece = choice.take()
        if piece.text or piece.logprobs:
            logprobs = self._logprobs(piece.logprobs) if self._has_logprobs else None
            yield self._chunk(self._delta(choice.index, piece.text, logprobs, None))
        if choice.finish_reason is not None:
            yield self._chunk(self._delta(choice.index, "", None, choice.finish_reason))

    def first_chunks(self, choices: Sequence[Choice]) -> Iterator[dict[str, Any]]:
        """What a stream begins with, before any text of its choices."""
        for choice in choices:
            if self._opens_with_role:
                delta = self._delta(choice.index, "", None, None)
                yield self._chunk(delta | {"delta": {"role": "assistant", "content": ""}})

    def last_chunks(self, generation: Generation) -> Iterator[dict[str, Any]]:
        """What a stream ends with, after every choice has finished."""
        if self._includes_usage:
            chunk = self._chunk({})
            yield chunk | {"choices": [], "usage": usage(generation)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head | {"object": self.chunk_object_name, "choices": [choice]}
        if self._includes_usage:
            chunk["usage"] = None  # OpenAI's: null on every chunk but the last
        return chunk

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]:
        """One item of a whole answer's `choices`."""

    @abstractmethod
    def _delta(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        """One item of a chunk's `choices`."""

    @abstractmethod
    def _logprobs(self, tokens: list[PlacedLogprobs]) -> dict[str, Any]:
        """Logprobs in the route's form."""


class CompletionShape(Shape):
    """/v1/completions."""

    id_prefix = "cmpl"
    object_name = chunk_object_name = "text_completion"

    def _choice(self, choice: Choice) -> dict[str, Any]:
        piece = choice.take()
        logprobs = self._logprobs(piece.logprobs) if self._has_logprobs else None
        return self._delta(choice.index, piece.text, logprobs, choice.finish_reason)

    def _delta(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[PlacedLogprobs]) -> dict[str, Any]:
        return completion_logprobs(tokens, self._codec)


class ChatShape(Shape):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    _opens_with_role = True

    def _choice(self, choice: Choice) -> dict[str, Any]:
        piece = choice.take()
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.logprobs) if self._has_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _delta(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text} if finish_reason is None else {},
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[PlacedLogprobs]) -> dict[str, Any]:
        return chat_logprobs(tokens, self._codec)


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts; each prompt counts once, whatever n is."""
    num_prompt, num_new = generation.num_prompt_tokens, generation.num_completion_tokens
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }
