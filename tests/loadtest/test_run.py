"""The commands against a real server with a tiny base."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from loadtest.__main__ import app
from loadtest.adapters import Kind, write_adapters
from loadtest.endpoint import LlamaCppEndpoint
from loadtest.workload import Workload
from sharelora_serve.server.keys import create_key
from tests.e2e.server_process import ServerProcess, running_server
from tests.tiny_models import write_tiny_model

KINDS = {
    "t000": Kind("A", (4,)),
    "t001": Kind("B", (4,)),
    "t002": Kind("AB", (4,)),
    "t003": Kind("none", (4,)),
}
TENANTS = ("acme", "bolt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Path:
    """A tiny base, an adapter of each sharing, and keys of two tenants."""
    folder = tmp_path_factory.mktemp("loadtest")
    model = write_tiny_model(folder / "tiny", "smollm", seed)
    for name, kind in KINDS.items():
        write_adapters(folder / "made" / name, 1, kind, model=str(model))
        (folder / "adapters").mkdir(exist_ok=True)
        (folder / "made" / name / "t000").rename(folder / "adapters" / name)
    keys = {tenant: create_key(folder / "keys.jsonl", tenant, None)[1] for tenant in TENANTS}
    (folder / "tenants.json").write_text(json.dumps(keys))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    settings = {
        "--model": str(folder / "tiny"),
        "--adapters": str(folder / "adapters"),
        "--api-keys": str(folder / "keys.jsonl"),
        "--dtype": "float32",
        "--kernels": "reference",
        "--threads": "1",
    }
    words = (word for pair in settings.items() for word in pair)
    with running_server(folder / "log", *words) as process:
        yield process


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    text: str = json.loads((folder / "tenants.json").read_text())["acme"]
    return text


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_closed_loop_is_reported_and_its_workload_replayed_in_an_open_one(
    server: ServerProcess, key: str, tmp_path: Path
) -> None:
    server_options = ("--url", server.url, "--base", "tiny", "--api-key", key)
    drawn = ("slora", "--num-adapters", 4, "--rate", 50, "--requests", 12)
    lengths = ("--prompt-words", 2, 9, "--new-tokens", 1, 6)
    closed = tmp_path / "closed"
    result = call(
        "run", *drawn, *lengths, *server_options, "--streams", 3, "--out", closed, "--seed", 5
    )
    assert result.exit_code == 0, result.output
    assert result.output.strip() == (closed / "report.md").read_text().strip()
    names = {path.name for path in closed.iterdir()}
    assert {"waiting.png", "timeline.png", "tenants.png"} <= names
    content = json.loads((closed / "results.json").read_text())
    workload = Workload.load(closed / "workload.jsonl")
    figures = content["figures"]
    assert (figures["num_answered"], figures["num_failed"]) == (12, 0)
    for request, asked in zip(content["requests"], workload.requests, strict=True):
        assert request["model"] == request["tenant"] == asked.model
        assert request["num_tokens"] == asked.new_tokens
        assert request["status"] == 200
        assert request["version"]
        times = [request["sent_at"], *request["tokens_at"]]
        assert times == sorted(times)
    num_tokens = sum(request.new_tokens for request in workload.requests)
    assert figures["tokens_per_second"] * figures["seconds"] == pytest.approx(num_tokens)

    opened = tmp_path / "open"
    replay = ("--replay", closed / "workload.jsonl", "--out", opened)
    result = call("run", *replay, *server_options)
    assert result.exit_code == 0, result.output
    assert Workload.load(opened / "workload.jsonl") == workload
    requests = json.loads((opened / "results.json").read_text())["requests"]
    for request, asked in zip(requests, workload.requests, strict=True):
        due = (asked.arrival_seconds or 0.0) - (workload.requests[0].arrival_seconds or 0.0)
        assert request["sent_at"] == pytest.approx(due, abs=1e-6)


def test_every_tenant_asks_with_a_key_of_its_own(
    server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    lines = [
        {"arrival_seconds": 0.0, "model": "tiny", "prompt": "red", "new_tokens": 2, "tenant": each}
        for each in (*TENANTS, "nobody")
    ]
    workload = tmp_path / "workload.jsonl"
    workload.write_text("\n".join(map(json.dumps, [{"workload": "three"}, *lines])))
    keys = ("--tenant-keys", folder / "tenants.json")
    result = call("run", "--replay", workload, "--url", server.url, *keys, "--out", tmp_path)
    assert result.exit_code == 1
    tenants = json.loads((tmp_path / "results.json").read_text())["figures"]["tenants"]
    assert {name: each["num_answered"] for name, each in tenants.items()} == {
        "acme": 1,
        "bolt": 1,
        "nobody": 0,
    }
    assert "| 1 | 401:" in result.output


def test_an_unknown_adapter_fails_the_command_and_is_told(server: ServerProcess, key: str) -> None:
    words = ("--num-adapters", 6, "--requests", 6, "--streams", 2, "--new-tokens", 1, 1)
    result = call("run", "distinct", "--url", server.url, "--api-key", key, *words)
    assert result.exit_code == 1
    assert "| answered, refused with 429, failed | 4, 0, 2 |" in result.output
    assert "'t005' does not exist" in result.output


def test_a_server_that_does_not_tell_its_metrics_is_one_message(server: ServerProcess) -> None:
    result = call("pool", "--url", server.url)  # for admins only
    assert result.exit_code == 1
    assert result.output.startswith("401: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run",), "give a workload"),
        (("run", "slora", "--replay", "file"), "not both"),
        (("run", "nonsense", "--streams", 1), "there is no workload 'nonsense'"),
        (("run", "slora", "--streams", 1), "give --num-adapters"),
        (("run", "base"), "give a number of streams"),
        (("run", "base", "--streams", 1, "--api", "smtp"), "there is no api 'smtp'"),
        (("run", "--replay", "/nowhere/workload.jsonl"), "is no workload"),
        (("run", "base", "--streams", 1, "--tenant-keys", "/nowhere"), "has no keys"),
        (("sweep", "depth"), "no axis is called depth"),
        (("adapters", "folder", "--share", "C"), "'C' is none of"),
        (("adapters", "folder", "--rank", "8,none"), "'8,none' should be such as"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_1(
    words: tuple[str, ...], message: str
) -> None:
    result = call(*words)
    assert result.exit_code == 1
    assert message in result.output
    assert isinstance(result.exception, SystemExit)


def test_llama_cpp_is_asked_by_number_and_never_for_the_base_instead() -> None:
    endpoint = LlamaCppEndpoint("base", {"t000": 3})
    assert endpoint.body("t000", "red", 4)["lora"] == [{"id": 3, "scale": 1.0}]
    assert endpoint.body("base", "red", 4)["lora"] == []
    with pytest.raises(RuntimeError, match="no adapter 't001'"):
        endpoint.body("t001", "red", 4)
    assert endpoint.read({"content": "a", "stop": False}).num_tokens is None
    last = {"content": "", "stop": True, "stop_type": "limit", "tokens_predicted": 4}
    assert (endpoint.read(last).is_end, endpoint.read(last).num_tokens) == (True, 4)
    assert not endpoint.read(last | {"stop_type": "eos"}).is_end
    with pytest.raises(RuntimeError, match="failed"):
        endpoint.read({"error": {"code": 500}})


def test_adapters_of_every_sharing_are_what_they_should_be(server: ServerProcess, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    listed = httpx.get(f"{server.url}/v1/adapters", headers=headers).json()["data"]
    assert {each["name"]: each["sharing"] for each in listed} == {
        "t000": "ShareA",
        "t001": "ShareB",
        "t002": "ShareAB",
        "t003": "LoRA",
    }
