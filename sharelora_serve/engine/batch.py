"""What one step computes, as the scheduler hands it on."""

from dataclasses import dataclass, field

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable
from sharelora_serve.engine.request import Request, SamplingParams
from sharelora_serve.errors import ServeError


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Tokens at positions request.num_computed to request.num_computed + num_tokens.

    Valid until Scheduler.complete, which moves num_computed on.

    draft_ids  tokens that may follow, computed too, see `Speculator`
    """

    request: Request
    num_tokens: int
    draft_ids: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        """Of the batch, drafts included."""
        return self.num_tokens + len(self.draft_ids)

    @property
    def needs_logits(self) -> bool:
        """Whether the chunk reaches the request's last token, so that the next one is sampled."""
        return self.num_tokens == self.request.num_uncomputed


def padding(
    num_tokens: int,
    block_size: int,
    adapter: AdapterVersion | None = None,
    page_table: PageTable | None = None,
) -> ScheduledRequest:
    """A whole prompt of nobody's, to be computed in the padding block, which nobody reads."""
    request = Request(
        request_id="",
        adapter=adapter,
        prompt_ids=[0] * num_tokens,
        sampling=SamplingParams(max_tokens=1),
        arrived_at=0.0,
        deliver=lambda _: None,
        block_table=[0] * -(-num_tokens // block_size),
        page_table=page_table,
    )
    return ScheduledRequest(request, num_tokens)


@dataclass(frozen=True, slots=True)
class FailedRequest:
    """A request that left the queue because its adapter cannot be had."""

    request: Request
    error: ServeError


@dataclass(slots=True)
class Batch:
    """One step's work. Rows of one adapter stand together, the base's first.

    scheduled  empty when all that happened is that requests failed
    admitted   requests of `scheduled` that left the queue in this step
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    failed: list[FailedRequest] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
