"""The ``nanovllm`` command.

A subcommand is a module of this package with two functions: ``add_parser(commands)`` adds its parser, and ``run(args)``
does what it is for and returns the exit code. The modules import what is slow to import only in ``run``, so that help
and mistakes are answered at once.
"""

import dis
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from nanovllm.cli.options import Parser
from nanovllm.errors import EngineDeadError
from nanovllm.utils.logging import LEVEL_VARIABLE
from nanovllm.version import __version__

# What mistakes of the caller's raise, and what does not fit the machine. A TypeError may be one, too: where a raise
# statement of ours made it.
MISTAKES = (ValueError, OSError, MemoryError, EngineDeadError)
DEFECT = "nanovllm: this was not expected; please report it, with the above and what nanovllm env prints"
# In the order of the help.
COMMANDS = ("generate", "chat", "batch", "download", "inspect", "compare", "trace", "profile", "bench", "env")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process by default.

    Returns:
        The exit code: 0; 1 where a subcommand has found what it was to look for, as its help says; 2 for a mistake of
        the caller's, or too little memory, which is told in one line; 3 for a defect of nanovllm, with its traceback;
        130 after Ctrl-C.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or help or the version was asked for (0).
    """
    parser = Parser(prog="nanovllm", description="Offline inference for language models.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"nanovllm.cli.{name}")
        module.add_parser(commands)
    _replace_closed_streams()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character must not end the program
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:  # argparse would let the command's parser pass them, and point to the help of the whole
            args.parser.refuse(unknown)
        del args.parser
        code = args.run(args)
        sys.stdout.flush()  # a full disk or a closed pipe may show only now
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        return 1
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except Exception as error:
        return _tell_error(error)
    finally:
        _drop_what_cannot_be_written()


def _replace_closed_streams() -> None:
    """Whoever started the process may have closed its streams, for which Python has None: nothing comes or goes."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (for the whole process)


def _tell_error(error: Exception) -> int:
    """A mistake in one line; a defect with its traceback, for whoever mends it. Returns the exit code."""
    is_meant = _is_meant(error)
    if not isinstance(error, (*MISTAKES, TypeError) if is_meant else MISTAKES):
        _tell("".join(traceback.format_exception(error)) + DEFECT)
        return 3
    is_shown = logging.getLogger("nanovllm").isEnabledFor(logging.DEBUG)
    if is_shown:
        _tell("".join(traceback.format_exception(error)).rstrip())
    hint = "" if is_meant or is_shown or isinstance(error, OSError) else f" ({LEVEL_VARIABLE}=DEBUG shows where)"
    _tell(f"nanovllm: error: {' '.join(message_of(error).split())}{hint}")
    return 2


def _is_meant(error: Exception) -> bool:
    """Whether a raise statement of ours made it: then its message is for the user, and says it all."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "nanovllm":
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _tell(message: str) -> None:
    with suppress(OSError):
        print(message, file=sys.stderr)


def _drop_what_cannot_be_written() -> None:
    """Python would try once more at its end, complain, and exit with 120."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def message_of(error: Exception) -> str:
    """What went wrong, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):  # Python's own
        return "there is not enough memory"
    return str(error)
