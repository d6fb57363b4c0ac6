"""A stage of gpu_check.py: a step of few rows under other settings of the kernels that make it up."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_measure import Check, Result, ceilings, roofline
from gpu_speed import model_config, model_folder

from nanovllm import LLM, SamplingParams
from nanovllm.engine.cuda_graphs import CudaCapture

ATTENDED = 2048  # inputs of the output projection of the model that is measured, and of no other product


class Instead(NamedTuple):
    """A value made of the one that is there."""

    made_of: Callable[[Any], Any]


def one_by_one(launch_sizes: Callable[..., Any]) -> Callable[..., Any]:
    """Sizes with which the output projection is multiplied element by element."""

    def instead(inputs: int, *rest: Any) -> Any:
        with changed({"kernels.fused_linear": {"MOST_FOLD": 0}} if inputs == ATTENDED else {}):
            return launch_sizes(inputs, *rest)

    return instead


def by_loads(can_be_described: Callable[..., bool]) -> Callable[..., bool]:
    """The output projection's weight comes by ordinary loads."""
    return lambda weight, *rest: weight.shape[1] != ATTENDED and can_be_described(weight, *rest)


ELEMENTWISE = "output projection by loads, element by element"
# By what they are called: values of what modules in nanovllm call by a name.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "output projection by loads": {"kernels.fused_linear": {"_can_be_described": Instead(by_loads)}},
    ELEMENTWISE: {
        "kernels.fused_linear": {"_can_be_described": Instead(by_loads), "_launch_sizes": Instead(one_by_one)}
    },
    "weights by loads": {"kernels.fused_linear": {"has_hopper_features": lambda device: False}},
    "8 outputs a program": {"kernels.fused_linear": {"MOST_OUTPUTS": 8}},
    "32 outputs a program": {"kernels.fused_linear": {"MOST_OUTPUTS": 32, "MOST_TILE_BYTES": 128 << 10}},
    "16 KiB a warp": {"kernels.fused_linear": {"WARP_BYTES": 16 << 10}},
    "4 KiB a warp": {"kernels.fused_linear": {"WARP_BYTES": 4 << 10}},
    "products element by element": {"kernels.fused_linear": {"MOST_FOLD": 0}},
    "items of 32": {"kernels.decode_few_rows": {"TILE": 32}},
    "items of 128": {"kernels.decode_few_rows": {"TILE": 128}},
    "items in 64 registers": {"kernels.decode_few_rows": {"REGISTERS": 64}},
    "items in 32 registers": {"kernels.decode_few_rows": {"REGISTERS": 32}},
    "2 parts at a time": {"kernels.decode_few_rows": {"PARTS": 2}},
    "8 parts at a time": {"kernels.decode_few_rows": {"PARTS": 8}},
    "as it is, again": {},
}
# The same, for steps of more rows.
SETTINGS_OF_MORE = {
    "as it is": {},
    ELEMENTWISE: SETTINGS[ELEMENTWISE],
    "by the kernels of many rows": {"kernels": {"FEW_ROWS": 0}},
}
PROMPT_TOKENS = 64


def check_few_rows(check: Check) -> None:
    """Microseconds of a step of few rows, and how many of its tokens are those of the first settings."""
    steps, repeats = (3, 1) if check.quick else (256, 5)
    bandwidth, flops = ceilings(check)
    weights = roofline([PROMPT_TOKENS], [steps + 1], model_config(check), bandwidth, flops).weights
    check.note("us_of_reading_weights", weights / steps * 1e6)
    limits: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_model_len": PROMPT_TOKENS + steps + 1,
        "max_num_batched_tokens": 1024,
    }
    expected: dict[int, list[int]] = {}

    def measure(llm: LLM, rows: int, settings: dict[str, dict[str, Any]]) -> Result:
        with changed(settings):
            recapture(llm)
            seconds, tokens = time_steps(llm, rows, steps, repeats)
        first = expected.setdefault(rows, tokens)
        alike = sum(token == other for token, other in zip(tokens, first, strict=True))
        step = seconds / steps
        return {"us": step * 1e6, "of_weight_bandwidth": weights / steps / step, "tokens": f"{alike} of {len(tokens)}"}

    some = 3 if check.quick else None
    with LLM(model_folder(check), device=check.device.type, skip_tokenizer_init=True, seed=0, **limits) as llm:
        time_steps(llm, 1, steps, 1)  # clocks rise
        for name, settings in list(SETTINGS.items())[:some]:
            check.part(name, measure, llm, 1, settings)
        for rows in (2, 4):
            for name, settings in SETTINGS_OF_MORE.items():
                check.part(f"{rows} rows, {name}", measure, llm, rows, settings)


@contextmanager
def changed(settings: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Other values in modules, by module and name, for as long as the context lasts."""
    with ExitStack() as stack:
        for name, values in settings.items():
            module = import_module(f"nanovllm.{name}")
            for key, value in values.items():
                new = value.made_of(getattr(module, key)) if isinstance(value, Instead) else value
                stack.enter_context(patch.object(module, key, new))
        yield


def recapture(llm: LLM) -> None:
    """Capture the decode steps of an engine anew, if it has captured any: by the settings there are now."""
    runner = llm.engine.runner
    if runner.graphs is None:
        return
    with torch.inference_mode(), runner._on_device():
        runner.graphs = None
        runner.capture_graphs(CudaCapture())
    if runner.graphs is None:
        raise RuntimeError("these settings could not be captured: the log says why")


def time_steps(llm: LLM, rows: int, steps: int, repeats: int) -> tuple[float, list[int]]:
    """Median seconds of ``steps`` decode steps of ``rows`` rows, and the tokens with the ones before them."""

    def run(max_tokens: int) -> tuple[float, list[int]]:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
        prompts = [list(range(7 + row, 7 + row + PROMPT_TOKENS)) for row in range(rows)]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return seconds, [token for output in outputs for token in output.outputs[0].token_ids]

    run(steps + 1)
    alone = statistics.median(run(1)[0] for _ in range(repeats))
    times, tokens = zip(*(run(steps + 1) for _ in range(repeats)), strict=True)
    return statistics.median(times) - alone, tokens[0]
