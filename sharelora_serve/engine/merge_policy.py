"""When to fold an adapter into the weights and when to restore them: from counts of tokens."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

MERGE_SHARE = 0.95
"""Share of the tokens from which an adapter is merged.

Merged, its own tokens no longer cost an adapter's work, and everybody else's, the base's too, cost
one adapter's more: it pays only where nearly nobody else is there.
"""

MERGE_SECONDS = 10.0
"""Over how long it must have that share: many times what a burst of requests lasts."""

MIN_TOKENS = 128
"""What it must have computed in that time: a trickle is not worth a second copy of the weights."""

OTHERS_SHARE = 0.2
"""Share of the others beyond which the base is restored.

Far from 1 - MERGE_SHARE, so that one request to another adapter now and then undoes nothing.
"""

OTHERS_SECONDS = 5.0
"""Over how long. Many others at once outweigh what came before them within a second or so."""

REST_SECONDS = 60.0
"""After restoring the base nothing is merged for so long: folding costs seconds of a processor."""

LONGEST_STEP_SECONDS = 1.0
"""What lies between two steps beyond this counts as idle time, which changes nothing."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Fold in this adapter."""

    adapter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unmerge:
    """Restore the base."""

    reason: str


class MergePolicy:
    """Watches who has the traffic; told of every step, it says what to change.

    All windows are of busy time: idle time is cut out of them, but for REST_SECONDS.
    """

    def __init__(
        self,
        *,
        merge_share: float = MERGE_SHARE,
        merge_seconds: float = MERGE_SECONDS,
        min_tokens: int = MIN_TOKENS,
        others_share: float = OTHERS_SHARE,
        others_seconds: float = OTHERS_SECONDS,
        rest_seconds: float = REST_SECONDS,
    ) -> None:
        """Thresholds, as the constants above describe them."""
        assert 1 - merge_share <= others_share, "what is merged would be un-merged at once"
        self._merge_share = merge_share
        self._min_tokens = min_tokens
        self._others_share = others_share
        self._rest_seconds = rest_seconds
        self._merge_window = _Window(merge_seconds)
        self._others_window = _Window(others_seconds)
        self._busy_seconds = 0.0
        self._last_step_at: float | None = None
        self._merged: str | None = None  # or on the way to it
        self._rests_until: float | None = None
        self._refused: set[str] = set()

    def observe(self, now: float, num_tokens: Mapping[str | None, int]) -> Merge | Unmerge | None:
        """Take note of a step and say what to change, which then counts as done; None for nothing.

        now         seconds of a clock that never goes back
        num_tokens  of the step, by adapter version, None being the base; not empty
        """
        if self._last_step_at is not None:
            self._busy_seconds += min(now - self._last_step_at, LONGEST_STEP_SECONDS)
        self._last_step_at = now
        self._merge_window.add(self._busy_seconds, num_tokens)
        self._others_window.add(self._busy_seconds, num_tokens)
        if self._merged is not None:
            return self._unmerge(now)
        return self._merge(now, num_tokens)

    def unmerged(self, now: float) -> None:
        """The base was restored, or stayed, for a reason other than the traffic."""
        self._merged = None
        self._rests_until = now + self._rest_seconds

    def refuse(self, adapter: str) -> None:
        """This version cannot be merged: never ask for it again."""
        self._merged = None
        self._refused.add(adapter)

    def _unmerge(self, now: float) -> Unmerge | None:
        others = 1 - self._others_window.share(self._merged)
        if others <= self._others_share:
            return None
        self.unmerged(now)
        seconds = self._others_window.seconds
        return Unmerge(f"others have {others:.0%} of the tokens of the last {seconds:g} s")

    def _merge(self, now: float, num_tokens: Mapping[str | None, int]) -> Merge | None:
        if self._rests_until is not None and now < self._rests_until:
            return None
        if self._busy_seconds < self._merge_window.seconds:
            return None
        # Only one that has tokens in this step: its pages are there, in use by its requests.
        adapter = max(num_tokens, key=lambda owner: num_tokens[owner])
        if adapter is None or adapter in self._refused:
            return None
        share = self._merge_window.share(adapter)
        if min(share, self._others_window.share(adapter)) < self._merge_share:
            return None
        if self._merge_window.num_tokens(adapter) < self._min_tokens:
            return None
        self._merged = adapter
        seconds = self._merge_window.seconds
        return Merge(adapter, f"it has {share:.0%} of the tokens of the last {seconds:g} s")


class _Window:
    """Tokens of the steps of the last so many seconds, by owner."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._steps: deque[tuple[float, Mapping[str | None, int]]] = deque()
        self._num_tokens = Counter[str | None]()
        self._total = 0

    def add(self, at: float, num_tokens: Mapping[str | None, int]) -> None:
        """Take in a step, and leave out those that have become too old."""
        self._steps.append((at, num_tokens))
        self._num_tokens.update(num_tokens)
        self._total += sum(num_tokens.values())
        while self._steps[0][0] < at - self.seconds:
            _, old = self._steps.popleft()
            self._total -= sum(old.values())
            for owner, count in old.items():
                self._num_tokens[owner] -= count
                if not self._num_tokens[owner]:
                    del self._num_tokens[owner]

    def num_tokens(self, owner: str | None) -> int:
        """Of one owner."""
        return self._num_tokens[owner]

    def share(self, owner: str | None) -> float:
        """Of one owner in all tokens."""
        return self._num_tokens[owner] / self._total
