"""A server's figures, read from /metrics."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def read_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Every figure by its name and labels, such as `sharelora_requests_total{outcome=stop}`."""
    response = await client.get("/metrics")
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): (
            sample.value
        )
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
