"""Settings with which no server can start: one message, exit code 2."""

import json
import shutil
import socket
from pathlib import Path

import httpx
from safetensors.torch import load_file, save_file

from sharelora_serve.models.config import ARCHITECTURES
from tests.e2e.adapter_folders import NAMES
from tests.e2e.server_process import run_to_its_end, running_server


def refusal(*arguments: str) -> str:
    ended = run_to_its_end(*arguments)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (message,) = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    return message + ended.stderr.partition(message)[2]


def changed_model(model_folder: Path, folder: Path, **changes: object) -> Path:
    """A copy of a model's folder with another config.json."""
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_model_folder_that_is_not_there() -> None:
    message = refusal("--model", "./no/such/folder")
    assert "'./no/such/folder'" in message


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "config.json" in refusal("--model", str(tmp_path))


def test_an_architecture_that_is_not_supported_is_named_with_those_that_are(
    model_folder: Path, tmp_path: Path
) -> None:
    changes = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    folder = changed_model(model_folder, tmp_path / "model", **changes)
    message = refusal("--model", str(folder))
    for name in ("GPT2LMHeadModel", *ARCHITECTURES):
        assert name in message


def test_a_port_in_use(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refusal("--model", str(model_folder), "--port", port)
    assert port in message
    assert "in use" in message


def test_a_merge_of_an_adapter_that_is_not_there(model_folder: Path, adapters_folder: Path) -> None:
    message = refusal(
        "--model", str(model_folder), "--adapters", str(adapters_folder), "--merge", "nobody"
    )
    for name in ("'nobody'", *NAMES):
        assert name in message


def test_every_wrong_setting_is_named_with_its_value(tmp_path: Path) -> None:
    message = refusal(
        *("--adapters", str(tmp_path / "missing"), "--max-queue", "0", "--kv-memory", "much")
    )
    for part in ("3 wrong settings", "missing", "max_queue = 0", "kv_memory = much"):
        assert part in message


def test_a_context_beyond_the_models_own(model_folder: Path) -> None:
    message = refusal("--model", str(model_folder), "--max-model-len", "4096")
    for part in ("4096", "512"):
        assert part in message


def test_a_context_beyond_the_kv_cache(model_folder: Path) -> None:
    arguments = ("--model", str(model_folder), "--dtype", "float32", "--kv-memory", "420KiB")
    message = refusal(*arguments, "--max-model-len", "512")
    for part in ("512", "--kv-memory"):
        assert part in message


def test_a_kv_cache_that_holds_less_than_the_context_shortens_it(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(model_folder), "--dtype", "float32", "--kv-memory", "420KiB")
    with running_server(tmp_path / "log", *arguments) as server, server.openai() as client:
        (model,) = client.models.list().data
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "hi"}],
            extra_body={"ignore_eos": True},
        )
        listed = httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"]
    assert listed < 512
    assert answer.usage is not None
    assert answer.usage.total_tokens == listed
    assert f"the context is {listed} tokens" in server.log


def test_a_merge_that_would_cost_the_base_its_precision(
    model_folder: Path, adapters_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(adapters_folder / NAMES[0], folder / "loud")
    tensors = load_file(folder / "loud" / "adapter_model.safetensors")
    save_file(
        {key: tensor * 8 for key, tensor in tensors.items()},
        folder / "loud" / "adapter_model.safetensors",
    )
    message = refusal(
        *("--model", str(model_folder), "--adapters", str(folder), "--merge", "loud"),
        *("--dtype", "float16"),
    )
    for part in ("'loud'", "times as large", "--dtype float32"):
        assert part in message


def test_a_bad_adapter_is_told_and_the_others_are_served(
    model_folder: Path, adapters_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters [of] many"
    shutil.copytree(adapters_folder, folder)
    (folder / NAMES[0] / "adapter_config.json").write_text("{")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    arguments = ("--model", str(model_folder), "--adapters", str(folder), "--threads", "1")
    with running_server(tmp_path / "log", *arguments) as server, server.openai() as client:
        served = [model.id for model in client.models.list().data]
    assert served == [model_folder.name, *NAMES[1:]]
    assert f"{folder / NAMES[0]} is not served" in server.log
    assert f"{folder / 'gone'} is not served" in server.log
    assert f"the adapters in {folder} at http://" in server.log
