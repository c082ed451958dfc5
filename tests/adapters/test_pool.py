"""The matrix pool: whatever is added and released, live factors are what was added."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK, PageAllocator, PoolFullError
from sharelora_serve.adapters.pool import MatrixPool, Resident
from sharelora_serve.errors import AdapterInvalidError, ConfigurationError
from tests.adapters.pools import FORMS, add, assert_reads_back, factor, make_adapter
from tests.adapters.samples import LAYOUT, NUM_LAYERS


def contents(adapter: Adapter, dtype: torch.dtype) -> set[tuple[bytes, torch.Size]]:
    """The adapter's distinct factors by value, counted without the pool's help."""
    factors = set()
    for pair in adapter.pairs.values():
        for rows in (pair.a, pair.b.T):
            cast = rows.to(dtype).contiguous()
            factors.add((cast.view(torch.uint8).numpy().tobytes(), rows.shape))
    return factors


class PoolMachine(RuleBasedStateMachine):
    """Whatever the order of adds and releases: no live factor changes, no page is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.float16, "cpu")
        # Memory that was never written holds anything; only pages that are handed out may be read.
        self.pool.arena[PAGE_RANK * max(LAYOUT.feature_counts) :] = float("nan")
        self.live: list[tuple[Resident, Adapter]] = []

    @rule(
        form=st.sampled_from(FORMS),
        seed=st.integers(0, 2),  # few seeds, so equal factors are common
        rank=st.integers(1, 20),
        modules=st.lists(st.sampled_from(MODULES), min_size=1, unique=True),
        mixed=st.booleans(),
    )
    def add(self, form: str, seed: int, rank: int, modules: list[str], mixed: bool) -> None:
        adapter = make_adapter(
            form,
            seed=seed,
            modules=tuple(modules),
            rank=lambda module: rank + (MODULES.index(module) if mixed else 0),
        )
        before, checked = self.pool.stats(), self.check_room(adapter)
        assert self.pool.stats() == before
        self.pool.check_integrity()
        try:
            self.live.append((add(self.pool, adapter, LAYOUT), adapter))
            assert checked is None
        except PoolFullError:
            assert checked is PoolFullError
            assert self.live, "an empty pool must refuse for good, not for now"
            assert self.pool.stats() == before
        except AdapterInvalidError:
            assert checked is AdapterInvalidError
            assert self.pool.num_bytes_for(adapter) > 8_192
            assert self.pool.stats() == before

    def check_room(self, adapter: Adapter) -> type[Exception] | None:
        """What the pool would raise, or None if there is room."""
        try:
            self.pool.check_room(self.pool.stage(adapter, LAYOUT).factors)
        except (PoolFullError, AdapterInvalidError) as error:
            return type(error)
        return None

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        _, adapter = data.draw(st.sampled_from(self.live))
        before = self.pool.stats().used_bytes
        self.live.append((add(self.pool, adapter, LAYOUT), adapter))  # needs no room at all
        assert self.pool.stats().used_bytes == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        resident, _ = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.pool.release(resident)

    @invariant()
    def live_factors_are_unchanged(self) -> None:
        for resident, adapter in self.live:
            assert_reads_back(self.pool, resident, adapter)

    @invariant()
    def counts_and_bytes_equal_a_recount(self) -> None:
        self.pool.check_integrity()
        stats = self.pool.stats()
        distinct = set().union(*(contents(adapter, torch.float16) for _, adapter in self.live))
        pages = {
            (features, page)
            for resident, adapter in self.live
            for features, page in pages_of(resident, adapter)
        }
        assert stats.num_adapters == len(self.live)
        assert stats.num_factors == len(distinct)
        assert len(pages) == sum(-(-shape[0] // PAGE_RANK) for _, shape in distinct)
        assert stats.used_bytes == sum(2 * PAGE_RANK * features for features, _ in pages)
        assert stats.used_bytes <= stats.capacity_bytes == 16_384
        assert stats.expanded_bytes == 2 * sum(
            pair.a.numel() + pair.b.numel()
            for _, adapter in self.live
            for pair in adapter.pairs.values()
        )

    @invariant()
    def pages_of_different_widths_do_not_overlap(self) -> None:
        spans = sorted(
            {
                (page * features, (page + 1) * features)
                for resident, adapter in self.live
                for features, page in pages_of(resident, adapter)
            }
        )
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        for features in LAYOUT.feature_counts:
            assert not self.pool.view(features)[0].any()


def pages_of(resident: Resident, adapter: Adapter) -> set[tuple[int, int]]:
    """Every (features, page) that the resident's table names."""
    table = resident.page_table
    pages = set()
    for (layer, module), pair in adapter.pairs.items():
        entry = LAYOUT.entry(layer, module)
        for position in range(table.offsets[entry], table.offsets[entry + 1]):
            pages.add((pair.a.shape[1], int(table.a_pages[position])))
            pages.add((pair.b.shape[0], int(table.b_pages[position])))
    return pages


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestMatrixPool = PoolMachine.TestCase


@pytest.mark.parametrize("feature_counts", [[192, 576, 1536], [7, 11, 13], [64], [5, 8]])
@pytest.mark.parametrize("num_pages", [2, 3, 17, 100, 3000])
def test_every_page_of_a_chunk_is_usable_and_returns(
    feature_counts: list[int], num_pages: int
) -> None:
    num_elements = num_pages * PAGE_RANK * max(feature_counts) + 3
    for features in feature_counts:
        allocator = PageAllocator(num_elements, feature_counts)
        pages: list[int] = []
        while True:
            try:
                pages += allocator.allocate({features: 1})[features]
            except PoolFullError:
                break
        allocator.check_integrity({features: pages})
        assert 0 not in pages
        if features == max(feature_counts):  # the widest fit exactly, whatever the others are
            assert len(pages) == num_pages - 1
        elif num_pages >= 100:
            assert len(pages) * features > 0.8 * num_pages * max(feature_counts)
        allocator.free(features, pages)
        allocator.check_integrity({})
        assert sorted(allocator.allocate({features: len(pages)})[features]) == sorted(pages)


def test_memory_given_back_by_one_width_serves_another() -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.float32, "cpu")

    def num_fitting(module: str) -> int:
        """Adapters of one module that fit into the empty pool; it is empty again afterwards."""
        residents: list[Resident] = []
        try:
            while True:
                adapter = make_adapter(seed=len(residents), modules=(module,), rank=lambda _: 8)
                residents.append(add(pool, adapter, LAYOUT))
        except PoolFullError:
            for resident in residents:
                pool.release(resident)
        pool.check_integrity()
        assert pool.stats().used_bytes == 0
        return len(residents)

    narrow, wide = num_fitting("self_attn.k_proj"), num_fitting("mlp.down_proj")
    assert narrow > wide > 0
    assert num_fitting("self_attn.k_proj") == narrow
    assert num_fitting("mlp.down_proj") == wide


def test_many_adapters_of_one_common_a_cost_one_a_and_their_b() -> None:
    pool = MatrixPool(8 << 20, LAYOUT.feature_counts, torch.float16, "cpu")
    rank = 16  # no padding, so the count is exact
    adapters = [make_adapter("common A", seed=seed, rank=lambda _: rank) for seed in range(200)]
    for adapter in adapters:
        add(pool, adapter, LAYOUT)
    # One A per input width: q, k, v, o, gate and up read 24 features, down reads 40.
    a_bytes = 2 * rank * (24 + 40)
    b_bytes = 2 * rank * NUM_LAYERS * sum(outputs for _, outputs in LAYOUT.shapes.values())
    assert pool.stats().used_bytes == a_bytes + 200 * b_bytes
    assert pool.stats().num_factors == 2 + 200 * NUM_LAYERS * len(MODULES)

    expanded = MatrixPool(8 << 20, LAYOUT.feature_counts, torch.float16, "cpu")
    for adapter in adapters:  # as PEFT saves them: every layer its own clone of A
        pairs = {
            place: FactorPair(pair.a.clone(), pair.b, pair.scaling)
            for place, pair in adapter.pairs.items()
        }
        add(expanded, Adapter(adapter.name, adapter.digest, pairs, config={}), LAYOUT)
    assert expanded.stats() == pool.stats()
    expanded.check_integrity()


def test_equal_a_and_b_share_their_pages() -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.float32, "cpu")
    a = factor(8, 24, seed=1)
    pairs = {(0, "self_attn.q_proj"): FactorPair(a, a.T.contiguous(), 1.0)}
    table = add(pool, Adapter("same", "same", pairs, config={}), LAYOUT).page_table
    assert (table.a_pages == table.b_pages).all()
    assert pool.stats().num_factors == 1


