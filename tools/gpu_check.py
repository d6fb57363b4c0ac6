"""Everything that only a GPU can show, in one command: tests, kernels against references, parity, benchmarks, profiles.

    python tools/gpu_check.py --out DIR                            # all stages
    python tools/gpu_check.py --out DIR --stages device kernels    # some of them
    python tools/gpu_check.py --out DIR --device cpu --quick       # a rehearsal without a GPU

Writes DIR/gpu_check.json and DIR/gpu_check.txt after every stage, and what a stage has found so far to DIR/stage.json,
so that what was measured survives whatever comes after. Each stage runs in a process of its own: after an illegal
memory access, only a new one can use the device, so then the stage goes on in another, after the part that failed. A
stage that fails, or takes longer than its limit, is noted and the next one runs; the exit code is 1 if any failed.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import gpu_attention  # noqa: E402
import gpu_few_rows  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_stages  # noqa: E402
from gpu_measure import Check, DeviceLostError, Result  # noqa: E402

from nanovllm.utils.environment import hardware, versions  # noqa: E402

# By name: the stage, and the seconds after which it is ended. A command on the GPU machine may take 600.
STAGES: dict[str, tuple[Callable[[Check], None], float]] = {
    "device": (gpu_kernels.check_device, 60),
    "kernels": (gpu_kernels.check_kernels, 240),
    "compiled": (gpu_kernels.check_compiled, 240),
    "backends": (gpu_attention.check_backends, 240),
    "tests": (gpu_stages.check_tests, 480),
    "parity": (gpu_stages.check_parity, 300),
    "graphs": (gpu_stages.check_graphs, 240),
    "standard": (gpu_speed.check_standard, 240),
    "latency": (gpu_speed.check_latency, 120),
    "few_rows": (gpu_few_rows.check_few_rows, 240),
    "profile": (gpu_speed.check_profile, 240),
    "memory": (gpu_stages.check_memory, 240),
    "many": (gpu_speed.check_many, 480),
    "ablation": (gpu_speed.check_ablation, 540),
    "tune": (gpu_attention.check_tune, 540),
    "hf": (gpu_speed.check_hf, 560),
}
WORKER = [sys.executable, str(Path(__file__).resolve())]
DEVICE_LOST = 75  # exit code of a worker that can do no more but has noted what it found
MOST_ATTEMPTS = 10
STAGE_FILE = "stage.json"
LINE = 230  # characters of a line of the table


def run_stage(name: str, check: Check) -> Result:
    """Run a stage in this process; what it found, and what went wrong.

    Raises:
        DeviceLostError: The device cannot be used any more. What was found has been saved.
    """
    try:
        STAGES[name][0](check)
    except DeviceLostError:
        raise
    except Exception:  # note it and go on: the device may not be here tomorrow
        check.fail("stage", traceback.format_exc())
    return findings(check)


def findings(check: Check) -> Result:
    return {"results": check.results, "errors": check.errors, "tried": check.tried}


def save_to(path: Path) -> Callable[[Check], None]:
    def save(check: Check) -> None:
        new = path.with_suffix(".new")  # whoever ends this process must find the file whole
        new.write_text(json.dumps({**findings(check), "earlier": check.earlier}, default=str))
        new.replace(path)

    return save


def supervise(name: str, args: argparse.Namespace, earlier: dict[str, Result], seconds: float) -> Result:
    """Run a stage in processes of its own until it is through; what it found, and what went wrong."""
    path = args.out / STAGE_FILE
    found: Result = {"results": {}, "errors": {}, "tried": []}
    deadline = time.monotonic() + seconds
    for _ in range(MOST_ATTEMPTS):
        path.write_text(json.dumps({"results": {}, "errors": {}, "tried": [], "earlier": earlier}, default=str))
        command = [*WORKER, "--out", str(args.out), "--worker", name, "--device", args.device]
        command += ["--quick"] if args.quick else []
        command += ["--skip", *found["tried"]] if found["tried"] else []
        code = run_until(command, deadline)
        problem = f"ended after {seconds:.0f} s" if code is None else f"the process ended with exit code {code}"
        new = json.loads(path.read_text())
        for key in ("results", "errors"):
            found[key] |= new[key]
        found["tried"] += new["tried"]
        if code == 0:
            return found
        last = new["tried"][-1] if new["tried"] else "stage"
        if code != DEVICE_LOST:
            found["errors"].setdefault(last, problem)
            found["results"].setdefault(last, f"FAILED: {problem}")
        if code is None or not new["tried"]:  # no time is left, or nothing to go on after
            return found
    found["errors"]["stage"] = f"given up after {MOST_ATTEMPTS} processes"
    return found


def run_until(command: list[str], deadline: float) -> int | None:
    """Exit code of a command; None if it had to be ended, with all that it had started."""
    process = subprocess.Popen(command)
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
        process.wait()
        return None


def work(args: argparse.Namespace) -> int:
    """What a stage's process does; the exit code."""
    path = args.out / STAGE_FILE
    earlier = json.loads(path.read_text())["earlier"]
    save = save_to(path)
    check = Check(torch.device(args.device), args.quick, args.out, earlier, frozenset(args.skip), save)
    try:
        run_stage(args.worker, check)
    except DeviceLostError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)  # clean-up would ask the device
    save(check)
    return 0


