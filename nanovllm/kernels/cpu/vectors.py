"""What the CPU kernels need and numba lacks: memory at an address, bfloat16, and products in vector registers.

Kernels are plain Python that numba compiles (https://numba.pydata.org). Loops over the elements of a row are left to
its compiler, which makes vector code of them. Matrix products are not: what matters there is that a tile of the result
stays in registers, so :func:`tile` and its kin write LLVM's instructions themselves.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16  # 4-byte elements a vector: one AVX-512 register, two of AVX2, four of NEON
VECTOR_BYTES = 4 * LANES
COLUMNS = 2 * LANES  # of a tile: two vectors, so that each element of the left factor is used twice once it is loaded

# What numba compiles for: a kind of machine, a processor and its features, such as "+avx2,-avx512f". They are this
# machine's, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name others.
TARGET: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
_features = set(TARGET[2].split(","))
HAS_AVX512 = "+avx512f" in _features
HAS_BF16_PRODUCTS = "+avx512bf16" in _features
HAS_AMX = "+amx-bf16" in _features
HAS_INT8_PRODUCTS = "+avx512vnni" in _features

# Most rows of a tile: 12 x 2 accumulators leave eight of AVX-512's 32 registers for the factors. With AVX2 or NEON a
# vector is several of fewer or smaller registers.
MAX_ROWS = 12 if HAS_AVX512 else 2


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)

Address = types.int64


def _pointer_reader(numba_type: Any) -> Any:
    """An intrinsic that takes an address for a pointer to ``numba_type``."""

    @intrinsic
    def as_pointer(typing_context, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(Address), generate

    return as_pointer


as_float32 = _pointer_reader(types.float32)
as_int32 = _pointer_reader(types.int32)
as_int64 = _pointer_reader(types.int64)
as_uint16 = _pointer_reader(types.uint16)
as_uint8 = _pointer_reader(types.uint8)


@intrinsic
def fetch_add(typing_context, address, value):  # type: ignore[no-untyped-def]
    """Add to the int64 at an address in one indivisible step; returns what it was before.

    What a thread wrote before is seen by those that find its addition there: they may be waiting for it.
    """

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return add_atomically(builder, *arguments)

    return types.int64(Address, types.int64), generate


def add_atomically(builder: Any, address: Any, value: Any) -> Any:
    """The instructions of :func:`fetch_add`."""
    return builder.atomic_rmw("add", _at(builder, address, _I64), value, "acq_rel")


@intrinsic
def bits_of(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits of a float32, as int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def of_bits(typing_context, value):  # type: ignore[no-untyped-def]
    """The float32 of the bits of an int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def scratch(typing_context, num_floats):  # type: ignore[no-untyped-def]
    """The address of memory of the calling kernel's own, for a literal number of 4-byte elements."""
    if not isinstance(num_floats, types.IntegerLiteral):
        return None  # numba asks again, with the literal
    size = num_floats.literal_value

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        # numba's own alloca_once writes zeros to it, and LLVM takes that apart into stores of single elements.
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_F32, size))
        memory.align = VECTOR_BYTES
        return builder.ptrtoint(memory, _I64)

    return Address(num_floats), generate


# The smallest and most frequent operations are instructions of LLVM's, not functions: numba would take each place where
# they stand through all of its passes, which was a fifth of the time that compiling took.


@intrinsic
def widen(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 of a bfloat16's bits (uint16)."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _widen(builder, arguments[0])

    return types.float32(types.uint16), generate


def _widen(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), ir.Constant(_I32, 16)), _F32)


@intrinsic
def narrow(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits (uint16) of the bfloat16 nearest to a float32, the even one of two; a NaN stays one."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _narrow(builder, arguments[0])

    return types.uint16(types.float32), generate


def _narrow(builder: Any, value: Any) -> Any:
    bits, sixteen = builder.bitcast(value, _I32), ir.Constant(_I32, 16)
    is_odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), is_odd), sixteen)
    number = builder.select(builder.fcmp_ordered("ord", value, value), rounded, ir.Constant(_I32, 0x7FC0))
    return builder.trunc(number, _I16)


