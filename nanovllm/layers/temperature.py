"""Temperatures that change along the output: warm openings, annealed endings.

    SamplingParams(temperature=Linear(1.2, 0.3, num_tokens=64))

A schedule is a list of pieces over the output positions, so that a batch of different schedules is evaluated on the
device from one table (:func:`evaluate`), whatever their kinds.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanovllm.utils.validation import check_int, check_number

# start position, temperature there, end position, temperature there, whether along a half cosine
Piece = tuple[float, float, float, float, bool]

# Beyond them every token is as likely as any other, or one is certain; float32 still holds their differences and
# quotients.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-20, 1e20


class TemperatureSchedule(ABC):
    """A temperature for each output position, counted from 0; a temperature of 0 is greedy there."""

    __slots__ = ()

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The schedule in pieces, in the order of their start positions; before and after them it is constant."""

    def at(self, position: int) -> float:
        """The temperature at an output position: what :func:`evaluate` computes on the device."""
        pieces = self.pieces()
        first, start, last, end, cosine = next((p for p in reversed(pieces) if p[0] <= position), pieces[0])
        share = min(max((position - first) / max(last - first, 1.0), 0.0), 1.0)
        if cosine:
            share = (1 - math.cos(math.pi * share)) / 2
        return start + (end - start) * share


@dataclass(frozen=True, slots=True)
class Constant(TemperatureSchedule):
    """The same temperature everywhere.

    Args:
        value: At least 0.
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _temperature("value", self.value))

    def pieces(self) -> list[Piece]:
        return [(0.0, self.value, 0.0, self.value, False)]


@dataclass(frozen=True, slots=True)
class _Ramp(TemperatureSchedule):
    """From one temperature at position 0 to another at ``num_tokens``, constant from there on."""

    start: float
    end: float
    num_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _temperature("start", self.start))
        object.__setattr__(self, "end", _temperature("end", self.end))
        object.__setattr__(self, "num_tokens", check_int("num_tokens", self.num_tokens, low=1))


@dataclass(frozen=True, slots=True)
class Linear(_Ramp):
    """In a straight line from ``start`` at position 0 to ``end`` at position ``num_tokens``, then constant.

    Args:
        start: At least 0.
        end: At least 0.
        num_tokens: At least 1.
    """

    def pieces(self) -> list[Piece]:
        return [(0.0, self.start, float(self.num_tokens), self.end, False)]


@dataclass(frozen=True, slots=True)
class Cosine(_Ramp):
    """Along half a cosine from ``start`` at position 0 to ``end`` at position ``num_tokens``, then constant.

    Slow at both ends, as learning rates are annealed (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983).

    Args:
        start: At least 0.
        end: At least 0.
        num_tokens: At least 1.
    """

    def pieces(self) -> list[Piece]:
        return [(0.0, self.start, float(self.num_tokens), self.end, True)]


@dataclass(frozen=True, slots=True)
class Points(TemperatureSchedule):
    """In straight lines between points, constant before the first and after the last.

    Args:
        points: (output position, temperature) pairs, at least one; positions increase, temperatures are at least 0.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(_points(self.points)))

    def pieces(self) -> list[Piece]:
        ends = self.points[1:] or self.points
        return [
            (float(first), start, float(last), end, False)
            for (first, start), (last, end) in zip(self.points, ends, strict=False)
        ]


@dataclass(frozen=True, slots=True)
class Pieces(TemperatureSchedule):
    """What another schedule was at some moment.

    Args:
        given: Its pieces, at least one.
    """

    given: tuple[Piece, ...]

    def pieces(self) -> list[Piece]:
        most = MAX_TEMPERATURE
        return [(first, min(low, most), last, min(high, most), cosine) for first, low, last, high, cosine in self.given]


def evaluate(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The temperatures of a batch.

    Args:
        table: float32 [rows, pieces, 5], each row's pieces; repeat the last one to fill a row up.
        positions: integers [rows], output positions.

    Returns:
        float32 [rows].
    """
    where = positions.to(torch.float32)
    piece = ((table[:, :, 0] <= where[:, None]).sum(dim=1) - 1).clamp_(min=0)
    first, start, last, end, cosine = table[torch.arange(len(table), device=table.device), piece].unbind(dim=1)
    share = ((where - first) / (last - first).clamp(min=1.0)).clamp_(0.0, 1.0)
    share = torch.where(cosine > 0, (1 - torch.cos(math.pi * share)) / 2, share)
    return (start + (end - start) * share).clamp_(min=0.0)


def _temperature(name: str, value: object) -> float:
    return min(check_number(name, value, low=0.0), MAX_TEMPERATURE)


def _points(points: object) -> list[tuple[int, float]]:
    if isinstance(points, (str, bytes)) or not isinstance(points, Iterable):
        raise TypeError(f"points is {points!r} ({type(points).__name__}); it must be (position, temperature) pairs")
    checked: list[tuple[int, float]] = []
    for number, point in enumerate(points):
        if not isinstance(point, (tuple, list)) or len(point) != 2:
            raise TypeError(f"points[{number}] is {point!r}; it must be a pair (position, temperature)")
        low = checked[-1][0] + 1 if checked else 0
        position = check_int(f"the position of points[{number}]", point[0], low=low)
        checked.append((position, _temperature(f"the temperature of points[{number}]", point[1])))
    if not checked:
        raise ValueError("points is empty; it must hold at least one pair (position, temperature)")
    return checked
