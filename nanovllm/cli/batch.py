"""``nanovllm batch``: a file of requests, answered row by row."""

import argparse
import sys
from typing import Any

from nanovllm.cli.options import (
    add_command,
    add_model_options,
    add_sampling_options,
    model_arguments,
    sampling_arguments,
    sampling_params,
    template_arguments,
)
from nanovllm.demo import DEMO_MODEL_PATH


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "batch",
        "answer a file of requests",
        "Answer the rows of INPUT, appending a line to OUTPUT as each is finished. Killed at any moment, "
        "the same command continues where it stopped.",
        "nanovllm batch requests.jsonl answers.jsonl --model Qwen3-0.6B --think off",
    )
    add = parser.add_argument
    add("input", metavar="INPUT.jsonl", help='{"prompt": ...} or {"messages": [...]} a line, or OpenAI\'s batch format')
    add("output", metavar="OUTPUT.jsonl", help="is made, or continued")
    add("--retry-errors", action="store_true", help="run rows again that became error rows")
    add("--no-progress", action="store_true", help="show no progress bar")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    given = sampling_arguments(args)

    from nanovllm.batch import BatchJob
    from nanovllm.llm import LLM

    try:
        with (
            BatchJob(args.input, args.output, retry_errors=args.retry_errors) as job,
            LLM(**model_arguments(args)) as llm,
        ):
            done = job.run(
                llm,
                sampling_params=sampling_params(llm, given),
                chat_template_kwargs=template_arguments(args) or None,
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
    if done.num_skipped_errors:
        more = ", ..." if done.num_skipped_errors > len(done.skipped_error_ids) else ""
        print(
            f"error rows of earlier runs: {', '.join(done.skipped_error_ids)}{more} (--retry-errors runs them again)",
            file=sys.stderr,
        )
    before = f" ({done.num_skipped_errors} of them errors)" if done.num_skipped_errors else ""
    speed = done.output_tokens / done.seconds if done.seconds else 0.0
    print(
        f"{done.num_rows} rows: {done.num_answered} answered, {done.num_errors} errors, {done.num_skipped} done "
        f"before{before}; {done.prompt_tokens} prompt + {done.output_tokens} output tokens in {done.seconds:.1f} s "
        f"({speed:.0f} output tok/s)",
        file=sys.stderr,
    )
    return 0
