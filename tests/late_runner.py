"""A model runner that answers late, as a GPU does: ``execute`` only queues, and results come when waited for."""

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm import LLM
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.step_plan import StepPlan, StepResult


@dataclass
class LateHandle:
    """A queued step."""

    number: int
    runner: "LateRunner"
    done: threading.Event = field(default_factory=threading.Event)
    outcome: Any = None  # a handle, or an exception

    def result(self) -> StepResult:
        self.runner.events.append(("wait", self.number))
        self.done.wait(60)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome.result()


class LateRunner:
    """Around a runner: a thread of its own runs the steps in order, each after a moment.

    Args:
        runner: The one that does the work.
        depth: Steps in flight beyond the one whose result is waited for.
        delay: Seconds a step takes at most.
    """

    def __init__(self, runner: Any, depth: int = 1, delay: float = 0.002) -> None:
        self._runner, self._delay = runner, delay
        self.overlap_depth = depth
        self.events: list[tuple[str, int]] = []  # ("launch" or "wait", number of the step)
        self.fail_at: dict[int, Exception] = {}  # step number -> raised on the device
        self.refuse_at: dict[int, Exception] = {}  # step number -> raised by execute itself
        self._random = random.Random(0)
        self._queue: queue.Queue[tuple[StepPlan, LateHandle] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._number = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: StepPlan) -> LateHandle:
        number, self._number = self._number, self._number + 1
        if number in self.refuse_at:
            raise self.refuse_at.pop(number)
        handle = LateHandle(number, self)
        self.events.append(("launch", number))
        self._queue.put((plan, handle))
        return handle

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(60)
        self._runner.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            plan, handle = item
            time.sleep(self._random.random() * self._delay)
            try:
                if handle.number in self.fail_at:
                    raise self.fail_at.pop(handle.number)
                handle.outcome = self._runner.execute(plan)
            except BaseException as error:
                handle.outcome = error
            handle.done.set()


@contextmanager
def checked_books() -> Iterator[None]:
    """Every step of any engine leaves the scheduler's books in order."""
    advance = LLMEngine.advance

    def checking(engine: LLMEngine, *arguments: Any) -> None:
        advance(engine, *arguments)
        with engine.turns.lock:
            if engine.turns.is_whole:
                engine.scheduler.check_integrity()

    LLMEngine.advance = checking  # type: ignore[method-assign]
    try:
        yield
    finally:
        LLMEngine.advance = advance  # type: ignore[method-assign]


def open_llm(checkpoint: Path, **limits: Any) -> LLM:
    """A small engine of a checkpoint without a tokenizer."""
    return LLM(
        checkpoint,
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        kvcache_block_size=16,
        **{"num_kvcache_blocks": 64, **limits},
    )


def make_late(llm: LLM, depth: int = 1) -> LateRunner:
    """Put a late runner in front of the engine's."""
    late = LateRunner(llm.engine.runner, depth)
    llm.engine.runner = late  # type: ignore[assignment]
    return late
