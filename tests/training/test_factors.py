"""Tied factors: their gradients, their counts, and that training keeps them tied."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.naming import QKV_MODULES
from sharelora_serve.errors import ConfigurationError
from sharelora_serve.models.config import load_model_config
from sharelora_serve.training.counts import Method, num_trained
from sharelora_serve.training.export import export
from sharelora_serve.training.factors import Factors, add_factors
from sharelora_serve.training.settings import TrainSettings

METHODS = {
    "lora": Method(""),
    "share-a": Method("A"),
    "share-b": Method("B"),
    "share-ab": Method("AB"),
    "share-qkv": Method("A", share_qkv=True),
    "share-qkv-ab": Method("AB", share_qkv=True),
    "share-only": Method("A", share_only=QKV_MODULES),
    "frozen": Method("A", freeze_a=True),
    "frozen-each": Method("", freeze_a=True),
}
NUM_STEPS = 3


@pytest.fixture(scope="module")
def layout(model_folder: Path) -> BaseLayout:
    return load_model_config(model_folder).layout("tiny")


def settings_of(method: Method, seed: int) -> TrainSettings:
    drawn = random.Random(seed)
    modules = tuple(m for m in MODULES if m in QKV_MODULES or drawn.random() < 0.7)
    return TrainSettings(modules, method, rank=drawn.randrange(1, 10), seed=seed)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(10, 40_000, (3, 12), generator=torch.Generator().manual_seed(seed))


def train_a_little(model: Any, factors: Factors, seed: int) -> None:
    optimizer = torch.optim.AdamW(factors.trained.values(), lr=1e-2)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens(seed + step), labels=tokens(seed + step)).loss.backward()
        optimizer.step()


def exported(
    factors: Factors, layout: BaseLayout, settings: TrainSettings, folder: Path
) -> Adapter:
    export(factors, layout, settings, "tiny", folder, torch.float16)
    return read_adapter(folder, layout, name=folder.name)


@pytest.mark.parametrize("name", METHODS)
def test_a_shared_factors_gradient_is_the_sum_over_the_layers(
    name: str, model_folder: Path, layout: BaseLayout, seed: int
) -> None:
    settings = settings_of(METHODS[name], seed)
    tied = load(model_folder)
    factors = add_factors(tied, layout, settings)
    generator = torch.Generator().manual_seed(seed)
    for a, b in factors.pairs.values():  # B too, else no gradient would reach A
        b.data.normal_(generator=generator).mul_(0.1)
        assert a.abs().max() <= a.shape[1] ** -0.5
    untied = load(model_folder)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=int(settings.alpha),
        target_modules=[module.rpartition(".")[2] for module in settings.modules],
        task_type="CAUSAL_LM",
    )
    decoder = untied.model
    get_peft_model(untied, config)
    expected: dict[int, torch.Tensor] = {}
    apart = {}
    for (layer, module), (a, b) in factors.pairs.items():
        linear = decoder.layers[layer].get_submodule(module)
        apart[layer, module] = (linear.lora_A.default.weight, linear.lora_B.default.weight)
        apart[layer, module][0].data.copy_(a)
        apart[layer, module][1].data.copy_(b)
    for model in (tied, untied):
        model(input_ids=tokens(seed), labels=tokens(seed)).loss.backward()
    for place, (a, b) in factors.pairs.items():
        for factor, own in zip((a, b), apart[place], strict=True):
            assert own.grad is not None
            expected[id(factor)] = expected.get(id(factor), torch.zeros(())) + own.grad
    for factor in factors.trained.values():
        assert factor.grad is not None
        torch.testing.assert_close(factor.grad, expected[id(factor)], rtol=1e-3, atol=1e-5)
    frozen = {id(a) for a, _ in factors.pairs.values() if not a.requires_grad}
    assert bool(frozen) is settings.method.freeze_a


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shared_is_the_same_bytes_in_every_layer_after_training(
    name: str, model_folder: Path, layout: BaseLayout, tmp_path: Path, seed: int
) -> None:
    settings = settings_of(METHODS[name], seed)
    method = settings.method
    model = load(model_folder)
    factors = add_factors(model, layout, settings)
    before = {place: a.detach().clone() for place, (a, _) in factors.pairs.items()}
    shapes = {module: layout.shapes[module] for module in settings.modules}
    assert sum(factor.numel() for factor in factors.trained.values()) == num_trained(
        layout.num_layers, shapes, settings.rank, method
    )
    train_a_little(model, factors, seed)
    adapter = exported(factors, layout, settings, tmp_path / "trained")
    assert adapter.pairs.keys() == factors.pairs.keys()
    for module in settings.modules:
        for side in "AB":
            distinct = {
                id(pair.a if side == "A" else pair.b)
                for (_, of), pair in adapter.pairs.items()
                if of == module
            }
            assert len(distinct) == (1 if method.shares(module, side) else layout.num_layers)
    if method.share_qkv:
        assert len({id(adapter.pairs[0, module].a) for module in QKV_MODULES}) == 1
    for place, pair in adapter.pairs.items():
        of_rank = settings.rank**0.5 if settings.rslora else settings.rank
        assert pair.scaling == pytest.approx(settings.alpha / of_rank)
        a, b = factors.pairs[place]
        assert pair.a.equal(a.half())
        assert pair.b.equal(b.half())
        assert a.equal(before[place]) is method.freeze_a


def test_tenants_who_freeze_the_a_of_one_seed_have_it_whatever_else_they_adapt(
    model_folder: Path, layout: BaseLayout, seed: int
) -> None:
    method = Method("A", freeze_a=True)
    one = TrainSettings(MODULES, method, freeze_a_from=seed, seed=1)
    other = replace(one, modules=MODULES[2:4], seed=2)
    first = add_factors(load(model_folder), layout, one)
    second = add_factors(load(model_folder), layout, other)
    for place, (a, _) in second.pairs.items():
        assert a.equal(first.pairs[place][0])
    another = add_factors(load(model_folder), layout, replace(one, freeze_a_from=seed + 1))
    assert not another.pairs[0, MODULES[0]][0].equal(first.pairs[0, MODULES[0]][0])


def test_an_a_taken_from_an_adapter_is_its_very_bytes_in_the_next_one(
    model_folder: Path, layout: BaseLayout, tmp_path: Path, seed: int
) -> None:
    common = TrainSettings(MODULES, Method("A"), rank=5, seed=seed)
    model = load(model_folder)
    factors = add_factors(model, layout, common)
    train_a_little(model, factors, seed)
    given = exported(factors, layout, common, tmp_path / "common")
    frozen = Method("A", freeze_a=True)
    tenant = replace(common, method=frozen, freeze_a_from=tmp_path / "common", seed=seed + 1)
    model = load(model_folder)
    factors = add_factors(model, layout, tenant)
    train_a_little(model, factors, seed + 1)
    adapter = exported(factors, layout, tenant, tmp_path / "tenant")
    for place, pair in adapter.pairs.items():
        assert pair.a.equal(given.pairs[place].a)
        assert not pair.b.equal(given.pairs[place].b)
    with pytest.raises(ConfigurationError, match=r"has not an A of rank 6 .* give its --rank"):
        add_factors(load(model_folder), layout, replace(tenant, rank=6))
    apart = replace(common, method=Method(""))
    model = load(model_folder)
    factors = add_factors(model, layout, apart)
    train_a_little(model, factors, seed)
    exported(factors, layout, apart, tmp_path / "apart")
    with pytest.raises(ConfigurationError, match=r"another A of self_attn\.q_proj in every"):
        add_factors(load(model_folder), layout, replace(tenant, freeze_a_from=tmp_path / "apart"))


def test_one_a_for_q_k_and_v_is_taken_from_an_adapter_that_has_one(
    model_folder: Path, layout: BaseLayout, tmp_path: Path, seed: int
) -> None:
    frozen = Method("A", freeze_a=True, share_qkv=True)
    for share_qkv in (True, False):
        source = TrainSettings(MODULES[1:3], Method("A", share_qkv=share_qkv), seed=seed)
        model = load(model_folder)
        factors = add_factors(model, layout, source)
        train_a_little(model, factors, seed)
        given = exported(factors, layout, source, tmp_path / str(share_qkv))
        tenant = replace(source, method=frozen, freeze_a_from=tmp_path / str(share_qkv))
        if share_qkv:
            taken = add_factors(load(model_folder), layout, tenant)
            for place, (a, _) in taken.pairs.items():
                assert a.equal(given.pairs[place].a)
        else:
            with pytest.raises(ConfigurationError, match="leave --share-qkv out"):
                add_factors(load(model_folder), layout, tenant)


def test_factors_that_the_stored_type_cannot_hold_are_refused(
    model_folder: Path, layout: BaseLayout, tmp_path: Path
) -> None:
    settings = TrainSettings(MODULES, Method("A"))
    factors = add_factors(load(model_folder), layout, settings)
    for _, b in factors.pairs.values():
        b.data.fill_(0.5)
    factors.pairs[0, MODULES[0]][1].data.fill_(1e6)
    with pytest.raises(ConfigurationError, match=r"q_proj\.lora_B.*--dtype float32"):
        export(factors, layout, settings, "tiny", tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
    export(factors, layout, settings, "tiny", tmp_path / "out", torch.float32)
    assert (tmp_path / "out").exists()
