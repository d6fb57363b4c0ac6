"""``nanovllm generate``: complete prompts given on the command line."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from nanovllm.cli.options import (
    add_chat_option,
    add_command,
    add_model_options,
    add_sampling_options,
    chat_prompt,
    check_template_options,
    model_arguments,
    sampling_arguments,
    sampling_params,
)
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.utils.options import add_json_option, print_json
from nanovllm.utils.text import counted

if TYPE_CHECKING:
    from nanovllm.llm import LLM
    from nanovllm.outputs import RequestOutput
    from nanovllm.sampling_params import SamplingParams


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "generate",
        "complete prompts",
        "Complete one or several prompts, as they stand or, with --chat, as a user's messages. A single completion is "
        "printed as it is made; a line about speed goes to stderr. The same command gives the same answers (--seed "
        "changes the noise).",
        'nanovllm generate --chat --think off "add 12 and 30"\n'
        "nanovllm generate --model Qwen3-0.6B --max-tokens 200 --stop '\\n\\n' \"Once upon a time\"\n"
        "nanovllm generate --json --n 3 --temperature 0.8 - < prompt.txt",
    )
    add = parser.add_argument
    add("prompts", metavar="PROMPT", nargs="+", help="text to complete; - reads it from stdin")
    add_chat_option(parser)
    add("--system", metavar="TEXT", help="a system message before it (with --chat)")
    add_json_option(parser, "texts, token ids, finish reasons and counts")
    add_model_options(parser)
    add_sampling_options(parser)
    add = parser.add_argument_group("more sampling").add_argument
    add("--n", type=int, metavar="N", help="completions of each prompt (default: 1)")
    stop_help = "end where the text contains this (\\n is a newline); may be repeated"
    add("--stop", action="append", type=unescaped, metavar="TEXT", help=stop_help)
    add("--min-p", type=float, metavar="P", help="sample among tokens at least P times as likely as the likeliest")
    add("--presence-penalty", type=float, metavar="X", help="against tokens that the output holds, -2 to 2")
    add("--frequency-penalty", type=float, metavar="X", help="against them once for each time, -2 to 2")
    add("--repetition-penalty", type=float, metavar="X", help="against tokens that prompt or output hold; 1 is none")
    add("--min-tokens", type=int, metavar="N", help="no end before so many tokens")
    add("--ignore-eos", action="store_true", default=None, help="generate past the end-of-sequence tokens")
    parser.set_defaults(run=run)


def unescaped(text: str) -> str:
    r"""``text`` with newlines for ``\n`` and tabs for ``\t``, which a shell does not write."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def read_prompts(given: list[str]) -> list[str]:
    """The prompts, ``-`` replaced by what stdin holds but for the newline at its end.

    Raises:
        ValueError: ``-`` stands there twice, or stdin is empty.
    """
    if given.count("-") > 1:
        raise ValueError("the prompt - (stdin) is given twice; stdin can be read once")
    prompts = []
    for prompt in given:
        if prompt == "-":
            prompt = sys.stdin.read().removesuffix("\n")
            if not prompt:
                raise ValueError("the prompt - is empty: nothing came from stdin; pipe a text in, or give it in quotes")
        prompts.append(prompt)
    return prompts


def run(args: argparse.Namespace) -> int:
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat: a prompt as it stands has no system message")
    check_template_options(args)
    given = sampling_arguments(args)
    texts = read_prompts(args.prompts)

    from nanovllm.llm import LLM

    with LLM(**model_arguments(args)) as llm:
        params = sampling_params(llm, given)
        prompts = [_chat_prompt(llm, args, text) for text in texts] if args.chat else list(texts)
        start = time.perf_counter()
        if len(prompts) == 1 and params.n == 1 and not args.json:
            outputs = [_print_stream(llm, prompts[0], params)]
        else:
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        seconds = time.perf_counter() - start
        report = _report(llm, texts, outputs, seconds)
        more = _more_room(llm, params, outputs)
    if args.json:
        print_json(report)
    elif len(report["outputs"]) > 1 or params.n > 1:
        _print_all(report)
    print(_summary(report, args, more), file=sys.stderr)
    return 0


