"""Checks of user input, in one voice: the field, its value, and what it may be."""

import difflib
import math
import numbers
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


def _scalar(value: Any) -> Any:
    """A tensor or array of one number as that number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def check_device(device: Any) -> str:
    """The name of a device; ValueError if none is called so. Whether the machine has it is seen later."""
    name = str(device)  # torch.device writes itself like this, too
    if not re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:[0-9]+)?", name):
        raise ValueError(f"device is {device!r}; use auto, cuda, cuda:N, mps or cpu")
    return name if name.startswith("cuda") else name.removesuffix(":0")


def check_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """``value`` as an int; TypeError unless it is a whole number (bool is not), ValueError unless in [low, high]."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a whole number{_range(low, high)}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} is {number}; it must be a whole number{_range(low, high)}")
    return number


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """``value`` as a float; TypeError unless it is a number, ValueError unless it is finite and in [low, high]."""
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number{_range(low, high)}")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # too large for one, or a Decimal that signals
        number = math.inf
    if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} is {value}; it must be a finite number{_range(low, high)}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """``value`` as a bool; TypeError unless it is True or False, Python's or an array's."""
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be True or False")
    return value


# Keywords of one that are often given to another.
_PLACES = {
    "enable_thinking": "chat(..., chat_template_kwargs={'enable_thinking': ...})",
    "chat_template": "chat(..., chat_template=...)",
    "chat_template_kwargs": "chat(..., chat_template_kwargs={...})",
    "tools": "chat(..., tools=[...])",
    "use_tqdm": "generate(..., use_tqdm=...)",
    "max_model_len": "LLM(max_model_len=...)",
    "max_num_seqs": "LLM(max_num_seqs=...)",
    "dtype": "LLM(dtype=...)",
    "device": "LLM(device=...)",
}


def unknown_argument(where: str, name: str, known: Iterable[str], otherwise: str = "") -> TypeError:
    """A TypeError for a misplaced or misspelt keyword: where it goes, the nearest known one, or all of them.

    ``otherwise`` is what it may be instead where it is like none of them.
    """
    known = set(known)
    if name == "enable_thinking" and "chat_template_kwargs" in known:
        return TypeError(f"{where} has no argument {name!r}; it goes into chat_template_kwargs: {{{name!r}: ...}}")
    if name in _PLACES and where in ("LLM", "SamplingParams", "generate"):
        return TypeError(f"{where} has no argument {name!r}; it goes into {_PLACES[name]}")
    near = nearest(name, known)
    every = f"{otherwise and f'{otherwise}; '}known arguments: {', '.join(sorted(known))}"
    hint = f"did you mean {near!r}?" if near is not None else every
    return TypeError(f"{where} has no argument {name!r}; {hint}")


def unknown_attribute(owner: Any, name: str, instead: str | None) -> AttributeError:
    """An AttributeError for an attribute that ``owner`` lacks: what there is instead, or Python's own suggestion."""
    message = f"{type(owner).__name__!r} object has no attribute {name!r}"
    if instead is not None:
        return AttributeError(f"{message}: {instead}")
    return AttributeError(message, name=name, obj=owner)  # with both, Python suggests a name like it


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant: one that begins so (temp: temperature), or looks alike; or None."""
    names, wrong = sorted(known), wrong.lower()
    begun = [right for right in names if len(wrong) > 2 and right.startswith(wrong)]
    near = [min(begun, key=len)] if begun else difflib.get_close_matches(wrong, names, n=1)
    return near[0] if near else None
