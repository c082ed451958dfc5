"""The GPU's adapters in Triton's interpreter, and on a GPU where there is one."""

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sharelora_serve.kernels.batch import AdapterBatch
from tests.kernels.batches import same_bits
from tests.kernels.page_tables import ENTRY, SHARING, Case, draw_case

triton = pytest.importorskip("triton")

from sharelora_serve.kernels import triton_adapted  # noqa: E402
from sharelora_serve.kernels.triton_adapted import add_adapters  # noqa: E402

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not triton.knobs.runtime.interpret, reason="kernels are compiled for the GPU"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.cuda),
]

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
INT8 = torch.int8

# Of x, out and arena.
DTYPES = (
    (FLOAT32, FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16, BFLOAT16),
    (FLOAT16, FLOAT16, FLOAT16),
    (BFLOAT16, FLOAT32, BFLOAT16),
    (FLOAT32, BFLOAT16, FLOAT16),
    (FLOAT32, FLOAT32, INT8),
    (BFLOAT16, BFLOAT16, INT8),
)


@pytest.fixture(autouse=True)
def _new_tensors_are_nan() -> Iterator[None]:
    """What torch.empty gives is NaN, so that nothing unwritten is read unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tensors_of(batch: AdapterBatch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def copied(case: Case, device: str) -> Case:
    """The same on a device, in memory of its own."""
    batch = case.batch
    tensors = {name: tensor.to(device) for name, tensor in tensors_of(batch).items()}
    x, out = case.x.to(device, copy=True), case.out.to(device, copy=True)
    return replace(case, x=x, out=out, batch=replace(batch, **tensors))


def run(case: Case, device: str) -> Tensor:
    """`out` after the kernels, on the CPU; the rest must be as it was."""
    there = copied(case, device)
    add_adapters(there.x, there.out, there.batch, ENTRY, there.columns)
    assert same_bits(case.x.float(), there.x.cpu().float())
    return there.out.cpu()


def rounded(values: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    if dtype == BFLOAT16 and device == "cpu":  # the interpreter cuts the last bits off
        values = (values.view(torch.int32) & -0x10000).view(FLOAT32)
    return values.to(dtype)


def check(case: Case, device: str) -> None:
    result, expected = run(case, device), rounded(case.expected(), case.out.dtype, device)
    assert torch.equal(result.isnan(), expected.isnan()), "NaN has spread, or was overwritten"
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sharing", SHARING)
def test_every_row_gets_its_own_adapter_whoever_shares_an_a(
    device: str, sharing: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = [0, 1, 1, 1, 2, 3, 3]
    check(draw_case(owners, 37, (53, 19, 130), generator, sharing=sharing, max_rank=30), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes_may_differ(device: str, dtypes: tuple[torch.dtype, ...], seed: int) -> None:
    x_dtype, out_dtype, arena_dtype = dtypes
    case = draw_case(
        [0, 1, 1, 2],
        24,
        (19, 40),
        torch.Generator().manual_seed(seed),
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        arena_dtype=arena_dtype,
        max_rank=16,
    )
    check(case, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("owners", [[0], [1], [0, 0, 1], [1, 2, 1, 0, 2, 1], [1] * 17], ids=str)
def test_rows_may_belong_to_anybody_in_any_order(device: str, owners: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(draw_case(owners, 24, (40,), generator, sharing="adapters", max_rank=40), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [1, 8, 13, 64])
def test_each_rank_is_as_defined(device: str, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(draw_case([1, 1, 2], 16, (24, 16), generator, max_rank=rank), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_features", [576, 1100])
def test_sums_that_are_cut_into_slices_are_whole(device: str, in_features: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(draw_case([1, 1, 2], in_features, (20,), generator, max_rank=20), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(("sharing", "arena_dtype"), [("nothing", FLOAT16), ("all", INT8)])
def test_prompts_are_as_defined(
    device: str,
    sliced: bool,
    sharing: str,
    arena_dtype: torch.dtype,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few rows for the interpreter's sake, cut into programs as many are.
    monkeypatch.setattr(triton_adapted, "_MAX_SPREAD_TOKENS", 0)
    monkeypatch.setattr(triton_adapted, "_MAX_SLICED_TOKENS", 1024 if sliced else 0)
    case = draw_case(
        [0] * 3 + [1] * 9 + [2] * 11 + [3],
        600,
        (30, 24),
        generator,
        sharing=sharing,
        x_dtype=FLOAT16,
        arena_dtype=arena_dtype,
        max_rank=20,
    )
    check(case, device)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_that_is_refilled_forgets_the_batch_before(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = AdapterBatch.reserve(16, ENTRY + 2, 3, torch.empty(0, device=device))
    for owners in ([1, 1, 2, 3, 3, 4], [0, 1, 2], [0, 0, 0]):
        case = draw_case(owners, 24, (40, 24), generator, max_rank=24)
        there = copied(case, device)
        kept.refill(there.batch)
        padding = 16 - len(owners)
        x, out = (
            torch.nn.functional.pad(part, (0, 0, 0, padding), value=float("nan"))
            for part in (there.x, there.out)
        )
        add_adapters(x, out, replace(kept, arena=there.batch.arena), ENTRY, there.columns)
        expected = case.expected()
        result = out.cpu()
        assert result[len(owners) :].isnan().all()
        assert torch.equal(result[: len(owners)].nan_to_num(), expected.nan_to_num())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, as asked
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_row_that_overflows_leaves_its_neighbours_as_they_are(
    device: str, broken: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = [1] * 5 + [2] * 3
    case = draw_case(owners, 24, (40,), generator, sharing="all", max_rank=24, exact=False)
    before = run(case, device)
    case.x[2] = broken
    after = run(case, device)
    others = torch.arange(8) != 2
    assert same_bits(before[others], after[others])


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_as_near_as_float32_is(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = draw_case([1, 1, 2, 3], 600, (40, 24), generator, max_rank=40, exact=False)
    result, expected = run(case, device), case.expected()
    error = (result - expected)[:, : case.columns[-1]].abs().max()
    assert error <= 1e-5 * expected[:, : case.columns[-1]].abs().max()


def test_operator_runs_without_a_gpu_on_tensors_that_only_have_shapes(seed: int) -> None:
    case = draw_case([0, 1, 2], 24, (40, 24), torch.Generator().manual_seed(seed))
    batch = case.batch
    with FakeTensorMode() as mode:

        def shape_of(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda")

        x, out = shape_of(case.x), shape_of(case.out)
        there = {name: shape_of(tensor) for name, tensor in tensors_of(batch).items()}
        batch = replace(batch, **there)
        add_adapters(x, out, batch, ENTRY, case.columns)
        left = replace(batch, offsets=mode.from_tensor(case.batch.offsets))
        with pytest.raises(AssertionError, match="not all on one device"):
            add_adapters(x, out, left, ENTRY, case.columns)
        with pytest.raises(AssertionError, match="narrower"):
            add_adapters(x, torch.empty(3, 50, device="cuda"), batch, ENTRY, case.columns)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "arena_dtype"),
    [(FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (BFLOAT16, BFLOAT16), (BFLOAT16, INT8)],
)
def test_row_has_the_same_bits_whatever_rows_stand_beside_it(
    dtype: torch.dtype, arena_dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, 9, (1500,), generator=generator).sort().values.tolist()
    case = draw_case(
        owners,
        4096,
        (4096, 1024, 1024),
        generator,
        sharing="modules",
        x_dtype=dtype,
        out_dtype=dtype,
        arena_dtype=arena_dtype,
        exact=arena_dtype == INT8,  # whole numbers are what it holds
    )
    together = run(case, "cuda")
    for rows in (1, 3, 40, 300, 1100):
        chosen = torch.randperm(1500, generator=generator)[:rows]
        batch = replace(case.batch, row_adapter=case.batch.row_adapter[chosen])
        some = run(replace(case, x=case.x[chosen], out=case.out[chosen], batch=batch), "cuda")
        assert same_bits(some.float(), together[chosen].float()), f"{rows} rows"


@pytest.mark.cuda
def test_graph_that_was_recorded_without_adapters_serves_any(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cases = [
        copied(draw_case(owners, 64, (48, 32), generator), "cuda")
        for owners in ([0] * 8, [1, 1, 2, 3, 3, 3, 3, 4], [0, 0, 0, 0, 1, 2, 3, 4])
    ]
    size = max(len(case.batch.arena) for case in cases)
    x, out = torch.zeros_like(cases[0].x), torch.zeros_like(cases[0].out)
    arena = torch.zeros(size, device="cuda")
    kept = AdapterBatch.reserve(8, ENTRY + 2, 8, arena)

    def step() -> None:
        add_adapters(x, out, kept, ENTRY, cases[0].columns)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for case in cases:
        kept.refill(case.batch)
        x.copy_(case.x)
        out.copy_(case.out)
        arena[: len(case.batch.arena)] = case.batch.arena
        graph.replay()
        assert torch.equal(out.nan_to_num(), case.expected().nan_to_num())
