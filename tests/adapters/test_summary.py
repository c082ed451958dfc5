"""Sharing is found in the bytes, whatever the file says of itself."""

from dataclasses import replace

import pytest

from sharelora_serve.adapters.layout import MODULES
from sharelora_serve.adapters.summary import summarise
from tests.adapters.samples import LAYOUT, NUM_LAYERS, make_adapter, random_adapter

SUM_IN = sum(LAYOUT.shapes[module][0] for module in MODULES)
SUM_OUT = sum(LAYOUT.shapes[module][1] for module in MODULES)


@pytest.mark.parametrize(
    ("share", "sharing", "num_a", "num_b"),
    [
        ("", "LoRA", NUM_LAYERS, NUM_LAYERS),
        ("A", "ShareA", 1, NUM_LAYERS),
        ("B", "ShareB", NUM_LAYERS, 1),
        ("AB", "ShareAB", 1, 1),
    ],
)
def test_a_summary_counts_every_distinct_matrix_once(
    share: str, sharing: str, num_a: int, num_b: int, seed: int
) -> None:
    summary = summarise(random_adapter(seed, share, rank=5))
    assert summary.sharing == sharing
    assert summary.ranks == (5,)
    assert summary.modules == MODULES
    assert summary.num_layers == NUM_LAYERS
    assert summary.num_factors == len(MODULES) * (num_a + num_b)
    assert summary.stored_bytes == 4 * 5 * (num_a * SUM_IN + num_b * SUM_OUT)
    assert summary.expanded_bytes == 4 * 5 * NUM_LAYERS * (SUM_IN + SUM_OUT)
    assert not summary.shares_qkv


def test_one_layer_that_differs_is_no_sharing(seed: int) -> None:
    adapter = random_adapter(seed, "A")
    pair = adapter.pairs[1, "mlp.up_proj"]
    odd = {(1, "mlp.up_proj"): replace(pair, a=pair.a + 1)}
    assert summarise(make_adapter({**adapter.pairs, **odd})).sharing == "LoRA"


def test_modules_of_a_single_layer_say_nothing_about_sharing(seed: int) -> None:
    shared = random_adapter(seed, "A", modules=MODULES[:2])
    single = random_adapter(seed + 1, modules=MODULES[2:], layers=(1,))
    assert summarise(make_adapter({**shared.pairs, **single.pairs})).sharing == "ShareA"
    assert summarise(single).sharing == "LoRA"


def test_one_a_for_q_k_and_v_is_told(seed: int) -> None:
    assert summarise(random_adapter(seed, "A", share_qkv=True)).shares_qkv
    one_layer = random_adapter(seed, "A", share_qkv=True, layers=(2,))
    assert summarise(one_layer).shares_qkv
    only_q = random_adapter(seed, "A", share_qkv=True, modules=MODULES[:1])
    assert not summarise(only_q).shares_qkv


def test_mixed_ranks_are_listed_in_order(seed: int) -> None:
    low = random_adapter(seed, rank=2, modules=MODULES[3:])
    high = random_adapter(seed, rank=13, modules=MODULES[:3])
    assert summarise(make_adapter({**high.pairs, **low.pairs})).ranks == (2, 13)