@intrinsic
def _narrow_natively(typing_context, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(arguments[0], _BFloat()), _I16)

    return types.uint16(types.float32), generate


# :func:`narrow` by the processor's own instruction, if it has one, which takes denormal numbers for 0.
quickly_narrow = _narrow_natively if HAS_BF16_PRODUCTS else narrow


@intrinsic
def rounded(typing_context, value, is_half):  # type: ignore[no-untyped-def]
    """A float32 as it is after having been stored in bfloat16 (``is_half``) or float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        value, is_half = arguments
        before = builder.block  # a select of the two would let LLVM reorder the products before and after it
        with builder.if_then(is_half):
            half, after = _widen(builder, _narrow(builder, value)), builder.block
        result = builder.phi(_F32)
        result.add_incoming(value, before)
        result.add_incoming(half, after)
        return result

    return types.float32(types.float32, types.boolean), generate


@intrinsic
def read(typing_context, address, index, is_half):  # type: ignore[no-untyped-def]
    """Element ``index`` of an array of bfloat16 (``is_half``) or float32, as float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, is_half = arguments
        with builder.if_else(is_half) as (then, otherwise):
            with then:
                half, after_half = _widen(builder, builder.load(_element(builder, address, index, _I16))), builder.block
            with otherwise:
                whole, after_whole = builder.load(_element(builder, address, index, _F32)), builder.block
        value = builder.phi(_F32)
        value.add_incoming(half, after_half)
        value.add_incoming(whole, after_whole)
        return value

    return types.float32(Address, types.int64, types.boolean), generate


@intrinsic
def write(typing_context, address, index, is_half, value):  # type: ignore[no-untyped-def]
    """Store a float32 as element ``index`` of an array of bfloat16 (``is_half``) or float32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        address, index, is_half, value = arguments
        with builder.if_else(is_half) as (then, otherwise):
            with then:
                builder.store(_narrow(builder, value), _element(builder, address, index, _I16))
            with otherwise:
                builder.store(value, _element(builder, address, index, _F32))
        return context.get_dummy_value()

    return types.void(Address, types.int64, types.boolean, types.float32), generate


def _element(builder: Any, address: Any, index: Any, pointee: Any) -> Any:
    return builder.gep(_at(builder, address, pointee), [index])


@intrinsic
def exp2(typing_context, x):  # type: ignore[no-untyped-def]
    """2^x of a float32, to three units in the last place; 0 below -126.5, infinite from 127.5 on."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        clamped = _at_most(builder, _at_least(builder, arguments[0], -127.0), 128.0)
        above = builder.fadd(clamped, ir.Constant(_F32, 127.5))  # never negative: the nearest, once it is cut off
        whole = builder.sub(builder.fptosi(above, _I32), ir.Constant(_I32, 127))
        return _times_power(builder, clamped, whole, _TAYLOR)

    return types.float32(types.float32), generate


