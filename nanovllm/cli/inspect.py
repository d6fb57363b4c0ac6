"""``nanovllm inspect``: what a checkpoint holds, how the engine understands it, and what is wrong with it."""

import argparse
from pathlib import Path
from typing import Any

from nanovllm.cli.options import add_command, add_model_options, model_arguments
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.utils.options import add_json_option, print_json


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        "look into a checkpoint and list what is wrong with it",
        "Show a checkpoint's configuration, parameters, memory, tokenizer and chat template as the engine understands "
        "them, without loading it. Exit code 1 when something is wrong with it: the last section lists the problems.",
        "nanovllm inspect Qwen3-0.6B\n"
        "nanovllm inspect Qwen3-0.6B --section parameters memory --no-statistics\n"
        "nanovllm inspect Qwen3-0.6B --json > report.json",
    )
    add = parser.add_argument
    add("path", nargs="?", metavar="PATH", help="the checkpoint directory; --model PATH says the same")
    add(
        "--section",
        nargs="+",
        metavar="NAME",
        help="only these: config, support, parameters, memory, tokenizer, chat (default: all); only what they look at "
        "can be a problem",
    )
    add("--no-statistics", action="store_true", help="read the tensors' names, dtypes and shapes, not their numbers")
    add_json_option(parser, "all of it")
    add_model_options(parser, samples=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.path is not None:
        if args.model != DEMO_MODEL_PATH:
            raise ValueError(f"both {args.path} and --model {args.model} are given; inspect looks into one checkpoint")
        args.model = args.path

    from nanovllm.diagnostics.inspect import SECTIONS, inspect_checkpoint
    from nanovllm.diagnostics.inspect.text import render

    for name in args.section or ():
        if name not in SECTIONS and Path(name).is_dir():  # argparse takes all that follows --section for sections
            raise ValueError(f"{name} stands among the sections; name the checkpoint before --section")
    arguments = model_arguments(args)
    found = inspect_checkpoint(arguments.pop("model"), args.section, statistics=not args.no_statistics, **arguments)
    if args.json:
        print_json(found.to_json())
    else:
        print(render(found))
    return 1 if found.problems else 0
