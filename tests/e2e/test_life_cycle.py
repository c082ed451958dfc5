"""Adapters that come, change and go while requests run, through the front door."""

import json
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from openai import NotFoundError
from safetensors.torch import load_file, save

from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server
from tests.e2e.tenants import zipped_folder

PROMPT = "The sea"
NUM_TOKENS = 24


class Live:
    """A server with adapters to publish, and how to do that and to ask for them."""

    def __init__(self, server: ServerProcess, folder: Path, watched: Path) -> None:
        self.server = server
        self.folder = folder  # of the adapters that are uploaded
        self.watched = watched  # given as --adapters
        self.http = server.http()
        self.openai = server.openai()

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()

    def file(self, source: str, kind: str = "zip") -> bytes:
        """An adapter's folder as one file."""
        if kind == "zip":
            return zipped_folder(self.folder / source)
        if kind == "tar.gz":
            buffer = BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
                archive.add(self.folder / source, source)
            return buffer.getvalue()
        config = (self.folder / source / "adapter_config.json").read_text()
        tensors = load_file(self.folder / source / "adapter_model.safetensors")
        return save(tensors, {"adapter_config": config})

    def create(self, name: str, source: str, kind: str = "zip") -> httpx.Response:
        files = {"file": (f"{source}.{kind}", self.file(source, kind))}
        return self.http.post("/v1/adapters", data={"name": name}, files=files)

    def replace(self, name: str, source: str, **headers: str) -> httpx.Response:
        files = {"file": self.file(source)}
        return self.http.put(f"/v1/adapters/{name}", files=files, headers=headers)

    def ask(self, name: str) -> tuple[str, str]:
        """The version that answers, and what."""
        body = {"model": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        response = self.http.post("/v1/completions", json=body | {"ignore_eos": True})
        assert response.status_code == 200, response.text
        return response.headers["x-adapter-version"], response.json()["choices"][0]["text"]

    def answers(self) -> dict[str, str]:
        """What each of NAMES answers, by version, each published under a name of its own."""
        found = {}
        for source in NAMES:
            assert self.create(f"probe-{source}", source).status_code == 201
            version, text = self.ask(f"probe-{source}")
            found[version] = text
            assert self.http.delete(f"/v1/adapters/probe-{source}").status_code == 200
        return found


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, adapters_folder: Path
) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    watched = folder / "watched"
    watched.mkdir()
    with (
        running_server(folder / "log", *options(model_folder, watched)) as server,
        Live(server, adapters_folder, watched) as live,
    ):
        yield live


def options(model_folder: Path, watched: Path) -> list[str]:
    return [
        *("--model", str(model_folder), "--adapters", str(watched)),
        *("--dtype", "float32", "--threads", "1"),
    ]


@pytest.fixture
def name(live: Live, request: pytest.FixtureRequest) -> Iterator[str]:
    """A name of the test's own, free before and after."""
    yield request.node.name.partition("[")[0][-60:].replace("_", "-").strip("-")
    for item in live.http.get("/v1/adapters").json()["data"]:
        live.http.delete(f"/v1/adapters/{item['name']}")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "safetensors"])
def test_an_upload_is_served_from_its_answer_on(live: Live, name: str, kind: str) -> None:
    response = live.create(name, "acme", kind)
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/adapters/{name}"
    shown = response.json()
    assert response.headers["etag"] == f'"{shown["version"]}"'
    assert (shown["name"], shown["sharing"], shown["ranks"]) == (name, "ShareA", [8])
    stream = live.openai.completions.create(
        model=name, prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream)
    assert live.ask(name)[0] == shown["version"]
    assert live.openai.models.retrieve(name).to_dict()["root"] == shown["version"]


def test_the_form_of_an_upload_does_not_change_its_version(live: Live, name: str) -> None:
    versions = {
        live.create(f"{name}-{index}", "bolt", kind).json()["version"]
        for index, kind in enumerate(("zip", "tar.gz", "safetensors"))
    }
    assert len(versions) == 1