@intrinsic
def rough_exp2(typing_context, x):  # type: ignore[no-untyped-def]
    """2^x of a float32 that is at most 0, to one part in 17,000: for what is rounded to bfloat16. 0 below -126."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        clamped = _at_least(builder, arguments[0], -127.0)
        whole = builder.fptosi(builder.fsub(clamped, ir.Constant(_F32, 0.5)), _I32)
        return _times_power(builder, clamped, whole, _TAYLOR[2:])

    return types.float32(types.float32), generate


_TAYLOR = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)  # 2^x, |x| <= 1/2


def _times_power(builder: Any, x: Any, whole: Any, coefficients: tuple[float, ...]) -> Any:
    """2^x, by a polynomial of what it exceeds the int32 ``whole`` by."""
    part = builder.fsub(x, builder.sitofp(whole, _F32))
    y = ir.Constant(_F32, coefficients[0])
    for coefficient in coefficients[1:]:
        y = builder.fadd(builder.fmul(y, part), ir.Constant(_F32, coefficient))
    exponent = builder.shl(builder.add(whole, ir.Constant(_I32, 127)), ir.Constant(_I32, 23))
    return builder.fmul(y, builder.bitcast(exponent, _F32))


def _at_least(builder: Any, x: Any, bound: float) -> Any:
    """The larger one; a NaN stays one."""
    return builder.select(builder.fcmp_ordered("<", x, ir.Constant(_F32, bound)), ir.Constant(_F32, bound), x)


def _at_most(builder: Any, x: Any, bound: float) -> Any:
    """The smaller one; a NaN stays one."""
    return builder.select(builder.fcmp_ordered(">", x, ir.Constant(_F32, bound)), ir.Constant(_F32, bound), x)


@intrinsic
def is_finite(typing_context, value):  # type: ignore[no-untyped-def]
    """Whether a float32 is neither infinite nor a NaN, whatever the compiler may assume of sums."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        exponent = ir.Constant(_I32, 0x7F800000)
        return builder.icmp_signed("!=", builder.and_(builder.bitcast(arguments[0], _I32), exponent), exponent)

    return types.boolean(types.float32), generate


@njit(inline="always")
def largest(address: Any, count: Any) -> Any:
    """The largest of ``count`` float32 at an address; NaN if one is NaN.

    Compared as integers, which order floats once the bits of negative ones are turned: LLVM makes no vector code of a
    maximum of floats that may be NaN.
    """
    bits = as_int32(address)
    best, magnitude = types.int32(-0x7FFFFFFF), types.int32(0)
    for i in range(count):
        word = bits[i]
        magnitude = max(magnitude, word & types.int32(0x7FFFFFFF))
        best = max(best, word ^ ((word >> types.int32(31)) & types.int32(0x7FFFFFFF)))
    if magnitude > types.int32(0x7F800000):
        return of_bits(types.int32(0x7FC00000))
    return of_bits(best ^ ((best >> types.int32(31)) & types.int32(0x7FFFFFFF)))


def _at(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(pointee))


def _splat(builder: Any, scalar: Any) -> Any:
    """A vector of copies of an int32."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    lane = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(lane, undefined, ir.Constant(_INTS, [0] * LANES))


def _function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@intrinsic
def prefetch(typing_context, address, num_bytes):  # type: ignore[no-untyped-def]
    """Ask for memory that is going to be read."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lines = builder.udiv(builder.add(arguments[1], ir.Constant(_I64, 63)), ir.Constant(_I64, 64))
        with cgutils.for_range(builder, lines) as loop:
            _prefetch(builder, builder.add(arguments[0], builder.mul(loop.index, ir.Constant(_I64, 64))))
        return context.get_dummy_value()

    return types.void(Address, types.int64), generate


def _prefetch(builder: Any, address: Any) -> None:
    function = _function(builder, "llvm.prefetch.p0", ir.VoidType(), _I8.as_pointer(), _I32, _I32, _I32)
    hints = [ir.Constant(_I32, value) for value in (0, 2, 1)]  # to read, into the second cache, data
    builder.call(function, [_at(builder, address, _I8), *hints])


def _fused_multiply_add(builder: Any, total: Any, left: Any, right: Any) -> Any:
    name = f"llvm.fma.v{LANES}f32"
    factors = builder.bitcast(left, _FLOATS), builder.bitcast(right, _FLOATS)
    return builder.call(_function(builder, name, _FLOATS, _FLOATS, _FLOATS, _FLOATS), [*factors, total])


