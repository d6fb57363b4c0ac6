"""Sums and exchanges between processes of one machine through memory that they share, without a kernel call.

A layer's sum over two ranks moves a few kilobytes: what it costs is waking up. Ranks that are in step arrive at about
the same time, so they look for each other in a loop instead of sleeping. The interface is that of torch.distributed's
process groups, as far as it is needed.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

_SLOT = 1 << 20  # bytes that a rank passes on at a time
_LINE = 64  # bytes of a flag: each has a cache line for itself
_LOOKS = 2000  # before a rank that waits lets others have its core
_NAPS = 20000  # looks after which it sleeps in between: the others do something that takes long


def why_not_shared_memory() -> str | None:
    """Why processes cannot exchange through shared memory here; None if they can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):  # others reorder what Python writes
        return f"{platform.machine()} does not keep the order of writes"
    return None


def new_memory(size: int) -> int:
    """A file descriptor of memory for ``size`` ranks; it has no name, so nothing is left of it."""
    if hasattr(os, "memfd_create"):
        fd = above_standard_files(os.memfd_create("nanovllm"))
    else:
        with tempfile.TemporaryFile() as file:
            fd = above_standard_files(os.dup(file.fileno()))
    os.ftruncate(fd, _num_bytes(size))
    return fd


def above_standard_files(fd: int) -> int:
    """The same file with a number of its own: where a program has closed its standard error, others write to 2."""
    if fd > 2:
        return fd
    import fcntl

    number = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return number


def _num_bytes(size: int) -> int:
    return size * _LINE + 2 * size * _SLOT


class SharedMemoryGroup:
    """One rank among those that share a :func:`new_memory`.

    Args:
        fd: Of the memory; may be closed afterwards.
        rank: This rank.
        size: Number of ranks.
        timeout: Seconds to wait for another rank; infinity for a rank that leaves it to others to tell who hangs.
        check: Called now and then while waiting; may raise.
    """

    def __init__(self, fd: int, rank: int, size: int, timeout: float, check: Callable[[], None]) -> None:
        self.rank, self.size, self.timeout, self.check = rank, size, timeout, check
        # (Python's mmap would keep a file open for as long as any traceback lives.)
        memory = torch.from_file(f"/dev/fd/{fd}", shared=True, size=_num_bytes(size), dtype=torch.uint8)
        self._flags = memory[: size * _LINE].numpy().data.cast("q")  # what a rank has arrived at, by line
        self._others = [other * _LINE // 8 for other in range(size) if other != rank]
        # Two, in turns: when a rank writes into one again, all have left the meeting in which it was read.
        self._slots = memory[size * _LINE :].view(2, size, _SLOT)
        self._count = 0

    def allreduce(self, tensors: list[torch.Tensor]) -> "SharedMemoryGroup":
        """Sum each tensor over the ranks, in place; the same bits on every rank."""
        for tensor in tensors:
            for part in _parts(tensor):
                torch.sum(self._exchange(part), dim=0, out=part)
        return self

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> "SharedMemoryGroup":
        """Copy each rank's input to the other ranks' outputs."""
        for results, tensor in zip(outputs, inputs, strict=True):
            for part, *pieces in zip(_parts(tensor), *map(_parts, results), strict=True):
                for piece, found in zip(pieces, self._exchange(part), strict=True):
                    piece.copy_(found)
        return self

    def broadcast(self, tensors: list[torch.Tensor]) -> "SharedMemoryGroup":
        """Copy rank 0's tensors to the others."""
        for tensor in tensors:
            for part in _parts(tensor):
                part.copy_(self._exchange(part)[0])
        return self

    def wait(self) -> None:
        """Everything is done by now."""

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """Every rank's ``part`` [n], [ranks, n]: good until the exchange after the next."""
        slots = self._slots[self._count % 2, :, : part.numel() * part.element_size()].view(part.dtype)
        slots[self.rank] = part
        self._meet()
        return slots

    def _meet(self) -> None:
        """Wait until all ranks are here."""
        self._count += 1
        flags, count = self._flags, self._count
        flags[self.rank * _LINE // 8] = count
        for other in self._others:
            looks, deadline = 0, 0.0
            while flags[other] < count:
                looks += 1
                if looks % _LOOKS:
                    continue
                self.check()
                now = time.monotonic()
                deadline = deadline or now + self.timeout
                if now > deadline:
                    late = other * 8 // _LINE
                    raise TimeoutError(f"timed out: rank {late} had not come to a sum after {self.timeout:g} s")
                time.sleep(0 if looks < _NAPS else 1e-4)


def _parts(tensor: torch.Tensor) -> list[Any]:
    """A contiguous tensor as one-dimensional pieces that a slot holds."""
    flat = tensor.view(-1)
    return list(flat.split(_SLOT // tensor.element_size())) if flat.numel() else []
