"""The other ranks of a tensor-parallel engine: processes that hold a share of the model each and run the same steps.

Rank 0 is in the caller's process. It starts the others (``worker_process.py``), each at the end of a pair of sockets
that only the two know. Their sums go through memory that they share or, where that is not for them, a process group
whose ranks find each other through a file in a private temporary directory. A step is a message to each, after which
all compute; the sums keep them in step. Whichever way one of them ends, the sockets tell, and rank 0 ends the others
and raises :class:`EngineDeadError`.
"""

import contextlib
import os
import pickle
import platform
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.placement import resolve_device
from nanovllm.engine.rank_group import RankGroup
from nanovllm.errors import EngineDeadError
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.utils.shared_group import above_standard_files, new_memory
from nanovllm.version import __version__

T = TypeVar("T")

START_SECONDS = 600.0  # until a worker has loaded its share
GRACE_SECONDS = 2.0  # for a worker to end by itself, or for one that rank 0 misses to be heard of
LATEST_SECONDS = 2.0  # after a worker's end: by then rank 0 has noticed as well, or is not waited for
POLL_SECONDS = 0.2

# What a worker is started with, after its path has been set. The caller's main module plays no part in it, so that it
# needs no guard.
_BOOTSTRAP = """
parent, directory, fd, memory, rank = sys.argv[1:]
try:
    from nanovllm.engine.worker_process import main
except BaseException:
    import pickle, traceback
    from multiprocessing.connection import Connection
    Connection(int(fd)).send_bytes(pickle.dumps(("error", traceback.format_exc())))
    sys.exit(1)
main(int(parent), directory, int(fd), int(memory), int(rank))
"""