def test_one_tensor_used_as_a_and_as_b_is_read_in_each_orientation() -> None:
    pool = MatrixPool(16_384, [8], torch.float32, "cpu")
    square = factor(8, 8, seed=1)
    layout = BaseLayout("square", 1, dict.fromkeys(MODULES, (8, 8)))
    pairs = {(0, "self_attn.q_proj"): FactorPair(square, square, 1.0)}
    table = add(pool, Adapter("square", "square", pairs, config={}), layout).page_table
    assert torch.equal(pool.view(8)[table.a_pages[0]], square)
    assert torch.equal(pool.view(8)[table.b_pages[0]], square.T)


@pytest.mark.parametrize("form", FORMS)
def test_staged_adapter_is_memory_of_its_own_and_no_more_than_its_factors(form: str) -> None:
    pool = MatrixPool(1 << 20, LAYOUT.feature_counts, torch.float32, "cpu")
    adapter, read = make_adapter(form, seed=1), make_adapter(form, seed=1)
    staged = pool.stage(read, LAYOUT)
    assert staged.num_bytes == adapter.num_bytes
    for pair in read.pairs.values():
        pair.a.zero_(), pair.b.zero_()
    assert_reads_back(pool, pool.place(staged), adapter)


def test_factors_that_only_the_cast_makes_equal_are_staged_once() -> None:
    pool = MatrixPool(1 << 20, LAYOUT.feature_counts, torch.float16, "cpu")
    a = factor(9, 24, seed=1).half().float()
    near = a * (1 + 2**-14)
    pairs = {
        (layer, "mlp.up_proj"): FactorPair(rows, factor(9, 40, seed=2 + layer).T, 1.0)
        for layer, rows in enumerate([a, near])
    }
    adapter = Adapter("near", "near", pairs, config={})
    staged = pool.stage(adapter, LAYOUT)
    assert not torch.equal(a, near)
    assert len(staged.factors) == 3
    assert staged.numbers.numel() == 9 * (24 + 40 + 40)
    assert_reads_back(pool, pool.place(staged), adapter)


