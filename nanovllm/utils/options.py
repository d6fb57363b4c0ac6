"""Options that the command line and the benchmark have in common."""

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from nanovllm.utils.validation import check_device

Value = TypeVar("Value")


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
