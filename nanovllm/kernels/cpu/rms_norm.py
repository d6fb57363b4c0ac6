"""RMSNorm with the residual addition before it, on the CPU."""

from typing import Any

import numpy as np
import torch
from numba import types

from nanovllm.kernels.cpu.launch import Kernel, as_float, as_integer, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import read, rounded, write


def _rms_norm(arguments: Any) -> None:
    (
        x,
        x_stride,
        residual,  # 0 if there is none
        residual_stride,
        weight,
        normed,
        total,
        rows,
        size,
        half,
        rows_a_task,
        eps_bits,
    ) = integers(arguments, 12)
    is_half, eps = half != 0, as_float(eps_bits)
    width = 2 if is_half else 4
    task = next_task(arguments)
    while task < num_tasks(arguments):
        for row in range(task * rows_a_task, min(rows, (task + 1) * rows_a_task)):
            source, target = x + row * x_stride * width, normed + row * size * width
            if residual != 0:
                other, added = residual + row * residual_stride * width, total + row * size * width
                for i in range(size):
                    write(added, i, is_half, read(source, i, is_half) + read(other, i, is_half))
                source = added
            squares = types.float32(0)
            for i in range(size):
                value = read(source, i, is_half)
                squares += value * value
            scale = types.float32(1) / np.sqrt(squares / types.float32(size) + eps)
            for i in range(size):
                value = rounded(read(source, i, is_half) * scale, is_half)
                write(target, i, is_half, value * read(weight, i, is_half))
        task = next_task(arguments)


_kernel = Kernel(_rms_norm)
_ROWS_A_TASK = 4


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add ``residual`` to ``x`` and normalise the sum.

    Args:
        x: [rows, size], bfloat16 or float32; the last dimension is packed, rows may be strided.
        weight: [size], of x's dtype.
        eps: Added to the mean square.
        residual: Like x; None if nothing is to be added.

    Returns:
        (normalised sum, sum), both [rows, size] of x's dtype; the sum is ``x`` itself if there is no residual.
    """
    rows, size = x.shape
    normed = new((rows, size), x.dtype)
    total = x if residual is None else new((rows, size), x.dtype)
    _kernel(
        -(-rows // _ROWS_A_TASK),
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        normed.data_ptr(),
        total.data_ptr(),
        rows,
        size,
        x.dtype == torch.bfloat16,
        _ROWS_A_TASK,
        as_integer(eps),
    )
    return normed, total
