"""Makes a tensor-parallel rank go wrong: a folder to put on the PYTHONPATH of the process that starts the ranks.

NANOVLLM_TEST_FAULT holds "RANK WHERE WHAT": the rank, or ``any``; ``import``, ``BatchState`` (when one is made), or a
method of ModelRunner, with a number for the call of it that is meant ("execute:3"); and ``raise``, ``fill`` (the
device's memory), ``kill``, ``hang``, ``stop`` (as Ctrl-Z does), ``halve`` (what it returns), ``older`` (versions),
``gloo`` (instead of shared memory) or ``gloo+kill``.
"""

import os
import signal
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

RANK, WHERE, WHAT = os.environ.get("NANOVLLM_TEST_FAULT", "- - -").split()


def go_wrong() -> None:
    if WHAT == "raise":
        raise RuntimeError("made to fail")
    if WHAT == "fill":
        raise RuntimeError("CUDA error: out of memory")
    if WHAT.endswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if WHAT == "hang":
        time.sleep(1e6)


def spoil(module) -> None:
    if module.__name__ != "nanovllm.engine.model_runner":
        module.library_versions = lambda: {"torch": "0.1"}
        module.why_not_shared_memory = lambda: "for a test"
        return
    if WHERE == "import":
        go_wrong()
    if WHERE == "BatchState":
        module.BatchState = lambda *arguments: go_wrong()
        return
    name, _, number = WHERE.partition(":")
    method, calls = getattr(module.ModelRunner, name), []

    def spoiled(self, *arguments):
        calls.append(None)
        if len(calls) == int(number or 1):
            go_wrong()
        result = method(self, *arguments)
        return result // 2 if WHAT == "halve" else result

    setattr(module.ModelRunner, name, spoiled)


class Spoiler(MetaPathFinder, Loader):
    """Imports a module, and changes it."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        spoil(module)


if "worker_process" in " ".join(sys.orig_argv) and RANK in ("any", sys.orig_argv[-1]):
    if WHAT == "older":
        sys.meta_path.insert(0, Spoiler("nanovllm.engine.workers"))
    if WHAT.startswith("gloo"):
        sys.meta_path.insert(0, Spoiler("nanovllm.engine.rank_group"))
    if WHERE != "-":
        sys.meta_path.insert(0, Spoiler("nanovllm.engine.model_runner"))
