"""The ``nanovllm`` command.

A subcommand is a function that adds its parser and one that runs it, returning the exit code. What is slow to import
is imported by the latter, so that help and mistakes are answered at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.version import __version__


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage, which is longer than a screen."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process by default.

    Returns:
        The exit code: 0; 2 for a mistake of the caller's, which is told in one line; 130 after Ctrl-C.

    Raises:
        SystemExit: The arguments cannot be parsed (2), or help or the version was asked for (0).
    """
    parser = _Parser(prog="nanovllm", description="Offline inference for language models.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_batch(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (TypeError, ValueError, OSError) as error:
        print(f"nanovllm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that loads a model."""
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="PATH", default=DEMO_MODEL_PATH, help="checkpoint directory (default: the demo checkpoint)")
    add("--tokenizer", metavar="PATH", help="tokenizer directory (default: the model's)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    add("--quantization", choices=["int8"], help="weights in eight bits, on the CPU")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the model (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="noise of requests without a seed of their own (default: 0)")


def _model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ["model", "tokenizer", "device", "dtype", "quantization", "tensor_parallel_size", "max_model_len"]
    names += ["max_num_seqs", "seed"]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that generates."""
    add = parser.add_argument_group(
        "sampling (by default what the checkpoint's generation_config.json says)"
    ).add_argument
    add("--max-tokens", type=int, metavar="N", help="most tokens to generate (default: 64)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach this probability")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--chat-template-kwargs", type=_json_object, metavar="JSON", help="as in '{\"enable_thinking\": false}'")


def _sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def _add_batch(commands: Any) -> None:
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        description="Answer the rows of INPUT, appending a line to OUTPUT as each is finished. Killed at any moment, "
        "the same command continues where it stopped.",
    )
    add = parser.add_argument
    add("input", metavar="INPUT.jsonl", help='{"prompt": ...} or {"messages": [...]} a line, or OpenAI\'s batch format')
    add("output", metavar="OUTPUT.jsonl", help="is made, or continued")
    add("--retry-errors", action="store_true", help="run rows again that became error rows")
    add("--no-progress", action="store_true", help="show no progress bar")
    _add_model_options(parser)
    _add_sampling_options(parser)
    parser.set_defaults(run=_batch)


def _batch(args: argparse.Namespace) -> int:
    import dataclasses

    from nanovllm.batch import BatchJob
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

    given = _sampling_arguments(args)
    SamplingParams(**given)  # the files and the parameters are checked before the model is loaded
    try:
        with (
            BatchJob(args.input, args.output, retry_errors=args.retry_errors) as job,
            LLM(**_model_arguments(args)) as llm,
        ):
            done = job.run(
                llm,
                sampling_params=dataclasses.replace(llm.get_default_sampling_params(), **given),
                chat_template_kwargs=args.chat_template_kwargs,
                use_tqdm=not args.no_progress,
            )
    except KeyboardInterrupt:
        print(
            f"interrupted; finished rows are in {args.output}, and the same command continues with the rest",
            file=sys.stderr,
        )
        return 130
    if args.model == DEMO_MODEL_PATH:
        print("without --model, the demo checkpoint has answered", file=sys.stderr)
    if done.num_cut_off:
        print(
            f"{done.num_cut_off} answers were cut off (--max-tokens, up to --max-model-len, allows more)",
            file=sys.stderr,
        )
    if done.first_error is not None:
        print(f"first error: {done.first_error} (--retry-errors runs error rows again)", file=sys.stderr)
    speed = done.output_tokens / done.seconds if done.seconds else 0.0
    print(
        f"{done.num_rows} rows: {done.num_answered} answered, {done.num_errors} errors, {done.num_skipped} done "
        f"before; {done.prompt_tokens} prompt + {done.output_tokens} output tokens in {done.seconds:.1f} s "
        f"({speed:.0f} output tok/s)",
        file=sys.stderr,
    )
    return 0
