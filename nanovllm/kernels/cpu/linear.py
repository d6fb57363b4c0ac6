"""Matrix products with weights packed beforehand, on the CPU: in bfloat16, or in int8 (``linear_int8.py``)."""

from functools import cache
from typing import Any

import torch
from numba import njit, types

from nanovllm.kernels.cpu.launch import Kernel, Stream, integers, new, next_task, num_tasks
from nanovllm.kernels.cpu.tiles import (
    COLUMNS,
    MAX_ROWS,
    bfloat16_tile_of_more,
    bfloat16_tile_of_one,
    bfloat16_tile_of_two,
    int8_tile_of_more,
    int8_tile_of_one,
    int8_tile_of_two,
)
from nanovllm.kernels.cpu.vectors import VECTOR_BYTES, as_float32, as_int32, as_int64, read, scratch, write
from nanovllm.utils import huge_pages

PANEL_ROW_BYTES = 2 * VECTOR_BYTES  # of packed weights: a pair of inputs for each column of a tile
# Most words of 4 bytes of a row that are gone through at a time: 12 rows of them are 72 KiB, a panel's 192 KiB.
MAX_DEPTH = 1536
# Rows of x that a run of tasks goes through before the next, at most, and their bytes in a stretch: they are to stay in
# a core's second cache.
BLOCK_ROWS = 252
BLOCK_BYTES = 512 * 1024
BLOCK_FLOATS = BLOCK_ROWS * COLUMNS


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
        # A long row of x is gone through in stretches, so that what is used again stays in the caches.
        stretches = (depth + MAX_DEPTH - 1) // MAX_DEPTH
        sums = scratch(BLOCK_FLOATS)
        task = next_task(arguments)
        while task < num_tasks(arguments):
            following = next_task(arguments)  # known now, so that its weights can be asked for while these are used
            panel, first = task % panels, task // panels * block_rows
            end = min(rows, first + block_rows)
            here = weight + panel * panel_bytes
            next_panel = weight + min(following, num_tasks(arguments) - 1) % panels * panel_bytes
            column = panel * COLUMNS
            tiles = (end - first + MAX_ROWS - 1) // MAX_ROWS
            for stretch in range(stretches):
                begin = depth * stretch // stretches
                length = depth * (stretch + 1) // stretches - begin
                b, row = here + begin * b_row, first
                ahead = b + length * b_row if stretch + 1 < stretches else next_panel
                for tile in range(tiles):
                    count = (end - row + tiles - tile - 1) // (tiles - tile)
                    a, c = x + row * x_row + 4 * begin, sums + (row - first) * c_row
                    part = ahead + tile * (length // 2 * b_row)
                    if stretch == 0:
                        for i in range(count * COLUMNS):
                            as_int32(c)[i] = types.int32(0)  # the bits of a float's 0, too
                    if is_int8:
                        if tiles == 1:
                            int8_tile_of_one(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, ahead, 0)
                        elif tile < 2:
                            int8_tile_of_two(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, part, 0)
                        else:
                            int8_tile_of_more(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, b, 0)
                    elif tiles == 1:
                        bfloat16_tile_of_one(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, ahead, 0)
                    elif tile < 2:
                        bfloat16_tile_of_two(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, part, 0)
                    else:
                        bfloat16_tile_of_more(count, a, x_row, b, b_row, VECTOR_BYTES, length, c, c_row, b, 0)
                    if stretch + 1 == stretches:
                        if is_int8:
                            _scale(c, count, x_scales + 4 * row, weight_scales + 4 * column, weight_sums + 4 * column)
                        _give(c, count, bias, out, row, column, outputs, is_half)
                    row += count
            task = following

    linear.__qualname__ += "_int8" if is_int8 else "_bfloat16"  # a file each in the cache
    return Kernel(linear, lambda arguments: Stream(arguments[2], arguments[8] * PANEL_ROW_BYTES, arguments[11]))


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W^T + bias.

    Args:
        x: bfloat16 [rows, inputs].
        packed: W [outputs, inputs], packed.
        outputs: Its rows.
        bias: [outputs], of the result's dtype.
        dtype: Of the result: bfloat16 or float32.
        out: Where it goes, contiguous; new memory by default.

    Returns:
        [rows, outputs].
    """
    return multiply(product_kernel(False), x.contiguous(), None, packed, None, None, outputs, bias, dtype, out)


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
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Launch a kernel of :func:`product_kernel`: see there. Returns [rows, outputs] in ``dtype``, in ``out`` if any."""
    rows, row_bytes = x.shape[0], x.shape[1] * x.element_size()
    if out is None:
        out = new((rows, outputs), dtype)
    assert out.is_contiguous()
    assert (out.shape, out.dtype) == ((rows, outputs), dtype)
    assert bias is None or bias.dtype == dtype
    panels = packed.shape[0]
    block_rows = BLOCK_BYTES // min(row_bytes, 4 * MAX_DEPTH) // MAX_ROWS * MAX_ROWS
    block_rows = min(BLOCK_ROWS // MAX_ROWS * MAX_ROWS, max(MAX_ROWS, block_rows))

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
