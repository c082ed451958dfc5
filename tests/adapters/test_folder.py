"""The watched folder: what is dropped, replaced, half written, broken or removed there."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sharelora_serve.adapters.folder import AdapterFolder
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.published import Published
from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.errors import ModelNotFoundError
from tests.adapters.shelves import Content, wait_until, write_content
from tests.adapters.store_model import problems_in
from tests.adapters.test_registry import Office, opened

ONE, TWO = Content(1, rank=8), Content(2, rank=8)
ACME = AdapterName(None, "acme")


class Watched:
    """A folder of adapters, the office that serves it, and what it serves."""

    def __init__(self, path: Path, office: Office) -> None:
        self.path = path
        self.office = office
        self.folder = AdapterFolder(path, office.registry)

    def digest(self) -> str | None:
        """Of what acme stands for; None if there is none."""
        try:
            return self.office.registry.find(ACME).version.digest
        except ModelNotFoundError:
            return None

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """How many seconds it took."""
        started_at = time.monotonic()
        wait_until(condition)
        return time.monotonic() - started_at

    def put(self, content: Content, name: str = "acme") -> None:
        """Replace the folder of a name in one go."""
        new = write_content(self.path.parent / "new", content)
        shutil.rmtree(self.path / name, ignore_errors=True)
        new.rename(self.path / name)


@contextmanager
def watched(tmp_path: Path, pool_bytes: int = 1 << 16) -> Iterator[Watched]:
    path = tmp_path / "adapters"
    path.mkdir(exist_ok=True)
    with opened(tmp_path, pool_bytes) as office:
        watched = Watched(path, office)
        watched.folder.publish_all()
        try:
            yield watched
        finally:
            watched.folder.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as live:
        live.folder.start()
        yield live


def digest_of(office: Office, content: Content) -> str:
    probe = AdapterName("probe", "probe")
    digest = office.publish(probe, content).version.digest
    office.registry.remove(probe)
    return digest


def test_dropped_replaced_and_removed_folders_take_effect(live: Watched) -> None:
    one, two = (digest_of(live.office, content) for content in (ONE, TWO))
    live.put(ONE)
    live.wait_for(lambda: live.digest() == one)
    live.put(TWO)
    live.wait_for(lambda: live.digest() == two)
    assert len(live.office.registry.versions(ACME)) == 2
    shutil.rmtree(live.path / "acme")
    live.wait_for(lambda: live.digest() is None)


def test_half_written_folder_is_waited_for_and_told_to_nobody(
    live: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    one = digest_of(live.office, ONE)
    whole = write_content(live.path.parent / "whole", ONE)
    target = live.path / "acme"
    target.mkdir()
    weights = (whole / "adapter_model.safetensors").read_bytes()
    with (target / "adapter_model.safetensors").open("wb") as file:
        for start in range(0, len(weights), len(weights) // 6):  # for longer than it may settle
            file.write(weights[start : start + len(weights) // 6])
            file.flush()
            assert live.digest() is None
            time.sleep(0.3)
    shutil.copy(whole / "adapter_config.json", target)
    live.wait_for(lambda: live.digest() == one)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_bad_folder_is_told_once_and_the_old_version_stays_until_it_is_mended(
    live: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (digest_of(live.office, content) for content in (ONE, TWO))
    live.put(ONE)
    live.wait_for(lambda: live.digest() == one)
    config = live.path / "acme" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace("LORA", "VERA"))

    def problems() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]

    live.wait_for(lambda: bool(problems()))
    time.sleep(2.0)
    (problem,) = problems()
    assert "acme is not served as it is now" in problem
    assert "VERA" in problem
    assert f"{one[:12]} of 'acme' is still being served" in problem
    assert live.digest() == one
    live.put(TWO)
    live.wait_for(lambda: live.digest() == two)
    assert len(problems()) == 1


def test_one_bad_folder_does_not_keep_the_others_out(live: Watched) -> None:
    (live.path / "bad").mkdir()
    (live.path / "bad" / "adapter_config.json").write_text("{")
    (live.path / "notes.txt").write_text("no adapter")
    (live.path / ".hidden").mkdir()
    live.put(ONE)
    live.wait_for(lambda: live.digest() is not None)
    assert [item.name for item in live.office.registry.adapters()] == [ACME]


def test_restart_reads_only_what_changed_and_removes_what_is_gone(tmp_path: Path) -> None:
    with watched(tmp_path) as live:
        live.put(ONE)
        live.put(TWO, "gone")
        live.put(TWO, "stays")
        live.folder.publish_all()
        before = live.office.registry.find(AdapterName(None, "stays"))
    shutil.rmtree(tmp_path / "adapters" / "gone")
    write_content(tmp_path / "adapters" / "acme", TWO)
    with watched(tmp_path) as live:
        assert live.digest() == before.version.digest
        assert live.office.registry.find(before.name) == before
        assert len(live.office.registry.versions(before.name)) == 1
        assert len(live.office.registry.versions(ACME)) == 2
        assert len(live.office.registry.adapters()) == 2


def test_adapter_that_was_deleted_over_http_does_not_come_back_with_its_unchanged_folder(
    tmp_path: Path,
) -> None:
    with watched(tmp_path) as live:
        live.put(ONE)
        live.folder.publish_all()
        live.office.registry.remove(ACME)
    with watched(tmp_path) as live:
        assert live.digest() is None
        live.put(TWO)
        live.folder.publish_all()
        assert live.digest() is not None


def copy_again(folder: Path) -> None:
    """Other inodes and times, the same bytes."""
    shutil.copytree(folder, folder.with_name(".copy"), copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    folder.with_name(".copy").rename(folder)


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("change", ["roll_back", "publish", "remove"])
def test_folder_that_holds_what_it_held_undoes_nothing_that_was_done_over_http(
    change: str, is_running: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with watched(tmp_path) as live:
        for content in (ONE, TWO):
            live.put(content)
            live.folder.publish_all()
        match change:
            case "roll_back":
                live.office.registry.roll_back(ACME)
            case "publish":
                live.office.publish(ACME, Content(3, rank=8))
            case "remove":
                live.office.registry.remove(ACME)
        before, versions = live.digest(), live.office.registry.versions(ACME)
        caplog.clear()
        if is_running:
            copy_again(live.path / "acme")
            live.folder.publish_all()
            assert live.digest() == before
    if not is_running:
        copy_again(tmp_path / "adapters" / "acme")
    with watched(tmp_path) as live:
        assert live.digest() == before
        assert live.office.registry.versions(ACME) == versions
        assert "adapter acme" not in caplog.text
        live.put(ONE)
        live.folder.publish_all()
        assert live.digest() == digest_of(live.office, ONE)


def test_folder_that_is_touched_is_looked_into_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with watched(tmp_path) as live:
        live.put(ONE)
        live.folder.publish_all()
    copy_again(tmp_path / "adapters" / "acme")
    with watched(tmp_path):
        pass
    monkeypatch.setattr(AdapterRegistry, "publish_folder", None)  # a call of it would be logged
    with watched(tmp_path):
        assert not caplog.records


def test_folder_that_comes_back_after_it_was_gone_is_published_again(tmp_path: Path) -> None:
    with watched(tmp_path) as live:
        live.put(ONE)
        live.folder.publish_all()
        live.office.registry.remove(ACME)
        (live.path / "acme").rename(tmp_path / "acme")
        live.folder.publish_all()
        (tmp_path / "acme").rename(live.path / "acme")
        live.folder.publish_all()
        assert live.digest() == digest_of(live.office, ONE)


def test_good_copy_of_a_folder_mends_its_version_that_was_damaged_on_disk(tmp_path: Path) -> None:
    with watched(tmp_path) as live:
        live.put(ONE)
        live.folder.publish_all()
        for path in (tmp_path / "store" / "factors").iterdir():
            path.write_bytes(b"damaged")
        copy_again(live.path / "acme")
        live.folder.publish_all()
    assert problems_in(tmp_path / "store") == []


def test_folder_and_upload_of_one_name_leave_each_other_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with watched(tmp_path) as live:
        one = live.office.publish(ACME, ONE).version.digest
        live.put(TWO)
        live.folder.publish_all()
        assert "was uploaded already" in caplog.text
        assert live.digest() == one
        shutil.rmtree(live.path / "acme")
        live.folder.publish_all()
        assert live.digest() == one


def test_bug_that_one_folder_meets_does_not_end_the_watching_of_the_others(
    live: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish = live.office.registry.publish_folder

    def publish_all_but_one(folder: str, *arguments: Any) -> Published | None:
        if folder == "unlucky":
            raise RuntimeError("injected")
        return publish(folder, *arguments)

    monkeypatch.setattr(live.office.registry, "publish_folder", publish_all_but_one)
    live.put(TWO, "unlucky")
    live.wait_for(lambda: "injected" in caplog.text)
    live.put(ONE)
    live.wait_for(lambda: live.digest() is not None)
    assert caplog.text.count("RuntimeError: injected") == 1


def test_folder_that_pins_leave_no_room_for_is_served_once_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharelora_serve.adapters.folder._DELAY_SECONDS", 0.5)
    with watched(tmp_path, pool_bytes=5 * ONE.num_bytes) as live:
        live.put(ONE)
        live.folder.publish_all()
        before = live.digest()
        registry, other = live.office.registry, AdapterName(None, "other")
        live.office.publish(other, TWO)
        for name in (ACME, other):
            registry.set_pinned(name, True)
        live.put(Content(7, rank=16))
        live.folder.publish_all()
        live.folder.start()
        assert live.digest() == before
        registry.set_pinned(other, False)
        live.wait_for(lambda: live.digest() != before)


def test_folder_whose_name_was_taken_is_served_once_the_name_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharelora_serve.adapters.folder._DELAY_SECONDS", 0.5)
    with watched(tmp_path) as live:
        live.office.publish(ACME, ONE)
        live.put(TWO)
        live.folder.publish_all()
        live.folder.start()
        live.office.registry.remove(ACME)
        live.wait_for(lambda: live.digest() is not None)
