"""Everything that only a GPU can show, in one command: tests, backends against references, parity, benchmarks.

    python tools/gpu_check.py --out DIR                          # all stages
    python tools/gpu_check.py --out DIR --stages device backends # some of them
    python tools/gpu_check.py --out DIR --device cpu --quick     # a rehearsal without a GPU

Writes DIR/gpu_check.json and DIR/gpu_check.txt after every stage, so that what was measured survives whatever comes
after. Each stage ends well within ten minutes. A stage that fails is noted and the next one runs; the exit code is 1
if any failed.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import bench  # noqa: E402
from nanovllm import LLM, SamplingParams  # noqa: E402
from nanovllm.attention import BACKENDS, AttentionSpec  # noqa: E402
from nanovllm.attention.base import AttentionMetadata  # noqa: E402
from nanovllm.utils.environment import hardware, versions  # noqa: E402

Result = dict[str, Any]
# (query lengths, context lengths, heads, KV heads, head size, block size)
ATTENTION_CASES = [
    ([1] * 8, [1, 15, 16, 17, 300, 1024, 2048, 33], 16, 8, 128, 16),
    ([64, 1, 17, 128], [64, 500, 117, 128], 16, 8, 128, 16),
    ([256, 1], [700, 31], 32, 8, 128, 256),
    ([33, 1, 1], [33, 64, 65], 8, 1, 64, 16),
]
ERROR_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def check_device(device: torch.device, quick: bool) -> Result:
    """The ceilings: copy bandwidth (bytes read plus written) and bfloat16 matrix products, on random data."""
    mib, size = (64, 512) if quick else (4096, 8192)
    source = torch.rand(mib * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_seconds = median_seconds(lambda: a @ b, device)
    return {
        "copy_bandwidth_tb_s": 2 * source.nbytes / seconds / 1e12,
        "bfloat16_tflop_s": 2 * size**3 / product_seconds / 1e12,
    }


def check_tests(device: torch.device, quick: bool) -> Result:
    """Every test marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
    if done.returncode not in (0, 5):  # 5: no test was chosen
        raise RuntimeError(f"{summary}\n{done.stdout[-3000:]}")
    return {"summary": re.sub(r"=+", "", summary).strip()}


def check_backends(device: torch.device, quick: bool) -> Result:
    """Each backend that runs here against float64 matrix products on the CPU: largest relative error."""
    result: Result = {}
    for name, backend in BACKENDS.items():
        for dtype, limit in ERROR_LIMITS.items():
            errors = []
            for case in ATTENTION_CASES:
                reason = backend.why_not(attention_spec(case, dtype, device))
                if reason is not None:
                    result[f"{name} {dtype}"] = f"not here: {reason}"
                    break
                reference = run_attention(case, "matmul", torch.float64, torch.device("cpu"), dtype)
                out = run_attention(case, name, dtype, device, dtype).cpu().double()
                errors.append(float((out - reference).norm() / reference.norm()))
            else:
                result[f"{name} {dtype}"] = max(errors)
                if not max(errors) <= limit:  # a NaN fails too
                    raise RuntimeError(f"{name} in {dtype}: relative error {max(errors)} exceeds {limit}")
    return result


def check_parity(device: torch.device, quick: bool) -> Result:
    """Greedy tokens of the demo checkpoint in float32, on this device with each backend, against the CPU's."""
    from nanovllm.demo import DEMO_MODEL_PATH

    prompts = [f"<|im_start|>user\nWhat is {a} + {7 * a}?<|im_end|>\n<|im_start|>assistant\n" for a in range(3, 60, 3)]
    params = SamplingParams(temperature=0, max_tokens=64)
    seeded = SamplingParams(temperature=0.8, max_tokens=32, seed=1)

    def answers(where: str, backend: str) -> list[list[int]]:
        with LLM(DEMO_MODEL_PATH, device=where, dtype="float32", attention_backend=backend) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False) + llm.generate(prompts, seeded, use_tqdm=False)
        return [output["token_ids"] for output in outputs]

    expected = answers("cpu", "matmul")
    result: Result = {}
    for name in BACKENDS:
        try:
            found = answers(str(device), name)
        except ValueError as error:
            result[name] = f"not here: {error}"
            continue
        result[name] = f"{sum(a == b for a, b in zip(expected, found, strict=True))} of {len(expected)} equal"
        if found != expected:
            raise RuntimeError(f"{name}: {result[name]}")
    return result


