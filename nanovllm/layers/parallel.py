"""Which share of the model this process holds, and how the shares are summed.

Passed to the layers when they are built, so that engines of different degrees live side by side in one process.
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """A rank among the ranks of an engine; the default, one rank, needs no process group.

    Args:
        rank: This rank, from 0.
        size: Number of ranks.
        process_group: Theirs, one of torch.distributed's, which need not be registered there; None for one rank.
    """

    rank: int = 0
    size: int = 1
    process_group: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks, in place."""
        if self.size > 1:
            self.process_group.allreduce([x]).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' ``x`` [..., n] along the last dimension: [..., size * n], rank 0's columns first."""
        return x if self.size == 1 else torch.cat(self.gather(x), dim=-1)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``x``, of the same shape, in the order of the ranks."""
        if self.size == 1:
            return [x]
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(self.size)]
        self.process_group.allgather([parts], [x.contiguous()]).wait()
        return parts

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's ``x``, on every rank, in place."""
        if self.size > 1:
            self.process_group.broadcast([x]).wait()
        return x

    def shard(self, total: int, what: str) -> tuple[int, int]:
        """This rank's half-open range of ``total`` equal parts; ValueError naming ``what`` if they do not divide."""
        if total % self.size:
            raise ValueError(f"{what} is {total}, which {self.size} tensor-parallel ranks do not divide")
        part = total // self.size
        return self.rank * part, (self.rank + 1) * part
