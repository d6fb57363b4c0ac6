"""Matrix products with weights packed beforehand, on the CPU, in bfloat16 with float32 sums."""

from typing import Any

import torch

from nanovllm.kernels.cpu.launch import Kernel, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import (
    COLUMNS,
    MAX_ROWS,
    VECTOR_BYTES,
    as_float32,
    as_int32,
    as_int64,
    as_uint16,
    bfloat16_tile_of_more,
    bfloat16_tile_of_one,
    bfloat16_tile_of_two,
    narrow,
    scratch,
    widen,
)
from nanovllm.utils import huge_pages

PANEL_ROW_BYTES = 2 * VECTOR_BYTES  # of packed weights: a pair of inputs for each column of a tile
TILE_FLOATS = MAX_ROWS * COLUMNS
# Bytes of rows of x that a run of tasks goes through before the next: they are to stay in a core's second cache.
BLOCK_BYTES = 512 * 1024


def _linear(arguments: Any) -> None:
    x, weight, bias, out, rows, inputs, outputs, block_rows, panels, wants_float = integers(arguments, 10)
    depth, x_bytes = inputs // 2, 2 * inputs
    b_row = c_row = PANEL_ROW_BYTES
    panel_bytes = depth * b_row
    memory = scratch(TILE_FLOATS)
    totals, bfloats, floats, biases = as_float32(memory), as_uint16(out), as_float32(out), as_uint16(bias)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        following = next_task(arguments)  # known now, so that its weights can be asked for while these are used
        panel = task % panels
        row, end = task // panels * block_rows, min(rows, (task // panels + 1) * block_rows)
        here = weight + panel * panel_bytes
        ahead = weight + min(following, num_tasks(arguments) - 1) % panels * panel_bytes
        column = panel * COLUMNS
        columns = min(COLUMNS, outputs - column)
        tiles = (end - row + MAX_ROWS - 1) // MAX_ROWS
        for tile in range(tiles):
            count = (end - row + tiles - tile - 1) // (tiles - tile)
            source = x + row * x_bytes
            if tiles == 1:
                bfloat16_tile_of_one(
                    count,
                    source,
                    x_bytes,
                    here,
                    PANEL_ROW_BYTES,
                    VECTOR_BYTES,
                    depth,
                    memory,
                    PANEL_ROW_BYTES,
                    ahead,
                    0,
                )
            elif tile < 2:
                half = ahead + tile * (panel_bytes // 2)
                bfloat16_tile_of_two(count, source, x_bytes, here, b_row, VECTOR_BYTES, depth, memory, c_row, half, 0)
            else:
                bfloat16_tile_of_more(count, source, x_bytes, here, b_row, VECTOR_BYTES, depth, memory, c_row, here, 0)
            for r in range(count):
                if bias != 0:
                    for j in range(columns):
                        totals[r * COLUMNS + j] += widen(biases[column + j])
                place = (row + r) * outputs + column
                if wants_float != 0:
                    for j in range(columns):
                        floats[place + j] = totals[r * COLUMNS + j]
                elif columns == COLUMNS:
                    for j in range(COLUMNS):
                        bfloats[place + j] = narrow(totals[r * COLUMNS + j])
                else:
                    for j in range(columns):
                        bfloats[place + j] = narrow(totals[r * COLUMNS + j])
            row += count
        task = following


_kernel = Kernel(_linear)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight [outputs, inputs], inputs even, in the order in which :func:`linear` reads it.

    Returns:
        bfloat16 [panels, inputs / 2, COLUMNS, 2], the outputs padded with zeros to whole panels: pairs of inputs of
        ``COLUMNS`` outputs side by side.
    """
    outputs, inputs = weight.shape
    panels = -(-outputs // COLUMNS)
    pairs = weight.contiguous().view(torch.int32)  # [outputs, inputs / 2]
    packed = huge_pages.empty((panels, inputs // 2, COLUMNS), torch.int32)
    whole = outputs // COLUMNS
    packed[:whole] = pairs[: whole * COLUMNS].view(whole, COLUMNS, inputs // 2).transpose(1, 2)
    if whole < panels:
        packed[whole].zero_()
        packed[whole, :, : outputs - whole * COLUMNS] = pairs[whole * COLUMNS :].t()
    return packed.view(torch.bfloat16).view(panels, inputs // 2, COLUMNS, 2)


def _unpack_rows(arguments: Any) -> None:
    weight, ids, out, pairs = integers(arguments, 4)
    task = next_task(arguments)
    while task < num_tasks(arguments):
        row = as_int64(ids)[task]
        source = as_int32(weight + row // COLUMNS * pairs * PANEL_ROW_BYTES + row % COLUMNS * 4)
        target = as_int32(out + task * pairs * 4)
        for i in range(pairs):
            target[i] = source[i * COLUMNS]
        task = next_task(arguments)


_unpack_kernel = Kernel(_unpack_rows)


def unpack_rows(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the weight that was packed: rows int64 [n] -> bfloat16 [n, inputs]."""
    rows = rows.contiguous()
    out = new((len(rows), 2 * packed.shape[1]), packed.dtype)
    _unpack_kernel(len(rows), packed.data_ptr(), rows.data_ptr(), out.data_ptr(), packed.shape[1])
    return out


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    outputs: int,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x W^T + bias.

    Args:
        x: bfloat16 [rows, inputs].
        packed: W [outputs, inputs], packed.
        outputs: Its rows.
        bias: bfloat16 [outputs].
        dtype: Of the result: bfloat16 or float32.

    Returns:
        [rows, outputs].
    """
    x = x.contiguous()
    rows, inputs = x.shape
    out = new((rows, outputs), dtype)
    panels = packed.shape[0]
    block_rows = max(MAX_ROWS, min(rows, BLOCK_BYTES // (2 * inputs) // MAX_ROWS * MAX_ROWS))
    _kernel(
        panels * -(-rows // block_rows),
        x.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        inputs,
        outputs,
        block_rows,
        panels,
        dtype == torch.float32,
    )
    return out
