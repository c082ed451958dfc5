"""Tokens as logprobs show them."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharelora_serve.errors import InvalidRequestError
from sharelora_serve.server.codec import TextCodec
from tests.server.tokenizers import byte_fallback, byte_level

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@given(text=TEXTS)
@settings(deadline=None)
def test_the_bytes_of_the_tokens_joined_are_those_of_their_text(text: str) -> None:
    codec = byte_level()
    token_ids = codec.encode(text, add_special_tokens=False)  # which lacks a few rare bytes
    joined = b"".join(map(codec.token_bytes, token_ids))
    assert joined.decode(errors="replace") == codec.decode(token_ids, skip_special_tokens=True)


@given(text=TEXTS)
@settings(deadline=None)
def test_byte_tokens_of_a_fallback_are_the_bytes_that_they_name(text: str) -> None:
    codec = byte_fallback()
    token_ids = codec.encode(text, add_special_tokens=False)
    assert b"".join(map(codec.token_bytes, token_ids)) == f" {text}".encode() * bool(text)


def test_every_token_of_the_vocabulary_has_a_text_of_its_own() -> None:
    codec = byte_level()
    texts = {codec.token_text(token_id) for token_id in range(49152)}
    assert len(texts) == 49152
    assert "" not in texts


@pytest.mark.parametrize(
    ("make_codec", "special"), [(byte_level, "<|im_end|>"), (byte_fallback, "</s>")]
)
def test_a_special_token_is_shown_by_its_name(
    make_codec: Callable[[], TextCodec], special: str
) -> None:
    assert make_codec().token_text(2) == special
    assert make_codec().decode([2], skip_special_tokens=True) == ""
    assert make_codec().decode([2], skip_special_tokens=False) == special


def test_part_of_a_character_is_shown_as_bytes() -> None:
    codec = byte_fallback()
    first = codec.encode("\N{SLICE OF PIZZA}", add_special_tokens=False)[1]
    assert codec.token_text(first) == "bytes:\\xf0"


def test_a_row_that_the_tokenizer_does_not_use_has_no_text() -> None:
    assert byte_level().token_text(49152) == ""


def test_a_model_without_a_chat_template_takes_no_messages() -> None:
    with pytest.raises(InvalidRequestError, match="/v1/completions") as caught:
        byte_fallback().encode_conversation([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"


def test_a_conversation_ends_where_the_assistant_answers() -> None:
    codec = byte_level()
    token_ids = codec.encode_conversation([{"role": "user", "content": "Hello"}])
    text = codec.decode(token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
