"""What /metrics tells: counters and histograms of requests, and gauges read when they are asked."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sharelora_serve.adapters.registry import AdapterRegistry
from sharelora_serve.engine.engine import Engine
from sharelora_serve.server.usage import OTHER, Usage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

OUTCOMES = ("stop", "length", "abort", "refused", "error")


class Metrics:
    """The figures of one server, in a registry of its own.

    Histograms carry no adapter label: thousands of tenants times buckets is more than any
    monitoring holds. Requests and tokens are counted per adapter in `usage`, which names as many
    as may be named.
    """

    def __init__(self, engine: Engine, registry: AdapterRegistry, num_named_adapters: int) -> None:
        """Engine, scheduler and caches are asked for their figures at every scrape."""
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "sharelora_requests",
            "Requests that ended, by how.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in OUTCOMES:
            self.requests.labels(outcome=outcome)
        self.time_to_first_token = self._histogram(
            "sharelora_time_to_first_token_seconds",
            "From a request's arrival to its first token, queueing included.",
            _SECONDS,
        )
        self.time_per_output_token = self._histogram(
            "sharelora_time_per_output_token_seconds",
            "Mean time between a request's tokens after its first.",
            _TOKEN_SECONDS,
        )
        self.request_time = self._histogram(
            "sharelora_request_seconds", "From a request's arrival to its end.", _SECONDS
        )
        self.usage = Usage(engine.base_name, num_named_adapters)
        self.registry.register(_EngineFigures(engine, registry, self.usage))

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


class _EngineFigures(Collector):
    """Reads engine, KV cache, adapter cache and pool at the moment of a scrape."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, usage: Usage) -> None:
        self._engine = engine
        self._registry = registry
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """Every figure as a metric family."""
        stats, cache = self._engine.stats(), self._engine.adapters.stats()
        published = self._registry.adapters()
        pool = cache.pool
        gauges = {
            "requests_running": (stats.num_running, "Requests in the running batch."),
            "requests_waiting": (stats.num_waiting, "Requests that wait for a place."),
            "kv_blocks_used": (stats.kv_blocks_used, "KV cache blocks that requests refer to."),
            "kv_blocks": (stats.kv_blocks_total, "KV cache blocks in all."),
            "kv_memory_bytes": (stats.kv_memory_bytes, "Memory of the KV cache."),
            "adapters_published": (len(published), "Adapters that can be asked for."),
            "adapters_pinned": (cache.num_pinned, "Adapters that stay on the device."),
            "adapter_memory_capacity_bytes": (
                pool.capacity_bytes,
                "Bound of the adapters' device memory.",
            ),
            "adapter_memory_expanded_bytes": (
                pool.expanded_bytes,
                "What the adapters on the device would take as plain LoRA.",
            ),
            "adapter_dedupe_ratio": (
                pool.expanded_bytes / pool.used_bytes if pool.used_bytes else 1.0,
                "Bytes as plain LoRA over bytes used, of the adapters on the device.",
            ),
            "adapter_factors": (pool.num_factors, "Distinct matrices on the device."),
            "adapter_loads_in_progress": (cache.loads_in_progress, "Loads queued or running."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"sharelora_{name}", text, value=value)
        yield _by_label(
            GaugeMetricFamily,
            "adapter_memory_bytes",
            "Bytes of adapters, by tier.",
            "tier",
            {"device": pool.used_bytes, "host": cache.host_bytes},
        )
        yield _by_label(
            GaugeMetricFamily,
            "adapters_resident",
            "Adapters, by tier.",
            "tier",
            {"device": pool.num_adapters, "host": cache.num_on_host},
        )
        counters = {
            "preemptions": (stats.num_preemptions, "Requests preempted for want of KV blocks."),
            "draft_tokens": (stats.num_draft_tokens, "Tokens guessed ahead and checked."),
            "draft_tokens_accepted": (
                stats.num_accepted_tokens,
                "Tokens guessed ahead after which the next was taken without another step.",
            ),
            "steps": (stats.num_steps, "Forward passes."),
            "merges": (stats.num_merges, "Adapters folded into the weights by --merge auto."),
            "unmerges": (stats.num_unmerges, "Adapters taken out of the weights again."),
            "prefix_cache_hit_tokens": (
                stats.prefix_cache_hits_tokens,
                "Prompt tokens whose keys and values were in the prefix cache.",
            ),
            "prefix_cache_query_tokens": (
                stats.prefix_cache_queries_tokens,
                "Prompt tokens that were looked up in the prefix cache.",
            ),
            "adapter_hits": (
                cache.device_hits,
                "Requests whose adapter was on the device when its turn came.",
            ),
            "adapter_load_failures": (cache.failures, "Loads of adapters that failed."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"sharelora_{name}", text, value=value)
        yield _by_label(
            CounterMetricFamily,
            "adapter_loads",
            "Adapters read, by where from: host memory to the device, or disk to host memory.",
            "source",
            {"host": cache.host_hits, "disk": cache.disk_loads},
        )
        yield _by_label(
            CounterMetricFamily,
            "adapter_evictions",
            "Adapters that made room for others, by tier.",
            "tier",
            {"device": cache.device_evictions, "host": cache.host_evictions},
        )
        yield _by_label(
            GaugeMetricFamily,
            "merged_adapter",
            "1 for the adapter that is folded into the weights now, if any.",
            "adapter",
            {stats.merged_adapter: 1} if stats.merged_adapter is not None else {},
        )
        self._usage.follow([item.name.text for item in published])
        shown = self._usage.shown()
        for kind, text in (
            ("requests", "Requests that were queued"),
            ("prompt_tokens", "Prompt tokens"),
            ("completion_tokens", "Completion tokens"),
        ):
            yield _by_label(
                CounterMetricFamily,
                f"adapter_{kind}",
                f"{text}, by adapter; the base's name is the base, {OTHER} all that are not named.",
                "adapter",
                {name: getattr(counts, kind) for name, counts in shown.items()},
            )


def _by_label(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: dict[str, float],
) -> Metric:
    metric = family(f"sharelora_{name}", text, labels=[label])
    for key, value in values.items():
        metric.add_metric([key], value)
    return metric
