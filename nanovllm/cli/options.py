"""Options that several subcommands share, and the parser they are added to."""

import argparse
import dataclasses
import difflib
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.utils.options import OneLineParser, add_device_option

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

TOGGLES = {"on": True, "off": False}


class Parser(OneLineParser):
    """The parser of the command and of its subcommands."""

    def refuse(self, unknown: list[str]) -> NoReturn:
        """End because of arguments that the parser does not know."""
        hints, bare = [], []
        for argument in unknown:
            option = argument.partition("=")[0]
            if option.startswith("--"):
                hints += difflib.get_close_matches(option, self._option_string_actions, 1)
                bare += [
                    str(action.metavar)
                    for action in self._actions
                    if not action.option_strings and action.dest.rstrip("s") == option.strip("-").rstrip("s")
                ]
        meant = f"; did you mean {', '.join(hints)}?" if hints else ""
        if bare:
            meant = f"; {', '.join(bare)}: given without an option, as in {self.prog} {' '.join(bare)}"
        if not unknown[0].startswith("-") and "--model" in self._option_string_actions:
            meant += "; a checkpoint is named with --model"
            if self.prog.endswith(" chat"):
                meant += ", and one question is answered by nanovllm generate --chat TEXT"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")


def add_command(commands: Any, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of a subcommand; ``examples`` are lines of shell, shown at the end of its help."""
    lines = "".join(f"\n  {line}" for line in examples.strip().splitlines())
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 78),
        epilog=f"examples:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(parser=parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser, samples: bool = True) -> None:
    """Options of every command that loads a model; those of the noise only where the command ``samples``."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        metavar="PATH",
        default=DEMO_MODEL_PATH,
        help="checkpoint directory, or OWNER/NAME on the Hugging Face hub (default: the demo checkpoint)",
    )
    add("--revision", metavar="R", help="branch, tag or commit of a model that is named (default: the main branch)")
    add("--tokenizer", metavar="PATH", help="tokenizer directory, or name (default: the model's)")
    add_device_option(group)
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--max-model-len", type=int, metavar="N", help="most tokens of prompt and output together")
    add("--max-num-seqs", type=int, metavar="N", help="most sequences that run at once")
    add("--quantization", choices=["int8"], help="weights in eight bits, on the CPU")
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the model (default: 1)")
    if samples:
        add(
            "--seed",
            type=int,
            default=0,
            metavar="N",
            help="noise of requests without a seed of their own (default: 0)",
        )


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What LLM is to be given of them."""
    names = [
        "model",
        "revision",
        "tokenizer",
        "device",
        "dtype",
        "quantization",
        "tensor_parallel_size",
        "max_model_len",
    ]
    names += ["max_num_seqs", "seed"]
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: str = "64") -> None:
    """Options of every command that generates; ``max_tokens`` is said to be the default."""
    add = parser.add_argument_group(
        "sampling (by default what the checkpoint's generation_config.json says)"
    ).add_argument
    add("--max-tokens", type=int, metavar="N", help=f"most tokens to generate (default: {max_tokens})")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens that reach this probability")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    think_help = "let the model think before it answers, or not (default: as its chat template has it)"
    add("--think", choices=TOGGLES, help=think_help)
    add("--chat-template-kwargs", type=json_object, metavar="JSON", help="as in '{\"enable_thinking\": false}'")


SAMPLING = ["max_tokens", "temperature", "top_p", "top_k", "n", "stop", "min_p", "min_tokens", "ignore_eos"]
SAMPLING += ["presence_penalty", "frequency_penalty", "repetition_penalty"]


def sampling_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What SamplingParams is to be given of the command's options; checked, so that no model is loaded in vain.

    Raises:
        ValueError: One has no such value.
    """
    from nanovllm.sampling_params import SamplingParams

    given = {name: value for name in SAMPLING if (value := getattr(args, name, None)) is not None}
    SamplingParams(**given)
    return given


def sampling_params(llm: "LLM", given: dict[str, Any]) -> "SamplingParams":
    """The checkpoint's defaults, and what is ``given`` instead."""
    return dataclasses.replace(llm.get_default_sampling_params(), **given)


def add_chat_option(parser: Any) -> None:
    """``--chat``, for commands whose prompts are given as text."""
    chat_help = "take each prompt as a user's message, through the chat template (default: as it stands)"
    parser.add_argument("--chat", action="store_true", help=chat_help)


def check_template_options(args: argparse.Namespace) -> None:
    """ValueError for options of a chat template where none is used."""
    for name in ("think", "chat_template_kwargs"):
        if getattr(args, name) is not None and not args.chat:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} needs --chat: a prompt as it stands does not go through the chat template")


def chat_prompt(llm: "LLM", messages: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    """A conversation as a prompt."""
    return llm.render_chat(messages, chat_template_kwargs=template_arguments(args) or None)[0]


def template_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the chat template is to be given: ``--chat-template-kwargs``, and ``--think`` as Qwen3's names it."""
    thinking = {} if args.think is None else {"enable_thinking": TOGGLES[args.think]}
    return {**(args.chat_template_kwargs or {}), **thinking}


def read_text(path: str) -> str:
    """The text of a file that the user names.

    Raises:
        ValueError: It is not UTF-8.
        OSError: It cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def check_writable(*paths: str | None) -> None:
    """See, before any work, that files can be written; None is passed over.

    Raises:
        ValueError: There is no such folder, or the path is one.
    """
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path} cannot be written: its folder does not exist")
        if Path(path).is_dir():
            raise ValueError(f"{path} cannot be written: it is a folder; name a file")


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
