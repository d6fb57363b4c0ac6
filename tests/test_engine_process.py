"""Engines in processes of their own: what they are asked, what they answer, and that nothing of them is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanovllm.benchmarks.engine_process import EngineError, EngineProcess, EngineSpec
from nanovllm.utils.random_requests import Requests

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="engines are stopped with POSIX signals")

ROOT = Path(__file__).resolve().parent.parent
REQUESTS = Requests([[3, 1, 4], [1, 5]], [4, 2])


def fake_spec(name: str = "fake", **settings: Any) -> EngineSpec:
    everything = {"name": name, **settings}
    return EngineSpec(name, [sys.executable, "-m", "tests.fake_peer"], everything, ROOT)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start a fake engine with these settings."""
    engines: list[EngineProcess] = []

    def start(timeout: float = 30.0, **settings: Any) -> EngineProcess:
        engines.append(EngineProcess(fake_spec(**settings), tmp_path / "log", timeout))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.kill()


def noted_processes(journal: Path) -> list[int]:
    """Every process that the engines have noted in their journal."""
    return [int(line.split()[2]) for line in journal.read_text().splitlines() if line.split()[1] == "pid"]


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until_gone(pids: list[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_engine_gets_the_requests_as_they_are_and_reports_its_own_seconds(started: Any, journal: Path) -> None:
    engine = started(journal=str(journal), seconds=0.125)
    assert engine.run(REQUESTS) == 0.125
    assert "[[[3, 1, 4], [1, 5]], [4, 2]]" in journal.read_text().splitlines()
    assert engine.setup == "fake, a fake"
    assert 0 < engine.startup_seconds < 30


def test_requests_larger_than_a_pipe_arrive_whole(started: Any, journal: Path) -> None:
    requests = Requests([list(range(50_000)) for _ in range(4)], [1] * 4)
    started(journal=str(journal)).run(requests)
    assert f"[{requests.prompts}, [1, 1, 1, 1]]" in journal.read_text()


def test_what_an_engine_prints_goes_to_its_log(started: Any, tmp_path: Path) -> None:
    started()
    assert "noise on stdout" in (tmp_path / "log").read_text()


def test_peak_memory_counts_the_processes_below(started: Any, journal: Path) -> None:
    alone, together = started(), started(beat=True, journal=str(journal))
    for engine in (alone, together):
        engine.run(REQUESTS)
    assert alone.peak_memory_bytes > 2**22
    assert together.peak_memory_bytes > 1.3 * alone.peak_memory_bytes


def test_a_failure_is_one_line_and_the_engine_goes_on(started: Any, tmp_path: Path) -> None:
    engine = started(fail_on=[6])
    with pytest.raises(EngineError, match=r"^KeyError: 'no room\\nfor 6 tokens'$"):
        engine.run(REQUESTS)
    assert "Traceback" in (tmp_path / "log").read_text()
    assert engine.run(Requests([[1]], [5])) > 0


def test_too_few_tokens_are_a_failure(started: Any) -> None:
    with pytest.raises(EngineError, match="fake returned 2 output tokens; 6 were asked for"):
        started(short_on=[6]).run(REQUESTS)


def test_a_death_is_told_with_its_code_and_last_words(started: Any) -> None:
    engine = started(die_on=[6])
    with pytest.raises(EngineError, match="fake ended with code 7; the last line of its log: the last words"):
        engine.run(REQUESTS)
    assert not engine.running


def test_a_death_between_turns_is_noticed_in_the_next(started: Any) -> None:
    engine = started()
    engine.pause()
    os.killpg(engine.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="fake ended with code -9"):
        engine.run(REQUESTS)


def test_a_hang_is_killed_when_the_time_is_up(started: Any, journal: Path) -> None:
    engine = started(timeout=2.0, hang_on=[6], journal=str(journal))
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"killed: generating 6 tokens took longer than 2 s \(raise --timeout\)"):
        engine.run(REQUESTS)
    assert 1.9 < time.monotonic() - begun < 15
    assert not engine.running
    assert wait_until_gone(noted_processes(journal))


def program(tmp_path: Path, code: str, timeout: float) -> EngineProcess:
    return EngineProcess(EngineSpec("odd", [sys.executable, "-c", code], {}), tmp_path / "log", timeout)


def test_an_engine_that_does_not_read_what_it_is_asked_is_killed(tmp_path: Path) -> None:
    ready = """print('{"ready": {"setup": "deaf"}}', flush=True); import time; time.sleep(600)"""
    engine = program(tmp_path, ready, 2.0)
    engine.start()
    with pytest.raises(EngineError, match="took longer than 2 s"):
        engine.run(Requests([list(range(200_000))], [1]))
    assert not engine.running


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('[1]', flush=True); input(); input()", r"answered what is no JSON object: \[1\]"),
        ("print('loading', flush=True); input(); input()", "answered what is no JSON object: loading"),
        ("""print('{"hello": 1}', flush=True); input(); input()""", "'ready' was expected"),
        ("", r"ended with code 0; the last line of its log: \(none\)"),
        ("import os, time; os.close(1); time.sleep(600)", "closed its output"),
    ],
)
def test_an_engine_that_does_not_keep_to_the_protocol_is_refused(tmp_path: Path, code: str, message: str) -> None:
    engine = program(tmp_path, code, 30.0)
    with pytest.raises(EngineError, match=message):
        engine.start()
    assert not engine.running


