"""Uploads whose HTTP means harm: forms that are none, bodies that lie, stall or never end."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from sharelora_serve.server.body import STALL_SECONDS
from sharelora_serve.server.connection import MAX_HEAD_BYTES, MAX_UNREAD_BYTES
from sharelora_serve.server.upload import MAX_RECEIVING, MAX_RECEIVING_OF_ONE
from tests.e2e.adapter_folders import write_adapters
from tests.e2e.conftest import BASE
from tests.e2e.tenants import Client, Shop, open_shop, zipped_folder

MOST_BYTES = 4 * 1024**2
FORM = "multipart/form-data; boundary=B"
NAME = b'--B\r\nContent-Disposition: form-data; name="name"\r\n\r\n%s\r\n'
FILE = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
END = b"--B--\r\n"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, seed: int) -> bytes:
    folder = write_adapters(tmp_path_factory.mktemp("good"), model_folder, seed)
    return zipped_folder(folder / "bolt")


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, content: bytes
) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    settings = {"--max-adapter-bytes": str(MOST_BYTES), "--log-level": "debug"}
    with open_shop(folder, model_folder, **settings) as shop:
        assert shop.acme.create("mine", content).status_code == 201
        yield shop
        assert "Traceback" not in shop.server.log
        assert "slk_" not in shop.server.log


@pytest.fixture(autouse=True)
def nothing_is_left(shop: Shop) -> Iterator[None]:
    """Of whatever a test does: no adapter but those that it made well, no file, no place taken."""
    shop.acme.get("/v1/models")
    num_files = num_open_files(shop)
    yield
    deadline = time.monotonic() + 10
    while num_open_files(shop) > num_files:
        assert time.monotonic() < deadline, "a file is still open"
        time.sleep(0.05)
    assert list((shop.keys.parent / "store" / "incoming").iterdir()) == []
    assert shop.acme.names() == ["mine"]


def num_open_files(shop: Shop) -> int:
    targets = [os.readlink(path) for path in Path(f"/proc/{shop.server.pid}/fd").iterdir()]
    return sum(not target.startswith("socket:") for target in targets)


def connection(
    shop: Shop,
    head: str,
    body: bytes = b"",
    *,
    sender: httpx.Client | None = None,
    with_key: bool = True,
) -> socket.socket:
    """A connection on which a request has been sent, by acme if by nobody else."""
    url = httpx.URL(shop.server.url)
    opened = socket.create_connection((url.host, url.port), timeout=60)
    authorization = (sender or shop.acme).headers["authorization"]
    key = f"authorization: {authorization}\r\n" if with_key else ""
    opened.sendall(f"{head}\r\nhost: x\r\n{key}\r\n".encode() + body)
    return opened


def answer_on(opened: socket.socket) -> tuple[int, Any]:
    """Status and body of the answer, which need not be JSON; the connection is closed."""
    with opened, opened.makefile("rb") as file:
        status = int(file.readline().split()[1])
        lengths = [line.split()[1] for line in iter(file.readline, b"\r\n") if b"-length" in line]
        body = file.read(int(lengths[0]))
    try:
        return status, json.loads(body)
    except ValueError:
        return status, body.decode()


def half_of_an_upload(
    shop: Shop, name: str, content: bytes, sender: httpx.Client | None = None
) -> tuple[socket.socket, bytes]:
    """A connection with an upload half sent, and the rest of it."""
    body = NAME % name.encode() + FILE % content + END
    half = len(body) // 2
    head = f"POST /v1/adapters HTTP/1.1\r\ncontent-type: {FORM}\r\ncontent-length: {len(body)}"
    return connection(shop, head, body[:half], sender=sender), body[half:]


GOOD = NAME % b"x" + FILE % b"hello" + END


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("text/plain", GOOD),
        ("multipart/mixed; boundary=B", GOOD),
        ("multipart/form-data", GOOD),
        ("multipart/form-data; boundary=", GOOD),
        ("multipart/form-data; boundary=C", GOOD),
        ("multipart/form-data; boundary=" + "B" * 300, GOOD),
        ("multipart/form-data; boundary=B; charset=undefined", GOOD),
        (FORM, b""),
        (FORM, END),
        (FORM, GOOD[:-20]),
        (FORM, NAME % b"x" + END),
        (FORM, NAME % b"x" + FILE % b"a" + FILE % b"a" + END),
        (FORM, NAME % b"x" + NAME % b"x" + FILE % b"a" + END),
        (FORM, GOOD.replace(b'name="file"', b"")),
        (FORM, GOOD.replace(b'name="file"', b'name="weights"')),
        (FORM, GOOD.replace(b'; filename="a"', b"")),
        (FORM, NAME % (b"x" * 3_000_000) + END),
        (FORM, b"--B\r\n\r\n" * 500_000),
        (FORM, b"--B\r\n" + b"X: a\r\n" * 500_000),
        (FORM, b"--B\r\nX: " + b"a" * 3_000_000),
        (FORM, b"x" * 3_000_000 + GOOD),
        (FORM, GOOD.replace(b"hello", b"\r\n--" * 500_000)),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_form_that_is_none_is_refused_with_the_reason(
    shop: Shop, content_type: str, body: bytes
) -> None:
    headers = {"content-type": content_type}
    for answer in (
        shop.acme.post("/v1/adapters", content=body, headers=headers),
        shop.acme.put("/v1/adapters/mine", content=body, headers=headers),
    ):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 10 < len(error["message"]) < 1000


@pytest.mark.parametrize(
    "name",
    [BASE, "", " ", "mi ne", "größe", "\U0001f600", "a" * 129, "a" * 100_000, "a/b/c", "..", "../x",
     "/etc/passwd", "acme/..", ".hidden", "-x", "a\\b", "a\nb", "a?b", "mine/", "/mine", "%6dine"],
)  # fmt: skip
def test_a_name_that_no_adapter_can_have_is_refused_and_not_repeated_at_length(
    shop: Shop, content: bytes, name: str
) -> None:
    answer = shop.acme.create(name, content)
    assert answer.status_code in (400, 404), answer.text
    assert len(answer.json()["error"]["message"]) < 1000


@pytest.mark.parametrize(
    "path", ["%00", "mine%00", "..%2Fmine", "%2E%2E", "mine%2F", "%2Fmine", "a%2Fb%2Fc", "",
             "%F0%9F%98%80", "a" * 129, "a" * 50_000, "bolt%2Fmine", "mine%0D%0Ax:%20y"]
)  # fmt: skip
def test_a_path_that_names_no_adapter_reaches_none(shop: Shop, content: bytes, path: str) -> None:
    files = {"file": content}
    for answer in (
        shop.acme.get(f"/v1/adapters/{path}"),
        shop.acme.put(f"/v1/adapters/{path}", files=files),
        shop.acme.delete(f"/v1/adapters/{path}"),
        shop.acme.post(f"/v1/adapters/{path}/rollback"),
        shop.acme.get(f"/v1/models/{path or '%00'}"),
    ):
        assert answer.status_code in (400, 404), answer.text
        assert len(answer.json()["error"]["message"]) < 2000


def test_an_upload_larger_than_allowed_is_refused_whatever_it_declares(shop: Shop) -> None:
    large = bytes(MOST_BYTES + 100_000)
    answer = shop.acme.create("large", large)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert send_without_end(shop, shop.acme.headers["authorization"]) > MOST_BYTES


def test_a_body_without_end_is_not_read_for_ever_after_its_refusal(shop: Shop) -> None:
    send_without_end(shop, "Bearer slk_wrong")


def send_without_end(shop: Shop, authorization: str) -> int:
    """Bytes of an endless upload that could be sent until the connection broke."""
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nauthorization: {authorization}\r\n"
        f"content-type: {FORM}\r\ntransfer-encoding: chunked"
    )
    piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    first = NAME % b"x" + FILE[:-4]
    with connection(shop, head, b"%x\r\n%s\r\n" % (len(first), first), with_key=False) as opened:
        return num_sent_until_broken(opened, piece, 16 * MAX_UNREAD_BYTES)


def num_sent_until_broken(opened: socket.socket, piece: bytes, most_bytes: int) -> int:
    """Bytes that could be sent, again and again the same, until the server broke the connection."""
    num_sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while num_sent < most_bytes:
            opened.sendall(piece)
            num_sent += len(piece)
    assert num_sent < most_bytes, "the server would have read for ever"
    return num_sent


def test_a_client_that_leaves_in_the_middle_of_an_upload_publishes_nothing(
    shop: Shop, content: bytes
) -> None:
    for large in content, content + bytes(2_000_000):  # in memory, and in a file
        opened, _ = half_of_an_upload(shop, "left", large)
        time.sleep(0.2)
        opened.close()


def test_more_uploads_at_once_than_may_be_are_told_to_come_again_and_no_other_is_lost(
    shop: Shop, content: bytes
) -> None:
    names = [f"at-once-{number}" for number in range(MAX_RECEIVING_OF_ONE)]
    with ExitStack() as stack:
        uploads = []

        def begin(sender: Client, name: str) -> None:
            uploads.append(half_of_an_upload(shop, name, content, sender))
            stack.enter_context(uploads[-1][0])

        def assert_refused(client: Client, reason: str) -> None:
            for _ in range(4):
                refused = client.create("too-many", content)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
                assert reason in refused.json()["error"]["message"]
                assert int(refused.headers["retry-after"]) >= 1

        for name in names:
            begin(shop.acme, name)
        time.sleep(0.5)
        assert_refused(shop.acme, f"{MAX_RECEIVING_OF_ONE} uploads of yours are under way")
        for name in names[: MAX_RECEIVING - MAX_RECEIVING_OF_ONE]:
            begin(shop.bolt, name)
        time.sleep(0.5)
        assert_refused(shop.admin, f"{MAX_RECEIVING} uploads are under way")
        for opened, rest in uploads:
            opened.sendall(rest)
        assert [answer_on(opened)[0] for opened, _ in uploads] == [201] * MAX_RECEIVING
    assert shop.acme.create("after-all", content).status_code == 201
    for client, made in ((shop.acme, [*names, "after-all"]), (shop.bolt, names)):
        for name in made:
            assert client.delete(f"/v1/adapters/{name}").status_code == 200


def test_a_new_adapter_without_a_name_is_told_what_is_missing(shop: Shop, content: bytes) -> None:
    answer = shop.acme.post("/v1/adapters", files={"file": content})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "missing_required_parameter",
        "name",
    )


@pytest.mark.slow
def test_an_upload_that_stalls_is_ended_and_its_place_is_free(shop: Shop, content: bytes) -> None:
    began_at = time.monotonic()
    uploads = [half_of_an_upload(shop, "stalled", content) for _ in range(MAX_RECEIVING_OF_ONE)]
    for opened, _ in uploads:
        status, body = answer_on(opened)
        assert (status, body["error"]["code"]) == (408, "request_timeout")
    assert STALL_SECONDS - 1 < time.monotonic() - began_at < STALL_SECONDS + 10
    assert shop.acme.create("free", content).status_code == 201
    assert shop.acme.delete("/v1/adapters/free").status_code == 200


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        ("GET /v1/models HTTP/1.1\r\nx: ", b"a" * 65536),
        ("GET /v1/models HTTP/1.1", b"x: a\r\n" * 10000),
        ("GET /", b"a" * 65536),
        (
            "POST /v1/adapters HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0",
            b"x: a\r\n" * 10000,
        ),
    ],
    ids=["one header", "many headers", "a path", "trailers"],
)  # fmt: skip
def test_a_head_without_end_is_cut_before_it_fills_the_memory(
    shop: Shop, head: str, endless: bytes
) -> None:
    url = httpx.URL(shop.server.url)
    with socket.create_connection((url.host, url.port), timeout=60) as opened:
        opened.sendall(head.encode() + (b"\r\n" if endless.startswith(b"x") else b""))
        # What the kernel keeps on its way is a few megabytes as well.
        num_sent_until_broken(opened, endless, 32 * MAX_HEAD_BYTES)


def test_a_request_to_become_a_websocket_is_answered_as_any_other(shop: Shop) -> None:
    head = (
        "GET /v1/models HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
    )
    assert answer_on(connection(shop, head))[0] == 200
    assert answer_on(connection(shop, head, with_key=False))[0] == 401


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=many", "limit=" + "9" * 5000])
def test_a_query_out_of_range_is_refused_as_openai_does(shop: Shop, query: str) -> None:
    answer = shop.acme.get(f"/v1/adapters?{query}")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "limit"
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300
