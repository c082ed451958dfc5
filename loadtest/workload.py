"""What is asked of a server, by whom and when: a list of requests that a file keeps exactly."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """One completion.

    arrival_seconds  after the start of the workload; None where the closed loop decides
    tenant           who asks: figures are per tenant, and a tenant may have a key of its own
    """

    arrival_seconds: float | None
    model: str
    prompt: str
    new_tokens: int
    tenant: str


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their arrival."""

    name: str
    requests: tuple[Request, ...]

    @property
    def has_arrivals(self) -> bool:
        """Whether it can be played as an open loop."""
        return all(request.arrival_seconds is not None for request in self.requests)

    @property
    def tenants(self) -> list[str]:
        """Everybody who asks, sorted."""
        return sorted({request.tenant for request in self.requests})

    def save(self, path: Path) -> None:
        """Write a line with the name, then one JSON object for each request."""
        lines = [json.dumps({"workload": self.name})]
        lines += [json.dumps(asdict(request), ensure_ascii=False) for request in self.requests]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read what `save` wrote: the very same requests. Raises RuntimeError if it is not that."""
        try:
            head, *lines = path.read_text(encoding="utf-8").split("\n")
            name = json.loads(head)["workload"]
            objects = [json.loads(line) for line in lines if line]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RuntimeError(f"{path} is no workload: {error!r}") from None
        return cls(str(name), tuple(_request(path, each) for each in objects))


def _request(path: Path, content: object) -> Request:
    kinds: dict[str, type | tuple[type, ...]] = {
        "arrival_seconds": (int, float, type(None)),
        "model": str,
        "prompt": str,
        "new_tokens": int,
        "tenant": str,
    }
    names = [field.name for field in fields(Request)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise RuntimeError(f"{path}: every request has exactly {', '.join(names)}: {content}")
    for name, kind in kinds.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise RuntimeError(f"{path}: {name} cannot be {content[name]!r}")
    return Request(**content)
