"""Settings: where they come from, and what is said when they are wrong."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharelora_serve.config import (
    EMBEDDED_MODEL_NAME,
    ServeConfig,
    default_text,
    environment_variable,
    format_bytes,
    num_physical_cores,
    parse_bytes,
    value_text,
)
from sharelora_serve.errors import ConfigurationError

SETTINGS = list(ServeConfig.model_fields)


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(environment_variable(setting), raising=False)


def test_defaults_are_those_documented() -> None:
    config = ServeConfig()
    assert (config.host, config.port, config.merge) == ("127.0.0.1", 8000, "off")
    assert config.adapter_memory == 512 * 1024**2
    assert config.adapter_host_memory == 2 * 1024**3
    assert config.kv_memory == 1024**3
    assert config.max_request_bytes == 4 * 1024**2
    assert (config.drain_seconds, config.drain_delay_seconds) == (8, 0)


def test_a_setting_is_read_from_its_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARELORA_ADAPTER_MEMORY", "1.5GiB")
    monkeypatch.setenv("SHARELORA_PREFIX_CACHE", "false")
    config = ServeConfig()
    assert config.adapter_memory == 3 * 1024**3 // 2
    assert config.prefix_cache is False


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARELORA_PORT", "9000")
    assert ServeConfig(port=9001).port == 9001


def test_an_empty_environment_variable_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARELORA_MODEL", "")
    assert ServeConfig().model is None


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ServeConfig().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_help_and_a_default_that_reads_back(setting: str) -> None:
    field = ServeConfig.model_fields[setting]
    assert field.description is not None
    assert field.description.endswith(".")
    if text := default_text(setting):
        assert getattr(ServeConfig(**{setting: text}), setting) == field.default
    else:
        assert field.default is None
    assert value_text(setting)


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("4096", 4096), ("512MiB", 512 * 1024**2), ("1.5 gb", 1_500_000_000), ("2KiB", 2048)],
)
def test_sizes_are_read_with_their_units(size: str, num_bytes: int) -> None:
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize("size", ["", "MiB", "-1", "12 apples", "1e9", "1.MiB", "nan", "0x10"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigurationError, match="such as 512MiB"):
        ServeConfig(adapter_memory=size)


@given(st.integers(0, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_a_shown_size_reads_back(number: int, unit: str) -> None:
    num_bytes = parse_bytes(f"{number}{unit}")
    assert isinstance(num_bytes, int)
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes


def test_every_wrong_setting_is_named_with_its_value_and_what_it_should_be() -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServeConfig(
            port="x", kv_memory=0, device="tpu", adapters="/nowhere", api_keys="/tmp", pots=1
        )
    lines = caught.value.message.splitlines()
    assert lines[0] == "6 wrong settings"
    for setting, value, expected in [
        ("port", "x", "integer"),
        ("kv_memory", "0", "greater than 0"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("adapters", "/nowhere", "existing folder"),
        ("api_keys", "/tmp", "existing file; sharelora-serve keys create --admin makes it"),
        ("pots", "1", "no such setting; there are model, model_name"),
    ]:
        line = next(line for line in lines if line.startswith(f"  {setting} = {value}: "))
        assert expected in line


def test_settings_that_contradict_each_other_are_refused_together() -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServeConfig(
            **{"device": "cuda", "kernels": "cpu", "max_running": 600},
            **{"prefill_chunk": 700, "drain_seconds": 1, "drain_delay_seconds": "1.5"},
        )
    lines = caught.value.message.splitlines()
    assert lines[0] == "4 wrong settings"
    for part in (
        *("kernels = 'cpu'", "max_running = 600", "prefill_chunk = 700"),
        "drain_delay_seconds = 1.5",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("merge", "merged"), [("off", None), ("auto", None), ("acme", "acme"), ("Auto", "Auto")]
)
def test_merge_names_an_adapter_unless_it_is_off_or_auto(
    merge: str, merged: str | None, tmp_path: Path
) -> None:
    assert ServeConfig(merge=merge, adapters=tmp_path).merged_adapter == merged


def test_the_base_is_called_by_the_last_part_of_its_folder_or_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-base"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert ServeConfig().base_name == EMBEDDED_MODEL_NAME
    assert ServeConfig(model="meta-llama/Llama-3.2-1B").base_name == "Llama-3.2-1B"
    assert ServeConfig(model=f"{folder}/").base_name == "my-base"
    assert ServeConfig(model=".").base_name == "my-base"
    assert ServeConfig(model=".", model_name="llama").base_name == "llama"


def test_threads_default_to_the_cores_that_the_process_may_use() -> None:
    assert ServeConfig().num_threads == num_physical_cores() >= 1
    assert ServeConfig(threads=3).num_threads == 3
