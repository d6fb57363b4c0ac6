"""Where the time of prefill and of decode steps goes: part by part, and operation by operation.

Requests of the same lengths run several times: as they always do, which gives the time that counts; one operation at
a time with the parts timed; and under torch's profiler. A decode step is one call as it runs (recorded on the CPU, a
graph on CUDA), so its parts can only be seen the second way, and the difference between the two is told. Of each step
the fastest of the rounds counts, so that what else the machine did meanwhile does not.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from nanovllm.diagnostics.device_trace import device_parts, device_usage, profiled_events
from nanovllm.diagnostics.replacing import one_by_one
from nanovllm.diagnostics.step_timer import PARTS, Slice, StepTimer, StepTimes, timed_kernels
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.random_requests import Workload

PHASES = ("prefill", "decode")
MOST_PROFILED_STEPS = 16  # of decode steps, under torch's profiler
MOST_OPERATIONS = 15


@dataclass(slots=True)
class PartTime:
    """What a part takes of a step.

    Args:
        name: One of ``PARTS``.
        seconds: Mean of a step: of the device's work on CUDA for parts of the model, else of the host.
        calls: Mean number in a step; launches, for a device's.
    """

    name: str
    seconds: float
    calls: float


@dataclass(slots=True)
class Operation:
    """An operator of torch's, or a kernel, by itself.

    Args:
        name: Its name.
        kind: "operator" or "kernel".
        seconds: Mean of a step.
        calls: Mean number in a step.
    """

    name: str
    kind: str
    seconds: float
    calls: float


@dataclass(slots=True)
class PhaseProfile:
    """Steps with prompt tokens in them ("prefill"), or without ("decode").

    Args:
        steps: How many were measured.
        rows: Mean number of sequences in a step.
        tokens: Mean number of tokens that a step computes.
        seconds: Mean of a step as it runs.
        one_by_one_seconds: Mean of a step that is run one operation at a time, unwatched.
        host: Parts of the host's time of a step as it runs; they add up to ``seconds``.
        parts: Parts of a step run one operation at a time; on the CPU they add up to what it takes, watched.
        operations: The largest operators and kernels.
        idle_share: Share of the time in which a CUDA device did nothing, as it runs; None on other devices.
    """

    steps: int
    rows: float
    tokens: float
    seconds: float
    one_by_one_seconds: float
    host: list[PartTime]
    parts: list[PartTime]
    operations: list[Operation]
    idle_share: float | None = None

    @property
    def parts_seconds(self) -> float:
        """Sum of the parts."""
        return sum(part.seconds for part in self.parts)


@dataclass(slots=True)
class StepProfile:
    """Both phases.

    Args:
        engine: Facts of the engine.
        batch_size: Requests at a time.
        prompt_len: Tokens of a prompt.
        output_len: Tokens that each generates.
        phases: By name; one that had no steps is not in it.
        slices: Calls of the watched run, for a trace.
        device_events: torch's own trace of a run on CUDA.
    """

    engine: dict[str, Any]
    batch_size: int
    prompt_len: int
    output_len: int
    phases: dict[str, PhaseProfile]
    slices: list[Slice] = field(default_factory=list)
    device_events: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The figures, for a machine to read."""
        figures = {name: getattr(self, name) for name in ("engine", "batch_size", "prompt_len", "output_len")}
        return figures | {
            "phases": {
                name: asdict(phase) | {"parts_seconds": phase.parts_seconds} for name, phase in self.phases.items()
            }
        }


def profile_steps(
    llm: LLM, batch_size: int, prompt_len: int, output_len: int, rounds: int = 3, params: SamplingParams | None = None
) -> StepProfile:
    """Measure the steps of some requests of random token ids that start together.

    Args:
        llm: Whose; it is left as it was.
        batch_size: Requests.
        prompt_len: Tokens of each prompt.
        output_len: Tokens that each generates, at least 2.
        rounds: How often the requests run for each figure, after one round to warm up.
        params: How they sample; the checkpoint's defaults by default. Their lengths are set here.

    Raises:
        ValueError: The requests do not fit, or several ranks share the model.
        RuntimeError: The engine has other requests.
    """
    if llm.engine.has_unfinished_requests:
        raise RuntimeError(
            "the engine has unfinished requests, which would be measured too; finish or abort them first"
        )
    try:
        return _profile(llm, batch_size, prompt_len, output_len, rounds, params)
    except BaseException:
        llm.engine.reset()
        raise


