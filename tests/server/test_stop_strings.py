"""Stop strings are found whatever pieces the text comes in."""

from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.server.stop_strings import StopMatcher

LETTERS = st.text("ab", max_size=12)  # two letters, so that stop strings overlap themselves
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def shown(pieces: list[str], stops: list[str], *, include_stop: bool) -> tuple[str, bool]:
    """What is let through, and whether a stop string ended it."""
    matcher = StopMatcher(stops, include_stop=include_stop)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.is_stopped:
            return text, True
    return text + matcher.flush(), False


def defined(text: str, stops: list[str], *, include_stop: bool) -> tuple[str, bool]:
    """The same by definition: the first end of a stop string, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include_stop else end - max(map(len, ending))], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS, include_stop=st.booleans())
def test_any_split_of_a_text_gives_what_the_definition_says(
    pieces: list[str], stops: list[str], include_stop: bool
) -> None:
    expected = defined("".join(pieces), stops, include_stop=include_stop)
    assert shown(pieces, stops, include_stop=include_stop) == expected


@given(text=LETTERS, stops=STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops, include_stop=False)
    let_through = matcher.push(text)
    if not matcher.is_stopped:
        held = text.removeprefix(let_through)
        assert not held or any(stop.startswith(held) for stop in stops)
        assert matcher.flush() == held
        assert matcher.flush() == ""


def test_text_goes_through_at_once_without_stop_strings() -> None:
    assert StopMatcher([], include_stop=False).push("abc") == "abc"
