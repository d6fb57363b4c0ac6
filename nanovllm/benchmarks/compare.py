"""Comparisons: nanovllm beside other engines, each in a process of its own, in turns on the same requests."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.benchmarks.engine_options import INTEGER_OPTIONS, OTHER_OPTIONS
from nanovllm.benchmarks.engine_process import EngineError, EngineProcess, EngineSpec
from nanovllm.benchmarks.plot import draw, require_matplotlib
from nanovllm.benchmarks.report import Result, engine_table, failures, page, result_of, summarise, workload_table
from nanovllm.utils.openmp import as_it_was
from nanovllm.utils.random_requests import Requests, Workload

PACKAGE = Path(__file__).resolve().parent.parent
LAUNCHER = PACKAGE / "benchmarks" / "peers" / "launch.py"
OURS = "nanovllm"
COMPARED_SHAPE = "qwen3-0.6b"
DEFAULT_TIMEOUT = 900


@dataclass(frozen=True)
class Peer:
    """Where in the folder of peers an engine and its form of the checkpoint are, and what module runs it."""

    environment: str
    module: str
    checkpoint: str
    """``{}`` stands for the checkpoint's name."""


PEERS = {
    "vllm": Peer("vllm", "run_vllm", "{}"),
    "openvino": Peer("openvino", "run_openvino", "{}-openvino"),
    "llama": Peer("llama", "run_llama", "{}-bf16.gguf"),
    "llama-q8": Peer("llama", "run_llama", "{}-q8_0.gguf"),
    "hf": Peer("hf", "run_hf", "{}"),
}


def is_ours(name: str) -> bool:
    """Whether it is nanovllm or, as in nanovllm-int8, a variant of it."""
    return name == OURS or name.removeprefix(f"{OURS}-") not in ("", name)


def own_spec(name: str, model: Path, settings: dict[str, Any], arguments: dict[str, Any]) -> EngineSpec:
    """nanovllm with the command line's ``arguments``; ``nanovllm-int8`` also with ``quantization="int8"``."""
    quantization = name.removeprefix(OURS).removeprefix("-")
    extra = {"quantization": quantization} if quantization else {}
    everything = {**settings, "model": str(model), "arguments": arguments, "extra": extra}
    return EngineSpec(
        name, [sys.executable, "-m", "nanovllm.benchmarks.peers.run_nanovllm"], everything, PACKAGE.parent
    )


def peer_spec(name: str, folder: Path, checkpoint: str, settings: dict[str, Any]) -> EngineSpec:
    """An engine set up in ``folder``.

    Raises:
        ValueError: Its environment or its checkpoint is not there.
    """
    peer = PEERS[name]
    # Made absolute without following links: python is one, whose place says which environment it belongs to.
    python = folder.absolute() / peer.environment / "bin" / "python"
    model = folder.absolute() / peer.checkpoint.format(checkpoint)
    for needed in (python, model):
        if not needed.exists():
            raise ValueError(
                f"--compare {name}: {needed} is missing "
                f"(python tools/setup_peers.py {folder} --only {peer.environment} --shape {checkpoint})"
            )
    environment = {
        key: value for key, value in as_it_was(os.environ).items() if key not in ("PYTHONPATH", "PYTHONHOME")
    }
    command = [str(python), str(LAUNCHER), peer.module]
    return EngineSpec(name, command, {**settings, "model": str(model)}, environment=environment)


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that they too leave no engine behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup's wish
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Comparison:
    """Engines that take turns.

    Args:
        specs: The engines, in the order of their turns.
        warm_up: What each runs once after it has started.
        timeout: Seconds an engine may take to start, or for a workload.
        logs: A folder, for what each engine prints.
    """

    def __init__(self, specs: Sequence[EngineSpec], warm_up: Requests, timeout: float, logs: Path) -> None:
        self.warm_up = warm_up
        self.engines = [EngineProcess(spec, logs / f"{spec.name}.log", timeout) for spec in specs]
        self.ours = [engine.name for engine in self.engines if is_ours(engine.name)]
        self.never_started: dict[str, str] = {}

    def __enter__(self) -> "Comparison":
        """Start all engines, one after the other; those that do not start take no part."""
        with ExitStack() as stack:
            self._close_all(stack, EngineProcess.kill)
            for engine in self.engines:
                print(f"{engine.name:<14} starts ...", flush=True)
                try:
                    self._open(engine)
                except EngineError as error:
                    self.never_started[engine.name] = str(error)
                    print(f"{engine.name:<14} failed: {error}", flush=True)
                else:
                    print(f"{engine.name:<14} ready in {engine.startup_seconds:.1f} s: {engine.setup}", flush=True)
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:
            self._close_all(stack, EngineProcess.kill)
            if kind is None:
                for engine in self.engines:
                    engine.quit()

    def _close_all(self, stack: ExitStack, close: Callable[[EngineProcess], None]) -> None:
        """However many interrupts come meanwhile, all are closed."""
        for engine in self.engines:
            stack.callback(close, engine)

    def _open(self, engine: EngineProcess) -> None:
        engine.start()
        try:
            engine.run(self.warm_up)
        except BaseException:
            engine.kill()
            raise
        engine.pause()

    def measure(self, workload: Workload, requests: Requests, repeats: int) -> Result:
        """Time the engines on the requests, ``repeats`` rounds; an engine that fails is out for this workload.

        Returns:
            The entry of ``report.summarise``.
        """
        errors = dict(self.never_started)
        for engine in self.engines:
            if engine.name not in errors and not engine.running:  # it died in an earlier workload
                try:
                    print(f"{engine.name:<14} starts again ...", flush=True)
                    self._open(engine)
                except EngineError as error:
                    errors[engine.name] = f"it did not start again: {error}"
        times: dict[str, list[float]] = {engine.name: [] for engine in self.engines}
        for number in range(1, repeats + 1):
            for engine in self.engines:
                if engine.name in errors:
                    continue
                try:
                    seconds = self._turn(engine, requests)
                    times[engine.name].append(seconds)
                    print(f"  round {number}  {engine.name:<14}{seconds:9.2f} s", flush=True)
                except EngineError as error:
                    errors[engine.name] = str(error)
                    print(f"  round {number}  {engine.name:<14} failed: {error}", flush=True)
        results: dict[str, Result] = {}
        for name, seconds_of in times.items():
            failed = {"error": errors[name], "seconds": seconds_of} if name in errors else None
            results[name] = failed or result_of(seconds_of, requests)
        return summarise(workload, requests, results, self.ours)

    def _turn(self, engine: EngineProcess, requests: Requests) -> float:
        engine.resume()
        try:
            return engine.run(requests)
        finally:
            engine.pause()

    def describe(self) -> dict[str, Result]:
        """What each engine is, and what it needs."""
        return {
            engine.name: {"error": self.never_started[engine.name]}
            if engine.name in self.never_started
            else {
                "setup": engine.setup,
                "startup_seconds": engine.startup_seconds,
                "peak_memory_bytes": engine.peak_memory_bytes,
            }
            for engine in self.engines
        }


