"""A process that is killed in the middle of a change leaves the store as before or after it."""

from pathlib import Path

import pytest

from sharelora_serve.adapters.store import AdapterStore
from tests.adapters.shelves import LAYOUT
from tests.adapters.store_model import (
    StoreModel,
    files_in,
    files_needed,
    operations,
    problems_in,
    read_contents,
    write_contents,
)
from tests.adapters.store_process import Killer


@pytest.mark.parametrize("num_kills", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_every_change_whole_or_undone(
    num_kills: int, tmp_path: Path, seed: int
) -> None:
    write_contents(tmp_path / "contents")
    contents = read_contents(tmp_path / "contents")
    folder = tmp_path / "store"
    killer = Killer(folder, tmp_path / "contents", seed)
    model, total_done = StoreModel(), 0
    for kill in range(num_kills):
        num_done = killer.run_and_kill(seed + kill)
        total_done += num_done
        under_way = operations(seed + kill)
        for _, operation in zip(range(num_done), under_way, strict=False):
            model = operation.after(model, contents)
        store = AdapterStore(folder, LAYOUT)
        try:
            found = StoreModel.of(store)
            operation = next(under_way)
            after = operation.after(model, contents)
            assert found in (model, after), f"killed in {operation}, kill {kill}"
            assert not list((folder / "incoming").iterdir())
            assert problems_in(folder) == []
            store.collect(())
            assert files_in(folder) == files_needed(found.digests, contents)
        finally:
            store.close()
        model = found
    assert total_done > num_kills, "nothing was killed in the middle of its work"
