"""Which share of the model this process holds, and how the shares are summed.

Passed to the layers when they are built, so that engines of different degrees live side by side in one process.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """A rank among the ranks of an engine; the default, one rank, needs no process group.

    Args:
        rank: This rank, from 0.
        size: Number of ranks.
        process_group: Their torch.distributed group; None for one rank.
    """

    rank: int = 0
    size: int = 1
    process_group: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' ``x`` [..., n] along the last dimension: [..., size * n], rank 0's columns first."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return torch.cat(parts, dim=-1)

    def shard(self, total: int, what: str) -> tuple[int, int]:
        """This rank's half-open range of ``total`` equal parts; ValueError naming ``what`` if they do not divide."""
        if total % self.size:
            raise ValueError(f"{what} is {total}, which {self.size} tensor-parallel ranks do not divide")
        part = total // self.size
        return self.rank * part, (self.rank + 1) * part
