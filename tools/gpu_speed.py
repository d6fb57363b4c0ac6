"""Stages of gpu_check.py about speed: throughput beside what the hardware allows, what each part is worth, profiles."""

import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from gpu_measure import Check, Result, Roofline, ceilings, roofline

from nanovllm import LLM, SamplingParams
from nanovllm.attention import BACKENDS
from nanovllm.benchmarks import bench
from nanovllm.diagnostics.device_trace import device_usage, profiled_events
from nanovllm.engine.admission import AdmissionPolicy
from nanovllm.engine.step_handle import StepHandle
from nanovllm.kernels import DISABLE_VARIABLE
from nanovllm.utils.random_checkpoint import cached_random_checkpoint

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path(tempfile.gettempdir()) / "nanovllm-gpu-check"  # random weights stay here for the next stage
# "nucleus" is for top_p, which no benchmark here asks for.
KERNELS = ("rms_norm", "silu_and_mul", "qk_norm_rope_store", "few_rows", "sample", "batch_state")
# What is switched off at a time, by what it is called.
ABLATIONS = {
    "nothing": "",
    **{name: name for name in ("graphs", "overlap", *KERNELS)},
    "all kernels": " ".join((*KERNELS, "nucleus")),
    "nothing, again": "",
}
MOST_TRACE_BYTES = 15 << 20  # a file that comes back from the GPU machine may have 16 MiB


def shape_name(check: Check) -> str:
    return "tiny" if check.quick else "qwen3-0.6b"


def model_folder(check: Check) -> Path:
    return cached_random_checkpoint(shape_name(check), WEIGHTS)


def model_config(check: Check) -> dict[str, Any]:
    return json.loads((model_folder(check) / "config.json").read_text())


def draw(check: Check, workload: str) -> bench.Requests:
    return bench.Workload.parse(workload).draw(0, model_config(check)["vocab_size"])


def open_engine(check: Check, requests: bench.Requests, *options: str) -> bench.NanovllmEngine:
    """bench.py's engine on random weights, warmed up."""
    args = bench.build_parser().parse_args(["--device", check.device.type, *options])
    engine = bench.NanovllmEngine(model_folder(check), requests.longest, args)
    engine.run(requests.warm_up())
    return engine


def limits_of(check: Check, requests: bench.Requests, max_rows: int | None = None) -> Roofline:
    bandwidth, flops = ceilings(check)
    return roofline(
        list(map(len, requests.prompts)), requests.output_lens, model_config(check), bandwidth, flops, max_rows
    )


def measure_runs(check: Check, engine: bench.NanovllmEngine, requests: bench.Requests, repeats: int) -> Result:
    """Median seconds, tokens a second, where the time went, and the share of what the hardware allows."""
    times, details = zip(*(engine.run(requests) for _ in range(repeats)), strict=True)
    seconds = statistics.median(times)
    middle = details[times.index(statistics.median_low(times))]
    limit = limits_of(check, requests, engine.llm.engine.runner.num_slots)
    return {
        "output_tokens_per_second": requests.output_tokens / seconds,
        "seconds": seconds,
        "fastest": min(times),
        "slowest": max(times),
        "prefill_seconds": middle["prefill_seconds"],
        "decode_seconds": middle["decode_seconds"],
        "preemptions": middle["num_preemptions"],
        "roofline_seconds": limit.total,
        "of_roofline": limit.total / seconds,
    }


# ------------------------------------------------------------------------------------------------ throughput


def check_standard(check: Check) -> None:
    """The standard run, three times, beside what the hardware allows."""
    requests = draw(check, "3:8-16:4-8" if check.quick else bench.PRESETS["full"])
    limit = limits_of(check, requests)
    for key in ("prefill", "weights", "kv", "total"):
        check.note(f"roofline_{key}_seconds", getattr(limit, key))
    engine = open_engine(check, requests)
    try:
        for key, value in measure_runs(check, engine, requests, 3).items():
            check.note(key, value)
        metrics = engine.llm.get_metrics()
        for key in (
            "startup_seconds",
            "attention_backend",
            "num_graphs",
            "time_to_first_token",
            "time_per_output_token",
        ):
            check.note(key, metrics[key])
        with host_times(engine.llm) as seconds:
            total, _ = engine.run(requests)
        check.note("host_seconds", {"total": total, **seconds})
    finally:
        engine.close()


def check_latency(check: Check) -> None:
    """One request alone, beside what reading the weights once a token takes."""
    requests = draw(check, "1:8-8:6-6" if check.quick else "1:64-64:256-256")
    engine = open_engine(check, requests)
    try:
        for key, value in measure_runs(check, engine, requests, 5).items():
            check.note(key, value)
        limit = limits_of(check, requests)
        decode_seconds = check.results["decode_seconds"]
        check.note("us_per_decode_step", decode_seconds / limit.decode_steps * 1e6)
        check.note("us_of_reading_weights", limit.weights / limit.decode_steps * 1e6)
        check.note("of_weight_bandwidth", limit.weights / decode_seconds)
    finally:
        engine.close()


