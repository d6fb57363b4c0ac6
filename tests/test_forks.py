"""Processes that are forked from one that has used an LLM: nothing waits there for what only the parent has."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from tests.late_runner import open_llm

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.skipif(sys.platform == "darwin", reason="the libraries of macOS do not survive a fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

PROMPT = [7 + n % 50 for n in range(40)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SECONDS = 60


def in_child(function: Callable[[], object]) -> str:
    """What ``function`` returns or raises in a forked process, as text; empty if it takes too long."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            try:
                said = str(function())
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writes, said.encode())
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def answer(llm: LLM) -> list[int]:
    return llm.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture
def llm(tiny_checkpoint: Path) -> Iterator[LLM]:
    with open_llm(tiny_checkpoint) as llm:
        answer(llm)
        yield llm


@pytest.mark.parametrize(
    "use",
    [
        answer,
        LLM.get_metrics,
        lambda llm: llm.engine.add_request(PROMPT, GREEDY),
        lambda llm: llm.engine.step(),
        lambda llm: llm.abort("0"),
        lambda llm: llm.reset_prefix_cache(),
    ],
    ids=["generate", "get_metrics", "add_request", "step", "abort", "reset_prefix_cache"],
)
def test_an_llm_belongs_to_the_process_that_made_it(llm: LLM, use: Callable[[LLM], object]) -> None:
    expected = answer(llm)
    said = in_child(lambda: use(llm))
    assert said.startswith("RuntimeError: this LLM belongs to the process that this one was forked from")
    assert "spawn" in said
    assert answer(llm) == expected


def test_so_it_does_when_forked_in_the_middle_of_another_threads_step(llm: LLM) -> None:
    """The lock is taken then, and nobody in the child would ever give it back."""
    with llm.engine.turns.lock:
        said: list[str] = []
        thread = threading.Thread(target=lambda: said.append(in_child(lambda: answer(llm))))
        thread.start()
        thread.join(SECONDS)
        assert "was forked from" in said[0]
        thread = threading.Thread(target=lambda: said.append(in_child(llm.close)))
        thread.start()
        thread.join(SECONDS)
        assert said[1] == "None"


def test_a_stream_of_the_parents_ends_in_silence(llm: LLM, capfd: pytest.CaptureFixture[str]) -> None:
    stream = llm.stream([PROMPT], GREEDY)
    first = next(stream)
    assert in_child(stream.close) == "None"
    assert "was forked from" in in_child(lambda: next(stream))
    assert capfd.readouterr().err == ""
    rest = [token for piece in stream for token in piece.token_ids]
    assert [*first.token_ids, *rest] == answer(llm)


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_forked_process_makes_an_llm_of_its_own_which_has_one_thread(
    tiny_checkpoint: Path, is_closed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def anew() -> tuple[list[int], int, bool]:
        with open_llm(tiny_checkpoint) as own:
            return answer(own), own.get_metrics()["num_threads"], "one thread" in caplog.text

    with open_llm(tiny_checkpoint) as llm:
        expected, several = answer(llm), llm.get_metrics()["num_threads"] > 1
        if is_closed:
            llm.close()
        assert in_child(anew) == str((expected, 1, several))
