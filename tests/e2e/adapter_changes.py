"""A client that changes its own adapters without end and remembers what it was answered."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedModel

from sharelora_serve.adapters.adapter import Adapter
from sharelora_serve.adapters.format import read_adapter
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.server.codec import TextCodec
from tests.adapters.store_model import Kind, ModelAdapter, Operation, StoreModel
from tests.e2e.tenants import zipped_folder
from tests.golden.reference import reference_greedy

NUM_TOKENS = 4

_PROMPT = "Once upon a time there was"
_KINDS: tuple[Kind, ...] = ("publish", "publish", "publish", "remove", "roll_back", "pin", "unpin")


@dataclass(frozen=True, slots=True)
class Sample:
    """An adapter to upload, and the tokens of a greedy answer, as far as they are clear."""

    adapter: Adapter
    archive: bytes
    tokens: list[str]


def make_sample(
    folder: Path, layout: BaseLayout, reference: PreTrainedModel, codec: TextCodec
) -> Sample:
    """The sample of an adapter's folder."""
    adapter = read_adapter(folder, layout, name=folder.name)
    prompt_ids = codec.encode(_PROMPT, add_special_tokens=True)
    answer = reference_greedy(reference, adapter, prompt_ids, NUM_TOKENS)
    tokens = [codec.token_text(i) for i in answer.token_ids[: answer.count_clear()]]
    return Sample(adapter, zipped_folder(folder), tokens)


def upload(http: httpx.Client, name: str, sample: Sample, *, is_new: bool) -> httpx.Response:
    """Send a sample as a new adapter, or as a new version of one."""
    files = {"file": ("adapter.zip", sample.archive)}
    if is_new:
        return http.post("/v1/adapters", data={"name": name}, files=files)
    return http.put(f"/v1/adapters/{name}", files=files)


def assert_answers_as(http: httpx.Client, name: str, sample: Sample) -> None:
    """The name answers with the sample's tokens, and says that it did."""
    body = {"model": name, "prompt": _PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = http.post("/v1/completions", json=body | {"ignore_eos": True, "logprobs": 0})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-adapter-version"] == sample.adapter.digest
    tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    assert tokens[: len(sample.tokens)] == sample.tokens


class Changer:
    """One client with adapters that nobody else changes."""

    def __init__(self, number: int, samples: Sequence[Sample], seed: int) -> None:
        self.num_changes = 0
        self._names = [AdapterName(None, f"client-{number}-{index}") for index in range(2)]
        self._samples = samples
        self._contents = [sample.adapter for sample in samples]
        self._draw = random.Random(seed + number)
        self._known = StoreModel()
        self._perhaps = self._known  # the same after the change that was not answered

    def change_until_killed(self, url: str) -> None:
        """Change one adapter after the other; returns when the server is gone."""
        with httpx.Client(base_url=url, timeout=60) as http:
            while True:
                operation = self._next_operation()
                self._perhaps = operation.after(self._known, self._contents)
                try:
                    answer = self._send(http, operation)
                    assert answer.status_code in (200, 201), answer.text
                    self._known = self._perhaps
                    self.num_changes += 1
                    if operation.kind != "remove":
                        assert _described(answer.json()) == self._known.adapters[operation.name]
                    if self._draw.random() < 0.3:
                        self._assert_answers(http, operation.name)
                except httpx.TransportError:
                    return

    def assert_finds_its_adapters(self, url: str) -> None:
        """All that was answered holds, and what was not is there whole or not at all."""
        found = StoreModel()
        with httpx.Client(base_url=url, timeout=60) as http:
            for name in self._names:
                answer = http.get(f"/v1/adapters/{name.text}")
                if answer.status_code != 404:
                    assert answer.status_code == 200, answer.text
                    found.adapters[name] = _described(answer.json())
            assert found in (self._known, self._perhaps)
            self._known = self._perhaps = found
            for name in self._names:
                self._assert_answers(http, name)

    def _next_operation(self) -> Operation:
        name, kind = self._draw.choice(self._names), self._draw.choice(_KINDS)
        if name not in self._known.adapters:
            kind = "publish"
        return Operation(kind, name, self._draw.randrange(60))

    def _send(self, http: httpx.Client, operation: Operation) -> httpx.Response:
        name, path = operation.name, f"/v1/adapters/{operation.name.text}"
        match operation.kind:
            case "publish":
                sample = self._samples[operation.choice % len(self._samples)]
                return upload(http, name.text, sample, is_new=name not in self._known.adapters)
            case "remove":
                return http.delete(path)
            case "roll_back":
                version = self._perhaps.adapters[name].current
                return http.post(f"{path}/rollback", json={"version": version})
            case "pin" | "unpin":
                return http.post(f"{path}/{operation.kind}")
        raise AssertionError(f"{operation.kind} is no request")

    def _assert_answers(self, http: httpx.Client, name: AdapterName) -> None:
        if name in self._known.adapters:
            digest = self._known.adapters[name].current
            (sample,) = (one for one in self._samples if one.adapter.digest == digest)
            assert_answers_as(http, name.text, sample)


def _described(answer: dict[str, Any]) -> ModelAdapter:
    """What an answer says of an adapter."""
    versions = [version["version"] for version in answer["versions"]]
    (current,) = (version["version"] for version in answer["versions"] if version["is_current"])
    assert answer["version"] == current
    return ModelAdapter(current, versions, answer["pinned"], answer["from_folder"])
