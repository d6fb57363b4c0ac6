"""Events of a KV cache, and the books that come of them: who holds which block, and which the prefix cache knows.

The books are kept from the events alone, apart from the block manager's own, so that the two can be compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# What may happen. Those with blocks: shared (a prefix hit), allocated, evicted (from the prefix cache, to be written
# again), published (to it), freed (all of a sequence's), forgotten (by the prefix cache).
KINDS = (
    "added",
    "admitted",
    "shared",
    "allocated",
    "evicted",
    "published",
    "freed",
    "preempted",
    "finished",
    "forgotten",
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Args:
        kind: One of ``KINDS``.
        sequence: Number of the sequence it happened to; -1 for none.
        blocks: Blocks concerned, in the order of the sequence.
        value: Of "admitted", how many tokens it found computed; of "finished", the reason.
    """

    kind: str
    sequence: int = -1
    blocks: tuple[int, ...] = ()
    value: int | str | None = None


class Books:
    """What events come to.

    Attributes:
        tables: By sequence, the blocks it holds, in order; those that hold none are not in it.
        holders: By block, how many sequences hold it; blocks nobody holds are not in it.
        published: Blocks that the prefix cache knows, held or not.
        num_cached: Of these, how many nobody holds.
    """

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}
        self.holders: dict[int, int] = {}
        self.published: set[int] = set()
        self.num_cached = 0

    def apply(self, event: Event) -> None:
        """Take in an event.

        Raises:
            ValueError: It cannot follow what came before.
        """
        kind, sequence, blocks = event.kind, event.sequence, event.blocks
        if kind == "shared":
            self._take(sequence, blocks, held_by_others=True)
        elif kind == "allocated":
            self._take(sequence, blocks, held_by_others=False)
        elif kind == "freed":
            self._free(sequence, blocks)
        elif kind == "published":
            self._publish(blocks)
        elif kind in ("evicted", "forgotten"):
            self._forget(kind, blocks)

    def apply_all(self, events: Iterable[Event]) -> None:
        """Take in several."""
        for event in events:
            self.apply(event)

    def _take(self, sequence: int, blocks: tuple[int, ...], held_by_others: bool) -> None:
        table = self.tables.setdefault(sequence, [])
        for block in blocks:
            count = self.holders.get(block, 0)
            if not held_by_others and (count or block in self.published):
                raise ValueError(f"block {block} is allocated, but it is held {count} times or still cached")
            if held_by_others and not count:
                if block not in self.published:
                    raise ValueError(f"block {block} is shared, but it holds nothing that is known")
                self.num_cached -= 1
            self.holders[block] = count + 1
            table.append(block)

    def _free(self, sequence: int, blocks: tuple[int, ...]) -> None:
        if list(blocks) != self.tables.pop(sequence, []):
            raise ValueError(f"sequence {sequence} gives back blocks {list(blocks)}, which are not those it holds")
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.num_cached += block in self.published

    def _publish(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            if block in self.published:
                raise ValueError(f"block {block} is published twice")
            self.published.add(block)
            self.num_cached += block not in self.holders

    def _forget(self, kind: str, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            if block not in self.published or (kind == "evicted" and block in self.holders):
                raise ValueError(f"block {block} is {kind}, but it is held or was not published")
            self.published.discard(block)
            self.num_cached -= block not in self.holders
