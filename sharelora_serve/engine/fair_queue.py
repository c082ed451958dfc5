"""Whose turn it is: waiting requests in the order of what their clients have been served.

The virtual token counter of "Fairness in Serving Large Language Models" (arXiv 2401.00588): every
client has a counter of the tokens computed for it, and the client with the least goes first. There
a client that comes back is lifted to the least counter of those that wait, so that nobody saves up
for a burst. Here counters fade instead, which bounds what is saved up too, and in addition
remembers for a while who has had much: a client that asks now and then stays ahead of one that
never stops.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from sharelora_serve.engine.request import Request

# What a prompt token and a new token count, as in the paper.
PROMPT_WEIGHT = 1
OUTPUT_WEIGHT = 2

# How many requests may be admitted past one whose adapter finds no room. Enough that requests with
# resident adapters fill the batch meanwhile, and few enough that the wait stays within a second or
# so of theirs.
MAX_OVERTAKEN = 16

# Tokens of a prompt that put off its turn only together, when all are computed: so clients that
# were served alike have their prompts computed one after another and not all at once, which would
# be late for all of them, and one with a long prompt keeps others waiting for no more than this.
PROMPT_PIECE = 256

# A counter fades to half while so many weighted tokens are computed, for whomever: a few times
# what a full batch of short requests comes to.
_HALF_LIFE = 16384

_MAX_SCALE = 1e30


@dataclass(slots=True, eq=False)
class Entry:
    """A request in the scheduler's hands."""

    request: Request
    order: int  # of arrival
    num_overtaken: int = 0  # requests admitted past it for lack of room for its adapter
    num_charged: int = 0  # prompt tokens that its client has been charged for
    num_counted: int = 0  # of them, those that put off its own turn

    @property
    def must_be_next(self) -> bool:
        """Whether nobody whose turn comes after may be admitted before it any more."""
        return self.num_overtaken >= MAX_OVERTAKEN

    def count_pieces(self) -> None:
        """After a step: let what was charged count, if it is a piece or the prompt's end."""
        is_whole = self.num_charged == len(self.request.prompt_ids)
        if is_whole or self.num_charged - self.num_counted >= PROMPT_PIECE:
            self.num_counted = self.num_charged

    @property
    def is_running(self) -> bool:
        """Whether it holds KV blocks and its adapter's pages."""
        return bool(self.request.block_table)


class FairQueue:
    """Waiting requests, a line for each client, and what every client has been served."""

    def __init__(self) -> None:
        """Nobody waits, and nobody was served anything."""
        self._lines: dict[str, deque[Entry]] = {}  # none is empty
        self._num_waiting = 0
        self._served: dict[str, float] = {}  # weighted tokens times the scale they were added at
        self._scale = 1.0  # grows instead of all counters fading

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    def append(self, entry: Entry) -> None:
        """Put a new request at the end of its client's line."""
        self._lines.setdefault(entry.request.client, deque()).append(entry)
        self._num_waiting += 1

    def put_back(self, entry: Entry) -> None:
        """Put a request that was preempted at the head of its client's line."""
        self._lines.setdefault(entry.request.client, deque()).appendleft(entry)
        self._num_waiting += 1

    def remove(self, entry: Entry) -> None:
        """Take a request out, wherever it stands."""
        line = self._lines[entry.request.client]
        line.remove(entry)
        self._num_waiting -= 1
        if not line:
            del self._lines[entry.request.client]

    def waits_for(self, key: str) -> bool:
        """Whether some request here is for the adapter of a key."""
        return any(
            entry.request.adapter is not None and entry.request.adapter.key == key
            for line in self._lines.values()
            for entry in line
        )

    def charge(self, client: str, weighted_tokens: float) -> None:
        """Count tokens as computed for a client."""
        self._served[client] = self._served.get(client, 0.0) + weighted_tokens * self._scale
        self._scale *= 2 ** (weighted_tokens / _HALF_LIFE)
        if self._scale > _MAX_SCALE:
            # What has faded to less than a token is forgotten, and with it who asked once.
            self._served = {
                client: served / self._scale
                for client, served in self._served.items()
                if served >= self._scale
            }
            self._scale = 1.0

    def served(self, client: str) -> float:
        """What a client has had, to be compared with what another has had at the same moment."""
        return self._served.get(client, 0.0)

    def rank(self, entry: Entry) -> tuple[float, int]:
        """Sorts requests by whose turn it is, the first one first."""
        in_piece = PROMPT_WEIGHT * (entry.num_charged - entry.num_counted) * self._scale
        # 0 if what was charged has faded since.
        return max(0.0, self.served(entry.request.client) - in_piece), entry.order

    def in_order(self, most_waiting: int, started: Iterable[Entry] = ()) -> Iterator[Entry]:
        """Everyone whose prompt is to be computed, the one whose turn it is first.

        That is the head of a client's line with the least `rank` by then, so `charge` has its
        effect on what follows. Who was handed out and still waits counts as served: so no line
        keeps the others from being looked at. `started` are prompts of running requests, which
        stand ahead of their clients' lines; they all come, but of those that wait at most
        `most_waiting`. Entries may be removed and put back meanwhile.
        """
        lines: dict[str, deque[Entry]] = {}  # what is left of those that somebody came from
        passed: dict[str, float] = {}
        for entry in sorted(started, key=_order):
            client = entry.request.client
            lines.setdefault(client, deque()).append(entry)
        heads = [(*self.rank(line[0]), client) for client, line in (self._lines | lines).items()]
        for client, line in lines.items():
            line.extend(self._lines.get(client, ()))
        heapify(heads)
        have_started, num_waiting = set(lines), 0
        while heads:
            _, _, client = heappop(heads)
            if client not in lines:
                lines[client] = deque(self._lines.get(client, ()))
            line = lines[client]
            if not line:
                continue
            entry = line.popleft()
            if not entry.is_running:
                if num_waiting == most_waiting:
                    heads = [head for head in heads if head[2] in have_started]
                    heapify(heads)
                    continue
                num_waiting += 1
            yield entry
            if not entry.is_running:
                waiting = PROMPT_WEIGHT * entry.request.num_uncomputed * self._scale
                passed[client] = passed.get(client, 0.0) + waiting
            if line:
                key, order = self.rank(line[0])
                heappush(heads, (key + passed.get(client, 0.0), order, client))


def _order(entry: Entry) -> int:
    return entry.order
