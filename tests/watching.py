"""Looks over the shoulder of Triton's interpreter: launches, programs, and the memory that they touch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np


class Watcher:
    """Is told what interpreted kernels do; by default it makes nothing of it."""

    def launch(self, kernel: str, arguments: tuple[Any, ...], is_early: bool) -> None:
        """A kernel is launched, to start before the one before it has ended if ``is_early``."""

    def program(self) -> None:
        """The next of its programs begins."""

    def read(self, addresses: np.ndarray, size: int) -> None:
        """It reads elements of ``size`` bytes at these addresses, int64 [elements]."""

    def write(self, addresses: np.ndarray, size: int) -> None:
        """It writes there; what updates memory does both."""


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of all kernels. Triton's interpreter must be in use."""
    import triton.runtime.interpreter as interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, begin_program = executor.__call__, builder.set_grid_idx
    load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def watched_call(self: Any, *arguments: Any, **named: Any) -> None:
        is_early = bool(named.pop("launch_pdl", False))
        watcher.launch(self.fn.__name__, (*arguments, *named.values()), is_early)
        call(self, *arguments, **named)

    def watched_program(self: Any, *index: int) -> None:
        watcher.program()
        begin_program(self, *index)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watcher.read(*_touched(pointers, mask))
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watcher.write(*_touched(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def watched_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched = _touched(pointers, mask)
        watcher.read(*touched)
        watcher.write(*touched)
        return update(self, operation, pointers, value, mask, *rest)

    with (
        patch.object(executor, "__call__", watched_call),
        patch.object(builder, "set_grid_idx", watched_program),
        patch.object(builder, "create_masked_load", watched_load),
        patch.object(builder, "create_masked_store", watched_store),
        patch.object(builder, "create_atomic_rmw", watched_update),
    ):
        yield


def _touched(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    """Addresses that are not masked, and the bytes of an element."""
    addresses = np.asarray(pointers.data)
    wanted = addresses[np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)]
    return wanted.astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8
