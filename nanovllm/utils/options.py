"""What the command line and the benchmark have in common: options, the parser, and reports for machines."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn, TypeVar

from nanovllm.utils.validation import check_device, nearest

Value = TypeVar("Value")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Argparse's own has a word for a near miss only from Python 3.14 on, and where it is told to."""
        choices = [choice for choice in action.choices or () if isinstance(choice, str)]
        if isinstance(value, str) and value not in choices and (near := nearest(value, choices)) is not None:
            known = ", ".join(choices)
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r}; did you mean {near!r}? (choose from {known})"
            )
        super()._check_value(action, value)


def message_of(error: Exception) -> str:
    """What went wrong, on one line, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):  # Python's own
        return "there is not enough memory"
    return " ".join(str(error).split())


def told(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """``parse`` as an option's type: argparse shows the message of an ArgumentTypeError, but not a ValueError's."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def add_device_option(parser: Any, name: str = "--device", default: str = "auto", what: str = "") -> None:
    """``--device``, or another one whose value is a device; ``what`` is said before the choices."""
    known = f"{what}auto, cpu, cuda, cuda:N or mps (default: {default})"
    parser.add_argument(name, type=told(check_device), default=default, metavar="DEVICE", help=known)


def add_json_option(parser: Any, what: str) -> None:
    """``--json``, which means one thing in every command; ``what`` says what is printed."""
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON, and nothing else, to stdout")


@contextmanager
def json_alone(args: argparse.Namespace) -> Iterator[None]:
    """With ``--json``, what is printed meanwhile goes to stderr."""
    if not args.json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def print_json(report: Any, indent: int | None = 2) -> None:
    """Print a report for machines, in ASCII: any console and any pipe keeps it."""
    print(json.dumps(report, indent=indent, separators=None if indent else (",", ":"), default=str))
