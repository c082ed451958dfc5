"""What several tests of adapters publish."""

import pytest

from sharelora_serve.adapters.adapter import Adapter
from tests.adapters.store_model import read_contents, write_contents


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    folder = tmp_path_factory.mktemp("contents")
    write_contents(folder)
    return read_contents(folder)