def check_many(check: Check) -> None:
    """Policies of admission: where all requests have a place at once, and where many wait for one."""
    standard, fewer, many, rows = (*(f"{n}:100-1024:100-1024" for n in (256, 1024, 4096)), "256")
    if check.quick:
        standard, fewer, many, rows = "2:8-16:4-8", "4:8-16:4-8", "6:8-16:4-8", "2"
    policies = {
        "mixed at once": AdmissionPolicy(),
        "prompts first and alone": AdmissionPolicy(mixed=False),
        "gathering 16": AdmissionPolicy(vacancies=16),
        "gathering 16, prompts alone": AdmissionPolicy(vacancies=16, mixed=False),
        "gathering 64": AdmissionPolicy(vacancies=64),
    }
    rivals = "mixed at once", "prompts first and alone"
    engine = open_engine(check, draw(check, many), "--max-num-seqs", rows)
    scheduler = engine.llm.engine.scheduler
    rates: dict[str, float] = {}

    def run(workload: str, policy: AdmissionPolicy) -> Result:
        scheduler.policy = policy
        result = measure_runs(check, engine, draw(check, workload), 1)
        rates.setdefault(workload, result["output_tokens_per_second"])
        return result | {"of_standard": result["output_tokens_per_second"] / rates.get(standard, float("nan"))}

    try:
        default = scheduler.policy
        check.note("default policy", str(default))
        check.part(f"{standard}, default", run, standard, default)
        check.part(f"{many}, default", run, many, default)
        for workload, names in ((standard, rivals), (many, rivals), (fewer, policies)):
            for name in names:
                check.part(f"{workload}, {name}", run, workload, policies[name])
    finally:
        engine.close()


def check_ablation(check: Check) -> None:
    """Half the standard run with everything on, and with one thing off at a time."""
    requests = draw(check, "2:8-16:4-8" if check.quick else "128:100-1024:100-1024")
    off = {"nothing": "", "graphs": "graphs"} if check.quick else ABLATIONS
    rates: dict[str, float] = {}

    def run(disabled: str) -> Result:
        with patch.dict(os.environ, {DISABLE_VARIABLE: disabled}):
            engine = open_engine(check, requests)
        try:
            result = measure_runs(check, engine, requests, 1)
            num_graphs = engine.llm.get_metrics()["num_graphs"]
        finally:
            engine.close()
        rate = result["output_tokens_per_second"]
        relative = rate / rates.setdefault("", rate)  # to what came first, which is without nothing
        names = ("output_tokens_per_second", "prefill_seconds", "decode_seconds")
        return {"relative": relative, **{name: result[name] for name in names}, "num_graphs": num_graphs}

    for name, disabled in off.items():
        check.part(f"without {name}", run, disabled)
    if not check.quick:
        small = "16:100-300:50-100"
        for backend in BACKENDS:
            check.part(f"backend {backend}, {small}", run_backend, check, draw(check, small), backend)


def run_backend(check: Check, requests: bench.Requests, backend: str) -> Result | str:
    try:
        engine = open_engine(check, requests, "--attention-backend", backend)
    except ValueError as error:
        return f"not here: {error}"
    try:
        return measure_runs(check, engine, requests, 1)
    finally:
        engine.close()