def test_versions_are_listed_rolled_back_and_guarded_by_if_match(live: Live, name: str) -> None:
    one = live.create(name, "acme").json()["version"]
    two = live.replace(name, "bolt", **{"if-match": f'"{one}"'}).json()["version"]
    assert live.ask(name)[0] == two != one
    lost = live.replace(name, "cargo", **{"if-match": f'"{one}"'})
    assert (lost.status_code, lost.json()["error"]["code"]) == (412, "version_mismatch")
    several = live.replace(name, "cargo", **{"if-match": f'"{one}", "{two}"'})
    assert (several.status_code, several.json()["error"]["param"]) == (400, "If-Match")
    rolled = live.http.post(f"/v1/adapters/{name}/rollback")
    assert rolled.json()["version"] == one
    shown = live.http.get(f"/v1/adapters/{name}").json()
    assert [(v["version"], v["is_current"]) for v in shown["versions"]] == [
        (two, False),
        (one, True),
    ]
    again = live.http.post(f"/v1/adapters/{name}/rollback", json={"version": two[:8]})
    assert again.json()["version"] == two
    none = live.http.post(f"/v1/adapters/{name}/rollback", json={"version": "0" * 64})
    assert none.status_code == 400
    assert live.ask(name)[0] == two


def test_a_delete_lets_a_running_stream_finish_and_refuses_the_next(live: Live, name: str) -> None:
    live.create(name, "acme")
    version, whole = live.ask(name)
    with live.openai.completions.with_streaming_response.create(
        model=name,
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as response:
        events = (line[6:] for line in response.iter_lines() if line.startswith("data: {"))
        text = json.loads(next(events))["choices"][0]["text"]
        assert live.http.delete(f"/v1/adapters/{name}").json() == {
            "id": name,
            "object": "adapter",
            "deleted": True,
        }
        with pytest.raises(NotFoundError, match="does not exist"):
            live.openai.completions.create(model=name, prompt=PROMPT)
        text += "".join(json.loads(event)["choices"][0]["text"] for event in events)
        assert response.headers["x-adapter-version"] == version
    assert text == whole
    assert live.http.delete(f"/v1/adapters/{name}").status_code == 404
    assert live.create(name, "bolt").status_code == 201
    shown = live.http.get(f"/v1/adapters/{name}").json()
    assert len(shown["versions"]) == 1
    assert shown["counts"]["requests"] == 0


def test_every_answer_is_whole_and_of_the_version_that_its_header_names(
    live: Live, name: str
) -> None:
    expected = live.answers()
    live.create(name, "acme")
    done, seen = threading.Event(), set()

    def request() -> None:
        while not done.is_set():
            version, text = live.ask(name)
            assert text == expected[version]
            seen.add(version)

    with ThreadPoolExecutor(4) as threads:
        requests = [threads.submit(request) for _ in range(4)]
        try:
            for index in range(20):
                response = live.replace(name, NAMES[index % len(NAMES)])
                assert response.status_code == 200, response.text
                assert live.ask(name)[0] == response.json()["version"]
                if index % 5 == 4:
                    assert live.http.post(f"/v1/adapters/{name}/rollback").status_code == 200
        finally:
            done.set()
        for future in requests:
            future.result()
    assert seen == set(expected)


def test_a_refused_upload_says_why_and_what_is_still_served(live: Live, name: str) -> None:
    version = live.create(name, "acme").json()["version"]
    bad = live.http.put(f"/v1/adapters/{name}", files={"file": b"PK\x03\x04 no archive"})
    assert bad.status_code == 400
    error = bad.json()["error"]
    assert (error["code"], error["type"]) == ("adapter_invalid", "invalid_request_error")
    assert live.ask(name)[0] == version
    assert not list((live.server.folder / "store" / "incoming").iterdir())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/adapters", 400, "invalid_multipart"),
        ("PUT", "/v1/adapters/nobody", 400, "invalid_multipart"),
        ("GET", "/v1/adapters/nobody", 404, "model_not_found"),
        ("DELETE", "/v1/adapters/nobody", 404, "model_not_found"),
        ("POST", "/v1/adapters/nobody/pin", 404, "model_not_found"),
        ("POST", "/v1/adapters/nobody/rollback", 404, "model_not_found"),
        ("GET", "/v1/adapters?limit=0", 400, "invalid_value"),
        ("GET", "/v1/adapters?limit=many", 400, "invalid_value"),
        ("DELETE", "/v1/adapters", 405, "method_not_allowed"),
        ("POST", "/v1/completions/", 404, "not_found"),
    ],
)
def test_what_cannot_be_done_is_told_in_openais_shape(
    live: Live, method: str, path: str, status: int, code: str
) -> None:
    response = live.http.request(method, path)
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


