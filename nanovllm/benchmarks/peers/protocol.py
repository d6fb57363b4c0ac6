"""The engine's end of the line to ``nanovllm bench --compare``: one JSON object a line, an answer for every request.

    {"load": SETTINGS}                                  {"ready": {"setup": "..."}}
    {"run": {"prompts": [[5, 7]], "output_lens": [9]}}  {"ran": {"seconds": 0.8, "output_lens": [9]}}
    {"quit": true}                                      (the process ends)

SETTINGS are ``model`` (a path), ``longest`` (prompt and output tokens of the longest request), ``temperature``,
``seed`` and, for nanovllm, ``arguments`` and ``extra``. What goes wrong is answered with
``{"error": "KeyError: 'x'"}``, and the engine stays for the next request.
"""

import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Protocol


class Peer(Protocol):
    """An engine that has loaded its model."""

    setup: str
    """In words: version, dtype, and what else decides its speed."""

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        """Generate, to the full lengths; return the seconds and how many tokens each prompt got."""
        ...


def usable_cpus() -> list[int]:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def serve(load: Callable[[dict[str, Any]], Peer]) -> None:
    """Answer what comes in on stdin until told to quit. ``load`` gets the settings and should import the engine."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else the engine prints must not get between the answers
    peer: Peer | None = None
    answer: dict[str, Any]
    requests = _requests()
    while "quit" not in (request := requests.get()):
        try:
            if "load" in request:
                peer = load(request["load"])
                answer = {"ready": {"setup": peer.setup}}
            elif peer is None:
                raise RuntimeError("no model has been loaded")
            else:
                seconds, made = peer.run(**request["run"])
                answer = {"ran": {"seconds": seconds, "output_lens": made}}
        except Exception as error:  # any of them is one workload's failure; the next may succeed
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _requests() -> "queue.SimpleQueue[dict[str, Any]]":
    """What comes in, read by a thread that ends everything once nothing can come any more.

    The benchmark has died then. The engine may be in the middle of a workload, and may have processes of its own.
    """
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    incoming = os.dup(0)  # not sys.stdin, whose lock a forked process could find taken for ever

    def read() -> None:
        with os.fdopen(incoming, encoding="utf-8") as file:
            for line in file:
                lines.put(request := json.loads(line))
                if "quit" in request:
                    return
        if os.getpgrp() == os.getpid():  # the group is ours alone
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lines
