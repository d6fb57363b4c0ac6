"""How messages are worded."""


def counted(number: float, noun: str, spec: str = "") -> str:
    """``1 row``, ``2 rows``; ``spec`` is how the number is formatted, as in ``1,024 rows`` with ``,``."""
    digits = format(number, spec)
    return f"{digits} {noun}" if digits == "1" else f"{digits} {noun}s"
