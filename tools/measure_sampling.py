"""What sampling costs: a plain batch, one whose rows all ask for something else, and its share of a decode step.

    python tools/measure_sampling.py [--json FILE]

Vocabulary of 151,936, on the CPU. Logits are peaked, as a language model's are, or flat: normal with a standard
deviation of 1, as with random weights.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nanovllm import SamplingParams
from nanovllm.engine.batch_state import BatchState
from nanovllm.engine.step_plan import SlotEntry, StepPlan
from nanovllm.layers.sampler import Sampler
from nanovllm.utils.environment import hardware, versions

VOCAB_SIZE = 151_936
CONTEXT = 256  # tokens a row holds


def peaked(rows: int) -> torch.Tensor:
    """Logits of which a few dozen tokens hold nearly all the probability, float32 [rows, VOCAB_SIZE]."""
    logits = torch.randn(rows, VOCAB_SIZE) * 2
    logits.scatter_add_(1, torch.randint(VOCAB_SIZE, (rows, 40)), 12 + 3 * torch.randn(rows, 40))
    return logits


def flat(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE)


def plain(row: int) -> SamplingParams:
    return SamplingParams(temperature=0.7)


def truncated(row: int) -> SamplingParams:
    """Different temperature, top-k, top-p and min-p in every row."""
    return SamplingParams(
        temperature=0.5 + row / 500,
        top_k=(0, 10 + row)[row % 2],
        top_p=(1.0, 0.95 - row / 2000)[row % 4 > 0],
        min_p=(0.0, 0.01 + row / 10000)[row % 3 == 0],
    )


def everything(row: int) -> SamplingParams:
    """The same, and penalties, biases and a least length in every row."""
    given = truncated(row)
    return SamplingParams(
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        presence_penalty=0.1 + row / 1000,
        frequency_penalty=0.2 + row / 1000,
        repetition_penalty=1.0 + row / 1000,
        logit_bias={row: 1.0, 1000 + row: -1.0},
        min_tokens=10,
    )


def sampling_step(rows: int, params: Callable[[int], SamplingParams]) -> Callable[[torch.Tensor], torch.Tensor]:
    """All that a step does from raw logits to tokens, for rows with these parameters."""
    device = torch.device("cpu")
    state = BatchState(rows, CONTEXT + 64, 16, VOCAB_SIZE, device)
    sampler = Sampler(VOCAB_SIZE, device)
    plan = StepPlan()
    for row in range(rows):
        tokens = torch.randint(VOCAB_SIZE, (CONTEXT,)).tolist()
        plan.entered.append(SlotEntry(row, tokens, [0] * 20, params(row), row * 7919, CONTEXT // 2, None, (5, 6)))
        plan.slots.append(row)
        plan.starts.append(CONTEXT - 1)
        plan.lengths.append(1)
        plan.samples.append(True)
    state.apply(plan)

    def run(logits: torch.Tensor) -> torch.Tensor:
        places = state.step_input(plan).places
        assert places is not None
        state.rules.apply(logits, places.slots, places.slot_index, places.positions, places.longest, state.token_ids)
        return sampler(logits, state.sample_input(places).rows)

    return run


@torch.inference_mode()
def measure(rows: int, make: Callable[[int], torch.Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds of a step's sampling by kind of batch, medians; the kinds take turns."""
    torch.manual_seed(0)
    logits = make(rows)
    kinds = {"plain": plain, "truncated": truncated, "everything": everything}
    steps = {name: sampling_step(rows, params) for name, params in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            given = logits.clone()  # what a step does to its logits must not pile up
            start = time.perf_counter()
            step(given)
            if repeat:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "vocabulary": VOCAB_SIZE,
        "milliseconds": {},
    }
    for rows, repeats in ((16, 31), (256, 9)):
        for make in (peaked, flat):
            found = measure(rows, make, repeats)
            report["milliseconds"][f"{rows} rows, {make.__name__}"] = found
            ratios = ", ".join(f"{name} {ms:.1f} ms ({ms / found['plain']:.2f}x)" for name, ms in found.items())
            print(f"{rows:>4} rows, {make.__name__:<7} {ratios}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
