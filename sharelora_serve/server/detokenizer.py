"""Tokens to text, one token at a time."""

from collections.abc import Callable, Sequence

NUM_CONTEXT_TOKENS = 6
"""Prompt tokens that the first new token is decoded after."""

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"

_CHARACTER_BYTES = 4
"""Of the longest in UTF-8, and so the most tokens that one character can span."""


class IncrementalDetokenizer:
    """Turns tokens into text as they come; the pieces joined are the text of them all.

    A token's text depends on its neighbours: a character may span tokens, and some tokenizers
    drop the space before the first word they decode. So every token is decoded together with the
    ones shown just before it (at first the end of the prompt), and what those alone decode to is
    cut off. While the text may end in the middle of a character, its last tokens are held back.
    A client can ask for any tokens without end: how many are decoded for one is bounded, so tokens
    without text are forgotten, and bytes that become no character are shown as U+FFFD.
    One exception: where a tokenizer falls back to bytes, one that is no UTF-8 turns all the bytes
    just before it into U+FFFD, and those may be out already.
    The method is that of text-generation-inference and vLLM. The tokenizers library's DecodeStream
    does the same but raises where byte-fallback tokens change how their neighbours decode.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> None:
        """`decode` turns token ids into text; invalid UTF-8 becomes U+FFFD."""
        self._decode = decode
        self._window = list(prompt_ids[-NUM_CONTEXT_TOKENS:])
        self._num_shown = len(self._window)  # tokens of the window whose text is out already
        self._text = decode(self._window)
        self._shown = self._text  # the part of it that is out already

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty inside a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        # Twice, since some tokenizers drop the space that a text begins with.
        if text == self._text and not self._decode([token_id, token_id]):
            self._window.pop()  # a special one: no context, and no byte of a character
            return ""
        self._text = text
        if not text.endswith(UNDECODABLE):
            return self._show(text)
        num_held = len(self._window) - self._num_shown
        if num_held < _CHARACTER_BYTES:
            return ""
        # The first of them are no character by now, whatever comes; the last may still become one.
        new = self._new(text[:-1])
        if num_held > 2 * _CHARACTER_BYTES:
            # The first stay: where a tokenizer falls back to bytes, one that is no UTF-8 makes
            # U+FFFD of all that follow.
            del self._window[self._num_shown + _CHARACTER_BYTES]
            self._text = self._decode(self._window)
        self._shown = self._text[:-1]
        return new

    def flush(self) -> str:
        """The rest at the end of the generation: an unfinished character, as U+FFFD."""
        return self._show(self._text)

    def _show(self, text: str) -> str:
        new = self._new(text)
        if new:
            self._window = self._window[self._num_shown :]
            text = self._decode(self._window)
        self._num_shown = len(self._window)
        self._text = self._shown = text
        return new

    def _new(self, text: str) -> str:
        """What of the window's text is not out yet."""
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # The prompt ended inside a character that is whole only now.
        num_equal = next(
            (i for i, (a, b) in enumerate(zip(text, self._shown, strict=False)) if a != b),
            min(len(text), len(self._shown)),
        )
        return text[num_equal:]
