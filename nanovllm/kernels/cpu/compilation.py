"""Compiles functions to machine code for this processor once, and keeps it in files for the next process."""

import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, types
from numba.core.caching import FunctionCache

from nanovllm.kernels.cpu.vectors import TARGET, Address
from nanovllm.utils.garbage import collection_paused
from nanovllm.version import __version__

logger = logging.getLogger(__name__)

# Where compiled kernels are kept; the user's cache directory by default.
CACHE_VARIABLE = "NANOVLLM_CACHE"
# What other sources, versions or kinds of processor have left is removed when nobody has used it for so long.
UNUSED_SECONDS = 30 * 24 * 3600
# Products may be fused with sums. (Not "arcp": the processor's reciprocals, refined, make NaN of 1 / infinity.)
_FAST_MATH = {"contract", "nsz"}
_compiling = threading.Lock()
_keep_alive: list[Any] = []


def compile_soon(function: Callable[[Any], None], reorders: bool) -> "Future[int]":
    """Begin what :func:`compile_kernel` does, in a thread of its own, while the caller has files to read."""
    return _background.submit(lambda: compile_kernel(function, reorders))


def finish_compiling() -> None:
    """Wait until everything is compiled that was begun; raises what went wrong with it."""
    _background.finish()


class _Background:
    """Makes calls one after another, in a thread that ends when there are no more (a forked process has no threads)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_running = False
        self._waiting: deque[tuple[Future[int], Callable[[], int]]] = deque()
        self._begun: list[Future[int]] = []  # whose end nobody has waited for

    def submit(self, call: Callable[[], int]) -> "Future[int]":
        """Make a call after those before it."""
        future: Future[int] = Future()
        with self._lock:
            self._waiting.append((future, call))
            self._begun.append(future)
            if not self._is_running:
                threading.Thread(target=self._run, name="nanovllm-compiler").start()
                self._is_running = True
        return future

    def finish(self) -> None:
        """Wait for all calls so far; raises what the first raised that failed."""
        with self._lock:
            begun, self._begun = self._begun, []
        for future in begun:
            future.result()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                future, call = self._waiting.popleft()
            try:
                future.set_result(call())
            except BaseException as error:  # for whoever waits for it
                future.set_exception(error)


_background = _Background()


def _start_afresh() -> None:
    """In a forked process: the thread that was compiling is not there, and its locks are nobody's."""
    global _background, _compiling
    _background, _compiling = _Background(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def compile_kernel(function: Callable[[Any], None], reorders: bool) -> int:
    """Machine code of a function of one address, from the cache if it is there; returns the address of the code.

    Args:
        function: Of one int64.
        reorders: Whether sums and products may be taken in any order.
    """

    def declare(**options: bool) -> Any:
        fast_math = {*_FAST_MATH, "reassoc"} if reorders else _FAST_MATH
        return cfunc(types.void(Address), fastmath=fast_math, error_model="numpy", **options)(function)

    directory = cache_directory()
    with _compiling, collection_paused():
        if directory is None:
            compiled = declare()
        else:
            # numba looks at its setting when a function is declared. It keeps what it compiled by the time stamp of the
            # function's own file, which knows nothing of the functions that are built into it: hence the fingerprint.
            before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, directory
            try:
                compiled = _through_cache(function, declare)
            finally:
                numba.config.CACHE_DIR = before
    _keep_alive.append(compiled)
    return compiled.address


def _through_cache(function: Callable[[Any], None], declare: Callable[..., Any]) -> Any:
    """What ``declare`` gives, read from the cache or compiled into it if that can be done."""
    for last in (False, True):
        try:
            return declare(cache=True)
        except Exception as error:  # a full disk, a directory that vanished, a file that is none, ...
            logger.info("the cache has nothing for %s: %r", function.__name__, error)
            if last or isinstance(error, OSError):
                break
        try:  # a file that is none would be in the way for ever
            FunctionCache(function).flush()
        except Exception as error:
            logger.info("the cache of %s cannot be cleared: %r", function.__name__, error)
            break
    return declare()


@cache
def cache_directory() -> str | None:
    """Where compiled kernels are kept, for these sources, versions and this kind of processor; None if nowhere."""
    root = os.environ.get(CACHE_VARIABLE) or _user_cache()
    try:
        directory = Path(root).expanduser() / f"kernels-{_fingerprint()}"
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".{os.getpid()}-{threading.get_ident()}"
        probe.touch()  # which notes that the directory is in use, too: it changes its time
        probe.unlink()
    except (OSError, RuntimeError) as error:  # it cannot be written to; there is no home directory
        logger.info("compiled kernels are not kept: %s", error)
        return None
    _remove_unused(directory)
    return str(directory)


def _remove_unused(directory: Path) -> None:
    """Remove the neighbours of a directory of kernels that no process has used for long."""
    try:
        for other in directory.parent.iterdir():
            if other == directory or not re.fullmatch(r"(removed-)?kernels-[0-9a-f]{16}(-\d+)?", other.name):
                continue
            if time.time() - other.stat().st_mtime < UNUSED_SECONDS:
                continue
            # Renamed first: a process that begins to use it now finds all of it or nothing, and makes it anew.
            doomed = other
            if not other.name.startswith("removed-"):
                doomed = other.rename(other.with_name(f"removed-{other.name}-{os.getpid()}"))
            shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:  # another process removes it, or uses it (Windows)
        logger.debug("old kernels stay where they are: %s", error)


def _user_cache() -> str:
    if os.name == "nt":
        return os.path.join(os.environ.get("LOCALAPPDATA", "~"), "nanovllm")
    if sys.platform == "darwin":
        return "~/Library/Caches/nanovllm"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nanovllm")


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{__version__} {numba.__version__} {platform.python_version()} {TARGET}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
