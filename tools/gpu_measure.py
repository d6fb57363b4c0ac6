"""What the stages of gpu_check.py share: where they note what they find, how they time, and what hardware allows."""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Result = dict[str, Any]


class DeviceLostError(RuntimeError):
    """The device answers nothing any more in this process, as after an illegal memory access."""


@dataclass
class Check:
    """A stage that runs: what it is told, and what it has found so far.

    Args:
        device: What to measure.
        quick: Sizes for a rehearsal; figures mean nothing.
        out: Where larger results (traces) go.
        earlier: By stage, the results of those that ran before.
        skip: Parts that an earlier attempt at this stage has tried: one of them lost the device.
        save: Called whenever there is something new, so that it survives whatever comes after.
    """

    device: torch.device
    quick: bool
    out: Path
    earlier: dict[str, Result] = field(default_factory=dict)
    skip: frozenset[str] = frozenset()
    save: Callable[["Check"], None] = lambda check: None
    results: Result = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def note(self, key: str, value: Any) -> None:
        """Keep a result: a number, a text, or a dictionary of these."""
        self.results[key] = value
        self.save(self)

    def fail(self, key: str, problem: str) -> None:
        """Keep a problem: the stage goes on, but is not in order."""
        self.errors[key] = problem
        self.note(key, f"FAILED: {problem.strip().splitlines()[-1]}")

    def part(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a part of the stage, and note what it returns, or that it failed; then it returns None.

        Raises:
            DeviceLostError: After a failure the device could not be used any more.
        """
        if name in self.skip:
            return None
        self.tried.append(name)
        self.save(self)
        try:
            result = function(*arguments)
        except Exception:
            self.fail(name, traceback.format_exc())
            self._refuse_if_lost(name)
            return None
        if result is not None:
            self.note(name, result)
        return result

    def _refuse_if_lost(self, name: str) -> None:
        if self.on_cuda:
            try:
                torch.cuda.synchronize()
            except Exception as error:
                raise DeviceLostError(f"{name} left the device unusable: {error}") from error


def median_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 11) -> float:
    """Median time of a call that takes the device long enough for its launch not to show; by events on CUDA."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def device_seconds(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = 7) -> float:
    """Time that one of ``calls`` takes the device on average; they differ in their arguments, lest caches serve them.

    They are captured in one CUDA graph: launching a kernel costs the host more than many a kernel takes.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # kernels are compiled, and libraries set up, at their first call
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]  # or all would write their results to the same, cached memory
    started = time.perf_counter()
    while time.perf_counter() - started < 0.03:  # clocks rise from idle
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    del kept
    return statistics.median(times) / len(calls)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over that of the expected values; NaN if anything is."""
    exact = expected.double()
    norm = float(exact.norm())
    difference = float((found.double() - exact).norm())
    return difference / norm if norm else difference


def measure_ceilings(device: torch.device, quick: bool) -> Result:
    """Copy bandwidth (bytes read plus written a second) and bfloat16 matrix products, both on random data."""
    mib, size = (16, 256) if quick else (4096, 8192)
    source = torch.rand(mib * 2**18, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_seconds = median_seconds(lambda: a @ b, device)
    return {
        "copy_bandwidth_tb_s": 2 * source.nbytes / seconds / 1e12,
        "bfloat16_tflop_s": 2 * size**3 / product_seconds / 1e12,
    }


def ceilings(check: Check) -> tuple[float, float]:
    """Bytes a second and bfloat16 operations a second of the device, measured once."""
    found = check.earlier.setdefault("device", {})
    if "bfloat16_tflop_s" not in found:
        found |= measure_ceilings(check.device, check.quick)
        if check.on_cuda:
            torch.cuda.empty_cache()  # what is measured next may count what is free
    return found["copy_bandwidth_tb_s"] * 1e12, found["bfloat16_tflop_s"] * 1e12


@dataclass(frozen=True)
class Roofline:
    """The least time that a workload can take, in seconds.

    Args:
        prefill: Of the prompts' matrix products and attention.
        weights: Of reading the weights once a decode step.
        kv: Of reading the contexts' keys and values.
        decode_steps: How many there are at least.
    """

    prefill: float
    weights: float
    kv: float
    decode_steps: int

    @property
    def total(self) -> float:
        return self.prefill + self.weights + self.kv


def roofline(
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    config: dict[str, Any],
    bandwidth: float,
    flops: float,
    max_rows: int | None = None,
    itemsize: int = 2,
) -> Roofline:
    """What the device's bandwidth and arithmetic allow a workload, if all requests decode together from the start.

    A prompt gives a request its first token; each further one takes a decode step, which reads the weights once for
    all rows, and of each row the keys and values of its context, the new token's included. Decode steps are taken to be
    limited by memory, prompts by arithmetic: two operations a weight and token (the output head: a request), and four a
    query, key it sees, and element of its heads.

    Args:
        prompt_lens: Tokens of each prompt.
        output_lens: Tokens generated for each.
        config: The checkpoint's config.json.
        bandwidth: Bytes a second.
        flops: Operations a second.
        max_rows: Most rows of a decode step; None for as many as there are requests.
        itemsize: Bytes of a weight, and of an element of the KV cache.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    matrices = hidden * (2 * q_size + 2 * kv_size + 3 * config["intermediate_size"])
    norms = 2 * hidden + 2 * config["head_dim"]
    head = config["vocab_size"] * hidden
    num_weights = layers * (matrices + norms) + hidden + head

    pairs = sum(p * (p + 1) // 2 for p in prompt_lens)
    prefill = 2 * layers * matrices * sum(prompt_lens) + 2 * head * len(prompt_lens) + 4 * layers * q_size * pairs

    decoded = [n - 1 for n in output_lens]
    steps = max(max(decoded), -(-sum(decoded) // (max_rows or len(decoded))))
    kv_tokens = sum(n * p + n * (n + 1) // 2 for p, n in zip(prompt_lens, decoded, strict=True))
    kv_bytes = kv_tokens * 2 * layers * kv_size * itemsize
    return Roofline(prefill / flops, steps * num_weights * itemsize / bandwidth, kv_bytes / bandwidth, steps)
