"""Checks of user input, in one voice: the field, its value, and what it may be."""

import difflib
import math
from collections.abc import Iterable
from typing import Any


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    """Raise TypeError unless ``value`` is an int (bool is not), ValueError unless it is within [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a whole number{_range(low, high)}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; it must be a whole number{_range(low, high)}")


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Raise TypeError unless ``value`` is a number, ValueError unless it is finite and within [low, high]."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number{_range(low, high)}")
    if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; it must be a finite number{_range(low, high)}")


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be True or False")


def unknown_argument(where: str, name: str, known: Iterable[str]) -> TypeError:
    """A TypeError for a misspelt keyword, with the nearest known one."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known arguments: {', '.join(names)}"
    return TypeError(f"{where} has no argument {name!r}; {hint}")
