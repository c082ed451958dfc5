"""One generation from admission to its last token, and what it is asked and answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from sharelora_serve.adapters.adapter import AdapterVersion, PageTable


class FinishReason(StrEnum):
    """Why a generation ended; the first two are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Ranges are checked where the request is parsed.

    max_tokens           new tokens at most; 0 only computes the prompt (for its logprobs)
    temperature          0 is greedy
    top_k                0 keeps all
    seed                 None draws from the engine's own generator
    logprobs             how many alternatives per new token; None for no logprobs at all
    prompt_logprobs      the same for every prompt token but the first
    stop_token_ids       end the generation, as the model's end tokens do unless ignore_eos
    stop strings         are matched on text by the server, which then aborts the request
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position: the token's own and the most likely ones'.

    rank order: `top` is sorted from most to least likely, as long as was asked for.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What one step added to one request; the last one has a finish_reason.

    prompt_logprobs comes once, before or with the first token: one item per prompt token, None
    for the first. `error` is set with FinishReason.ERROR.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV the prefix cache held


@dataclass(slots=True, eq=False)  # compared by identity: equal prompts are still two requests
class Request:
    """One generation. Only the engine thread writes to it once it is submitted.

    deliver is called on the engine thread and must not block.
    """

    request_id: str
    adapter: AdapterVersion | None  # None is the base; held to the end, so a reload cannot swap it
    prompt_ids: list[int]
    sampling: SamplingParams
    arrived_at: float  # time.monotonic(), seconds
    deliver: Callable[[RequestOutput], None]
    tenant: str | None = None  # who asks; what one has computed is never reused for another

    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)  # KV block ids in token order
    num_computed: int = 0  # tokens whose KV is in block_table; 0 again after preemption
    num_cached_tokens: int | None = None  # when it first ran; None before
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, so far as known
    page_table: PageTable | None = None  # held while running; None for the base and while queued
    finish_reason: FinishReason | None = None

    @property
    def client(self) -> str:
        """Between whom the scheduler is fair: tenants, or adapters where who asks is none."""
        if self.tenant is not None:
            return f"{self.tenant}/"  # no adapter is called so
        return "" if self.adapter is None else self.adapter.name

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens still to run: 1 while decoding, more in prefill or after preemption."""
        return self.num_tokens - self.num_computed

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions start to end, over prompt and output together."""
        split = len(self.prompt_ids)
        if end <= split:
            return self.prompt_ids[start:end]
        return self.prompt_ids[start:split] + self.output_ids[max(0, start - split) : end - split]
