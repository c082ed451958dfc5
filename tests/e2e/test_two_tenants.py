"""Two tenants of one server: nothing that one can see depends on what the other has."""

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from sharelora_serve.server.keys import create_key, revoke_key
from tests.e2e.adapter_folders import write_adapters
from tests.e2e.conftest import BASE
from tests.e2e.tenants import PROMPT, Client, Shop, open_shop, zipped_folder

METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
MOST_UPLOAD_BYTES = "16MiB"


@pytest.fixture(scope="module")
def contents(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, seed: int
) -> list[bytes]:
    """Uploads of six adapters whose answers differ."""
    folder = tmp_path_factory.mktemp("contents")
    return [
        zipped_folder(path)
        for number in (1, 2)
        for path in sorted(
            write_adapters(folder / str(number), model_folder, seed + number).iterdir()
        )
    ]


def opened(folder: Path, model_folder: Path, contents: list[bytes]) -> Iterator[Shop]:
    """A shop with one public adapter that was uploaded, and one that was found in a folder."""
    adapters = write_adapters(folder / "adapters", model_folder, seed=1)
    for name in ("acme", "bolt"):
        (adapters / name).rename(folder / name)
    settings = {"--adapters": str(adapters), "--max-adapter-bytes": MOST_UPLOAD_BYTES}
    with open_shop(folder, model_folder, **settings) as shop:
        assert shop.admin.create("public", contents[0]).status_code == 201
        assert shop.admin.names() == ["cargo", "public"]
        yield shop


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, contents: list[bytes]
) -> Iterator[Shop]:
    yield from opened(tmp_path_factory.mktemp("shop"), model_folder, contents)


@pytest.fixture(scope="module")
def quiet_shop(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, contents: list[bytes]
) -> Iterator[Shop]:
    """A shop like the other, in which acme never does anything."""
    yield from opened(tmp_path_factory.mktemp("quiet"), model_folder, contents)


def let_acme_be_busy(shop: Shop, contents: list[bytes]) -> None:
    """Adapters of every kind, and traffic to everything that acme may use."""
    for name in ("secret", "common", "same", "gone", "later"):
        assert shop.acme.create(name, contents[1]).status_code == 201
    assert shop.acme.publish("secret", contents[2]).status_code == 200
    assert shop.acme.delete("/v1/adapters/gone").status_code == 200
    assert shop.admin.post("/v1/adapters/acme%2Fsecret/pin").status_code == 200
    for model in ("secret", "common", "same", "public", "cargo", BASE):
        for prompt in (PROMPT, "x", [5, 6, 7]):
            assert shop.acme.complete(model, prompt).status_code == 200
    assert shop.acme.complete("nobody").status_code == 404


Request = tuple[str, str, dict[str, Any]]


