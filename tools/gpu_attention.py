"""Stages of gpu_check.py about attention: backends against each other, and the settings of the kernels."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from gpu_kernels import (
    ERROR_LIMITS,
    Shape,
    causal_flops,
    decode_arguments,
    decode_batches,
    half,
    prefill_arguments,
    prompt_lengths,
    scattered_tables,
    shape_of,
    speed,
)
from gpu_measure import Check, Result, ceilings, device_seconds, relative_error

from nanovllm.attention import BACKENDS, AttentionSpec
from nanovllm.attention.base import AttentionMetadata, DecodeMetadata
from nanovllm.kernels import why_no_triton

# ------------------------------------------------------------------------------------------ backends, whole

# (query lengths, context lengths, heads, KV heads, head size, block size)
BackendCase = tuple[list[int], list[int], int, int, int, int]
BACKEND_CASES: list[BackendCase] = [
    ([1] * 8, [1, 15, 16, 17, 300, 1024, 2048, 33], 16, 8, 128, 16),
    ([1] * 3, [5000, 1, 257], 16, 8, 128, 256),
    ([64, 1, 17, 128], [64, 500, 117, 128], 16, 8, 128, 16),
    ([256, 1], [700, 31], 32, 8, 128, 256),
    ([33, 1, 1], [33, 64, 65], 8, 1, 64, 256),
]
QUICK_BACKEND_CASES: list[BackendCase] = [
    ([1, 1], [3, 17], 2, 1, 16, 16),
    ([9, 1], [9, 20], 2, 1, 16, 16),
]


def check_backends(check: Check) -> None:
    """Each backend that runs here against float64 matrix products on the CPU: largest relative error."""
    cases = QUICK_BACKEND_CASES if check.quick else BACKEND_CASES
    for name in BACKENDS:
        for dtype in ERROR_LIMITS:
            label = str(dtype).removeprefix("torch.")
            check.part(f"{name} {label}", compare_backend, check.device, cases, name, dtype)


def compare_backend(device: torch.device, cases: list[BackendCase], name: str, dtype: torch.dtype) -> str | float:
    errors, reasons = [], []
    for case in cases:
        reason = BACKENDS[name].why_not(attention_spec(case, dtype, device))
        if reason is not None:
            reasons.append(reason)
            continue
        reference = run_attention(case, "matmul", torch.float64, torch.device("cpu"), dtype)
        for captured in (False, True):
            if not captured or (BACKENDS[name].can_capture and set(case[0]) == {1}):
                out = run_attention(case, name, dtype, device, dtype, captured).cpu()
                errors.append(relative_error(out, reference))
    if not errors:
        return f"not here: {reasons[0]}"
    if not all(error <= ERROR_LIMITS[dtype] for error in errors):  # a NaN fails too
        raise RuntimeError(f"relative errors {errors}; the limit is {ERROR_LIMITS[dtype]}")
    return max(errors)


def attention_spec(case: BackendCase, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
    _, _, heads, kv_heads, head_dim, block_size = case
    return AttentionSpec(1, heads, kv_heads, head_dim, dtype, device, block_size)


def run_attention(
    case: BackendCase,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    rounded: torch.dtype,
    captured: bool = False,
) -> torch.Tensor:
    """Compute the case's contexts in two steps, history then queries; inputs are rounded to ``rounded`` first.

    With ``captured``, the second step is told what a captured one is, and has a row that is none.
    """
    query_lengths, contexts, heads, kv_heads, head_dim, block_size = case
    backend = BACKENDS[name](attention_spec(case, dtype, device))
    generator = torch.Generator().manual_seed(0)
    tables = scattered_tables(contexts, block_size)
    backend.allocate_cache(int(tables.max()) + 1)

    def step(starts: list[int], ends: list[int], captured: bool) -> torch.Tensor:
        rows = [row for row, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
        positions = [torch.arange(starts[row], ends[row]) for row in rows]
        slots = torch.cat(
            [tables[row][p // block_size] * block_size + p % block_size for row, p in zip(rows, positions, strict=True)]
        ).long()
        tokens = len(slots)
        q, k, v = (torch.randn(tokens, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads))
        q, k, v = (x.to(rounded).to(dtype).to(device) for x in (q, k, v))
        if captured:
            extra = [torch.cat((x, x[:1])) for x in (q, k, v)]
            numbers = torch.tensor([*rows, -1], dtype=torch.int32), torch.tensor([*ends, 0], dtype=torch.int32)
            targets = torch.cat((slots, torch.tensor([-1])))
            decode = DecodeMetadata(*(x.to(device) for x in (*numbers, tables, targets)))
            return backend.begin_decode(decode).attend(0, *extra)[:-1]
        lengths = [ends[row] - starts[row] for row in rows]
        metadata = AttentionMetadata(lengths, [ends[row] for row in rows], tables[rows].to(device), slots.to(device))
        return backend.begin_step(metadata).attend(0, q, k, v)

    starts = [context - length for context, length in zip(contexts, query_lengths, strict=True)]
    step([0] * len(starts), starts, captured=False)
    return step(starts, list(contexts), captured)


# --------------------------------------------------------------------------------------------------- tuning

Settings = dict[str, int]


def check_tune(check: Check) -> None:
    """The backends side by side, and the attention kernels over a grid of their settings."""
    reason = why_no_triton(check.device)
    if reason is not None:
        check.note("tune", f"not here: {reason}")
        return
    if not check.on_cuda:
        check.note("tune", "needs CUDA: the interpreter's times mean nothing")
    shape = shape_of(check)
    ceilings(check)  # now, while nothing else takes memory
    for name, backend in BACKENDS.items():
        if backend.can_capture:
            check.part(name, time_backend, check, name, shape)
    check.part("decode", tune_decode, check, shape, 1.0 if check.quick else 260.0)
    check.part("prefill", tune_prefill, check, shape, 1.0 if check.quick else 200.0)


def time_backend(check: Check, name: str, shape: Shape) -> Result | str:
    """A layer's attention, its keys and values stored besides: of decode batches, and of prompts."""
    dtype, device = half(check), check.device
    result: Result = {}
    for label, contexts in decode_batches(check).items():
        layers = 1 if check.quick else 2 if len(contexts) > 1 else 28  # each has keys and values of its own
        spec = AttentionSpec(layers, shape.heads, shape.kv_heads, shape.head_dim, dtype, device)
        reason = BACKENDS[name].why_not(spec)
        if reason is not None:
            return f"not here: {reason}"
        step, inputs = backend_step(name, spec, contexts, is_decode=True)
        seconds = device_seconds([partial(step.attend, layer, *inputs) for layer in range(layers)], device)
        result[label] = speed(check, seconds, sum(contexts) * shape.kv_bytes(half(check)))
    lengths = prompt_lengths(check)
    spec = AttentionSpec(2, shape.heads, shape.kv_heads, shape.head_dim, dtype, device)
    step, inputs = backend_step(name, spec, lengths, is_decode=False)
    seconds = device_seconds([partial(step.attend, layer, *inputs) for layer in range(2)], device)
    return result | {f"{len(lengths)} prompts": speed(check, seconds, flops=causal_flops(shape, lengths))}