def check_bench(device: torch.device, quick: bool) -> Result:
    """The standard run, decoding one request alone, and transformers beside them."""
    workloads = ["2:8-16:4-8"] if quick else [bench.PRESETS["full"], "1:64-64:256-256"]
    shape = "tiny" if quick else "qwen3-0.6b"
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for workload, engines in zip(workloads, ("nanovllm", "nanovllm,hf"), strict=False):
            report = Path(folder, "report.json")
            arguments = ["--random-weights", shape, "--workload", workload, "--engine", engines, "--json", str(report)]
            arguments += ["--device", device.type, "--gpu-memory-utilization", "0.8", "--weights-cache", folder]
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if bench.main(arguments) != 0:
                    raise RuntimeError(printed.getvalue())
            result[workload] = json.loads(report.read_text())
    return result


STAGES: dict[str, Callable[[torch.device, bool], Result]] = {
    "device": check_device,
    "tests": check_tests,
    "backends": check_backends,
    "parity": check_parity,
    "bench": check_bench,
}


def attention_spec(case: tuple, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
    _, _, heads, kv_heads, head_dim, block_size = case
    return AttentionSpec(1, heads, kv_heads, head_dim, dtype, device, block_size)


def run_attention(
    case: tuple, name: str, dtype: torch.dtype, device: torch.device, rounded: torch.dtype
) -> torch.Tensor:
    """Compute the case's contexts in two steps, history then queries; inputs are rounded to ``rounded`` first."""
    query_lengths, contexts, heads, kv_heads, head_dim, block_size = case
    backend = BACKENDS[name](attention_spec(case, dtype, device))
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-context // block_size) for context in contexts]
    backend.allocate_cache(sum(blocks))
    order = torch.randperm(sum(blocks), generator=generator).split(blocks)  # no table is contiguous
    tables = torch.zeros(len(blocks), max(blocks), dtype=torch.int64)
    for row, ids in enumerate(order):
        tables[row, : len(ids)] = ids

    def step(starts: list[int], ends: list[int]) -> torch.Tensor:
        rows = [row for row, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
        positions = [torch.arange(starts[row], ends[row]) for row in rows]
        slots = [
            tables[row][p // block_size] * block_size + p % block_size for row, p in zip(rows, positions, strict=True)
        ]
        metadata = AttentionMetadata(
            [ends[row] - starts[row] for row in rows],
            [ends[row] for row in rows],
            tables[rows].to(device),
            torch.cat(slots).to(device),
        )
        tokens = sum(metadata.query_lengths)
        q, k, v = (torch.randn(tokens, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads))
        q, k, v = (x.to(rounded).to(dtype).to(device) for x in (q, k, v))
        return backend.begin_step(metadata).attend(0, q, k, v)

    starts = [context - length for context, length in zip(contexts, query_lengths, strict=True)]
    step([0] * len(starts), starts)
    return step(starts, list(contexts))


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 11) -> float:
    """Median time of a call, by device events on CUDA."""
    function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def table(report: Result) -> str:
    """A line a stage, and a line a figure."""
    lines = [f"{', '.join(report['hardware']['gpus']) or report['hardware']['cpu']}; {report['versions']}"]
    for name, stage in report["stages"].items():
        lines.append(f"{name}: {'ok' if stage['ok'] else 'FAILED'} in {stage['seconds']:.1f} s")
        if not stage["ok"]:
            lines.append(f"    {stage['error'].strip().splitlines()[-1]}")
        for key, value in stage.get("result", {}).items():
            if name == "bench":
                measured = value["workloads"][0]
                for engine, figures in measured["results"].items():
                    lines.append(f"    {key} {engine}: {figures['output_tokens_per_second']:.0f} output tok/s")
            else:
                lines.append(f"    {key}: {value if isinstance(value, str) else f'{value:.4g}'}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu for a rehearsal")
    parser.add_argument("--quick", action="store_true", help="sizes for a rehearsal; figures mean nothing")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here (--device cpu --quick rehearses without one)")
    args.out.mkdir(parents=True, exist_ok=True)
    report: Result = {"versions": versions(ROOT), "hardware": hardware(), "quick": args.quick, "stages": {}}
    for name in args.stages:
        started = time.perf_counter()
        stage: Result = {"ok": True}
        try:
            stage["result"] = STAGES[name](device, args.quick)
        except Exception:  # note it and go on: the device may not be here tomorrow
            stage.update(ok=False, error=traceback.format_exc())
        stage["seconds"] = time.perf_counter() - started
        report["stages"][name] = stage
        (args.out / "gpu_check.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
        (args.out / "gpu_check.txt").write_text(table(report))
    print(table(report), end="")
    return 0 if all(stage["ok"] for stage in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