def requests_of_bolt(
    paths: dict[str, Any], digest: str, contents: list[bytes]
) -> Iterator[Request]:
    """Method, path and the rest of every request, in order."""

    def create(name: str, content: bytes) -> Request:
        return "POST", "/v1/adapters", {"data": {"name": name}, "files": {"file": content}}

    names = (
        "secret", "acme%2Fsecret", "acme/secret", "acme/common", "acme/nobody", "nobody", "same",
        "common", "gone", "mine", "bolt/mine", "bolt/secret", "ghost/secret", "public", "cargo",
        "acme", "acme/", "secret/pin", "secret/versions", BASE, digest, digest[:12],
        f"acme@{digest}", "..%2Fsecret", "a" * 129, "s%C3%A9cret", "secret%00", "SECRET",
        "%20secret",
    )  # fmt: skip
    own = [create("mine", contents[3]), create("same", contents[1]), create("common", contents[4])]
    yield from own
    for path, method in ((path, method) for path in paths for method in METHODS):
        for name in names if "{" in path else [""]:
            yield method, re.sub(r"\{.*\}", name, path), {}
    yield from own  # they were deleted
    for name in names:
        adapter = f"/v1/adapters/{name}"
        for version in (digest, "0" * 64):
            headers = {"if-match": f'"{version}"'}
            yield "PUT", adapter, {"files": {"file": contents[2]}, "headers": headers}
            yield "DELETE", adapter, {"headers": headers}
            yield "POST", f"{adapter}/rollback", {"headers": headers}
        for version in (None, digest, digest[:12], "0" * 64):
            body = {"json": {"version": version}}
            yield "POST", f"{adapter}/rollback", body
        for body in ({"lora_name": name}, {"lora_name": name, "lora_path": "cargo"}, {}):
            yield "POST", "/v1/load_lora_adapter", {"json": body}
            yield "POST", "/v1/unload_lora_adapter", {"json": body}
        for after in (name, name[:3]):
            yield "GET", f"/v1/adapters?limit=1&after={after}", {}
            yield "GET", f"/v1/models?after={after}", {}
        given = {"model": name.replace("%2F", "/"), "max_tokens": 3, "temperature": 0}
        for more in ({"prompt": PROMPT}, {"prompt": PROMPT, "stream": True}, {"prompt": 1}, {}):
            yield "POST", "/v1/completions", {"json": given | more}
        messages = [{"role": "user", "content": "Hi"}]
        yield "POST", "/v1/chat/completions", {"json": given | {"messages": messages}}
        yield create(name, b"no adapter")
        yield create(name, contents[1])
        yield create(name, contents[5])
        yield "PUT", adapter, {"files": {"file": contents[2]}}
        yield "GET", adapter, {}
    yield "POST", "/v1/adapters", {"content": b"", "headers": {"content-type": "text/plain"}}
    for limit in ("0", "1", "2", "1000", "1001", "all"):
        yield "GET", f"/v1/adapters?limit={limit}", {}
    for header in ("Bearer slk_wrong", "Bearer", "Basic acme"):
        yield "GET", "/v1/adapters/secret", {"headers": {"authorization": header}}
    yield "GET", "/v1/models", {}


def told_in_events(body: str) -> str:
    """Everything that a stream says; which tokens come together is a matter of time."""
    *events, done, end = body.split("\n\n")
    texts = [re.search(r'"text":"(.*?)","logprobs"', event) for event in events]
    text = "".join(found[1] for found in texts if found)
    return text + re.sub(r'"text":"(.*?)",', "", events[-1]) + done + end


