"""Packed weights: the dense products and the embedding of the CPU's kernels."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sharelora_serve.kernels.cpu import multiplies_bfloat16
from sharelora_serve.kernels.tiles import LANES
from tests.kernels.batches import DTYPES, same_bits, small_integers
from tests.kernels.parts import PARTS, Parts, packed

CPU, REFERENCE = PARTS["cpu"], PARTS["reference"]
NO_BIAS = torch.empty(0)


def linear(parts: Parts, x: Tensor, weight: Tensor, bias: Tensor = NO_BIAS) -> Tensor:
    """x W^T + bias, through an output that was NaN."""
    out = torch.full((len(x), -(-len(weight) // LANES) * LANES), float("nan"))
    parts.linear(x, packed(parts, weight), bias, out)
    return out[:, : len(weight)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    [(1, 1), (37, 16), (64, 32), (53, 19), (30, 50), (7, 95), (32, 1), (96, 50)],
)
def test_linear_of_small_integers_is_exact_for_every_number_of_rows(
    dtype: torch.dtype, has_bias: bool, in_features: int, out_features: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = small_integers(out_features, in_features, generator=generator).to(dtype)
    bias = small_integers(out_features, generator=generator) if has_bias else NO_BIAS
    for rows in (*range(1, 19), 23, 24, 25, 31, 32, 33, 40, 49, 80):
        x = small_integers(rows, in_features, generator=generator)
        expected = x @ weight.float().T + (bias if has_bias else 0)
        assert torch.equal(linear(CPU, x, weight, bias), expected), f"{rows} rows"
        assert torch.equal(linear(REFERENCE, x, weight, bias), expected), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [301, 320])
def test_linear_rounds_no_more_than_a_sum_in_float32(
    dtype: torch.dtype, in_features: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(11, in_features, generator=generator)
    if dtype == torch.bfloat16:
        x = x.to(dtype).float()
    weight = torch.randn(70, in_features, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T
    bound = x.double().abs() @ weight.double().abs().T * in_features * 2.0**-24
    assert ((linear(CPU, x, weight).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [301, 320])
@pytest.mark.parametrize("rows", [1, 5, 33, 80])
def test_activations_are_rounded_where_bfloat16_is_multiplied_and_nowhere_else(
    dtype: torch.dtype, in_features: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator)
    weight = torch.randn(70, in_features, generator=generator).to(dtype)
    found, of_rounded = (linear(CPU, each, weight) for each in (x, x.bfloat16().float()))
    if dtype == torch.bfloat16 and in_features % 2 == 0 and multiplies_bfloat16():
        assert same_bits(found, of_rounded)
    else:
        exact = x.double() @ weight.double().T
        bound = x.double().abs() @ weight.double().abs().T * in_features * 2.0**-24
        assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(16, 32), (50, 96), (131, 64)])
def test_weight_for_matrix_registers_stands_as_they_read_it(
    shape: tuple[int, int], seed: int
) -> None:
    """On any processor: a register's row is two inputs of 16 outputs; rows follow each other."""
    outputs, inputs = shape
    blocks = -(-outputs // LANES)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    placed = np.full((blocks, inputs // 32, 16, LANES, 2), -1, np.int16)
    CPU.kernels.pack(weight, placed)
    n, k = np.divmod(np.arange(outputs * inputs), inputs)
    places = n // 16 * 16 * inputs + k // 2 * 32 + n % 16 * 2 + k % 2
    assert (placed.reshape(-1)[places] == weight.view(torch.int16).numpy().reshape(-1)).all()
    assert torch.equal(CPU.kernels.unpack(placed, outputs, torch.bfloat16), weight)
    out = torch.full(shape, float("nan"))
    CPU.kernels.embed(placed, torch.arange(outputs), out)
    assert torch.equal(out, weight.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [16, 45, 64])
@pytest.mark.parametrize("in_features", [131, 160])
def test_row_of_a_product_has_the_same_bits_whatever_rows_stand_beside_it(
    dtype: torch.dtype, in_features: int, out_features: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    alone = torch.cat([linear(CPU, row.unsqueeze(0), weight) for row in x])
    for rows in range(2, 41):
        first = int(torch.randint(0, 41 - rows, (), generator=generator))
        together = linear(CPU, x[first : first + rows].contiguous(), weight)
        assert same_bits(together, alone[first : first + rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 8), (50, 37), (1, 1), (131, 64)])
def test_embedding_is_the_weight_of_each_token(
    dtype: torch.dtype, shape: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    token_ids = torch.cat(
        [torch.arange(len(weight)), torch.randint(0, len(weight), (20,), generator=generator)]
    )
    for parts in PARTS.values():
        out = torch.full((len(token_ids), shape[1]), float("nan"))
        parts.kernels.embed(packed(parts, weight), token_ids, out)
        assert torch.equal(out, weight[token_ids].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_a_half_type_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 32)
    out = torch.full(weight.shape, float("nan"))
    CPU.kernels.embed(packed(CPU, weight), torch.arange(len(weight)), out)
    expected = weight.float()
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert same_bits(out[kept], expected[kept])


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weight_keeps_no_tie_to_the_one_it_was_given(
    parts: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = small_integers(24, 32, generator=generator).to(dtype)
    strided = torch.full((24, 64), float("nan"), dtype=dtype)[:, ::2]
    strided.copy_(weight)
    x = small_integers(3, 32, generator=generator)
    stored = packed(PARTS[parts], strided)
    strided.fill_(float("nan"))
    out = torch.full((3, 32), float("nan"))
    PARTS[parts].kernels.linear(x, stored, out)
    assert torch.equal(out[:, :24], x @ weight.float().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 8), (50, 37), (1, 1), (131, 64)])
def test_a_weight_comes_back_bit_for_bit_from_its_packed_form(
    dtype: torch.dtype, shape: tuple[int, int], seed: int
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for parts in PARTS.values():
        unpacked = parts.kernels.unpack(packed(parts, weight), shape[0], dtype)
        assert unpacked.dtype == dtype
        assert torch.equal(unpacked.contiguous().view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_product_of_no_rows_is_nothing(parts: str, dtype: torch.dtype) -> None:
    stored = packed(PARTS[parts], torch.ones(80, 32, dtype=dtype))
    PARTS[parts].linear(torch.empty(0, 32), stored, torch.empty(0), torch.empty(0, 80))
