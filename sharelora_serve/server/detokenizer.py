"""Tokens to text, one token at a time."""

from collections.abc import Callable, Sequence

NUM_CONTEXT_TOKENS = 6
"""Prompt tokens that the first new token is decoded after."""

UNDECODABLE = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Turns tokens into text as they come; the pieces joined are the text of them all.

    A token's text depends on its neighbours: a character may span tokens, and some tokenizers
    drop the space before the first word they decode. So every token is decoded together with the
    ones shown just before it (at first the end of the prompt), and what those alone decode to is
    cut off. Nothing is shown while the text ends in the middle of a character.
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
        self._shown = decode(self._window)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty inside a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(UNDECODABLE):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """The rest at the end of the generation: an unfinished character, as U+FFFD."""
        return self._show(self._decode(self._window))

    def _show(self, text: str) -> str:
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        else:  # the prompt ended inside a character that is whole only now
            num_equal = next(
                (i for i, (a, b) in enumerate(zip(text, self._shown, strict=False)) if a != b),
                min(len(text), len(self._shown)),
            )
            new = text[num_equal:]
        if new:
            # Tokens without text (special ones) stay in the window: as the only context they
            # would make the next word look like the first.
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown = self._decode(self._window)
        return new
