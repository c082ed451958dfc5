"""Files that are missing, damaged, ambiguous or pickled are refused, and never run."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.samples import (
    assert_says,
    peft_config,
    peft_tensors,
    random_adapter,
    refusal,
    write_folder,
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"peft_type": "LORA", "r": 4, "r": 8, "lora_alpha": 8}', ["'r' stands there twice"]),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}', ["NaN is not JSON"]),
        ('{"peft_type": "LORA", "r": 4, "lora_alpha": Infinity}', ["Infinity is not JSON"]),
        ("[]", ["is not a JSON object"]),
        ("{", ["is not valid JSON"]),
        ("", ["is not valid JSON"]),
        ("[" * 100_000, ["lists or objects in each other"]),
        ('{"r": ' + "9" * 10_000 + "}", ["more than 1000 digits"]),
        ("{}", ["peft_type: is missing"]),
        (" " * (1024**2 + 1), ["more than 524288 bytes"]),
    ],
    ids=range(10),
)
def test_a_configuration_that_json_readers_may_disagree_about_is_refused(
    text: str, parts: list[str], tmp_path: Path, seed: int
) -> None:
    folder = write_folder(tmp_path / "acme", text, peft_tensors(random_adapter(seed)))
    assert_says(refusal(folder), *parts)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "weights.pth", "a.ckpt"])
def test_a_pickle_is_named_and_never_opened(name: str, tmp_path: Path, seed: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(random_adapter(seed))))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert_says(refusal(tmp_path), name, "never opened", "safe_serialization=True")
    assert_says(refusal(tmp_path / name), "is not a .safetensors file", "safe_serialization=True")
    (tmp_path / name).rename(tmp_path / "adapter_model.safetensors")
    assert_says(refusal(tmp_path), "is not a whole safetensors file")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    folder = write_folder(tmp_path / "acme", peft_config(adapter), peft_tensors(adapter))
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        assert_says(refusal(folder), "is not a whole safetensors file", "copy or save it again")
    weights.write_bytes(whole + b"\0")
    assert_says(refusal(folder), "is not a whole safetensors file")


def test_a_tensor_that_stands_twice_in_the_header_is_refused(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    folder = write_folder(tmp_path / "acme", peft_config(adapter), {})
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(4)
    )
    message = refusal(folder)
    assert "stands there twice" in message or "not a whole safetensors file" in message


def test_folders_that_stand_for_no_adapter_or_for_several_are_refused(
    tmp_path: Path, seed: int
) -> None:
    adapter = random_adapter(seed)
    (tmp_path / "empty").mkdir()
    assert_says(refusal(tmp_path / "empty"), "has no adapter_config.json")
    assert_says(refusal(tmp_path / "absent"), "neither a file nor a folder")
    for name in ("one", "two"):
        write_folder(tmp_path / "both" / name, peft_config(adapter), peft_tensors(adapter))
    assert_says(
        refusal(tmp_path / "both"), "holds 2 adapters (one, two)", "give one of the folders"
    )
    one = tmp_path / "both" / "one"
    (one / "adapters.safetensors").write_bytes(b"")
    assert_says(refusal(one), "has both adapter_model.safetensors and adapters.safetensors")
    (one / "adapters.safetensors").unlink()
    (one / "adapter_model.safetensors").rename(one / "adapter_model-00001-of-2.safetensors")
    assert_says(refusal(one), "in parts", "save them as one adapter_model.safetensors")
    (one / "adapter_model-00001-of-2.safetensors").unlink()
    assert_says(refusal(one), "but no adapter_model.safetensors")


def test_a_single_file_without_its_configuration_is_refused(tmp_path: Path, seed: int) -> None:
    adapter = random_adapter(seed)
    folder = write_folder(tmp_path / "acme", peft_config(adapter), peft_tensors(adapter))
    message = refusal(folder / "adapter_model.safetensors")
    assert_says(message, "metadata key 'adapter_config' is missing", "give the folder")
