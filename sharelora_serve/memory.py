"""Memory for what a CPU streams through: weights, keys and values, adapters' pages."""

import numpy as np
import torch
from torch import Tensor

CACHE_LINE = 64
"""Bytes that come from memory together."""


def streamed(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Not initialized, (num_elements,), from the beginning of a line of the cache.

    A processor fetches ahead no further than a page of memory, and looks up every page it comes
    to. numpy asks the system for huge pages, from 4 MiB on, which torch does not.
    """
    num_bytes = num_elements * dtype.itemsize
    memory = np.empty(num_bytes + CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[start : start + num_bytes]).view(dtype)
