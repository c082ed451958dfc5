"""Disks that are full or may not be written, as far as the machine lets one make them."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def files_limited(num_bytes: int) -> Iterator[None]:
    """Every write of this process beyond this size of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def mounted(folder: Path, *what: str) -> Iterator[None]:
    """Something is mounted on the folder; skips the test where that is not allowed."""
    command = ["mount", *what, str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"nothing may be mounted here: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write to the folder: permissions do not hold root back, a mount does."""
    if os.geteuid():
        folder.chmod(0o500)
        yield
        folder.chmod(0o700)
        return
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield


def fill(disk: Path) -> Path:
    """A file that takes what is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for num_bytes in (65536, 4096, 1):
            try:
                while file.write(bytes(num_bytes)) == num_bytes:
                    pass
            except OSError:
                pass
    return ballast
