"""What every test may use: fresh random inputs in each run, and the way to repeat them."""

import os
import secrets
from collections.abc import Generator

import pytest
import torch

# Triton decides as kernels are defined whether it will compile or, without a GPU, interpret them.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        help="Seed of the random inputs, such as 1234, to repeat a run; fresh without it.",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**31)


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs: --seed={config.option.seed}"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The seed of this run, the same in all of its tests; --seed sets it."""
    return int(pytestconfig.option.seed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Print the command that repeats a failure of a test with random inputs."""
    report = yield
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        command = f"python -m pytest '{item.nodeid}' --seed={item.config.option.seed}"
        report.sections.append(("repeat with", command))
    return report