class Workers:
    """Ranks 1 to ``size - 1`` of an engine, and what rank 0 shares with them.

    Args:
        config: The engine's configuration.
        max_model_len: Most tokens of a sequence.

    Raises:
        ValueError: There are no process groups here, or too few devices.
    """

    def __init__(self, config: EngineConfig, max_model_len: int) -> None:
        reason = why_not(config)
        if reason is not None:
            raise ValueError(f"tensor_parallel_size is {config.tensor_parallel_size}, but {reason}")
        self.config, self.size = config, config.tensor_parallel_size
        self.failure: str | None = None
        self.failed_at = 0.0
        self._is_up = False
        self._group: RankGroup | None = None
        self._lock = threading.Lock()
        # Of each on its own: some are ahead of others.
        self._replies: list[queue.Queue[tuple[str, Any]]] = [queue.Queue() for _ in range(1, self.size)]
        self.directory = Path(tempfile.mkdtemp(prefix="nanovllm-"))  # nobody else's to read
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.thread = StepThread()
        self._memory = new_memory(self.size)
        belongings = (self.processes, self.connections, self.directory, self._memory, self.thread)
        self._finalizer = weakref.finalize(self, _clean_up, os.getpid(), *belongings)
        first = pickle.dumps((config, max_model_len, library_versions()))
        try:
            for rank in range(1, self.size):
                self._start(rank, first)
        except BaseException:
            self.shut_down()
            raise
        threading.Thread(target=_read, args=(weakref.ref(self), list(self.connections)), daemon=True).start()

    def _start(self, rank: int, first: bytes) -> None:
        ours, theirs = (socket.socket(fileno=above_standard_files(end.detach())) for end in socket.socketpair())
        # A rank that hangs takes no messages either.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self.config.tensor_parallel_timeout))
        path = [entry for entry in sys.path if isinstance(entry, str)]
        with theirs:
            fd = theirs.fileno()
            code = f"import sys; sys.path[:] = {path!r}{_BOOTSTRAP}"
            given = (os.getpid(), self.directory, fd, self._memory, rank)
            process = subprocess.Popen(
                [sys.executable, "-c", code, *map(str, given)],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd, self._memory],
                start_new_session=True,  # Ctrl-C in the terminal is for rank 0 to hear
            )
        self.processes.append(process)
        connection = Connection(ours.detach())
        self.connections.append(connection)
        with contextlib.suppress(OSError):  # it has ended already, which the reader will hear
            connection.send_bytes(first)

    def join(self) -> ParallelGroup:
        """Wait for the workers to be up, and meet them.

        Raises:
            EngineDeadError: One of them is not.
        """
        self.collect("hello")
        myself = weakref.ref(self)  # or the group would keep us alive

        def check() -> None:
            workers = myself()
            if workers is not None:
                workers.raise_if_failed()

        self._group = self.run(lambda: RankGroup(self.directory / "store", self._memory, 0, self.config, check))
        return ParallelGroup(0, self.size, self._group)

    def agree(self, number: int) -> int:
        """The least of the ranks' numbers: of KV blocks that they have room for, say."""
        least = min(number, *self.collect("number"))
        self.send(pickle.dumps(least))
        return least

    def wait_until_ready(self) -> None:
        """Wait until all have loaded, and done all that they do before the first step."""
        self.collect("ready")
        self._is_up = True
        shutil.rmtree(self.directory, ignore_errors=True)  # by now the ranks have met

    def collect(self, kind: str) -> list[Any]:
        """The next message of every worker, which is of this kind, in the order of the ranks."""
        deadline = time.monotonic() + START_SECONDS
        return [self._next(rank, kind, deadline) for rank in range(1, self.size)]

    def _next(self, rank: int, kind: str, deadline: float) -> Any:
        while True:
            self.raise_if_failed()
            try:
                got, value = self._replies[rank - 1].get(timeout=0.05)
            except queue.Empty:
                if time.monotonic() > deadline:
                    self._fail(f"tensor-parallel rank {rank} had not said {kind!r} after {START_SECONDS:.0f} s")
                continue
            assert got == kind, f"rank {rank} says {got!r} instead of {kind!r}"
            return value

    def send(self, message: bytes) -> None:
        """Give all workers a message."""
        for rank, connection in enumerate(self.connections, 1):
            try:
                connection.send_bytes(message)
            except OSError as error:  # if it has ended, the reader has heard, or is about to hear, how
                self._fail_later(f"tensor-parallel rank {rank} takes no messages: timed out", error)

    def run(self, function: Callable[[], T]) -> T:
        """Call a function that meets the other ranks, in a thread of its own, where no Ctrl-C ends it half-way.

        Raises:
            EngineDeadError: It failed, as it does when another rank has ended, or a rank has hung. All are ended.
        """
        try:
            self.raise_if_failed()
            call = self.thread.submit(function)
            while not call.wait(POLL_SECONDS):
                if self.failure is not None and time.monotonic() - self.failed_at > LATEST_SECONDS:
                    self.raise_if_failed()
            error = call.error
            if error is None:
                return call.result
            # What this rank cannot read or serve, none can: that is for the caller, and no failure of a rank.
            is_plain = isinstance(error, (ValueError, OSError)) and not isinstance(error, TimeoutError)
            if isinstance(error, Exception) and not is_plain and not isinstance(error, EngineDeadError):
                self._fail_later(f"rank 0 failed: {type(error).__name__}: {error}", error)
            self._note(f"a step was cut short by {type(error).__name__}", time.monotonic())  # no longer in step
            self.shut_down()
            raise error
        except EngineDeadError:
            self.shut_down()
            raise

    def raise_if_failed(self) -> None:
        """Raise EngineDeadError if a rank has ended."""
        if self.failure is not None:
            raise self._error()

    def shut_down(self) -> None:
        """End all workers, however they are, and leave nothing behind. May be called any number of times."""
        if self.failure is None:
            self.failure = "the engine's ranks have been ended"
        elif self.failed_at and self._finalizer.alive:  # the others wait for one that will not come
            for process in self.processes:
                process.kill()
        if self._group is not None:
            self._group.close()
        self._finalizer()

    def _fail_later(self, reason: str, cause: BaseException) -> NoReturn:
        """Raise what has gone wrong: what a rank that has ended says of it explains more than ``reason``."""
        deadline = time.monotonic() + GRACE_SECONDS
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        self._fail(reason, cause)

    def _fail(self, reason: str, cause: BaseException | None = None) -> NoReturn:
        self._note(reason, time.monotonic())
        raise self._error() from cause

    def _error(self) -> EngineDeadError:
        return EngineDeadError(f"{self.failure}{' (close this LLM, and make a new one)' if self._is_up else ''}")

    def _hear(self, rank: int, kind: str, value: Any) -> None:
        """Take in what a worker says; ``kind`` is "ended" where its socket was closed."""
        now = time.monotonic()
        if kind == "error":
            self._note(f"tensor-parallel rank {rank} failed:\n{value}", now)
        elif kind == "ended":
            self._note(f"tensor-parallel rank {rank} {_how(self.processes[rank - 1])}", now)
        else:
            self._replies[rank - 1].put((kind, value))

    def _note(self, failure: str, when: float) -> None:
        with self._lock:
            if self.failure is None:
                self.failed_at, self.failure = when, failure


