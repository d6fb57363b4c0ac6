"""Who may change what an engine holds: one thread at a time, and to the end."""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

# What a thread that waits for the engine needs to wake up.
TURN_SECONDS = 1e-4


class Turns:
    """Threads take turns at an engine. What one of them begins to change is changed to the end, or all is dropped.

        whole --> changing --> whole
                     |
                     +-- failed, or interrupted --> cut short --> recovered: whole, and empty

    Recovery happens at once, and should that be interrupted too, when the next change begins. So a change is three
    contexts, in this order:

        with turns.wait(), turns.lock, turns.change():

    The lock is not wrapped in a context of our own: it is released in C, whatever interrupts us. (Nor are the other two
    generators with ``contextlib``: interrupted on its way in or out, one would keep the lock as long as the traceback
    lives.)

    Args:
        recover: The engine's method that drops everything; it is told why, and whether an owner's call has failed.
        is_step_thread: Whether the caller is a thread in which steps run.
    """

    def __init__(self, recover: Callable[[BaseException, bool], None], is_step_thread: Callable[[], bool]) -> None:
        self.lock = threading.RLock()
        self.is_closed = False
        self.waiting: set[int] = set()  # threads that wait for the lock
        self._is_step_thread = is_step_thread
        # Weak: the engine has us, and goes when nobody has it, not when garbage is next collected.
        self._drop_everything: Any = WeakMethod(recover)
        self._cause: BaseException | None = None  # of a change that goes on, or, if nobody has the lock, was cut short

    def wait(self) -> "_Waiting":
        """Wait for the lock, and then hold it: whoever runs steps makes way for those who wait.

        Raises:
            RuntimeError: This thread is inside a change already.
        """
        return _Waiting(self)

    def change(self, is_owners: bool = False) -> "_Change":
        """Change what the engine holds, with the lock; for one of its owners or not.

        Raises:
            RuntimeError: The engine is closed.
        """
        return _Change(self, is_owners)

    @property
    def is_whole(self) -> bool:
        """Whether no change goes on, nor was cut short."""
        return self._cause is None

    def is_inside(self) -> bool:
        """Whether this thread is in the middle of a change."""
        # Asked of the lock, which is released whatever happens; a flag of our own might stay set after an interrupt.
        return self.lock._is_owned() or self._is_step_thread()  # type: ignore[attr-defined]

    def recover(self, cause: BaseException | None = None, is_owners: bool = False) -> None:
        """Drop everything, because of ``cause``, or of what has cut a change short."""
        self._cause = cause or self._cause or RuntimeError("the engine was reset")
        self._drop_everything()(self._cause, is_owners)
        self._cause = None

    def refuse_if_closed(self) -> None:
        if self.is_closed:
            raise RuntimeError("this engine is closed; make a new LLM")


class _Waiting:
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __enter__(self) -> None:
        if self.turns.is_inside():
            raise RuntimeError(
                "the engine was called from inside one of its own steps (by a signal handler or a logits processor); "
                "only abort() may be"
            )
        self.turns.waiting.add(threading.get_ident())

    def __exit__(self, *error: object) -> None:
        self.turns.waiting.discard(threading.get_ident())


class _Change:
    def __init__(self, turns: Turns, is_owners: bool) -> None:
        self.turns, self.is_owners = turns, is_owners

    def __enter__(self) -> None:
        turns = self.turns
        turns.waiting.discard(threading.get_ident())
        turns.refuse_if_closed()
        if not turns.is_whole:
            turns.recover()
        turns._cause = RuntimeError("a call was interrupted")

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.turns._cause = None
        else:
            self.turns.recover(error, self.is_owners)
