"""What a workload came to as PNG files; needs matplotlib."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest.figures import SLO_SECONDS, Figures, first_token_seconds, seconds_per_token
from loadtest.player import Outcome

_MAX_TENANTS = 40


def plot_run(folder: Path, outcomes: Sequence[Outcome], found: Figures) -> None:
    """Write waiting.png, timeline.png and tenants.png."""
    _plot_waiting(folder / "waiting.png", outcomes)
    _plot_timeline(folder / "timeline.png", outcomes)
    _plot_tenants(folder / "tenants.png", found)


def plot_curves(
    path: Path, x_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]
) -> None:
    """Write one panel for each y label of `curves`, with its points (x, y)."""
    figure, panels = _panels(len(curves))
    for axes, (y_label, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
    _save(figure, path)


def _plot_waiting(path: Path, outcomes: Sequence[Outcome]) -> None:
    figure, (first, step) = _panels(2)
    _plot_shares(first, first_token_seconds(outcomes), "time to first token, s")
    first.axvline(SLO_SECONDS, linestyle=":", color="grey")
    _plot_shares(step, [1000 * each for each in seconds_per_token(outcomes)], "time per token, ms")
    _save(figure, path)


def _plot_shares(axes: Axes, values: Sequence[float], label: str) -> None:
    shares = [(index + 1) / len(values) for index in range(len(values))]
    axes.step(sorted(values), shares, where="post")
    axes.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.02))


def _plot_timeline(path: Path, outcomes: Sequence[Outcome]) -> None:
    start = min(outcome.timeline.sent_at for outcome in outcomes)
    spans = [
        (each.timeline.sent_at - start, each.timeline.tokens_at[-1] - start)
        for each in outcomes
        if each.timeline.tokens_at
    ]
    tokens = Counter(int(at - start) for each in outcomes for at in each.timeline.tokens_at)
    seconds = range(max(tokens, default=0) + 1)
    figure, (rate, running) = _panels(2)
    rate.step(seconds, [tokens[second] for second in seconds], where="post")
    rate.set(xlabel="seconds", ylabel="tokens in this second", ylim=(0, None))
    open_requests = [sum(sent <= second < end for sent, end in spans) for second in seconds]
    running.step(seconds, open_requests, where="post")
    running.set(xlabel="seconds", ylabel="open requests", ylim=(0, None))
    _save(figure, path)


def _plot_tenants(path: Path, found: Figures) -> None:
    """The tenants with the most tokens, in that order."""
    most_served = sorted(found.tenants.items(), key=lambda item: -item[1].num_tokens)
    names, tenants = zip(*most_served[:_MAX_TENANTS], strict=True)
    figure, (tokens, waits) = _panels(2)
    tokens.bar(names, [tenant.num_tokens for tenant in tenants])
    tokens.set(ylabel="tokens served")
    waits.bar(names, [tenant.first_token_seconds.p99 or 0.0 for tenant in tenants])
    waits.set(ylabel="time to first token, p99, s")
    for axes in (tokens, waits):
        axes.tick_params(axis="x", labelrotation=90)
    _save(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=120)
