"""Matrix products with weights packed beforehand, on the CPU: in bfloat16, or in int8 (``linear_int8.py``)."""

from functools import cache
from typing import Any

import torch
from numba import njit, types

from nanovllm.kernels.cpu.launch import Kernel, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.vectors import (
    COLUMNS,
    MAX_ROWS,
    VECTOR_BYTES,
    as_float32,
    as_int32,
    as_int64,
    bfloat16_tile_of_more,
    bfloat16_tile_of_one,
    bfloat16_tile_of_two,
    int8_tile_of_more,
    int8_tile_of_one,
    int8_tile_of_two,
    read,
    scratch,
    write,
)
from nanovllm.utils import huge_pages

PANEL_ROW_BYTES = 2 * VECTOR_BYTES  # of packed weights: a pair of inputs for each column of a tile
TILE_FLOATS = MAX_ROWS * COLUMNS
# Bytes of rows of x that a run of tasks goes through before the next: they are to stay in a core's second cache.
BLOCK_BYTES = 512 * 1024


@cache
def product_kernel(is_int8: bool) -> Kernel:
    """The kernel that multiplies by packed weights: of bfloat16, or (``is_int8``) of int8 with rows of uint8."""

    def linear(arguments: Any) -> None:
        (
            x,
            x_scales,  # of int8: float32 [rows]
            weight,
            weight_scales,  # of int8: float32 [outputs]
            weight_sums,  # of int8: int32 [outputs], what the offset of x adds to each sum
            bias,
            out,
            rows,
            depth,
            outputs,
            block_rows,
            panels,
            half,
        ) = integers(arguments, 13)
        is_half = half != 0  # bias and result are bfloat16, else float32
        x_row = 4 * depth
        b_row = c_row = PANEL_ROW_BYTES
        panel_bytes = depth * b_row
        memory = scratch(TILE_FLOATS)
        task = next_task(arguments)
        while task < num_tasks(arguments):
            following = next_task(arguments)  # known now, so that its weights can be asked for while these are used
            panel = task % panels
            row, end = task // panels * block_rows, min(rows, (task // panels + 1) * block_rows)
            b = weight + panel * panel_bytes
            ahead = weight + min(following, num_tasks(arguments) - 1) % panels * panel_bytes
            column = panel * COLUMNS
            tiles = (end - row + MAX_ROWS - 1) // MAX_ROWS
            for tile in range(tiles):
                count = (end - row + tiles - tile - 1) // (tiles - tile)
                a, part = x + row * x_row, ahead + tile * (panel_bytes // 2)
                if is_int8:
                    if tiles == 1:
                        int8_tile_of_one(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, ahead, 0)
                    elif tile < 2:
                        int8_tile_of_two(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, part, 0)
                    else:
                        int8_tile_of_more(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, b, 0)
                    _scale(memory, count, x_scales + 4 * row, weight_scales + 4 * column, weight_sums + 4 * column)
                elif tiles == 1:
                    bfloat16_tile_of_one(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, ahead, 0)
                elif tile < 2:
                    bfloat16_tile_of_two(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, part, 0)
                else:
                    bfloat16_tile_of_more(count, a, x_row, b, b_row, VECTOR_BYTES, depth, memory, c_row, b, 0)
                _give(memory, count, bias, out, row, column, outputs, is_half)
                row += count
            task = following

    linear.__qualname__ += "_int8" if is_int8 else "_bfloat16"  # a file each in the cache
    return Kernel(linear)


@njit(inline="always")
def _scale(sums: Any, count: Any, x_scales: Any, weight_scales: Any, weight_sums: Any) -> None:
    """Turn a tile's integers into the numbers they stand for."""
    integers_of_tile, totals = as_int32(sums), as_float32(sums)
    scales, offsets = as_float32(weight_scales), as_int32(weight_sums)
    for r in range(count):
        scale = as_float32(x_scales)[r]
        for j in range(COLUMNS):
            total = integers_of_tile[r * COLUMNS + j] - offsets[j]
            totals[r * COLUMNS + j] = types.float32(total) * (scale * scales[j])


@njit(inline="always")
def _give(sums: Any, count: Any, bias: Any, out: Any, row: Any, column: Any, outputs: Any, is_half: Any) -> None:
    """Write a tile, with the bias, to its place in the result."""
    totals, columns = as_float32(sums), min(COLUMNS, outputs - column)
    for r in range(count):
        if bias != 0:
            for j in range(columns):
                totals[r * COLUMNS + j] += read(bias, column + j, is_half)
        place = (row + r) * outputs + column
        if columns == COLUMNS:
            for j in range(COLUMNS):
                write(out, place + j, is_half, totals[r * COLUMNS + j])
        else:
            for j in range(columns):
                write(out, place + j, is_half, totals[r * COLUMNS + j])


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight [outputs, inputs], inputs even, in the order in which :func:`linear` reads it.

    Returns:
        bfloat16 [panels, inputs / 2, COLUMNS, 2], the outputs padded with zeros to whole panels: pairs of inputs of
        ``COLUMNS`` outputs side by side.
    """
    packed = pack_words(weight.contiguous().view(torch.int32))
    return packed.view(torch.bfloat16).view(*packed.shape, 2)


def pack_words(words: torch.Tensor) -> torch.Tensor:
    """Words of 4 bytes, int32 [outputs, depth], in panels of outputs: int32 [panels, depth, COLUMNS]."""
    outputs, depth = words.shape
    panels, whole = -(-outputs // COLUMNS), outputs // COLUMNS
    packed = huge_pages.empty((panels, depth, COLUMNS), torch.int32)
    packed[:whole] = words[: whole * COLUMNS].view(whole, COLUMNS, depth).transpose(1, 2)
    if whole < panels:
        packed[whole].zero_()
        packed[whole, :, : outputs - whole * COLUMNS] = words[whole * COLUMNS :].t()
    return packed


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
        bias: [outputs], of the result's dtype.
        dtype: Of the result: bfloat16 or float32.

    Returns:
        [rows, outputs].
    """
    return multiply(product_kernel(False), x.contiguous(), None, packed, None, None, outputs, bias, dtype)


def multiply(
    kernel: Kernel,
    x: torch.Tensor,
    x_scales: torch.Tensor | None,
    packed: torch.Tensor,
    weight_scales: torch.Tensor | None,
    weight_sums: torch.Tensor | None,
    outputs: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Launch a kernel of :func:`product_kernel`: see there. Returns [rows, outputs] in ``dtype``."""
    rows, row_bytes = x.shape[0], x.shape[1] * x.element_size()
    out = new((rows, outputs), dtype)
    panels = packed.shape[0]
    block_rows = max(MAX_ROWS, min(rows, BLOCK_BYTES // row_bytes // MAX_ROWS * MAX_ROWS))

    def address(tensor: torch.Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    kernel(
        panels * -(-rows // block_rows),
        x.data_ptr(),
        address(x_scales),
        packed.data_ptr(),
        address(weight_scales),
        address(weight_sums),
        address(bias),
        out.data_ptr(),
        rows,
        row_bytes // 4,
        outputs,
        block_rows,
        panels,
        dtype == torch.bfloat16,
    )
    return out
