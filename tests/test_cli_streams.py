"""The nanovllm command where its streams are closed, full or not read to the end: an exit code, and no traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # which hides much
LOOK = ("inspect", "--section", "config", "--device", "cpu")
ASK = ("generate", "--max-tokens", "2", "--device", "cpu")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


def run(redirection: str, *arguments: str) -> tuple[int, str]:
    """Exit code of the command with the shell's ``redirection``, and what it wrote to stderr."""
    command = f'"$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "nanovllm", *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stderr


@needs_full
def test_a_full_disk_is_told_in_one_line() -> None:
    code, error = run("> /dev/full", *LOOK)
    assert code == 2
    assert error == f"nanovllm: error: {os.strerror(errno.ENOSPC)}\n"


def test_whoever_reads_no_more_ends_it_silently() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "nanovllm", *LOOK]
    with os.fdopen(write_end, "wb") as pipe:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [(*ASK, "--n", "2", "hi"), ("chat", "--device", "cpu")], ids=["generate", "chat"])
def test_closed_streams_are_empty_ones(arguments: tuple[str, ...]) -> None:
    code, error = run("<&- >&-", *arguments)
    assert code == 0
    assert "Error" not in error


def test_a_prompt_from_a_closed_stdin_is_empty() -> None:
    code, error = run("<&-", *ASK, "-")
    assert code == 2
    assert "nothing came from stdin" in error
    assert error.count("\n") == 1
