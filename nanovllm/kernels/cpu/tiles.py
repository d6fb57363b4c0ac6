"""Products of matrices in vector registers.

What matters there is that a tile of the result stays in registers, which numba's compiler does not see to, so
:func:`_tile_family` writes LLVM's instructions itself.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nanovllm.kernels.cpu.vectors import (
    F32,
    HAS_AVX512,
    HAS_BF16_PRODUCTS,
    HAS_INT8_PRODUCTS,
    I32,
    I64,
    LANES,
    VECTOR_BYTES,
    BFloat,
    llvm_function,
    pointer,
    prefetch_line,
)

COLUMNS = 2 * LANES  # of a tile: two vectors, so that each element of the left factor is used twice once it is loaded

# Most rows of a tile: 12 x 2 accumulators leave eight of AVX-512's 32 registers for the factors. With AVX2 or NEON a
# vector is several of fewer or smaller registers.
MAX_ROWS = 12 if HAS_AVX512 else 2

_FLOATS, _INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_BFLOATS = ir.VectorType(BFloat(), 2 * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    """A vector of copies of an int32."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(_INTS, [0] * LANES))


def _fused_multiply_add(builder: Any, total: Any, left: Any, right: Any) -> Any:
    name = f"llvm.fma.v{LANES}f32"
    factors = builder.bitcast(left, _FLOATS), builder.bitcast(right, _FLOATS)
    return builder.call(llvm_function(builder, name, _FLOATS, _FLOATS, _FLOATS, _FLOATS), [*factors, total])


def _add_bfloat16_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Per 4-byte lane, add the products of two pairs of bfloat16 to a float32."""
    if HAS_BF16_PRODUCTS:
        function = llvm_function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, _FLOATS, _BFLOATS, _BFLOATS)
        return builder.call(function, [total, builder.bitcast(left, _BFLOATS), builder.bitcast(right, _BFLOATS)])
    shift, mask = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [-65536] * LANES)
    total = _fused_multiply_add(builder, total, builder.shl(left, shift), builder.shl(right, shift))
    return _fused_multiply_add(builder, total, builder.and_(left, mask), builder.and_(right, mask))


def _add_int8_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Per 4-byte lane, add the products of four uint8 (left) with four int8 (right) to an int32."""
    if HAS_INT8_PRODUCTS:
        function = llvm_function(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, _INTS, _INTS, _INTS)
        return builder.call(function, [total, left, right])
    top = ir.Constant(_INTS, [24] * LANES)
    for shift in (24, 16, 8, 0):  # each byte is moved to the top, and down again, which extends it by its sign or zeros
        up = ir.Constant(_INTS, [shift] * LANES)
        product = builder.mul(builder.lshr(builder.shl(left, up), top), builder.ashr(builder.shl(right, up), top))
        total = builder.add(total, product)
    return total