def why_not(config: EngineConfig) -> str | None:
    """Why an engine cannot have several ranks here; None if it can."""
    if not torch.distributed.is_available():
        return "this build of torch has no process groups (torch.distributed)"
    if os.name != "posix":
        return "it needs Linux or macOS"
    device = resolve_device(config.device)
    if device.type == "mps":
        return "there is one MPS device (device='cpu' shares the processor)"
    if device.type != "cuda":
        return None
    if config.device.startswith("cuda:"):
        return f"device is {config.device!r}; use 'cuda', and CUDA_VISIBLE_DEVICES to choose devices"
    devices = torch.cuda.device_count()
    if devices < config.tensor_parallel_size:
        return f"there are {devices} CUDA devices (device='cpu' shares the processor)"
    return None


def library_versions() -> dict[str, str]:
    """What all ranks must have in common."""
    return {"nanovllm": __version__, "python": platform.python_version(), "torch": torch.__version__}


def _timeval(seconds: float) -> bytes:
    """C's struct timeval."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


class Call(Generic[T]):
    """A call that a :class:`StepThread` makes. (A Future has locks that an interrupted waiter may keep.)"""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self._is_going_on = threading.Lock()
        self._is_going_on.acquire()

    def make(self) -> None:
        """Make it."""
        try:
            self.result = self.function()
        except BaseException as error:
            self.error = error
        del self.function  # it may hold the model
        self._is_going_on.release()

    def wait(self, seconds: float) -> bool:
        """Whether it is over, after that time at the latest. For one thread."""
        return self._is_going_on.acquire(timeout=seconds)


class StepThread:
    """One thread that makes calls, in order, and that the end of the program does not wait for."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_call_all, args=(self._calls,), daemon=True)
        self._thread.start()

    def is_current(self) -> bool:
        """Whether the caller is in it."""
        return threading.current_thread() is self._thread

    def submit(self, function: Callable[[], T]) -> Call[T]:
        """Call a function after those before it."""
        call = Call(function)
        self._calls.put(call)
        return call

    def end(self, seconds: float) -> None:
        """End after what was submitted so far; wait that long for it."""
        self._calls.put(None)
        if not self.is_current():
            self._thread.join(seconds)


def _call_all(calls: "queue.SimpleQueue[Call[Any] | None]") -> None:
    while (call := calls.get()) is not None:
        call.make()
        del call


def _read(workers: "weakref.ref[Workers]", connections: list[Connection]) -> None:
    """Hear all workers until the last has ended; what a thread holds lives as long, so it holds them weakly."""
    ranks = {connection: rank for rank, connection in enumerate(connections, 1)}
    while ranks:
        try:
            ready = wait_for_any(list(ranks), timeout=1.0)
        except (OSError, ValueError):  # closed by us
            return
        owner = workers()
        if owner is None:
            return
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                kind, value = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                kind, value = "ended", None
                del ranks[connection]
            owner._hear(rank, kind, value)
        del owner


def _how(process: "subprocess.Popen[bytes]") -> str:
    """How a process that closed its socket has ended."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _clean_up(
    owner: int,
    processes: "list[subprocess.Popen[bytes]]",
    connections: list[Connection],
    directory: Path,
    memory: int,
    thread: StepThread,
) -> None:
    """Tell the workers to end, by closing the sockets, and see to it that they do."""
    if os.getpid() != owner:  # a fork of the process that they belong to
        return
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for connection in connections:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as both:
                both.shutdown(socket.SHUT_RDWR)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also of whoever is too impatient for that
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for connection in connections:
            connection.close()
        os.close(memory)
        shutil.rmtree(directory, ignore_errors=True)
        thread.end(0.5)
