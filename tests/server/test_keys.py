"""A file of API keys: what it may hold, whom its keys stand for, and how it changes."""

import asyncio
import hashlib
import json
import os
import re
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sharelora_serve.errors import AuthenticationError, ConfigurationError
from sharelora_serve.server.caller import Caller
from sharelora_serve.server.keys import KeyFile, StoredKey, create_key, read_keys, revoke_key

LINE = {
    "id": "3f9a1c07b2d4",
    "sha256": hashlib.sha256(b"slk_3f9a1c07b2d4_x").hexdigest(),
    "role": "tenant",
    "tenant": "acme",
    "created_at": "2026-01-31T12:00:00Z",
}
ADMIN = Caller(tenant=None)
ACME = Caller(tenant="acme")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def new_key(file: Path, tenant: str | None = "acme") -> str:
    return create_key(file, tenant, None)[1]


def is_valid(keys: KeyFile, text: str) -> bool:
    """As the server asks."""
    asyncio.run(keys.follow())
    try:
        keys.authenticate(f"Bearer {text}")
    except AuthenticationError:
        return False
    return True


def refusal(file: Path, content: str | bytes) -> str:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigurationError) as caught:
        read_keys(file)
    return caught.value.message


def test_a_key_stands_for_whom_it_was_made(file: Path) -> None:
    texts = {new_key(file, None): ADMIN, new_key(file): ACME, new_key(file): ACME}
    assert len(texts) == 3
    keys = KeyFile(file)
    for text, caller in texts.items():
        assert keys.authenticate(f"Bearer {text}") == caller
        assert keys.authenticate(f"bEARER  {text} ") == caller


def test_a_key_is_random_and_only_its_hash_is_kept(file: Path) -> None:
    key, text = create_key(file, "acme", "for the shop")
    matched = re.fullmatch(r"slk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})", text)
    assert matched is not None
    assert matched[1] == key.id
    content = file.read_text()
    assert matched[2] not in content + repr(key) + repr(KeyFile(file))
    assert json.loads(content)["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert read_keys(file) == [key]
    assert key.comment == "for the shop"
    assert key.created_at.tzinfo is not None


def changed(text: str, random: Random) -> str:
    """A key that differs in one character."""
    at = random.randrange(len(text))
    return text[:at] + random.choice("abcXYZ019_-".replace(text[at], "")) + text[at + 1 :]


def test_what_is_no_key_of_the_file_is_refused_and_not_repeated(file: Path, seed: int) -> None:
    text, other = new_key(file), new_key(file)
    keys, random = KeyFile(file), Random(seed)
    headers: list[str | None] = [
        None, "", "Bearer", "Bearer ", text, f"Basic {text}", f"Bearer {text}, Bearer {text}",
        f"Bearer {text} {text}", f"Bearer {text}\n", f"Bearer {text[:-1]}", f"Bearer {text}a",
        f"Bearer {text[:17]}{other[17:]}", f"Bearer {read_keys(file)[0].sha256}", "Bearer \xe4",
        *(f"Bearer {changed(text, random)}" for _ in range(50)),
    ]  # fmt: skip
    for header in headers:
        with pytest.raises(AuthenticationError) as caught:
            keys.authenticate(header)
        assert caught.value.code == "invalid_api_key"
        assert "slk_" not in caught.value.message


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=255)))
def test_no_header_is_more_than_refused(header: str) -> None:
    keys = KeyFile(Path(os.devnull))
    for sent in (header, f"Bearer {header}"):
        with pytest.raises(AuthenticationError):
            keys.authenticate(sent)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"id": ""}, "line 2: id: "),
        ({"id": "A_b"}, "line 2: id: "),
        ({"id": None}, "line 2: id: should be a valid string"),
        ({"sha256": "0" * 63}, "line 2: sha256: "),
        ({"sha256": "slk_3f9a1c07b2d4_x"}, "line 2: sha256: "),
        ({"role": "root"}, "line 2: role: should be 'admin' or 'tenant'"),
        ({"role": "admin"}, "line 2: an admin's key has no tenant"),
        ({"tenant": None}, "line 2: a tenant's key needs the tenant's name"),
        ({"tenant": "../acme"}, "line 2: a tenant's key needs the tenant's name"),
        ({"tenant": "acme\n"}, "line 2: a tenant's key needs the tenant's name"),
        ({"created_at": "2026-01-31T12:00:00"}, "line 2: created_at: should have timezone info"),
        ({"comment": "a\u2028b"}, "line 2: comment: should be one line of printable text"),
        ({"key": "slk_3f9a1c07b2d4_x"}, "line 2: has a field that there is not; there are id, "),
    ],
)
def test_a_line_that_is_wrong_is_named_without_what_it_holds(
    change: dict[str, Any], part: str, file: Path
) -> None:
    message = refusal(file, "\n" + json.dumps(LINE | change))
    assert str(file) in message
    assert part in message
    assert "1 problem\n" in message
    assert "slk_" not in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("slk_3f9a1c07b2d4_x", "line 1: should be one JSON object"),
        ("[]", "line 1: "),
        (json.dumps(LINE)[:-1] + ', "tenant": "bolt"}', "line 1: should be one JSON object, each"),
        (json.dumps(LINE) * 2, "line 1: should be one JSON object"),
        ("[" * 100_000, "line 1: should be one JSON object"),
        (b"\xff", "is not UTF-8"),
        (f"{json.dumps(LINE)}\n{json.dumps(LINE | {'sha256': '0' * 64})}", "have the same id"),
        (f"{json.dumps(LINE)}\n{json.dumps(LINE | {'id': 'b'})}", "have the same sha256"),
        (f"{{}}\n{json.dumps(LINE)}\n{{", "line 3: should be one JSON object"),
    ],
    ids=range(9),
)
def test_a_file_that_is_not_one_of_keys_is_refused(
    content: str | bytes, part: str, file: Path
) -> None:
    message = refusal(file, content)
    assert part in message
    assert "slk_" not in message


