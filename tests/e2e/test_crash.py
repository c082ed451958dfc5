"""A server that is killed at any moment: what it answered holds, what it did not is whole."""

import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.adapters.store_model import KEEP_VERSIONS, problems_in
from tests.e2e.adapter_changes import Changer, Sample
from tests.e2e.killable_server import KillableServer
from tests.e2e.server_process import SOON_SECONDS

NUM_CLIENTS = 4


def garbage_in(store: Path) -> set[str]:
    """Files that no row needs, and versions that no name has."""
    database = sqlite3.connect(f"{(store / 'registry.sqlite3').as_uri()}?mode=ro", uri=True)
    try:
        needed = {row[0] for row in database.execute("SELECT file FROM content_files")}
        query = "SELECT digest FROM contents WHERE digest NOT IN (SELECT digest FROM versions)"
        unnamed = {row[0] for row in database.execute(query)}
    finally:
        database.close()
    return unnamed | ({path.name for path in (store / "factors").iterdir()} - needed)


@pytest.mark.parametrize("num_kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_what_was_answered_survives_a_kill_and_what_was_not_is_whole(
    num_kills: int, model_folder: Path, samples: list[Sample], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    arguments = ("--adapter-versions", str(KEEP_VERSIONS))
    clients = [Changer(number, samples, seed) for number in range(NUM_CLIENTS)]
    with (
        KillableServer(model_folder, tmp_path, *arguments) as server,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        for _ in range(num_kills):
            changing = [pool.submit(client.change_until_killed, server.url) for client in clients]
            time.sleep(draw.uniform(0.05, 1.0))
            server.kill()
            for client in changing:
                client.result()
            server.start()
            assert not list((server.store / "incoming").iterdir())
            assert problems_in(server.store) == []
            for client in clients:
                client.assert_finds_its_adapters(server.url)
            assert "ERROR" not in server.log
        deadline = time.monotonic() + SOON_SECONDS
        while garbage := garbage_in(server.store):
            assert time.monotonic() < deadline, f"never collected: {garbage}"
            time.sleep(0.05)
        assert problems_in(server.store) == []
    assert sum(client.num_changes for client in clients) > num_kills