def _profile(
    llm: LLM, batch_size: int, prompt_len: int, output_len: int, rounds: int, params: SamplingParams | None
) -> StepProfile:
    _check(llm, batch_size, prompt_len, output_len)
    bench = _Bench(llm, batch_size, prompt_len, output_len, params or llm.get_default_sampling_params())
    device = llm.engine.runner.device
    as_run = StepTimer()
    unwatched, watched = StepTimer(), StepTimer(device if device.type == "mps" else None)
    bench.run()
    with one_by_one(llm.engine.runner):
        bench.run()
    rounds_of: dict[str, list[list[StepTimes]]] = {"as run": [], "unwatched": [], "watched": []}
    for _ in range(rounds):  # in turn, so that a machine that is slow for a while is so to all
        with as_run.watching(llm, model=False):
            rounds_of["as run"].append(bench.steps_of(as_run))
        with one_by_one(llm.engine.runner), unwatched.watching(llm, model=False):
            rounds_of["unwatched"].append(bench.steps_of(unwatched))
        with one_by_one(llm.engine.runner), watched.watching(llm):
            rounds_of["watched"].append(bench.steps_of(watched))
    on_device = device.type == "cuda"
    operations = _profile_device(llm, bench) if on_device else _profile_host(llm, bench, rounds)
    best = {
        name: [min(steps, key=_seconds) for steps in zip(*found, strict=False)] for name, found in rounds_of.items()
    }
    phases = {}
    for name in PHASES:
        run, alone, eager = (
            [step for step in best[how] if step.is_prefill == (name == "prefill")]
            for how in ("as run", "unwatched", "watched")
        )
        if run and alone and eager:
            phases[name] = PhaseProfile(
                steps=len(run),
                rows=fmean(step.rows for step in run),
                tokens=fmean(step.tokens for step in run),
                seconds=fmean(map(_seconds, run)),
                one_by_one_seconds=fmean(map(_seconds, alone)),
                host=_parts(run),
                parts=operations.parts.get(name) or _parts(eager),
                operations=operations.largest[name],
                idle_share=operations.idle.get(name),
            )
    return StepProfile(_facts(llm), batch_size, prompt_len, output_len, phases, watched.slices, operations.trace)


class _Bench:
    """Requests that start together, other ones every time; run to their end, or a phase at a time."""

    def __init__(self, llm: LLM, batch_size: int, prompt_len: int, output_len: int, params: SamplingParams) -> None:
        self.llm = llm
        self.workload = Workload(batch_size, (prompt_len, prompt_len), (output_len, output_len))
        self.params = replace(params, max_tokens=output_len, ignore_eos=True)
        self.seed = 0

    def add(self) -> None:
        """Queue them."""
        engine = self.llm.engine
        self.llm.reset_prefix_cache()
        prompts = self.workload.draw(self.seed, engine.model_config.vocab_size).prompts
        self.seed += 1
        for prompt in prompts:
            engine.add_request({"prompt_token_ids": prompt}, self.params)

    def prefill(self) -> int:
        """Run steps until no prompt token is left; returns how many there were."""
        scheduler, steps = self.llm.engine.scheduler, 0
        while scheduler.waiting or any(seq.num_computed_tokens < seq.num_prompt_tokens for seq in scheduler.running):
            self.llm.engine.step()
            steps += 1
        return steps

    def decode(self, most: int | None = None) -> int:
        """Run the steps that are left, or so many; returns how many there were."""
        steps = 0
        while self.llm.engine.has_unfinished_requests and (most is None or steps < most):
            self.llm.engine.step()
            steps += 1
        return steps

    def run(self) -> None:
        """All of it."""
        self.add()
        self.decode()

    def steps_of(self, timer: StepTimer) -> list[StepTimes]:
        """All of it, and what a timer that watches has seen of it."""
        first = len(timer.steps)
        self.run()
        return timer.steps[first:]


def _check(llm: LLM, batch_size: int, prompt_len: int, output_len: int) -> None:
    engine = llm.engine
    if engine.config.tensor_parallel_size > 1:
        raise ValueError("a profile is of one rank: leave out tensor_parallel_size")
    for name, number, least in (("batch size", batch_size, 1), ("prompt", prompt_len, 1), ("output", output_len, 2)):
        if number < least:
            raise ValueError(f"the {name} is {number}; it must be at least {least}")
    manager, slots = engine.scheduler.block_manager, engine.scheduler.max_num_seqs
    if batch_size > slots:
        raise ValueError(f"batch size is {batch_size}, but {slots} sequences run at once (raise max_num_seqs)")
    if prompt_len + output_len > engine.max_model_len:
        raise ValueError(
            f"requests of {prompt_len} + {output_len} tokens do not fit: max_model_len is {engine.max_model_len} "
            "(raise it, or lower one of the lengths)"
        )
    needed = batch_size * manager.blocks_needed(prompt_len + output_len)
    if needed > manager.num_blocks:
        raise ValueError(
            f"{batch_size} requests of {prompt_len} + {output_len} tokens need {needed} KV blocks, and there are "
            f"{manager.num_blocks} (raise num_kvcache_blocks, or lower one of the lengths)"
        )


