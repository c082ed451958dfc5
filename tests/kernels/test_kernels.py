"""What stands between the products: the norm after an addition, and the gated activation."""

import pytest
import torch

from tests.kernels.batches import same_bits, small_integers
from tests.kernels.parts import PARTS

WIDTHS = (1, 16, 37, 64, 191)
ROWS = (1, 2, 3, 4, 5, 40)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_norm_of_the_sum_is_exact_where_nothing_rounds(
    parts: str, width: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = small_integers(rows, width, generator=generator)
    signs = 1.0 - 2 * torch.randint(0, 2, (rows, width), generator=generator)
    size = 2.0 ** torch.randint(-3, 4, (rows, 1), generator=generator)  # its root mean square
    delta = torch.full((rows, width + 13), float("nan"))  # padding is not read
    delta[:, :width] = signs * size - x
    weight = small_integers(width, generator=generator)
    out = torch.full((rows, width), float("nan"))
    PARTS[parts].kernels.add_and_norm(x, delta, weight, 0.0, out)
    assert torch.equal(x, signs * size)
    assert torch.equal(out, signs * weight)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_is_as_defined_to_the_last_digits(parts: str, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(9, width, generator=generator) for _ in range(2))
    weight = torch.randn(width, generator=generator)
    total = (x + delta).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 0.01).sqrt() * weight
    out = torch.full((9, width), float("nan"))
    PARTS[parts].kernels.add_and_norm(x, delta, weight, 0.01, out)
    assert same_bits(x, total.float())
    assert (out.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_norm_of_a_row_of_zeros_is_zero() -> None:
    for parts in PARTS.values():
        out = torch.full((5, 20), float("nan"))
        zeros = torch.zeros(5, 20)
        parts.kernels.add_and_norm(zeros, zeros.clone(), torch.ones(20), 1e-6, out)
        assert not out.any()


def test_division_by_zero_stays_in_its_row() -> None:
    for rows in (2, 8):
        x = torch.ones(rows, 16)
        x[1] = 0
        out = torch.full((rows, 16), float("nan"))
        PARTS["cpu"].kernels.add_and_norm(x, torch.zeros(rows, 16), torch.ones(16), 0.0, out)
        assert out[1].isnan().all()
        assert (out[torch.arange(rows) != 1] == 1).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_norm_of_a_row_has_the_same_bits_whatever_rows_stand_beside_it(
    width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(40, width, generator=generator) for _ in range(2))
    weight = torch.randn(width, generator=generator)
    together = torch.full((40, width), float("nan"))
    PARTS["cpu"].kernels.add_and_norm(x.clone(), delta, weight, 1e-5, together)
    for rows in ROWS:
        first = int(torch.randint(0, 41 - rows, (), generator=generator))
        some = slice(first, first + rows)
        out = torch.full((rows, width), float("nan"))
        PARTS["cpu"].kernels.add_and_norm(x[some].clone(), delta[some], weight, 1e-5, out)
        assert same_bits(out, together[some]), f"{rows} rows"


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gated_activation_is_as_defined(parts: str, width: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = torch.randn(rows, width, generator=generator) * 20
    up = torch.randn(rows, width, generator=generator)
    edges = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e4, -1e4, 1e-30])[:width]
    gate[0, : len(edges)] = edges
    gate_up = torch.full((rows, 2 * width + 5), float("nan"))  # padding is not read
    gate_up[:, :width], gate_up[:, width : 2 * width] = gate, up
    out = torch.full((rows, width), float("nan"))
    PARTS[parts].silu_and_multiply(gate_up, out)
    expected = gate.double() * gate.double().sigmoid() * up
    assert ((out.double() - expected).abs() <= 1e-6 * expected.abs() + 1e-30).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_gated_activation_of_a_row_has_the_same_bits_whatever_rows_stand_beside_it(
    width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(40, 2 * width, generator=generator)
    together = torch.full((40, width), float("nan"))
    PARTS["cpu"].silu_and_multiply(gate_up, together)
    for rows in ROWS:
        first = int(torch.randint(0, 41 - rows, (), generator=generator))
        out = torch.full((rows, width), float("nan"))
        PARTS["cpu"].silu_and_multiply(gate_up[first : first + rows], out)
        assert same_bits(out, together[first : first + rows]), f"{rows} rows"
