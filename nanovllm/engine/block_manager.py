"""KV blocks: who holds which, and which of them a later prompt can reuse.

A block holds the keys and values of ``block_size`` consecutive tokens. A full block whose KV has been computed is
published under the hash of its tokens chained with its predecessor's hash; a prompt that begins alike then shares
it. A block nobody holds stays in the cache, reusable, until it is the least recently used one and its space is needed.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable

import xxhash

from nanovllm.engine.sequence import Sequence


class BlockManager:
    """Hands out the blocks of one KV cache.

    Args:
        num_blocks: Blocks in the cache.
        block_size: Tokens a block.
        enable_prefix_caching: Whether blocks are shared between sequences that begin alike.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        # What a published block holds: the KV of one block's tokens, computed after all tokens before them. Lists, for
        # with an object a block, Python's collection of garbage, which stops everything, would come more often.
        self._keys: list[bytes | None] = [None] * num_blocks  # chained hash of those tokens; None: not published
        self._indices = [0] * num_blocks  # number of the block in its sequence
        # Tokens of the sequence that published it, later ones included; they only ever grow.
        self._token_ids: list[array | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}  # chained hash -> block
        # Free blocks in the order in which they are taken: those without reusable content first, then the least
        # recently used. A dictionary, because a prefix hit takes a block out of the middle.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.peak_num_used_blocks = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated now, cached ones that nobody holds included."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    def num_holders(self, block: int) -> int:
        """Sequences that hold a block."""
        return self._ref_counts[block]

    def is_published(self, block: int) -> bool:
        """Whether the prefix cache knows a block, held or not."""
        return self._keys[block] is not None

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the beginning of ``seq``, in order; takes nothing.

        The last token is never matched: it must be computed, for its logits are what the next token is sampled from.
        """
        if not self.enable_prefix_caching:
            return []
        matched: list[int] = []
        compared: array | None = None  # tokens of a publisher that have been compared up to here
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._published.get(self._hash(seq, index))
            if block is None or self._indices[block] != index:
                break
            known = self._token_ids[block]
            # The tokens decide, so that a hash collision costs a miss and never gives a sequence somebody else's KV.
            # All of them: two prefixes whose hashes once collided have the same hashes ever after.
            start = (index if known is compared else 0) * self.block_size
            end = (index + 1) * self.block_size
            if known is None or known[start:end] != seq.token_ids[start:end]:
                break
            compared = known
            matched.append(block)
        return matched

    def can_match_more(self, seq: Sequence, num_matched: int) -> bool:
        """Whether the block after the first ``num_matched`` ones of ``seq`` seems to be cached; one look-up."""
        if not self.enable_prefix_caching or num_matched >= (seq.num_tokens - 1) // self.block_size:
            return False
        return self._hash(seq, num_matched) in self._published

    def num_allocatable_after(self, matched: list[int]) -> int:
        """Blocks left to allocate once the ``matched`` blocks have been taken."""
        return len(self._free) - sum(1 for block in matched if self._ref_counts[block] == 0)

    def take_prefix(self, seq: Sequence, matched: list[int]) -> None:
        """Give ``seq``, which holds nothing yet, the blocks that ``match_prefix`` found."""
        for block in matched:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1
        seq.block_table.extend(matched)
        seq.num_published_blocks = len(matched)
        self.peak_num_used_blocks = max(self.peak_num_used_blocks, self.num_used_blocks)

    def allocate(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Extend the block table of ``seq`` to hold ``num_tokens`` tokens and return the blocks added.

        The caller has made sure that there are enough free blocks.
        """
        added: list[int] = []
        for _ in range(self.blocks_needed(num_tokens) - len(seq.block_table)):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            seq.block_table.append(block)
            added.append(block)
        self.peak_num_used_blocks = max(self.peak_num_used_blocks, self.num_used_blocks)
        return added

    def publish(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Let others share the full blocks of ``seq`` within its first ``num_computed_tokens`` tokens.

        Their KV must have been computed by a step that is done.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(seq.num_published_blocks, num_computed_tokens // self.block_size):
            key, block = self._hash(seq, index), seq.block_table[index]
            if key not in self._published:  # else a twin computed the same tokens first: this copy stays private
                self._indices[block], self._token_ids[block] = index, seq.token_ids
                self._keys[block] = key  # after the others: an interrupt may come in between
                self._published[key] = block
            seq.num_published_blocks = index + 1

    def free(self, seq: Sequence) -> None:
        """Take back all blocks of ``seq``."""
        # Backwards, so that the end of a prefix is evicted before its beginning, without which it is useless.
        for block in reversed(seq.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)
        seq.block_table.clear()
        seq.num_published_blocks = 0

    def reset_prefix_cache(self) -> None:
        """Forget all published blocks; those that sequences hold stay theirs."""
        for block in list(self._published.values()):
            self._forget(block)
            if block in self._free:  # before those never used, whose memory the system has yet to find
                self._free.move_to_end(block, last=False)

    def release_everything(self) -> None:
        """Take back every block from everybody, and keep the prefix cache.

        Built anew from what the blocks hold, so that it also mends a state that an interrupt left half changed.
        """
        self._ref_counts = [0] * self.num_blocks
        self._published = {key: block for block, key in enumerate(self._keys) if key is not None}
        self._keys = [
            key if key is not None and self._published[key] == block else None for block, key in enumerate(self._keys)
        ]
        order = sorted(range(self.num_blocks), key=lambda block: self._keys[block] is not None)
        self._free = OrderedDict.fromkeys(order)

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise RuntimeError unless the books agree with ``sequences``, all those that may hold blocks. For tests."""
        held = [0] * self.num_blocks
        for seq in sequences:
            if len(set(seq.block_table)) != len(seq.block_table):
                raise RuntimeError(f"{seq.request_id} holds a block twice: {seq.block_table}")
            for block in seq.block_table:
                held[block] += 1
        if held != self._ref_counts:
            wrong = [b for b in range(self.num_blocks) if held[b] != self._ref_counts[b]]
            raise RuntimeError(f"blocks {wrong} are held {[held[b] for b in wrong]} times but counted otherwise")
        if set(self._free) != {block for block, count in enumerate(held) if count == 0}:
            raise RuntimeError("the free list and the blocks that nobody holds differ")
        known = {key: block for block, key in enumerate(self._keys) if key is not None}
        if known != self._published:
            raise RuntimeError("the prefix cache and the blocks' contents differ")
        seen_content = False
        for block in self._free:
            if self._keys[block] is not None:
                seen_content = True
            elif seen_content:
                raise RuntimeError(f"block {block}, which holds nothing reusable, would be taken after a cached one")

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """Chained hash of a full block; computed once in a sequence's life."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else b""
            start = len(hashes) * self.block_size
            hashes.append(xxhash.xxh3_128_digest(parent + seq.token_ids[start : start + self.block_size].tobytes()))
        return hashes[index]

    def _forget(self, block: int) -> None:
        """Drop what a block is published as, before it is written again."""
        key = self._keys[block]
        if key is not None:
            self._keys[block] = self._token_ids[block] = None
            del self._published[key]
