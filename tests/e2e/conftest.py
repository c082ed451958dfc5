"""One server for most tests: a tiny random base in float32, with three random adapters."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from sharelora_serve.models.config import load_model_config
from sharelora_serve.server.codec import TextCodec
from tests.e2e.adapter_changes import Sample, make_sample
from tests.e2e.adapter_folders import NAMES, write_adapters
from tests.e2e.server_process import ServerProcess, running_server
from tests.golden.reference import load_reference
from tests.tiny_models import write_tiny_model

BASE = "tiny"
MAX_REQUEST_BYTES = 1_000_000


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / BASE, "smollm", seed)


@pytest.fixture(scope="session")
def adapters_folder(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, seed: int
) -> Path:
    return write_adapters(tmp_path_factory.mktemp("adapters"), model_folder, seed)


@pytest.fixture(scope="session")
def codec(model_folder: Path) -> TextCodec:
    """What the server tokenizes with."""
    return TextCodec(AutoTokenizer.from_pretrained(model_folder))


@pytest.fixture(scope="session")
def samples(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, codec: TextCodec, seed: int
) -> list[Sample]:
    """Adapters to upload, each with what it answers."""
    layout, reference = load_model_config(model_folder).layout(BASE), load_reference(model_folder)
    folders = [
        write_adapters(tmp_path_factory.mktemp("samples"), model_folder, seed + number)
        for number in range(2)
    ]
    return [
        make_sample(folder / name, layout, reference, codec) for folder in folders for name in NAMES
    ]


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, adapters_folder: Path
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {
        "--model": str(model_folder),
        "--adapters": str(adapters_folder),
        "--dtype": "float32",
        "--threads": "1",  # on a busy machine several would wait for each other
        "--max-request-bytes": str(MAX_REQUEST_BYTES),
    }
    with running_server(log, *(word for pair in settings.items() for word in pair)) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.openai() as openai:
        yield openai


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client
