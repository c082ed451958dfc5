"""KV cache bookkeeping: who holds which block, and what is found again by content."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sharelora_serve.adapters.adapter import AdapterVersion
from sharelora_serve.engine.kv_cache import PADDING_BLOCK, KVCache
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.errors import ConfigurationError

BLOCK = 4
SUPPORT_1 = AdapterVersion("acme-support", "11" * 32)
SUPPORT_2 = AdapterVersion("acme-support", "22" * 32)  # the same name, published again


def make_request(
    prompt_ids: list[int],
    adapter: AdapterVersion | None = None,
    prompt_logprobs: int | None = None,
    request_id: str = "request",
) -> Request:
    sampling = SamplingParams(max_tokens=100, prompt_logprobs=prompt_logprobs)
    return Request(request_id, adapter, prompt_ids, sampling, 0.0, deliver=lambda _: None)


def compute(cache: KVCache, request: Request) -> bool:
    """Admit a request and compute all its tokens in one step."""
    cache.match_prefix(request)
    num_tokens = request.num_uncomputed
    if not cache.grow(request, num_tokens):
        return False
    request.num_computed += num_tokens
    cache.commit(request)
    return True


def run_once(cache: KVCache, prompt_ids: list[int], adapter: AdapterVersion | None = None) -> None:
    """Compute a prompt and end its request, so that only the cache remembers it."""
    request = make_request(prompt_ids, adapter)
    assert compute(cache, request)
    cache.free(request)


def num_cached(cache: KVCache, prompt_ids: list[int], adapter: AdapterVersion | None = None) -> int:
    """Tokens that a new request would find; the cache's order of reuse changes."""
    request = make_request(prompt_ids, adapter)
    matched = cache.match_prefix(request)
    assert len(request.block_table) * BLOCK == request.num_computed == matched
    cache.free(request)
    return matched


def test_padding_block_is_never_handed_out() -> None:
    cache = KVCache(5, BLOCK)
    request = make_request(list(range(cache.max_tokens)))
    assert compute(cache, request)
    assert sorted(request.block_table) == [1, 2, 3, 4]
    assert PADDING_BLOCK not in request.block_table


def test_memory_for_no_block_at_all_is_refused_by_the_settings_name() -> None:
    with pytest.raises(ConfigurationError, match=r"1 blocks of 16 tokens.*--kv-memory"):
        KVCache(1)


def test_equal_prefix_is_shared_while_its_first_request_still_runs() -> None:
    cache = KVCache(20, BLOCK)
    first = make_request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert compute(cache, first)
    second = make_request([1, 2, 3, 4, 5, 6, 7, 8, 50])
    assert cache.match_prefix(second) == 8
    assert second.block_table == first.block_table[:2]
    assert second.num_computed == second.num_cached_tokens == 8
    assert cache.num_used_blocks == 3
    cache.check_integrity([first, second])


def test_last_token_is_computed_even_when_the_whole_prompt_is_cached() -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert num_cached(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == 4


@pytest.mark.parametrize("other", [None, SUPPORT_2], ids=["base", "new version"])
def test_blocks_never_match_another_version_of_the_same_name(
    other: AdapterVersion | None,
) -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, list(range(9)), SUPPORT_1)
    assert num_cached(cache, list(range(9)), other) == 0
    assert num_cached(cache, list(range(9)), SUPPORT_1) == 8


def test_version_under_another_name_shares_what_its_digest_computed() -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, list(range(9)), SUPPORT_1)
    assert num_cached(cache, list(range(9)), AdapterVersion("renamed", SUPPORT_1.digest)) == 8


def test_equal_tokens_after_another_beginning_do_not_match() -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, [1, 1, 1, 1, 5, 5, 5, 5, 9])
    assert num_cached(cache, [2, 2, 2, 2, 5, 5, 5, 5, 9]) == 0
    assert num_cached(cache, [5, 5, 5, 5, 9]) == 0


def test_answer_is_found_by_the_next_turn_of_its_conversation() -> None:
    cache = KVCache(20, BLOCK)
    request = make_request([1, 2, 3])
    assert compute(cache, request)
    for token_id in [4, 5, 6, 7, 8, 9]:
        request.output_ids.append(token_id)
        assert cache.grow(request, 1)
        request.num_computed += 1
        cache.commit(request)
    cache.free(request)
    assert num_cached(cache, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == 8


def test_prompt_logprobs_are_computed_for_every_position() -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, list(range(9)))
    request = make_request(list(range(9)), prompt_logprobs=0)
    assert cache.match_prefix(request) == 0
    assert request.block_table == []


