"""One answer in the making: tokens in, text and logprobs out."""

import time
from dataclasses import dataclass, field
from functools import partial

from sharelora_serve.engine.request import FinishReason, RequestOutput, TokenLogprobs
from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.detokenizer import IncrementalDetokenizer
from sharelora_serve.server.stop_strings import StopMatcher


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """How tokens become text, the same for every choice of a request.

    stop_strings   text that ends the answer
    include_stop   whether the text or token that ended the answer is shown
    skip_special   whether special tokens are left out of the text
    min_tokens     stop strings are looked for in the text of this token and later ones only
    """

    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PlacedLogprobs:
    """One token's logprobs and where its text begins in the answer; None for a first token."""

    token_id: int
    logprobs: TokenLogprobs | None
    text_offset: int  # characters; at most the answer's length


@dataclass(slots=True)
class Piece:
    """What a choice has become since the last look: shown text and the tokens' logprobs."""

    text: str
    logprobs: list[PlacedLogprobs] = field(default_factory=list)


class Choice:
    """One generation as a client sees it.

    Everything here runs on the event loop, but for `take` once the choice has finished.
    """

    def __init__(
        self,
        index: int,
        codec: TextCodec,
        prompt_ids: list[int],
        options: ChoiceOptions,
        *,
        echo: str | None,
    ) -> None:
        """`echo` is the prompt's text where the answer begins with it."""
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.num_tokens = 0  # new ones, shown or not
        self.num_cached_tokens = 0
        self.first_token_at: float | None = None  # time.monotonic()
        self.last_token_at: float | None = None
        self._decode = partial(codec.decode, skip_special_tokens=options.skip_special)
        self._prompt_ids = prompt_ids
        self._options = options
        self._detokenizer = IncrementalDetokenizer(self._decode, prompt_ids)
        self._stops = StopMatcher(options.stop_strings, include_stop=options.include_stop)
        self._text = echo or ""  # not taken yet
        self._logprobs: list[PlacedLogprobs] = []  # likewise
        self._is_echoed = echo is not None
        self._length = len(self._text)  # characters decoded so far, held back or not
        self._shown = len(self._text)  # characters of the answer so far

    @property
    def has_news(self) -> bool:
        """Whether `take` has something that a stream would show."""
        return bool(self._text) or self.finish_reason is not None

    def take(self) -> Piece:
        """Everything since the last call."""
        # A stop string may have cut off text that its tokens' offsets counted.
        logprobs = [
            PlacedLogprobs(item.token_id, item.logprobs, min(item.text_offset, self._shown))
            for item in self._logprobs
        ]
        piece = Piece(self._text, logprobs)
        self._text, self._logprobs = "", []
        return piece

    def accept(self, output: RequestOutput) -> None:
        """Take in what one engine step brought; nothing after the choice has finished."""
        if self.finish_reason is not None:
            return  # tokens computed before the engine heard that a stop string was found
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if self._is_echoed and output.prompt_logprobs is not None and self.num_tokens == 0:
            self._place_prompt(output.prompt_logprobs)
        if output.token_ids:
            self.last_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self.last_token_at
        last = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            if output.logprobs is not None:
                placed = PlacedLogprobs(token_id, output.logprobs[position], self._length)
                self._logprobs.append(placed)
            # The engine stops at tokens only, so the last one is what stopped it.
            is_stop = output.finish_reason is FinishReason.STOP and position == last
            self._add_token(token_id, is_hidden=is_stop and not self._options.include_stop)
            if self._stops.is_stopped:
                self.finish_reason = FinishReason.STOP
                return
        if output.finish_reason is not None:
            self._add_text(self._detokenizer.flush())
            if not self._stops.is_stopped:
                self._show(self._stops.flush())
            self.finish_reason, self.error = output.finish_reason, output.error
            if self._stops.is_stopped:  # its last characters came with the flush
                self.finish_reason = FinishReason.STOP

    def _add_token(self, token_id: int, *, is_hidden: bool) -> None:
        self.num_tokens += 1
        if not is_hidden:
            self._add_text(self._detokenizer.push(token_id))

    def _add_text(self, text: str) -> None:
        self._length += len(text)
        if self.num_tokens < self._options.min_tokens:
            self._show(text)
        elif text:
            self._show(self._stops.push(text))

    def _show(self, text: str) -> None:
        self._text += text
        self._shown += len(text)

    def _place_prompt(self, logprobs: list[TokenLogprobs | None]) -> None:
        """Put the echoed prompt's tokens, at their places in its text, before the answer's."""
        detokenizer, offset = IncrementalDetokenizer(self._decode, []), 0
        for token_id, item in zip(self._prompt_ids, logprobs, strict=True):
            self._logprobs.append(PlacedLogprobs(token_id, item, offset))
            offset += len(detokenizer.push(token_id))
