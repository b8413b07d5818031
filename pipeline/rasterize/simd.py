"""Explicit 16-lane SIMD for numba: `f32x16` and its mask, used inside jitted code like ordinary numbers.

LLVM turns the vectors into one AVX-512, two AVX or four NEON/SSE registers, whichever the machine has, so one source is
fast everywhere without a C++ compiler. Arithmetic may be contracted to fused multiply-add and is IEEE otherwise.
Loads and stores take flat indices into contiguous arrays and are unchecked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

LANES = 16

_FLOAT, _INT, _BOOL = ir.FloatType(), ir.IntType(32), ir.IntType(1)
_FLOATS, _INTS, _BOOLS = (ir.VectorType(t, LANES) for t in (_FLOAT, _INT, _BOOL))
_CONTRACT = ("contract",)


class Float32x16(types.Type):
    """Numba type of 16 float32 lanes. Scalars mix with it and fill every lane."""

    def __init__(self) -> None:
        super().__init__("f32x16")

    def can_convert_from(self, typingctx: Any, other: Any) -> Conversion | None:
        return Conversion.safe if isinstance(other, types.Float | types.Integer) else None


class Mask16(types.Type):
    """Numba type of 16 truth values, the result of comparing vectors."""

    def __init__(self) -> None:
        super().__init__("mask16")


f32x16 = Float32x16()
mask16 = Mask16()


@register_model(Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


@register_model(Mask16)
class _Mask16Model(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _BOOLS)


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [value] * LANES)


@lower_cast(types.Float, Float32x16)
@lower_cast(types.Integer, Float32x16)
def _cast_scalar(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    return _splat(builder, context.cast(builder, value, fromty, types.float32))


def _is_vector_call(args: tuple[Any, ...]) -> bool:
    return f32x16 in args and all(a is f32x16 or isinstance(a, types.Float | types.Integer) for a in args)


def _register_binary(op: Callable[..., Any], result: Any, emit: Callable[..., Any]) -> None:
    @infer_global(op)
    class _Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(result, f32x16, f32x16) if len(args) == 2 and _is_vector_call(args) else None

    lower_builtin(op, f32x16, f32x16)(lambda context, builder, sig, args: emit(builder, *args))


_register_binary(operator.add, f32x16, lambda b, x, y: b.fadd(x, y, flags=_CONTRACT))
_register_binary(operator.sub, f32x16, lambda b, x, y: b.fsub(x, y, flags=_CONTRACT))
_register_binary(operator.mul, f32x16, lambda b, x, y: b.fmul(x, y, flags=_CONTRACT))
_register_binary(operator.truediv, f32x16, lambda b, x, y: b.fdiv(x, y, flags=_CONTRACT))
_register_binary(operator.gt, mask16, lambda b, x, y: b.fcmp_ordered(">", x, y))
_register_binary(operator.ge, mask16, lambda b, x, y: b.fcmp_ordered(">=", x, y))
_register_binary(operator.lt, mask16, lambda b, x, y: b.fcmp_ordered("<", x, y))
_register_binary(operator.le, mask16, lambda b, x, y: b.fcmp_ordered("<=", x, y))


@infer_global(operator.and_)
class _AndTemplate(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(mask16, mask16, mask16) if args == (mask16, mask16) else None


@lower_builtin(operator.and_, mask16, mask16)
def _lower_and(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.and_(*args)


@infer_global(operator.neg)
class _NegTemplate(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        return signature(f32x16, f32x16) if args == (f32x16,) else None


@lower_builtin(operator.neg, f32x16)
def _lower_neg(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return builder.fneg(args[0])


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index], inbounds=True)


@intrinsic
def at(typingctx: Any, array: Any, index: Any) -> Any:
    """array.flat[index] without the check for a negative index."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, sig.args[0], args[0], args[1]))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array.flat[index] = value without the check for a negative index."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array.flat[index], which need not be inside the array."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [pointer, *(ir.Constant(_INT, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """The 16 float32 of the array from a flat index on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.load(builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)

    return f32x16(array, types.intp), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write 16 float32 to the array from a flat index on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