def _seconds(step: StepTimes) -> float:
    return step.seconds


def _parts(steps: list[StepTimes]) -> list[PartTime]:
    """Means over the steps, of the parts that were called."""
    return [
        PartTime(
            part,
            fmean(step.parts.get(part, 0.0) for step in steps),
            fmean(step.calls.get(part, 0) for step in steps),
        )
        for part in PARTS
        if any(part in step.calls for step in steps)
    ]


@dataclass(slots=True)
class _Operations:
    """What torch's profiler tells, by phase.

    Args:
        largest: Operators and kernels, the largest first.
        idle: Share of the time in which a CUDA device did nothing.
        parts: A CUDA device's time by part.
        trace: What a CUDA device and its host did, as they run.
    """

    largest: dict[str, list[Operation]] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    parts: dict[str, list[PartTime]] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)


def _profile_device(llm: LLM, bench: _Bench) -> _Operations:
    """Of a CUDA device: its operations as they run, and its parts one operation at a time."""
    device, found = llm.engine.runner.device, _Operations()

    def watch(function: Callable[[], None]) -> list[dict[str, Any]]:
        return profiled_events(function, device)

    for name, events, steps in _phases_of(bench, watch):
        usage = device_usage(events, "kernel", MOST_OPERATIONS)
        found.idle[name] = usage.get("idle_share", 0.0)
        found.largest[name] = [
            Operation(kernel, "kernel", mean * count / steps / 1e6, count / steps)
            for kernel, _, count, mean in usage["top"]
        ]
        found.trace += events
    timer = StepTimer(annotate=True)
    with one_by_one(llm.engine.runner), timer.watching(llm):
        for name, events, steps in _phases_of(bench, watch):
            parts = device_parts(events)
            found.parts[name] = [
                PartTime(part, parts[part][0] / steps / 1e6, parts[part][1] / steps)
                for part in (*PARTS, "elsewhere")
                if part in parts
            ]
    return found


def _profile_host(llm: LLM, bench: _Bench, rounds: int) -> _Operations:
    """Of the host: operators by torch's profiler, and our kernels, which it does not see; each by its
    fastest round.
    """
    best: dict[str, dict[tuple[str, str], Operation]] = {name: {} for name in PHASES}

    def watch(function: Callable[[], None]) -> list[Operation]:
        seconds: dict[str, float] = {}
        calls: dict[str, int] = {}
        activities = [torch.profiler.ProfilerActivity.CPU]
        with timed_kernels(seconds, calls), torch.profiler.profile(activities=activities) as profiler:
            function()
        operations = [Operation(kernel, "kernel", seconds[kernel], calls[kernel]) for kernel in seconds]
        return operations + [
            Operation(event.key, "operator", event.self_cpu_time_total / 1e6, event.count)
            for event in profiler.key_averages()
        ]

    with one_by_one(llm.engine.runner):
        for _ in range(rounds):
            for name, operations, steps in _phases_of(bench, watch):
                for one in operations:
                    of_a_step = Operation(one.name, one.kind, one.seconds / steps, one.calls / steps)
                    known = best[name].setdefault((one.kind, one.name), of_a_step)
                    known.seconds = min(known.seconds, of_a_step.seconds)
    return _Operations(
        {name: sorted(found.values(), key=lambda one: -one.seconds)[:MOST_OPERATIONS] for name, found in best.items()}
    )


def _phases_of(bench: _Bench, watch: Callable[[Callable[[], None]], Any]) -> Iterator[tuple[str, Any, int]]:
    """Run each phase watched: its name, what ``watch`` made of it, and its number of steps."""
    bench.add()
    phases: dict[str, Callable[[], int]] = {
        "prefill": bench.prefill,
        "decode": lambda: bench.decode(MOST_PROFILED_STEPS),
    }
    for name, phase in phases.items():
        yield name, *_watched(phase, watch)
    bench.decode()


def _watched(phase: Callable[[], int], watch: Callable[[Callable[[], None]], Any]) -> tuple[Any, int]:
    """What ``watch`` makes of a phase, and how many steps that had, at least 1."""
    steps = 0

    def run() -> None:
        nonlocal steps
        steps = phase()

    return watch(run), max(1, steps)


def _facts(llm: LLM) -> dict[str, Any]:
    metrics = llm.get_metrics()
    names = ("device", "dtype", "quantization", "attention_backend", "num_threads")
    runner = llm.engine.runner
    how = "a graph" if runner.graphs is not None else "recorded" if runner.recorded is not None else "one by one"
    return {name: metrics[name] for name in names} | {"decode_steps": how}
