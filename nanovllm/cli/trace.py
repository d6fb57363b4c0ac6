"""``nanovllm trace``: a run recorded step by step, as a page to look at."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.cli.options import (
    add_chat_option,
    add_command,
    add_model_options,
    add_sampling_options,
    chat_prompt,
    check_template_options,
    check_writable,
    model_arguments,
    read_text,
    sampling_arguments,
    sampling_params,
)
from nanovllm.utils.options import add_json_option, json_alone, print_json
from nanovllm.utils.text import counted

if TYPE_CHECKING:
    from nanovllm.diagnostics.run_record import RunRecord
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

DEFAULT_WORKLOAD = "16:16-96:16-64:48"


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "trace",
        "record a run step by step, and look at it",
        "Run requests and record every step: which sequences ran, who holds which KV block, what was shared, cached, "
        "evicted and preempted. Writes a page that needs nothing but a browser. The block manager's books are checked "
        "meanwhile; exit code 1 if they were ever wrong.",
        "nanovllm trace\n"
        "nanovllm trace --workload 24:16-64:32-96:32 --num-kvcache-blocks 40 --max-num-seqs 8\n"
        'nanovllm trace --chat "add 12 and 30" "count from 3 to 9" --perfetto run.json.gz',
    )
    what = parser.add_argument_group(f"what is run (by default --workload {DEFAULT_WORKLOAD})")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete")
    what.add_argument(
        "--file",
        metavar="FILE",
        help='prompts: a line each, or {"prompt": ...} or (asked as chat) {"messages": ...} each',
    )
    what.add_argument("--workload", metavar="SPEC", help="random token ids, N:LO-HI:LO-HI[:PREFIX]: prompts, outputs")
    add_chat_option(what)
    add_model_options(parser)
    memory = parser.add_argument_group("room, to make it scarce")
    memory.add_argument("--num-kvcache-blocks", type=int, metavar="N", help="blocks of the KV cache")
    memory.add_argument("--kvcache-block-size", type=int, metavar="N", help="tokens a block")
    memory.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="most tokens of a step")
    memory.add_argument("--no-prefix-caching", action="store_true", help="share no blocks")
    add_sampling_options(parser)
    out = parser.add_argument_group("what is written")
    out.add_argument("--html", metavar="FILE", default="trace.html", help="the page (default: trace.html)")
    out.add_argument("--perfetto", metavar="FILE", help="for ui.perfetto.dev; compressed if it ends in .gz")
    add_json_option(out, "everything recorded")
    out.add_argument("--check", action="store_true", help="check all blocks after every operation, not only its own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nanovllm.utils.random_requests import Workload

    if sum(map(bool, (args.prompts, args.file, args.workload))) > 1:
        raise ValueError("give prompts, --file or --workload, and only one of them")
    spec = args.workload or (None if args.prompts or args.file else DEFAULT_WORKLOAD)
    workload = None if spec is None else Workload.parse(spec)
    requests = read_requests(args.file) if args.file else list(args.prompts)
    if workload is not None:
        check_options_of_workload(args)
    elif all(isinstance(request, str) for request in requests):
        check_template_options(args)
    check_outputs([path for path in (args.html, args.perfetto) if path])

    given = sampling_arguments(args)

    import dataclasses

    from nanovllm.diagnostics.recorder import record
    from nanovllm.llm import LLM

    names = ("num_kvcache_blocks", "kvcache_block_size", "max_num_batched_tokens")
    room = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    room |= {"enable_prefix_caching": False} if args.no_prefix_caching else {}
    with LLM(**model_arguments(args), **room) as llm:
        params = sampling_params(llm, given)
        with record(llm, check=args.check) as trace:
            if workload is not None:
                drawn = workload.draw(args.seed, llm.engine.model_config.vocab_size)
                each = [dataclasses.replace(params, max_tokens=n, ignore_eos=True) for n in drawn.output_lens]
                llm.generate([{"prompt_token_ids": prompt} for prompt in drawn.prompts], each, use_tqdm=False)
            else:
                ask(llm, requests, params, args)
    trace.engine["workload"] = spec or counted(len(requests), "prompt")
    write(trace, args)
    with json_alone(args):
        print_summary(trace)
    if args.json:
        print_json(trace.to_json(), indent=None)
    return 1 if trace.violations else 0


def check_options_of_workload(args: argparse.Namespace) -> None:
    """ValueError for an option that would do nothing: those of texts, where token ids are random."""
    for name in ("chat", "max_tokens", "think", "chat_template_kwargs"):
        if getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} needs prompts or --file: a workload is of token ids and says its lengths")


def check_outputs(paths: list[str]) -> None:
    """ValueError if one of the files cannot be written, as far as can be told before the run."""
    check_writable(*paths)
    resolved = [Path(path).resolve() for path in paths]
    twice = [path for path, file in zip(paths, resolved, strict=True) if resolved.count(file) > 1]
    if twice:
        raise ValueError(f"{' and '.join(twice)} are one file; give --html and --perfetto a file each")


def read_requests(path: str) -> list[Any]:
    """Prompts and conversations of a file: JSON objects, or plain text, a line each."""
    requests: list[Any] = []
    # Not splitlines: JSON's strings may hold other separators of lines as they are.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            requests.append(line)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error})") from None
        except RecursionError:
            raise ValueError(f"{path}, line {number} is nested too deeply") from None
        if "messages" in row:
            requests.append(row["messages"])
        elif isinstance(row.get("prompt"), str):
            requests.append(row["prompt"])
        else:
            raise ValueError(f'{path}, line {number} has neither "prompt" nor "messages"')
    if not requests:
        raise ValueError(f"{path} has no prompts; it takes one a line")
    return requests


def ask(llm: "LLM", requests: list[Any], params: "SamplingParams", args: argparse.Namespace) -> None:
    """Run prompts all together; as chat where they are conversations, or are to be."""
    prompts = []
    for request in requests:
        if isinstance(request, str) and args.chat:
            request = [{"role": "user", "content": request}]
        prompts.append(request if isinstance(request, str) else chat_prompt(llm, request, args))
    llm.generate(prompts, params, use_tqdm=False)


def write(trace: "RunRecord", args: argparse.Namespace) -> None:
    """Write the files that were asked for, and say which; one that fails does not keep the others from it."""
    written, failed = [], []
    for path, how in ((args.html, trace.write_html), (args.perfetto, trace.write_perfetto)):
        if path:
            try:
                how(path)
                written.append(f"{path} ({Path(path).stat().st_size / 1e3:,.0f} kB)")
            except OSError as error:
                failed.append(f"{path} could not be written: {error}")
    if written:
        print(f"wrote {', '.join(written)}", file=sys.stderr)
    if failed:
        raise OSError("; ".join(failed))


def print_summary(trace: "RunRecord") -> None:
    """What happened, in a few lines."""
    totals, engine = trace.totals(), trace.engine
    print(
        f"{counted(totals['sequences'], 'sequence')} in {counted(totals['steps'], 'step')} and "
        f"{totals['seconds']:.2f} s: "
        f"{totals['prefill_tokens']} prefill + {counted(totals['decode_tokens'], 'decode token')}, "
        f"{totals['output_tokens']} sampled"
    )
    print(
        f"KV cache: {totals['peak_blocks_held']} of {counted(engine['num_blocks'], 'block')} of "
        f"{engine['block_size']} held at "
        f"most; {totals['blocks_shared']} shared by {counted(totals['prefix_hits'], 'prefix hit')} "
        f"({counted(totals['prefix_hit_tokens'], 'token')}), {totals['blocks_evicted']} evicted"
    )
    print(f"queue: {totals['longest_queue']} waited at most; {counted(totals['preemptions'], 'preemption')}")
    for violation in trace.violations:
        print(f"the block manager's books are wrong: {violation}")
    if not trace.violations:
        print(f"the block manager's books were right {'after every operation' if trace.is_checked else 'throughout'}")
