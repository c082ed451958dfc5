"""Whatever the OpenAPI document allows, and what it forbids, is answered and never a failure."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, Response
from schemathesis.schemas import APIOperation

from tests.e2e.adapter_folders import NAMES, write_adapters
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess, running_server

FAILURES_THAT_MAY_BE = ("adapter_unavailable", "draining", "storage_failed")
BODIES = {
    ("POST", "/v1/completions"): "application/json",
    ("POST", "/v1/chat/completions"): "application/json",
    ("POST", "/v1/adapters"): "multipart/form-data",
    ("PUT", "/v1/adapters/{name}"): "multipart/form-data",
    ("POST", "/v1/adapters/{name}/rollback"): "application/json",
    ("POST", "/v1/load_lora_adapter"): "application/json",
    ("POST", "/v1/unload_lora_adapter"): "application/json",
}
"""What every route takes that takes a body."""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, seed: int
) -> Iterator[ServerProcess]:
    """One of these tests' own: they may remove whatever they find."""
    folder = tmp_path_factory.mktemp("schema")
    adapters = write_adapters(folder / "adapters", model_folder, seed)
    settings = {
        "--model": str(model_folder),
        "--adapters": str(adapters),
        "--threads": "1",
        "--max-queue": "8",  # or one request may take minutes
    }
    words = (word for pair in settings.items() for word in pair)
    with running_server(folder / "log", *words) as process:
        yield process
        assert "Traceback" not in process.log


def operations(server: ServerProcess) -> list[APIOperation]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def test_the_document_tells_what_every_route_takes_and_how_it_refuses(
    server: ServerProcess,
) -> None:
    with server.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    described = {}
    for path, methods in paths.items():
        for method, operation in methods.items():
            for status in "4XX", "5XX":
                content = operation["responses"][status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/ErrorAnswer")
            if "requestBody" in operation:
                (described[method.upper(), path.replace(":path", "")],) = operation["requestBody"][
                    "content"
                ]
    assert described == BODIES


def attack(server: ServerProcess, seed: int, *, num_examples: int) -> None:
    """Random requests to every operation: such as its description allows, and such as it does not.

    Some of them name what is served, which a random name never does.
    """
    for operation in sorted(operations(server), key=lambda found: found.method == "delete"):
        for mode in GenerationMode:
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
                continue  # nothing can be wrong with it

            @hypothesis_seed(seed)
            @settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(
                case=operation.as_strategy(generation_mode=mode),
                name=st.sampled_from([None, BASE, *NAMES]),
            )
            def is_answered(case: Case, name: str | None) -> None:
                if name is not None:
                    call_by_name(case, name)
                check(case.call(base_url=server.url, timeout=60), case.as_curl_command())

            is_answered()


def call_by_name(case: Case, name: str) -> None:
    """Let a request be about an adapter or the base."""
    for parameter in case.path_parameters:
        case.path_parameters[parameter] = name
    if isinstance(case.body, dict):
        for field in case.body.keys() & {"model", "name", "lora_name", "lora_path"}:
            case.body[field] = name


def check(answer: Response, command: str) -> None:
    if answer.status_code < 400:
        return
    error = json.loads(answer.content)["error"]
    assert set(error) == {"message", "type", "param", "code"}, command
    assert error["message"], command
    assert answer.status_code < 500 or error["code"] in FAILURES_THAT_MAY_BE, (command, error)


def test_no_request_is_a_failure(server: ServerProcess, seed: int) -> None:
    attack(server, seed, num_examples=50)


@pytest.mark.slow
def test_no_request_of_many_is_a_failure(server: ServerProcess, seed: int) -> None:
    attack(server, seed, num_examples=500)
