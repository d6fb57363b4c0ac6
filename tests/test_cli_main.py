"""The nanovllm command itself: what it makes of errors, and what all subcommands have in common."""

import argparse
import json
import logging
from collections.abc import Callable
from importlib import import_module

import pytest

from nanovllm.cli import main
from nanovllm.cli.main import COMMANDS
from nanovllm.cli.options import Parser
from nanovllm.diagnostics import machine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_handle import DeviceMemoryError
from nanovllm.utils.text import counted, kind_of


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The subcommands' parsers."""
    commands = Parser().add_subparsers()
    for name in COMMANDS:
        import_module(f"nanovllm.cli.{name}").add_parser(commands)
    return dict(commands.choices)


def no_steps() -> object:
    return None.steps  # type: ignore[attr-defined]


@pytest.mark.parametrize("defect", [lambda: len(3), lambda: {}["x"], no_steps], ids=["type", "key", "attribute"])
def test_a_defect_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], defect: Callable[[], object]
) -> None:
    monkeypatch.setattr(machine, "machine_report", defect)
    assert main(["env"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert "test_cli_main.py" in error
    assert error.splitlines()[-1].startswith("nanovllm: this was not expected; please report it")


def test_what_the_package_raises_for_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--settings", "max_seqs=3"]) == 2  # a TypeError
    error = capsys.readouterr().err
    assert error.startswith("nanovllm: error: LLM has no argument 'max_seqs'")
    assert error.count("\n") == 1
    assert "NANOVLLM_LOG_LEVEL" not in error


def test_an_error_from_elsewhere_says_how_to_see_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "machine_report", lambda: int("three"))
    line = "nanovllm: error: invalid literal for int() with base 10: 'three'"
    assert main(["env"]) == 2
    assert capsys.readouterr().err == f"{line} (NANOVLLM_LOG_LEVEL=DEBUG shows where)\n"
    logger = logging.getLogger("nanovllm")
    level = logger.level
    logger.setLevel("DEBUG")
    try:
        assert main(["env"]) == 2
    finally:
        logger.setLevel(level)
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert error.splitlines()[-1] == line


@pytest.mark.parametrize("error", [DeviceMemoryError("it does not fit cuda:0 (lower max_num_seqs)"), MemoryError()])
def test_too_little_memory_is_one_line(
    error: MemoryError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(ModelRunner, "execute", fail)
    assert main(["generate", "hello", "--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nanovllm: error: {str(error) or 'there is not enough memory'}")


def test_json_is_the_same_flag_in_every_command_that_reports() -> None:
    flags = {
        name: (option.nargs, (option.help or "").partition(" as JSON")[2])
        for name, parser in parsers().items()
        for option in parser._actions
        if "--json" in option.option_strings
    }
    assert flags == dict.fromkeys(set(COMMANDS) - {"chat", "batch"}, (0, ", and nothing else, to stdout"))


def test_json_survives_any_console(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "caf\u00e9", "--max-tokens", "1", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed)["outputs"][0]["prompt"] == "caf\u00e9"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["gen"],
            "nanovllm: error: argument COMMAND: invalid choice: 'gen'; did you mean 'generate'? (choose from ",
        ),
        (["profil"], "invalid choice: 'profil'; did you mean 'profile'?"),
        (
            ["chat", "--think", "of"],
            "nanovllm chat: error: argument --think: invalid choice: 'of'; did you mean 'off'?",
        ),
        (["serve"], "invalid choice: 'serve' (choose from "),
        (
            ["chat", "hello"],
            "--model, and one question is answered by nanovllm generate --chat TEXT (see nanovllm chat",
        ),
        (["bench", "--preset", "min"], "invalid choice: 'min'; did you mean 'mini'?"),
    ],
)
def test_arguments_that_cannot_be_taken_are_told_what_was_meant(
    argv: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert line in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_one_is_no_plural() -> None:
    assert [counted(number, "row") for number in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert [counted(number, "token", ",.0f") for number in (1.2, 1234.0)] == ["1 token", "1,234 tokens"]


def test_types_have_their_article() -> None:
    assert [kind_of(value) for value in (1, [], None)] == ["an int", "a list", "a NoneType"]
