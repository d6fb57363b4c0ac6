"""Stages of gpu_check.py about the device and single kernels: against their references, and how fast."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_measure import Check, Result, ceilings, device_seconds, measure_ceilings, relative_error

from nanovllm.kernels import why_no_triton
from nanovllm.layers.top_tokens import in_blocks

ERROR_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative, of norms
LEAST_EQUAL = 0.98  # share of sampled tokens that must be equal: rounding decides where two noisy weights nearly tie
ROTATED_BYTES = 256 << 20  # several times the L2 cache
MOST_COPIES = 64
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes that kernels are run at: a model's, the rows of a decode step, and the tokens of a step of prompts."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    rows: int
    tokens: int

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of a token and layer."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


QWEN3 = Shape(16, 8, 128, 1024, 3072, 151_936, rows=256, tokens=16384)
TINY = Shape(2, 1, 16, 48, 40, 300, rows=2, tokens=5)


def shape_of(check: Check) -> Shape:
    return TINY if check.quick else QWEN3


def half(check: Check) -> torch.dtype:
    """What models run in; Triton's interpreter multiplies no bfloat16."""
    return torch.bfloat16 if check.on_cuda else torch.float16


def check_device(check: Check) -> None:
    """The ceilings that everything else is compared with."""
    for key, value in measure_ceilings(check.device, check.quick).items():
        check.note(key, value)
    if check.on_cuda:
        properties = torch.cuda.get_device_properties(check.device)
        check.note("multiprocessors", properties.multi_processor_count)
        check.note("memory_gib", properties.total_memory / 2**30)


def check_kernels(check: Check) -> None:
    """Each Triton kernel against its torch reference at the shapes of Qwen3-0.6B, and its share of the bandwidth."""
    reason = why_no_triton(check.device)
    if reason is not None:
        check.note("kernels", f"not here: {reason}")
        return
    ceilings(check)  # now, while nothing else takes memory
    shape = shape_of(check)
    for dtype in (half(check), torch.float32):
        label = str(dtype).removeprefix("torch.")
        cases = [*dense_cases(shape, dtype, check.device, shape.rows)]
        cases += dense_cases(shape, dtype, check.device, shape.tokens)
        for rows in (1, 4):
            cases += linear_cases(shape, dtype, check.device, rows)
        cases += [*sampling_cases(shape, dtype, check.device), *attention_cases(check, dtype)]
        if dtype != torch.float32:  # they hold integers: once is enough
            cases += table_cases(shape, check.device)
        for case in cases:
            check.part(f"{case.name} {label}", run_case, check, case, dtype)


