"""Statistics of a tensor that is read piece by piece."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Elements in memory at a time. In float32 they stay in a cache, where counting takes half the time: 2.6 ns an element.
PIECE_ELEMENTS = 2**19


@dataclass(slots=True)
class Statistics:
    """Of the finite elements of a tensor; None where there are none.

    Args:
        count: Elements in all.
        nan: Elements that are not a number.
        infinite: Elements that are infinite.
        zeros: Elements that are zero.
        min: The least.
        max: The largest.
        mean: Their mean.
        std: The root of their mean squared distance from it.
    """

    count: int = 0
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None

    @property
    def finite(self) -> int:
        return self.count - self.nan - self.infinite

    def add(self, piece: torch.Tensor) -> None:
        """Take in more elements, of any floating dtype."""
        before = self.finite
        self.count += piece.numel()
        numbers = piece.reshape(-1)
        numbers = numbers if numbers.dtype == torch.float64 else numbers.float()
        if not numbers.numel():
            return
        low, high = torch.aminmax(numbers)  # NaN if any is, so that sound tensors are asked no more
        if not (math.isfinite(low) and math.isfinite(high)):
            self.nan += int(numbers.isnan().sum())
            self.infinite += int(numbers.isinf().sum())
            numbers = numbers[numbers.isfinite()]
            if not numbers.numel():
                return
            low, high = torch.aminmax(numbers)
        self.zeros += numbers.numel() - int(numbers.count_nonzero())
        self.min = float(low) if self.min is None else min(self.min, float(low))
        self.max = float(high) if self.max is None else max(self.max, float(high))
        variance, mean = torch.var_mean(numbers, correction=0)
        if not math.isfinite(variance):  # the squares of large numbers are too large for float32
            variance, mean = torch.var_mean(numbers.double(), correction=0)
        self._merge(before, numbers.numel(), float(mean), float(variance))

    def _merge(self, before: int, added: int, mean: float, variance: float) -> None:
        """Means and variances of two parts are those of the whole (Chan, Golub and LeVeque, 1979)."""
        if self.mean is None or self.std is None:
            self.mean, self.std = mean, math.sqrt(variance)
            return
        total = before + added
        distance = mean - self.mean
        squares = self.std**2 * before + variance * added + distance**2 * before * added / total
        self.mean += distance * added / total
        self.std = math.sqrt(squares / total)


def read_statistics(source: Any) -> Statistics:
    """Statistics of a tensor in a safetensors file, of which never more than a piece is in memory."""
    found = Statistics()
    for piece in pieces(source):
        found.add(piece)
    return found


def pieces(source: Any) -> Iterator[torch.Tensor]:
    """A tensor in a safetensors file, some rows at a time."""
    shape = source.get_shape()
    if not shape:
        yield source[...]
        return
    rows = max(1, PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield source[start : start + rows]
