"""What a played workload comes to: throughput, waiting, attainment, fairness and errors."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.client import percentile
from loadtest.player import Outcome

SLO_SECONDS = 6.0
"""First tokens that come sooner are in time (S-LoRA, arXiv 2311.03285, 7.1)."""

_PERCENTS = (50, 90, 99)
_MAX_ERROR_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of seconds; None of nothing."""

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Percentiles":
        """The least values that 50, 90 and 99 % do not exceed."""
        return cls(*(percentile(seconds, each) if seconds else None for each in _PERCENTS))


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """What one tenant asked and was given."""

    num_requests: int
    num_answered: int
    num_tokens: int
    first_token_seconds: Percentiles
    satisfaction: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one workload on one server.

    seconds                 from the first request sent to the last token
    tokens_per_second       output tokens of all requests, also of those that broke off
    requests_per_second     answered in full
    first_token_seconds     from sending a request, or from when it was due in an open loop
    time_per_token_seconds  from the first token to the last of an answer, over all but the first
    attainment              share of all requests whose first token came within SLO_SECONDS
    satisfaction            mean over all requests of 1 - (t / SLO_SECONDS)^2 of the first token's
                            t, 0 beyond and where none came
    fairness                Jain's index of the tenants' satisfaction: 1 if all have the same, 1 / n
                            if only one has any
    errors                  reason -> number of requests that failed for it
    """

    num_requests: int
    num_answered: int
    num_refused: int
    num_failed: int
    seconds: float
    tokens_per_second: float
    requests_per_second: float
    first_token_seconds: Percentiles
    time_per_token_seconds: Percentiles
    attainment: float
    satisfaction: float
    fairness: float
    tenants: dict[str, TenantFigures]
    errors: dict[str, int]


def summarize(outcomes: Sequence[Outcome]) -> Figures:
    """The figures of a workload that was played; RuntimeError if it had no requests."""
    if not outcomes:
        raise RuntimeError("a workload without requests has no figures")
    answered = [each for each in outcomes if each.is_answered]
    refused = [each for each in outcomes if each.is_refused]
    failed = [each for each in outcomes if not each.is_answered and not each.is_refused]
    ends = [each.timeline.tokens_at[-1] for each in outcomes if each.timeline.tokens_at]
    start = min(each.timeline.sent_at for each in outcomes)
    seconds = max(ends, default=start) - start
    waits = first_token_seconds(outcomes)
    tenants = _by_tenant(outcomes)
    num_tokens = sum(each.num_tokens for each in tenants.values())
    reasons = Counter((each.timeline.error or "")[:_MAX_ERROR_LENGTH] for each in failed)
    return Figures(
        num_requests=len(outcomes),
        num_answered=len(answered),
        num_refused=len(refused),
        num_failed=len(failed),
        seconds=seconds,
        tokens_per_second=num_tokens / seconds if seconds else 0.0,
        requests_per_second=len(answered) / seconds if seconds else 0.0,
        first_token_seconds=Percentiles.of(waits),
        time_per_token_seconds=Percentiles.of(seconds_per_token(outcomes)),
        attainment=sum(wait < SLO_SECONDS for wait in waits) / len(outcomes),
        satisfaction=_mean_satisfaction(outcomes),
        fairness=jain_index([each.satisfaction for each in tenants.values()]),
        tenants=tenants,
        errors=dict(reasons.most_common()),
    )


def first_token_seconds(outcomes: Sequence[Outcome]) -> list[float]:
    """Of every request that had a first token."""
    return [each.timeline.first_token_seconds for each in outcomes if each.timeline.tokens_at]


def seconds_per_token(outcomes: Sequence[Outcome]) -> list[float]:
    """Of every answer of at least two tokens: the mean gap between them.

    Over the tokens and not over the events: a server may send several tokens in one.
    """
    return [
        (each.timeline.tokens_at[-1] - each.timeline.tokens_at[0]) / (each.timeline.num_tokens - 1)
        for each in outcomes
        if each.is_answered and each.timeline.num_tokens > 1
    ]


def satisfaction(wait: float) -> float:
    """Of one request that waited so many seconds for its first token: from 1 down to 0."""
    return max(0.0, 1 - (wait / SLO_SECONDS) ** 2)


def _mean_satisfaction(outcomes: Sequence[Outcome]) -> float:
    return sum(map(satisfaction, first_token_seconds(outcomes))) / len(outcomes)


def jain_index(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): Jain, Chiu and Hawe, DEC-TR-301 (1984). 1 where all are zero."""
    squares = sum(share**2 for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def _by_tenant(outcomes: Sequence[Outcome]) -> dict[str, TenantFigures]:
    of_tenant: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        of_tenant[outcome.request.tenant].append(outcome)
    return {
        tenant: TenantFigures(
            num_requests=len(theirs),
            num_answered=sum(each.is_answered for each in theirs),
            num_tokens=sum(each.timeline.num_tokens for each in theirs),
            first_token_seconds=Percentiles.of(first_token_seconds(theirs)),
            satisfaction=_mean_satisfaction(theirs),
        )
        for tenant, theirs in sorted(of_tenant.items())
    }