def _tile_family(
    multiply: Callable[..., Any],
    accumulator: Any,
    prefetched: int = 0,
    prefetched_apart: bool = False,
    adds: bool = False,
    min_rows: int = 1,
    segmented: bool = False,
) -> Any:
    """An intrinsic that computes a tile of a matrix product in registers.

    ``tile(rows, a, a_row, b, b_row, b_column, depth, c, c_row, ahead, apart)`` computes, for ``min_rows`` to
    ``MAX_ROWS`` rows and ``COLUMNS`` columns, C = A B, or C += A B if the family ``adds``. All sizes are in bytes,
    addresses int64:

    - A: ``rows`` rows, ``a_row`` apart, of ``depth`` elements of 4 bytes (a float32, two bfloat16, four uint8).
    - B: ``depth`` rows, ``b_row`` apart, of two vectors ``b_column`` apart: an element for each column.
    - C: rows ``c_row`` apart, of ``COLUMNS`` float32 (int32 of int8 products).
    - ``ahead``: memory of which ``prefetched`` lines of 64 bytes a row of B are asked for, for later; if
      ``prefetched_apart``, each of them ``apart`` bytes from the one before, and those of the next row behind them.

    If the family is ``segmented``, B lies in ``apart`` segments of ``depth`` rows each: ``b`` is the address of two
    int64 a segment, where it begins and which memory is asked for meanwhile. ``ahead`` is how many bytes behind its
    beginning the tile's columns lie; the lines that are asked for lie ``depth`` times as many behind theirs.
    """

    def body(builder: Any, rows: int, arguments: list[Any], done: Any) -> None:
        # A single row is multiplied faster than memory gives its weights: the processor's own prefetching does most.
        lines_ahead = min(prefetched, 1) if rows == 1 else prefetched
        a, a_row, b, b_row, b_column, depth, c, c_row, ahead, apart = arguments
        line_bytes = ir.Constant(I64, 64)
        between = apart if prefetched_apart else line_bytes
        ahead_row = line_bytes if prefetched_apart else ir.Constant(I64, 64 * lines_ahead)
        unroll = 4 if rows == 1 else 2 if rows == 2 else 1  # more loads under way
        entry = builder.block
        targets, row = [], c
        for r in range(rows):
            row = builder.add(row, c_row) if r else row
            targets += [row, builder.add(row, ir.Constant(I64, VECTOR_BYTES))]
        first = [
            builder.load(pointer(builder, target, accumulator), align=4) if adds else ir.Constant(accumulator, None)
            for target in targets
        ]
        lines = [a]
        for _ in range(1, rows):
            lines.append(builder.add(lines[-1], a_row))

        def step(totals: list[Any], index: Any, b_now: Any, ahead_now: Any) -> list[Any]:
            right = [
                builder.load(pointer(builder, place, _INTS), align=4) for place in (b_now, builder.add(b_now, b_column))
            ]
            for line in range(lines_ahead):
                prefetch_line(builder, builder.add(ahead_now, builder.mul(between, ir.Constant(I64, line))))
            offset = builder.mul(index, ir.Constant(I64, 4))
            result = []
            for r in range(rows):
                scalar = builder.load(pointer(builder, builder.add(lines[r], offset), I32), align=2)
                left = _splat(builder, scalar)
                result += [multiply(builder, totals[2 * r + j], left, right[j]) for j in range(2)]
            return result

        def loop(totals: list[Any], start: Any, stop: Any, b_now: Any, ahead_now: Any, steps: int) -> list[Any]:
            """``steps`` rows of B at a time from ``start`` while they fit before ``stop``."""
            before = builder.block
            head, inside, after = (builder.append_basic_block("tile") for _ in range(3))
            builder.branch(head)
            builder.position_at_end(head)
            states = []
            for initial in (start, b_now, ahead_now, *totals):
                phi = builder.phi(initial.type)
                phi.add_incoming(initial, before)
                states.append(phi)
            index, b_phi, ahead_phi = states[:3]
            following = builder.add(index, ir.Constant(I64, steps))
            builder.cbranch(builder.icmp_signed("<=", following, stop), inside, after)
            builder.position_at_end(inside)
            sums, b_next, ahead_next = list(states[3:]), b_phi, ahead_phi
            for number in range(steps):
                sums = step(sums, builder.add(index, ir.Constant(I64, number)), b_next, ahead_next)
                b_next = builder.add(b_next, b_row)
                ahead_next = builder.add(ahead_next, ahead_row)
            for phi, value in zip(states, (following, b_next, ahead_next, *sums), strict=True):
                phi.add_incoming(value, builder.block)
            builder.branch(head)
            builder.position_at_end(after)
            return states

        def go_through(totals: list[Any], start: Any, stop: Any, b: Any, ahead: Any) -> list[Any]:
            """The rows of B from ``start`` to ``stop``, which lie one after another."""
            if unroll > 1:
                start, b, ahead, *totals = loop(totals, start, stop, b, ahead, unroll)
            return loop(totals, start, stop, b, ahead, 1)[3:]

        assert builder.block is entry
        if segmented:
            totals = _each_segment(builder, first, b, depth, ahead, apart, go_through)
        else:
            totals = go_through(first, ir.Constant(I64, 0), depth, b, ahead)
        for total, target in zip(totals, targets, strict=True):
            builder.store(total, pointer(builder, target, accumulator), align=4)
        builder.branch(done)

    name = f"tile.{multiply.__name__}.{prefetched}.{prefetched_apart}.{adds}.{min_rows}.{segmented}"

    @intrinsic
    def tile(typing_context, rows, a, a_row, b, b_row, b_column, depth, c, c_row, ahead, apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            builder.call(_tile_function(builder.module, name, body, min_rows), arguments)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return tile


def _each_segment(
    builder: Any,
    totals: list[Any],
    table: Any,
    depth: Any,
    offset: Any,
    count: Any,
    go_through: Callable[..., list[Any]],
) -> list[Any]:
    """Go through the segments that a table names; see ``_tile_family``."""
    before = builder.block
    head, inside, after = (builder.append_basic_block("segment") for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    states = []
    for initial in (ir.Constant(I64, 0), *totals):
        phi = builder.phi(initial.type)
        phi.add_incoming(initial, before)
        states.append(phi)
    number = states[0]
    builder.cbranch(builder.icmp_signed("<", number, count), inside, after)
    builder.position_at_end(inside)
    entry = builder.add(table, builder.mul(number, ir.Constant(I64, 16)))
    b = builder.add(builder.load(pointer(builder, entry, I64)), offset)
    lines = builder.load(pointer(builder, builder.add(entry, ir.Constant(I64, 8)), I64))
    lines = builder.add(lines, builder.mul(offset, depth))
    start = builder.mul(number, depth)
    sums = go_through(states[1:], start, builder.add(start, depth), b, lines)
    for phi, value in zip(states, (builder.add(number, ir.Constant(I64, 1)), *sums), strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return states[1:]


def _tile_function(module: Any, name: str, body: Callable[..., None], min_rows: int) -> Any:
    """The LLVM function of a family; declared once a module.

    A function of its own: inlined into a kernel's loops, LLVM would copy it for each condition that is the same
    throughout a loop.
    """
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 11), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    number, *arguments = function.args
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for rows in range(min_rows, MAX_ROWS + 1):
        block = builder.append_basic_block(f"tile_of_{rows}")
        choice.add_case(ir.Constant(I64, rows), block)
        builder.position_at_end(block)
        body(builder, rows, arguments, done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


# Least rows of a tile when more than MAX_ROWS, or more than twice as many, are cut into tiles of about equal size.
_LEAST_OF_TWO = (MAX_ROWS + 1) // 2
_LEAST_OF_THREE = (2 * MAX_ROWS + 1) // 3

# For attention. The factors come from the cache: while one is gone through, the next is asked for.
float32_scores = _tile_family(_fused_multiply_add, _FLOATS, prefetched=2, prefetched_apart=True)
add_float32_values = _tile_family(_fused_multiply_add, _FLOATS, prefetched=2, adds=True, segmented=True)
bfloat16_scores = _tile_family(_add_bfloat16_products, _FLOATS, prefetched=2, prefetched_apart=True)
add_bfloat16_values = _tile_family(_add_bfloat16_products, _FLOATS, prefetched=2, adds=True, segmented=True)
# For weights, which come from memory and not from a cache. While a panel is gone through once, twice or more often, the
# next one is asked for: two lines for each row of the only tile, one each in the first two of several.
bfloat16_tile_of_one = _tile_family(_add_bfloat16_products, _FLOATS, prefetched=2, adds=True)
bfloat16_tile_of_two = _tile_family(_add_bfloat16_products, _FLOATS, prefetched=1, min_rows=_LEAST_OF_TWO, adds=True)
bfloat16_tile_of_more = _tile_family(_add_bfloat16_products, _FLOATS, min_rows=_LEAST_OF_THREE, adds=True)
int8_tile_of_one = _tile_family(_add_int8_products, _INTS, prefetched=2, adds=True)
int8_tile_of_two = _tile_family(_add_int8_products, _INTS, prefetched=1, min_rows=_LEAST_OF_TWO, adds=True)
int8_tile_of_more = _tile_family(_add_int8_products, _INTS, min_rows=_LEAST_OF_THREE, adds=True)
