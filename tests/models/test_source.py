"""Where a base comes from: a folder, the embedded package or the hub."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from sharelora_serve.errors import ConfigurationError
from sharelora_serve.models import source
from sharelora_serve.models.source import base_folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert base_folder(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no config\.json; give the folder"):
        base_folder(str(tmp_path))


def test_without_a_model_it_is_the_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "embedded_base_folder", lambda _: Path("embedded"))
    assert base_folder(None) == Path("embedded")


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "a/b/c", "what is this", "-"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ConfigurationError, match="is neither a folder nor a hub id such as"):
        base_folder(model)


def test_a_hub_model_that_cannot_be_reached_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigurationError, match="the hub cannot be reached; connect to it, or"):
        base_folder("acme/base")


def test_a_hub_model_that_was_downloaded_before_needs_no_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: download(*a, cache_dir=tmp_path, **k)
    )
    repository = tmp_path / "models--acme--base"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.raises(ConfigurationError, match=r"has no config\.json on the hub"):
        base_folder("acme/base")
    (snapshot / "config.json").write_text("{}")
    assert base_folder("acme/base", config_only=True) == snapshot
