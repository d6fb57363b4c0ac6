"""A linear layer of few rows with what surrounds it: the norm before it, the gate or the residual stream behind it.

With few rows a step is a matter of reading the weights, and of how long each kernel takes once the one before it has
ended. So every program asks for its part of the weight first, all of it at once, and only then waits for the kernel
before. What is left to do is a product on the matrix units, with as few instructions as there can be.

These multiply tiles of at least 16 x 16 by 16 x 8, far more than one row needs. A row of x is therefore cut into
``FOLD`` pieces, the columns of the second factor, and so is each line of the weight, without being moved: the pieces of
a line are lines of the first factor. Of all the products those of the same piece are wanted, and added up.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nanovllm.kernels import MOST_TILE_BYTES
from nanovllm.kernels.decode_work import multiprocessors
from nanovllm.kernels.dependent_launch import (
    SINCE_TRITON_3_5,
    has_hopper_features,
    launch_options,
    let_next_kernel_start,
    wait_for_previous_kernel,
)
from nanovllm.kernels.rms_norm import rms_norm_reference

# Pieces of a line (no earlier Triton multiplies by fewer than 16 columns), and the most elements of one. Longer lines
# are multiplied element by element: fewer of the products would be wanted, and reading the weight takes longer anyway.
LEAST_FOLD = 8 if SINCE_TRITON_3_5 else 16
MOST_FOLD = 16
MOST_OF_A_PIECE = 512
# Lines of the weight that a program takes; half as many where that leaves a tenth of the multiprocessors or more idle,
# or where they have more than MOST_TILE_BYTES, of the gate's half and of the other one together.
MOST_OUTPUTS = 16
# Of these, what a warp keeps in registers.
WARP_BYTES = 8 << 10


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
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FOLD: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE_TILE: tl.constexpr,
    OUTPUT_TILE: tl.constexpr,
    FACTOR_LINES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BY_TILES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if not HOLDS_BACK:
        let_next_kernel_start(OVERLAPS)
    HALVES: tl.constexpr = 2 if GATED else 1
    # Whether a row is asked for before the one ahead of it is stored: the compiler moves no load past a store. Where
    # lines are long, registers are short, and the weight takes longer to read anyway.
    AHEAD: tl.constexpr = FOLD * PIECE_TILE <= 4096
    first = tl.program_id(0) * OUTPUT_TILE
    output = first + tl.arange(0, OUTPUT_TILE)
    is_output = output < OUTPUTS
    piece = tl.arange(0, FOLD)
    place = tl.arange(0, PIECE_TILE)
    column = piece[:, None] * PIECE + place[None, :]  # [pieces, places]
    is_input = (place < PIECE)[None, :] & (column < INPUTS)
    if DESCRIBED:
        if GATED:
            part = tl.reshape(weight.load([0, first * FOLD, 0]), [FACTOR_LINES, PIECE_TILE])
        else:
            part = weight.load([first * FOLD, 0])
    else:
        half = tl.arange(0, HALVES)
        line = half[:, None] * OUTPUTS + output[None, :]
        offset = line.to(tl.int64)[:, :, None, None] * INPUTS + column[None, None, :, :]
        mask = is_output[None, :, None, None] & is_input[None, None, :, :]
        part = tl.load(weight + offset, mask=mask, other=0.0, eviction_policy="evict_first")
        part = tl.reshape(part, [FACTOR_LINES, PIECE_TILE])
    if HAS_NORM:
        factors = tl.load(norm_weight + column, mask=is_input, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)
    if HOLDS_BACK:
        let_next_kernel_start(OVERLAPS)
    wait_for_previous_kernel(OVERLAPS)

    dtype: tl.constexpr = out.dtype.element_ty
    values = tl.load(x + column, mask=is_input, other=0.0)
    for row in tl.static_range(ROWS):
        next_values = values
        if AHEAD and row + 1 < ROWS:
            next_values = tl.load(x + (row + 1) * x_stride + column, mask=is_input, other=0.0)
        if HAS_RESIDUAL:
            stream = tl.load(residual + row * residual_stride + output, mask=is_output, other=0.0).to(tl.float32)
        if HAS_NORM:  # rounded wherever the layer rounds: before the weight, and after it
            values = values.to(tl.float32)
            squares = tl.sum(tl.reshape(values * values, [FOLD * PIECE_TILE]), axis=0)
            scale = tl.rsqrt(squares / INPUTS + eps)
            values = ((values * scale).to(dtype).to(tl.float32) * factors).to(dtype)
        if BY_TILES:
            products = tl.dot(part, tl.trans(values))  # [pieces of the weight's lines, pieces of x]
            products = tl.reshape(products, [HALVES * OUTPUT_TILE, FOLD, FOLD])
            is_same_piece = piece[None, :, None] == piece[None, None, :]
            result = tl.sum(tl.sum(tl.where(is_same_piece, products, 0.0), axis=2), axis=1)
        else:
            lines = tl.reshape(part, [HALVES * OUTPUT_TILE, FOLD * PIECE_TILE]).to(tl.float32)
            result = tl.sum(lines * tl.reshape(values, [FOLD * PIECE_TILE]).to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            result += added
        result = result.to(dtype).to(tl.float32)
        if GATED:
            result, up = tl.split(tl.trans(tl.reshape(result, [2, OUTPUT_TILE])))
            result = (result / (1.0 + tl.exp(-result))).to(dtype).to(tl.float32) * up
        if HAS_RESIDUAL:
            result += stream
        tl.store(out + row * OUTPUTS + output, result.to(dtype), mask=is_output)
        values = next_values
        if not AHEAD and row + 1 < ROWS:
            values = tl.load(x + (row + 1) * x_stride + column, mask=is_input, other=0.0)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    holds_back: bool = False,
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
        holds_back: Whether the next kernel may start only once this one has its weight, so that what it reads does not
            delay what kernels before it still have to read.

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
        sizes, num_warps = _launch_sizes(inputs, outputs, gated, x.element_size(), multiprocessors(x.device))
        described = has_hopper_features(x.device) and _can_be_described(weight, sizes)
        _fused_linear_kernel[(triton.cdiv(outputs, sizes["OUTPUT_TILE"]),)](
            x,
            x.stride(0),
            norm_weight,
            eps,
            _describe(weight, sizes, gated) if described else weight,
            bias,
            residual,
            0 if residual is None else residual.stride(0),
            out,
            ROWS=rows,
            INPUTS=inputs,
            OUTPUTS=outputs,
            HAS_NORM=norm_weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            GATED=gated,
            DESCRIBED=described,
            HOLDS_BACK=holds_back,
            **sizes,
            **launch_options(x.device),
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
    holds_back: bool = False,
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


def _can_be_described(weight: torch.Tensor, sizes: dict[str, int]) -> bool:
    """Whether pieces lie as descriptors want them, and shared memory has room."""
    piece_bytes = sizes["PIECE"] * weight.element_size()
    return (
        sizes["PIECE"] * sizes["FOLD"] == weight.shape[1]
        and piece_bytes % 16 == 0
        and weight.data_ptr() % 16 == 0
        and sizes["FACTOR_LINES"] * sizes["PIECE_TILE"] * weight.element_size() <= MOST_TILE_BYTES
    )


def _describe(weight: torch.Tensor, sizes: dict[str, int], gated: bool) -> Any:
    """A weight whose tiles can be copied to shared memory as a whole, its lines in pieces below one another."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    lines, fold = weight.shape[0], sizes["FOLD"]
    tile = [sizes["OUTPUT_TILE"] * fold, sizes["PIECE_TILE"]]
    if gated:
        return TensorDescriptor.from_tensor(weight.view(2, lines // 2 * fold, sizes["PIECE"]), [2, *tile])
    return TensorDescriptor.from_tensor(weight.view(lines * fold, sizes["PIECE"]), tile)


def _launch_sizes(inputs: int, outputs: int, gated: bool, itemsize: int, processors: int) -> tuple[dict[str, int], int]:
    """Tile sizes and warps: whole lines of the weight, as many as registers take."""
    fold = LEAST_FOLD
    while triton.cdiv(inputs, fold) > MOST_OF_A_PIECE:
        fold *= 2
    piece = triton.cdiv(inputs, fold)
    tile = max(triton.next_power_of_2(piece), 16)
    halves = 2 if gated else 1
    by_tiles = itemsize < 4 and fold <= MOST_FOLD
    least = max(1, 64 // (fold * halves)) if by_tiles else 1  # of tiles, one for each of four warps
    output_tile = MOST_OUTPUTS
    while output_tile > least and (
        halves * output_tile * fold * tile * itemsize > MOST_TILE_BYTES
        or triton.cdiv(outputs, output_tile) * 10 < 9 * processors
    ):
        output_tile //= 2
    lines = halves * output_tile * fold
    most_warps = min(lines // 16, 16) if by_tiles else 16
    num_warps = min(max(lines * tile * itemsize // WARP_BYTES, 4), most_warps)
    sizes = {"FOLD": fold, "PIECE": piece, "PIECE_TILE": tile, "OUTPUT_TILE": output_tile, "FACTOR_LINES": lines}
    sizes["BY_TILES"] = by_tiles
    return sizes, num_warps
