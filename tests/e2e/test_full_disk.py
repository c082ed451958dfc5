"""A server whose disk is full, or may not be written."""

import time
from pathlib import Path

import httpx
import pytest

from tests.adapters.disks import read_only
from tests.adapters.store_model import problems_in
from tests.e2e.adapter_changes import Sample, assert_answers_as, upload
from tests.e2e.killable_server import KillableServer
from tests.e2e.server_process import SOON_SECONDS, run_to_its_end

NAME = "acme"


def state(http: httpx.Client) -> list[dict[str, object]]:
    """Of all adapters, but for where their factors are at the moment."""
    adapters = http.get("/v1/adapters").json()["data"]
    return [
        {key: value for key, value in adapter.items() if key != "residency"} for adapter in adapters
    ] + [http.get(f"/v1/adapters/{adapter['name']}").json()["versions"] for adapter in adapters]


def names_in(store: Path) -> set[str]:
    return {path.name for path in (store / "factors").iterdir()}


@pytest.mark.parametrize("num_bytes", [100, 20_000])
def test_a_full_disk_refuses_changes_serves_on_and_is_forgotten(
    num_bytes: int, model_folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    with KillableServer(model_folder, tmp_path) as server, server.http() as http:
        for sample, is_new in zip(samples[:2], (True, False), strict=True):
            assert upload(http, NAME, sample, is_new=is_new).is_success
        before = state(http)
        files = names_in(server.store)
        with server.files_limited(num_bytes):
            for answer in (
                upload(http, NAME, samples[2], is_new=False),
                upload(http, "bolt", samples[2], is_new=True),
                http.delete(f"/v1/adapters/{NAME}"),
                http.post(f"/v1/adapters/{NAME}/rollback"),
                http.post(f"/v1/adapters/{NAME}/pin"),
            ):
                assert answer.status_code == 503, answer.text
                error = answer.json()["error"]
                assert error["code"] == "storage_failed"
                assert "nothing was changed" in error["message"]
                assert str(tmp_path) not in answer.text
            assert state(http) == before
            assert not list((server.store / "incoming").iterdir())
            assert_answers_as(http, NAME, samples[1])
        deadline = time.monotonic() + SOON_SECONDS
        while names_in(server.store) != files:
            assert time.monotonic() < deadline, "files of a refused upload stay"
            time.sleep(0.05)
    with server, server.http() as http:
        assert state(http) == before  # what was refused does not come back
        assert upload(http, NAME, samples[2], is_new=False).is_success
        assert_answers_as(http, NAME, samples[2])
        assert problems_in(server.store) == []


def test_a_store_that_may_not_be_written_is_one_message(model_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with read_only(store):
        ended = run_to_its_end("--model", str(model_folder), "--store", str(store))
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    (message,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert str(store) in message
    assert "may be read and written" in message