def compared_names(text: str) -> list[str]:
    """Read ``NAME[,NAME]``; nanovllm comes first if it is not named."""
    names = text.split(",")
    for name in names:
        if name not in PEERS and not is_ours(name):
            choices = ", ".join([*PEERS, OURS, f"{OURS}-QUANTIZATION"])
            raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {choices})")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names an engine twice")
    return names if OURS in names else [OURS, *names]


def check_comparison(args: argparse.Namespace) -> None:
    """Raise ValueError if the command line's options for a comparison do not go together."""
    if not args.compare:
        for option in ("peers", "out", "timeout"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option} needs --compare")
        return
    if not hasattr(os, "killpg"):
        raise ValueError("--compare stops idle engines with signals, which this system does not have")
    if args.peers is None:
        raise ValueError("--compare needs --peers, the folder that tools/setup_peers.py has made")
    excluded = {
        "--engine": args.engine != [OURS],
        "--separately": args.separately,
        "--model (use --random-weights)": args.model,
        "--hf-batch-size": args.hf_batch_size,
        "--quantization (use nanovllm-int8)": args.quantization,
        f"--device {args.device}": args.device not in ("auto", "cpu"),
        f"--dtype {args.dtype}": args.dtype not in ("auto", "bfloat16"),
    }
    for option, given in excluded.items():
        if given:
            raise ValueError(f"--compare, which runs in bfloat16 on the CPU, and {option} exclude each other")
    if args.out and not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    require_matplotlib()


def engine_specs(args: argparse.Namespace, shape: str, longest: int) -> list[EngineSpec]:
    """The engines that the command line names, or ValueError if one is not set up."""
    settings = {"longest": longest, "temperature": args.temperature, "seed": args.seed}
    options = {name: getattr(args, name) for name in (*INTEGER_OPTIONS, *OTHER_OPTIONS)}
    arguments = {**options, "dtype": "bfloat16", "device": "cpu", "seed": args.seed, "temperature": args.temperature}
    return [
        own_spec(name, args.peers.absolute() / shape, settings, arguments)
        if is_ours(name)
        else peer_spec(name, args.peers, shape, settings)
        for name in args.compare
    ]


def compare_engines(
    args: argparse.Namespace, shape: str, drawn: list[tuple[Workload, Requests]], report: Result
) -> Result:
    """Run a comparison, print it as it goes, and write its table, figures and plot.

    Args:
        args: The benchmark's options.
        shape: The checkpoint's name in the folder of peers.
        drawn: Workloads and what they ask.
        report: What is known beforehand; engines and workloads are added.
    """
    specs = engine_specs(args, shape, max(requests.longest for _, requests in drawn))
    out = args.out or Path("comparison")
    logs = Path(tempfile.mkdtemp(prefix="nanovllm-compare-"))
    timeout = float(args.timeout or DEFAULT_TIMEOUT)
    print(f"what the engines print: {logs}")
    with termination_as_interrupt(), Comparison(specs, drawn[0][1].warm_up(), timeout, logs) as comparison:
        report["ours"] = comparison.ours
        for workload, requests in drawn:
            print(f"\nworkload {workload}", flush=True)
            entry = comparison.measure(workload, requests, args.repeats)
            print(f"\n{workload_table(entry, comparison.ours)}", flush=True)
            report["workloads"].append(entry)
            report["engines"] = comparison.describe()
            write(report, out)  # after each, so that an interrupt loses one workload at most
    print(f"\n{engine_table(report['engines'])}\n\nwritten: {out}.md, {out}.json, {out}.png")
    if failed := failures(report):
        print(f"failed: {', '.join(failed)}; see {logs}")
    else:
        shutil.rmtree(logs)
    return report


def write(report: Result, out: Path) -> None:
    """Write ``out``.md, .json and .png."""
    pages = {
        ".md": page(report),
        ".json": json.dumps(report, indent=2, default=str) + "\n",
    }
    for ending, text in pages.items():
        Path(f"{out}{ending}").write_text(text, encoding="utf-8")
    draw(report, Path(f"{out}.png"))
