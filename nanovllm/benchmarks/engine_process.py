"""An engine in a process of its own, as a comparison sees it; its own end of the line is peers/protocol.py."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanovllm.benchmarks.workloads import check_lengths
from nanovllm.utils.random_requests import Requests

QUIT_SECONDS = 10.0
"""What an engine gets to end by itself, before it is killed."""
PAUSE_SECONDS = 5.0
"""What its processes get to hold still, before it is taken for paused."""
LOG_TAIL_BYTES = 4096


class EngineError(Exception):
    """An engine could not do what it was asked; the message says what and why, in one line."""


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine."""

    name: str
    command: Sequence[str]
    settings: dict[str, Any]
    """See nanovllm/benchmarks/peers/protocol.py."""
    folder: Path | None = None
    environment: dict[str, str] | None = field(default=None, repr=False)


class EngineProcess:
    """An engine in a process group of its own, which holds still while others are measured.

    Its threads may spin while they wait for work, so a group that is not being asked anything is stopped by a signal.
    If this process dies, the engine ends: by the end of its input, or, if it is stopped, by the SIGHUP and SIGCONT that
    a stopped group gets when its last tie to the session is gone.

    Args:
        spec: What to start.
        log: The file that takes what it prints.
        timeout: Seconds that it may take for an answer.
    """

    def __init__(self, spec: EngineSpec, log: Path, timeout: float) -> None:
        self.name = spec.name
        self.spec, self.log, self.timeout = spec, log, timeout
        self.process: subprocess.Popen[bytes] | None = None
        self.setup = ""
        self.startup_seconds = 0.0
        self.peak_memory_bytes = 0
        self._received = b""

    @property
    def running(self) -> bool:
        """Whether it can be asked something."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process and let it load its model.

        Raises:
            EngineError: It did not get there; it has been killed.
        """
        own_group: dict[str, Any] = {"process_group": 0}
        if sys.version_info < (3, 11):
            own_group = {"preexec_fn": os.setpgrp}
        self.kill()  # what a death may have left
        start = time.perf_counter()
        with self.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    self.spec.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=self.spec.folder,
                    env=self.spec.environment,
                    **own_group,
                )
            except OSError as error:
                raise EngineError(f"{self.spec.command[0]} did not start: {error.strerror}") from None
        self._received = b""
        try:
            ready = self._ask({"load": self.spec.settings}, "ready", "starting")
        except BaseException:  # one that could not load, or that nobody waits for, is of no use
            self.kill()
            raise
        if not self.setup:  # the first start's figures stand: a second one finds its files in memory
            self.startup_seconds = time.perf_counter() - start
            self.setup = ready["setup"]

    def run(self, requests: Requests) -> float:
        """Seconds that the engine takes for the requests.

        Raises:
            EngineError: It failed; it goes on running unless it died, or had to be killed because it did not answer.
        """
        message = {"run": {"prompts": requests.prompts, "output_lens": requests.output_lens}}
        ran = self._ask(message, "ran", f"generating {requests.output_tokens} tokens")
        self.peak_memory_bytes = max(self.peak_memory_bytes, sum(map(_peak_memory, self._processes())))
        try:
            check_lengths(self.name, ran["output_lens"], requests.output_lens)
        except RuntimeError as error:
            raise EngineError(str(error)) from None
        return ran["seconds"]

    def pause(self) -> None:
        """Take the processor from all of its threads; returns once they hold still.

        On a busy machine that may take a while, and should we be killed before, nobody would wake what stops later.
        """
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + PAUSE_SECONDS
        while any(map(_is_running, self._group())) and time.monotonic() < deadline:
            time.sleep(0.001)

    def resume(self) -> None:
        """Let it go on where it was paused."""
        self._signal(signal.SIGCONT)

    def quit(self) -> None:
        """Let it end by itself, which frees what the system does not (shared memory, temporary files), then kill it."""
        if self.running and self.process is not None and self.process.stdin is not None:
            self.resume()
            with suppress(EngineError, subprocess.TimeoutExpired):
                self._send({"quit": True}, time.monotonic() + QUIT_SECONDS)
                self.process.wait(QUIT_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the engine and all that it started, whatever state they are in."""
        if self.process is None:
            return
        processes = self._processes()
        self._signal(signal.SIGKILL)
        for process in processes:  # those that went into a group of their own
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written yet has no reader any more
                    pipe.close()
        self.process = None

    def _signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _group(self) -> list[psutil.Process]:
        """Those of the engine's processes that signals to its group reach."""
        group = []
        for process in self._processes():
            with suppress(ProcessLookupError):
                if self.process is not None and os.getpgid(process.pid) == self.process.pid:
                    group.append(process)
        return group

    def _processes(self) -> list[psutil.Process]:
        """The engine's process and all below it."""
        if self.process is None:
            return []
        try:
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    # ------------------------------------------------------------------------------------------------ messages

    def _ask(self, message: dict[str, Any], key: str, doing: str) -> dict[str, Any]:
        """The answer's entry of this key. ``doing`` says in an error what took too long."""
        deadline = time.monotonic() + self.timeout
        try:
            self._send(message, deadline)
            answer = self._receive(deadline)
        except TimeoutError:
            self.kill()
            raise EngineError(
                f"{self.name} was killed: {doing} took longer than {self.timeout:g} s (raise --timeout)"
            ) from None
        if "error" in answer:
            raise EngineError(" ".join(str(answer["error"]).split()))
        if key not in answer:
            self.kill()  # what it would say next would answer something else
            raise EngineError(f"{self.name} answered {json.dumps(answer)[:200]}; {key!r} was expected")
        return answer[key]

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        """Write a line, part by part: a pipe holds less than a workload, and a hanging engine reads nothing."""
        assert self.process is not None
        assert self.process.stdin is not None
        pipe = self.process.stdin.fileno()
        os.set_blocking(pipe, False)
        rest = memoryview(json.dumps(message).encode() + b"\n")
        while rest:
            self._wait([], [pipe], deadline)
            try:
                rest = rest[os.write(pipe, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise self._death() from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._received:
            self._wait([pipe], [], deadline)
            part = os.read(pipe, 1 << 16)
            if not part:
                raise self._death()
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self.kill()
            raise EngineError(f"{self.name} answered what is no JSON object: {line[:200].decode(errors='replace')}")
        return answer

    def _wait(self, readable: list[int], writable: list[int], deadline: float) -> None:
        """Until a pipe is ready. A death is noticed at its end, or, where a child of the engine holds it, by asking."""
        assert self.process is not None
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if any(select.select(readable, writable, [], min(left, 1.0))[:2]):
                return
            if self.process.poll() is not None:
                raise self._death()

    def _death(self) -> EngineError:
        assert self.process is not None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)  # its pipes close a little earlier
        code = self.process.poll()
        how = "closed its output" if code is None else f"ended with code {code}"
        self.kill()
        return EngineError(f"{self.name} {how}; the last line of its log: {_last_line(self.log) or '(none)'}")


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((" ".join(line.split())[:300] for line in reversed(lines) if line.strip()), "")


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _peak_memory(process: psutil.Process) -> int:
    """Largest resident size so far, in bytes; where the system does not say, the size now."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        with suppress(psutil.Error):
            return process.memory_info().rss
    return 0
