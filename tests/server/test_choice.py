"""One answer from the engine's outputs."""

from typing import Any

from sharelora_serve.engine.request import FinishReason, RequestOutput, TokenLogprobs
from sharelora_serve.server.choice import Choice, ChoiceOptions
from tests.server.tokenizers import byte_level

TEXT = "one two three four"


def choice(echo: str | None = None, **options: Any) -> Choice:
    codec = byte_level()
    prompt_ids = codec.encode("zero", add_special_tokens=False)
    return Choice(0, codec, prompt_ids, ChoiceOptions(**options), echo=echo)


def outputs(text: str = TEXT, last: FinishReason | None = FinishReason.LENGTH) -> list[Any]:
    token_ids = byte_level().encode(text, add_special_tokens=False)
    found = [
        RequestOutput("", [token_id], logprobs=[TokenLogprobs(token_id, -1.0, [])])
        for token_id in token_ids
    ]
    ids, logprobs = found[-1].token_ids, found[-1].logprobs
    found[-1] = RequestOutput("", ids, logprobs=logprobs, finish_reason=last)
    return found


def test_pieces_taken_at_any_time_join_to_the_text_and_its_logprobs() -> None:
    made = choice()
    text, offsets = "", []
    for output in outputs():
        made.accept(output)
        piece = made.take()
        text += piece.text
        offsets += [item.text_offset for item in piece.logprobs]
    assert text == TEXT
    assert offsets == [0, 3, 7, 13]
    assert made.finish_reason is FinishReason.LENGTH


def test_what_comes_after_a_stop_string_is_forgotten() -> None:
    made = choice(stop_strings=(" th",))
    for output in outputs():
        made.accept(output)
    piece = made.take()
    assert piece.text == "one two"
    assert made.finish_reason is FinishReason.STOP
    assert made.num_tokens == 3
    assert [item.text_offset for item in piece.logprobs] == [0, 3, 7]


def test_the_token_that_stopped_the_engine_is_not_shown_unless_it_is_asked_for() -> None:
    for include_stop, expected in (False, "one two three"), (True, TEXT):
        made = choice(include_stop=include_stop)
        for output in outputs(last=FinishReason.STOP):
            made.accept(output)
        assert made.take().text == expected


def test_stop_strings_before_min_tokens_are_text() -> None:
    made = choice(stop_strings=(" ",), min_tokens=3)
    for output in outputs():
        made.accept(output)
    assert made.take().text == "one two"
    assert made.num_tokens == 3


def test_an_echoed_prompt_is_placed_once_with_its_logprobs_first() -> None:
    made = choice(echo="zero")
    prompt_logprobs: list[Any] = [None] * len(byte_level().encode("zero", add_special_tokens=False))
    for output in outputs():
        # A preempted request's prompt is computed again, and told again.
        made.accept(
            RequestOutput(
                "",
                output.token_ids,
                logprobs=output.logprobs,
                prompt_logprobs=prompt_logprobs,
                finish_reason=output.finish_reason,
            )
        )
    piece = made.take()
    assert piece.text == "zero" + TEXT
    offsets = [item.text_offset for item in piece.logprobs]
    assert offsets[-4:] == [4, 7, 11, 17]
    assert len(offsets) == 4 + len(prompt_logprobs)
    assert offsets == sorted(offsets)
