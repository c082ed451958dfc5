"""A server with API keys, and the clients of its admin and of two tenants, acme and bolt."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx

from sharelora_serve.server.keys import create_key
from tests.e2e.server_process import ServerProcess, running_server

PROMPT = "The captain of the ship looked at the sea, and then at the map, and then he said that"
"""More than one KV block, so that its beginning can be found in the prefix cache."""


def zipped_folder(folder: Path) -> bytes:
    """An adapter folder as an upload."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo(path.name), path.read_bytes())
    return file.getvalue()


class Client(httpx.Client):
    """What somebody with one key can do."""

    def create(self, name: str, content: bytes) -> httpx.Response:
        """Publish a new adapter."""
        return self.post("/v1/adapters", data={"name": name}, files={"file": content})

    def publish(self, name: str, content: bytes, **headers: str) -> httpx.Response:
        """Publish a new version."""
        return self.put(f"/v1/adapters/{name}", files={"file": content}, headers=headers)

    def complete(self, model: str, prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        """A greedy answer of 8 tokens."""
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return self.post("/v1/completions", json=body | {"ignore_eos": True} | fields)

    def tokens(self, model: str, prompt: str = PROMPT) -> list[str]:
        """The tokens of that answer."""
        answer = self.complete(model, prompt, logprobs=0)
        assert answer.status_code == 200, answer.text
        tokens: list[str] = answer.json()["choices"][0]["logprobs"]["tokens"]
        return tokens

    def cached_tokens(self, model: str, prompt: str = PROMPT) -> int:
        """Tokens of a prompt that the prefix cache held."""
        answer = self.complete(model, prompt)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def names(self) -> list[str]:
        """Of the adapters that are listed."""
        return [adapter["name"] for adapter in self.get("/v1/adapters").json()["data"]]


class Shop:
    """A running server and the clients of its admin and its two tenants."""

    def __init__(
        self, server: ServerProcess, keys: Path, admin: Client, acme: Client, bolt: Client
    ) -> None:
        self.server = server
        self.keys = keys
        self.admin = admin
        self.acme = acme
        self.bolt = bolt


@contextmanager
def open_shop(folder: Path, model_folder: Path, **settings: str) -> Iterator[Shop]:
    """A new server whose keys, store and log are in a folder."""
    keys = folder / "keys.jsonl"
    texts = [create_key(keys, tenant, None)[1] for tenant in (None, "acme", "bolt")]
    settings = {
        "--model": str(model_folder),
        "--dtype": "float32",
        "--threads": "1",
        "--api-keys": str(keys),
        **settings,
    }
    words = (word for pair in settings.items() for word in pair)
    with running_server(folder / "log", *words) as server, ExitStack() as stack:
        clients = [
            stack.enter_context(
                Client(
                    base_url=server.url,
                    headers={"authorization": f"Bearer {text}"},
                    timeout=60,
                )
            )
            for text in texts
        ]
        yield Shop(server, keys, *clients)