def test_without_prefix_caching_nothing_is_found() -> None:
    cache = KVCache(20, BLOCK, prefix_caching=False)
    run_once(cache, list(range(9)))
    assert num_cached(cache, list(range(9))) == 0
    assert (cache.num_hit_tokens, cache.num_queried_tokens) == (0, 0)


def test_growing_beyond_the_free_blocks_changes_nothing() -> None:
    cache = KVCache(4, BLOCK)
    request = make_request(list(range(30)))
    assert cache.grow(request, 5)
    table = list(request.block_table)
    assert not cache.grow(request, 13)
    assert request.block_table == table
    assert cache.num_free_blocks == 1
    assert cache.grow(request, 12)


def test_freed_prefix_loses_its_tail_first() -> None:
    cache = KVCache(6, BLOCK)  # 5 usable
    run_once(cache, list(range(13)))  # 3 full blocks and a part of a fourth
    intruder = make_request([99] * 12)
    assert cache.grow(intruder, 8)  # the two blocks that hold nothing
    assert num_cached(cache, list(range(13))) == 12
    assert cache.grow(intruder, 12)
    assert num_cached(cache, list(range(13))) == 8


def test_least_recently_freed_prefix_goes_first() -> None:
    cache = KVCache(5, BLOCK)
    run_once(cache, [1] * 9)
    run_once(cache, [2] * 8)
    assert num_cached(cache, [1] * 9) == 8  # freed again just now, so the other is older
    intruder = make_request([99] * 8)
    assert cache.grow(intruder, 8)
    assert num_cached(cache, [2] * 9) == 0
    assert num_cached(cache, [1] * 9) == 8


def test_blocks_in_use_are_never_taken() -> None:
    cache = KVCache(5, BLOCK)
    request = make_request(list(range(9)))
    assert compute(cache, request)
    assert not compute(cache, make_request([99] * 5))
    assert num_cached(cache, list(range(9))) == 8


def test_shared_blocks_stay_until_the_last_request_ends() -> None:
    cache = KVCache(20, BLOCK)
    first, second = make_request(list(range(9))), make_request(list(range(9)))
    assert compute(cache, first)
    assert compute(cache, second)
    cache.free(first)
    cache.check_integrity([first, second])
    assert cache.num_used_blocks == 3
    cache.free(second)
    assert cache.num_used_blocks == 0


def test_equal_prompts_computed_in_one_step_keep_their_own_blocks() -> None:
    cache = KVCache(20, BLOCK)
    requests = [make_request(list(range(9))) for _ in range(2)]
    for request in requests:  # both start before either has computed anything
        assert cache.match_prefix(request) == 0
        assert cache.grow(request, 9)
    for request in requests:
        request.num_computed = 9
        cache.commit(request)
    cache.check_integrity(requests)
    assert not set(requests[0].block_table) & set(requests[1].block_table)
    third = make_request(list(range(9)))
    cache.match_prefix(third)
    assert third.block_table == requests[0].block_table[:2]


def test_free_is_harmless_twice_and_before_admission() -> None:
    cache = KVCache(20, BLOCK)
    request = make_request(list(range(9)))
    cache.free(request)
    assert compute(cache, request)
    cache.free(request)
    cache.free(request)
    assert (request.block_table, request.num_computed) == ([], 0)
    cache.check_integrity([request])


def test_statistics_count_a_preempted_request_once() -> None:
    cache = KVCache(20, BLOCK)
    run_once(cache, list(range(9)))
    request = make_request(list(range(10)))
    assert compute(cache, request)
    request.output_ids.append(10)
    cache.free(request)  # preempted
    assert cache.match_prefix(request) == 8
    assert request.num_cached_tokens == 8
    assert (cache.num_hit_tokens, cache.num_queried_tokens) == (8, 9 + 10)


def test_what_a_request_computed_of_its_prompt_before_it_was_preempted_was_not_cached() -> None:
    cache = KVCache(20, BLOCK)
    request = make_request(list(range(10)))
    assert cache.match_prefix(request) == 0
    assert cache.grow(request, 8)
    request.num_computed = 8
    cache.commit(request)
    cache.free(request)  # preempted in its prompt
    assert cache.match_prefix(request) == 8
    assert request.num_cached_tokens == 0
    assert (cache.num_hit_tokens, cache.num_queried_tokens) == (0, 10)


