"""What /metrics tells of adapters that come and go."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion
from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.adapters.layout import BaseLayout
from sharelora_serve.adapters.naming import AdapterName
from sharelora_serve.adapters.pool import MatrixPool
from sharelora_serve.engine.engine import EngineStats
from sharelora_serve.server.metrics import Metrics
from sharelora_serve.server.usage import Counts


class IdleEngine:
    """As much of engine and registry as is asked for figures; adapters are what a test says."""

    base_name = "tiny"

    def __init__(self, empty_cache: AdapterCache) -> None:
        self.names: list[str] = []
        self.merged: str | None = None
        self.adapters = empty_cache

    @property
    def registry(self) -> Any:
        return SimpleNamespace(
            adapters=lambda: [SimpleNamespace(name=AdapterName(None, n)) for n in self.names]
        )

    def stats(self) -> EngineStats:
        return EngineStats(*[0] * 13, merged_adapter=self.merged)


def _read_nothing(version: AdapterVersion) -> Adapter:
    raise AssertionError(f"{version} is not asked for")


@pytest.fixture
def engine() -> Iterator[IdleEngine]:
    layout = BaseLayout("tiny", 1, {"self_attn.q_proj": (8, 8)})
    pool = MatrixPool(1 << 16, layout.feature_counts, torch.float32, torch.device("cpu"))
    cache = AdapterCache(layout, pool, 1 << 16, read=_read_nothing, on_change=lambda: None)
    yield IdleEngine(cache)
    cache.close()


def test_tokens_of_an_adapter_stay_while_it_is_idle_and_go_with_it(engine: IdleEngine) -> None:
    metrics = Metrics(cast(Any, engine), engine.registry, num_named_adapters=2)
    engine.names = ["acme", 'quo"ted']
    metrics.usage.account("acme").add(Counts(completion_tokens=7))
    metrics.usage.account("tiny").add(Counts(prompt_tokens=3))
    for _ in range(2):
        text = metrics.render().decode()
        assert 'sharelora_adapter_completion_tokens_total{adapter="acme"} 7.0' in text
        assert 'sharelora_adapter_prompt_tokens_total{adapter="tiny"} 3.0' in text
        assert 'sharelora_adapter_prompt_tokens_total{adapter="quo\\"ted"} 0.0' in text
    engine.names = []
    text = metrics.render().decode()
    assert 'adapter="acme"' not in text
    assert 'sharelora_adapter_completion_tokens_total{adapter="(other)"} 7.0' in text


def test_thousands_of_adapters_have_as_many_names_as_may_be(engine: IdleEngine) -> None:
    engine.names = [f"adapter-{number}" for number in range(2000)]
    for num_named in (0, 1, 100, 3000):
        metrics = Metrics(cast(Any, engine), engine.registry, num_named)
        for name in engine.names:
            metrics.usage.account(name).add(Counts(1, 2, 3))
        samples = [
            sample
            for family in text_string_to_metric_families(metrics.render().decode())
            for sample in family.samples
            if sample.name == "sharelora_adapter_prompt_tokens_total"
        ]
        assert len(samples) == min(num_named, 2000) + 2
        assert sum(sample.value for sample in samples) == 2 * 2000


def test_names_have_the_prefix_and_histograms_name_no_adapter(engine: IdleEngine) -> None:
    engine.names = ["acme"]
    metrics = Metrics(cast(Any, engine), engine.registry, num_named_adapters=1)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    assert families
    for family in families:
        assert family.name.startswith("sharelora_")
        assert ":" not in family.name
        assert family.documentation
        for sample in family.samples:
            if family.type == "histogram":
                assert "adapter" not in sample.labels


def test_the_merged_adapter_has_a_sample_while_it_is_merged(engine: IdleEngine) -> None:
    metrics = Metrics(cast(Any, engine), engine.registry, num_named_adapters=1)
    assert "sharelora_merged_adapter{" not in metrics.render().decode()
    engine.merged = "acme"
    assert 'sharelora_merged_adapter{adapter="acme"} 1.0' in metrics.render().decode()
