"""Guess a stream's next tokens from its own text, to be checked by the step that runs anyway.

Prompt lookup: what followed the latest tokens where they last stood, in the prompt or the answer,
is computed as if it came next. As long as a draft token is the one that is chosen after it too, the
next one is there without another step (speculative decoding, arXiv 2211.17192, with drafts as
vLLM's and transformers' n-grams). So answers are the same, and a step of few rows, which is bound
by reading the weights, takes hardly longer with some more.
"""

from dataclasses import replace

from sharelora_serve.engine.batch import Batch
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request

# Of the latest tokens that are looked up, the most. Longer ones hardly ever find something better.
_LONGEST = 3

_FIRST_LENGTH = 5  # of drafts, before any was checked

# Tokens that are read at once, for which streams wait: of a longer text the beginning is left out.
_MOST_READ = 4096


class Speculator:
    """Fills small steps up with drafts of their streams' next tokens.

    num_drafted   tokens, since the start
    num_accepted  of those, which were chosen too; the scheduler counts them
    """

    def __init__(self, max_rows: int) -> None:
        """max_rows: of a step that has drafts."""
        self.num_drafted = 0
        self.num_accepted = 0
        self._max_rows = max_rows
        self._drafters: dict[Request, _Drafter] = {}

    def extend(self, batch: Batch, kv_cache: KVCache) -> None:
        """Give streams of the batch drafts, each its share of the rows that are left.

        A stream has at most as many as its answer may still have tokens besides the one that the
        step brings anyway, and none that would take a KV block which others may need next.
        """
        num_left = self._max_rows - sum(item.num_tokens for item in batch.scheduled)
        streams = [
            index
            for index, item in enumerate(batch.scheduled)
            if item.needs_logits and item.request.output_ids
        ]
        for num_before, index in enumerate(streams):
            item = batch.scheduled[index]
            request = item.request
            share = -(-num_left // (len(streams) - num_before))
            most = min(share, request.sampling.max_tokens - len(request.output_ids) - 1)
            if most <= 0:
                continue
            draft = self._draft(request, most)
            end = request.num_tokens + len(draft)
            num_free = kv_cache.num_free_blocks - kv_cache.num_missing_blocks(request, end)
            if draft and num_free >= len(batch.scheduled):
                kv_cache.grow(request, item.num_tokens + len(draft))
                batch.scheduled[index] = replace(item, draft_ids=draft)
                num_left -= len(draft)
                self.num_drafted += len(draft)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._drafters.pop(request, None)

    def _draft(self, request: Request, most: int) -> list[int]:
        return self._drafters.setdefault(request, _Drafter()).draft(request, most)


class _Drafter:
    """One request's text as it is looked up, and how long drafts are worth it.

    A draft that was right to its end makes the next two tokens longer, any other one shorter, as in
    transformers' assisted generation.
    """

    def __init__(self) -> None:
        self._followed_at: dict[tuple[int, ...], int] = {}  # by tokens, what followed them last
        self._num_read = 0
        self._length = _FIRST_LENGTH
        self._draft: list[int] = []  # the last one
        self._drafted_at = 0  # where it was to stand

    def draft(self, request: Request, most: int) -> list[int]:
        """Up to so many tokens that may come next; none where nothing like it stood before."""
        if self._draft:
            end = self._drafted_at + len(self._draft)
            is_right = request.tokens(self._drafted_at, end) == self._draft
            self._length = self._length + 2 if is_right else max(1, self._length - 1)
        self._read(request)
        self._length = min(self._length, max(_FIRST_LENGTH, most))
        self._draft = self._look_up(request, min(self._length, most))
        self._drafted_at = request.num_tokens
        return self._draft

    def _read(self, request: Request) -> None:
        """Take in what has come since; the last token has not been followed by any yet."""
        end = request.num_tokens
        first = max(1, self._num_read, end - _MOST_READ)
        start = max(0, first - _LONGEST)
        text = request.tokens(start, end)
        for at in range(first, end):
            for length in range(1, min(_LONGEST, at) + 1):
                self._followed_at[tuple(text[at - length - start : at - start])] = at
        self._num_read = end

    def _look_up(self, request: Request, length: int) -> list[int]:
        """What followed the longest of the request's endings that stood in it before."""
        end = request.num_tokens
        latest = request.tokens(max(0, end - _LONGEST), end)
        for skipped in range(len(latest)):
            at = self._followed_at.get(tuple(latest[skipped:]))
            if at is not None:
                draft = request.tokens(at, min(at + length, end))
                while len(draft) < length:  # a text that repeats itself goes on doing so
                    draft.append(draft[len(draft) - (end - at)])
                return draft
        return []
