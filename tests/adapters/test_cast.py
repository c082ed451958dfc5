"""Adapters in the types that a pool can have: what is held, and what is refused."""

from pathlib import Path

import pytest
import torch

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.cast import cast_factor
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.pages import PAGE_RANK
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.errors import AdapterInvalidError
from sharelora_serve.models.config import load_model_config
from sharelora_serve.models.embedded import embedded_base_folder
from tests.adapters.pools import add, assert_reads_back, factor, make_adapter
from tests.adapters.samples import LAYOUT

FOLDER = Path(__file__).parents[2] / "adapters"
EXAMPLES = [file.parent for file in FOLDER.glob("*/adapter_config.json")]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_what_an_example_adapter_adds_is_off_by_about_one_percent_in_int8(folder: Path) -> None:
    layout = load_model_config(embedded_base_folder()).layout("base")
    pairs = read_adapter(folder, layout, name=folder.name).pairs
    for layer in range(0, layout.num_layers, 7):
        for module in MODULES:
            pair = pairs[layer, module]
            added = pair.b.float() @ pair.a.float()
            a, b = (cast_factor(rows, torch.int8).restored() for rows in (pair.a, pair.b.T))
            assert (b.T @ a - added).norm() < 0.015 * added.norm()


def test_int8_page_has_a_scale_in_that_of_who_uses_it_and_is_off_by_half_a_step(
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.int8, "cpu")
    a = torch.randn(11, 24, generator=generator)
    pairs = {  # A and twice A are not the same factor, though they are the same whole numbers
        (layer, "mlp.up_proj"): FactorPair(
            factor, 1e-3 * torch.randn(40, 11, generator=generator), 1.5
        )
        for layer, factor in enumerate((a, 2 * a, a))
    }
    table = add(pool, Adapter("in-int8", "in-int8", pairs, config={}), LAYOUT).page_table
    assert pool.stats().num_factors == 5
    assert pool.stats().used_bytes == 2 * (2 * PAGE_RANK * 24) + 3 * (2 * PAGE_RANK * 40)
    for (layer, module), pair in pairs.items():
        first = table.offsets[LAYOUT.entry(layer, module)]
        for place in range(2):
            scaling = pair.scaling
            for pages, rows in ((table.a_pages, pair.a), (table.b_pages, pair.b.T)):
                original = rows[place * PAGE_RANK : (place + 1) * PAGE_RANK]
                step = float(original.abs().max()) / 127
                held = pool.view(rows.shape[1])[int(pages[first + place])][: len(original)]
                assert (held - original / step).abs().max() <= 0.501
                assert held.abs().max() == 127
                scaling *= step
            assert table.scaling[first + place] == pytest.approx(scaling, rel=1e-6)


def test_rank_row_that_int8_would_lose_is_refused_unless_it_is_zero() -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.int8, "cpu")

    def adapter(times: float) -> Adapter:
        a = factor(9, 24, seed=1)
        a[3] *= times
        pairs = {(1, "mlp.up_proj"): FactorPair(a, factor(9, 40, seed=2).T, 1.0)}
        return Adapter("uneven", "uneven", pairs, config={})

    with pytest.raises(AdapterInvalidError) as caught:
        pool.stage(adapter(1e-3), LAYOUT)
    assert "model.layers.1.mlp.up_proj.lora_A: rank row 3 would be" in caught.value.message
    assert "--adapter-dtype auto, or even the rank rows out" in caught.value.message
    for times in (0.0, 0.25, 1.0):
        add(pool, adapter(times), LAYOUT)


def test_int8_may_change_a_rank_row_by_a_tenth(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(8, 4096, generator=generator)
    # Rounding is off by 0.29 steps on average, and of normal numbers the largest is 127 steps.
    step = float(rows[1:].abs().max()) / 127
    for off, is_fine in ((0.08, True), (0.12, False)):
        rows[0] *= 12**-0.5 * step / off / rows[0].std()
        assert (cast_factor(rows, torch.int8).lost is None) == is_fine
    rows[0] *= 1e-25
    assert cast_factor(rows, torch.int8).lost is not None


def test_scale_that_is_an_integer_is_one_like_any_other() -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, torch.float16, "cpu")
    adapter = make_adapter(modules=("self_attn.q_proj",))
    for place, pair in adapter.pairs.items():
        adapter.pairs[place] = FactorPair(pair.a, pair.b, 20)
    assert_reads_back(pool, add(pool, adapter, LAYOUT), adapter)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("values", "dtype", "words"),
    [
        ([1e5, 1.0], torch.float16, "1 values overflow (largest 1e+05, limit 6.55e+04)"),
        ([1e-9, 1.0], torch.float16, "1 of 2 nonzero values are too small"),
    ],
)
def test_factor_that_the_dtype_cannot_hold_is_refused_by_name(
    values: list[float], dtype: torch.dtype, words: str
) -> None:
    pool = MatrixPool(16_384, LAYOUT.feature_counts, dtype, "cpu")
    adapter = make_adapter(modules=("self_attn.q_proj",), rank=lambda _: 1)
    pair = adapter.pairs[1, "self_attn.q_proj"]
    broken = torch.zeros(1, 24)
    broken[0, :2] = torch.tensor(values)
    adapter.pairs[1, "self_attn.q_proj"] = FactorPair(broken, pair.b, 1.0)
    with pytest.raises(AdapterInvalidError) as caught:
        pool.stage(adapter, LAYOUT)
    assert f"model.layers.1.self_attn.q_proj.lora_A: {words}" in caught.value.message
    assert "--dtype" in caught.value.message
    assert pool.stats().used_bytes == 0


def test_one_percent_of_underflow_is_accepted() -> None:
    pool = MatrixPool(1 << 16, [24, 100], torch.float16, "cpu")
    layout = BaseLayout("wide", 1, dict.fromkeys(MODULES, (100, 24)))
    a = torch.ones(1, 100)
    a[0, 0] = 1e-9
    pairs = {(0, "self_attn.q_proj"): FactorPair(a, torch.ones(24, 1), 1.0)}
    add(pool, Adapter("barely", "barely", pairs, config={}), layout)
    assert pool.stats().num_factors == 2
