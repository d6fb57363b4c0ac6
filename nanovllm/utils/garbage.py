"""Python's garbage collector, and when it is in the way."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


def _start_afresh() -> None:
    """In a forked process: threads that had paused it are not there."""
    global _lock, _pauses
    if _pauses and _was_enabled:
        gc.enable()
    _lock, _pauses = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Within it, in whatever thread, nothing looks for circles of garbage.

    For work that makes very many objects which are not garbage: the collector looks at them again and again, together
    with all that libraries have made, which took a fifth of the time of compiling kernels. It may be entered again, and
    by several threads; where the program has switched the collector off, it stays off.
    """
    global _pauses, _was_enabled
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _was_enabled:
                gc.enable()
