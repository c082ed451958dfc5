"""Which KV cache block holds which tokens: allocation, sharing and reuse, in plain integers.

The keys and values themselves are the runner's; this is only the book that says where they are.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from sharelora_serve.engine.request import Request
from sharelora_serve.errors import ConfigurationError

PADDING_BLOCK = 0
"""Never handed out: padding rows of a batch write here, and nobody reads it."""


class KVCache:
    """Blocks of `block_size` tokens, counted by reference and found again by content.

    A full block's hash covers its tokens, all tokens before it, the digest of the adapter that
    computed it and the tenant it was computed for, so equal hashes mean equal keys and values, a
    new version under an old name never meets the old one's, and no tenant meets another's. A freed
    block keeps its hash, and can be taken up again by content, until its place is needed; the least
    recently freed goes first, and within one request the tail before the head, since beginnings are
    what requests have in common.
    Block tables and block hashes as in vLLM (arXiv 2309.06180, section 4).

    num_hit_tokens      tokens that match_prefix found in the cache, since the start
    num_queried_tokens  tokens that it was asked for
    """

    def __init__(
        self, num_blocks: int, block_size: int = 16, *, prefix_caching: bool = True
    ) -> None:
        """Keep the book for num_blocks blocks, the padding block among them.

        Raises ConfigurationError when not one block is left besides the padding block.
        """
        if num_blocks < 2:
            raise ConfigurationError(
                f"the memory for the KV cache holds {num_blocks} blocks of {block_size} tokens; "
                "at least 2 are needed, since one is padding: raise --kv-memory",
                param="kv_memory",
            )
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_hit_tokens = 0
        self.num_queried_tokens = 0
        self._num_references = [0] * num_blocks
        # In the order in which they are handed out.
        self._free = OrderedDict.fromkeys(range(PADDING_BLOCK + 1, num_blocks))
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self._num_committed: dict[Request, int] = {}  # leading blocks already offered for sharing

    @property
    def num_blocks(self) -> int:
        """Blocks that requests can use; the padding block is not one of them."""
        return len(self._num_references) - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody refers to, whether or not their content can still be reused."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests refer to, each counted once."""
        return self.num_blocks - self.num_free_blocks

    @property
    def max_tokens(self) -> int:
        """The longest prompt and answer together that one request can ever have."""
        return self.num_blocks * self.block_size

    def num_missing_blocks(self, request: Request, num_tokens: int) -> int:
        """Blocks to add to the request's table before it covers num_tokens tokens."""
        return max(0, -(-num_tokens // self.block_size) - len(request.block_table))

    def can_start(self, request: Request, num_spare_blocks: int) -> bool:
        """Whether all present tokens of a request without blocks fit, leaving spare ones free.

        Blocks that match_prefix would find count as there. Changes nothing.
        """
        cached = self._cached_blocks(request)
        # A cached block that nobody refers to is among the free ones, and would leave them.
        num_revived = sum(self._num_references[block] == 0 for block in cached)
        num_new = self.num_missing_blocks(request, request.num_tokens) - len(cached)
        return num_new + num_revived + num_spare_blocks <= self.num_free_blocks

    def match_prefix(self, request: Request) -> int:
        """Give a request without blocks the longest cached prefix; return its tokens.

        Takes references and sets block_table and num_computed. num_cached_tokens becomes the
        prompt tokens among them and enters the statistics, but once: a request that was preempted
        finds mostly its own.
        Finds nothing for prompt_logprobs, which needs the logits of every position.
        """
        assert not request.block_table, f"request {request.request_id} has blocks already"
        blocks = self._cached_blocks(request)
        for block in blocks:
            self._refer(block)
        request.block_table = blocks
        request.num_computed = len(blocks) * self.block_size
        self._num_committed[request] = len(blocks)
        if self.prefix_caching and request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed
            self.num_hit_tokens += request.num_computed
            self.num_queried_tokens += request.num_tokens
        return request.num_computed

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Make block_table cover num_tokens tokens after the computed ones.

        False, and nothing changed, when there are too few free blocks.
        """
        num_missing = self.num_missing_blocks(request, request.num_computed + num_tokens)
        if num_missing > self.num_free_blocks:
            return False
        request.block_table.extend(self._take_block() for _ in range(num_missing))
        return True

    def commit(self, request: Request) -> None:
        """Offer the blocks that are full by now to other requests.

        To be called after each step, when the keys and values of num_computed tokens are written.
        Of equal blocks the first stays the one that is found.
        """
        if not self.prefix_caching:
            return
        num_full = request.num_computed // self.block_size
        num_committed = self._num_committed.get(request, 0)
        if num_full == num_committed:
            return
        self._extend_hashes(request, num_full)
        for index in range(num_committed, num_full):
            block, block_hash = request.block_table[index], request.block_hashes[index]
            if block_hash not in self._block_by_hash:
                self._block_by_hash[block_hash] = block
                self._hash_by_block[block] = block_hash
        self._num_committed[request] = num_full

    def free(self, request: Request) -> None:
        """Drop the request's references and clear block_table and num_computed.

        Does nothing to a request without blocks.
        """
        for block in reversed(request.block_table):  # the tail is handed out before the head
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if block not in self._hash_by_block:  # nothing to find in it: hand it out first
                    self._free.move_to_end(block, last=False)
        request.block_table = []
        request.num_computed = 0
        self._num_committed.pop(request, None)

    def check_integrity(self, live_requests: Iterable[Request]) -> None:
        """Recount everything from the block tables of all requests that may hold blocks.

        Raises AssertionError that lists every disagreement. Takes time in proportion to the
        number of blocks: for tests and debugging.
        """
        requests = list(live_requests)
        problems = []
        counted = Counter(block for request in requests for block in request.block_table)
        for block, num_references in enumerate(self._num_references):
            if counted[block] != num_references:
                problems.append(
                    f"block {block}: {num_references} references, {counted[block]} in tables"
                )
            if (block in self._free) != (num_references == 0 and block != PADDING_BLOCK):
                problems.append(f"block {block}: free list disagrees with its references")
        if counted[PADDING_BLOCK]:
            problems.append("the padding block is in a table")
        if {block: block_hash for block_hash, block in self._block_by_hash.items()} != (
            self._hash_by_block
        ):
            problems.append("the maps between blocks and hashes disagree")
        first_use: dict[int, tuple[Request, int]] = {}
        for request in requests:
            if request.num_computed > len(request.block_table) * self.block_size:
                problems.append(f"request {request.request_id}: computed tokens without a block")
            num_full = request.num_computed // self.block_size
            hashes: list[bytes] = []  # from scratch, so that a stale chain shows
            for index, block in enumerate(request.block_table):
                if index < num_full:
                    hashes.append(self._next_hash(request, hashes))
                expected = hashes[index] if index < num_full else None
                if self._hash_by_block.get(block, expected) != expected:
                    problems.append(f"request {request.request_id}: block {block} is of others")
                other, other_index = first_use.setdefault(block, (request, index))
                if (other, other_index) != (request, index) and (
                    other_index != index or block not in self._hash_by_block
                ):
                    problems.append(
                        f"block {block}: shared by requests {other.request_id} and "
                        f"{request.request_id} without being the same full block of both"
                    )
        if problems:
            raise AssertionError("KV cache bookkeeping is broken:\n  " + "\n  ".join(problems))

    def _cached_blocks(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix, in token order."""
        if not self.prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        # The last token never counts as cached: a prompt wholly in the cache would leave no token
        # to compute logits from.
        num_matchable = (request.num_tokens - 1) // self.block_size
        self._extend_hashes(request, num_matchable)
        blocks = []
        for block_hash in request.block_hashes[:num_matchable]:
            block = self._block_by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _extend_hashes(self, request: Request, num_full: int) -> None:
        """Bring the request's chain to num_full hashes; tokens never change, so it only grows."""
        while len(request.block_hashes) < num_full:
            request.block_hashes.append(self._next_hash(request, request.block_hashes))

    def _next_hash(self, request: Request, hashes: list[bytes]) -> bytes:
        """Hash of the block after those of `hashes`.

        Cryptographic, since one tenant must not be able to build a prompt that is answered from
        another's keys and values.
        """
        start = len(hashes) * self.block_size
        token_ids = array("q", request.tokens(start, start + self.block_size))
        previous = hashes[-1] if hashes else _chain_seed(request)
        return hashlib.sha256(previous + token_ids.tobytes()).digest()

    def _refer(self, block: int) -> None:
        if self._num_references[block] == 0:
            del self._free[block]
        self._num_references[block] += 1

    def _take_block(self) -> int:
        """Hand out the free block that is worth least, forgetting its content."""
        block, _ = self._free.popitem(last=False)
        block_hash = self._hash_by_block.pop(block, None)
        if block_hash is not None:
            del self._block_by_hash[block_hash]
        self._num_references[block] = 1
        return block


def _chain_seed(request: Request) -> bytes:
    """What the first block's hash continues: who computes the keys and values, and for whom.

    Else a tenant could learn from the time to a first token what another had asked.
    """
    who = "base" if request.adapter is None else request.adapter.digest
    return hashlib.sha256(f"{who} {request.tenant or ''}".encode()).digest()
