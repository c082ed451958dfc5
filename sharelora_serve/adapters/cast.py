"""Factors in the type that is served, and what they lose on the way."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from sharelora_serve.adapters.pages import PAGE_RANK

_MAX_UNDERFLOW = 0.01  # share of a factor's nonzero values that the cast may turn into zeros
_MAX_ROUNDING = 0.1  # of a rank row's norm that int8 may be off by; normal numbers give 0.01
_INT8_MAX = 127.0
_SMALLEST_STEP = 1e-37  # so that a page of zeros is divided by something


class CastFactor(NamedTuple):
    """A factor in the type of a pool.

    rows    (rank, features)
    scales  (num_pages,) float32, what a page's numbers are multiplied by; ones but for int8
    lost    beyond rounding; None for nothing
    """

    rows: Tensor
    scales: Tensor
    lost: str | None

    def restored(self) -> Tensor:
        """What is computed with, (rank, features) in float32."""
        return self.rows.float() * _of_rows(self.scales, len(self.rows))


def cast_factor(rows: Tensor, dtype: torch.dtype) -> CastFactor:
    """Cast (rank, features), in host memory, to the type of a pool."""
    if dtype == torch.int8:
        return _in_int8(rows)
    cast = rows.to(dtype)
    return CastFactor(cast, torch.ones(-(-len(rows) // PAGE_RANK)), lost_in_cast(rows, cast))


def lost_in_cast(original: Tensor, cast: Tensor) -> str | None:
    """What the cast to another floating point type would lose beyond rounding, or None."""
    if torch.promote_types(original.dtype, cast.dtype) == cast.dtype:
        return None  # a wider type holds everything
    if not torch.stack(torch.aminmax(cast)).isfinite().all():
        largest, limit = float(original.abs().max()), torch.finfo(cast.dtype).max
        num_overflown = cast.numel() - int(cast.isfinite().sum())
        return f"{num_overflown} values overflow (largest {largest:.4g}, limit {limit:.4g})"
    num_kept = int(cast.count_nonzero())
    if cast.numel() - num_kept > _MAX_UNDERFLOW * num_kept:  # zeros, but maybe from the start
        num_nonzero = int(original.count_nonzero())
        num_lost = num_nonzero - num_kept
        if num_lost > _MAX_UNDERFLOW * num_nonzero:
            return f"{num_lost} of {num_nonzero} nonzero values are too small and become 0"
    return None


def _in_int8(rows: Tensor) -> CastFactor:
    """Each page in steps of a 127th of its largest value."""
    exact = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    largest = pad(vector_norm(exact, torch.inf, dim=1), (0, -len(rows) % PAGE_RANK))
    steps = (largest.view(-1, PAGE_RANK).amax(1) / _INT8_MAX).clamp_(min=_SMALLEST_STEP)
    exact /= _of_rows(steps, len(rows))
    whole = exact.round()
    norms = vector_norm(exact, dim=1, dtype=torch.float64)  # whose squares do not become zero
    off = vector_norm(exact.sub_(whole), dim=1, dtype=torch.float64)
    lost = None
    if not (fine := off <= _MAX_ROUNDING * norms).all():
        row = int((~fine).nonzero()[0])
        lost = (
            f"rank row {row} would be off by {float(off[row] / norms[row]):.0%}: the largest value "
            f"of its page leaves steps of {float(steps[row // PAGE_RANK]):.2g}"
        )
    return CastFactor(whole.to(torch.int8), steps, lost)


def _of_rows(scales: Tensor, rank: int) -> Tensor:
    """The scale of each rank row's page, (rank, 1)."""
    return scales.repeat_interleave(PAGE_RANK)[:rank, None]
