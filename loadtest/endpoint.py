"""How a server is asked for a completion: OpenAI's way, or that of llama.cpp's own server."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, ClassVar

import httpx


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of a streamed answer brings.

    is_end      the answer is whole: it has as many tokens as were asked for
    num_tokens  of the whole answer, in the event that tells it
    """

    text: str = ""
    is_end: bool = False
    num_tokens: int | None = None


class Endpoint(ABC):
    """A route that streams greedy completions of a given length."""

    path: ClassVar[str]
    keeps_connections: ClassVar[bool] = True

    @abstractmethod
    def body(self, model: str, prompt: str, num_tokens: int) -> dict[str, Any]:
        """The JSON to post; RuntimeError if the server has no such model."""

    @abstractmethod
    def read(self, event: Mapping[str, Any]) -> Piece:
        """Take an event apart; RuntimeError if it tells of a failure."""


class OpenAiEndpoint(Endpoint):
    """/v1/completions, with vLLM's names for what OpenAI does not have."""

    path = "/v1/completions"

    def body(self, model: str, prompt: str, num_tokens: int) -> dict[str, Any]:
        """See the base class; the server itself refuses unknown models."""
        return {
            "model": model,
            "prompt": prompt,
            "temperature": 0,
            "max_tokens": num_tokens,
            "min_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, event: Mapping[str, Any]) -> Piece:
        """See the base class."""
        choices = event.get("choices")
        if not isinstance(choices, list):
            raise RuntimeError(f"the stream failed: {event}")
        usage = event.get("usage")
        num_tokens = usage["completion_tokens"] if usage else None
        if not choices:
            return Piece(num_tokens=num_tokens)
        (choice,) = choices
        return Piece(choice["text"], choice["finish_reason"] == "length", num_tokens)


class LlamaCppEndpoint(Endpoint):
    """/completion of llama.cpp's server, where a request names its adapters by number."""

    path = "/completion"
    keeps_connections = False  # it closes kept ones now and then, under a request that is sent

    def __init__(self, base: str, adapter_ids: Mapping[str, int]) -> None:
        """`base` is what requests without an adapter call the model."""
        self._adapters: dict[str, list[int]] = {base: []}
        self._adapters |= {name: [number] for name, number in adapter_ids.items()}

    @classmethod
    def of(cls, url: str, base: str) -> "LlamaCppEndpoint":
        """Ask a server for its adapters, which are called as their files; RuntimeError if not."""
        try:
            response = httpx.get(f"{url}/lora-adapters", trust_env=False).raise_for_status()
            listed = [(PurePosixPath(each["path"]).stem, each["id"]) for each in response.json()]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f"{url} is no server of llama.cpp: {error!r}") from None
        return cls(base, dict(listed))

    def body(self, model: str, prompt: str, num_tokens: int) -> dict[str, Any]:
        """See the base class."""
        if model not in self._adapters:
            raise RuntimeError(f"the server has no adapter {model!r}")
        return {
            "prompt": prompt,
            "n_predict": num_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "cache_prompt": False,
            "lora": [{"id": number, "scale": 1.0} for number in self._adapters[model]],
        }

    def read(self, event: Mapping[str, Any]) -> Piece:
        """See the base class."""
        if "content" not in event:
            raise RuntimeError(f"the stream failed: {event}")
        is_end = bool(event["stop"])
        is_whole = is_end and event.get("stop_type") == "limit"
        return Piece(event["content"], is_whole, event["tokens_predicted"] if is_end else None)
