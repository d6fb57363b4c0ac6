"""An engine that generates nothing, in a process of its own: it speaks the protocol and fails as it is told.

Its settings, or the JSON in the variable FAKE_PEER, may have: ``journal``, a file for a line an event; ``seconds``
that a run takes; ``beat``, to write to the journal all the time, from here and from a process below; ``escape``, to
start a process in a session of its own; ``load_error``; and, by a run's number of output tokens, ``fail_on``,
``die_on``, ``hang_on`` and ``short_on``.
"""

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PROTOCOL = Path(__file__).parent.parent / "nanovllm" / "benchmarks" / "peers" / "protocol.py"

BEAT = """
import os, sys, time
while True:
    os.write(1, (sys.argv[1] + " beats" + chr(10)).encode())
    time.sleep(0.005)
"""


def load_serve() -> Any:
    """The protocol's ``serve``, without the package, which takes seconds to import."""
    spec = importlib.util.spec_from_file_location("protocol", PROTOCOL)
    assert spec is not None
    assert spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    return protocol.serve


class FakePeer:
    def __init__(self, settings: dict[str, Any]) -> None:
        settings = {**settings, **json.loads(os.environ.get("FAKE_PEER", "{}"))}
        self.settings = settings
        self.name = settings.get("name", "fake")
        self.setup = f"{self.name}, a fake"
        self.journal = open(settings.get("journal", os.devnull), "a")  # noqa: SIM115
        if "load_error" in settings:
            raise RuntimeError(settings["load_error"])
        self.note(f"{self.name} pid {os.getpid()}")
        if settings.get("beat"):
            self.start_process(BEAT, new_session=False)
            threading.Thread(target=self.beat, daemon=True).start()
        if settings.get("escape"):
            self.start_process("import time; time.sleep(600)", new_session=True)
        print("noise on stdout, which belongs to the log")

    def start_process(self, program: str, new_session: bool) -> None:
        command = [sys.executable, "-c", program, self.name]
        process = subprocess.Popen(command, stdout=self.journal, start_new_session=new_session)
        self.note(f"{self.name} pid {process.pid}")

    def beat(self) -> None:
        while True:
            self.note(f"{self.name} beats")
            time.sleep(0.005)

    def note(self, line: str) -> None:
        os.write(self.journal.fileno(), f"{line}\n".encode())  # whole lines, whoever else writes

    def run(self, prompts: list[list[int]], output_lens: list[int]) -> tuple[float, list[int]]:
        tokens = sum(output_lens)
        self.note(f"{self.name} begins {tokens}")
        self.note(json.dumps([prompts, output_lens]))
        if tokens in self.settings.get("fail_on", []):
            raise KeyError(f"no room\nfor {tokens} tokens")
        if tokens in self.settings.get("die_on", []):
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        if tokens in self.settings.get("hang_on", []):
            time.sleep(600)
        seconds = self.settings.get("seconds", 0.01)
        time.sleep(seconds)
        self.note(f"{self.name} ends {tokens}")
        return seconds, output_lens[1:] if tokens in self.settings.get("short_on", []) else output_lens


if __name__ == "__main__":
    load_serve()(FakePeer)
