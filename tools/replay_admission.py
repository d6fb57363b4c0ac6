"""What policies of admission cost where they were not measured: the scheduler's steps, at what steps took elsewhere.

    python tools/replay_admission.py        # policies on the workloads of `gpu_check.py --stages many`

The scheduler plans every step of a workload under a policy; no model runs. What a step costs beyond reading keys and
values (which the measured bandwidth of attention gives) is fitted to three measured runs: a decode step, a step with
prompts in it, and each token of a prompt. The last column has the runs that were measured, those three among them.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanovllm.engine.admission import AdmissionPolicy  # noqa: E402
from nanovllm.engine.block_manager import BlockManager  # noqa: E402
from nanovllm.engine.scheduler import Scheduler  # noqa: E402
from nanovllm.engine.sequence import Sequence as Row  # noqa: E402
from nanovllm.engine.step_plan import StepResult  # noqa: E402
from nanovllm.sampling_params import SamplingParams  # noqa: E402
from nanovllm.utils.random_requests import Workload  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "h200_gpu_check.json"
LENGTHS = "100-1024:100-1024"
VOCAB_SIZE = 151_936
# As the engine had them there: slots, the step's budget of tokens, KV blocks and their size.
SLOTS, BUDGET, BLOCKS, BLOCK_SIZE = 256, 16_384, 36_208, 32
KV_BYTES = 28 * 2 * 8 * 128 * 2  # of a token: layers, keys and values, heads, their size, bfloat16
POLICIES = {
    "mixed at once": AdmissionPolicy(),
    "prompts first and alone": AdmissionPolicy(mixed=False),
    "gathering 16": AdmissionPolicy(vacancies=16),
    "gathering 16, prompts alone": AdmissionPolicy(vacancies=16, mixed=False),
}
FITTED = ((256, "mixed at once"), (1024, "mixed at once"), (1024, "prompts first and alone"))


@dataclass
class Steps:
    """What a workload takes under a policy.

    Args:
        decode: Steps that only decode.
        prompt: Steps with prompts in them.
        prompt_tokens: Tokens of prompts.
        contexts: Keys that decoding rows are compared with, over all steps.
        output_tokens: Tokens generated.
    """

    decode: int = 0
    prompt: int = 0
    prompt_tokens: int = 0
    contexts: int = 0
    output_tokens: int = 0

    @property
    def counts(self) -> list[int]:
        """What the fitted costs are multiplied by."""
        return [self.decode, self.prompt, self.prompt_tokens]


def replay(workload: str, policy: AdmissionPolicy, slots: int = SLOTS) -> Steps:
    """The steps that the scheduler plans, if every request runs to its full length."""
    requests = Workload.parse(workload).draw(0, VOCAB_SIZE)
    scheduler = Scheduler(BlockManager(BLOCKS, BLOCK_SIZE, True), slots, BUDGET, policy)
    for number, (prompt, length) in enumerate(zip(requests.prompts, requests.output_lens, strict=True)):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        scheduler.add(Row(str(number), number, prompt, params, max_output_tokens=length))
    steps = Steps(output_tokens=requests.output_tokens)
    while (plan := scheduler.schedule()) is not None:
        if plan.is_decode:
            steps.decode += 1
        else:
            steps.prompt += 1
        steps.prompt_tokens += plan.num_prefill_tokens
        steps.contexts += sum(s + n for s, n in zip(plan.starts, plan.lengths, strict=True) if n == 1)
        scheduler.update(plan, StepResult([0] * sum(plan.samples)))
    return steps


def fit(runs: Sequence[tuple[Steps, float]], seconds_per_key: float) -> np.ndarray:
    """Seconds of a decode step, of a step with prompts, and of a token of a prompt, from runs and their seconds."""
    counts = np.array([steps.counts for steps, _ in runs], dtype=float)
    rest = np.array([seconds - steps.contexts * seconds_per_key for steps, seconds in runs])
    return np.linalg.lstsq(counts, rest, rcond=None)[0]


def measured(results: Path) -> tuple[Mapping[tuple[int, str], float], float]:
    """Seconds of runs by requests and policy, and bytes a second of decode attention by itself."""
    report = json.loads(results.read_text())
    runs = report["latest"]["stages"]["many"]["results"]
    longest = report["after"]["stages"]["many"]["results"]
    seconds = {
        (n, name): runs[key]["seconds"]
        for n in (256, 1024)
        for name in POLICIES
        if (key := f"{n}:{LENGTHS}, {name}") in runs
    }
    seconds[4096, "gathering 16"] = longest[f"4096:{LENGTHS}, default"]["seconds"]
    kernels = report["after"]["stages"]["kernels"]["results"]
    return seconds, kernels["paged_decode 256 rows bfloat16"]["gb_s"] * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="of gpu_check.py, as kept")
    known, bandwidth = measured(parser.parse_args().results)
    key = KV_BYTES / bandwidth
    costs = fit([(replay(f"{n}:{LENGTHS}", POLICIES[name]), known[n, name]) for n, name in FITTED], key)
    decode, prompt, token = costs * 1e6
    print(
        f"beyond keys and values: a decode step {decode:.0f} us, one with prompts {prompt:.0f}, a token {token:.2f}\n"
    )
    print("| requests | policy | decode steps | with prompts | seconds | tokens a second | measured, seconds |")
    print("|---|---|---|---|---|---|---|")
    for n in (256, 1024, 4096):
        for name, policy in POLICIES.items():
            steps = replay(f"{n}:{LENGTHS}", policy)
            seconds = float(np.dot(steps.counts, costs)) + steps.contexts * key
            found = f"{known[n, name]:.1f}" if (n, name) in known else ""
            rate = steps.output_tokens / seconds
            print(f"| {n:,} | {name} | {steps.decode:,} | {steps.prompt:,} | {seconds:.1f} | {rate:,.0f} | {found} |")


if __name__ == "__main__":
    main()
