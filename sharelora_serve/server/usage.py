"""Who used the server, and how much: counts for every model, and names for the most used ones."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from heapq import nlargest

OTHER = "(other)"
"""What all adapters without a name of their own are called together; no adapter gets this name."""

PROMOTION_FACTOR = 2
"""How many times another's tokens an adapter needs to take its name, so that names do not flap."""


@dataclass(slots=True)
class Counts:
    """Requests that were queued, and tokens of their prompts and answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Counts", sign: int = 1) -> None:
        """Add `other`, or take it away with the sign -1."""
        self.requests += sign * other.requests
        self.prompt_tokens += sign * other.prompt_tokens
        self.completion_tokens += sign * other.completion_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and answers together."""
        return self.prompt_tokens + self.completion_tokens


class Account:
    """The counts of one model, to add to.

    A request holds the account that it began with: what it still adds after its adapter has been
    deleted is in the sum over all, and never in an adapter that was uploaded under the same name.
    """

    def __init__(self, total: Counts) -> None:
        """`total` is the sum over all accounts."""
        self.counts = Counts()
        self._total = total

    def add(self, counts: Counts) -> None:
        """Count something."""
        self.counts.add(counts)
        self._total.add(counts)


class Usage:
    """The counts of the base and of every adapter. Lives on the event loop.

    All are kept; `num_named` adapters are shown by name, the others as OTHER. An adapter is named
    when it is first used or followed and a place is free, else once it has had more than
    PROMOTION_FACTOR times the tokens of the named one with the fewest, which then joins OTHER.
    Counting from the start and not by a window, a place changes hands only a few times in a
    server's life, and an idle adapter keeps its name until somebody needs it.

    A name's count begins at 0 when it is named; what it had before stays in OTHER. So no count
    that is shown ever goes back, OTHER's included, and their sum is the true total.
    """

    def __init__(self, base_name: str, num_named: int) -> None:
        self._base_name = base_name
        self._num_named = num_named
        self._total = Counts()
        self._base = Account(self._total)
        self._accounts: dict[str, Account] = {}
        self._named: dict[str, Counts] = {}  # name -> what it had before it was named

    def account(self, name: str) -> Account:
        """The account of the base or of an adapter, by name; a new one for an unknown adapter."""
        if name == self._base_name:
            return self._base
        if name not in self._accounts:
            self._accounts[name] = Account(self._total)
            if len(self._named) < self._num_named and name != OTHER:
                self._named[name] = Counts()
        return self._accounts[name]

    def of(self, name: str) -> Counts:
        """The counts of a model since it was first there, whether it is shown by name or not."""
        if name == self._base_name:
            return replace(self._base.counts)
        return replace(self._accounts[name].counts) if name in self._accounts else Counts()

    def forget(self, name: str) -> None:
        """An adapter was deleted: its counts join OTHER, and the next of its name starts at 0."""
        self._accounts.pop(name, None)
        self._named.pop(name, None)

    def follow(self, names: Collection[str]) -> None:
        """Let the adapters be those of `names`: forget all others, name new ones if there is room.

        So a request that was resolved just before its adapter was deleted does not bring the name
        back for good. Whoever deletes an adapter still has to call `forget`: at the next look one
        of the same name may be there again.
        """
        for name in self._accounts.keys() - set(names):
            self.forget(name)
        for name in names:
            self.account(name)

    def shown(self) -> dict[str, Counts]:
        """The counts by name, the base first and OTHER last, after names have changed hands."""
        self._choose_names()
        shown = {self._base_name: replace(self._base.counts)}
        for name in sorted(self._named):
            shown[name] = replace(self._accounts[name].counts)
            shown[name].add(self._named[name], sign=-1)
        rest = replace(self._total)
        for counts in shown.values():
            rest.add(counts, sign=-1)
        return {**shown, OTHER: rest}

    def _choose_names(self) -> None:
        if self._num_named == 0:
            return
        unnamed = self._accounts.keys() - self._named.keys() - {OTHER}
        for name in nlargest(self._num_named, unnamed, key=self._num_tokens):
            if len(self._named) == self._num_named:
                fewest = min(self._named, key=self._num_tokens)
                if self._num_tokens(name) <= PROMOTION_FACTOR * self._num_tokens(fewest):
                    break
                del self._named[fewest]
            self._named[name] = replace(self._accounts[name].counts)

    def _num_tokens(self, name: str) -> int:
        return self._accounts[name].counts.num_tokens
