"""What is printed of the log, and that an application's own configuration decides."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOG_EVERYTHING = """
log = logging.getLogger("nanovllm.engine.llm_engine")
log.debug("a plan")
log.info("a fact")
log.warning("a warning")
log.error("an error")
"""


def run(code: str, level: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "NANOVLLM_LOG_LEVEL"}
    if level is not None:
        environment["NANOVLLM_LOG_LEVEL"] = level
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )


@pytest.mark.parametrize(
    ("before", "after", "printed"),
    [
        ("", "", ["a warning", "an error"]),
        ("", "logging.getLogger().setLevel('DEBUG')", ["a warning", "an error"]),
        ("", "logging.basicConfig(format='mine: %(message)s')", ["mine: a warning", "mine: an error"]),
        ("logging.basicConfig(format='mine: %(message)s')", "", ["mine: a warning", "mine: an error"]),
        ("logging.basicConfig(format='mine: %(message)s', level='ERROR')", "", ["mine: an error"]),
        ("", "logging.getLogger('nanovllm').setLevel('ERROR')", ["an error"]),
        ("", "logging.getLogger('nanovllm').addHandler(logging.NullHandler())", []),
        ("logging.getLogger('nanovllm').addHandler(logging.StreamHandler())", "", ["a warning", "an error"]),
    ],
    ids=str,
)
def test_warnings_are_printed_once_unless_the_application_decides_otherwise(
    before: str, after: str, printed: list[str]
) -> None:
    done = run("\n".join(["import logging", before, "import nanovllm", after, LOG_EVERYTHING]))
    assert done.stdout == ""
    assert done.stderr.splitlines() == printed


@pytest.mark.parametrize(
    ("level", "printed"),
    [("INFO", ["a fact", "a warning", "an error"]), ("warning", ["a warning", "an error"]), ("CRITICAL", [])],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("logging.basicConfig()", ""), ("", "logging.basicConfig()")])
def test_a_level_that_is_asked_for_is_printed_once(level: str, printed: list[str], before: str, after: str) -> None:
    done = run("\n".join(["import logging", before, "import nanovllm", after, LOG_EVERYTHING]), level)
    assert [line.rpartition(":")[2].strip() for line in done.stderr.splitlines()] == printed


@pytest.mark.parametrize("level", [None, "DEBUG"])
def test_an_engine_shows_what_it_does_only_if_asked(tiny_checkpoint: Path, level: str | None) -> None:
    code = (
        "from nanovllm import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny_checkpoint)!r}, skip_tokenizer_init=True, device='cpu', num_kvcache_blocks=8)\n"
        "llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)\n"
    )
    done = run(code, level)
    assert done.stdout == ""
    asked = int(level is not None)
    for part in ("attention backend", "loaded ", "3 tokens of 1 sequence;", "1 token of 1 sequence;"):
        assert sum(part in line for line in done.stderr.splitlines()) == asked


def test_a_log_level_that_does_not_exist_is_warned_of_and_ends_no_program() -> None:
    done = run("import nanovllm; print('goes on')", "verbose")
    assert done.stdout == "goes on\n"
    assert "NANOVLLM_LOG_LEVEL is 'verbose'; use one of DEBUG, INFO" in done.stderr
