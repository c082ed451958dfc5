"""Factors in the type that is served, and what they lose on the way."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from sharelora_serve.adapters.pages import PAGE_RANK

_MAX_UNDERFLOW = 0.01  # share of a factor's nonzero values that the cast may turn into zeros
_MAX_ROUNDING = 0.1  # of a rank row's norm that int8 may be off by; normal numbers give 0.01
_INT8_MAX, _SMALLEST_STEP = 127.0, 1e-37


class CastFactor(NamedTuple):
    """A factor in the type of a pool, which computes with each of its pages times a scale.

    rows    (rank, features)
    scales  (num_pages,)  all ones but for int8, of which the largest value of a page is 127
    lost    beyond rounding; None for nothing
    """

    rows: Tensor
    scales: npt.NDArray[np.float64]
    lost: str | None

    def restored(self) -> Tensor:
        """What is computed with, (rank, features) in float32."""
        scales = torch.from_numpy(self.scales).float().repeat_interleave(PAGE_RANK)
        return self.rows.float() * scales[: len(self.rows), None]


def cast_factor(rows: Tensor, dtype: torch.dtype) -> CastFactor:
    """Cast (rank, features), in host memory, to the type of a pool."""
    if dtype == torch.int8:
        return _in_int8(rows)
    cast = rows.to(dtype).contiguous()
    return CastFactor(cast, np.ones(-(-len(rows) // PAGE_RANK)), lost_in_cast(rows, cast))


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
    exact = rows.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    padding = -len(rows) % PAGE_RANK
    largest = pad(torch.linalg.vector_norm(exact, torch.inf, dim=1), (0, padding))
    steps = (largest.view(-1, PAGE_RANK).amax(1) / _INT8_MAX).clamp_(min=_SMALLEST_STEP)
    exact /= steps.repeat_interleave(PAGE_RANK)[: len(rows), None]
    whole = exact.round()
    norms = torch.linalg.vector_norm(exact, dim=1)
    off = torch.linalg.vector_norm(exact.sub_(whole), dim=1)
    lost = None
    if not (fine := off <= _MAX_ROUNDING * norms).all():
        row = int((~fine).nonzero()[0])
        lost = (
            f"rank row {row} would be off by {float(off[row] / norms[row]):.0%}: the largest value "
            f"of its page leaves steps of {float(steps[row // PAGE_RANK]):.2g}"
        )
    return CastFactor(whole.to(torch.int8), steps.double().numpy(), lost)
