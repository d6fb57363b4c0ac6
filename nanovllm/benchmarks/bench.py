"""Throughput on random token ids: what ``bench.py`` and ``nanovllm bench`` do."""

import argparse
import gc
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nanovllm.benchmarks.compare import COMPARED_SHAPE, check_comparison, compare_engines
from nanovllm.benchmarks.hf_engines import HFContinuousEngine, HFEngine
from nanovllm.benchmarks.nanovllm_engine import NanovllmEngine, OneRankEngine
from nanovllm.benchmarks.options import EXAMPLES, SUMMARY, TURNS, add_options
from nanovllm.benchmarks.report import failures, result_of, summarise
from nanovllm.benchmarks.workloads import PRESETS, gib
from nanovllm.demo import DEMO_MODEL_PATH
from nanovllm.hub import find_checkpoint
from nanovllm.kernels import DISABLE_VARIABLE
from nanovllm.utils.environment import hardware, versions
from nanovllm.utils.memory import peak_cpu_memory
from nanovllm.utils.options import OneLineParser, json_alone, message_of, print_json
from nanovllm.utils.random_checkpoint import cached_random_checkpoint
from nanovllm.utils.random_requests import Requests, Workload
from nanovllm.utils.text import counted

Engine = NanovllmEngine | HFEngine
ENGINES: dict[str, type[Engine]] = {
    one.name: one for one in (NanovllmEngine, OneRankEngine, HFEngine, HFContinuousEngine)
}


def measure(engines: dict[str, Engine], held: dict[str, int], requests: Requests, repeats: int) -> dict[str, Any]:
    """Time every engine on the requests, in turns, and take each one's median.

    ``held`` is the GPU memory that each holds between its turns; what others hold is not its own.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    results: dict[str, dict[str, Any]] = {name: {} for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            before = allocated_gpu_memory()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds, details = engine.run(requests)
            times[name].append(seconds)
            results[name] |= details  # of the last repeat
            if torch.cuda.is_available():
                results[name]["peak_gpu_memory_bytes"] = held[name] + torch.cuda.max_memory_allocated() - before
    for name, result in results.items():
        result |= result_of(times[name], requests)
    return results


def allocated_gpu_memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def use_device(name: str) -> None:
    """Make ``cuda:N`` the one whose memory torch tells and others take; what is not there the engine refuses."""
    number = name.partition(":")[2]
    if number and int(number) < torch.cuda.device_count():
        torch.cuda.set_device(int(number))


def free_gpu_memory() -> None:
    """Give the device what closed engines have left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_machine(report: dict[str, Any]) -> None:
    machine, software = report["hardware"], {k: v for k, v in report["versions"].items() if v}
    print("model    ", report["model"])
    print("machine  ", ", ".join([machine["cpu"], *machine["gpus"]]), end=", ")
    print(
        f"{counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}, {gib(machine['ram_bytes'])} RAM"
    )
    print("software ", ", ".join(f"{name} {version}" for name, version in software.items()), "\n", flush=True)


def print_workload(workload: Workload, requests: Requests, repeats: int) -> None:
    tokens = f"{requests.prompt_tokens} prompt + {counted(requests.output_tokens, 'output token')}"
    print(f"\nworkload {workload}: {tokens}{f', {repeats} times' if repeats > 1 else ''}", flush=True)


def print_results(results: dict[str, Any]) -> None:
    for name, result in results.items():
        speed = f"{result['output_tokens_per_second']:10.2f} output tok/s"
        line = f"  {name:<9}{result['median_seconds']:9.2f} s {speed}"
        if len(result["seconds"]) > 1:
            low, high = min(result["seconds"]), max(result["seconds"])
            line += f", median of {len(result['seconds'])} ({low:.2f}-{high:.2f} s)"
        if result.get("num_preemptions"):
            line += f", {counted(result['num_preemptions'], 'preemption')}"
        if "peak_gpu_memory_bytes" in result:
            line += f", GPU memory {gib(result['peak_gpu_memory_bytes'])}"
        print(line)
    sys.stdout.flush()


def print_ratios(ratios: dict[str, float]) -> None:
    for pair, ratio in ratios.items():
        print(f"  ratio {pair.replace('/', ' / ')}: {ratio:.2f}x output tok/s")
    sys.stdout.flush()


def print_totals(report: dict[str, Any]) -> None:
    print()
    if kv := report["engines"].get("nanovllm"):
        blocks = f"{kv['peak_kvcache_blocks_used']} of {kv['num_kvcache_blocks']}"
        print(f"KV blocks in use at the peak: {blocks}, of {kv['kvcache_block_size']} tokens each")
    print(f"peak memory of the process: {gib(report['peak_process_memory_bytes'])}")


def build_parser() -> argparse.ArgumentParser:
    """bench.py's command line."""
    examples = textwrap.indent(EXAMPLES.format(command="python bench.py"), "    ")
    description = f"Throughput benchmark: {SUMMARY}.\n\n{examples}\n\n{TURNS}"
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    return parser


def chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    names = ("num_requests", "prompt_len", "output_len", "shared_prefix")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if not args.workload:
        return [replace(Workload.parse(PRESETS[args.preset or "full"]), **given)]
    if args.preset or given:
        name = "preset" if args.preset else next(iter(given)).replace("_", "-")
        raise ValueError(f"--workload and --{name} exclude each other")
    return list(args.workload)


def chosen_model(args: argparse.Namespace) -> tuple[str, Path]:
    """The model's name in the report, and its folder."""
    if args.random_weights:
        if not (args.weights_cache / args.random_weights).exists():
            print(f"writing random weights to {args.weights_cache}, where they stay for the next run", flush=True)
        folder = cached_random_checkpoint(args.random_weights, args.weights_cache)
        return f"{args.random_weights}, random weights", folder
    return (args.model, Path(find_checkpoint(args.model))) if args.model else ("demo", Path(DEMO_MODEL_PATH))


def draw_requests(args: argparse.Namespace, workloads: list[Workload], model: Path) -> list[Requests]:
    """What each workload asks, or ValueError if the model cannot hold it."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} is no checkpoint folder: it has no config.json")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    drawn = [workload.draw(args.seed, config["vocab_size"]) for workload in workloads]
    limit = min(args.max_model_len or config["max_position_embeddings"], config["max_position_embeddings"])
    for workload, requests in zip(workloads, drawn, strict=True):
        if requests.longest > limit:
            raise ValueError(
                f"workload {workload} has a request of {requests.longest} prompt and output tokens; "
                f"the limit is {limit}, from max_position_embeddings or --max-model-len "
                "(choose shorter lengths, --preset mini, or another model: --model or --random-weights)"
            )
    return drawn


def new_report(args: argparse.Namespace, model_name: str) -> dict[str, Any]:
    """A report without figures: what is measured, and where."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model_name,
        "versions": versions(),
        "hardware": hardware(),
        "options": {k: v for k, v in vars(args).items() if v is not None and not isinstance(v, Path)},
        "disabled": os.environ.get(DISABLE_VARIABLE, ""),
        "engines": {},
        "workloads": [],
    }


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run all that the command line asks for, print as it goes, and return the report."""
    workloads = chosen_workloads(args)
    if not args.temperature >= 0:
        raise ValueError(f"--temperature is {args.temperature}; it must be at least 0")
    check_comparison(args)
    if args.compare:
        shape = args.random_weights or COMPARED_SHAPE
        drawn = draw_requests(args, workloads, args.peers / shape)
        report = new_report(args, f"{shape}, random weights")
        print_machine(report)
        return compare_engines(args, shape, list(zip(workloads, drawn, strict=True)), report)
    use_device(args.device)
    model_name, model = chosen_model(args)
    drawn = draw_requests(args, workloads, model)
    report = new_report(args, model_name)
    print_machine(report)
    longest = max(requests.longest for requests in drawn)
    results: list[dict[str, Any]] = [{} for _ in drawn]  # a workload, by engine
    groups = [[name] for name in args.engine] if args.separately else [args.engine]
    for names in groups:
        engines: dict[str, Engine] = {}
        held: dict[str, int] = {}
        with ExitStack() as stack:
            stack.callback(free_gpu_memory)
            for name in names:
                before = allocated_gpu_memory()
                engines[name] = engine = ENGINES[name](model, longest, args)
                stack.callback(engine.close)
                engine.run(drawn[0].warm_up())
                held[name] = allocated_gpu_memory() - before
                print(f"{name} ready in {engine.startup_seconds:.2f} s: {engine.describe()}", flush=True)
            for workload, requests, found in zip(workloads, drawn, results, strict=True):
                print_workload(workload, requests, args.repeats)
                found |= measure(engines, held, requests, args.repeats)
                print_results({name: found[name] for name in names})
                if names is groups[-1]:
                    report["workloads"].append(summarise(workload, requests, found, args.engine[:1]))
                    print_ratios(report["workloads"][-1]["ratios"])
            for name, engine in engines.items():
                startup = {"startup_seconds": engine.startup_seconds}
                report["engines"][name] = {"setup": engine.describe(), **engine.totals(), **startup}
    report["peak_process_memory_bytes"] = peak_cpu_memory()
    print_totals(report)
    return report


def run(args: argparse.Namespace) -> int:
    """Run what the options ask for, and print the report.

    Returns:
        0; 1 if an engine of a comparison failed.

    Raises:
        ValueError: What was asked for cannot be done; the message says why.
        OSError: A file cannot be read or written.
    """
    with json_alone(args):
        report = benchmark(args)
    if args.json:
        print_json(report)
    return 1 if failures(report) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a script.

    Returns:
        0 when done; 1 if an engine of a comparison failed; 2, after one line on stderr, when what was asked for cannot
        be done; 130 when interrupted.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"{parser.prog}: error: {message_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
