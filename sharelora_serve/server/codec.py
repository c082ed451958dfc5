"""Text to tokens and back, as the base's tokenizer defines it."""

import re
from collections.abc import Sequence
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from sharelora_serve.errors import InvalidRequestError


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes in its vocabulary (GPT-2's table).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


class TextCodec:
    """Encodes prompts and decodes tokens. Safe to use from several threads at once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Take over the tokenizer; it never truncates or pads from here on."""
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # Set in some tokenizer.json files, where they would silently cut a long prompt.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._added = tokenizer.added_tokens_decoder
        self._byte_of = _byte_characters() if "ByteLevel" in repr(self._backend.decoder) else {}
        self.token_bytes = lru_cache(maxsize=65_536)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`, with the tokenizer's own first and last tokens where asked for."""
        # A batch of one: unlike `encode` it releases the GIL, so a long prompt holds up nobody.
        encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded[0].ids
        return ids

    def encode_conversation(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers.

        Raises InvalidRequestError where the model has no chat template or the template refuses
        the messages, with the template's own reason.
        """
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template, so it takes no messages; use /v1/completions",
                param="messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise InvalidRequestError(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from None
        assert isinstance(text, str), "one conversation gives one text"
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens; bytes that are no UTF-8 come out as U+FFFD."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which need not be whole characters."""
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        token = self._backend.id_to_token(token_id)
        if token is None:  # rows of the embedding that the tokenizer does not use
            return b""
        if self._byte_of:
            return bytes(self._byte_of[character] for character in token)
        if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(fallback[1])
        return str(token).replace("\u2581", " ").encode()  # SentencePiece's mark for a space

    def token_text(self, token_id: int) -> str:
        """One token as logprobs show it: its text, or `bytes:\\xe6\\x97` inside a character."""
        content = self.token_bytes(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
