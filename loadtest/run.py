"""`python -m loadtest run`: a workload, drawn or replayed, played to a server and reported."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.endpoint import Endpoint, LlamaCppEndpoint, OpenAiEndpoint
from loadtest.figures import Figures, summarize
from loadtest.player import play_showing
from loadtest.results import report, write_results
from loadtest.workload import Workload
from loadtest.workloads import KINDS, Settings, draw

APIS = ("openai", "llamacpp")


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how it is asked.

    api       one of APIS
    api_key   of every tenant that has none in `keys`
    keys      tenant -> API key
    """

    url: str
    base: str
    api: str = "openai"
    api_key: str | None = None
    keys: Mapping[str, str] | None = None

    def endpoint(self) -> Endpoint:
        """RuntimeError if there is no such api, or no server that speaks it."""
        if self.api not in APIS:
            raise RuntimeError(f"there is no api {self.api!r}: one of {', '.join(APIS)}")
        if self.api == "openai":
            return OpenAiEndpoint()
        return LlamaCppEndpoint.of(self.url, self.base)

    def keys_of(self, workload: Workload) -> dict[str, str]:
        """Of every tenant of a workload that has one."""
        keys = self.keys or {}
        found = {tenant: keys.get(tenant, self.api_key) for tenant in workload.tenants}
        return {tenant: key for tenant, key in found.items() if key is not None}


def prepare(
    kind: str | None, settings: Settings, replay: Path | None, save: Path | None
) -> Workload:
    """Draw a workload or read it from a file, and save it if told to; RuntimeError if neither."""
    if (kind is None) == (replay is None):
        raise RuntimeError(f"give a workload ({', '.join(KINDS)}) or --replay FILE, not both")
    if kind is not None and kind not in KINDS:
        raise RuntimeError(f"there is no workload {kind!r}: one of {', '.join(KINDS)}")
    workload = draw(kind, settings) if kind is not None else Workload.load(replay or Path())
    if not workload.requests:
        raise RuntimeError(f"{workload.name} has no requests")
    if save is not None:
        workload.save(save)
    return workload


def read_keys(path: Path) -> dict[str, str]:
    """Tenants' API keys from a JSON object; RuntimeError if the file has none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{path} has no keys: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content.values()):
        raise RuntimeError(f'{path} should be such as {{"t000": "slk_...", "t001": "slk_..."}}')
    return content


def run(target: Target, workload: Workload, num_streams: int | None, out: Path | None) -> Figures:
    """Play a workload and write its reports into a folder, if one is given."""
    outcomes = play_showing(
        target.url,
        target.endpoint(),
        workload,
        num_streams=num_streams,
        keys=target.keys_of(workload),
    )
    found = summarize(outcomes)
    if out is not None:
        settings = {"url": target.url, "api": target.api, "streams": num_streams}
        write_results(out, title(workload, num_streams), settings, outcomes, found)
        workload.save(out / "workload.jsonl")
    return found


def title(workload: Workload, num_streams: int | None) -> str:
    """Such as 'slora: 200 requests, open loop'."""
    loop = "open loop" if num_streams is None else f"{num_streams} streams"
    return f"{workload.name}: {len(workload.requests)} requests, {loop}"


def text(workload: Workload, num_streams: int | None, found: Figures) -> str:
    """What is printed: the same as in report.md."""
    return report(title(workload, num_streams), found)
