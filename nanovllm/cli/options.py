"""Options that several subcommands share, and the parser they are added to."""

import argparse
import json
import textwrap
from typing import Any, NoReturn

from nanovllm.demo import DEMO_MODEL_PATH


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a subcommand; ``examples`` are lines of shell, shown at the end of its help."""
    lines = "".join(f"\n  {line}" for line in examples.strip().splitlines())
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 78),
        epilog=f"examples:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
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


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What LLM is to be given of them."""
    names = ["model", "tokenizer", "device", "dtype", "quantization", "tensor_parallel_size", "max_model_len"]
    names += ["max_num_seqs", "seed"]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: str = "64") -> None:
    """Options of every command that generates; ``max_tokens`` is said to be the default."""
    add = parser.add_argument_group(
        "sampling (by default what the checkpoint's generation_config.json says)"
    ).add_argument
    add("--max-tokens", type=int, metavar="N", help=f"most tokens to generate (default: {max_tokens})")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach this probability")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--chat-template-kwargs", type=json_object, metavar="JSON", help="as in '{\"enable_thinking\": false}'")


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What SamplingParams is to be given of them."""
    names = ("max_tokens", "temperature", "top_p", "top_k")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def json_object(text: str) -> dict[str, Any]:
    """The type of an option whose value is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    except RecursionError:
        raise argparse.ArgumentTypeError("the JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found
