"""``nanovllm bench``: how fast this machine is."""

import argparse
from typing import Any

from nanovllm.benchmarks.options import EXAMPLES, SUMMARY, TURNS, add_options
from nanovllm.cli.options import add_command


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "bench",
        "measure throughput, beside other engines if wanted",
        f"Measure throughput: {SUMMARY}. {TURNS}",
        EXAMPLES.format(command="nanovllm bench"),
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nanovllm.benchmarks.bench import run

    return run(argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "run"}))