def test_adapter_larger_than_the_pool_is_refused_for_good() -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.float32, "cpu")
    huge = make_adapter(rank=lambda _: 64)
    for refuse in (lambda: add(pool, huge, LAYOUT), lambda: pool.check(huge)):
        with pytest.raises(AdapterInvalidError, match="--adapter-memory"):
            refuse()
    small = make_adapter("ShareAB", modules=("self_attn.q_proj",))
    resident = add(pool, small, LAYOUT)
    with pytest.raises(AdapterInvalidError):  # also while others are in the way
        add(pool, huge, LAYOUT)
    assert_reads_back(pool, resident, small)


def test_adapter_that_fits_only_without_a_pinned_one_is_refused_for_good() -> None:
    pinned, other = make_adapter("LoRA", seed=1), make_adapter("LoRA", seed=2)
    needed = MatrixPool(1 << 20, LAYOUT.feature_counts, torch.float32, "cpu").num_bytes_for(pinned)
    pool = MatrixPool(needed * 3 // 2, LAYOUT.feature_counts, torch.float32, "cpu")
    resident = add(pool, pinned, LAYOUT)
    pool.check(other)  # it may come once the first has gone
    pool.pin(resident.page_table)
    for refuse in (lambda: add(pool, other, LAYOUT), lambda: pool.check(other)):
        with pytest.raises(AdapterInvalidError, match="for the merged adapter"):
            refuse()
    pool.check(make_adapter("ShareAB", modules=("self_attn.q_proj",)))
    assert_reads_back(pool, add(pool, pinned, LAYOUT), pinned)  # all of which is there


def test_pool_too_small_for_any_page_names_the_flag() -> None:
    with pytest.raises(ConfigurationError, match="--adapter-memory"):
        MatrixPool(1_000, LAYOUT.feature_counts, torch.float32, "cpu")


def test_releasing_twice_is_a_bug_that_is_seen() -> None:
    pool = MatrixPool(65_536, LAYOUT.feature_counts, torch.float32, "cpu")
    resident = add(pool, make_adapter("ShareAB"), LAYOUT)
    pool.release(resident)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(resident)


def test_same_factor_added_by_many_threads_at_once_is_written_before_it_is_used() -> None:
    pool = MatrixPool(1 << 20, LAYOUT.feature_counts, torch.float16, "cpu")
    adapters = [make_adapter("common A", seed=seed % 3) for seed in range(24)]

    def add_and_read(adapter: Adapter) -> None:
        resident = add(pool, adapter, LAYOUT)
        assert_reads_back(pool, resident, adapter)
        pool.release(resident)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add_and_read, adapters))
    pool.check_integrity()
    assert pool.stats().used_bytes == 0