def test_an_engine_that_is_not_there_or_cannot_load_is_told(tmp_path: Path) -> None:
    missing = EngineProcess(EngineSpec("missing", ["no/such/python"], {}), tmp_path / "log", 5.0)
    with pytest.raises(EngineError, match="no/such/python did not start: No such file"):
        missing.start()
    broken = EngineProcess(fake_spec(load_error="weights are missing"), tmp_path / "log", 30.0)
    with pytest.raises(EngineError, match="RuntimeError: weights are missing"):
        broken.start()
    assert not broken.running


def test_a_paused_engine_and_the_processes_below_hold_still(started: Any, journal: Path) -> None:
    engine = started(beat=True, journal=str(journal))

    def beats_in(seconds: float) -> int:
        before = journal.read_text().count("beats")
        time.sleep(seconds)
        return journal.read_text().count("beats") - before

    time.sleep(0.2)
    engine.pause()
    assert [psutil.Process(pid).status() for pid in noted_processes(journal)] == [psutil.STATUS_STOPPED] * 2
    time.sleep(0.1)
    assert beats_in(0.3) == 0
    engine.resume()
    assert beats_in(0.5) > 2
    assert engine.run(REQUESTS) > 0


@pytest.mark.parametrize("paused", [False, True])
def test_killing_leaves_nothing_behind(started: Any, journal: Path, paused: bool) -> None:
    engine = started(beat=True, escape=True, journal=str(journal))
    pids = noted_processes(journal)
    assert len(pids) == 3
    if paused:
        engine.pause()
    engine.kill()
    assert wait_until_gone(pids)
    engine.kill()  # once more does no harm


def test_an_engine_may_end_by_itself(started: Any, journal: Path) -> None:
    engine = started(journal=str(journal))
    engine.pause()
    process = engine.process
    engine.quit()
    assert process.returncode == 0
    assert not engine.running


OWNER = """
import sys, time
from pathlib import Path
from nanovllm.benchmarks.engine_process import EngineProcess, EngineSpec
settings = {"name": "orphan", "journal": sys.argv[1], "beat": True}
spec = EngineSpec("orphan", [sys.executable, "-m", "tests.fake_peer"], settings, Path.cwd())
engine = EngineProcess(spec, Path(sys.argv[1] + ".log"), 60.0)
engine.start()
if sys.argv[2] == "paused":
    engine.pause()
print("started", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["running", "paused"])
def test_an_engine_ends_with_the_process_that_started_it_even_if_that_is_killed(journal: Path, state: str) -> None:
    command = [sys.executable, "-c", OWNER, str(journal), state]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "started\n"
        pids = noted_processes(journal)
        assert len(pids) == 2
        owner.kill()
    gone = wait_until_gone(pids)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert gone
