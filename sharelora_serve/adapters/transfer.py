"""Adapters on their way to a GPU: a stream of their own, and page-locked memory to copy from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CopyStream:
    """Copies to one CUDA device beside what it computes; used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        """Kernels run on the device's default stream."""
        self._stream = torch.cuda.Stream(device)
        self._kernels = torch.cuda.default_stream(device)

    def page_locked(self, numbers: Tensor) -> Tensor:
        """A copy that the device reads by itself; torch uses its memory again once it is freed."""
        return numbers.pin_memory()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """What is written inside is there afterwards, whatever stream then reads it.

        It starts when the kernels that are queued now have ended: they may still read the old
        content of pages that were given back after they were launched. Kernels that are launched
        meanwhile wait for nothing, and nothing but this thread waits for the copies.
        """
        self._stream.wait_stream(self._kernels)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()
