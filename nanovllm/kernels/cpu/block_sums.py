"""What the sampler needs to know of all logits of a row, in one walk, on the CPU."""

from typing import Any

import torch
from numba import types

from nanovllm.kernels.cpu.launch import Kernel, integers, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import as_float32, as_uint8, exp2, largest


def _block_sums(arguments: Any) -> None:
    logits, maxima, sums, scales, wanted, blocks, size = integers(arguments, 7)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        row, row_maxima = logits + task * blocks * size * 4, maxima + task * blocks * 4
        for block in range(blocks):
            as_float32(row_maxima)[block] = largest(row + block * size * 4, size)
        row_sums = as_float32(sums + task * blocks * 4)
        if as_uint8(wanted)[task] != 0:
            peak, scale = largest(row_maxima, blocks), as_float32(scales)[task]
            for block in range(blocks):
                here = as_float32(row + block * size * 4)
                total = types.float32(0)
                for i in range(size):
                    total += exp2((here[i] - peak) * scale)
                row_sums[block] = total
        else:
            for block in range(blocks):
                row_sums[block] = types.float32(0)
        task = next_task(arguments)


_kernel = Kernel(_block_sums)


def block_sums(blocks: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima of blocks of logits, and sums of weights 2^((logit - the row's maximum) * scale).

    Args:
        blocks: float32 [rows, blocks, size], contiguous.
        scale: float32 [rows].
        wanted: bool [rows]: whose sums are wanted; the others are 0.

    Returns:
        Maxima and sums, float32 [rows, blocks] each. A NaN makes a NaN of its block's maximum.
    """
    rows, count, size = blocks.shape
    blocks, scale, wanted = blocks.contiguous(), scale.contiguous(), wanted.contiguous()
    maxima, sums = blocks.new_empty((rows, count)), blocks.new_empty((rows, count))
    _kernel(
        rows,
        blocks.data_ptr(),
        maxima.data_ptr(),
        sums.data_ptr(),
        scale.data_ptr(),
        wanted.data_ptr(),
        count,
        size,
    )
    return maxima, sums
