"""``nanovllm batch``: a file of requests, answered row by row."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

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
from nanovllm.utils.text import counted

if TYPE_CHECKING:
    from nanovllm.batch import BatchSummary


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "batch",
        "answer a file of requests",
        "Answer the rows of INPUT, appending a line to OUTPUT as each is finished. Killed at any moment, "
        "the same command continues where it stopped. Exit code 1 if rows have failed: the others are answered all the "
        "same, and the last line on stderr names those.",
        "nanovllm batch requests.jsonl answers.jsonl --model Qwen3-0.6B --think off",
    )
    add = parser.add_argument
    add("input", metavar="INPUT.jsonl", help='{"prompt": ...} or {"messages": [...]} a line, or OpenAI\'s batch format')
    add("output", metavar="OUTPUT.jsonl", help="is made, or continued")
    add("--retry-errors", action="store_true", help="run rows again that became error rows")
    add("--no-progress", action="store_true", help="show no progress bar (nor is there one if stderr is no terminal)")
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
                use_tqdm=sys.stderr.isatty() and not args.no_progress,
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
        were = "1 answer was" if done.num_cut_off == 1 else f"{done.num_cut_off} answers were"
        print(f"{were} cut off (--max-tokens, up to --max-model-len, allows more)", file=sys.stderr)
    before = f" ({counted(done.num_skipped_errors, 'error')})" if done.num_skipped_errors else ""
    speed = done.output_tokens / done.seconds if done.seconds else 0.0
    print(
        f"{counted(done.num_rows, 'row')}: {done.num_answered} answered, {counted(done.num_errors, 'error')}, "
        f"{done.num_skipped} done before{before}; {done.prompt_tokens} prompt + "
        f"{counted(done.output_tokens, 'output token')} in {done.seconds:.1f} s ({speed:.0f} output tok/s)",
        file=sys.stderr,
    )
    if failed := done.num_errors + done.num_skipped_errors:
        print(failure(done, failed, args.output), file=sys.stderr)
    return 1 if failed else 0


def failure(done: "BatchSummary", failed: int, output: str) -> str:
    """A line about the rows that failed, now or in earlier runs: how many, which, and where it is told why."""
    from nanovllm.batch import NAMED_ERRORS

    ids = [*done.error_ids, *done.skipped_error_ids][:NAMED_ERRORS]
    more = ", ..." if failed > len(ids) else ""
    first = "" if done.first_error is None else f"; the first: {' '.join(done.first_error.split())}"
    return (
        f"{counted(failed, 'row')} failed: {', '.join(ids)}{more}; {output} says why (--retry-errors runs them "
        f"again){first}"
    )
