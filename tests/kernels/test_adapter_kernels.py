"""Linear layers with adapters: every row through its own adapter's pages, and nobody else's."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.adapted import count_tasks, empty_list, list_pages
from sharelora_serve.kernels.batch import PAGE_RANK
from sharelora_serve.kernels.cpu import pages_of
from sharelora_serve.kernels.tiles import LANES, STRETCH
from tests.kernels.batches import (
    FUSED,
    LAYOUTS,
    OWNERS,
    POOL_DTYPES,
    Tenants,
    draw_owners,
    draw_tenants,
    same_bits,
    small_integers,
)
from tests.kernels.page_tables import ENTRY, SHARING, draw_case
from tests.kernels.parts import PARTS, Parts, packed

NO_BIAS = torch.empty(0)


def linear(
    parts: Parts,
    tenants: Tenants,
    x: Tensor,
    weight: Tensor,
    owners: Sequence[int],
    place: tuple[int, Tensor],
    bias: Tensor = NO_BIAS,
) -> Tensor:
    """W x + bias + s * B A x of every row, through an output that was NaN."""
    out = torch.full((len(x), -(-len(weight) // LANES) * LANES), float("nan"))
    before = x.clone()
    stored = packed(parts, weight)
    parts.adapted_linear(x, stored, bias, out, tenants.batch(owners), *place)
    assert same_bits(x, before)
    return out[:, : len(weight)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", POOL_DTYPES)
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("order", ["grouped", "mixed"])
def test_every_row_gets_its_own_adapter_and_nothing_else(
    parts: str, dtype: torch.dtype, owners: str, order: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator)
        for rows in (1, 4, 19, 70) if parts == "cpu" else (5,):
            of_rows = draw_owners(owners, rows, len(tenants.adapters), generator)
            if order == "mixed":
                of_rows = [of_rows[i] for i in torch.randperm(rows, generator=generator)]
            for fused in FUSED:
                layer = int(torch.randint(0, layout.num_layers, (), generator=generator))
                weight = tenants.draw_weight(fused, generator)
                x = small_integers(rows, weight.shape[1], generator=generator)
                bias = small_integers(len(weight), generator=generator)
                result = linear(
                    PARTS[parts], tenants, x, weight, of_rows, tenants.place(layer, fused), bias
                )
                expected = tenants.expected(x, weight, of_rows, layer, fused) + bias
                assert torch.equal(result, expected), (
                    f"{layout.name}, {fused} of layer {layer}, rows of {of_rows}"
                )


@pytest.mark.parametrize("dtype", POOL_DTYPES)
@pytest.mark.parametrize("owners", OWNERS)
def test_row_has_the_same_bits_whatever_adapters_stand_beside_it(
    dtype: torch.dtype, owners: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = PARTS["cpu"]
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator, exact=False)
        of_rows = draw_owners(owners, 40, len(tenants.adapters), generator)
        for fused in FUSED:
            weight = tenants.draw_weight(fused, generator, exact=False)
            place = tenants.place(1, fused)
            x = torch.randn(40, weight.shape[1], generator=generator)
            together = linear(cpu, tenants, x, weight, of_rows, place)
            for rows in (1, 2, 5, 19):
                chosen = torch.randperm(40, generator=generator)[:rows].sort().values
                owners_of_some = [of_rows[i] for i in chosen]
                some = linear(cpu, tenants, x[chosen], weight, owners_of_some, place)
                assert same_bits(some, together[chosen]), f"{layout.name}, {fused}, {rows} rows"


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_base_row_beside_adapter_rows_has_the_bits_of_the_base_alone(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator, exact=False)
        owners = draw_owners("uniform", 40, len(tenants.adapters), generator)
        is_base = torch.tensor(owners) == 0
        for fused in FUSED:
            weight = tenants.draw_weight(fused, generator, exact=False)
            x = torch.randn(40, weight.shape[1], generator=generator)
            result = linear(PARTS["cpu"], tenants, x, weight, owners, tenants.place(0, fused))
            alone = torch.full((40, -(-len(weight) // LANES) * LANES), float("nan"))
            PARTS["cpu"].linear(x, packed(PARTS["cpu"], weight), NO_BIAS, alone)
            assert same_bits(result[is_base], alone[is_base, : len(weight)])


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_one_module_alone_has_the_bits_that_it_has_in_a_fused_product(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = PARTS["cpu"]
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator, exact=False)
        owners = draw_owners("uniform", 23, len(tenants.adapters), generator)
        weight = tenants.draw_weight("qkv", generator, exact=False)
        x = torch.randn(23, weight.shape[1], generator=generator)
        entry, columns = tenants.place(0, "qkv")
        fused = linear(cpu, tenants, x, weight, owners, (entry, columns))
        for module, (begin, end) in enumerate(pairwise(columns)):
            place = entry + module, torch.tensor([0, end - begin])
            own = linear(cpu, tenants, x, weight[begin:end], owners, place)
            assert (own - fused[:, begin:end]).abs().max() <= 1e-5 * own.abs().max()
            if layout.name == "round":  # an output that shares a vector may round otherwise
                assert same_bits(own, fused[:, begin:end])


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_equal_adapters_under_two_page_tables_give_equal_bits(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tenants = draw_tenants(LAYOUTS["round"], dtype, generator, exact=False)
    weight = tenants.draw_weight("gate_up", generator, exact=False)
    x = torch.randn(1, weight.shape[1], generator=generator).repeat(10, 1)
    for layer in range(LAYOUTS["round"].num_layers):
        place = tenants.place(layer, "gate_up")
        result = linear(PARTS["cpu"], tenants, x, weight, [2, 3] * 5, place)
        assert same_bits(result, result[:1].repeat(10, 1))


@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_rows_between_two_that_share_pages_are_not_taken_for_theirs(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator)
        for owners in ([2, 5, 6, 3], [2, 5, 5, 3], [2, 0, 0, 3], [2, 4, 3], [0, 2, 3, 0, 2, 1, 3]):
            for layer in range(layout.num_layers):
                for fused in FUSED:
                    weight = tenants.draw_weight(fused, generator)
                    x = small_integers(len(owners), weight.shape[1], generator=generator)
                    place = tenants.place(layer, fused)
                    result = linear(PARTS["cpu"], tenants, x, weight, owners, place)
                    expected = tenants.expected(x, weight, owners, layer, fused)
                    assert torch.equal(result, expected), f"{layout.name}, {fused}, {owners}"


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_row_that_overflows_leaves_those_of_other_adapters_as_they_are(
    broken: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tenants = draw_tenants(LAYOUTS["odd"], torch.float16, generator, exact=False)
    owners = draw_owners("distinct", 20, len(tenants.adapters), generator)
    weight = tenants.draw_weight("qkv", generator, exact=False)
    x = torch.randn(20, weight.shape[1], generator=generator)
    before = linear(PARTS["cpu"], tenants, x, weight, owners, tenants.place(0, "qkv"))
    x[7] = broken
    after = linear(PARTS["cpu"], tenants, x, weight, owners, tenants.place(0, "qkv"))
    others = torch.arange(20) != 7
    assert same_bits(before[others], after[others])


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("dtype", POOL_DTYPES)
def test_what_is_listed_for_memory_to_bring_is_all_pages_of_a_batch_and_nothing_else(
    sharing: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = sorted(torch.randint(0, 5, (23,), generator=generator).tolist())
    case = draw_case(owners, 40, (24, 64, 136), generator, sharing=sharing, arena_dtype=dtype)
    batch, pages = case.batch, pages_of(case.batch)
    columns, arena = torch.tensor(case.columns).numpy(), pages.arena
    count = count_tasks(pages, columns)
    cut = int(torch.randint(0, count + 1, (), generator=generator))

    def list_tasks(begin: int, end: int, since: int) -> list[int]:
        listed = empty_list(pages, ENTRY, columns, 40, begin, end)
        num_listed = list_pages(pages, ENTRY, columns, 40, begin, end, since, listed)
        return (listed[:num_listed] - arena.ctypes.data).tolist()

    listed = list_tasks(0, count, 0)
    assert list_tasks(0, cut, 0) + list_tasks(cut, count, 0) == listed
    read, starts = set[int](), set[int]()
    for owner in set(owners) - {0}:
        for module, (begin, end) in enumerate(pairwise(case.columns)):
            first, last = batch.offsets[owner, ENTRY + module :][:2].tolist()
            for factor, width in ((batch.a_pages, 40), (batch.b_pages, end - begin)):
                size = PAGE_RANK * width * arena.itemsize
                for page in factor[first:last].tolist():
                    read |= set(range(page * size, (page + 1) * size))
                    starts |= set(range(page * size, (page + 1) * size, STRETCH))
    assert set(listed) == starts
    assert read <= {byte for start in listed for byte in range(start, start + STRETCH)}
    if sharing in ("nothing", "adapters"):  # the pieces of each stand together
        assert len(listed) == len(starts)
    # Another thread brings what it shares with the one before by itself.
    assert set(list_tasks(0, cut, 0)) | set(list_tasks(cut, count, cut)) == starts