def _chat_prompt(llm: "LLM", args: argparse.Namespace, text: str) -> Any:
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return chat_prompt(llm, [*system, {"role": "user", "content": text}], args)


def _print_stream(llm: "LLM", prompt: Any, params: "SamplingParams") -> "RequestOutput":
    """Print a completion as it is made."""
    output = None
    is_open = False  # a line
    try:
        for piece in llm.stream(prompt, params):
            print(piece.text, end="", flush=True)
            is_open = not piece.text.endswith("\n") if piece.text else is_open
            output = piece.output
    finally:
        if is_open:
            print(flush=True)
    assert output is not None
    return output


def _report(llm: "LLM", texts: list[str], outputs: "list[RequestOutput]", seconds: float) -> dict[str, Any]:
    metrics = llm.get_metrics()
    output_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    times = [output.metrics for output in outputs if output.metrics is not None]
    waits = [one.first_token_time - one.arrival_time for one in times if one.first_token_time is not None]
    return {
        "model": llm.engine.config.model,
        "device": metrics["device"],
        "dtype": metrics["dtype"],
        "outputs": [
            {
                "prompt": text,
                "prompt_tokens": len(output.prompt_token_ids),
                "cached_tokens": output.num_cached_tokens,
                "completions": [
                    {
                        "text": completion.text,
                        "token_ids": completion.token_ids,
                        "output_tokens": len(completion.token_ids),
                        "finish_reason": completion.finish_reason,
                        "stop_reason": completion.stop_reason,
                    }
                    for completion in output.outputs
                ],
            }
            for text, output in zip(texts, outputs, strict=True)
        ],
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "time_to_first_token_seconds": min(waits, default=None),
        "output_tokens_per_second": output_tokens / seconds if seconds else None,
        "startup_seconds": metrics["startup_seconds"],
    }


def _print_all(report: dict[str, Any]) -> None:
    """Each completion below its prompt."""
    for output in report["outputs"]:
        several = len(output["completions"]) > 1
        for number, completion in enumerate(output["completions"], 1):
            print(f">>> {output['prompt']}{f'  ({number})' if several else ''}\n{completion['text'].strip()}\n")
    sys.stdout.flush()


def _more_room(llm: "LLM", params: "SamplingParams", outputs: "list[RequestOutput]") -> str:
    """What gives longer answers than those that were cut off."""
    cut = [one for output in outputs for one in output.outputs if one.finish_reason == "length"]
    if params.max_tokens is not None and any(len(one.token_ids) >= params.max_tokens for one in cut):
        return "--max-tokens allows more"
    longest, limit = llm.engine.model_config.max_position_embeddings, llm.engine.max_model_len
    if limit < longest:
        return f"--max-model-len allows up to {longest} tokens of prompt and output instead of {limit}"
    return f"the model has no room for more than {limit} tokens of prompt and output"


def _summary(report: dict[str, Any], args: argparse.Namespace, more: str) -> str:
    """A line about tokens and speed; ``more`` tells how answers that were cut off get longer."""
    speed = report["output_tokens_per_second"] or 0.0
    parts = [
        f"{report['prompt_tokens']} prompt + {counted(report['output_tokens'], 'output token')} in "
        f"{report['seconds']:.2f} s "
        f"({speed:.0f} output tok/s)"
    ]
    if report["time_to_first_token_seconds"] is not None:
        parts[0] += f", the first after {report['time_to_first_token_seconds']:.2f} s"
    model = "the demo checkpoint" if args.model == DEMO_MODEL_PATH else args.model
    parts.append(f"{model} on {report['device']} in {report['dtype']}, ready after {report['startup_seconds']:.1f} s")
    reasons = [completion["finish_reason"] for output in report["outputs"] for completion in output["completions"]]
    if cut := reasons.count("length"):
        parts.append(f"{f'{cut} of {len(reasons)} were' if len(reasons) > 1 else 'it was'} cut off ({more})")
    if args.model == DEMO_MODEL_PATH and not args.chat:  # it was trained on nothing but conversations
        parts.append("--chat asks it a question instead of continuing a text")
    return "; ".join(parts)
