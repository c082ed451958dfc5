"""A running server's keys follow their file, whatever becomes of it."""

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from sharelora_serve.server import keys as module
from sharelora_serve.server.keys import KeyFile, revoke_key
from tests.server.test_keys import ACME, is_valid, new_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the keys is a look at the file."""
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)


@pytest.mark.usefixtures("watched")
def test_whatever_is_made_and_revoked_a_server_knows_the_keys_of_the_file(
    file: Path, seed: int
) -> None:
    random = Random(seed)
    valid, revoked = {new_key(file, None)}, set()
    keys = KeyFile(file)
    for _ in range(40):
        if valid and random.random() < 0.5:
            text = random.choice(sorted(valid))
            revoke_key(file, text.split("_")[1])
            valid.remove(text)
            revoked.add(text)
        else:
            valid.add(new_key(file, random.choice([None, "acme", "bolt"])))
        assert {text for text in valid | revoked if is_valid(keys, text)} == valid


def break_json(file: Path) -> None:
    file.write_text("{")


def break_encoding(file: Path) -> None:
    file.write_bytes(b"\xff")


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("damage", [break_json, break_encoding, replace_by_a_folder, Path.unlink])
def test_a_file_broken_later_keeps_the_keys_and_is_told_once(
    damage: Callable[[Path], None], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text, content = new_key(file), file.read_bytes()
    keys = KeyFile(file)
    damage(file)
    for _ in range(3):
        assert is_valid(keys, text)
        assert not is_valid(keys, "slk_other")
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(file) in record.getMessage()
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)
    added = new_key(file)
    assert is_valid(keys, text)
    assert is_valid(keys, added)
    file.write_text("")
    assert not is_valid(keys, text)


@pytest.mark.usefixtures("watched")
def test_a_file_that_cannot_be_read_for_a_while_is_read_as_soon_as_it_can(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text, reading = new_key(file), Path.read_text
    keys = KeyFile(file)
    for times in 1, 2:
        revoked, kept = text, new_key(file)
        revoke_key(file, revoked.split("_")[1])
        for failure in (errno.EMFILE, errno.EIO):

            def fail(*_: object, failure: int = failure, **__: object) -> str:
                raise OSError(failure, os.strerror(failure))

            monkeypatch.setattr(Path, "read_text", fail)
            for _ in range(3):
                assert is_valid(keys, revoked)
        monkeypatch.setattr(Path, "read_text", reading)
        assert not is_valid(keys, revoked)
        assert is_valid(keys, kept)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 2 * times
        text = kept


def test_the_file_is_not_looked_at_with_every_request(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECK_SECONDS", 3600.0)
    text = new_key(file)
    keys = KeyFile(file)
    added = new_key(file)
    assert is_valid(keys, text)
    assert not is_valid(keys, added)
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)
    assert is_valid(keys, added)


@pytest.mark.usefixtures("watched")
def test_a_request_that_is_given_up_while_the_file_is_read_leaves_it_to_the_next(
    file: Path,
) -> None:
    text = new_key(file)
    keys = KeyFile(file)
    revoke_key(file, text.split("_")[1])

    async def give_up() -> None:
        request = asyncio.create_task(keys.follow())
        await asyncio.sleep(0)  # it is reading now
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(give_up())
    assert not is_valid(keys, text)


@pytest.mark.usefixtures("watched")
def test_requests_do_not_wait_for_the_one_that_reads_the_file(file: Path) -> None:
    text = new_key(file)
    keys = KeyFile(file)
    added = new_key(file)

    async def ask_meanwhile() -> None:
        reading = asyncio.create_task(keys.follow())
        await asyncio.sleep(0)
        with pytest.raises(StopIteration):  # it ends without having waited for anything
            keys.follow().send(None)
        assert keys.authenticate(f"Bearer {text}") == ACME
        await reading
        assert keys.authenticate(f"Bearer {added}") == ACME

    asyncio.run(ask_meanwhile())
