"""How messages are worded."""

from typing import Any


def counted(number: float, noun: str, spec: str = "") -> str:
    """``1 row``, ``2 rows``; ``spec`` is how the number is formatted, as in ``1,024 rows`` with ``,``."""
    digits = format(number, spec)
    return f"{digits} {noun}" if digits == "1" else f"{digits} {noun}s"


def kind_of(value: Any) -> str:
    """The type of a value that should have another: ``an int``, ``a list``."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
