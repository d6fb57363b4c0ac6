"""Whether kernels that start early read what is being written: their order on a GPU, worked out in the interpreter.

A GPU shows such a race only sometimes, and mostly as an address that makes no sense. Here every launch is noted with
the memory that its programs read before they wait, and with what they write; what may run beside it follows from the
rules of programmatic dependent launch (``nanovllm/kernels/dependent_launch.py``).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

from nanovllm.kernels import dependent_launch
from tests.watching import Watcher, watched
from tools.compile_kernels import CALLS

GRAIN = 2  # bytes: memory is noted in such pieces


@dataclass
class Launch:
    """A kernel's programs, and the memory they touch, in pieces of ``GRAIN`` bytes."""

    kernel: str
    is_early: bool  # launched so that it may start before the one before it has ended
    describes: bool = False  # it is given a tensor's descriptor
    lets_next_start: bool = False
    waits: bool = False  # some program does
    read_early: set[int] = field(default_factory=set)
    written_early: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


class Recorder(Watcher):
    """The launches of a run in their order."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.has_waited = False  # the program that is running

    def launch(self, kernel: str, arguments: tuple[Any, ...], is_early: bool) -> None:
        self.launches.append(Launch(kernel, is_early, any(hasattr(one, "block_shape") for one in arguments)))

    def program(self) -> None:
        self.has_waited = False

    def let_next_start(self) -> None:
        self.launches[-1].lets_next_start = True

    def wait(self) -> None:
        self.has_waited = self.launches[-1].waits = True

    def read(self, addresses: np.ndarray, size: int) -> None:
        launch = self.launches[-1]
        if launch.is_early and not self.has_waited:
            launch.read_early |= _pieces(addresses, size)

    def write(self, addresses: np.ndarray, size: int) -> None:
        launch, pieces = self.launches[-1], _pieces(addresses, size)
        launch.written |= pieces
        if launch.is_early and not self.has_waited:
            launch.written_early |= pieces

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
def recorded(*modules: ModuleType, describes: bool = False) -> Iterator[Recorder]:
    """Note the launches of all kernels, and of those in ``modules``, as on a device where they can start early."""
    recorder = Recorder()
    with ExitStack() as stack:
        stack.enter_context(watched(recorder))
        stack.enter_context(patch.object(dependent_launch, "gdc_launch_dependents", recorder.let_next_start))
        stack.enter_context(patch.object(dependent_launch, "gdc_wait", recorder.wait))
        for module in (*(import_module(f"nanovllm.kernels.{name}") for name in CALLS), *modules):
            if hasattr(module, "launch_options"):
                stack.enter_context(patch.object(module, "launch_options", _options))
            if hasattr(module, "has_hopper_features"):
                stack.enter_context(patch.object(module, "has_hopper_features", lambda device: describes))
        yield recorder


def _options(device: Any) -> dict[str, Any]:
    return {"OVERLAPS": True, "launch_pdl": True}


def _pieces(addresses: np.ndarray, size: int) -> set[int]:
    pieces = addresses[:, None] // GRAIN + np.arange(max(1, size // GRAIN))
    return set(np.unique(pieces).tolist())
