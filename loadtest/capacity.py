"""What a server can do: figures of whole answers only."""

from collections.abc import Mapping

from loadtest.endpoint import Endpoint, OpenAiEndpoint
from loadtest.figures import Figures, summarize
from loadtest.player import play_showing
from loadtest.workload import Workload
from loadtest.workloads import Settings, draw

BASE = "base"
"""What the servers that are started here call their base."""


def measure_whole(
    url: str,
    workload: Workload,
    *,
    endpoint: Endpoint | None = None,
    num_streams: int | None = None,
    keys: Mapping[str, str] | None = None,
) -> Figures:
    """The figures of a workload, as a closed loop if there is a number of streams.

    RuntimeError if a request was not answered in full: the others then had less to share.
    """
    outcomes = play_showing(
        url, endpoint or OpenAiEndpoint(), workload, num_streams=num_streams, keys=keys
    )
    found = summarize(outcomes)
    missing = found.num_requests - found.num_answered
    if missing:
        reason = next(iter(found.errors), "429")
        raise RuntimeError(f"{missing} of {found.num_requests} requests not answered: {reason}")
    return found


def measure_capacity(
    url: str,
    kind: str,
    settings: Settings,
    num_streams: int,
    keys: Mapping[str, str] | None = None,
) -> float:
    """Requests per second of a closed loop; RuntimeError likewise."""
    workload = draw(kind, settings)
    return measure_whole(url, workload, num_streams=num_streams, keys=keys).requests_per_second