def test_can_start_counts_cached_blocks_that_leave_the_free_list() -> None:
    cache = KVCache(5, BLOCK)
    run_once(cache, list(range(9)))
    request = make_request(list(range(13)))  # 2 cached and free, 2 new: all 4
    assert cache.can_start(request, num_spare_blocks=0)
    assert not cache.can_start(request, num_spare_blocks=1)
    assert request.block_table == []


def leak_a_reference(requests: list[Request]) -> None:
    requests[0].block_table.pop()


def share_a_block_that_is_not_full(requests: list[Request]) -> None:
    requests[1].block_table[-1] = requests[0].block_table[-1]


def read_another_adapters_block(requests: list[Request]) -> None:
    requests[0].adapter = SUPPORT_1


def use_the_padding_block(requests: list[Request]) -> None:
    requests[0].block_table[-1] = PADDING_BLOCK


def compute_without_a_block(requests: list[Request]) -> None:
    requests[0].num_computed += BLOCK


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (leak_a_reference, "1 references, 0 in tables"),
        (share_a_block_that_is_not_full, "shared by requests first and second"),
        (read_another_adapters_block, "request first: block 1 is of others"),
        (use_the_padding_block, "the padding block is in a table"),
        (compute_without_a_block, "request first: computed tokens without a block"),
    ],
)
def test_integrity_check_finds(damage: Callable[[list[Request]], None], found: str) -> None:
    cache = KVCache(20, BLOCK)
    requests = [make_request(list(range(10)), request_id=name) for name in ("first", "second")]
    for request in requests:
        assert compute(cache, request)
    cache.check_integrity(requests)
    damage(requests)
    with pytest.raises(AssertionError, match=found):
        cache.check_integrity(requests)


Content = tuple[str, tuple[int, ...]]  # digest, and all tokens up to the slot's own


class KVCacheMachine(RuleBasedStateMachine):
    """Whatever the order of starts, steps and ends: a request reads only what is its own.

    The memory is simulated: computing a token writes, into its slot, the digest and every token
    before it, on which keys and values depend.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Request] = []
        self.slots: dict[tuple[int, int], Content] = {}

    @initialize(num_blocks=st.integers(2, 12), prefix_caching=st.booleans())
    def make_cache(self, num_blocks: int, prefix_caching: bool) -> None:
        self.cache = KVCache(num_blocks, BLOCK, prefix_caching=prefix_caching)

    @rule(
        prompt_ids=st.lists(st.integers(0, 1), min_size=1, max_size=20),  # often alike
        adapter=st.sampled_from([None, SUPPORT_1, SUPPORT_2]),
        num_spare=st.integers(0, 3),
    )
    def start(self, prompt_ids: list[int], adapter: AdapterVersion | None, num_spare: int) -> None:
        request = make_request(prompt_ids, adapter)
        may_start = self.cache.can_start(request, num_spare)
        self.cache.match_prefix(request)
        grown = self.cache.grow(request, request.num_uncomputed)
        assert may_start == (grown and self.cache.num_free_blocks >= num_spare)
        if may_start:
            self.live.append(request)
        else:
            self.cache.free(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        if request.num_uncomputed == 0:
            request.output_ids.append(data.draw(st.integers(0, 1)))
        num_tokens = data.draw(st.integers(1, request.num_uncomputed))
        if not self.cache.grow(request, num_tokens):
            return
        for position in range(request.num_computed, request.num_computed + num_tokens):
            slot = (request.block_table[position // BLOCK], position % BLOCK)
            self.slots[slot] = self.content(request, position)
        request.num_computed += num_tokens
        self.cache.commit(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.cache.free(request)

    @invariant()
    def every_computed_token_is_where_its_table_says(self) -> None:
        for request in self.live:
            for position in range(request.num_computed):
                slot = (request.block_table[position // BLOCK], position % BLOCK)
                assert self.slots[slot] == self.content(request, position)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity(self.live)

    def content(self, request: Request, position: int) -> Content:
        digest = request.adapter.digest if request.adapter else ""
        return digest, tuple(request.tokens(0, position + 1))


KVCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKVCacheKeepsEveryRequestsTokens = KVCacheMachine.TestCase
