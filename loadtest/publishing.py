"""Publishing over HTTP: an adapter folder in other numbers, as one file that can be uploaded."""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy.typing as npt
from safetensors.numpy import load_file, save

_FILE = "adapter.safetensors"


@dataclass(frozen=True, slots=True)
class Example:
    """An adapter folder in memory."""

    tensors: dict[str, npt.NDArray[Any]]
    config: str

    @classmethod
    def read(cls, folder: Path) -> "Example":
        """PEFT's or the compact form, in float16 or float32."""
        tensors = load_file(folder / "adapter_model.safetensors")
        return cls(tensors, (folder / "adapter_config.json").read_text())

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scaled(self, a: float, b: float) -> bytes:
        """A .safetensors file whose every A is multiplied by a and every B by b.

        a b = 1 is the same adapter but for rounding, and has no byte in common with this one.
        """
        factors = {"lora_A": a, "lora_B": b}
        tensors = {
            key: (tensor * next(c for side, c in factors.items() if side in key)).astype(
                tensor.dtype
            )
            for key, tensor in self.tensors.items()
        }
        return save(tensors, metadata={"adapter_config": self.config})


@dataclass(frozen=True, slots=True)
class Publication:
    """A version that a name stands for, and how long it took until the server said so."""

    version: str
    seconds: float
    ended_at: float  # time.perf_counter()


async def create(client: httpx.AsyncClient, name: str, file: bytes) -> Publication:
    """Upload a new adapter; RuntimeError with the server's refusal."""
    return await _change(
        client, "POST", "/v1/adapters", data={"name": name}, files={"file": (_FILE, file)}
    )


async def publish(client: httpx.AsyncClient, name: str, file: bytes) -> Publication:
    """Upload a new version of an adapter; RuntimeError likewise."""
    return await _change(client, "PUT", f"/v1/adapters/{name}", files={"file": (_FILE, file)})


async def roll_back(client: httpx.AsyncClient, name: str) -> Publication:
    """Serve the version before the present one again; RuntimeError likewise."""
    return await _change(client, "POST", f"/v1/adapters/{name}/rollback")


async def remove(client: httpx.AsyncClient, name: str) -> None:
    """Forget an adapter, if it is there."""
    await _send(client, "DELETE", f"/v1/adapters/{name}", accepted=(200, 404))


async def _change(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    **content: Any,  # noqa: ANN401 - httpx's own
) -> Publication:
    start = time.perf_counter()
    response = await _send(client, method, path, accepted=(200, 201), **content)
    end = time.perf_counter()
    return Publication(json.loads(response.content)["version"], end - start, end)


async def _send(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    *,
    accepted: Collection[int],
    **content: Any,  # noqa: ANN401 - httpx's own
) -> httpx.Response:
    """RuntimeError for other statuses, and for a lost connection."""
    try:
        response = await client.request(method, path, **content)
    except httpx.HTTPError as error:
        raise RuntimeError(f"the connection failed: {error!r}") from None
    if response.status_code not in accepted:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    return response
