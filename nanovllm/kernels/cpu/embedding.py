"""Rows of a table, on the CPU."""

from typing import Any

import torch

from nanovllm.kernels.cpu.launch import Kernel, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import as_int64, as_uint16


def _embedding(arguments: Any) -> None:
    table, ids, out, halves = integers(arguments, 4)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        source = as_uint16(table + as_int64(ids)[task] * halves * 2)
        target = as_uint16(out + task * halves * 2)
        for i in range(halves):
            target[i] = source[i]
        task = next_task(arguments)


_kernel = Kernel(_embedding)


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of a contiguous table [rows, size] of bfloat16 or float32: ids int64 [n], each a row's -> [n, size]."""
    ids = ids.contiguous()
    out = new((len(ids), table.shape[1]), table.dtype)
    halves = table.shape[1] * table.element_size() // 2
    _kernel(len(ids), table.data_ptr(), ids.data_ptr(), out.data_ptr(), halves)
    return out