@dataclass(frozen=True)
class Case:
    """A kernel with fresh arguments.

    Args:
        name: For the report.
        run: The kernel's launching function.
        reference: Its torch reference, of the same signature.
        make: Arguments from a generator of random numbers.
        outputs: What to compare, of what was returned and the arguments.
        num_bytes: Least memory traffic of a call; 0 where only the time is of interest.
        flops: Operations of a call, for kernels that arithmetic limits.
        compiled: What torch.compile may make the same of, in one graph; None to leave it.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[torch.Generator], tuple[Any, ...]]
    outputs: Callable[[Any, tuple[Any, ...]], list[torch.Tensor]]
    num_bytes: int = 0
    flops: int = 0
    compiled: Callable[..., Any] | None = None


def run_case(check: Check, case: Case, dtype: torch.dtype) -> Result:
    """Compare with the reference on equal arguments, then time it on many different ones."""
    result = agreement(case, case.run, case.reference, dtype, check.device)
    return result | speed(check, seconds_of(check, case, case.run), case.num_bytes, case.flops)


def arguments_of(case: Case, seed: int, device: torch.device) -> tuple[Any, ...]:
    return case.make(torch.Generator(device).manual_seed(seed))


def agreement(
    case: Case, one: Callable[..., Any], other: Callable[..., Any], dtype: torch.dtype, device: torch.device
) -> Result:
    """How far two functions agree on equal arguments; RuntimeError if that is not far enough."""
    given, given_other = arguments_of(case, 0, device), arguments_of(case, 0, device)
    found, expected = case.outputs(one(*given), given), case.outputs(other(*given_other), given_other)
    result: Result = {}
    for actual, wanted in zip(found, expected, strict=True):
        if wanted.dtype.is_floating_point:
            error = relative_error(actual, wanted)
            result["error"] = max(error, result.get("error", 0.0))
            if not error <= ERROR_LIMITS[dtype]:  # a NaN fails too
                raise RuntimeError(f"relative error {error} exceeds {ERROR_LIMITS[dtype]}")
        else:
            equal = float((actual == wanted).double().mean())
            result["equal"] = min(equal, result.get("equal", 1.0))
            if not equal >= LEAST_EQUAL:
                raise RuntimeError(f"only {equal:.1%} of {wanted.numel()} integers are equal")
    return result


def seconds_of(check: Check, case: Case, function: Callable[..., Any]) -> float:
    """Of a call, on average over many different arguments."""
    copies = 1 if check.quick else min(MOST_COPIES, max(2, ROTATED_BYTES // max(case.num_bytes, 1)))
    calls = [partial(function, *arguments_of(case, seed, check.device)) for seed in range(copies)]
    return device_seconds(calls, check.device)


def speed(check: Check, seconds: float, num_bytes: int = 0, flops: int = 0) -> Result:
    """Microseconds, and what they make of the bandwidth and the arithmetic."""
    bandwidth, rate = ceilings(check)
    result: Result = {"us": seconds * 1e6}
    if flops:
        return result | {"tflop_s": flops / seconds / 1e12, "of_matmul": flops / seconds / rate}
    if num_bytes:
        return result | {"gb_s": num_bytes / seconds / 1e9, "of_bandwidth": num_bytes / seconds / bandwidth}
    return result


def check_compiled(check: Check) -> None:
    """What torch.compile makes of the references, beside the kernels, on equal arguments."""
    shape, dtype, device = shape_of(check), half(check), check.device
    cases = [case for tokens in (shape.rows, shape.tokens) for case in dense_cases(shape, dtype, device, tokens)]
    for case in [*cases, *sampling_cases(shape, dtype, device)]:
        if case.compiled is not None:
            check.part(f"{case.name} {str(dtype).removeprefix('torch.')}", compare_compiled, check, case, dtype)


def compare_compiled(check: Check, case: Case, dtype: torch.dtype) -> Result:
    assert case.compiled is not None
    torch.compiler.reset()
    backend = "eager" if check.quick else "inductor"  # a rehearsal needs no compiler
    compiled = torch.compile(case.compiled, fullgraph=True, dynamic=False, backend=backend)
    given = arguments_of(case, 0, check.device)
    begun = time.perf_counter()
    compiled(*given)
    seconds = time.perf_counter() - begun
    result = agreement(case, compiled, case.run, dtype, check.device)
    ours, theirs = (seconds_of(check, case, function) * 1e6 for function in (case.run, compiled))
    return result | {"us": ours, "us_compiled": theirs, "ratio": theirs / ours, "seconds_of_compiling": seconds}


# ------------------------------------------------------------------------------- between the matrix products


def dense_cases(shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int) -> Iterator[Case]:
    from nanovllm.kernels import qk_norm_rope_store, rms_norm, silu_and_mul, store_kv

    heads, kv_heads, head_dim, hidden = shape.heads, shape.kv_heads, shape.head_dim, shape.hidden
    blocks = -(-tokens // 16)

    def random(g: torch.Generator, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).to(dtype)

    def places(g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, and where the tokens go in them."""
        cache = torch.zeros(2, blocks, kv_heads, 16, head_dim, dtype=dtype, device=device)
        return cache[0], cache[1], torch.randperm(blocks * 16, generator=g, device=device)[:tokens]

    def qkv(g: torch.Generator) -> tuple[Any, ...]:
        angles = torch.rand(2048, head_dim // 2, generator=g, device=device) * 6.28
        positions = torch.randint(2048, (tokens,), generator=g, device=device)
        projected = random(g, tokens, (heads + 2 * kv_heads) * head_dim)
        norms = random(g, head_dim), random(g, head_dim), EPS
        return projected, *norms, angles.cos(), angles.sin(), positions, *places(g), heads, kv_heads

    def store_every_token(
        qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        """As the reference does it where no slot is -1: which ones are would be for the host to read."""
        eps, cos, sin, positions, keys, values, slots, num_heads, num_kv_heads = rest
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        q, k = (
            qk_norm_rope_store._rotate(rms_norm.rms_norm_reference(x, weight, eps)[0], cos[positions], sin[positions])
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        keys[slots // 16, :, slots % 16] = k
        values[slots // 16, :, slots % 16] = v
        return q

    qkv_elements = tokens * (heads + 2 * kv_heads) * head_dim
    yield Case(
        f"rms_norm {tokens}",
        rms_norm.rms_norm,
        rms_norm.rms_norm_reference,
        lambda g: (random(g, tokens, hidden), random(g, hidden), EPS, random(g, tokens, hidden)),
        lambda returned, _: list(returned),
        4 * tokens * hidden * dtype.itemsize,
        compiled=rms_norm.rms_norm_reference,
    )
    yield Case(
        f"silu_and_mul {tokens}",
        silu_and_mul.silu_and_mul,
        silu_and_mul.silu_and_mul_reference,
        lambda g: (random(g, tokens, 2 * shape.intermediate),),
        lambda returned, _: [returned],
        3 * tokens * shape.intermediate * dtype.itemsize,
        compiled=silu_and_mul.silu_and_mul_reference,
    )
    yield Case(
        f"qk_norm_rope_store {tokens}",
        qk_norm_rope_store.qk_norm_rope_store,
        qk_norm_rope_store.qk_norm_rope_store_reference,
        qkv,
        lambda returned, given: [returned, given[7], given[8]],
        2 * qkv_elements * dtype.itemsize,
        compiled=store_every_token,
    )
    yield Case(
        f"store_kv {tokens}",
        store_kv.store_kv,
        store_kv.store_kv_reference,
        lambda g: (random(g, tokens, kv_heads, head_dim), random(g, tokens, kv_heads, head_dim), *places(g)),
        lambda _, given: [given[2], given[3]],
        2 * tokens * shape.kv_bytes(dtype),
    )


def linear_cases(shape: Shape, dtype: torch.dtype, device: torch.device, rows: int) -> Iterator[Case]:
    """The four products of a layer, as a step of few rows has them."""
    from nanovllm.kernels import fused_linear

    attended = shape.heads * shape.head_dim
    projected = attended + 2 * shape.kv_heads * shape.head_dim
    for name, inputs, outputs, normed, gated in (
        ("qkv", shape.hidden, projected, True, False),
        ("o", attended, shape.hidden, False, False),
        ("gate_up", shape.hidden, 2 * shape.intermediate, True, True),
        ("down", shape.intermediate, shape.hidden, False, False),
    ):

        def make(
            g: torch.Generator, inputs: int = inputs, outputs: int = outputs, normed: bool = normed, gated: bool = gated
        ) -> tuple[Any, ...]:
            def random(*size: int) -> torch.Tensor:
                return torch.randn(size, generator=g, device=device).to(dtype)

            weight = random(outputs, inputs) * inputs**-0.5
            norm = random(inputs) if normed else None
            return random(rows, inputs), weight, None, norm, EPS, None if normed else random(rows, outputs), gated

        yield Case(
            f"fused_linear {name} {rows}",
            fused_linear.fused_linear,
            fused_linear.fused_linear_reference,
            make,
            lambda returned, _: [returned],
            inputs * outputs * dtype.itemsize,
        )


# ------------------------------------------------------------------------------------- sampling, and tables


def sampling_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from nanovllm.kernels import nucleus, sample

    def noise(g: torch.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.randint(-(2**31), 2**31, (rows, 2), generator=g, device=device, dtype=torch.int64)
        return keys.to(torch.int32), torch.randint(5000, (rows,), generator=g, device=device)

    def plain(g: torch.Generator, rows: int) -> tuple[Any, ...]:
        logits = (torch.randn(rows, shape.vocab, generator=g, device=device) * 3).to(dtype)
        temperature = torch.rand(rows, generator=g, device=device) + 0.5
        temperature[1::4] = 0  # greedy
        return logits, temperature, *noise(g, rows), shape.vocab

    def truncated(g: torch.Generator) -> tuple[Any, ...]:
        rows = shape.rows
        logits = torch.randn(rows, shape.vocab, generator=g, device=device).to(dtype)  # flat: many tokens are kept
        blocks = in_blocks(logits.float())
        peaks = blocks.amax(dim=(1, 2))
        sums = (blocks - peaks[:, None, None]).exp().sum(dim=-1)
        ones, top_p = torch.ones(rows, device=device), torch.full((rows,), 0.9, device=device)
        pending = torch.ones(rows, dtype=torch.bool, device=device)
        tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        return logits, sums, peaks, ones, None, top_p, *noise(g, rows), pending, tokens, shape.vocab

    for rows in (shape.rows, 1):
        yield Case(
            f"sample {rows}",
            sample.sample,
            sample.sample_reference,
            partial(plain, rows=rows),
            lambda returned, _: [returned],
            rows * shape.vocab * dtype.itemsize,
            compiled=sample.sample_reference,
        )
    yield Case(
        f"nucleus {shape.rows}",
        nucleus.nucleus,
        nucleus.nucleus_reference,
        truncated,
        lambda _, given: [given[9]],
        shape.rows * shape.vocab * dtype.itemsize,  # of one walk over the logits; each draw takes one
    )


def table_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    from nanovllm.kernels import decode_inputs, decode_outputs

    rows, slots, longest = shape.rows, 2 * shape.rows, 4096

    def lines(g: torch.Generator) -> torch.Tensor:
        chosen = torch.randperm(slots, generator=g, device=device)[:rows].to(torch.int32)
        chosen[1::5] = -1
        return chosen

    def integers(g: torch.Generator, high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, generator=g, device=device, dtype=torch.int32)

    def empty(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(rows, dtype=dtype, device=device)

    def before(g: torch.Generator) -> tuple[Any, ...]:
        token_ids, blocks = integers(g, 9999, slots, longest + 1), integers(g, 9999, slots, longest // 16)
        written = empty(torch.int64), empty(torch.int64), empty(torch.int64), empty(torch.int32)
        params = torch.zeros(rows, 6, dtype=torch.int32, device=device)
        return lines(g), integers(g, 4096, slots), token_ids, blocks, 16, integers(g, 9999, slots, 6), *written, params

    def after(g: torch.Generator) -> tuple[Any, ...]:
        tokens = integers(g, 9999, rows).long()
        return lines(g), tokens, integers(g, 4000, slots), integers(g, 9, slots, longest + 1), empty(torch.int32)

    yield Case(
        f"decode_inputs {rows}",
        decode_inputs.decode_inputs,
        decode_inputs.decode_inputs_reference,
        before,
        lambda _, given: list(given[6:]),
    )
    yield Case(
        f"decode_outputs {rows}",
        decode_outputs.decode_outputs,
        decode_outputs.decode_outputs_reference,
        after,
        lambda _, given: list(given[2:5]),
    )


# ------------------------------------------------------------------------------------------------- attention


def decode_batches(check: Check) -> dict[str, list[int]]:
    """Context lengths of a batch in the middle of its work, and of one row."""
    shape, generator = shape_of(check), torch.Generator().manual_seed(0)
    low, high = (1, 40) if check.quick else (100, 2048)
    uniform = torch.randint(low, high + 1, (shape.rows,), generator=generator).tolist()
    return {f"{shape.rows} rows": uniform} | ({} if check.quick else {"1 x 1000": [1000], "1 x 4000": [4000]})


def prompt_lengths(check: Check) -> list[int]:
    return [20] if check.quick else [1024] * 16


def causal_flops(shape: Shape, lengths: Sequence[int]) -> int:
    """Operations of causal attention within prompts."""
    return sum(4 * shape.heads * shape.head_dim * n * (n + 1) // 2 for n in lengths)


def scattered_tables(contexts: Sequence[int], block_size: int) -> torch.Tensor:
    """Block tables [rows, blocks], int32 on the CPU: contexts take all blocks there are, in random order."""
    needed = [-(-context // block_size) for context in contexts]
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    for row, ids in enumerate(order.split(needed)):
        tables[row, : len(ids)] = ids
    return tables


def paged_inputs(
    shape: Shape,
    dtype: torch.dtype,
    generator: torch.Generator,
    contexts: Sequence[int],
    block_size: int,
    num_queries: int,
) -> list[torch.Tensor]:
    """Queries [num_queries, heads, head_dim], keys and values of a layer, and block tables."""
    device = generator.device
    num_blocks = sum(-(-context // block_size) for context in contexts)
    size = 2, num_blocks, shape.kv_heads, block_size, shape.head_dim
    keys, values = torch.randn(size, generator=generator, device=device, dtype=dtype)
    q = torch.randn(num_queries, shape.heads, shape.head_dim, generator=generator, device=device, dtype=dtype)
    return [q, keys, values, scattered_tables(contexts, block_size).to(device)]


def decode_arguments(
    shape: Shape, dtype: torch.dtype, contexts: Sequence[int], block_size: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """Arguments of ``paged_decode`` for a row a context."""
    from nanovllm.kernels.decode_work import plan_decode

    rows, device = len(contexts), generator.device
    q, keys, values, tables = paged_inputs(shape, dtype, generator, contexts, block_size, rows)
    lengths = torch.tensor(contexts, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    longest = tables.shape[1] * block_size
    work = plan_decode(lengths, slots, None, longest, shape.heads, shape.kv_heads, shape.head_dim)
    return q, keys, values, tables, work, shape.head_dim**-0.5, torch.full_like(q, torch.nan)


def few_rows_arguments(
    shape: Shape, dtype: torch.dtype, contexts: Sequence[int], block_size: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """Arguments of ``decode_few_rows`` for a row a context."""
    from nanovllm.kernels.decode_few_rows import TILE
    from nanovllm.kernels.decode_work import plan_decode

    rows, device = len(contexts), generator.device
    _, keys, values, tables = paged_inputs(shape, dtype, generator, contexts, block_size, rows)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    norms = random(shape.head_dim).to(dtype), random(shape.head_dim).to(dtype), EPS
    angles = random(max(contexts), shape.head_dim // 2)
    positions = torch.tensor(contexts, device=device) - 1
    lines = torch.arange(rows, device=device)
    slot_mapping = tables[lines, positions // block_size].long() * block_size + positions % block_size
    lengths, slots = positions.int() + 1, lines.int()
    sizes = (tables.shape[1] * block_size, shape.heads, shape.kv_heads, shape.head_dim)
    work = plan_decode(lengths, slots, None, *sizes, item_tokens=TILE)
    qkv = random(rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim).to(dtype)
    stored = keys, values, slot_mapping, tables, work
    return (
        qkv,
        *norms,
        angles.cos(),
        angles.sin(),
        positions,
        *stored,
        shape.head_dim**-0.5,
        shape.heads,
        shape.kv_heads,
    )


def prefill_arguments(
    shape: Shape, dtype: torch.dtype, lengths: Sequence[int], block_size: int, generator: torch.Generator
) -> tuple[Any, ...]:
    """Arguments of ``paged_prefill`` for whole prompts."""
    from nanovllm.kernels.paged_prefill import plan_prefill, queries_per_tile

    q, keys, values, tables = paged_inputs(shape, dtype, generator, lengths, block_size, sum(lengths))
    counts, rows = np.array(lengths, dtype=np.int32), np.arange(len(lengths), dtype=np.int32)
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    size = queries_per_tile(dtype, shape.heads, shape.kv_heads, shape.head_dim)
    tiles = torch.from_numpy(plan_prefill(counts, counts, firsts, rows, size)).to(generator.device)
    return q, keys, values, tables, None, tiles, shape.head_dim**-0.5, torch.full_like(q, torch.nan)


def attention_cases(check: Check, dtype: torch.dtype) -> Iterator[Case]:
    from nanovllm.kernels import decode_few_rows, paged_decode, paged_prefill

    shape = shape_of(check)
    for name, contexts in decode_batches(check).items():
        yield Case(
            f"paged_decode {name}",
            paged_decode.paged_decode,
            paged_decode.paged_decode_reference,
            partial(decode_arguments, shape, dtype, contexts, 32),
            lambda _, given: [given[-1]],
            sum(contexts) * shape.kv_bytes(dtype),
        )
    for contexts in [[5], [9, 1]] if check.quick else [[300], [1000], [700, 1, 64, 65]]:
        yield Case(
            f"decode_few_rows {' '.join(map(str, contexts))}",
            decode_few_rows.decode_few_rows,
            decode_few_rows.decode_few_rows_reference,
            partial(few_rows_arguments, shape, dtype, contexts, 32),
            lambda returned, given: [returned, given[7], given[8]],
            sum(contexts) * shape.kv_bytes(dtype),
        )
    lengths = prompt_lengths(check)
    yield Case(
        f"paged_prefill {len(lengths)} x {lengths[0]}",
        paged_prefill.paged_prefill,
        paged_prefill.paged_prefill_reference,
        partial(prefill_arguments, shape, dtype, lengths, 16),
        lambda _, given: [given[-1]],
        num_bytes=sum(lengths) * shape.kv_bytes(dtype),
        flops=causal_flops(shape, lengths),
    )
    if dtype != torch.float32:
        contexts = next(iter(decode_batches(check).values()))
        yield plan_case(check, contexts)


def plan_case(check: Check, contexts: list[int]) -> Case:
    """The plan of a decode step, which all layers share: its time, and that it covers every context once."""
    from nanovllm.kernels.decode_work import plan_decode

    shape = shape_of(check)

    def make(generator: torch.Generator) -> tuple[Any, ...]:
        lengths = torch.tensor(contexts, dtype=torch.int32, device=generator.device)
        slots = torch.arange(len(contexts), dtype=torch.int32, device=generator.device)
        return lengths, slots, None, 4096, shape.heads, shape.kv_heads, shape.head_dim

    def covered(returned: Any, given: tuple[Any, ...]) -> list[torch.Tensor]:
        if isinstance(returned, torch.Tensor):
            return [returned]
        slots, starts, ends = returned.items[1:4]
        real = torch.arange(len(slots), device=slots.device) < returned.first_items[-1]
        counted = torch.zeros_like(given[0]).index_add_(0, slots[real].long(), (ends - starts)[real])
        return [counted]

    return Case(f"plan_decode {len(contexts)} rows", plan_decode, lambda lengths, *_: lengths, make, covered)
