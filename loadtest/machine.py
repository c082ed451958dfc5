"""What a figure was measured on, and the memory of its processes."""

import platform
from pathlib import Path

from sharelora_serve.config import num_physical_cores


def describe_machine() -> str:
    """Such as 'AMD EPYC 7763, 2 cores, 23 GiB, Linux'."""
    return f"{_processor()}, {num_physical_cores()} cores, {_gibibytes()} GiB, {platform.system()}"


def resident_mib(pid: int) -> float:
    """Memory that a process has in RAM."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gibibytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    return round(kibibytes / 1024**2)