def backend_step(
    name: str, spec: AttentionSpec, contexts: list[int], is_decode: bool
) -> tuple[Any, list[torch.Tensor]]:
    """A step of a backend whose cache holds random numbers, and its queries, keys and values."""
    device, block_size = spec.device, BACKENDS[name].default_block_size
    backend = BACKENDS[name](replace(spec, block_size=block_size))
    tables = scattered_tables(contexts, block_size)
    backend.allocate_cache(int(tables.max()) + 1)
    backend.kv_cache().normal_()
    positions = [torch.arange(context - 1 if is_decode else 0, context) for context in contexts]
    slots = torch.cat(
        [tables[row][p // block_size] * block_size + p % block_size for row, p in enumerate(positions)]
    ).to(device, torch.int64)
    tables = tables.to(device)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    inputs = [torch.randn(len(slots), n, spec.head_dim, dtype=spec.dtype, device=device) for n in heads]
    if not is_decode:
        return backend.begin_step(AttentionMetadata(contexts, contexts, tables, slots)), inputs
    rows = torch.arange(len(contexts), dtype=torch.int32, device=device)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    return backend.begin_decode(DecodeMetadata(rows, lengths, tables, slots)), inputs


def nearest_first(defaults: Settings, grid: dict[str, Sequence[int]]) -> list[Settings]:
    """All combinations, the defaults first, then those that differ from them in the fewest values."""
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return sorted(
        [defaults, *(one for one in combinations if one != defaults)],
        key=lambda one: sum(one[name] != defaults[name] for name in defaults),
    )


def best_few(check: Check, times: list[tuple[float, Settings]], defaults: Settings, **work: int) -> Result:
    """The fastest settings, and the defaults, in words."""

    def words(seconds: float, one: Settings) -> str:
        figures = speed(check, seconds, **work)
        rate = f"{figures['gb_s']:.0f} GB/s" if "gb_s" in figures else f"{figures['tflop_s']:.0f} TFLOP/s"
        return f"{seconds * 1e6:.1f} us {rate} {' '.join(f'{name.lower()}={value}' for name, value in one.items())}"

    fastest = sorted(times, key=lambda one: one[0])[:4]
    found = {f"#{place}": words(*one) for place, one in enumerate(fastest, 1)}
    for one in times:
        if one[1] == defaults:
            found["default"] = words(*one)
    return found


def tune(
    check: Check,
    name: str,
    candidates: list[Settings],
    defaults: Settings,
    measure: Callable[[Settings], tuple[float, torch.Tensor]],
    deadline: float,
    **work: int,
) -> list[Settings]:
    """Try settings until the deadline, and note the best; returns the best three.

    Those are left out whose results differ from those of the first with the same block size.
    """
    times: list[tuple[float, Settings]] = []
    counts: Result = {"candidates": len(candidates), "tried": 0, "wrong": 0, "failed": 0}
    expected: dict[int, torch.Tensor] = {}
    try:
        for candidate in candidates:
            if times and time.monotonic() > deadline:
                break
            counts["tried"] += 1
            try:
                seconds, out = measure(candidate)
            except Exception as error:  # of shared memory or registers, mostly, there is not enough
                counts["failed"] += 1
                counts["last failure"] = f"{candidate}: {type(error).__name__}: {error}"[:200]
                if check.on_cuda:
                    torch.cuda.synchronize()  # raises if the device is lost
                continue
            limit = ERROR_LIMITS[half(check)]
            if relative_error(out, expected.setdefault(candidate["block_size"], out)) <= limit:
                times.append((seconds, candidate))
            else:
                counts["wrong"] += 1
    finally:
        for key, value in best_few(check, times, defaults, **work).items():
            check.note(f"{name} {key}", value)
        check.note(f"{name} tried", counts)
    if not times:
        raise RuntimeError(f"no setting of {len(candidates)} works: {counts}")
    return [one for _, one in sorted(times, key=lambda one: one[0])[:3]]


# Settings of how the decode kernel's work is cut up; the others are those of the kernel.
DECODE_WORK = ("TILE", "CHUNK", "MIN_CHUNK")


def tune_decode(check: Check, shape: Shape, budget: float) -> None:
    """Settings of the decode kernel: first what it is compiled with, then how the work is split."""
    from nanovllm.kernels import decode_work, paged_decode

    deadline = time.monotonic() + budget
    names = ("TILE", "NUM_WARPS", "NUM_STAGES", "CHUNK", "PROGRAMS_PER_SM", "MIN_CHUNK")
    defaults = {"block_size": 32}
    defaults |= {name: getattr(decode_work if name in DECODE_WORK else paged_decode, name) for name in names}
    grid: dict[str, Sequence[int]] = {name: [value] for name, value in defaults.items()}
    splits = [(defaults["CHUNK"], defaults["PROGRAMS_PER_SM"], defaults["MIN_CHUNK"])]
    if not check.quick:
        grid |= {"block_size": (16, 32, 64), "TILE": (32, 64), "NUM_WARPS": (2, 4), "NUM_STAGES": (2, 3, 4)}
        splits = list(itertools.product((512, 1024, 2048), (2, 4, 16), (64, 128)))
    batches = decode_batches(check)
    for number, (name, contexts) in enumerate(batches.items()):
        work = {"num_bytes": sum(contexts) * shape.kv_bytes(half(check))}
        measure = partial(measure_decode, check, shape, contexts, 1 if len(contexts) > 1 else 32)
        # Every setting is compiled for the first batch, and known already for the others.
        share = (deadline - time.monotonic()) * (0.6 if number == 0 else 1 / (len(batches) - number))
        compiled = tune(
            check,
            f"decode {name} compiled",
            nearest_first(defaults, grid),
            defaults,
            measure,
            time.monotonic() + 0.6 * share,
            **work,
        )
        candidates = [{**one, **dict(zip(names[3:], split, strict=True))} for split in splits for one in compiled]
        candidates = [one for one in candidates if one != defaults]
        until = time.monotonic() + 0.4 * share
        tune(check, f"decode {name} split", [defaults, *candidates], defaults, measure, until, **work)


def measure_decode(
    check: Check, shape: Shape, contexts: list[int], copies: int, chosen: Settings
) -> tuple[float, torch.Tensor]:
    from nanovllm.kernels import decode_work, paged_decode

    values: dict[str, Any] = dict(chosen)
    make = partial(decode_arguments, shape, half(check), contexts, values.pop("block_size"))
    of_work = {name: values.pop(name) for name in DECODE_WORK}
    with patch.multiple(decode_work, **of_work), patch.multiple(paged_decode, **values):
        seeds = range(1 if check.quick else copies)
        given = [make(torch.Generator(check.device).manual_seed(seed)) for seed in seeds]
        seconds = device_seconds([partial(paged_decode.paged_decode, *one) for one in given], check.device)
    return seconds, given[0][-1]


def tune_prefill(check: Check, shape: Shape, budget: float) -> None:
    """Settings of the prefill kernel."""
    from nanovllm.kernels import paged_prefill as module

    names = ("QUERY_TILE", "KEY_TILE", "NUM_WARPS", "NUM_STAGES")
    defaults = {"block_size": 16} | {name: getattr(module, name) for name in names}
    grid: dict[str, Sequence[int]] = {name: [value] for name, value in defaults.items()}
    if not check.quick:
        grid |= {"block_size": (16, 256), "QUERY_TILE": (64, 128), "KEY_TILE": (32, 64, 128)}
        grid |= {"NUM_WARPS": (4, 8), "NUM_STAGES": (2, 3, 4)}
    lengths = prompt_lengths(check)

    def measure(chosen: Settings) -> tuple[float, torch.Tensor]:
        values: dict[str, Any] = dict(chosen)
        block_size = values.pop("block_size")
        generator = torch.Generator(check.device).manual_seed(0)
        with patch.multiple(module, **values):
            given = prefill_arguments(shape, half(check), lengths, block_size, generator)
            seconds = device_seconds([partial(module.paged_prefill, *given)], check.device)
        return seconds, given[-1]

    candidates, flops = nearest_first(defaults, grid), causal_flops(shape, lengths)
    tune(check, "prefill", candidates, defaults, measure, time.monotonic() + budget, flops=flops)