def table(report: Result) -> str:
    """A line a stage, and a line a figure."""
    machine = ", ".join(report["hardware"]["gpus"]) or report["hardware"]["cpu"]
    lines = [f"{machine}; {', '.join(f'{name} {version}' for name, version in report['versions'].items())}"]
    for name, stage in report["stages"].items():
        lines.append(f"{name}: {'ok' if stage['ok'] else 'FAILED'} in {stage['seconds']:.1f} s")
        lines += [f"    {key}: {shown(value)}"[:LINE] for key, value in stage["results"].items()]
        lines += [
            f"    {key} FAILED: {error.strip().splitlines()[-1]}"[:LINE]
            for key, error in stage["errors"].items()
            if key not in stage["results"]
        ]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="sizes for a rehearsal; figures mean nothing")
    parser.add_argument("--minutes", type=float, metavar="N", help="end after this time; what is left is not run")
    same_help = "run all stages in this process: quicker, but a crash ends it"
    parser.add_argument("--same-process", action="store_true", help=same_help)
    parser.add_argument("--worker", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="+", default=[], help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here (--device cpu --quick rehearses without one)")
    transformers.utils.logging.disable_progress_bar()
    if args.worker:
        return work(args)
    args.out.mkdir(parents=True, exist_ok=True)
    report: Result = {"versions": versions(), "hardware": hardware(), "quick": args.quick, "stages": {}}
    started = time.monotonic()
    for name in args.stages:
        begun = time.monotonic()
        left = STAGES[name][1] if args.minutes is None else min(STAGES[name][1], 60 * args.minutes - (begun - started))
        earlier = {other: stage["results"] for other, stage in report["stages"].items()}
        if left < 5:
            found: Result = {"results": {}, "errors": {"stage": "not run: no time was left"}}
        elif args.same_process:
            found = run_stage(name, Check(device, args.quick, args.out, earlier))
        else:
            found = supervise(name, args, earlier, left)
        stage = {"ok": not found["errors"], "seconds": time.monotonic() - begun, **found}
        report["stages"][name] = stage
        (args.out / "gpu_check.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
        (args.out / "gpu_check.txt").write_text(table(report))
        print(f"{name}: {'ok' if stage['ok'] else 'FAILED'} in {stage['seconds']:.1f} s", flush=True)
    for left in (args.out / STAGE_FILE, (args.out / STAGE_FILE).with_suffix(".new")):
        left.unlink(missing_ok=True)
    print(table(report), end="")
    return 0 if all(stage["ok"] for stage in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
