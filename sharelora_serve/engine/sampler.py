"""Choose each request's next token from its row of logits, and report log-probabilities.

Greedy rows cost one pass over the batch. Any other row is drawn by inverse CDF over integer
weights: integer sums are exact in every order, so neither the batch nor the number of threads can
move a draw.
"""

import math
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from sharelora_serve.engine.request import Request, SamplingParams, TokenLogprobs
from sharelora_serve.errors import InvalidRequestError, SamplingError, ServeError

# The weight of the likeliest token. A token below 2**-40 of it is never drawn; the weights of 2**23
# tokens still sum below 2**63.
LIKELIEST_WEIGHT = 2**40

# Below this, logits divided by the temperature differ from greedy only where they nearly tie.
# vLLM's _SAMPLING_EPS.
GREEDY_BELOW = 1e-5

_ARGMAX_BLOCK = 256
_RANDOM_BITS = 64


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A request's next token; logprobs is None where the request did not ask for them."""

    token_id: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Chooses next tokens. Used by the engine thread; holds nothing of any request.

    A token is a pure function of its row of logits, the request's parameters and tokens, and
    (seed, output position): the batch, preemption and restarts change nothing. A request without
    a seed has its request_id for one, keyed with a secret drawn when the sampler is made; so
    request ids must be unique, and their draws cannot be told in advance.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device
    ) -> None:
        """Sample from `vocab_size` logits a row.

        eos_token_ids  the model's end tokens, each in [0, vocab_size)
        device         where the logits are
        """
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._secret = os.urandom(32)

    def sample(
        self, logits: Tensor, requests: Sequence[Request]
    ) -> list[SampledToken | ServeError]:
        """The next token of each request, or in its place the error that fails it alone.

        The error is a SamplingError where the model's logits are not finite, an
        InvalidRequestError where the request's own parameters leave nothing to choose from.

        logits    (num_rows, vocab_size)  float32, not changed; row i belongs to requests[i]
        requests  token ids in their parameters and prompts are in [0, vocab_size)

        Each request, in this order: repetition penalty, presence and frequency penalties,
        logit_bias, end tokens masked up to min_tokens; then argmax, or temperature, top_k, top_p,
        min_p and a draw. Tokens that tie are ranked by id, lowest first: so a greedy choice,
        top_k=1 and top_p=0 agree. Logprobs are of the logits as given, as OpenAI's.
        """
        assert logits.shape == (len(requests), self._vocab_size), "one row of logits per request"
        best_ids, best_logits = _argmax(logits)
        results: list[SampledToken | ServeError] = []
        for row, request in enumerate(requests):
            if not math.isfinite(best_logits[row]):
                results.append(_not_finite(request, best_logits[row]))
                continue
            try:
                token_id = self._choose(logits, row, best_ids[row], best_logits[row], request)
            except InvalidRequestError as error:
                results.append(error)
                continue
            num_top = request.sampling.logprobs
            logprobs = None if num_top is None else _logprobs(logits[row], token_id, num_top)
            results.append(SampledToken(token_id, logprobs))
        return results

    def prompt_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """What the model gave to each of token_ids, and its num_top likeliest tokens.

        logits     (len(token_ids), vocab_size)  float32, not changed; row i predicted token_ids[i]

        Raises SamplingError where a row is not finite.
        """
        assert logits.shape == (len(token_ids), self._vocab_size), "one row of logits per token"
        results = []
        for row, token_id in zip(logits, token_ids, strict=True):
            result = _logprobs(row, token_id, num_top)
            if math.isnan(result.logprob):
                raise SamplingError(_NOT_FINITE.format(place="in the prompt", value="nan"))
            results.append(result)
        return results

    def _choose(
        self, logits: Tensor, row: int, best_id: int, best_logit: float, request: Request
    ) -> int:
        """The token of one row, whose first largest logit is best_logit at best_id."""
        sampling = request.sampling
        greedy = sampling.temperature < GREEDY_BELOW
        masked = self._masked_ids(request)
        is_adjusted = _is_adjusted(request)
        if greedy and not is_adjusted and best_id not in masked:
            return best_id
        if not is_adjusted and not masked:
            scores = logits[row]
        else:
            scores = logits[row].clone()
            apply_penalties(scores, request)
            if masked:
                scores[_index(masked, self._device)] = -math.inf
            (best_id,), (best_logit,) = _argmax(scores[None])
            if not math.isfinite(best_logit):
                raise _nothing_left(request, best_logit)
            if greedy:
                return best_id
        token_ids, weights = candidates(scores, best_logit, sampling)
        cumulative = weights.cumsum(0)
        target = int(cumulative[-1]) * self._random_bits(request) >> _RANDOM_BITS
        drawn = torch.searchsorted(cumulative, target, right=True)
        return int(drawn if token_ids is None else token_ids[drawn])

    def _masked_ids(self, request: Request) -> frozenset[int]:
        """Tokens that would end the request before min_tokens.

        The model's end tokens are among them even with ignore_eos, as in vLLM.
        """
        if len(request.output_ids) >= request.sampling.min_tokens:
            return frozenset()
        return self._eos_token_ids | request.sampling.stop_token_ids

    def _random_bits(self, request: Request) -> int:
        """64 random bits: a keyed hash of (seed, output position), never a generator's state."""
        position = len(request.output_ids)
        seed = request.sampling.seed
        if seed is not None:
            digest = blake2b(b"%d/%d" % (seed, position), digest_size=_RANDOM_BITS // 8)
        else:
            digest = blake2b(
                f"{request.request_id}/{position}".encode(),
                digest_size=_RANDOM_BITS // 8,
                key=self._secret,
            )
        return int.from_bytes(digest.digest())


def apply_penalties(scores: Tensor, request: Request) -> None:
    """Change one row in place by the request's penalties and logit_bias.

    scores  (vocab_size,)  float32

    repetition            scores of tokens in prompt or output, divided where positive, else
                          multiplied (CTRL, arXiv 1909.05858; sign as in transformers)
    presence, frequency   subtract presence + frequency * count, for tokens in the output (OpenAI)
    logit_bias            added
    """
    sampling = request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = _index({*request.prompt_ids, *request.output_ids}, scores.device)
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(request.output_ids)
        counted = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counted
        scores[_index(counts, scores.device)] -= penalties
    if sampling.logit_bias:
        bias = torch.tensor(
            list(sampling.logit_bias.values()), dtype=scores.dtype, device=scores.device
        )
        scores[_index(sampling.logit_bias, scores.device)] += bias


def candidates(
    scores: Tensor, best_score: float, sampling: SamplingParams
) -> tuple[Tensor | None, Tensor]:
    """What may be drawn after temperature, top_k, top_p and min_p: (token ids, weights).

    scores      (vocab_size,)  float32; -inf is never drawn
    best_score  their largest, finite
    token ids   (num_candidates,) int64, or None where weights are those of the whole vocabulary
    weights     (num_candidates,) int64 in proportion to the probabilities, the likeliest token's
                being LIKELIEST_WEIGHT; 0 is never drawn

    Temperature is at least GREEDY_BELOW. top_k keeps exactly that many; top_p (arXiv 1904.09751)
    the fewest tokens of those whose probabilities sum to top_p of theirs, at least one; min_p
    (arXiv 2407.01082) those of at least that share of the likeliest token's probability.
    """
    token_ids = None
    if 0 < sampling.top_k < len(scores):
        token_ids = _most_likely(scores, sampling.top_k)
        scores = scores[token_ids]
    relative = (scores - best_score).div_(sampling.temperature).exp_()
    weights = relative.mul_(LIKELIEST_WEIGHT).to(torch.int64)
    if sampling.top_p < 1.0:
        kept = _nucleus(weights, sampling.top_p)
        token_ids = kept if token_ids is None else token_ids[kept]
        weights = weights[kept]
    if sampling.min_p > 0.0:
        weights[weights < math.ceil(sampling.min_p * LIKELIEST_WEIGHT)] = 0
    return token_ids, weights


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Indices of the fewest weights that sum to top_p of all, the largest first."""
    total = int(weights.sum())
    numerator, denominator = top_p.as_integer_ratio()
    required = max(1, -(-total * numerator // denominator))
    # As many tokens as there are, each at or below this, can be left out together: only the few
    # above it need sorting.
    floor = (total - required) // len(weights)
    above = (weights > floor).nonzero().flatten()
    ranked, order = weights[above].sort(descending=True, stable=True)
    num_kept = int(torch.searchsorted(ranked.cumsum(0), required)) + 1
    return above[order[:num_kept]]


def _most_likely(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of a row, largest first, the lowest id first among equals."""
    # topk alone leaves open which of several equal scores it returns, and float16 logits often tie.
    threshold = scores.topk(count).values[-1]
    token_ids = (scores >= threshold).nonzero().flatten()
    order = scores[token_ids].argsort(descending=True, stable=True)
    return token_ids[order[:count]]


def _argmax(logits: Tensor) -> tuple[list[int], list[float]]:
    """Per row of (num_rows, vocab_size): the first index of the largest, and its value or NaN.

    In two stages, since amax is vectorised on CPUs and argmax is not: 15 times faster there.
    """
    vocab_size = logits.shape[1]
    size = min(_ARGMAX_BLOCK, vocab_size)
    # The last block ends with the row and may overlap the one before; argmax takes the first of
    # equals, so an overlapped element is found in the earlier block.
    block_best = torch.cat(
        [logits.unfold(1, size, size).amax(2), logits[:, -size:].amax(1, keepdim=True)], dim=1
    )
    starts = (block_best.argmax(1, keepdim=True) * size).clamp_(max=vocab_size - size)
    block = logits.gather(1, starts + torch.arange(size, device=logits.device))
    inside = block.argmax(1, keepdim=True)
    best_ids: list[int] = (starts + inside).flatten().tolist()
    best_logits: list[float] = block.gather(1, inside).flatten().tolist()
    return best_ids, best_logits


def _logprobs(logits: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Natural-log probabilities of one row, (vocab_size,): the token's and the likeliest ones'."""
    logprobs = logits.log_softmax(0)
    top: list[tuple[int, float]] = []
    if num_top > 0:
        # Ranked by logit: distinct logits may round to one logprob.
        top_ids = _most_likely(logits, min(num_top, len(logits)))
        top = list(zip(top_ids.tolist(), logprobs[top_ids].tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)


def _is_adjusted(request: Request) -> bool:
    """Whether apply_penalties would change anything."""
    sampling = request.sampling
    return (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or bool(sampling.logit_bias)
    )


def _index(token_ids: Collection[int], device: torch.device) -> Tensor:
    """(num_ids,) int64 in the collection's order."""
    return torch.tensor(list(token_ids), dtype=torch.int64, device=device)


_NOT_FINITE = (
    "the model's logits {place} are not finite (largest: {value}). The adapter or the base "
    "overflows in the type it is served in: check the adapter's weights, or serve with "
    "--dtype float32 if that is another"
)


def _not_finite(request: Request, best_logit: float) -> SamplingError:
    """The error of a row that came from the model without a largest finite logit."""
    place = f"for output token {len(request.output_ids)}"
    return SamplingError(_NOT_FINITE.format(place=place, value=best_logit))


def _nothing_left(request: Request, best_logit: float) -> InvalidRequestError:
    """The error of a row that penalties, biases and masks left without a finite largest logit."""
    sampling = request.sampling
    place = f"for output token {len(request.output_ids)}"
    if best_logit == -math.inf:
        return InvalidRequestError(
            f"no token is left to choose {place}: min_tokens={sampling.min_tokens} forbids every "
            "end token until then, and nothing else remains. Lower min_tokens or give fewer "
            "stop_token_ids",
            param="min_tokens",
        )
    return InvalidRequestError(
        f"logits {place} overflow with repetition_penalty={sampling.repetition_penalty}, "
        f"presence_penalty={sampling.presence_penalty}, "
        f"frequency_penalty={sampling.frequency_penalty} and {len(sampling.logit_bias)} entries of "
        "logit_bias. Give values nearer to their defaults"
    )
