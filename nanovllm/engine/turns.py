"""Who may change what an engine holds: one thread at a time, and to the end."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

# What a thread that waits for the engine needs to wake up.
TURN_SECONDS = 1e-4
# Turns that are left to one that waits: to so many, an interrupted one, which waits no longer, may still be noted.
MOST_TURNS = 1000


class Turns:
    """Threads take turns at an engine. What one of them begins to change is changed to the end, or all is dropped.

        whole --> changing --> whole
                     |
                     +-- failed, or interrupted --> cut short --> recovered: whole, and empty

    Recovery happens at once, and should that be interrupted too, when the next change begins. Whoever made the change
    has the error; the owners of requests are told, and for requests that have none the next ``step`` says so, unless it
    was a step that failed.

    A change is three contexts, in this order:

        with turns.wait(), turns.lock, turns.change():

    All of it belongs to the process that made it. In a fork of that, the threads that it computes with are not there,
    and nobody would ever give back a lock that one of them had.

    The lock is not wrapped in a context of our own: it is released in C, whatever interrupts us. (Nor are the other two
    generators with ``contextlib``: interrupted on its way in or out, one would keep the lock as long as the traceback
    lives.)

    Args:
        recover: The engine's method that drops everything; it is told why, and whether the next step is to say so.
        is_step_thread: Whether the caller is a thread in which steps run.
    """

    def __init__(self, recover: Callable[[BaseException, bool], None], is_step_thread: Callable[[], bool]) -> None:
        self.lock = threading.RLock()
        self.is_closed = False
        self.waiting: dict[int, int] = {}  # threads that wait for the lock, and how many more turns are left to each
        self._is_step_thread = is_step_thread
        self._process = os.getpid()
        # Weak: the engine has us, and goes when nobody has it, not when garbage is next collected.
        self._drop_everything: Any = WeakMethod(recover)
        # Of a change that goes on, or, if nobody has the lock, was cut short: why, and whether it was a step.
        self._cut_short: tuple[BaseException, bool] | None = None

    def wait(self) -> "_Waiting":
        """Wait for the lock, and then hold it: whoever runs steps makes way for those who wait.

        Raises:
            RuntimeError: This thread is inside a change already, or this process was forked from the engine's.
        """
        return _Waiting(self)

    def make_way(self) -> None:
        """Let those who wait have the lock. It is not fair: who asks again at once would have it again."""
        if self.waiting:
            for thread, turns in list(self.waiting.items()):
                if turns > 0:
                    self.waiting[thread] = turns - 1
                else:
                    self.waiting.pop(thread, None)
            time.sleep(TURN_SECONDS)

    def change(self, is_step: bool = False) -> "_Change":
        """Change what the engine holds, with the lock.

        Raises:
            RuntimeError: The engine is closed.
        """
        return _Change(self, is_step)

    @property
    def is_whole(self) -> bool:
        """Whether no change goes on, nor was cut short."""
        return self._cut_short is None

    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a change."""
        # Asked of the lock, which is released whatever happens; a flag of our own might stay set after an interrupt.
        return self.lock._is_owned() or self._is_step_thread()  # type: ignore[attr-defined]

    def recover(self, cause: BaseException | None = None, is_step: bool = False) -> None:
        """Drop everything, because of ``cause``, or of what has cut a change short."""
        if cause is not None or self._cut_short is None:
            self._cut_short = cause or RuntimeError("the engine was reset"), is_step
        cause, is_step = self._cut_short
        self._drop_everything()(cause, not is_step)
        self._cut_short = None

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that the engine belongs to."""
        return os.getpid() != self._process

    def refuse_if_forked(self) -> None:
        if self.is_forked:
            raise RuntimeError(
                "this LLM belongs to the process that this one was forked from, whose threads are not here; make an "
                "LLM in the process that uses it (multiprocessing.get_context('spawn') starts one with all its threads)"
            )

    def refuse_if_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("this engine is closed; make a new LLM")


class _Waiting:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __enter__(self) -> None:
        self.turns.refuse_if_forked()
        if self.turns.is_inside():
            raise RuntimeError(
                "the engine was called from inside one of its own steps (by a signal handler or a logits processor); "
                "only abort() may be"
            )
        self.turns.waiting[threading.get_ident()] = MOST_TURNS

    def __exit__(self, *error: object) -> None:
        self.turns.waiting.pop(threading.get_ident(), None)


class _Change:
    def __init__(self, turns: Turns, is_step: bool) -> None:
        self.turns, self.is_step = turns, is_step

    def __enter__(self) -> None:
        turns = self.turns
        turns.waiting.pop(threading.get_ident(), None)
        turns.refuse_if_closed()
        if not turns.is_whole:
            turns.recover()
        turns._cut_short = RuntimeError("a call was interrupted"), self.is_step

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.turns._cut_short = None
        else:
            self.turns.recover(error, self.is_step)
