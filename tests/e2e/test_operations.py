"""Request ids, health, readiness, version and metrics."""

import re

import httpx
import pytest
from openai import OpenAI

from sharelora_serve import __version__
from tests.e2e.adapter_folders import NAMES
from tests.e2e.conftest import BASE
from tests.e2e.server_process import ServerProcess
from tests.e2e.test_completions import GREEDY, PROMPT, complete

ROUTES = ("/health", "/ready", "/version", "/metrics", "/v1/models", "/unknown")


@pytest.mark.parametrize("route", ROUTES)
def test_every_answer_has_the_request_id_it_was_sent_or_a_new_one(
    route: str, http: httpx.Client
) -> None:
    sent = "tenant-7/Request:1+2=3@x.y_z"
    assert http.get(route, headers={"x-request-id": sent}).headers["x-request-id"] == sent
    new = {http.get(route).headers["x-request-id"] for _ in range(3)}
    assert len(new) == 3
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in new)


@pytest.mark.parametrize("unfit", ["", "a b", "a" * 129, "a\tb", "ä".encode(), '"quoted"', "<b>"])
def test_an_unfit_request_id_is_replaced(unfit: str | bytes, http: httpx.Client) -> None:
    shown = http.get("/health", headers={"x-request-id": unfit}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", shown)


def test_health_readiness_and_version(http: httpx.Client) -> None:
    for route, content in (
        ("/health", {"status": "ok"}),
        ("/ready", {"status": "ready"}),
        ("/version", {"version": __version__}),
    ):
        response = http.get(route)
        assert (response.status_code, response.json()) == (200, content)


def test_an_answer_on_a_kept_connection_does_not_wait_for_the_clients_acknowledgement(
    http: httpx.Client,
) -> None:
    seconds = min(http.get("/health").elapsed.total_seconds() for _ in range(20))
    assert seconds < 0.03, "Nagle's algorithm adds 40 ms to each"


FIGURES = [
    "sharelora_time_to_first_token_seconds_count",
    "sharelora_time_per_output_token_seconds_count",
    "sharelora_request_seconds_count",
    "sharelora_requests_running",
    "sharelora_requests_waiting",
    "sharelora_kv_blocks_used",
    "sharelora_kv_blocks",
    "sharelora_kv_memory_bytes",
    "sharelora_adapter_memory_bytes{tier=device}",
    "sharelora_adapter_memory_bytes{tier=host}",
    "sharelora_adapter_memory_capacity_bytes",
    "sharelora_adapter_memory_expanded_bytes",
    "sharelora_adapter_dedupe_ratio",
    "sharelora_adapter_factors",
    "sharelora_adapter_hits_total",
    "sharelora_adapter_loads_total{source=host}",
    "sharelora_adapter_loads_total{source=disk}",
    "sharelora_adapter_load_failures_total",
    "sharelora_adapter_evictions_total{tier=device}",
    "sharelora_adapters_published",
    "sharelora_adapters_resident{tier=device}",
    "sharelora_prefix_cache_hit_tokens_total",
    "sharelora_preemptions_total",
    "sharelora_steps_total",
    "sharelora_merges_total",
    "sharelora_unmerges_total",
    *(
        f"sharelora_adapter_{kind}_total{{adapter={name}}}"
        for kind in ("requests", "prompt_tokens", "completion_tokens")
        for name in (BASE, *NAMES, "(other)")
    ),
    *(
        f"sharelora_requests_total{{outcome={outcome}}}"
        for outcome in ("stop", "length", "abort", "refused", "error")
    ),
]


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_there_from_the_start(figure: str, server: ServerProcess) -> None:
    assert server.metrics()[figure] >= 0


def test_a_request_is_counted_where_it_belongs(server: ServerProcess, client: OpenAI) -> None:
    before = server.wait_until_idle()
    completion = complete(client, PROMPT, model="acme", n=2)
    after = server.wait_until_idle()
    assert completion.usage is not None
    tokens = {"prompt": completion.usage.prompt_tokens, "completion": 2 * GREEDY["max_tokens"]}
    expected = {
        **{f"sharelora_adapter_{k}_tokens_total{{adapter=acme}}": v for k, v in tokens.items()},
        **{f"sharelora_adapter_{k}_tokens_total{{adapter={BASE}}}": 0 for k in tokens},
        "sharelora_adapter_requests_total{adapter=acme}": 1,
        "sharelora_adapter_requests_total{adapter=(other)}": 0,
        "sharelora_requests_total{outcome=length}": 1,
        "sharelora_requests_total{outcome=refused}": 0,
        "sharelora_request_seconds_count": 1,
        "sharelora_time_to_first_token_seconds_count": 2,
        "sharelora_time_per_output_token_seconds_count": 2,
    }
    assert {figure: after[figure] - before[figure] for figure in expected} == expected


def test_tokens_of_an_idle_adapter_stay(server: ServerProcess, client: OpenAI) -> None:
    complete(client, PROMPT, model="cargo")
    figure = "sharelora_adapter_completion_tokens_total{adapter=cargo}"
    before = server.wait_until_idle()[figure]
    assert before >= GREEDY["max_tokens"]
    for name in (BASE, "acme", "bolt"):
        complete(client, PROMPT, model=name)
    assert server.metrics()[figure] == before


def test_a_refused_request_is_counted_as_refused(server: ServerProcess, http: httpx.Client) -> None:
    figure = "sharelora_requests_total{outcome=refused}"
    before = server.metrics()[figure]
    for body in {"model": "unknown", "prompt": PROMPT}, {"model": BASE}, []:
        assert http.post("/v1/completions", json=body).is_client_error
    assert server.metrics()[figure] == before + 3


def test_the_dedupe_ratio_is_that_of_the_bytes(server: ServerProcess, client: OpenAI) -> None:
    for name in NAMES:
        complete(client, PROMPT, model=name)
    figures = server.metrics()
    assert figures["sharelora_adapters_resident{tier=device}"] == len(NAMES)
    ratio = (
        figures["sharelora_adapter_memory_expanded_bytes"]
        / figures["sharelora_adapter_memory_bytes{tier=device}"]
    )
    assert figures["sharelora_adapter_dedupe_ratio"] == pytest.approx(ratio)
    assert ratio > 0