def _add_bfloat16_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Per 4-byte lane, add the products of two pairs of bfloat16 to a float32."""
    if HAS_BF16_PRODUCTS:
        function = _function(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, _FLOATS, _BFLOATS, _BFLOATS)
        return builder.call(function, [total, builder.bitcast(left, _BFLOATS), builder.bitcast(right, _BFLOATS)])
    shift, mask = ir.Constant(_INTS, [16] * LANES), ir.Constant(_INTS, [-65536] * LANES)
    total = _fused_multiply_add(builder, total, builder.shl(left, shift), builder.shl(right, shift))
    return _fused_multiply_add(builder, total, builder.and_(left, mask), builder.and_(right, mask))


def _add_int8_products(builder: Any, total: Any, left: Any, right: Any) -> Any:
    """Per 4-byte lane, add the products of four uint8 (left) with four int8 (right) to an int32."""
    if HAS_INT8_PRODUCTS:
        function = _function(builder, "llvm.x86.avx512.vpdpbusd.512", _INTS, _INTS, _INTS, _INTS)
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
        line_bytes = ir.Constant(_I64, 64)
        between = apart if prefetched_apart else line_bytes
        ahead_row = line_bytes if prefetched_apart else ir.Constant(_I64, 64 * lines_ahead)
        unroll = 4 if rows == 1 else 2 if rows == 2 else 1  # more loads under way
        entry = builder.block
        targets, row = [], c
        for r in range(rows):
            row = builder.add(row, c_row) if r else row
            targets += [row, builder.add(row, ir.Constant(_I64, VECTOR_BYTES))]
        first = [
            builder.load(_at(builder, target, accumulator), align=4) if adds else ir.Constant(accumulator, None)
            for target in targets
        ]
        lines = [a]
        for _ in range(1, rows):
            lines.append(builder.add(lines[-1], a_row))

        def step(totals: list[Any], index: Any, b_now: Any, ahead_now: Any) -> list[Any]:
            right = [
                builder.load(_at(builder, place, _INTS), align=4) for place in (b_now, builder.add(b_now, b_column))
            ]
            for line in range(lines_ahead):
                _prefetch(builder, builder.add(ahead_now, builder.mul(between, ir.Constant(_I64, line))))
            offset = builder.mul(index, ir.Constant(_I64, 4))
            result = []
            for r in range(rows):
                scalar = builder.load(_at(builder, builder.add(lines[r], offset), _I32), align=2)
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
            following = builder.add(index, ir.Constant(_I64, steps))
            builder.cbranch(builder.icmp_signed("<=", following, stop), inside, after)
            builder.position_at_end(inside)
            sums, b_next, ahead_next = list(states[3:]), b_phi, ahead_phi
            for number in range(steps):
                sums = step(sums, builder.add(index, ir.Constant(_I64, number)), b_next, ahead_next)
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
            totals = go_through(first, ir.Constant(_I64, 0), depth, b, ahead)
        for total, target in zip(totals, targets, strict=True):
            builder.store(total, _at(builder, target, accumulator), align=4)
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
    for initial in (ir.Constant(_I64, 0), *totals):
        phi = builder.phi(initial.type)
        phi.add_incoming(initial, before)
        states.append(phi)
    number = states[0]
    builder.cbranch(builder.icmp_signed("<", number, count), inside, after)
    builder.position_at_end(inside)
    entry = builder.add(table, builder.mul(number, ir.Constant(_I64, 16)))
    b = builder.add(builder.load(_at(builder, entry, _I64)), offset)
    lines = builder.load(_at(builder, builder.add(entry, ir.Constant(_I64, 8)), _I64))
    lines = builder.add(lines, builder.mul(offset, depth))
    start = builder.mul(number, depth)
    sums = go_through(states[1:], start, builder.add(start, depth), b, lines)
    for phi, value in zip(states, (builder.add(number, ir.Constant(_I64, 1)), *sums), strict=True):
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
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 11), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    number, *arguments = function.args
    done = builder.append_basic_block("done")
    choice = builder.switch(number, done)
    for rows in range(min_rows, MAX_ROWS + 1):
        block = builder.append_basic_block(f"tile_of_{rows}")
        choice.add_case(ir.Constant(_I64, rows), block)
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
