"""``nanovllm profile``: where a step's time goes."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from nanovllm.cli.options import (
    add_command,
    add_model_options,
    check_writable,
    model_arguments,
    sampling_arguments,
    sampling_params,
)
from nanovllm.utils.options import add_json_option, json_alone, print_json
from nanovllm.utils.text import counted

if TYPE_CHECKING:
    from nanovllm.diagnostics.step_profile import PhaseProfile, StepProfile


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "profile",
        "where the time of a step goes",
        "Run requests of random token ids that start together, and tell what prefill and decode steps take: part by "
        "part, operation by operation, and how much less a decode step takes as it always runs (recorded on the CPU, a "
        "graph on CUDA) than the sum of its parts. Run nothing else meanwhile.",
        "nanovllm profile\n"
        "nanovllm profile --model Qwen3-0.6B --batch-size 16 --prompt-len 512 --output-len 64\n"
        "nanovllm profile --json --perfetto profile.json.gz > profile.json",
    )
    add = parser.add_argument
    add("--batch-size", type=int, default=8, metavar="N", help="requests that run together (default: 8)")
    add("--prompt-len", type=int, default=128, metavar="N", help="tokens of each prompt (default: 128)")
    add("--output-len", type=int, default=32, metavar="N", help="tokens that each generates (default: 32)")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely token (default: the checkpoint's)")
    add("--rounds", type=int, default=3, metavar="N", help="how often everything runs; the fastest counts (default: 3)")
    add("--top", type=int, default=10, metavar="N", help="operations that are listed (default: 10, at most 15)")
    add_json_option(parser, "the figures")
    add("--perfetto", metavar="FILE", help="a trace for ui.perfetto.dev; compressed if it ends in .gz")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("batch_size", "prompt_len", "rounds", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.output_len < 2:
        raise ValueError(f"--output-len is {args.output_len}; it must be at least 2, or nothing is decoded")
    if args.tensor_parallel_size > 1:
        raise ValueError("a profile is of one rank: leave out --tensor-parallel-size")
    check_writable(args.perfetto)
    given = sampling_arguments(args)

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes to stderr when it starts and stops

    from nanovllm.diagnostics.perfetto import name_events, slice_event, write_trace
    from nanovllm.diagnostics.step_profile import MOST_OPERATIONS, profile_steps
    from nanovllm.llm import LLM

    if args.top > MOST_OPERATIONS:
        raise ValueError(f"--top is {args.top}; a profile lists {MOST_OPERATIONS} operations at most")

    with LLM(**model_arguments(args)) as llm:
        params = sampling_params(llm, given)
        profile = profile_steps(llm, args.batch_size, args.prompt_len, args.output_len, args.rounds, params)
    with json_alone(args):
        print(report(profile, args.top))
    if args.json:
        print_json(profile.to_json())
    if args.perfetto:
        events = profile.device_events
        if not events:
            first = min((piece.begin for piece in profile.slices), default=0.0)
            events = name_events(1, "engine, one operation at a time", {1: "host"})
            events += [slice_event(p.part, "part", p.begin - first, p.end - first, (1, 1)) for p in profile.slices]
        write_trace(args.perfetto, events)
        print(f"wrote {args.perfetto}", file=sys.stderr)
    return 0


def report(profile: "StepProfile", top: int) -> str:
    """The profile as tables."""
    engine = profile.engine
    facts = [engine["device"], engine["dtype"], engine["quantization"], f"{engine['attention_backend']} attention"]
    facts.append(counted(engine["num_threads"], "thread"))
    lines = [
        f"{counted(profile.batch_size, 'request')} of {profile.prompt_len} prompt and "
        f"{counted(profile.output_len, 'output token')} on " + ", ".join(filter(None, facts))
    ]
    for name, phase in profile.phases.items():
        lines += ["", *phase_lines(name, phase, engine, top)]
    return "\n".join(lines)


def phase_lines(name: str, phase: "PhaseProfile", engine: dict[str, Any], top: int) -> list[str]:
    """The tables of a phase."""
    whole = phase.parts_seconds
    how = f", {engine['decode_steps']}" if name == "decode" else ""
    lines = [
        f"{name}: {counted(phase.steps, 'step')} of {counted(phase.rows, 'row', '.0f')} and "
        f"{counted(phase.tokens, 'token', '.0f')}, "
        f"{milliseconds(phase.seconds)} ms each"
    ]
    on_device = engine["device"].startswith("cuda")
    lines.append(f"  {'part, on the device' if on_device else 'part':<24}{'ms':>10}{'share':>8}{'calls':>8}")
    lines += [row(part.name, part.seconds, whole, part.calls) for part in phase.parts]
    lines.append(row("sum of the parts", whole, whole))
    lines.append(row("the same, not watched", phase.one_by_one_seconds))
    lines.append(row(f"as it runs{how}", phase.seconds))
    less = whole - phase.seconds
    more_or_less = "less" if less >= 0 else "more"
    lines.append(f"  as it runs, a step takes {milliseconds(abs(less))} ms {more_or_less} than the sum of its parts")
    if phase.idle_share is not None:
        lines.append(f"  the device does nothing {phase.idle_share:.1%} of the time")
        lines += [f"  {'part, on the host':<24}{'ms':>10}{'share':>8}{'calls':>8}"]
        lines += [row(part.name, part.seconds, phase.seconds, part.calls) for part in phase.host]
    lines += ["", f"  {'operations by their own time':<56}{'ms':>10}{'calls':>8}"]
    for one in phase.operations[:top]:
        lines.append(f"  {f'{one.name[:46]} ({one.kind})':<56}{milliseconds(one.seconds):>10}{one.calls:>8.1f}")
    return lines


def row(name: str, seconds: float, whole: float = 0.0, calls: float | None = None) -> str:
    """A line of a table of parts."""
    share = f"{seconds / whole:.1%}" if whole else ""
    return f"  {name:<24}{milliseconds(seconds):>10}{share:>8}" + ("" if calls is None else f"{calls:>8.1f}")


def milliseconds(seconds: float) -> str:
    """As many digits as tell something."""
    return f"{seconds * 1e3:.3f}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"
