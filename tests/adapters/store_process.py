"""A process that changes a store without end, to be killed in the middle of it."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

from sharelora_serve.adapters.store import AdapterStore
from tests.adapters.shelves import LAYOUT
from tests.adapters.store_model import operations, read_contents

OPENED = b"opened"
DONE = b"done"

PATIENCE_SECONDS = 60.0


def change_for_ever(store_folder: Path, contents_folder: Path, seed: int, tell: Connection) -> None:
    """Tell OPENED, and DONE after each of `operations(seed)`: what was told is on disk."""
    contents = read_contents(contents_folder)
    store = AdapterStore(store_folder, LAYOUT)
    tell.send_bytes(OPENED)
    for operation in operations(seed):
        operation.run(store, contents)
        tell.send_bytes(DONE)


class Killer:
    """Starts such processes, from one that has all modules loaded, and kills them."""

    def __init__(self, store_folder: Path, contents_folder: Path, seed: int) -> None:
        self._folders = store_folder, contents_folder
        self._draw = random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    def run_and_kill(self, seed: int) -> int:
        """Let a process change the store, and return after how many of its changes it was killed.

        It may have begun one more.
        """
        hear, tell = self._context.Pipe(duplex=False)
        process = self._context.Process(target=change_for_ever, args=(*self._folders, seed, tell))
        process.start()
        tell.close()
        if self._draw.random() < 0.8:  # else it may be killed while it opens the store
            assert hear.poll(PATIENCE_SECONDS), "the process opened no store"
        time.sleep(self._draw.uniform(0.0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -9, "the process ended by itself"
        process.close()
        num_done = 0
        with hear:
            while (told := _told(hear)) is not None:
                num_done += told == DONE
        return num_done


def _told(hear: Connection) -> bytes | None:
    try:
        return hear.recv_bytes()
    except EOFError:
        return None