def observed(answer: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """Status, body and headers, without what is random by design."""
    body = re.sub(r"cmpl-[0-9a-f]+", "cmpl-", answer.text)
    body = re.sub(r'("(?:created|created_at|published_at)":)\d{10}', r"\1", body)
    random = {"date"}
    # Whether bolt's own adapter is loaded by now is a matter of time.
    body, num_loading = re.subn(r'("residency":)"\w+"', r"\1", body)
    if num_loading:
        random.add("content-length")
    if answer.headers["content-type"].startswith("text/event-stream"):
        body = told_in_events(body)
    headers = {name: value for name, value in answer.headers.items() if name not in random}
    return answer.status_code, body, headers


def test_what_one_tenant_observes_does_not_depend_on_what_the_other_has(
    shop: Shop, quiet_shop: Shop, contents: list[bytes]
) -> None:
    let_acme_be_busy(shop, contents)
    digest = shop.acme.get("/v1/adapters/secret").json()["version"]
    paths = shop.admin.get("/openapi.json").json()["paths"]
    seen, statuses = set(), set()
    for number, (method, path, more) in enumerate(requests_of_bolt(paths, digest, contents)):
        headers = {"x-request-id": str(number), **more.get("headers", {})}
        with_acme, without_acme = (
            observed(of.bolt.request(method, path, **{**more, "headers": headers}))
            for of in (shop, quiet_shop)
        )
        assert with_acme == without_acme, (method, path, more)
        assert with_acme[0] < 500, (method, path, more, with_acme)
        statuses.add(with_acme[0])
        seen.add((method, path.partition("?")[0], with_acme[0]))
    assert statuses >= {200, 201, 400, 401, 403, 404, 405, 409, 412}
    assert len(seen) > 1000
    # It was worth it: bolt did all of that, and nothing of acme's has changed.
    assert shop.acme.get("/v1/adapters/secret").json()["version"] == digest
    assert shop.acme.names() == ["cargo", "common", "later", "public", "same", "secret"]


def test_the_prefix_cache_is_of_each_tenant_alone(shop: Shop) -> None:
    for model in ("public", "cargo", BASE):
        prompt = f"{model}: {PROMPT}"
        assert shop.acme.cached_tokens(model, prompt) == 0
        assert shop.bolt.cached_tokens(model, prompt) == 0
        assert shop.admin.cached_tokens(model, prompt) == 0
        assert shop.acme.cached_tokens(model, prompt) > 0


def test_adapters_of_one_content_share_no_prefix_between_tenants(
    shop: Shop, contents: list[bytes]
) -> None:
    for client in shop.acme, shop.bolt:
        assert client.create("equal", contents[5]).status_code == 201
    prompt = f"equal: {PROMPT}"
    assert shop.acme.cached_tokens("equal", prompt) == 0
    assert shop.bolt.cached_tokens("equal", prompt) == 0
    assert shop.bolt.cached_tokens("equal", prompt) > 0
    assert shop.admin.cached_tokens("acme/equal", prompt) == 0


def test_adapters_of_one_name_answer_with_their_own_tokens(
    shop: Shop, contents: list[bytes]
) -> None:
    assert shop.admin.create("alone-1", contents[1]).status_code == 201
    assert shop.admin.create("alone-2", contents[2]).status_code == 201
    first, second = shop.admin.tokens("alone-1"), shop.admin.tokens("alone-2")
    assert first != second
    assert shop.acme.create("ours", contents[1]).status_code == 201
    assert shop.bolt.create("ours", contents[2]).status_code == 201
    for _ in range(2):
        assert shop.acme.tokens("ours") == first == shop.admin.tokens("acme/ours")
        assert shop.bolt.tokens("ours") == second == shop.admin.tokens("bolt/ours")
    assert shop.acme.publish("ours", contents[2]).status_code == 200
    assert shop.acme.tokens("ours") == second
    assert shop.bolt.delete("/v1/adapters/ours").status_code == 200
    assert shop.acme.tokens("ours") == second
    assert shop.bolt.complete("ours").status_code == 404
    for name in ("alone-1", "alone-2"):
        assert shop.admin.delete(f"/v1/adapters/{name}").status_code == 200


def test_an_admin_sees_every_adapter_by_owner_and_name(shop: Shop, contents: list[bytes]) -> None:
    for client in shop.acme, shop.bolt:
        assert client.create("seen", contents[1]).status_code == 201
    listed = {item["name"]: item for item in shop.admin.get("/v1/adapters").json()["data"]}
    models = {item["id"]: item for item in shop.admin.get("/v1/models").json()["data"]}
    for owner in "acme", "bolt":
        name = f"{owner}/seen"
        assert listed[name]["owner"] == models[name]["owned_by"] == owner
        for written in (name, name.replace("/", "%2F")):
            assert shop.admin.get(f"/v1/adapters/{written}").json()["owner"] == owner
            assert shop.admin.get(f"/v1/models/{written}").json()["id"] == name
        answer = shop.admin.complete(name)
        assert answer.headers["x-adapter-version"] == listed[name]["version"]
    assert listed["public"]["owner"] is None
    assert shop.admin.get("/v1/adapters/seen").status_code == 404
    assert shop.acme.names().count("seen") == shop.bolt.names().count("seen") == 1


def test_an_admin_publishes_and_removes_for_a_tenant(shop: Shop, contents: list[bytes]) -> None:
    assert shop.admin.create("acme/given", contents[1]).status_code == 201
    assert shop.acme.get("/v1/adapters/given").json()["owner"] == "acme"
    assert shop.bolt.get("/v1/adapters/given").status_code == 404
    assert shop.admin.publish("acme/given", contents[2]).status_code == 200
    assert shop.admin.delete("/v1/adapters/acme%2Fgiven").status_code == 200
    assert shop.acme.get("/v1/adapters/given").status_code == 404


def refusal(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def test_a_tenant_may_change_no_public_adapter_and_pin_none(
    shop: Shop, contents: list[bytes]
) -> None:
    assert shop.bolt.create("unpinned", contents[1]).status_code == 201
    before = shop.admin.get("/v1/adapters/public").json()
    for answer in (
        shop.bolt.publish("public", contents[2]),
        shop.bolt.delete("/v1/adapters/public"),
        shop.bolt.post("/v1/adapters/public/rollback"),
        *(
            shop.bolt.post(f"/v1/adapters/{name}/{change}")
            for name in ("public", "unpinned", "nobody", "acme/secret", "bolt/unpinned")
            for change in ("pin", "unpin")
        ),
        shop.bolt.post(
            "/v1/load_lora_adapter", json={"lora_name": "mine-too", "lora_path": "cargo"}
        ),
        shop.bolt.post("/v1/unload_lora_adapter", json={"lora_name": "public"}),
    ):
        assert refusal(answer) == (403, "permission_denied")
    after = shop.admin.get("/v1/adapters/public").json()
    assert {**after, "residency": None} == {**before, "residency": None}
    assert shop.admin.get("/v1/adapters/bolt/unpinned").json()["pinned"] is False


def test_a_name_is_the_tenants_own_adapter_before_it_is_a_public_one(
    shop: Shop, contents: list[bytes]
) -> None:
    taken = shop.bolt.create("cargo", contents[1])
    assert refusal(taken) == (409, "adapter_exists")
    assert shop.bolt.create("both", contents[1]).status_code == 201
    assert shop.admin.create("both", contents[2]).status_code == 201
    own = shop.bolt.get("/v1/adapters/both").json()
    assert own["owner"] == "bolt"
    assert shop.bolt.complete("both").headers["x-adapter-version"] == own["version"]
    public = shop.acme.get("/v1/adapters/both").json()
    assert public["owner"] is None
    assert public["version"] != own["version"]
    listed = [
        {
            item["id"]: item.get("version") or item["root"]
            for item in shop.bolt.get(path).json()["data"]
        }
        for path in ("/v1/adapters", "/v1/models")
    ]
    assert [found["both"] for found in listed] == [own["version"]] * 2
    assert shop.bolt.delete("/v1/adapters/both").status_code == 200
    assert shop.bolt.get("/v1/adapters/both").json()["version"] == public["version"]
    assert refusal(shop.bolt.delete("/v1/adapters/both")) == (403, "permission_denied")


def test_a_tenant_learns_nothing_of_how_much_others_use_a_public_adapter(shop: Shop) -> None:
    before = shop.bolt.get("/v1/adapters/public").json()
    assert shop.acme.complete("public").status_code == 200
    assert shop.bolt.get("/v1/adapters/public").json() == before
    counts = [shop.admin.get("/v1/adapters/public").json()["counts"]["requests"]]
    assert shop.bolt.complete("public").status_code == 200
    counts.append(shop.admin.get("/v1/adapters/public").json()["counts"]["requests"])
    assert counts[1] == counts[0] + 1


def test_a_revoked_key_ends_what_its_tenant_may_do_and_leaves_its_adapters(
    shop: Shop, contents: list[bytes]
) -> None:
    key, text = create_key(shop.keys, "acme", None)
    headers = {"authorization": f"Bearer {text}"}
    with Client(base_url=shop.server.url, headers=headers, timeout=60) as client:
        deadline = time.monotonic() + 5
        while client.get("/v1/models").status_code == 401:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.create("kept", contents[1]).status_code == 201
        revoke_key(shop.keys, key.id)
        while client.get("/v1/models").status_code == 200:
            assert time.monotonic() < deadline + 5
            time.sleep(0.05)
        for answer in (
            client.get("/v1/adapters/kept"),
            client.complete("kept"),
            client.publish("kept", contents[2]),
            client.delete("/v1/adapters/kept"),
        ):
            assert refusal(answer) == (401, "invalid_api_key")
    assert shop.acme.tokens("kept")


def test_equal_request_ids_of_two_tenants_keep_their_answers_apart(
    shop: Shop, contents: list[bytes]
) -> None:
    for client, content in ((shop.acme, contents[1]), (shop.bolt, contents[4])):
        assert client.create("twin", content).status_code == 201
    alone = [client.tokens("twin") for client in (shop.acme, shop.bolt)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor() as pool:
        for client in shop.acme, shop.bolt:
            client.headers["x-request-id"] = "equal"
        for _ in range(10):
            answers = [pool.submit(client.tokens, "twin") for client in (shop.acme, shop.bolt)]
            assert [answer.result() for answer in answers] == alone
        for client in shop.acme, shop.bolt:
            del client.headers["x-request-id"]
