"""What the CPU kernels need and numba lacks: memory at an address, bfloat16, and functions that become vector code.

Kernels are plain Python that numba compiles (https://numba.pydata.org). Loops over the elements of a row are left to
its compiler, which makes vector code of them. Matrix products are not: see ``tiles``.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16  # 4-byte elements a vector: one AVX-512 register, two of AVX2, four of NEON
VECTOR_BYTES = 4 * LANES
LOG2_E = 1.4426950408889634  # e^x is 2^(x log2 e), for which there is ``exp2``

# What numba compiles for: a kind of machine, a processor and its features, such as "+avx2,-avx512f". They are this
# machine's, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name others.
TARGET: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
_features = set(TARGET[2].split(","))
HAS_AVX512 = "+avx512f" in _features
HAS_BF16_PRODUCTS = "+avx512bf16" in _features
HAS_AMX = "+amx-bf16" in _features
HAS_INT8_PRODUCTS = "+avx512vnni" in _features


class BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
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
    return builder.atomic_rmw("add", pointer(builder, address, I64), value, "acq_rel")


@intrinsic
def bits_of(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits of a float32, as int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def of_bits(typing_context, value):  # type: ignore[no-untyped-def]
    """The float32 of the bits of an int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], F32)

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
            memory = builder.alloca(ir.ArrayType(F32, size))
        memory.align = VECTOR_BYTES
        return builder.ptrtoint(memory, I64)

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
    return builder.bitcast(builder.shl(builder.zext(bits, I32), ir.Constant(I32, 16)), F32)


@intrinsic
def narrow(typing_context, value):  # type: ignore[no-untyped-def]
    """The bits (uint16) of the bfloat16 nearest to a float32, the even one of two; a NaN stays one."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _narrow(builder, arguments[0])

    return types.uint16(types.float32), generate


def _narrow(builder: Any, value: Any) -> Any:
    bits, sixteen = builder.bitcast(value, I32), ir.Constant(I32, 16)
    is_odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(I32, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), is_odd), sixteen)
    number = builder.select(builder.fcmp_ordered("ord", value, value), rounded, ir.Constant(I32, 0x7FC0))
    return builder.trunc(number, I16)


@intrinsic
def _narrow_natively(typing_context, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(arguments[0], BFloat()), I16)

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
        result = builder.phi(F32)
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
                half, after_half = _widen(builder, builder.load(_element(builder, address, index, I16))), builder.block
            with otherwise:
                whole, after_whole = builder.load(_element(builder, address, index, F32)), builder.block
        value = builder.phi(F32)
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
                builder.store(_narrow(builder, value), _element(builder, address, index, I16))
            with otherwise:
                builder.store(value, _element(builder, address, index, F32))
        return context.get_dummy_value()

    return types.void(Address, types.int64, types.boolean, types.float32), generate


def _element(builder: Any, address: Any, index: Any, pointee: Any) -> Any:
    return builder.gep(pointer(builder, address, pointee), [index])


@intrinsic
def exp2(typing_context, x):  # type: ignore[no-untyped-def]
    """2^x of a float32, to three units in the last place; 0 below -126.5, infinite from 127.5 on."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        clamped = _at_most(builder, _at_least(builder, arguments[0], -127.0), 128.0)
        above = builder.fadd(clamped, ir.Constant(F32, 127.5))  # never negative: the nearest, once it is cut off
        whole = builder.sub(builder.fptosi(above, I32), ir.Constant(I32, 127))
        return _times_power(builder, clamped, whole, _TAYLOR)

    return types.float32(types.float32), generate


@intrinsic
def rough_exp2(typing_context, x):  # type: ignore[no-untyped-def]
    """2^x of a float32 that is at most 0, to one part in 17,000: for what is rounded to bfloat16. 0 below -126."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        clamped = _at_least(builder, arguments[0], -127.0)
        whole = builder.fptosi(builder.fsub(clamped, ir.Constant(F32, 0.5)), I32)
        return _times_power(builder, clamped, whole, _TAYLOR[2:])

    return types.float32(types.float32), generate


_TAYLOR = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)  # 2^x, |x| <= 1/2


def _times_power(builder: Any, x: Any, whole: Any, coefficients: tuple[float, ...]) -> Any:
    """2^x, by a polynomial of what it exceeds the int32 ``whole`` by."""
    part = builder.fsub(x, builder.sitofp(whole, F32))
    y = ir.Constant(F32, coefficients[0])
    for coefficient in coefficients[1:]:
        y = builder.fadd(builder.fmul(y, part), ir.Constant(F32, coefficient))
    exponent = builder.shl(builder.add(whole, ir.Constant(I32, 127)), ir.Constant(I32, 23))
    return builder.fmul(y, builder.bitcast(exponent, F32))


def _at_least(builder: Any, x: Any, bound: float) -> Any:
    """The larger one; a NaN stays one."""
    return builder.select(builder.fcmp_ordered("<", x, ir.Constant(F32, bound)), ir.Constant(F32, bound), x)


def _at_most(builder: Any, x: Any, bound: float) -> Any:
    """The smaller one; a NaN stays one."""
    return builder.select(builder.fcmp_ordered(">", x, ir.Constant(F32, bound)), ir.Constant(F32, bound), x)


@intrinsic
def is_finite(typing_context, value):  # type: ignore[no-untyped-def]
    """Whether a float32 is neither infinite nor a NaN, whatever the compiler may assume of sums."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        exponent = ir.Constant(I32, 0x7F800000)
        return builder.icmp_signed("!=", builder.and_(builder.bitcast(arguments[0], I32), exponent), exponent)

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


def pointer(builder: Any, address: Any, pointee: Any) -> Any:
    """An address (int64) as LLVM's pointer to ``pointee``."""
    return builder.inttoptr(address, ir.PointerType(pointee))


def llvm_function(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """A function of LLVM's own, or an instruction of the processor's, of these types; declared once a module."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@intrinsic
def prefetch(typing_context, address, num_bytes):  # type: ignore[no-untyped-def]
    """Ask for memory that is going to be read."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        lines = builder.udiv(builder.add(arguments[1], ir.Constant(I64, 63)), ir.Constant(I64, 64))
        with cgutils.for_range(builder, lines) as loop:
            prefetch_line(builder, builder.add(arguments[0], builder.mul(loop.index, ir.Constant(I64, 64))))
        return context.get_dummy_value()

    return types.void(Address, types.int64), generate


def prefetch_line(builder: Any, address: Any) -> None:
    """Ask for the line of 64 bytes that an address is in."""
    function = llvm_function(builder, "llvm.prefetch.p0", ir.VoidType(), I8.as_pointer(), I32, I32, I32)
    hints = [ir.Constant(I32, value) for value in (0, 2, 1)]  # to read, into the second cache, data
    builder.call(function, [pointer(builder, address, I8), *hints])
