"""Logprobs in the form of each route."""

from collections.abc import Sequence
from typing import Any

from sharelora_serve.server.choice import PlacedLogprobs
from sharelora_serve.server.codec import TextCodec

LEAST_LOGPROB = -9999.0
"""Shown for tokens that cannot come, as OpenAI does: JSON has no infinity."""


def completion_logprobs(tokens: Sequence[PlacedLogprobs], codec: TextCodec) -> dict[str, Any]:
    """The lists of /v1/completions, one item per token.

    `top_logprobs` holds the token's own besides the most likely ones', so up to one more than was
    asked for. Both are None for the first token of an echoed prompt.
    """
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        item = token.logprobs
        if item is None:
            tops.append(None)
            continue
        top = {codec.token_text(other): _finite(logprob) for other, logprob in item.top}
        tops.append(top | {codec.token_text(item.token_id): _finite(item.logprob)})
    return {
        "text_offset": [token.text_offset for token in tokens],
        "token_logprobs": [
            None if token.logprobs is None else _finite(token.logprobs.logprob) for token in tokens
        ],
        "tokens": [codec.token_text(token.token_id) for token in tokens],
        "top_logprobs": tops,
    }


def chat_logprobs(tokens: Sequence[PlacedLogprobs], codec: TextCodec) -> dict[str, Any]:
    """The list of /v1/chat/completions, one item per token."""
    content = []
    for token in tokens:
        assert token.logprobs is not None, "a chat's prompt has no logprobs"
        top = [_chat_token(other, logprob, codec) for other, logprob in token.logprobs.top]
        own = _chat_token(token.token_id, token.logprobs.logprob, codec)
        content.append(own | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    return {
        "token": codec.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(codec.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
