"""A played workload as files: results.json with every request, report.md, and plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from loadtest.figures import SLO_SECONDS, Figures, Percentiles
from loadtest.markdown import figure, table
from loadtest.player import Outcome

_MAX_TENANTS = 20  # in report.md; results.json has all


def write_results(
    folder: Path, title: str, settings: dict[str, Any], outcomes: Sequence[Outcome], found: Figures
) -> None:
    """Write all files; without matplotlib there are no plots, which is said."""
    folder.mkdir(parents=True, exist_ok=True)
    start = min(outcome.timeline.sent_at for outcome in outcomes)
    content = {
        "title": title,
        "settings": settings,
        "figures": asdict(found),
        "requests": [_request(outcome, start) for outcome in outcomes],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "report.md").write_text(report(title, found), encoding="utf-8")
    if can_plot():
        from loadtest.plots import plot_run

        plot_run(folder, outcomes, found)


def can_plot() -> bool:
    """Whether matplotlib is installed; says what to do if it is not."""
    try:
        import matplotlib  # noqa: F401 - slow to import, and only plots need it
    except ImportError:
        typer.echo("no plots without matplotlib: make setup installs it", err=True)
        return False
    return True


def report(title: str, found: Figures) -> str:
    """The figures as Markdown."""
    waits, steps = found.first_token_seconds, found.time_per_token_seconds
    rows = [
        ("requests", str(found.num_requests)),
        ("answered, refused with 429, failed", _counts(found)),
        ("seconds", figure(found.seconds)),
        ("output tokens/s", figure(found.tokens_per_second)),
        ("requests/s", figure(found.requests_per_second)),
        ("time to first token, s: p50, p90, p99", _percentiles(waits)),
        ("time per token, ms: p50, p90, p99", _percentiles(steps, 1000)),
        (f"first tokens under {SLO_SECONDS:g} s", figure(found.attainment)),
        ("satisfaction", figure(found.satisfaction)),
        ("fairness over tenants (Jain)", figure(found.fairness)),
    ]
    parts = [f"# {title}\n", table(("figure", "value"), rows)]
    most_served = sorted(found.tenants.items(), key=lambda item: -item[1].num_tokens)
    tenants = [
        (
            name,
            *map(str, (each.num_requests, each.num_answered, each.num_tokens)),
            *map(figure, (each.first_token_seconds.p50, each.first_token_seconds.p99)),
        )
        for name, each in most_served[:_MAX_TENANTS]
    ]
    headings = ("tenant", "requests", "answered", "tokens", "first token p50, s", "p99, s")
    parts.append(table(headings, tenants))
    if len(most_served) > _MAX_TENANTS:
        parts.append(f"and {len(most_served) - _MAX_TENANTS} tenants with fewer tokens\n")
    if found.errors:
        errors = [(str(count), " ".join(reason.split())) for reason, count in found.errors.items()]
        parts.append(table(("failed", "reason"), errors))
    return "\n".join(parts)


def _counts(found: Figures) -> str:
    return f"{found.num_answered}, {found.num_refused}, {found.num_failed}"


def _percentiles(seconds: Percentiles, factor: float = 1) -> str:
    values = (seconds.p50, seconds.p90, seconds.p99)
    return ", ".join(figure(None if each is None else factor * each) for each in values)


def _request(outcome: Outcome, start: float) -> dict[str, Any]:
    """Of one request: times are seconds after the first was sent."""
    request, timeline = outcome.request, outcome.timeline
    return {
        "model": request.model,
        "tenant": request.tenant,
        "prompt_words": len(request.prompt.split()),
        "sent_at": timeline.sent_at - start,
        "tokens_at": [each - start for each in timeline.tokens_at],
        "num_tokens": timeline.num_tokens,
        "version": timeline.version,
        "status": timeline.status,
        "error": timeline.error,
    }
