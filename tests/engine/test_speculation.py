"""What is guessed ahead, for whom and how much; that answers do not change is tested elsewhere."""

from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.engine.batch import Batch, ScheduledRequest
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.engine.speculation import Speculator


def stream(token_ids: list[int], max_tokens: int = 100) -> Request:
    """A request that decodes: its last token is an answer's first."""
    return Request(
        request_id=repr(token_ids),
        adapter=None,
        prompt_ids=token_ids[:-1],
        sampling=SamplingParams(max_tokens=max_tokens),
        arrived_at=0.0,
        deliver=lambda _: None,
        output_ids=token_ids[-1:],
    )


def drafts(
    speculator: Speculator, *items: Request | ScheduledRequest, num_blocks: int = 100
) -> list[list[int]]:
    """Those of a step of these streams; prompts are given as what is scheduled of them."""
    kv_cache = KVCache(num_blocks)
    scheduled = []
    for item in items:
        if isinstance(item, Request):
            item.num_computed = item.num_tokens - 1
        scheduled.append(ScheduledRequest(item, 1) if isinstance(item, Request) else item)
    for item in scheduled:
        assert kv_cache.grow(item.request, item.num_tokens)
    speculator.extend(Batch(scheduled), kv_cache)
    for item in scheduled:
        kv_cache.free(item.request)
    return [item.draft_ids for item in scheduled]


@given(
    period=st.lists(st.integers(0, 3), min_size=1, max_size=20, unique=True),
    length=st.integers(1, 60),
    max_rows=st.integers(1, 12),
)
def test_a_text_that_repeats_itself_is_guessed_to_go_on(
    period: list[int], length: int, max_rows: int
) -> None:
    text = (period * 100)[: len(period) + length]
    (draft,) = drafts(Speculator(max_rows), stream(text))
    most = min(5, max_rows - 1)
    assert draft == (period * 100)[len(text) : len(text) + most]


def test_what_followed_the_longest_ending_and_there_the_last_one_is_guessed() -> None:
    (draft,) = drafts(Speculator(3), stream([1, 2, 3, 7, 8, 1, 2, 3, 4, 5, 9, 2, 3, 6, 1, 2, 3]))
    assert draft == [4, 5]
    (draft,) = drafts(Speculator(3), stream([2, 3, 7, 8, 9, 3, 6, 5, 1, 2, 3]))
    assert draft == [7, 8]


def test_nothing_is_guessed_where_nothing_like_it_stood_before() -> None:
    assert drafts(Speculator(8), stream([1, 2, 3])) == [[]]


def test_rows_that_are_left_are_shared_by_the_streams() -> None:
    streams = [stream([number] * 9) for number in range(3)]
    speculator = Speculator(10)
    assert list(map(len, drafts(speculator, *streams))) == [3, 2, 2]
    assert speculator.num_drafted == 7
    assert [len(draft) for draft in drafts(Speculator(3), *streams)] == [0, 0, 0]
    assert [len(draft) for draft in drafts(Speculator(4), *streams)] == [1, 0, 0]


def test_a_stream_leaves_its_share_to_the_next_where_it_has_no_use_for_it() -> None:
    first, second = stream([1, 2, 3]), stream([5] * 9)
    assert drafts(Speculator(8), first, second) == [[], [5] * 5]


def test_prompts_take_their_rows_first_and_have_no_drafts() -> None:
    prompt = Request("prompt", None, [7] * 9, SamplingParams(max_tokens=9), 0.0, lambda _: None)
    chunk, whole = ScheduledRequest(prompt, 6), ScheduledRequest(prompt, 9)
    assert drafts(Speculator(8), chunk, stream([5] * 9)) == [[], [5]]
    assert drafts(Speculator(20), whole, stream([5] * 9)) == [[], [5] * 5]


def test_no_more_is_guessed_than_the_answer_may_still_have() -> None:
    assert drafts(Speculator(8), stream([5] * 9, max_tokens=4)) == [[5, 5]]
    assert drafts(Speculator(8), stream([5] * 9, max_tokens=2)) == [[]]


def test_nothing_is_guessed_for_which_a_stream_would_take_its_last_free_block() -> None:
    assert drafts(Speculator(8), stream([5] * 15), num_blocks=3) == [[]]
    assert drafts(Speculator(8), stream([5] * 15), num_blocks=4) == [[5] * 5]
    assert drafts(Speculator(8), stream([5] * 11), num_blocks=3) == [[5] * 5]


def test_drafts_grow_while_they_are_right_and_shrink_while_they_are_not() -> None:
    request, speculator = stream([5] * 9, max_tokens=1000), Speculator(12)
    lengths = []
    for _ in range(6):
        (draft,) = drafts(speculator, request)
        lengths.append(len(draft))
        request.output_ids += [*draft, 5]
    assert lengths == [5, 7, 9, 11, 11, 11]
    for _ in range(12):
        (draft,) = drafts(speculator, request)
        lengths.append(len(draft))
        request.output_ids.append(5)  # one token alone, which is all of a draft of one
    assert lengths[6:] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 3]


def test_a_draft_that_was_wrong_is_not_taken_for_right_after_steps_without_any() -> None:
    request, speculator = stream([5] * 9, max_tokens=1000), Speculator(12)
    assert drafts(speculator, request) == [[5] * 5]
    request.output_ids += [6, 5, 5, 5, 5, 5, 5, 5, 5]
    assert drafts(speculator, request) == [[5] * 4]


def test_of_a_long_text_only_the_end_is_looked_up() -> None:
    beginning, rest = [1, 2, 3, 4], list(range(10, 6000))
    assert drafts(Speculator(3), stream([*beginning, *rest, 1, 2, 3]), num_blocks=1000) == [[]]
    text = [*rest, *beginning, *range(6000, 7000), 1, 2, 3]
    assert drafts(Speculator(3), stream(text), num_blocks=1000) == [[4, 6000]]
