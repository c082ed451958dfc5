"""Adapters on their way to a GPU: written when nobody reads the pages, there when placed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sharelora_serve.adapters import transfer
from sharelora_serve.adapters.pool import MatrixPool, PoolFullError
from tests.kernels.batches import LAYOUTS, draw_adapter


class Streams:
    """torch.cuda's streams as far as copies use them: a diary of who waits for whom."""

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary

    def Stream(self, _: torch.device) -> "Streams":  # noqa: N802 - torch's name
        return self

    def default_stream(self, _: torch.device) -> str:
        return "kernels"

    @contextmanager
    def stream(self, _: "Streams") -> Iterator[None]:
        self.diary.append("begin")
        yield
        self.diary.append("end")

    def wait_stream(self, other: str) -> None:
        self.diary.append(f"wait for {other}")

    def synchronize(self) -> None:
        self.diary.append("synchronize")


def test_pages_are_written_after_the_kernels_that_read_them_and_there_when_placed(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary: list[str] = []
    monkeypatch.setattr(transfer.torch, "cuda", Streams(diary))
    copies = transfer.CopyStream(torch.device("cuda", 0))
    monkeypatch.setattr(copies, "page_locked", torch.Tensor.clone)
    layout, generator = LAYOUTS["odd"], torch.Generator().manual_seed(seed)
    pool = MatrixPool(8 << 20, layout.feature_counts, torch.float16, "cpu")
    pool._copies = copies
    write = pool._write
    monkeypatch.setattr(pool, "_write", lambda *args: (diary.append("write"), write(*args)))
    staged = pool.stage(draw_adapter("one", layout, "A", generator), layout)
    assert not diary
    pool.release(pool.place(staged))
    num_factors = diary.count("write")
    assert num_factors == len(staged.factors) > 0
    expected = ["wait for kernels", "begin", *["write"] * num_factors, "end", "synchronize"]
    assert diary == expected
    pool.place(staged)  # into pages that kernels may still read
    assert diary == expected * 2


@pytest.mark.parametrize("failing", ["page_locked", "_write"])
def test_a_copy_that_fails_is_waited_for_and_gives_its_pages_back(
    failing: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    diary: list[str] = []
    monkeypatch.setattr(transfer.torch, "cuda", Streams(diary))
    layout, generator = LAYOUTS["odd"], torch.Generator().manual_seed(seed)
    pool = MatrixPool(8 << 20, layout.feature_counts, torch.float16, "cpu")
    staged = pool.stage(draw_adapter("one", layout, "", generator), layout)
    pool._copies = copies = transfer.CopyStream(torch.device("cuda", 0))
    monkeypatch.setattr(copies, "page_locked", torch.Tensor.clone)

    def fail(*_: object) -> None:
        raise PoolFullError("as it was told")

    monkeypatch.setattr(copies if failing == "page_locked" else pool, failing, fail)
    with pytest.raises(PoolFullError, match="as it was told"):
        pool.place(staged)
    assert diary[-1] == "synchronize"
    pool.check_integrity()
    assert pool.stats().used_bytes == 0
