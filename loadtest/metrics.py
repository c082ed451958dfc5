"""A server's figures, read from /metrics."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


async def read_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Every figure by its name and labels, such as `sharelora_requests_total{outcome=stop}`.

    RuntimeError if the server does not tell.
    """
    try:
        response = await client.get("/metrics")
    except httpx.HTTPError as error:
        raise RuntimeError(f"the connection failed: {error!r}") from None
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): (
            sample.value
        )
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
