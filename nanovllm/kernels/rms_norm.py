"""RMSNorm of the residual stream, and the addition to the stream that goes before it, in one pass over the memory."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel


@triton.jit
def _rms_norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    normed,
    total,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
    dtype = values.dtype
    values = values.to(tl.float32)
    if HAS_RESIDUAL:
        added = tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0)
        rounded = (values + added.to(tl.float32)).to(dtype)
        tl.store(total + row * SIZE + columns, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
    # Rounded before the weight is applied, as checkpoints were trained.
    values = (values * scale).to(dtype).to(tl.float32)
    weights = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * SIZE + columns, (values * weights).to(dtype), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: [tokens, size], up to 16384 elements a row; the last dimension is packed, rows may be strided.
        weight: [size], of x's dtype.
        eps: Added to the mean square.
        residual: Like ``x``; None starts the stream.

    Returns:
        The normalised sum and the sum, [tokens, size], of x's dtype; without ``residual`` the sum is ``x`` itself.
    """
    tokens, size = x.shape
    normed = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(normed)
    if tokens > 0:
        added = x if residual is None else residual
        block, num_warps = _launch_sizes(size)
        _rms_norm_kernel[(tokens,)](
            x,
            x.stride(0),
            added,
            added.stride(0),
            weight,
            normed,
            total,
            eps,
            SIZE=size,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            **launch_options(x.device),
            num_warps=num_warps,
        )
    return normed, total


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` by torch's operators."""
    total = x if residual is None else x + residual
    norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.rsqrt(norm.square() / total.shape[-1] + eps)
    return (total * scale).to(x.dtype) * weight, total


def _launch_sizes(size: int) -> tuple[int, int]:
    """Block and warps for rows of ``size``: 8 elements a thread, 16 bytes of bfloat16, up to 16 warps."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 256, 1), 16)
