"""Whether kernels that start early read what is being written: their order on a GPU, worked out in the interpreter.

A GPU shows such a race only sometimes, and mostly as an address that makes no sense. Here every launch is noted with
the memory that its programs read before they wait, and with what they write; what may run beside it follows from the
rules of programmatic dependent launch (``nanovllm/kernels/dependent_launch.py``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.runtime.interpreter as interpreter

from nanovllm.kernels import dependent_launch
from tools.compile_kernels import CALLS

GRAIN = 2  # bytes: memory is noted in such pieces


@dataclass
class Launch:
    """A kernel's programs, and the memory they touch, in pieces of ``GRAIN`` bytes."""

    kernel: str
    is_early: bool  # launched so that it may start before the one before it has ended
    lets_next_start: bool = False
    waits: bool = False  # some program does
    read_early: set[int] = field(default_factory=set)
    written_early: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class Recorder:
    """The launches of a run in their order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.has_waited = False  # the program that is running

    def begin(self, kernel: str, is_early: bool) -> None:
        self.launches.append(Launch(kernel, is_early))

    def begin_program(self) -> None:
        self.has_waited = False

    def let_next_start(self) -> None:
        self.launches[-1].lets_next_start = True

    def wait(self) -> None:
        self.has_waited = self.launches[-1].waits = True

    def read(self, addresses: set[int]) -> None:
        launch = self.launches[-1]
        if launch.is_early and not self.has_waited:
            launch.read_early |= addresses

    def write(self, addresses: set[int]) -> None:
        launch = self.launches[-1]
        launch.written |= addresses
        if launch.is_early and not self.has_waited:
            launch.written_early |= addresses

    def problems(self) -> list[str]:
        """What could go wrong on a GPU, a line each."""
        found: list[str] = []
        first_running = 0  # launches before this one have ended when the next one starts
        for index, launch in enumerate(self.launches):
            before = self.launches[index - 1] if index else None
            if not launch.is_early or before is None or not before.lets_next_start:
                first_running = index
            if launch.is_early:
                if launch.written_early:
                    found.append(f"{launch.kernel} writes before it waits")
                if not launch.waits:
                    found.append(f"no program of {launch.kernel} waits: the next one could overtake what came before")
                for running in self.launches[first_running:index]:
                    if running.written & launch.read_early:
                        found.append(f"{launch.kernel} reads what {running.kernel} writes before it waits for it")
        return list(dict.fromkeys(found))


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[Recorder]:
    """Note the launches of all kernels, and of those in ``modules``, as on a device where they can start early."""
    recorder = Recorder()
    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    begin_program = builder.set_grid_idx

    def noting_call(self: Any, *args: Any, **kwargs: Any) -> None:
        recorder.begin(self.fn.__name__, bool(kwargs.pop("launch_pdl", False)))
        call(self, *args, **kwargs)

    def noting_program(self: Any, *index: int) -> None:
        recorder.begin_program()
        begin_program(self, *index)

    def noting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        recorder.read(_memory(pointers, mask))
        return load(self, pointers, mask, *rest)

    def noting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.write(_memory(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    def noting_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        recorder.read(_memory(pointers, mask))
        recorder.write(_memory(pointers, mask))
        return update(self, operation, pointers, value, mask, *rest)

    patches = [
        patch.object(interpreter.GridExecutor, "__call__", noting_call),
        patch.object(builder, "set_grid_idx", noting_program),
        patch.object(builder, "create_masked_load", noting_load),
        patch.object(builder, "create_masked_store", noting_store),
        patch.object(builder, "create_atomic_rmw", noting_update),
        patch.object(dependent_launch, "gdc_launch_dependents", recorder.let_next_start),
        patch.object(dependent_launch, "gdc_wait", recorder.wait),
    ]
    for module in (*(import_module(f"nanovllm.kernels.{name}") for name in CALLS), *modules):
        if hasattr(module, "launch_options"):
            patches.append(patch.object(module, "launch_options", _options))
        if hasattr(module, "bring_into_cache"):  # asks for memory and waits for none; not for the interpreter
            patches.append(patch.object(module, "bring_into_cache", lambda *_: None))
    for one in patches:
        one.start()
    try:
        yield recorder
    finally:
        for one in reversed(patches):
            one.stop()


def _options(device: Any) -> dict[str, Any]:
    return {"OVERLAPS": True, "launch_pdl": True}


def _memory(pointers: Any, mask: Any) -> set[int]:
    addresses = np.asarray(pointers.data)
    wanted = np.broadcast_to(np.asarray(mask.data), addresses.shape).astype(bool)
    first = addresses[wanted].astype(np.int64).ravel()
    size = pointers.get_element_ty().primitive_bitwidth // 8
    pieces = first[:, None] // GRAIN + np.arange(max(1, size // GRAIN))
    return set(np.unique(pieces).tolist())
