"""The engine: one thread that owns the device, and what other threads may ask of it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sharelora_serve.adapters.cache import AdapterCache
from sharelora_serve.engine.backlog import Backlog, dropped_error
from sharelora_serve.engine.batch import Batch, ScheduledRequest
from sharelora_serve.engine.kv_cache import KVCache
from sharelora_serve.engine.merger import Merger
from sharelora_serve.engine.request import (
    FinishReason,
    Request,
    RequestOutput,
    TokenLogprobs,
)
from sharelora_serve.engine.runner import Runner
from sharelora_serve.engine.sampler import SampledToken, Sampler
from sharelora_serve.engine.scheduler import Scheduler
from sharelora_serve.errors import (
    ContextLengthError,
    EngineStoppedError,
    ServeError,
)

_log = logging.getLogger(__name__)

# How long the thread sleeps at most when it has nothing to do; every event wakes it at once.
_IDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures of one moment, for metrics. Counters count from the start."""

    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    kv_memory_bytes: int
    prefix_cache_hits_tokens: int
    prefix_cache_queries_tokens: int
    num_preemptions: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of those
    num_steps: int
    num_merges: int
    num_unmerges: int
    merged_adapter: str | None = None  # its name


class Engine:
    """Generates tokens for requests to one base and its adapters.

    submit, abort, stats and the attributes may be used from any thread; all else happens on the
    engine's own. Every request submitted gets a last RequestOutput with a finish_reason, whatever
    happens, unless it is aborted.
    """

    def __init__(
        self,
        *,
        base_name: str,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_queue: int,
        max_first_token_seconds: float | None,
        adapters: AdapterCache,
        kv_cache: KVCache,
        kv_memory_bytes: int,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        merger: Merger | None,
        prepare_thread: Callable[[], None],
        wake: threading.Event,
        close: Callable[[], None],
    ) -> None:
        """Assemble an engine; `load_engine` makes the parts.

        close           called last, when the engine is stopped
        merger          None unless adapters are merged by traffic
        wake            set whenever there may be work: by the adapter cache, and by submit
        prepare_thread  called first on the engine's thread
        """
        self.base_name = base_name
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.max_model_len = max_model_len
        self.adapters = adapters
        self._max_queue = max_queue
        self._backlog = Backlog(max_queue, max_first_token_seconds)  # under the lock
        self._kv_cache = kv_cache
        self._kv_memory_bytes = kv_memory_bytes
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._merger = merger
        self._prepare_thread = prepare_thread
        self._wake = wake
        self._close = close
        self._inbox: deque[Request] = deque()
        self._aborted: deque[str] = deque()  # ids
        self._dropped: deque[list[Request]] = deque()
        self._lock = threading.Lock()
        self._requests: dict[str, Request] = {}
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}
        self._num_steps = 0
        self._stopping = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; returns once it is ready for requests."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """End the thread; every request still open fails with EngineStoppedError."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._merger is not None:
            self._merger.close()
        self._close()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._ready.is_set() and self.is_alive and not self._stopping

    def submit(self, *requests: Request) -> None:
        """Queue requests, all of them or none.

        They are of one client. Raises QueueFullError when too many wait, OverloadedError when they
        would have to wait too long, ContextLengthError when the KV cache could never hold one,
        EngineStoppedError when the engine does not run.
        """
        for request in requests:
            num_tokens = len(request.prompt_ids) + request.sampling.max_tokens
            if num_tokens > self._kv_cache.max_tokens:
                raise ContextLengthError(
                    f"the prompt's {len(request.prompt_ids)} tokens and max_tokens "
                    f"{request.sampling.max_tokens} exceed the {self._kv_cache.max_tokens} tokens "
                    "that the server's KV cache holds; shorten the prompt or lower max_tokens",
                    param="max_tokens",
                )
        with self._lock:
            if not self.is_ready:
                raise EngineStoppedError("the engine is not running; try another server")
            self._dropped += self._backlog.add(requests, time.monotonic())
            self._inbox.extend(requests)
        self._wake.set()

    def abort(self, request_id: str) -> None:
        """Forget a request at the next step; nothing more is delivered. Unknown ids are fine."""
        self._aborted.append(request_id)
        self._wake.set()

    def stats(self) -> EngineStats:
        """The figures of this moment."""
        merged = self._runner.merged
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._num_waiting,
            kv_blocks_used=self._kv_cache.num_used_blocks,
            kv_blocks_total=self._kv_cache.num_blocks,
            kv_memory_bytes=self._kv_memory_bytes,
            prefix_cache_hits_tokens=self._kv_cache.num_hit_tokens,
            prefix_cache_queries_tokens=self._kv_cache.num_queried_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_draft_tokens=self._scheduler.speculator.num_drafted,
            num_accepted_tokens=self._scheduler.speculator.num_accepted,
            num_steps=self._num_steps,
            num_merges=self._merger.num_merges if self._merger is not None else 0,
            num_unmerges=self._merger.num_unmerges if self._merger is not None else 0,
            merged_adapter=merged.name if merged is not None else None,
        )

    @property
    def _num_waiting(self) -> int:
        """Requests in the queue and on the way to it."""
        return self._scheduler.num_waiting + len(self._inbox)

    def _run(self) -> None:
        try:
            self._prepare_thread()
            self._ready.set()
            while not self._stopping:
                self._wake.clear()
                self._take_inbox()
                if not self._step():
                    self._wake.wait(_IDLE_SECONDS)
        except Exception:
            _log.exception("the engine stopped: a bug; restart the server")
        finally:
            with self._lock:
                self._stopping = True
                self._ready.set()
            self._requests |= {request.request_id: request for request in self._inbox}
            stopped = EngineStoppedError("the engine stopped before the answer was complete")
            for request in list(self._requests.values()):
                self._deliver(request, [], error=stopped)

    def _take_inbox(self) -> None:
        # Counted before the inbox is read: whoever aborts has submitted before.
        num_aborted, num_dropped = len(self._aborted), len(self._dropped)
        while self._inbox:
            request = self._inbox.popleft()
            self._requests[request.request_id] = request
            self._scheduler.add(request)
        for _ in range(num_aborted):
            aborted = self._requests.pop(self._aborted.popleft(), None)
            if aborted is not None:
                self._scheduler.abort(aborted.request_id)
                self._prompt_logprobs.pop(aborted.request_id, None)
                with self._lock:
                    self._backlog.remove(aborted)
        for _ in range(num_dropped):
            group = self._dropped.popleft()
            if any(dropped.block_table or dropped.output_ids for dropped in group):
                continue  # it was admitted meanwhile
            for dropped in group:
                if dropped.request_id in self._requests:
                    self._scheduler.abort(dropped.request_id)
                    self._deliver(dropped, [], error=dropped_error(self._max_queue))

    def _step(self) -> bool:
        """Run one batch; False when there is nothing to run."""
        batch = self._scheduler.schedule()
        if self._merger is not None:
            scheduled = batch.scheduled if batch is not None else []
            lacks_room = self._scheduler.lacks_room
            if self._merger.tend(scheduled, time.monotonic(), lacks_room=lacks_room):
                self._wake.set()
        if batch is None:
            return False
        if batch.failed or batch.admitted:
            with self._lock:
                for request in batch.admitted:
                    self._backlog.admit(request, time.monotonic())
                for failed in batch.failed:
                    self._backlog.remove(failed.request)
        for failed in batch.failed:
            self._deliver(failed.request, [], error=failed.error)
        if not batch.scheduled:
            return True
        try:
            with torch.inference_mode():
                logits, rows = self._runner.run(batch.scheduled)
                self._finish_step(batch, logits, rows)
        except Exception:
            # What is wrong with a batch is not known to be wrong with the next.
            _log.exception("a step failed; its requests fail with it")
            error = ServeError("the server failed while computing this answer; try again")
            for item in batch.scheduled:
                if item.request.request_id in self._requests:
                    self._scheduler.abort(item.request.request_id)  # it may have ended, untold
                    self._deliver(item.request, [], error=error)
            with torch.inference_mode():
                self._runner.check()  # if that fails too, so would every step: the engine ends
        self._num_steps += 1
        return True

    def _finish_step(self, batch: Batch, logits: Tensor, rows: list[slice]) -> None:
        """Count the batch as computed, sample, and deliver."""
        failed: dict[Request, ServeError] = {}
        for item, its_rows in zip(batch.scheduled, rows, strict=True):
            request = item.request
            # After the first output they have been told, and a preempted request comes here again.
            if request.sampling.prompt_logprobs is not None and not request.output_ids:
                try:
                    self._note_prompt(item, logits[its_rows])
                except ServeError as error:
                    failed[request] = error
        sampled = [
            (item, its_rows.stop - 1 - len(item.draft_ids))
            for item, its_rows in zip(batch.scheduled, rows, strict=True)
            if item.needs_logits and item.request not in failed
        ]
        self._scheduler.complete(batch)
        for request, problem in failed.items():
            self._scheduler.finish(request)
            self._deliver(request, [], error=problem)
        self._sample(sampled, logits)

    def _sample(self, sampled: list[tuple[ScheduledRequest, int]], logits: Tensor) -> None:
        """Choose and deliver the next tokens of requests, whose rows begin at those given.

        One for each, and another one as long as that is the next of the request's draft.
        """
        chosen: dict[Request, list[SampledToken]] = {item.request: [] for item, _ in sampled}
        problems: dict[Request, ServeError] = {}
        while sampled:
            rows = logits
            if len(sampled) < len(logits):
                rows = logits[[row for _, row in sampled]]
            tokens = self._sampler.sample(rows, [item.request for item, _ in sampled])
            going_on = []
            for (item, row), token in zip(sampled, tokens, strict=True):
                request, num_before = item.request, len(chosen[item.request])
                if isinstance(token, ServeError):
                    problems[request] = token
                    self._scheduler.finish(request)
                    continue
                if request.sampling.max_tokens > 0:
                    chosen[request].append(token)
                    request.output_ids.append(token.token_id)
                request.finish_reason = self._finish_reason(request)
                if request.finish_reason is not None:
                    self._scheduler.finish(request)
                elif item.draft_ids[num_before : num_before + 1] == [token.token_id]:
                    self._scheduler.accept(request)
                    going_on.append((item, row + 1))
            sampled = going_on
        for request, its_tokens in chosen.items():
            logprobs = [token.logprobs for token in its_tokens if token.logprobs is not None]
            self._deliver(
                request,
                [token.token_id for token in its_tokens],
                logprobs or None,
                problems.get(request),
            )

    def _finish_reason(self, request: Request) -> FinishReason | None:
        sampling = request.sampling
        if request.output_ids and len(request.output_ids) >= sampling.min_tokens:
            token_id = request.output_ids[-1]
            if token_id in sampling.stop_token_ids or (
                token_id in self.eos_token_ids and not sampling.ignore_eos
            ):
                return FinishReason.STOP
        if len(request.output_ids) >= sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def _note_prompt(self, item: ScheduledRequest, logits: Tensor) -> None:
        """Keep the log-probabilities of the prompt tokens that a chunk's rows predict."""
        request, start = item.request, item.request.num_computed
        num_top = request.sampling.prompt_logprobs
        assert num_top is not None, "only requests that asked for prompt_logprobs come here"
        known = self._prompt_logprobs.setdefault(
            request.request_id, [None] * len(request.prompt_ids)
        )
        following = request.prompt_ids[start + 1 : start + 1 + item.num_tokens]
        if following:
            known[start + 1 : start + 1 + len(following)] = self._sampler.prompt_logprobs(
                logits[: len(following)], following, num_top
            )

    def _deliver(
        self,
        request: Request,
        token_ids: list[int],
        logprobs: list[TokenLogprobs] | None = None,
        error: ServeError | None = None,
    ) -> None:
        if error is not None:
            request.finish_reason = FinishReason.ERROR
        if request.finish_reason is not None:
            self._requests.pop(request.request_id, None)
        request.deliver(
            RequestOutput(
                request_id=request.request_id,
                token_ids=token_ids,
                logprobs=logprobs,
                prompt_logprobs=self._prompt_logprobs.pop(request.request_id, None),
                finish_reason=request.finish_reason,
                error=error,
                num_cached_tokens=request.num_cached_tokens or 0,
            )
        )
