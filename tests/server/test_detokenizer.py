"""The pieces of a stream, joined, are the text of all its tokens."""

from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sharelora_serve.server.codec import TextCodec
from sharelora_serve.server.detokenizer import UNDECODABLE, IncrementalDetokenizer
from tests.server.tokenizers import byte_fallback, byte_level

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
CODECS = pytest.mark.parametrize("make_codec", [byte_level, byte_fallback])


def stream(codec: TextCodec, token_ids: list[int], prompt_ids: list[int]) -> list[str]:
    """The piece of each token, and the rest."""

    def decode(ids: list[int]) -> str:
        return codec.decode(ids, skip_special_tokens=True)

    detokenizer = IncrementalDetokenizer(decode, prompt_ids)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def bytes_and_specials(codec: TextCodec) -> list[list[int]]:
    """A special token; then tokens of one byte, most of which are no characters by themselves."""
    parts = (0x80, 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x8D, 0x95, 0x61)
    vocabulary = range(512)
    ids = {codec.token_bytes(token_id): [token_id] for token_id in vocabulary}
    return [[2], *(ids[bytes([part])] for part in parts)]


@CODECS
@given(text=TEXTS)
@settings(deadline=None)
def test_the_pieces_of_any_text_joined_are_the_text(
    make_codec: Callable[[], TextCodec], text: str
) -> None:
    codec = make_codec()
    token_ids = codec.encode(text, add_special_tokens=False)
    expected = codec.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(codec, token_ids, [])) == expected


@CODECS
@given(data=st.data())
@settings(deadline=None)
def test_the_pieces_of_any_tokens_joined_are_the_text_of_them_all(
    make_codec: Callable[[], TextCodec], data: st.DataObject
) -> None:
    codec = make_codec()
    if make_codec is byte_level:
        # Half of them special tokens and bytes that are no characters by themselves.
        token = st.integers(0, 287) | st.integers(0, 49151)
    else:
        # A fallback's bytes that are no UTF-8 also change what stands before them, which is out.
        token = st.integers(0, 130) | st.integers(259, 294)
    token_ids = data.draw(st.lists(token, max_size=40))
    expected = codec.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(codec, token_ids, [])) == expected


@CODECS
@given(data=st.data())
@settings(deadline=None)
def test_so_they_are_where_most_bytes_are_no_characters(
    make_codec: Callable[[], TextCodec], data: st.DataObject
) -> None:
    codec = make_codec()
    special, lone, *others, letter = bytes_and_specials(codec)
    prompt, possible = special, [special, lone, *others, letter]
    if make_codec is byte_fallback:
        # A fallback's byte that is no UTF-8 changes what stands before it: so it comes first.
        prompt, possible = lone, [special, lone, *others]
    drawn = data.draw(st.lists(st.sampled_from(possible), max_size=40))
    token_ids = [*prompt, *(token_id for tokens in drawn for token_id in tokens), *letter]
    expected = codec.decode(token_ids, skip_special_tokens=True)
    assert "".join(stream(codec, token_ids, [])) == expected
    before = codec.decode(prompt, skip_special_tokens=True)
    assert "".join([before, *stream(codec, token_ids[1:], prompt)]) == expected


@CODECS
def test_a_token_costs_the_same_however_many_before_it_completed_no_text(
    make_codec: Callable[[], TextCodec],
) -> None:
    codec = make_codec()
    num_decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return codec.decode(ids, skip_special_tokens=True)

    special, lone, *_ = bytes_and_specials(codec)
    for prompt in lone, special, [], codec.encode("a", add_special_tokens=False):
        for token_ids in special * 500, lone * 500, (lone + special) * 250:
            detokenizer = IncrementalDetokenizer(decode, prompt)
            for token_id in token_ids:
                num_decoded = 0
                detokenizer.push(token_id)
                assert num_decoded < 64


@CODECS
def test_at_most_a_characters_tokens_are_held_back(make_codec: Callable[[], TextCodec]) -> None:
    codec = make_codec()
    special, lone, *_ = bytes_and_specials(codec)
    pieces = stream(codec, (lone + special) * 50, [])
    length = 0
    for number, piece in enumerate(pieces[::2], start=1):
        length += len(piece)
        assert number - length <= 3


@CODECS
@given(prompt=TEXTS, text=TEXTS)
@settings(deadline=None)
def test_after_a_prompt_they_are_what_the_prompt_is_continued_by(
    make_codec: Callable[[], TextCodec], prompt: str, text: str
) -> None:
    codec = make_codec()
    prompt_ids = codec.encode(prompt, add_special_tokens=False)
    token_ids = codec.encode(text, add_special_tokens=False)
    whole = codec.decode(prompt_ids + token_ids, skip_special_tokens=True)
    before = codec.decode(prompt_ids, skip_special_tokens=True)
    assert before + "".join(stream(codec, token_ids, prompt_ids)) == whole


@CODECS
@given(text=TEXTS)
@settings(deadline=None)
def test_half_a_character_is_never_shown(make_codec: Callable[[], TextCodec], text: str) -> None:
    codec = make_codec()
    token_ids = codec.encode(text, add_special_tokens=False)
    assume(UNDECODABLE not in codec.decode(token_ids, skip_special_tokens=True))
    pieces = stream(codec, token_ids, [])
    assert not any(UNDECODABLE in piece for piece in pieces)


@CODECS
def test_an_unfinished_character_is_shown_as_such_at_the_end(
    make_codec: Callable[[], TextCodec],
) -> None:
    codec = make_codec()
    token_ids = codec.encode("a\N{SLICE OF PIZZA}", add_special_tokens=False)
    *pieces, rest = stream(codec, token_ids[:-1], [])
    assert "".join(pieces) == "a"
    assert rest
    assert set(rest) == {UNDECODABLE}


def test_special_tokens_between_words_leave_the_space_alone() -> None:
    codec = byte_fallback()
    a, end = codec.encode("a", add_special_tokens=False), [2]
    assert stream(codec, [*a, *end * 9, *a], a) == [" a", *[""] * 9, " a", ""]
