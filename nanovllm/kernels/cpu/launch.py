"""Kernels, and how they run on torch's own threads.

A kernel is a function of one address, where its arguments lie as int64: first the counter of tasks begun, the number of
tasks and the counter of threads, then its own (:func:`integers`). Every thread calls it; it takes tasks
from the counter until none is left, so a thread that is held up delays nobody.
"""

import ctypes
import os
import struct
import threading
from array import array
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanovllm.kernels.cpu.compilation import compile_soon
from nanovllm.kernels.cpu.vectors import Address, add_atomically

HEADER = 3
_THREAD_COUNTER = 16  # bytes into the arguments


@intrinsic
def integers(typing_context, arguments, count):  # type: ignore[no-untyped-def]
    """A kernel's own arguments, a literal number of them, as a tuple of int64: sizes, addresses, bits of floats."""
    if not isinstance(count, types.IntegerLiteral):
        return None  # numba asks again, with the literal
    number = count.literal_value

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        start = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        places = [builder.gep(start, [ir.Constant(ir.IntType(64), HEADER + i)]) for i in range(number)]
        return context.make_tuple(builder, signature.return_type, [builder.load(place) for place in places])

    return types.UniTuple(types.int64, number)(Address, count), generate


@intrinsic
def as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 that :func:`as_integer` made an argument of."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.trunc(values[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def next_task(typing_context, arguments):  # type: ignore[no-untyped-def]
    """A task nobody has begun; at least :func:`num_tasks` if there is none."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return add_atomically(builder, values[0], ir.Constant(ir.IntType(64), 1))

    return types.int64(Address), generate


@intrinsic
def num_tasks(typing_context, arguments):  # type: ignore[no-untyped-def]
    """Tasks of the launch."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        start = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(start, [ir.Constant(ir.IntType(64), 1)]))

    return types.int64(Address), generate


@intrinsic
def thread_number(typing_context, arguments):  # type: ignore[no-untyped-def]
    """A number of the calling thread's own, from 0. To be asked for once a call."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        counter = builder.add(values[0], ir.Constant(ir.IntType(64), _THREAD_COUNTER))
        return add_atomically(builder, counter, ir.Constant(ir.IntType(64), 1))

    return types.int64(Address), generate


class Stream(NamedTuple):
    """Memory that tasks read: task i ``piece_bytes`` from ``address + i * piece_bytes`` on."""

    address: int
    piece_bytes: int
    num_pieces: int


class Kernel:
    """A kernel; calling it runs ``tasks`` tasks on torch's threads and returns when all are done.

    It is compiled from now on, in the background: see :func:`nanovllm.kernels.cpu.compilation.finish_compiling`.

    Args:
        function: Of one int64, the address of the arguments.
        stream: Where the memory is that its tasks go through, told by its arguments; None if that is not worth knowing.
        reorders: Whether sums and products may be taken in any order, without which there is no vector code of sums.
    """

    def __init__(
        self,
        function: Callable[[Any], None],
        stream: Callable[[tuple[int, ...]], "Stream"] | None = None,
        reorders: bool = True,
    ) -> None:
        self.name = function.__name__
        self.stream = stream
        self._compiled = compile_soon(function, reorders)

    @cached_property
    def address(self) -> int:
        """Of the machine code; waits until it is there."""
        return self._compiled.result()

    def __call__(self, tasks: int, *arguments: int) -> None:
        """Run, or note in a recording.

        Args:
            tasks: Their number.
            arguments: Sizes, addresses, and floats as :func:`as_integer` gives them.
        """
        recorder = recorder_of_thread.current
        if recorder is not None:
            recorder.add(self, tasks, arguments)
        elif tasks > 0:
            values = array("q", (0, tasks, 0, *arguments))
            run(self.address, values.buffer_info()[0], tasks)

    def call_on_every_thread(self, *arguments: int) -> None:
        """Have each of torch's threads call it."""
        values = array("q", (0, 0, 0, *arguments))
        run(self.address, values.buffer_info()[0], torch.get_num_threads())


def run(kernel: int, arguments: int, tasks: int) -> None:
    """Call the kernel at an address on as many of torch's threads as there are tasks, or on all."""
    threads = min(torch.get_num_threads(), tasks)
    if threads > 1:
        _fork()(kernel, arguments, threads)
    elif threads == 1:
        _call(kernel, arguments)


class _Recorders(threading.local):
    """By thread, what notes launches instead of running them; None if they are to run."""

    current: Any = None


recorder_of_thread = _Recorders()


def new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor for what a kernel writes."""
    recorder = recorder_of_thread.current
    return torch.empty(shape, dtype=dtype, device="cpu") if recorder is None else recorder.new(shape, dtype)


def as_integer(value: float) -> int:
    """A float32 as an argument of a kernel."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


_KERNEL_TYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def _call(kernel: int, arguments: int) -> None:
    _KERNEL_TYPE(kernel)(arguments)


@cache
def _fork() -> Callable[[int, int, int], None]:
    """What calls a kernel on several threads, given its address, that of its arguments and how many there are to be.

    They are torch's own threads, if those can be had; else Python's. A second set would fight the first for the cores,
    since threads of OpenMP spin for a while after their work is done. Its entry point GOMP_parallel is GNU's, and part
    of LLVM's and Intel's library too.
    """
    parallel: Any = None
    for name in (None, *map(str, (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"))):
        try:  # where torch's own calls end up: with what was loaded for all, else with what torch was linked with
            parallel = ctypes.CDLL(name).GOMP_parallel
            break
        except (OSError, AttributeError, TypeError):  # Windows has no library without a name
            continue
    if parallel is None:
        return _fork_python_threads
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return lambda kernel, arguments, threads: parallel(kernel, arguments, threads, 0)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="nanovllm")


def _fork_python_threads(kernel: int, arguments: int, threads: int) -> None:
    futures: list[Future[None]] = []
    interrupt: BaseException | None = None
    try:
        futures.extend(_pool().submit(_call, kernel, arguments) for _ in range(threads - 1))
        _call(kernel, arguments)
    finally:
        while not all(future.done() for future in futures):
            try:
                wait(futures)
            except KeyboardInterrupt as error:  # not now: threads at work would be left without their memory
                interrupt = error
    if interrupt is not None:
        raise interrupt
    for future in futures:
        future.result()
