"""What the CPU's kernels take: products beside oneDNN's, attention beside matmul's, a decode step by parts.

    python tools/measure_cpu.py                     # a minute or two; writes the checkpoint it needs (1.2 GB) once
    python tools/measure_cpu.py --json FILE

Run nothing else meanwhile. Products go through many weights in turn, so that each comes from memory, as in a model.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec
from nanovllm.attention.cpu import CpuAttention
from nanovllm.attention.matmul import MatmulAttention
from nanovllm.diagnostics.step_timer import timed_kernels
from nanovllm.layers.product import Int8Weight, OneDnnWeight, PackedWeight, TiledWeight
from nanovllm.utils.environment import hardware, versions
from nanovllm.utils.random_checkpoint import cached_random_checkpoint

CACHE = Path("~/.cache/nanovllm").expanduser()
OUTPUTS, INPUTS, NUM_WEIGHTS = 3072, 1024, 40
ROWS = (1, 4, 16, 64, 256, 512)
# Rows as (queries, context), and tokens that all contexts share.
ATTENTION: dict[str, tuple[list[tuple[int, int]], int]] = {
    "decode, 16 contexts of 200": ([(1, 200)] * 16, 0),
    "decode, 16 contexts of 1,000": ([(1, 1000)] * 16, 0),
    "decode, 1 context of 2,000": ([(1, 2000)], 0),
    "decode, 32 contexts of 1,056, 1,024 shared": ([(1, 1056)] * 32, 1024),
    "prompt of 512": ([(512, 512)], 0),
    "512 tokens after 1,536": ([(512, 2048)], 0),
}


def seconds_of(function: Callable[[], Any], at_least: float = 0.4) -> float:
    """Median seconds of a call."""
    function()
    times: list[float] = []
    end = time.perf_counter() + at_least
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_products() -> list[dict[str, Any]]:
    """Microseconds of a product by rows and kind of weight."""
    weight = torch.randn(OUTPUTS, INPUTS).bfloat16()
    everything: list[type[PackedWeight]] = [TiledWeight, OneDnnWeight, Int8Weight]
    kinds = [kind for kind in everything if kind.suits(weight)]
    weights = {
        kind.__name__: [kind(torch.randn(OUTPUTS, INPUTS).bfloat16()) for _ in range(NUM_WEIGHTS)] for kind in kinds
    }
    results = []
    for rows in ROWS:
        x = torch.randn(rows, INPUTS).bfloat16()
        line: dict[str, Any] = {"rows": rows}
        for name, these in weights.items():
            seconds = seconds_of(lambda these=these, x=x: [one.product(x, None, x.dtype) for one in these])  # type: ignore[misc]
            line[f"{name}_microseconds"] = round(seconds / NUM_WEIGHTS * 1e6, 1)
        results.append(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    return results


def measure_attention() -> list[dict[str, Any]]:
    """Microseconds of a layer's attention, by our kernel and by the ``matmul`` backend; many layers in turn."""
    results = []
    for name, (rows, shared) in ATTENTION.items():
        line: dict[str, Any] = {"case": name}
        for kind in (CpuAttention, MatmulAttention):
            line[f"{kind.name}_microseconds"] = round(_attention_seconds(kind, rows, shared) * 1e6, 1)
        results.append(line)
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    return results


def _attention_seconds(kind: type[AttentionBackend], rows: list[tuple[int, int]], shared: int) -> float:
    layers, block_size = 8, 16
    spec = AttentionSpec(layers, 16, 8, 128, torch.bfloat16, torch.device("cpu"), block_size)
    widths = [-(-context // block_size) for _, context in rows]
    backend = kind(spec)
    backend.allocate_cache(sum(widths))
    tables = torch.zeros(len(rows), max(widths), dtype=torch.int32)
    free = iter(torch.randperm(sum(widths)).tolist())
    common = [next(free) for _ in range(shared // block_size)]
    for row, width in enumerate(widths):
        own = [next(free) for _ in range(width - len(common))]
        tables[row, :width] = torch.tensor(common + own, dtype=torch.int32)

    def metadata(queries: list[int], contexts: list[int]) -> AttentionMetadata:
        places = [
            int(tables[row, position // block_size]) * block_size + position % block_size
            for row, (count, context) in enumerate(zip(queries, contexts, strict=True))
            for position in range(context - count, context)
        ]
        return AttentionMetadata(queries, contexts, tables, torch.tensor(places))

    def projections(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = torch.randn(3, tokens, 16, 128).bfloat16()
        return q, k[:, :8], v[:, :8]

    contexts = [context for _, context in rows]
    filling = backend.begin_step(metadata(contexts, contexts))
    for layer in range(layers):
        filling.attend(layer, *projections(sum(contexts)))
    queries = [count for count, _ in rows]
    step = backend.begin_step(metadata(queries, contexts))
    new = projections(sum(queries))
    return seconds_of(lambda: [step.attend(layer, *new) for layer in range(layers)]) / layers


def measure_step(batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of a decode step of Qwen3-0.6B, recorded as it runs and, launch by launch, by kernel."""
    model, steps = str(cached_random_checkpoint("qwen3-0.6b", CACHE)), 48
    rng = random.Random(0)
    result: dict[str, Any] = {"batch": batch, "context": context}
    for eager in (False, True):
        with LLM(model, skip_tokenizer_init=True, enforce_eager=eager, max_model_len=4096) as llm:
            # Of a prompt whose full blocks are cached, one token is left: its step is one of decode's.
            prompts = [[rng.randrange(10_000) for _ in range(context + 1)] for _ in range(batch)]
            llm.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
            kernels: dict[str, float] = {}
            before = llm.get_metrics()
            with timed_kernels(kernels):
                llm.generate(prompts, SamplingParams(max_tokens=steps, ignore_eos=True), use_tqdm=False)
            after = llm.get_metrics()
            decode = (after["decode_seconds"] - before["decode_seconds"]) / (steps - 1) * 1e3
            result["one_by_one_milliseconds" if eager else "milliseconds"] = round(decode, 2)
            if eager:
                share = 1e3 / steps
                result["kernels_milliseconds"] = {name: round(t * share, 2) for name, t in sorted(kernels.items())}
    parts = result["kernels_milliseconds"]
    most = sum(time for name, time in parts.items() if name in ("linear", "paged_attention", "_combine"))
    # Everything else as long as it takes within a recorded step: all of its kernels, and what is outside of kernels.
    result["share_of_products_and_attention"] = round(1 - (sum(parts.values()) - most) / result["milliseconds"], 3)
    print(result, flush=True)
    return result


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = {
        "command": "python tools/measure_cpu.py",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "products_3072x1024": measure_products(),
        "attention_16_heads_8_kv_heads_of_128_bfloat16": measure_attention(),
        "decode_steps_qwen3_0.6b_bfloat16": [measure_step(1, 128), measure_step(16, 160), measure_step(64, 64)],
    }
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