def bench_process(check: Check, workload: str, options: list[str], timeout: float, engine: str) -> Result:
    """A run of bench.py by itself; the figures of the engine named last."""
    command = [sys.executable, str(ROOT / "bench.py"), "--random-weights", shape_name(check), "--engine", engine]
    command += ["--workload", workload, "--json", "--weights-cache", str(WEIGHTS), *options]
    done = subprocess.run(
        [*command, "--device", check.device.type],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    report = json.loads(done.stdout)
    found = report["workloads"][0]
    figures = found["results"][engine.split(",")[-1]]
    names = ("output_tokens_per_second", "median_seconds", "prefill_seconds", "decode_seconds")
    result = {name: figures[name] for name in names if name in figures}
    result["num_graphs"] = report["engines"]["nanovllm"]["num_graphs"]
    if len(report["engines"]) > 1:
        result |= {f"setup {name}": engine["setup"] for name, engine in report["engines"].items()}
        result |= {f"seconds {name}": one["seconds"] for name, one in found["results"].items()}
    return result | {f"ratio {pair}": ratio for pair, ratio in found["ratios"].items()}


def check_hf(check: Check) -> None:
    """transformers' continuous batching on the same requests; where that is not to be had, its padded batches.

    Where flash-attn is installed it takes that, and the requests are the standard run's. Elsewhere they are fewer: each
    token of a step is compared with the contexts of all.
    """
    sizes = (2,) if check.quick else (8, 16, 32, 64, 128)
    lengths = "8-16:4-8" if check.quick else "100-1024:100-1024"
    options, limit, seconds = ["--separately"], 200.0, 0.0
    if hasattr(transformers.generation, "ContinuousBatchingConfig"):
        if check.on_cuda and find_spec("flash_attn"):
            thrice = [*options, "--repeats", "3"]
            if check.part("hf-cb 256", bench_process, check, f"256:{lengths}", thrice, limit, "nanovllm,hf-cb"):
                return
        for size in sizes:
            if seconds * 4 > 60:  # twice the rows, each of which is compared with twice the contexts
                check.note(f"hf-cb {size}", f"not run: {size // 2} requests took {seconds:.0f} s")
                return
            work = f"{size}:{lengths}"
            result = check.part(f"hf-cb {size}", bench_process, check, work, options, limit, "nanovllm,hf-cb")
            if result is None:
                break
            seconds, limit = result["median_seconds"], 310.0
        else:
            return
    check.note("hf-cb", "not to be had: what follows are padded batches")
    check.part(f"hf {sizes[0]}", bench_process, check, f"{sizes[0]}:{lengths}", options, limit, "nanovllm,hf")


# --------------------------------------------------------------------------------------------------- profile


@contextmanager
def host_times(llm: LLM) -> Iterator[dict[str, float]]:
    """Seconds that the host spends in the engine's functions, counted until the end of the context.

    ``execute`` includes ``apply`` and ``replay``; ``land`` includes ``wait``, for the device, and ``update``. Nothing
    that is called for every token is watched: the watching would cost more.
    """
    seconds: dict[str, float] = {}
    engine = llm.engine
    runner = engine.runner
    watched: list[tuple[Any, str, str]] = [
        (engine.scheduler, "schedule", "schedule"),
        (runner, "execute", "execute"),
        (runner.batch_state, "apply", "apply"),
        (StepHandle, "result", "wait"),
        (engine.scheduler, "update", "update"),
        (engine, "_land", "land"),
    ]
    if runner.graphs is not None:
        watched.append((runner.graphs, "replay", "replay"))

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    with ExitStack() as stack:
        for owner, attribute, name in watched:
            seconds[name] = 0.0
            stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        yield seconds


def check_profile(check: Check) -> None:
    """Where the time of decode steps goes, on the host and on the device, for full batches and a single request."""
    rows = 2 if check.quick else 256
    requests = draw(check, "1:8-16:4-8")
    engine = open_engine(check, requests)
    try:
        for batch in (rows, 1):
            check.part(f"batch {batch}", profile_steps, check, engine.llm, batch)
    finally:
        engine.close()


def profile_steps(check: Check, llm: LLM, rows: int) -> Result:
    """Some decode steps of ``rows`` sequences: host times first, then a trace."""
    steps, prompt_len = (3, 8) if check.quick else (50, 512)
    params = SamplingParams(temperature=0.6, max_tokens=3 * steps + 40, ignore_eos=True)
    engine = llm.engine
    vocab_size = engine.model_config.vocab_size
    llm.reset_prefix_cache()
    for row in range(rows):
        engine.add_request({"prompt_token_ids": [(row * 101 + i * 7) % vocab_size for i in range(prompt_len)]}, params)
    while engine.scheduler.waiting or any(seq.num_output_tokens < 2 for seq in engine.scheduler.running):
        engine.step()
    for _ in range(10):
        engine.step()
    synchronize(check)
    started = time.perf_counter()
    with host_times(llm) as seconds:
        for _ in range(steps):
            engine.step()
        synchronize(check)
    wall = time.perf_counter() - started
    events = trace(check, lambda: [engine.step() for _ in range(steps)], f"trace_{rows}.json.gz")
    engine.reset()
    result: Result = {"us_per_step": wall / steps * 1e6}
    check.note(f"batch {rows}, host us per step", {name: value / steps * 1e6 for name, value in seconds.items()})
    usage = device_usage(events, "kernel" if check.on_cuda else "cpu_op")
    for place, (name, share, count, mean) in enumerate(usage.pop("top"), 1):
        check.note(f"batch {rows} #{place}", f"{share:.1%} {count / steps:.1f} a step, {mean:.1f} us: {name[:110]}")
    return result | usage


def synchronize(check: Check) -> None:
    if check.on_cuda:
        torch.cuda.synchronize()


def trace(check: Check, function: Callable[[], Any], name: str) -> list[dict[str, Any]]:
    """Events of a Chrome trace of a call, which is also written to the output folder, compressed."""
    events = profiled_events(function, check.device)
    packed = gzip.compress(json.dumps({"traceEvents": events}).encode())
    if len(packed) > MOST_TRACE_BYTES:  # without what the host did
        events = [event for event in events if event.get("cat") != "cpu_op"]
        packed = gzip.compress(json.dumps({"traceEvents": events}).encode())
    if len(packed) <= MOST_TRACE_BYTES:
        (check.out / name).write_bytes(packed)
    return events
