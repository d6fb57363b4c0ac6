"""A sequence of launches, recorded once and replayed in one call.

A decode step is some 250 launches of a few microseconds to a few hundred each. Launched one by one from Python, with a
team of threads started and joined for each, they take 4 ms more (2 Zen 5 cores): a seventh of a step of one sequence of
Qwen3-0.6B. Replayed, the threads go from one to the next by themselves.

What is recorded are addresses. So a replay reads and writes the memory of the recording: inputs are put where they were
when it was made, and intermediate results have a pool of their own, whose buffers are used again as soon as the tensors
that were made of them are gone (:func:`nanovllm.kernels.cpu.launch.new`).
"""

import ctypes
import platform
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nanovllm.kernels.cpu import launch
from nanovllm.kernels.cpu.launch import HEADER, Kernel, Stream, integers, num_tasks, thread_number
from nanovllm.kernels.cpu.vectors import Address, as_int64, fetch_add, prefetch

_SPINS = 2000  # looks at a launch's gate before the processor is offered to others
_ANY = -(1 << 62)  # no count is less: one look is enough


class NotRecordableError(Exception):
    """Something else than a launch happened, which a replay would leave out."""


class Recording:
    """Launches in order, and their arguments.

    Args:
        launches: Kernels, numbers of tasks and arguments. The memory they name must outlive the recording.
    """

    def __init__(self, launches: list[tuple[Kernel, int, tuple[int, ...]]]) -> None:
        self.kernels = [kernel for kernel, _, _ in launches]
        self.places: dict[Kernel, list[int]] = {}  # of a kernel's launches
        for place, kernel in enumerate(self.kernels):
            self.places.setdefault(kernel, []).append(place)
        width = HEADER + max(len(arguments) for _, _, arguments in launches)
        self.arguments = np.zeros((len(launches), -(-width // 8) * 8), dtype=np.int64)
        for line, (_, tasks, arguments) in zip(self.arguments, launches, strict=True):
            line[1] = tasks
            line[HEADER : HEADER + len(arguments)] = arguments
        streams = [kernel.stream and kernel.stream(arguments) for kernel, _, arguments in launches]
        self.ahead = _pieces_ahead(streams, torch.get_num_threads())
        self.addresses = np.array([kernel.address for kernel in self.kernels], dtype=np.int64)
        self.inside = np.zeros(len(launches), dtype=np.int64)  # by launch, less than 0 while threads are in it

    def set_tasks(self, kernel: Kernel, tasks: int) -> None:
        """Change the number of tasks of all launches of a kernel."""
        self.arguments[self.places.get(kernel, []), 1] = tasks

    def replay(self) -> None:
        """Run all launches."""
        self.arguments[:, 0] = 0
        self.arguments[:, 2] = 0
        _replay_kernel.call_on_every_thread(
            self.addresses.ctypes.data,
            self.arguments.ctypes.data,
            self.arguments.strides[0],
            self.ahead.ctypes.data,
            len(self.kernels),
            self.inside.ctypes.data,
            _yield_address(),
        )


def _pieces_ahead(streams: list[Stream | None], threads: int) -> np.ndarray:
    """What threads ask for when they are done with a launch, while others are not: the beginning of the next stream.

    Returns:
        int64 [launches, 3]: the address of a piece, which is the first thread's, those of the others following it; its
        size; and how many pieces there are from it on. Zeros where there is nothing to ask for. What earlier launches
        have asked for, later ones do not ask for again.
    """
    ahead = np.zeros((len(streams), 3), dtype=np.int64)
    waiting: list[int] = []  # launches before the next stream
    for number, stream in enumerate(streams):
        if stream is None:
            waiting.append(number)
            continue
        for turn, earlier in enumerate(waiting):
            begun = turn * threads
            if begun < stream.num_pieces:
                place = stream.address + begun * stream.piece_bytes
                ahead[earlier] = place, stream.piece_bytes, stream.num_pieces - begun
        waiting = []
    return ahead


@contextmanager
def recorded(pool: "Pool") -> Iterator["Recorder"]:
    """Within it, launches of this thread are noted instead of run.

    Raises:
        NotRecordableError: Out of it, if a torch operator computes something.
    """
    recorder = Recorder(pool)
    try:
        launch.recorder_of_thread.current = recorder
        with _OnlyViews():
            yield recorder
    finally:
        launch.recorder_of_thread.current = None


class Pool:
    """Memory for what launches write. Recordings that are never replayed at the same time may share one."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose memory is lent again once no tensor uses it any more."""
        wanted = int(np.prod(shape)) * dtype.itemsize
        size = 1 << (max(64, wanted) - 1).bit_length()
        free = self._free.setdefault(size, [])
        buffer = free.pop() if free else np.zeros(size, dtype=np.uint8)
        loan = buffer[:wanted]  # held by the tensor's storage, which its views share
        weakref.finalize(loan, free.append, buffer).atexit = False
        return torch.from_numpy(loan).view(dtype).view(shape)


class Recorder:
    """Notes launches.

    Args:
        pool: Where the memory comes from that they write to.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.launches: list[tuple[Kernel, int, tuple[int, ...]]] = []

    def add(self, kernel: Kernel, tasks: int, arguments: tuple[int, ...]) -> None:
        """Note a launch."""
        self.launches.append((kernel, tasks, tuple(int(argument) for argument in arguments)))

    def new(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the pool's."""
        return self.pool.new(shape, dtype)


class _OnlyViews(TorchDispatchMode):
    """Refuses operators that do more than look at memory in another way."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch is to import its compiler at the first operator, so as to keep it away: that takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A view shares its memory with what it is a view of; whatever computes has memory of its own, or changes some.
        result = None if func._schema.is_mutable else func(*args, **(kwargs or {}))
        made = _memory(result)
        if not made or not made <= _memory(args):
            raise NotRecordableError(f"{func} is not a launch of a CPU kernel")
        return result


def _memory(values: Any) -> set[int]:
    """Addresses of the storages of the tensors in ``values``. (oneDNN's own have none that can be told.)"""
    tensors = [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}


@intrinsic
def _call_kernel(typing_context, function, arguments):  # type: ignore[no-untyped-def]
    """Call the kernel at an address."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.void(Address, Address), generate


@intrinsic
def _call_for_int(typing_context, function):  # type: ignore[no-untyped-def]
    """Call the C function ``int f(void)`` at an address."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(values[0], kind.as_pointer()), []), ir.IntType(64))

    return types.int64(Address), generate


@intrinsic
def _wait_until(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Look at an int64 up to ``_SPINS`` times; returns what it was last: at least ``value``, or the time is over."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        int64 = ir.IntType(64)
        place = builder.inttoptr(values[0], int64.as_pointer())
        before, look, again, done = (
            builder.block,
            *(builder.append_basic_block(name) for name in ("look", "again", "done")),
        )
        builder.branch(look)
        builder.position_at_end(look)
        count = builder.phi(int64)
        count.add_incoming(ir.Constant(int64, 0), before)
        seen = builder.load_atomic(place, "acquire", 8)
        tired = builder.icmp_signed(">=", count, ir.Constant(int64, _SPINS))
        builder.cbranch(builder.or_(tired, builder.icmp_signed(">=", seen, values[1])), done, again)
        builder.position_at_end(again)
        if _PAUSE:
            name, operands = _PAUSE
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(operands)), name
            )
            builder.call(function, [ir.Constant(ir.IntType(32), operand) for operand in operands])
        count.add_incoming(builder.add(count, ir.Constant(int64, 1)), again)
        builder.branch(look)
        builder.position_at_end(done)
        return seen

    return types.int64(Address, types.int64), generate


# How to tell the processor that a loop only waits.
_PAUSE: tuple[str, list[int]] | None = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
    "aarch64": ("llvm.aarch64.hint", [1]),
    "arm64": ("llvm.aarch64.hint", [1]),
}.get(platform.machine().lower())


def _replay(arguments: Any) -> None:
    """Every thread goes through all launches; none begins one before the tasks of the last are done.

    It waits for tasks, not for threads: where other programs use the cores, one of ours may not run for milliseconds,
    and the others do its share meanwhile. A task is begun by a thread that is counted as inside. So once all are begun
    and nobody is inside, all are done; whoever comes later finds nothing to begin, and need not go inside.
    """
    functions, lines, line_bytes, pieces, count, inside, give_way = integers(arguments, 7)
    addresses: Any = as_int64(functions)
    ahead, thread = as_int64(pieces), thread_number(arguments)
    for number in range(count):
        line, gate = lines + number * line_bytes, inside + 8 * number
        if _wait_until(line, _ANY) < num_tasks(line):  # not all are begun
            fetch_add(gate, -1)
            _call_kernel(addresses[number], line)
            fetch_add(gate, 1)
        if thread < ahead[3 * number + 2]:  # memory has nothing to do until the last thread is done
            prefetch(ahead[3 * number] + thread * ahead[3 * number + 1], ahead[3 * number + 1])
        while _wait_until(gate, 0) < 0:
            if give_way != 0:
                _call_for_int(give_way)


_replay_kernel = Kernel(_replay)


@cache
def _yield_address() -> int:
    """The address of the function that offers the processor to others; 0 if there is none."""
    if sys.platform == "win32":
        return 0
    return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
