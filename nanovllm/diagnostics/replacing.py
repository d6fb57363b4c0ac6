"""Attributes of an engine that instruments replace while they watch it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object (a class, a module) another attribute until the end of the context.

    What the object has from its class is its class's again afterwards. Not for parameters and modules of a torch
    module, which are no attributes of its own.
    """
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def one_by_one(runner: Any) -> Iterator[None]:
    """Let a model runner launch steps operation by operation: captured and recorded ones run without Python."""
    with replaced(runner, "recorded", None), replaced(runner, "graphs", None):
        yield