def _row_pointers(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    """Pointers to array[min(first + lane, count - 1), column] of an array of rows of the given stride."""
    array, stride, column, first, count = args[:5]
    last = builder.sub(count, ir.Constant(count.type, 1))
    for lane in range(LANES):
        row = builder.add(first, ir.Constant(first.type, lane))
        row = builder.select(builder.icmp_signed("<", row, last), row, last)
        yield lane, _pointer(context, builder, sig.args[0], array, builder.add(builder.mul(row, stride), column))


@intrinsic
def gather(typingctx: Any, array: Any, stride: Any, column: Any, first: Any, count: Any) -> Any:
    """Lane l is array[min(first + l, count - 1), column] of an array of float32 rows of the given stride."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        result = ir.Constant(_FLOATS, ir.Undefined)
        for lane, pointer in _row_pointers(context, builder, sig, args):
            result = builder.insert_element(result, builder.load(pointer), ir.Constant(_INT, lane))
        return result

    return f32x16(array, types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def scatter(typingctx: Any, array: Any, stride: Any, column: Any, first: Any, count: Any, value: Any) -> Any:
    """Write lane l to array[min(first + l, count - 1), column]; surplus lanes must hold what the last row gets."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for lane, pointer in _row_pointers(context, builder, sig, args):
            builder.store(builder.extract_element(args[5], ir.Constant(_INT, lane)), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, types.intp, f32x16), codegen


@intrinsic
def select(typingctx: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Per lane, `yes` where the mask is true, else `no`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return f32x16(mask16, f32x16, f32x16), codegen


@intrinsic
def minimum(typingctx: Any, x: Any, y: Any) -> Any:
    """Per lane, x if x < y, else y."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def maximum(typingctx: Any, x: Any, y: Any) -> Any:
    """Per lane, x if x > y, else y."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return f32x16(f32x16, f32x16), codegen


@intrinsic
def bits(typingctx: Any, mask: Any) -> Any:
    """The mask as an integer, lane l in bit l."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(mask16), codegen


@intrinsic
def lowest_bit(typingctx: Any, value: Any) -> Any:
    """Index of the lowest set bit of a non-zero integer."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(_BOOL, 1))

    return types.int64(types.int64), codegen


@intrinsic
def append_set(typingctx: Any, array: Any, count: Any, set_bits: Any, base: Any) -> Any:
    """Append base + l to an int32 array for every set bit l of 16, ascending; the new count.

    Always writes 16 elements from array[count] on, and takes the same time whatever is set.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        array, count, set_bits, base = args
        first = builder.insert_element(ir.Constant(_INTS, ir.Undefined), base, ir.Constant(_INT, 0))
        bases = builder.shuffle_vector(first, ir.Constant(_INTS, ir.Undefined), ir.Constant(_INTS, [0] * LANES))
        values = builder.add(bases, ir.Constant(_INTS, list(range(LANES))))
        mask = builder.bitcast(builder.trunc(set_bits, ir.IntType(LANES)), _BOOLS)
        kind = ir.FunctionType(_INTS, [_INTS, _BOOLS, _INTS])
        name = f"llvm.experimental.vector.compress.v{LANES}i32"
        compress = cgutils.get_or_insert_function(builder.module, kind, name)
        packed = builder.call(compress, [values, mask, ir.Constant(_INTS, ir.Undefined)])
        pointer = _pointer(context, builder, sig.args[0], array, count)
        builder.store(packed, builder.bitcast(pointer, _INTS.as_pointer()), align=4)
        return builder.add(count, builder.ctpop(set_bits))

    return types.int64(array, types.int64, types.int64, types.int32), codegen


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), args)


@intrinsic
def sqrt(typingctx: Any, x: Any) -> Any:
    """Square root of each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.sqrt", args[0])

    return f32x16(f32x16), codegen


@intrinsic
def absolute(typingctx: Any, x: Any) -> Any:
    """Magnitude of each lane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.fabs", args[0])

    return f32x16(f32x16), codegen


@intrinsic
def ceil(typingctx: Any, x: Any) -> Any:
    """Each lane rounded up."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.ceil", args[0])

    return f32x16(f32x16), codegen


@intrinsic
def lane_index(typingctx: Any) -> Any:
    """The vector 0, 1, ..., 15."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(_FLOATS, [float(lane) for lane in range(LANES)])

    return f32x16(), codegen


# 2^f over f in [-0.5, 0.5], least greatest relative error (Remez), highest power first.
_EXP2 = (
    0.0013276472454890609,
    0.009675540961325169,
    0.05550713092088699,
    0.24022120237350464,
    0.6931469440460205,
    1.0000001192092896,
)


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2 to the power of each lane, within 3e-7 relative for lanes in [-126, 126]; any value outside."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = _call(builder, "llvm.rint", args[0])
        fraction = builder.fsub(args[0], whole)
        power = _constant(_EXP2[0])
        for coefficient in _EXP2[1:]:
            power = builder.fadd(
                builder.fmul(power, fraction, flags=_CONTRACT), _constant(coefficient), flags=_CONTRACT
            )
        # Adding to the exponent field of the float multiplies by the power of two.
        exponent = builder.shl(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [23] * LANES))
        return builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)

    return f32x16(f32x16), codegen


@intrinsic
def log2(typingctx: Any, x: Any) -> Any:
    """Logarithm to base 2 of each lane, within 2e-7 for lanes in [1e-3, 1]; finite for any finite lane from 0 on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def integer(value: int) -> Any:
            return ir.Constant(_INTS, [value] * LANES)

        def poly(a: Any, b: Any, c: Any) -> Any:
            return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

        # The mantissa is taken to [sqrt(1/2), sqrt(2)): 0x3F3504F3 is sqrt(1/2).
        bits = builder.sub(builder.bitcast(args[0], _INTS), integer(0x3F3504F3))
        exponent = builder.sitofp(builder.ashr(bits, integer(23)), _FLOATS)
        mantissa = builder.add(builder.and_(bits, integer(0x007FFFFF)), integer(0x3F3504F3))
        m, one = builder.bitcast(mantissa, _FLOATS), _constant(1.0)
        # ln m = 2 atanh((m - 1) / (m + 1)), a series in the square of a number below 0.172.
        s = builder.fdiv(builder.fsub(m, one), builder.fadd(m, one))
        square = builder.fmul(s, s)
        series = _constant(2 / math.log(2) / 9)
        for k in (7, 5, 3):
            series = poly(series, square, _constant(2 / math.log(2) / k))
        tail = builder.fmul(builder.fmul(series, square), s)
        return builder.fadd(exponent, poly(s, _constant(2 / math.log(2)), tail))

    return f32x16(f32x16), codegen


@intrinsic
def sums(typingctx: Any, vectors: Any) -> Any:
    """Lane i is the sum over the lanes of the i-th of up to 16 vectors; the rest is arbitrary.

    A tree that merges two vectors with every addition: 33 instructions for nine vectors instead of 72. Its first two
    steps stay within quarters of the vector, where shuffles cost least.
    """

    def merge(builder: Any, x: Any, y: Any, lanes: list[int], others: list[int]) -> Any:
        """Two selections from the lanes of x and y, added; None stands for a vector that nobody asked for."""
        if x is None:
            return None
        y = ir.Constant(_FLOATS, ir.Undefined) if y is None else y
        return builder.fadd(_shuffle(builder, x, y, lanes), _shuffle(builder, x, y, others))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows: list[Any] = [builder.extract_value(args[0], i) for i in range(len(sig.args[0]))]
        rows += [None] * (LANES - len(rows))
        quarters = range(0, LANES, LANES // 4)
        steps = (
            [q + k for q in quarters for k in (0, LANES, 1, LANES + 1)],
            [q + k for q in quarters for k in (0, 1, LANES, LANES + 1)],
            [x + k for x in (0, LANES) for k in range(8)],
            [x + q + k for x in (0, LANES) for q in (0, 8) for k in range(4)],
        )
        for lanes, further in zip(steps, (2, 2, 8, 4), strict=True):
            others = [lane + further for lane in lanes]
            rows = [merge(builder, rows[i], rows[i + 1], lanes, others) for i in range(0, len(rows), 2)]
        return rows[0]

    return f32x16(vectors), codegen


def _shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _block_row(context: Any, builder: Any, sig: Any, args: Any, y: int, floats: int) -> Any:
    """Pointer to row y of a block of 4 x 4 pixels, as a vector of `floats`."""
    array, first, stride = args[:3]
    index = builder.add(first, builder.mul(stride, ir.Constant(stride.type, y)))
    pointer = _pointer(context, builder, sig.args[0], array, index)
    return builder.bitcast(pointer, ir.VectorType(_FLOAT, floats).as_pointer())


@intrinsic
def load_block(typingctx: Any, array: Any, first: Any, stride: Any) -> Any:
    """Lane 4 y + x is array[first + stride y + x]: the block of 4 x 4 pixels of a plane."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = [builder.load(_block_row(context, builder, sig, args, y, 4), align=4) for y in range(4)]
        low, high = (_shuffle(builder, rows[y], rows[y + 1], list(range(8))) for y in (0, 2))
        return _shuffle(builder, low, high, list(range(16)))

    return f32x16(array, types.intp, types.intp), codegen


@intrinsic
def store_block(typingctx: Any, array: Any, first: Any, stride: Any, value: Any) -> Any:
    """The inverse of `load_block`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for y in range(4):
            row = _shuffle(builder, args[3], args[3], list(range(4 * y, 4 * y + 4)))
            builder.store(row, _block_row(context, builder, sig, args, y, 4), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, f32x16), codegen


@intrinsic
def load_rgb_block(typingctx: Any, array: Any, first: Any, stride: Any) -> Any:
    """The three channels of a block of 4 x 4 interleaved pixels, each as `load_block` would give it."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = [builder.load(_block_row(context, builder, sig, args, y, 12), align=4) for y in range(4)]
        channels = []
        for c in range(3):
            lanes = [12 * y + 3 * x + c for y in range(2) for x in range(4)]
            low, high = (_shuffle(builder, rows[y], rows[y + 1], lanes) for y in (0, 2))
            channels.append(_shuffle(builder, low, high, list(range(16))))
        return context.make_tuple(builder, sig.return_type, channels)

    return types.UniTuple(f32x16, 3)(array, types.intp, types.intp), codegen


@intrinsic
def store_rgb_block(typingctx: Any, array: Any, first: Any, stride: Any, red: Any, green: Any, blue: Any) -> Any:
    """The inverse of `load_rgb_block`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        red, green, blue = args[3:]
        for y in range(4):
            red_green = _shuffle(builder, red, green, [source + 4 * y + x for x in range(4) for source in (0, 16)])
            blues = _shuffle(builder, blue, blue, [4 * y + x % 4 for x in range(8)])
            row = _shuffle(builder, red_green, blues, [lane for x in range(4) for lane in (2 * x, 2 * x + 1, 8 + x)])
            builder.store(row, _block_row(context, builder, sig, args, y, 12), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, f32x16, f32x16, f32x16), codegen


@intrinsic
def atomic_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] += value as one indivisible step; the value before it. For int64 arrays."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] as other threads last published it. For int64 arrays."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, sig.args[0], args[0], args[1]), "seq_cst", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this thread spins, where it has a word for that."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if "86" in builder.module.triple:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen
