"""What a benchmark says of a workload, in numbers and as a Markdown table."""

import statistics
from collections.abc import Sequence
from typing import Any

from nanovllm.benchmarks.workloads import gib
from nanovllm.utils.random_requests import Requests, Workload
from nanovllm.utils.text import counted

Result = dict[str, Any]


def result_of(seconds: list[float], requests: Requests) -> Result:
    """All timings, their median, and the output tokens a second at the median."""
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median_seconds": median,
        "output_tokens_per_second": requests.output_tokens / median,
    }


def summarise(workload: Workload, requests: Requests, results: dict[str, Result], ours: Sequence[str]) -> Result:
    """The entry of a workload; ratios of output tokens a second are those of ``ours`` to every other engine's.

    An engine that failed has an ``error`` instead of figures, and no ratios.
    """
    rates = {name: rate for name, result in results.items() if (rate := result.get("output_tokens_per_second"))}
    pairs = [(own, other) for own in ours for other in rates if own in rates and other != own]
    return {
        "workload": str(workload),
        "num_requests": len(requests.prompts),
        "prompt_tokens": requests.prompt_tokens,
        "output_tokens": requests.output_tokens,
        "results": results,
        "ratios": {f"{own}/{other}": rates[own] / rates[other] for own, other in pairs},
    }


def failures(report: Result) -> list[str]:
    """The engines that failed to start or at a workload."""
    found = [report["engines"], *(entry["results"] for entry in report["workloads"])]
    return sorted({name for engines in found for name, engine in engines.items() if "error" in engine})


def workload_table(entry: Result, ours: Sequence[str]) -> str:
    """An entry of ``summarise`` in Markdown: seconds, output tok/s, and how many times the engine's speed ours is."""
    rounds = max((len(result["seconds"]) for result in entry["results"].values()), default=0)
    tokens = f"{entry['prompt_tokens']:,} prompt + {counted(entry['output_tokens'], 'output token', ',')}"
    spread_head = ["fastest - slowest"] if rounds > 1 else []
    head = ["", "seconds", *spread_head, "output tok/s", *(f"{own} / it" for own in ours)]
    rows = []
    for name, result in entry["results"].items():
        if "error" in result:
            rows.append([name, f"failed: {result['error']}".replace("|", "\\|"), *[""] * (len(head) - 2)])
            continue
        seconds, rate = result["seconds"], f"{result['output_tokens_per_second']:.1f}"
        spread = [f"{min(seconds):.2f} - {max(seconds):.2f}"] if rounds > 1 else []
        ratios = [entry["ratios"].get(f"{own}/{name}") for own in ours]
        cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append([name, f"{result['median_seconds']:.2f}", *spread, rate, *cells])
    measured = f", medians of {counted(rounds, 'round')}" if rounds > 1 else ""
    return f"**{entry['workload']}** ({tokens}{measured})\n\n{_table(head, rows)}"


def engine_table(engines: dict[str, Result]) -> str:
    """What each engine is, how long it took from the start of its process to being ready, and its peak memory."""
    rows = []
    for name, engine in engines.items():
        if "error" in engine:
            rows.append([name, f"failed: {engine['error']}".replace("|", "\\|"), "", ""])
            continue
        startup, memory = f"{engine['startup_seconds']:.1f}", gib(engine["peak_memory_bytes"])
        rows.append([name, engine["setup"].replace("|", "\\|"), startup, memory])
    return _table(["", "what it is", "start-up, seconds", "peak memory"], rows)


def page(report: Result) -> str:
    """A comparison in Markdown."""
    machine, software = report["hardware"], report["versions"]
    parts = f"{counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"
    where = f"{machine['cpu']}, {parts}, {gib(machine['ram_bytes'])} RAM"
    head = (
        f"{report['model']}; {where}; commit {software['commit']}; {report['date'][:10]}.\n\n"
        "In every round each engine runs a workload once, while the others hold still. Ratios say how many times an "
        "engine's output tokens a second nanovllm makes."
    )
    tables = [workload_table(entry, report["ours"]) for entry in report["workloads"]]
    return "\n\n".join([head, *tables, engine_table(report["engines"])]) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, but for long texts, so that it is readable as it stands too."""
    lines = [head, *rows]
    widths = [max((len(line[i]) for line in lines if len(line[i]) <= 40), default=3) for i in range(len(head))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {text[0]} |", f"|{rule}|", *(f"| {line} |" for line in text[1:])])
