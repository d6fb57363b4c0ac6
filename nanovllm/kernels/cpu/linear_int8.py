"""Matrix products with weights of int8, a scale an output, on the CPU.

The rows of x are brought to eight bits as they come, each with a scale of its own ("dynamic, per token"; Dettmers et
al., 2022, https://arxiv.org/abs/2208.07339, section 2.1), and sums are exact integers. The processor multiplies
unsigned by signed bytes, so x is stored with an offset of 128, whose part in each sum is known beforehand.
"""

from typing import Any, NamedTuple

import torch
from numba import types

from nanovllm.kernels.cpu.launch import Kernel, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.linear import multiply, pack_words, product_kernel
from nanovllm.kernels.cpu.tiles import COLUMNS
from nanovllm.kernels.cpu.vectors import as_float32, as_uint8, bits_of, of_bits, read

OFFSET = 128
_GROUP = 4  # inputs in a word of 4 bytes


class QuantizedWeight(NamedTuple):
    """A weight [outputs, inputs] in eight bits.

    Args:
        packed: int32 [panels, depth, COLUMNS]: four inputs a word, padded with zeros.
        scales: float32 [panels * COLUMNS]: what a step of each output's integers is worth.
        sums: int32 [panels * COLUMNS]: ``OFFSET`` times the sum of each output's integers.
        outputs: Rows of the weight.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor
    outputs: int


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """Bring a weight [outputs, inputs] of any floating dtype to eight bits, the largest of each output to 127."""
    outputs, inputs = weight.shape
    depth, padded = -(-inputs // _GROUP), -(-outputs // COLUMNS) * COLUMNS
    scales = torch.ones(padded, dtype=torch.float32, device="cpu")
    sums = torch.zeros(padded, dtype=torch.int32, device="cpu")
    integers_of_weight = torch.zeros(outputs, depth * _GROUP, dtype=torch.int8, device="cpu")
    for first in range(0, outputs, _ROWS_AT_A_TIME):  # without a float32 copy of it all
        rows = weight[first : first + _ROWS_AT_A_TIME].float()
        largest = rows.abs().amax(dim=1)
        scale = torch.where(largest == 0, 1.0, largest / 127)  # NaN or infinite if a weight is
        integers_of_rows = (rows / scale[:, None]).round_().to(torch.int8)
        part = slice(first, first + len(rows))
        scales[part], sums[part] = scale, OFFSET * integers_of_rows.sum(dim=1, dtype=torch.int32)
        integers_of_weight[part, :inputs] = integers_of_rows
    return QuantizedWeight(pack_words(integers_of_weight.view(torch.int32)), scales, sums, outputs)


_ROWS_AT_A_TIME = 4096


def _quantize_rows(arguments: Any) -> None:
    x, stride, out, scales, size, padded, half = integers(arguments, 7)
    is_half = half != 0
    width = 2 if is_half else 4
    task = next_task(arguments)
    while task < num_tasks(arguments):
        source, target = x + task * stride * width, as_uint8(out + task * padded)
        magnitude = types.int32(0)  # as bits, whose order is that of the numbers, infinity and NaN last
        for i in range(size):
            magnitude = max(magnitude, bits_of(read(source, i, is_half)) & types.int32(0x7FFFFFFF))
        largest = of_bits(magnitude)
        scale = largest / types.float32(127)
        as_float32(scales)[task] = scale
        inverse = types.float32(1) / scale if largest > types.float32(0) else types.float32(0)
        for i in range(size):
            # Half and the offset are added before the fraction is cut off, so it is never negative.
            value = read(source, i, is_half) * inverse + types.float32(OFFSET + 0.5)
            target[i] = types.uint8(types.int32(value))
        for i in range(size, padded):
            target[i] = types.uint8(OFFSET)
        task = next_task(arguments)


_quantize_kernel = Kernel(_quantize_rows)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring each row to eight bits, its largest number to 127.

    Args:
        x: [rows, inputs], bfloat16 or float32; the last dimension is packed, rows may be strided.

    Returns:
        uint8 [rows, inputs padded to a multiple of 4], with an offset of 128, and float32 [rows], what a step is worth.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, size = x.shape
    padded = -(-size // _GROUP) * _GROUP
    out, scales = new((rows, padded), torch.uint8), new((rows,), torch.float32)
    is_half = x.dtype == torch.bfloat16
    _quantize_kernel(rows, x.data_ptr(), x.stride(0), out.data_ptr(), scales.data_ptr(), size, padded, is_half)
    return out, scales


def linear_int8(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias, x in eight bits too.

    Args:
        x: [rows, inputs], bfloat16 or float32.
        weight: W [outputs, inputs].
        bias: [outputs], of the result's dtype.
        dtype: Of the result: bfloat16 or float32.
        out: Where it goes, contiguous; new memory by default.

    Returns:
        [rows, outputs].
    """
    quantized, x_scales = quantize_rows(x)
    packed, scales, sums, outputs = weight
    return multiply(product_kernel(True), quantized, x_scales, packed, scales, sums, outputs, bias, dtype, out)
