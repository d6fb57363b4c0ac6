"""A linear layer of few rows with what surrounds it: the norm before it, the gate or the residual stream behind it.

With few rows a step is a matter of reading the weights. Every program asks for its part of the weight first, all of it
at once, and only then waits for the kernel before it to end: the memory stays busy from one layer to the next.
"""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import (
    bring_into_cache,
    launch_options,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from nanovllm.kernels.rms_norm import rms_norm_reference

# Elements of the weight, of the gate's and of the other half together, that a program holds in registers.
ELEMENTS = 8192
NUM_WARPS = 2
# Bytes that are asked for ahead of their use at most: a second-level cache has room for them besides what it holds.
MOST_UPCOMING = 16 << 20


@triton.jit
def _fused_linear_kernel(
    x,
    x_stride,
    norm_weight,
    eps,
    weight,
    bias,
    residual,
    residual_stride,
    out,
    upcoming,
    UPCOMING: tl.constexpr,
    UPCOMING_LINES: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUT_TILE: tl.constexpr,
    OUTPUT_TILE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    column = tl.arange(0, INPUT_TILE)
    is_output = output < OUTPUTS
    is_input = column < INPUTS
    offset = output.to(tl.int64)[:, None] * INPUTS + column[None, :]
    mask = is_output[:, None] & is_input[None, :]
    part = tl.load(weight + offset, mask=mask, other=0.0)  # [outputs, inputs]
    if GATED:
        up_part = tl.load(weight + OUTPUTS * INPUTS + offset, mask=mask, other=0.0)
    if HAS_NORM:
        factors = tl.load(norm_weight + column, mask=is_input, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)
    if UPCOMING > 0:
        bring_into_cache(upcoming, UPCOMING, tl.program_id(0), tl.num_programs(0), UPCOMING_LINES)
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)

    dtype: tl.constexpr = out.dtype.element_ty
    for row in tl.static_range(ROWS):
        values = tl.load(x + row * x_stride + column, mask=is_input, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            stream = tl.load(residual + row * residual_stride + output, mask=is_output, other=0.0).to(tl.float32)
        if HAS_NORM:  # rounded wherever the layer rounds: before the weight, and after it
            scale = tl.rsqrt(tl.sum(values * values, axis=0) / INPUTS + eps)
            values = ((values * scale).to(dtype).to(tl.float32) * factors).to(dtype).to(tl.float32)
        result = tl.sum(part.to(tl.float32) * values[None, :], axis=1)
        if HAS_BIAS:
            result += added
        result = result.to(dtype).to(tl.float32)
        if GATED:
            up = tl.sum(up_part.to(tl.float32) * values[None, :], axis=1).to(dtype).to(tl.float32)
            result = (result / (1.0 + tl.exp(-result))).to(dtype).to(tl.float32) * up
        if HAS_RESIDUAL:
            result += stream
        tl.store(out + row * OUTPUTS + output, result.to(dtype), mask=is_output)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    upcoming: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + norm(x) W^T + bias``, or ``silu(gate) * up`` of a ``W`` that holds both, one above the other.

    Args:
        x: [rows, inputs], few rows: each is another pass over registers; the last dimension is packed.
        weight: [outputs, inputs], or [2 * outputs, inputs] if ``gated``; packed, of x's dtype.
        bias: [outputs], of x's dtype; not with ``gated``.
        norm_weight: [inputs], of x's dtype, of the RMSNorm that x goes through; None for none.
        eps: Added to the norm's mean square.
        residual: [rows, outputs], of x's dtype, added to the result; the last dimension is packed.
        gated: Whether the weight is that of a gated MLP, the gate's half first.
        out: [rows, outputs], of x's dtype, contiguous: where the result goes; None for a new tensor.
        upcoming: A weight that is needed after the next kernels. While this one waits, the memory has nothing to do
            where those two have no more room for what they read: it is asked for what comes then. Contiguous.

    Returns:
        [rows, outputs], of x's dtype, rounded between the operations as separate ones would.
    """
    assert not (gated and bias is not None)
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    assert out.is_contiguous()
    assert out.dtype == x.dtype
    if rows > 0:
        sizes, num_warps = _launch_sizes(inputs, x.element_size(), gated)
        options = launch_options(x.device)
        programs = triton.cdiv(outputs, sizes["OUTPUT_TILE"])
        length = 0
        if upcoming is not None and options["OVERLAPS"]:
            length = min(upcoming.numel(), MOST_UPCOMING // upcoming.element_size())
        _fused_linear_kernel[(programs,)](
            x,
            x.stride(0),
            norm_weight,
            eps,
            weight,
            bias,
            residual,
            0 if residual is None else residual.stride(0),
            out,
            upcoming if length else None,
            UPCOMING=length,
            UPCOMING_LINES=_lines_of_a_share(length * x.element_size(), programs),
            ROWS=rows,
            INPUTS=inputs,
            OUTPUTS=outputs,
            HAS_NORM=norm_weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            GATED=gated,
            **sizes,
            **options,
            num_warps=num_warps,
        )
    return out


def fused_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    upcoming: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`fused_linear` by torch's operators."""
    if norm_weight is not None:
        x, _ = rms_norm_reference(x, norm_weight, eps)
    y = torch.nn.functional.linear(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    y = y if residual is None else y + residual
    return y if out is None else out.copy_(y)


def _lines_of_a_share(length: int, shares: int) -> int:
    """Lines of the second-level cache, rounded up to a power of two, of a share of ``length`` bytes; 0 of nothing."""
    return triton.next_power_of_2(triton.cdiv(triton.cdiv(length, 128), shares)) if length else 0


def _launch_sizes(inputs: int, itemsize: int, gated: bool) -> tuple[dict[str, int], int]:
    """Tile sizes and warps: whole lines of the weight, as many as registers take."""
    input_tile = triton.next_power_of_2(inputs)
    lines = ELEMENTS * 2 // itemsize // input_tile
    sizes = {"INPUT_TILE": input_tile, "OUTPUT_TILE": max(lines // 2 if gated else lines, 1)}
    held = input_tile * sizes["OUTPUT_TILE"] * (2 if gated else 1) * itemsize
    return sizes, min(max(NUM_WARPS, held // (2 * ELEMENTS) * NUM_WARPS), 16)
