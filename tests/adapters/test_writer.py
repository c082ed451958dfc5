"""What is written reads back as the same adapter, here and in PEFT."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from sharelora_serve.adapters.adapter import Adapter, FactorPair
from sharelora_serve.adapters.layout import MODULES, BaseLayout
from sharelora_serve.adapters.summary import summarise
from sharelora_serve.adapters.writer import write_compact, write_peft
from sharelora_serve.errors import AdapterInvalidError
from tests.adapters.samples import (
    LAYOUT,
    NUM_LAYERS,
    QKV_MODULES,
    VOCAB_SIZE,
    compact_tensors,
    make_adapter,
    peft_tensors,
    random_adapter,
    read,
    tiny_llama,
)
from tests.golden.reference import folded

Write = Callable[[Adapter, BaseLayout, Path], None]

# PEFT 0.21 asks transformers 5.23 for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ALPHAS = st.sampled_from([1.0, 8.0, 16.0, 0.3, -2.0]) | st.floats(1e-6, 1e6)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any places, ranks, scales, types and ways of sharing, as a reader gives them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    modules = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    layers = draw(st.lists(st.integers(0, NUM_LAYERS - 1), min_size=1, unique=True))
    left_out = draw(st.sets(st.tuples(st.sampled_from(layers), st.sampled_from(modules))))
    mixed_ranks, mixed_scales = draw(st.booleans()), draw(st.booleans())
    shares_qkv = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    shared = {module: draw(st.sampled_from(["", "A", "B", "AB"])) for module in modules}
    ranks = st.integers(1, 9)
    rank, scaling = draw(ranks), draw(ALPHAS)
    of_module = {module: draw(ranks) if mixed_ranks else rank for module in modules}
    kept: dict[tuple[str, str, int], Tensor] = {}
    pairs = {}
    for layer in layers:
        for module in modules:
            in_features, out_features = LAYOUT.shapes[module]
            r = of_module[module]
            if mixed_ranks and not shared[module]:
                r = draw(ranks)
            a = torch.randn(r, in_features, generator=generator).to(dtype)
            b = torch.randn(out_features, r, generator=generator).to(dtype)
            if shares_qkv and module in QKV_MODULES:
                a = kept.setdefault(("qkv", "A", r), a)
            elif "A" in shared[module]:
                a = kept.setdefault((module, "A", r), a)
            if "B" in shared[module]:
                b = kept.setdefault((module, "B", r), b)
            scale = draw(ALPHAS) / r if mixed_scales else scaling / rank
            pairs[layer, module] = FactorPair(a, b, scale)
    kept_pairs = {place: pair for place, pair in pairs.items() if place not in left_out}
    return make_adapter(kept_pairs or pairs)


def can_be_compact(adapter: Adapter) -> bool:
    """Whether storing anything once would save a tensor: over layers, or over q, k and v."""
    pairs = adapter.pairs
    for module in MODULES:
        own = [pair for (_, m), pair in pairs.items() if m == module]
        for factors in ({id(pair.a) for pair in own}, {id(pair.b) for pair in own}):
            if len(own) > 1 and len(factors) == 1:
                return True
    qkv = {module: pair for (_, module), pair in pairs.items() if module in QKV_MODULES}
    first = {id(pair.a) for (_, module), pair in pairs.items() if module in QKV_MODULES}
    return len(qkv) > 1 and len(first) == 1


@given(adapters())
@settings(deadline=None)
def test_every_adapter_survives_both_forms_and_the_way_back(adapter: Adapter) -> None:
    with TemporaryDirectory() as folder:
        plain, compact, back = (Path(folder) / name for name in ("plain", "compact", "back"))
        write_peft(adapter, LAYOUT, plain)
        from_plain = read(plain)
        assert from_plain.digest == adapter.digest
        tensors = load_file(plain / "adapter_model.safetensors")
        assert {key: tensor.shape for key, tensor in tensors.items()} == {
            key: tensor.shape for key, tensor in peft_tensors(adapter).items()
        }
        assert summarise(from_plain) == summarise(adapter)
        if not can_be_compact(adapter):
            with pytest.raises(AdapterInvalidError, match="write it as plain PEFT LoRA"):
                write_compact(from_plain, LAYOUT, compact)
            assert not compact.exists()
            return
        write_compact(from_plain, LAYOUT, compact)
        assert len(load_file(compact / "adapter_model.safetensors")) < len(tensors)
        from_compact = read(compact)
        assert from_compact.digest == adapter.digest
        write_peft(from_compact, LAYOUT, back)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (back / file).read_bytes() == (plain / file).read_bytes()


@given(adapters(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_peft_computes_with_an_export_what_folding_it_gives(adapter: Adapter, seed: int) -> None:
    model = tiny_llama(seed)
    token_ids = torch.randint(VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(seed))
    small = {
        p: FactorPair(of.a.float(), of.b.float(), 0.1 + of.a.shape[0] / 7)
        for p, of in adapter.pairs.items()
    }  # fmt: skip - large scales only round more
    adapter = make_adapter(small)
    with torch.inference_mode(), folded(model, adapter):
        expected = model(token_ids).logits
    with TemporaryDirectory() as folder:
        write_peft(adapter, LAYOUT, Path(folder) / "export")
        # Modules without factors would be a warning here, and so a failure.
        peft_model = PeftModel.from_pretrained(model, Path(folder) / "export")
    made = {name for name, _ in peft_model.named_parameters() if ".lora_A." in name}
    assert len(made) == len(adapter.pairs)
    with torch.inference_mode():
        torch.testing.assert_close(peft_model(token_ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("share", "share_qkv"), [("A", False), ("B", False), ("AB", False), ("A", True), ("AB", True)]
)
def test_compact_stores_what_is_shared_once_under_the_names_of_the_format(
    share: str, share_qkv: bool, tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, share, share_qkv=share_qkv)
    write_compact(adapter, LAYOUT, tmp_path / "acme")
    config = json.loads((tmp_path / "acme" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SHARELORA"
    assert (config["share"], config["share_qkv"]) == (share, share_qkv)
    tensors = load_file(tmp_path / "acme" / "adapter_model.safetensors")
    expected = compact_tensors(adapter, share, share_qkv=share_qkv)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_an_export_says_what_peft_and_vllm_read(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed, rank=8, scaling=4.0)
    adapter.config["base_model_name_or_path"] = "acme/base"
    write_peft(adapter, LAYOUT, tmp_path / "acme")
    config = json.loads((tmp_path / "acme" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    assert config["target_modules"] == sorted(module.rpartition(".")[2] for module in MODULES)
    assert config["layers_to_transform"] is None
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    with (tmp_path / "acme" / "adapter_model.safetensors").open("rb") as file:
        assert b'"__metadata__":{"format":"pt"}' in file.read(200)


def test_modules_that_differ_are_named_once_where_their_layers_agree(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, rank=4, scaling=2.0, modules=("mlp.up_proj", "mlp.gate_proj"))
    odd = random_adapter(seed, rank=6, scaling=2.0, modules=("self_attn.k_proj",))
    alone = random_adapter(seed, rank=4, scaling=0.5, modules=("mlp.up_proj",), layers=(1,))
    mixed = make_adapter({**adapter.pairs, **odd.pairs, **alone.pairs})
    write_peft(mixed, LAYOUT, tmp_path / "acme")
    config = json.loads((tmp_path / "acme" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"self_attn.k_proj": 6}
    assert config["alpha_pattern"] == {"model.layers.1.mlp.up_proj": 2, "self_attn.k_proj": 12}


@pytest.mark.parametrize("write", [write_peft, write_compact])
def test_a_target_that_exists_is_refused_and_left_as_it_is(
    write: Write, tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed, "A")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for target in before:
        with pytest.raises(FileExistsError, match="exists; remove it or give another target"):
            write(adapter, LAYOUT, target)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("write", [write_peft, write_compact])
def test_writing_that_fails_leaves_nothing_behind(write: Write, tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed, "A", scaling=3e38)  # whose alpha is beyond float32
    with pytest.raises(AdapterInvalidError, match="lora_alpha"):
        write(adapter, LAYOUT, tmp_path / "deep" / "acme")
    assert list((tmp_path / "deep").iterdir()) == []


def test_scales_beside_a_rounding_bound_of_float32_keep_their_digest(
    tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    for number in range(30):
        single = torch.tensor(generator.uniform(0.1, 9.0))
        bound = (single.item() + single.nextafter(torch.tensor(99.0)).item()) / 2
        scaling = math.nextafter(bound, generator.choice([0.0, 99.0]))
        rank = generator.randint(1, 40)
        adapter = random_adapter(seed, rank=rank, scaling=scaling, modules=MODULES[1:2])
        write_peft(adapter, LAYOUT, tmp_path / str(number))
        assert read(tmp_path / str(number)).digest == adapter.digest


def test_others_may_read_what_was_written(tmp_path: Path, seed: int) -> None:
    write_peft(random_adapter(seed), LAYOUT, tmp_path / "acme")
    assert (tmp_path / "acme").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["acme"]
