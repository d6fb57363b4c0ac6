"""silu(gate) * up, on the CPU."""

from typing import Any

import torch
from numba import types

from nanovllm.kernels.cpu.launch import Kernel, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import LOG2_E, exp2, read, rounded, write


def _silu_and_mul(arguments: Any) -> None:
    gate_up, stride, out, size, half, pieces = integers(arguments, 6)
    is_half = half != 0
    width = 2 if is_half else 4
    length = -(-size // pieces)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        row, piece = task // pieces, task % pieces
        gate = gate_up + row * stride * width
        up, target = gate + size * width, out + row * size * width
        for i in range(piece * length, min(size, (piece + 1) * length)):
            x = read(gate, i, is_half)
            silu = rounded(x / (types.float32(1) + exp2(x * types.float32(-LOG2_E))), is_half)
            write(target, i, is_half, silu * read(up, i, is_half))
        task = next_task(arguments)


_kernel = Kernel(_silu_and_mul, reorders=False)  # x * up may overflow where silu(x) * up does not
_MIN_TASKS = 8  # a row is cut in pieces if there are fewer


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row times the second.

    Args:
        gate_up: [rows, 2 * n], bfloat16 or float32; the last dimension is packed, rows may be strided.

    Returns:
        [rows, n], of the same dtype.
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = new((rows, size), gate_up.dtype)
    pieces = 1 if rows >= _MIN_TASKS else 4
    is_half = gate_up.dtype == torch.bfloat16
    _kernel(rows * pieces, gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), size, is_half, pieces)
    return out
