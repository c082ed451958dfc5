"""Shrink and expand: every row of a batch through its own adapter's pages, and nobody else's."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.cpu import CpuKernels
from sharelora_serve.kernels.interface import Kernels
from sharelora_serve.kernels.reference import ReferenceKernels
from tests.kernels.batches import (
    DTYPES,
    FUSED,
    LAYOUTS,
    OWNERS,
    Tenants,
    draw_owners,
    draw_tenants,
    same_bits,
    small_integers,
)

KERNELS: dict[str, Kernels] = {"cpu": CpuKernels(), "reference": ReferenceKernels()}


def add_adapters(
    kernels: Kernels,
    tenants: Tenants,
    x: Tensor,
    out: Tensor,
    owners: Sequence[int],
    place: tuple[int, str],
) -> Tensor:
    """The result of the kernel; what was given is left as it was."""
    result = out.clone()
    before = x.clone()
    kernels.add_adapters(x, result, tenants.batch(owners), tenants.modules(*place))
    assert same_bits(x, before)
    return result


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("order", ["grouped", "mixed"])
def test_every_row_gets_its_own_adapter_and_nothing_else(
    kernels: str, dtype: torch.dtype, owners: str, order: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator)
        for rows in (1, 2, 3, 17, 40):
            of_rows = draw_owners(owners, rows, len(tenants.adapters), generator)
            if order == "mixed":
                of_rows = [of_rows[i] for i in torch.randperm(rows, generator=generator)]
            for fused in FUSED:
                layer = int(torch.randint(0, layout.num_layers, (), generator=generator))
                in_features, out_features = tenants.widths(fused)
                x = small_integers(rows, in_features, generator=generator)
                # The product's columns end in padding; it and the base's rows are not touched.
                out = torch.full((rows, -(-out_features // 16) * 16), float("nan"))
                is_tenants = torch.tensor(of_rows) > 0
                out[is_tenants, :out_features] = small_integers(
                    int(is_tenants.sum()), out_features, generator=generator
                )
                expected = tenants.expected(x, out, of_rows, layer, fused)
                result = add_adapters(KERNELS[kernels], tenants, x, out, of_rows, (layer, fused))
                assert torch.equal(result.nan_to_num(1e9), expected.nan_to_num(1e9)), (
                    f"{layout.name}, {fused} of layer {layer}, rows of {of_rows}"
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owners", OWNERS)
def test_row_has_the_same_bits_whatever_adapters_stand_beside_it(
    dtype: torch.dtype, owners: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    cpu = KERNELS["cpu"]
    for layout in LAYOUTS.values():
        tenants = draw_tenants(layout, dtype, generator, exact=False)
        of_rows = draw_owners(owners, 40, len(tenants.adapters), generator)
        for fused in FUSED:
            in_features, out_features = tenants.widths(fused)
            x = torch.randn(40, in_features, generator=generator)
            out = torch.randn(40, -(-out_features // 16) * 16, generator=generator)
            together = add_adapters(cpu, tenants, x, out, of_rows, (1, fused))
            for rows in (1, 1, 1, 2, 3, 5, 8, 19):
                chosen = torch.randperm(40, generator=generator)[:rows].sort().values
                some = add_adapters(
                    cpu,
                    tenants,
                    x[chosen],
                    out[chosen],
                    [of_rows[i] for i in chosen],
                    (1, fused),
                )
                assert same_bits(some, together[chosen]), f"{layout.name}, {fused}, {rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_module_alone_has_the_bits_that_it_has_in_a_fused_product(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tenants = draw_tenants(LAYOUTS["odd"], dtype, generator, exact=False)
    owners = draw_owners("uniform", 23, len(tenants.adapters), generator)
    in_features, out_features = tenants.widths("qkv")
    x = torch.randn(23, in_features, generator=generator)
    out = torch.randn(23, out_features, generator=generator)
    fused = add_adapters(KERNELS["cpu"], tenants, x, out, owners, (0, "qkv"))
    batch = tenants.batch(owners)
    for entry, column, features in tenants.modules(0, "qkv").tolist():
        own = out[:, column : column + features].contiguous()
        KERNELS["cpu"].add_adapters(x, own, batch, torch.tensor([[entry, 0, features]]))
        assert same_bits(own, fused[:, column : column + features])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_adapters_under_two_page_tables_give_equal_bits(
    dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tenants = draw_tenants(LAYOUTS["round"], dtype, generator, exact=False)
    in_features, out_features = tenants.widths("gate_up")
    x = torch.randn(1, in_features, generator=generator).repeat(10, 1)
    out = torch.zeros(10, out_features)
    for layer in range(LAYOUTS["round"].num_layers):
        place = (layer, "gate_up")
        result = add_adapters(KERNELS["cpu"], tenants, x, out, [2, 3] * 5, place)
        assert same_bits(result, result[:1].repeat(10, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_with_the_negative_of_another_cancels_it(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tenants = draw_tenants(LAYOUTS["odd"], dtype, generator)
    in_features, out_features = tenants.widths("down")
    x = small_integers(20, in_features, generator=generator)
    start = small_integers(20, out_features, generator=generator)
    owners = draw_owners("distinct", 20, len(tenants.adapters), generator)
    there = add_adapters(KERNELS["cpu"], tenants, x, start, owners, (1, "down"))
    back = add_adapters(KERNELS["cpu"], tenants, -x, there, owners, (1, "down"))
    assert torch.equal(back, start)