@pytest.mark.parametrize("bad_name", ["", "..", "a/b/c", "a b", "x" * 129, BASE, "é"])
def test_a_name_that_cannot_be_is_refused(live: Live, bad_name: str) -> None:
    response = live.create(bad_name, "acme")
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "adapter_invalid"
    assert response.json()["error"]["param"] == "name"


def test_the_list_is_given_in_pages(live: Live, name: str) -> None:
    names = sorted(f"{name}-{index}" for index in range(5))
    for each in names:
        assert live.create(each, "cargo").status_code == 201
    found, after = [], None
    while True:
        query = {"limit": 2} | ({"after": after} if after else {})
        page = live.http.get("/v1/adapters", params=query).json()
        found += [item["name"] for item in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
        assert len(page["data"]) == 2
    assert found == names


def test_a_folder_that_is_dropped_is_served_within_two_seconds(live: Live, name: str) -> None:
    source = live.folder / "acme"
    target = live.watched / name
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    started_at = time.monotonic()
    while live.http.get(f"/v1/models/{name}").status_code == 404:
        assert time.monotonic() < started_at + 30
        time.sleep(0.05)
    assert live.ask(name)[1]
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    while live.http.get(f"/v1/models/{name}").status_code == 200:
        assert time.monotonic() < started_at + 60
        time.sleep(0.05)


def test_vllms_routes_load_and_unload_from_the_adapters_folder(live: Live, name: str) -> None:
    target = live.watched / "_shelf"
    target.mkdir()
    for path in (live.folder / "bolt").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    load = {"lora_name": name, "lora_path": "_shelf"}
    for body in (load, load | {"lora_path": str(target), "load_inplace": True}):
        response = live.http.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, "added successfully" in response.text) == (200, True)
    again = live.http.post("/v1/load_lora_adapter", json=load)
    assert again.status_code == 400
    assert "already been loaded" in again.json()["error"]["message"]
    assert live.ask(name)[1]
    for path in ("../", "/etc", "nowhere", str(live.folder / "bolt"), "."):
        response = live.http.post("/v1/load_lora_adapter", json=load | {"lora_path": path})
        assert response.status_code == 400, response.text
    unload = live.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert (unload.status_code, "removed successfully" in unload.text) == (200, True)
    assert live.http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 404


def test_a_pin_is_shown_counted_and_kept_over_a_restart_with_everything_else(
    tmp_path: Path, model_folder: Path, adapters_folder: Path
) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    with (
        running_server(tmp_path / "log", *options(model_folder, watched)) as server,
        Live(server, adapters_folder, watched) as live,
    ):
        live.create("one", "acme")
        live.replace("one", "bolt")
        live.http.post("/v1/adapters/one/rollback")
        live.create("two", "cargo")
        pinned = live.http.post("/v1/adapters/two/pin").json()
        assert pinned["pinned"]
        assert server.metrics()["sharelora_adapters_pinned"] == 1
        before = [live.http.get(f"/v1/adapters/{name}").json() for name in ("one", "two")]
        answers = [live.ask(name) for name in ("one", "two")]
    with (
        running_server(tmp_path / "log", *options(model_folder, watched)) as server,
        Live(server, adapters_folder, watched) as live,
    ):
        assert [live.ask(name) for name in ("one", "two")] == answers
        assert server.metrics()["sharelora_adapters_pinned"] == 1
        for name, old in zip(("one", "two"), before, strict=True):
            new = live.http.get(f"/v1/adapters/{name}").json()
            for changing in ("counts", "residency"):
                del old[changing], new[changing]
            assert new == old
        assert not live.http.post("/v1/adapters/two/unpin").json()["pinned"]
