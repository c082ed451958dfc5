"""Merging by traffic: a second set of weights is made beside the running base, and exchanged."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sharelora_serve.adapters.adapter import Adapter, AdapterVersion, PageTable
from sharelora_serve.adapters.residency import Waiting
from sharelora_serve.engine.batch import ScheduledRequest
from sharelora_serve.engine.merge_policy import Merge, MergePolicy, Unmerge
from sharelora_serve.engine.runner import Runner
from sharelora_serve.errors import ConfigurationError, UnsupportedModelError
from sharelora_serve.models.loader import ModelWeights
from sharelora_serve.priority import lower_priority

logger = logging.getLogger(__name__)

# Of the thread that folds: requests hardly notice it, and a fold still ends.
_NICENESS = 10


class MergeSource(Protocol):
    """What merging needs of the adapter cache."""

    def acquire(self, version: AdapterVersion) -> PageTable | Waiting:
        """Pages that stay until release; those of a running request are there at once."""
        ...

    def release(self, version: AdapterVersion) -> None:
        """Give back what one successful acquire gave."""
        ...

    def is_named(self, version: AdapterVersion) -> bool:
        """Whether new requests may still ask for it."""
        ...

    def adapter(self, version: AdapterVersion) -> Adapter:
        """A version's factors; may read files. Raises AdapterUnavailableError."""
        ...


FoldWeights = Callable[[Adapter, Callable[[], bool]], ModelWeights | None]
"""(adapter, is_wanted) -> the base with it folded in, or None once is_wanted() says no."""


@dataclass(slots=True)
class _Fold:
    """One adapter on the way into the weights, or in them."""

    version: AdapterVersion
    pages: PageTable
    reason: str  # why, for the log
    started_at: float
    is_wanted: bool = True  # the folding thread reads it
    weights: Future[ModelWeights | None] = field(default_factory=Future)
    merged_at: float | None = None


class Merger:
    """Folds in the adapter that has nearly all of the traffic, and takes it out again.

    The base's weights are never written to: merged ones are made beside them by a thread of low
    priority, and the engine's thread exchanges the two between steps. The merged version is held
    in the adapter cache all the while. `close` and the counters may be used from any thread, all
    else on the engine's.
    """

    def __init__(
        self,
        runner: Runner,
        base: ModelWeights,
        adapters: MergeSource,
        policy: MergePolicy,
        *,
        fold_weights: FoldWeights,
    ) -> None:
        """Nothing is merged at first.

        base          the weights that the runner has
        fold_weights  called on the folding thread
        """
        self.num_merges = 0
        self.num_unmerges = 0
        self._runner = runner
        self._base = base
        self._adapters = adapters
        self._policy = policy
        self._fold_weights = fold_weights
        self._fold: _Fold | None = None
        self._thread = ThreadPoolExecutor(
            1, "merger", initializer=lower_priority, initargs=(_NICENESS,)
        )

    def tend(self, scheduled: Sequence[ScheduledRequest], now: float, *, lacks_room: bool) -> bool:
        """Before a step, or instead of one: merge or un-merge, if it is time for that.

        scheduled   what the step will run; its requests hold their adapters
        now         time.monotonic(), seconds
        lacks_room  whether a request waits for room on the device

        Returns whether an adapter was given back, so that there may be room now.
        """
        num_tokens = Counter[str | None]()
        versions: dict[str, AdapterVersion] = {}
        for item in scheduled:
            version = item.request.adapter
            num_tokens[version.key if version is not None else None] += item.num_tokens
            if version is not None:
                versions[version.key] = version
        fold = self._fold
        if fold is not None and fold.merged_at is None and fold.weights.done():
            self._finish(fold, now)
        if self._fold is not None:
            version = self._fold.version
            if not self._adapters.is_named(version):
                self._give_up("it was removed or replaced", now)
            # While its requests run they hold its pages too: there would be no more room.
            elif lacks_room and version.key not in versions:
                self._give_up("another adapter needs its room", now)
        decision = self._policy.observe(now, num_tokens) if scheduled else None
        if isinstance(decision, Merge):
            self._start(versions[decision.adapter], decision.reason, now)
        elif isinstance(decision, Unmerge):
            self._end(decision.reason, now)
        return fold is not None and self._fold is not fold

    def close(self) -> None:
        """End the folding thread; a fold that is under way ends with the layer it is at."""
        if self._fold is not None:
            self._fold.is_wanted = False
        self._thread.shutdown(cancel_futures=True)

    def _start(self, version: AdapterVersion, reason: str, now: float) -> None:
        pages = self._adapters.acquire(version)
        assert isinstance(pages, PageTable), "an adapter with running requests is on the device"
        self._fold = fold = _Fold(version, pages, reason, now)
        fold.weights = self._thread.submit(self._make_weights, fold)

    def _make_weights(self, fold: _Fold) -> ModelWeights | None:
        """What the folding thread does."""
        with torch.inference_mode():
            adapter = self._adapters.adapter(fold.version)
            return self._fold_weights(adapter, lambda: fold.is_wanted)

    def _finish(self, fold: _Fold, now: float) -> None:
        """Exchange the weights, or tell why there are none and leave everything as it is."""
        try:
            weights = fold.weights.result()
        except (ConfigurationError, UnsupportedModelError) as error:
            logger.warning("adapter %s cannot be merged: %s", _name(fold.version), error.message)
            self._policy.refuse(fold.version.key)
            self._drop(fold)
            return
        except Exception as error:  # whatever it was, the base serves on
            logger.warning("adapter %s was not merged: %r", _name(fold.version), error)
            self._policy.unmerged(now)
            self._drop(fold)
            return
        assert weights is not None, "a fold that is wanted was not finished"
        self._runner.exchange(weights, (fold.version, fold.pages))
        fold.merged_at = now
        self.num_merges += 1
        logger.info(
            "merged adapter %s, since %s; it took %.1f s",
            _name(fold.version),
            fold.reason,
            now - fold.started_at,
        )

    def _give_up(self, reason: str, now: float) -> None:
        """End what the policy would still have."""
        self._policy.unmerged(now)
        self._end(reason, now)

    def _end(self, reason: str, now: float) -> None:
        """Restore the base, or leave it if it is not changed yet."""
        fold = self._fold
        assert fold is not None, "only what was started ends"
        if fold.merged_at is None:
            logger.info("adapter %s is not merged after all: %s", _name(fold.version), reason)
        else:
            self._runner.exchange(self._base, None)
            self.num_unmerges += 1
            logger.info(
                "un-merged adapter %s, since %s; it was merged for %.0f s",
                _name(fold.version),
                reason,
                now - fold.merged_at,
            )
        self._drop(fold)

    def _drop(self, fold: _Fold) -> None:
        fold.is_wanted = False
        self._fold = None
        self._adapters.release(fold.version)


def _name(version: AdapterVersion) -> str:
    return f"{version.name} (version {version.digest[:12]})"
