"""What a factor loses when it is cast to the type that is served."""

import torch
from torch import Tensor

_MAX_UNDERFLOW = 0.01  # share of a factor's nonzero values that the cast may turn into zeros


def lost_in_cast(name: str, original: Tensor, cast: Tensor) -> str | None:
    """What the cast would lose beyond rounding, or None."""
    if torch.promote_types(original.dtype, cast.dtype) == cast.dtype:
        return None  # a wider type holds everything
    if not torch.stack(torch.aminmax(cast)).isfinite().all():
        largest, limit = float(original.abs().max()), torch.finfo(cast.dtype).max
        num_overflown = cast.numel() - int(cast.isfinite().sum())
        return f"{name}: {num_overflown} values overflow (largest {largest:.4g}, limit {limit:.4g})"
    num_kept = int(cast.count_nonzero())
    if cast.numel() - num_kept > _MAX_UNDERFLOW * num_kept:  # zeros, but maybe from the start
        num_nonzero = int(original.count_nonzero())
        num_lost = num_nonzero - num_kept
        if num_lost > _MAX_UNDERFLOW * num_nonzero:
            return f"{name}: {num_lost} of {num_nonzero} nonzero values are too small and become 0"
    return None