def test_a_file_that_is_not_there_is_refused(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        KeyFile(file)


def test_a_key_file_without_keys_lets_nobody_in(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text("\n\n")
    keys = KeyFile(file)
    assert "holds no API keys: every request is refused" in caplog.text
    for header in (None, "Bearer x"):
        with pytest.raises(AuthenticationError):
            keys.authenticate(header)


@settings(deadline=None, max_examples=30)  # a disk may be busy
@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "Z.9_-"]), st.none() | st.text()), max_size=5)
)
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, made: list[tuple[str | None, str | None]]
) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys.jsonl"
    stored: list[StoredKey] = []
    for tenant, comment in made:
        if comment is None or comment.isprintable():
            stored.append(create_key(file, tenant, comment)[0])
        else:
            with pytest.raises(ConfigurationError, match="no key was made: comment: "):
                create_key(file, tenant, comment)
    assert (read_keys(file) if stored else []) == stored
    while stored:
        assert revoke_key(file, stored[0].id) == stored.pop(0)
        assert read_keys(file) == stored


@pytest.mark.parametrize("tenant", ["", "..", "a/b", "-a", "a" * 129, "\xe4", "a\n"])
def test_a_tenant_has_a_name_as_adapters_have(tenant: str, file: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs the tenant's name: a name has 1 to 128"):
        create_key(file, tenant, None)
    assert not file.exists()


def test_a_key_of_another_id_is_not_revoked(file: Path) -> None:
    text = new_key(file)
    for key_id in (text, text[4:15], ""):
        with pytest.raises(ConfigurationError, match="holds no key of that id") as caught:
            revoke_key(file, key_id)
        assert text not in caught.value.message
    assert is_valid(KeyFile(file), text)


def test_the_file_is_its_owners_alone_and_nothing_is_left_beside_it(file: Path) -> None:
    new_key(file)
    file.chmod(0o644)
    new_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_a_link_to_the_file_stays_a_link(file: Path) -> None:
    link = file.with_name("link")
    link.symlink_to(file)
    text = new_key(link)
    assert link.is_symlink()
    assert is_valid(KeyFile(file), text)


def test_a_broken_file_is_not_written_over(file: Path) -> None:
    file.write_text("{")
    for change in (lambda: new_key(file), lambda: revoke_key(file, "a")):
        with pytest.raises(ConfigurationError):
            change()
    assert file.read_text() == "{"


def test_a_failure_while_writing_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_key(file)
    before = file.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        new_key(file)
    assert file.read_bytes() == before
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_keys_made_at_the_same_time_are_all_kept(file: Path) -> None:
    made: list[str] = []

    def make_some() -> None:
        made.extend(new_key(file) for _ in range(5))

    threads = [threading.Thread(target=make_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = KeyFile(file)
    assert len(made) == 20
    assert all(is_valid(keys, text) for text in made)


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_told(
    mode: int, is_told: bool, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_key(file)
    file.chmod(mode)
    KeyFile(file)
    assert (f"can be read by others than its owner (mode {mode:o})" in caplog.text) == is_told


def test_a_stored_key_cannot_be_changed() -> None:
    key = StoredKey.model_validate(LINE)
    with pytest.raises(ValidationError, match="frozen"):
        key.tenant = "bolt"
