"""The gate of a gated MLP, silu(gate) * up, in one pass over the memory."""

import torch
import triton
import triton.language as tl

from nanovllm.kernels.dependent_launch import launch_options, let_next_kernel_start, wait_for_previous_kernel

_BLOCK = 1024  # of 4 warps: 8 elements a thread, 16 bytes of bfloat16


@triton.jit
def _silu_and_mul_kernel(gate_up, gate_up_stride, out, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    line = gate_up + row * gate_up_stride
    gate = tl.load(line + columns, mask=mask, other=0.0)
    up = tl.load(line + N + columns, mask=mask, other=0.0)
    gate_float = gate.to(tl.float32)
    activated = (gate_float / (1.0 + tl.exp(-gate_float))).to(gate.dtype)
    product = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * N + columns, product.to(gate.dtype), mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the activation rounded to the dtype before the product.

    Args:
        gate_up: [tokens, 2 * n], gate first; the last dimension is packed, rows may be strided.

    Returns:
        [tokens, n], of the same dtype.
    """
    tokens, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, n), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() > 0:
        grid = (tokens, triton.cdiv(n, _BLOCK))
        options = launch_options(gate_up.device)
        _silu_and_mul_kernel[grid](gate_up, gate_up.stride(0), out, N=n, BLOCK=_BLOCK, num_warps=4, **options)
    return out


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """:func:`silu_and_mul` by torch's operators."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
