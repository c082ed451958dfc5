"""The GPU's adapter kernels as compiled for A100 (sm_80) and H100 (sm_90), without either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

MAX_REGISTERS = 128  # of a thread: four programs of 128 threads on a multiprocessor at once
MAX_SHARED_BYTES = 48 << 10  # what every GPU gives a program without being asked


def test_kernels_spill_nothing_and_read_sixteen_bytes_at_once(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_triton"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    reports = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(reports) >= 2 * 2 * 5  # both kernels, both GPUs, every dtype and size
    for report in reports:
        assert report["STACK"] == report["LOCAL"] == 0, f"registers are spilled: {report}"
        assert 0 < report["REG"] <= MAX_REGISTERS, report
        assert report["shared"] <= MAX_SHARED_BYTES, report
        assert report["wide"], f"elements are read one by one: {report}"
