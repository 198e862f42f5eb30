"""Instructions that touch registers only, each decoded once into a closure over register rows.

A warp's registers are rows of 32 lanes; `Decoder.source` and `destination` give the index of a view of such a row in
`warp.rows`, with the type of the instruction. Predicates are integers of 32 bits in `warp.preds`. PTX ISA 9.7.1–9.7.9.
Subnormals are not flushed; the approximate functions are those of numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MachineError, ProtocolError, PtxError, Trap
from .parse import (
    PARAM_BASE,
    WIDTHS,
    Immediate,
    Label,
    Module,
    Not,
    Pair,
    Param,
    Register,
    Shared,
    Sink,
    Special,
    Statement,
    Vector,
)

Array = npt.NDArray[Any]
Run = Callable[[Any, int], Any]
FULL = 0xFFFFFFFF
NEXT, JUMPED, BLOCKED, YIELD = None, 1, 2, 3

DTYPES: dict[str, Any] = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
LANE = np.arange(32)


class LaneMasks(dict[int, Array]):
    """mask of 32 bits → bool per lane."""

    def __missing__(self, mask: int) -> Array:
        if len(self) > 100_000:
            self.clear()
        value = self[mask] = ((mask >> LANE) & 1).astype(bool)
        return value


class LaneLists(dict[int, Array]):
    """mask of 32 bits → the lanes in it."""

    def __missing__(self, mask: int) -> Array:
        if len(self) > 100_000:
            self.clear()
        value = self[mask] = np.flatnonzero(LANES[mask])
        return value


LANES, LISTS = LaneMasks(), LaneLists()
_bits: dict[bytes, int] = {}


def bits(lanes: Array) -> int:
    """bool per lane → mask."""
    key = lanes.tobytes()
    found = _bits.get(key)
    if found is None:
        if len(_bits) > 100_000:
            _bits.clear()
        found = _bits[key] = int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")
    return found


def only(mask: int) -> int:
    """The lowest lane of a mask."""
    return (mask & -mask).bit_length() - 1


# ---------------------------------------------------------------------- number formats
def from_bf16(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Round to nearest even; NaN is 0x7fff."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), r).astype(np.uint16)


def _fp8_table(exponent_bits: int, mantissa_bits: int, bias: int, ieee: bool) -> Array:
    code = np.arange(256)
    e = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    m = code & ((1 << mantissa_bits) - 1)
    unit = 2.0**-mantissa_bits
    value = np.where(e == 0, m * unit * 2.0 ** (1 - bias), (1 + m * unit) * 2.0 ** (e - bias))
    top = e == (1 << exponent_bits) - 1
    if ieee:
        value = np.where(top, np.where(m == 0, np.inf, np.nan), value)
    else:
        value = np.where(top & (m == (1 << mantissa_bits) - 1), np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


FP8 = {"e4m3": _fp8_table(4, 3, 7, False), "e5m2": _fp8_table(5, 2, 15, True)}


def to_fp8(x: Array, kind: str) -> Array:
    """cvt.rn.satfinite: nearest, ties to the even code, saturated to the largest finite value."""
    table = FP8[kind]
    positive = table[:128]
    finite = positive[np.isfinite(positive)].astype(np.float64)
    a = np.minimum(np.abs(x.astype(np.float64)), finite[-1])
    high = np.clip(np.searchsorted(finite, a), 0, len(finite) - 1)
    low = np.maximum(high - 1, 0)
    up, down = finite[high] - a, a - finite[low]
    code = np.where((up < down) | ((up == down) & (high % 2 == 0)), high, low)
    code = np.where(np.isnan(x), 127, code) | np.where(np.signbit(x), 128, 0)
    return code.astype(np.uint8)


def unpack(kind: str, x: Array) -> Array:
    """Values of 16-bit formats in float32, [32] or [64]."""
    if kind == "f16":
        return x.astype(np.float32)
    if kind == "bf16":
        return from_bf16(x)
    if kind == "f16x2":
        return np.ascontiguousarray(x).view(np.float16).astype(np.float32)
    return from_bf16(np.ascontiguousarray(x).view(np.uint16))


def pack(kind: str, x: Array) -> Array:
    if kind == "f16":
        return x.astype(np.float16)
    if kind == "bf16":
        return to_bf16(x)
    if kind == "f16x2":
        return x.astype(np.float16).view(np.uint32)
    return to_bf16(x).view(np.uint32)


# ---------------------------------------------------------------------- the decoder
class Builder:
    """The views that the instructions of a program use; a warp makes its rows from them."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.views: list[tuple[str, Any, Any]] = []
        self.index: dict[Any, int] = {}
        self.unit_shift = 2  # of the shared shadow: 2 = words; narrower accesses make it finer
        self.global_shift = 2  # of the global one
        self.strong = False  # atomics or strong accesses to global memory, which may order CTAs

    def view(self, kind: str, key: Any, dtype: Any, value: Any = None) -> int:
        """kind: "register" (key: Register), "constant" (value: an array), "special" (key: its name)."""
        full = (kind, key, np.dtype(dtype).str)
        if full not in self.index:
            self.index[full] = len(self.views)
            self.views.append((kind, value if kind == "constant" else key, np.dtype(dtype)))
        return self.index[full]


class Decoder:
    """One statement under decoding: every modifier and operand must be taken, else it is a PtxError."""

    def __init__(self, builder: Builder, statement: Statement) -> None:
        self.builder, self.statement = builder, statement
        self.base, *self.mods = statement.op.split(".")
        self.operands = statement.operands
        self.sources: list[int] = []
        self.targets: list[int] = []

    def error(self, message: str) -> PtxError:
        return PtxError(message, self.statement.line, self.statement.text)

    # modifiers
    def take(self, *names: str) -> str | None:
        """Removes and returns the first of these modifiers that is there."""
        for name in names:
            if name in self.mods:
                self.mods.remove(name)
                return name
        return None

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise self.error(f"{self.base} without .{' or .'.join(names)} is not modelled")
        return found

    def drop(self, *names: str) -> None:
        for name in names:
            self.take(name)

    def type(self, *allowed: str) -> str:
        """The last modifier is the type."""
        if not self.mods or self.mods[-1] not in (allowed or WIDTHS):
            raise self.error(f"type of {self.base} is not modelled")
        return self.mods.pop()

    def finish(self, *counts: int) -> None:
        if self.mods:
            raise self.error(f"{self.base}: modifier .{self.mods[0]} is not modelled")
        if len(self.operands) not in counts:
            raise self.error(f"{self.base} has {len(self.operands)} operands")

    # operands
    def constant(self, value: Any, dtype: Any) -> int:
        array = np.full(32, value, dtype)
        array.flags.writeable = False
        return self.builder.view("constant", array.tobytes(), dtype, array)

    def source(self, operand: Any, type_: str, wide: bool = False) -> int:
        """The view of a source; `wide`: the register may be longer than the type (ld, st, cvt; 9.4.1)."""
        dtype, width = DTYPES[type_], WIDTHS[type_]
        if isinstance(operand, Register):
            if operand.width != width and not (wide and operand.width > width):
                raise self.error(f"{operand.name} has {operand.width} bits, .{type_} has {width}")
            self.sources.append(operand.index)
            return self.builder.view("register", operand, dtype)
        if isinstance(operand, Immediate):
            return self.constant(self.number(operand, type_), dtype)
        if isinstance(operand, Shared):
            if type_ not in ("u32", "b32", "u64", "b64", "s32", "s64"):
                raise self.error("an address is no operand of this type")
            return self.constant(operand.address, dtype)
        if isinstance(operand, Param):
            if width != 64:
                raise self.error("the address of a parameter has 64 bits")
            return self.constant(PARAM_BASE + operand.offset, dtype)
        if isinstance(operand, Special):
            if self.base != "mov":
                raise self.error("special registers are read by mov alone")
            return self.special(operand, type_)
        raise self.error(f"operand of {self.base} not understood")

    def number(self, operand: Immediate, type_: str) -> Any:
        width = WIDTHS[type_]
        if type_ in ("f32", "f64", "f16"):
            if operand.kind == "int":
                raise self.error("an integer is no floating-point operand")
            code, size = ("<f", 4) if operand.kind == "f32" else ("<d", 8)
            return struct.unpack(code, operand.value.to_bytes(size, "little"))[0]
        value = operand.value
        if operand.kind == "f64" and width == 32:
            raise self.error("0d… for a type of 32 bits")
        if not -(1 << (width - 1)) <= value < 1 << width:
            raise self.error(f"{value} does not fit .{type_}")
        value &= (1 << width) - 1
        if type_[0] == "s" and value >> (width - 1):
            value -= 1 << width
        return value

    def special(self, operand: Special, type_: str) -> int:
        if operand.name not in SPECIALS or WIDTHS[type_] != 32:
            raise self.error(f"{operand.name} is not declared, or no special register that is modelled here")
        return self.builder.view("special", operand.name, DTYPES[type_])

    def destination(self, operand: Any, type_: str, wide: bool = False) -> int:
        if not isinstance(operand, Register):
            raise self.error(f"{self.base}: the destination is no register")
        width = WIDTHS[type_]
        if operand.width != width and not (wide and operand.width > width):
            raise self.error(f"{operand.name} has {operand.width} bits, .{type_} has {width}")
        self.targets.append(operand.index)
        if operand.width > width:
            kind = "s" if type_[0] == "s" else "u"
            return self.builder.view("register", operand, DTYPES[f"{kind}{operand.width}"])
        return self.builder.view("register", operand, DTYPES[type_])

    def predicate(self, operand: Any) -> tuple[int, int]:
        """(register, FULL if negated else 0) of a source."""
        negated = isinstance(operand, Not)
        register = operand.register if isinstance(operand, Not) else operand
        if not isinstance(register, Register) or register.width != 1:
            raise self.error("not a predicate")
        self.sources.append(register.index)
        return register.index, FULL if negated else 0

    def predicate_target(self, operand: Any) -> int:
        if isinstance(operand, Sink):
            return -1
        if not isinstance(operand, Register) or operand.width != 1:
            raise self.error("the destination is no predicate")
        self.targets.append(operand.index)
        return operand.index

    def integer(self, operand: Any) -> int:
        if not isinstance(operand, Immediate) or operand.kind != "int":
            raise self.error("this operand must be a number")
        return operand.value

    def apply(self, function: Callable[..., Array], types: list[str], result: str, wide: bool = False) -> Run:
        """operand 0 = function(operands 1, …) lane by lane."""
        args = [self.source(o, t, wide) for o, t in zip(self.operands[1:], types, strict=True)]
        d = self.destination(self.operands[0], result, wide)
        return compute(function, d, args)


def compute(function: Callable[..., Array], d: int, args: list[int]) -> Run:
    if len(args) == 1:
        (a,) = args

        def unary(w: Any, m: int) -> None:
            rows = w.rows
            if m == FULL:
                rows[d][:] = function(rows[a])
            else:
                np.copyto(rows[d], function(rows[a]), "unsafe", LANES[m])

        return unary
    if len(args) == 2:
        a, b = args

        def binary(w: Any, m: int) -> None:
            rows = w.rows
            if m == FULL:
                rows[d][:] = function(rows[a], rows[b])
            else:
                np.copyto(rows[d], function(rows[a], rows[b]), "unsafe", LANES[m])

        return binary

    def several(w: Any, m: int) -> None:
        rows = w.rows
        np.copyto(rows[d], function(*[rows[a] for a in args]), "unsafe", LANES[m])

    return several


def set_pred(w: Any, index: int, value: int, m: int) -> None:
    if index >= 0:
        w.preds[index] = (w.preds[index] & ~m) | (value & m)


SPECIALS = {
    *(f"%{n}.{a}" for n in ("tid", "ntid", "ctaid", "nctaid", "clusterid", "nclusterid") for a in "xyz"),
    *(f"%{n}.{a}" for n in ("cluster_ctaid", "cluster_nctaid") for a in "xyz"),
    "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%cluster_ctarank", "%cluster_nctarank", "%lanemask_eq",
    "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size",
}  # fmt: skip
CLOCKS = {"%clock64": 64, "%clock": 32, "%globaltimer": 64}
DECODERS: dict[str, Callable[[Decoder], Run]] = {}


def decodes(*names: str) -> Callable[[Callable[[Decoder], Run]], Callable[[Decoder], Run]]:
    def add(function: Callable[[Decoder], Run]) -> Callable[[Decoder], Run]:
        for name in names:
            DECODERS[name] = function
        return function

    return add


# ---------------------------------------------------------------------- arithmetic
def fma32(a: Array, b: Array, c: Array) -> Array:
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


HALVES = ("f16", "bf16", "f16x2", "bf16x2")
FLOATS = ("f32", "f64")


def half(kind: str, function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *a: pack(kind, function(*[unpack(kind, x) for x in a]))


@decodes("add", "sub")
def _add(d: Decoder) -> Run:
    t = d.type(*INTEGERS, *FLOATS, *HALVES)
    function: Any = {"add": np.add, "sub": np.subtract}[d.base]
    if t in FLOATS or t in HALVES:
        d.drop("rn", "ftz")
    d.finish(3)
    return d.apply(half(t, function) if t in HALVES else function, [t, t], t)


def wide_type(t: str) -> str:
    return f"{t[0]}{2 * WIDTHS[t]}"


def high(t: str) -> Callable[[Array, Array], Array]:
    if WIDTHS[t] == 64:
        return lambda a, b: np.array(
            [(int(x) * int(y)) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)], object
        ).astype(a.dtype)
    dtype, shift = DTYPES[wide_type(t)], WIDTHS[t]
    return lambda a, b: (np.multiply(a, b, dtype=dtype) >> dtype(shift)).astype(a.dtype)


@decodes("mul", "mad", "fma")
def _mul(d: Decoder) -> Run:
    t = d.type(*INTEGERS, *FLOATS, *HALVES)
    third = d.base != "mul"
    n = 4 if third else 3
    if t in INTEGERS:
        if d.base == "fma":
            raise d.error("fma of integers")
        how = d.need("lo", "hi", "wide")
        d.finish(n)
        function: Any
        result = t
        if how == "lo":
            function = np.multiply
        elif how == "hi":
            function = high(t)
        else:
            if WIDTHS[t] == 64:
                raise d.error("a product of 128 bits")
            result = wide_type(t)
            dtype = DTYPES[result]

            def function(a: Array, b: Array) -> Array:
                return np.multiply(a, b, dtype=dtype)

        if not third:
            return d.apply(function, [t, t], result)
        return d.apply(lambda a, b, c: function(a, b) + c, [t, t, result], result)
    d.drop("rn", "ftz")
    relu = bool(third and d.take("relu"))
    d.finish(n)
    if not third:
        return d.apply(half(t, np.multiply) if t in HALVES else np.multiply, [t, t], t)
    if t == "f32":
        return d.apply(fma32, [t, t, t], t)
    if t == "f64":
        raise d.error("fma.f64 is not modelled")

    def fused(a: Array, b: Array, c: Array) -> Array:
        x = np.multiply(a, b, dtype=np.float64) + c
        return (np.fmax(x, 0) if relu else x).astype(np.float32)

    return d.apply(half(t, fused), [t, t, t], t)


@decodes("div", "rem")
def _div(d: Decoder) -> Run:
    t = d.type(*INTEGERS, "f32", "f64")
    if t in FLOATS:
        if d.base == "rem":
            raise d.error("rem of floating point")
        d.need("rn", "approx", "full")
        d.drop("ftz")
        d.finish(3)
        return d.apply(np.divide, [t, t], t)
    d.finish(3)
    a, b = d.source(d.operands[1], t), d.source(d.operands[2], t)
    c = d.destination(d.operands[0], t)
    rem = d.base == "rem"

    def run(w: Any, m: int) -> None:
        x, y = w.rows[a], w.rows[b]
        lanes = LANES[m]
        zero = lanes & (y == 0)
        if zero.any():
            raise MachineError("division by zero", int(np.flatnonzero(zero)[0]))
        y = np.where(lanes, y, 1).astype(y.dtype)
        if t[0] == "u":
            result = x % y if rem else x // y
        elif rem:
            result = np.fmod(x, y)
        else:
            result = (x - np.fmod(x, y)) // y
        np.copyto(w.rows[c], result, "unsafe", lanes)

    return run


@decodes("min", "max")
def _min(d: Decoder) -> Run:
    t = d.type(*INTEGERS, *FLOATS, *HALVES)
    small = d.base == "min"
    function: Any = np.minimum if small else np.maximum
    if t in FLOATS or t in HALVES:
        d.drop("ftz")
        if not d.take("NaN"):
            function = np.fmin if small else np.fmax
    d.finish(3)
    return d.apply(half(t, function) if t in HALVES else function, [t, t], t)


@decodes("neg", "abs")
def _neg(d: Decoder) -> Run:
    t = d.type("s16", "s32", "s64", *FLOATS, *HALVES)
    if t in FLOATS or t in HALVES:
        d.drop("ftz")
    d.finish(2)
    function: Any = np.negative if d.base == "neg" else np.abs
    return d.apply(half(t, function) if t in HALVES else function, [t], t)


APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: np.float32(1) / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
}


@decodes(*APPROXIMATE)
def _approximate(d: Decoder) -> Run:
    t = d.type("f32", *(HALVES if d.base in ("ex2", "tanh") else ()))
    d.need("approx", "rn") if d.base in ("rcp", "sqrt") else d.need("approx")
    d.drop("ftz")
    d.finish(2)
    function = APPROXIMATE[d.base]
    return d.apply(half(t, function) if t in HALVES else function, [t], t)


# ---------------------------------------------------------------------- bits
LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@decodes("and", "or", "xor", "not", "cnot")
def _logic(d: Decoder) -> Run:
    t = d.type("pred", "b16", "b32", "b64")
    one = d.base in ("not", "cnot")
    d.finish(2 if one else 3)
    if t != "pred":
        if d.base == "cnot":
            return d.apply(lambda a: a == 0, [t], t)
        return d.apply(np.invert, [t], t) if one else d.apply(LOGIC[d.base], [t, t], t)
    if d.base == "cnot":
        raise d.error("cnot of predicates")
    args = [d.predicate(o) for o in d.operands[1:]]
    target = d.predicate_target(d.operands[0])
    if one:
        ((a, na),) = args

        def invert(w: Any, m: int) -> None:
            set_pred(w, target, ~(w.preds[a] ^ na), m)

        return invert
    (a, na), (b, nb) = args
    name = d.base

    def run(w: Any, m: int) -> None:
        x, y = w.preds[a] ^ na, w.preds[b] ^ nb
        set_pred(w, target, x & y if name == "and" else x | y if name == "or" else x ^ y, m)

    return run


@decodes("shl", "shr")
def _shift(d: Decoder) -> Run:
    left = d.base == "shl"
    t = d.type("b16", "b32", "b64") if left else d.type("b16", "b32", "b64", *INTEGERS)
    d.finish(3)
    width = WIDTHS[t]
    dtype = DTYPES[t]

    def function(a: Array, b: Array) -> Array:
        n = np.minimum(b, width - 1).astype(dtype)
        if left:
            return np.where(b >= width, dtype(0), a << n)
        if t[0] == "s":
            return a >> n
        return np.where(b >= width, dtype(0), a >> n)

    return d.apply(function, [t, "u32"], t)


@decodes("shf")
def _funnel(d: Decoder) -> Run:
    d.type("b32")
    left = d.need("l", "r") == "l"
    wrap = d.need("wrap", "clamp") == "wrap"
    d.finish(4)

    def function(a: Array, b: Array, c: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n) & np.uint64(FULL)

    return d.apply(function, ["b32", "b32", "u32"], "b32")


@decodes("bfe")
def _bfe(d: Decoder) -> Run:
    t = d.type("u32", "s32", "u64", "s64")
    d.finish(4)
    width = WIDTHS[t]

    def one(a: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        a &= (1 << width) - 1
        sign = 0
        if t[0] == "s" and length:
            sign = (a >> min(position + length - 1, width - 1)) & 1
        value = 0
        for i in range(width):
            bit = (a >> (position + i)) & 1 if i < length and position + i < width else sign
            value |= bit << i
        return value - (1 << width) if t[0] == "s" and value >> (width - 1) else value

    def function(a: Array, b: Array, c: Array) -> Array:
        if (b == b[0]).all() and (c == c[0]).all() and int(b[0]) < width and 0 < int(c[0]) <= width - int(b[0]):
            up = DTYPES[t](width - int(b[0]) - int(c[0]))
            return (a << up) >> DTYPES[t](width - int(c[0]))
        return np.array([one(*x) for x in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], DTYPES[t])

    return d.apply(function, [t, "u32", "u32"], t)


@decodes("bfi")
def _bfi(d: Decoder) -> Run:
    t = d.type("b32", "b64")
    d.finish(5)
    width = WIDTHS[t]

    def one(a: int, b: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        mask = (((1 << length) - 1) << position) & ((1 << width) - 1)
        return (b & ~mask) | ((a << position) & mask)

    def function(*args: Array) -> Array:
        return np.array([one(*x) for x in zip(*[a.tolist() for a in args], strict=True)], DTYPES[t])

    return d.apply(function, [t, t, "u32", "u32"], t)


@decodes("prmt")
def _prmt(d: Decoder) -> Run:
    d.type("b32")
    d.finish(4)

    def function(a: Array, b: Array, c: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        out = np.zeros(32, np.uint64)
        for i in range(4):
            code = (c >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> ((code & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            byte = np.where(code & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            out |= byte << np.uint64(8 * i)
        return out

    return d.apply(function, ["b32", "b32", "b32"], "b32")


@decodes("lop3")
def _lop3(d: Decoder) -> Run:
    d.type("b32")
    d.finish(5)
    table = d.integer(d.operands.pop())
    if not 0 <= table < 256:
        raise d.error("the table of lop3 has 8 bits")

    def function(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(32, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return d.apply(function, ["b32"] * 3, "b32")


@decodes("clz", "popc", "brev")
def _count(d: Decoder) -> Run:
    t = d.type("b32", "b64")
    d.finish(2)
    width = WIDTHS[t]
    name = d.base

    def one(x: int) -> int:
        if name == "clz":
            return width - x.bit_length()
        return x.bit_count() if name == "popc" else int(f"{x:0{width}b}"[::-1], 2)

    result = t if name == "brev" else "u32"
    return d.apply(lambda a: np.array([one(x) for x in a.tolist()], DTYPES[result]), [t], result)


@decodes("bfind")
def _bfind(d: Decoder) -> Run:
    t = d.type("u32", "s32", "u64", "s64")
    shift = d.take("shiftamt")
    d.finish(2)
    width = WIDTHS[t]

    def one(x: int) -> int:
        x = ~x if x < 0 else x
        if not x:
            return FULL
        return width - x.bit_length() if shift else x.bit_length() - 1

    return d.apply(lambda a: np.array([one(x) for x in a.tolist()], np.uint32), [t], "u32")


# ---------------------------------------------------------------------- comparisons
COMPARE: dict[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
UNORDERED = tuple(f"{c}u" for c in ORDERED)


def comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    if not floating:
        found: Callable[[Array, Array], Array] = COMPARE[name]
        return found
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in UNORDERED:
        inner = COMPARE[name[:-1]]
        return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # ordered: false for NaN
        return lambda a, b: (a < b) | (a > b)
    compare: Callable[[Array, Array], Array] = COMPARE[name]
    return compare


@decodes("setp")
def _setp(d: Decoder) -> Run:
    t = d.type("b16", "b32", "b64", *INTEGERS, *FLOATS, "f16", "bf16")
    floating = t in (*FLOATS, "f16", "bf16")
    if floating:
        d.drop("ftz")
        name = d.need(*ORDERED, *UNORDERED, "num", "nan")
    elif t[0] == "b":
        name = d.need("eq", "ne")
    elif t[0] == "u":
        name = d.need(*ORDERED, "lo", "ls", "hi", "hs")
    else:
        name = d.need(*ORDERED)
    join = d.take("and", "or", "xor")
    d.finish(4 if join else 3)
    function = comparison(name, floating)
    if t == "bf16":
        inner = function

        def function(a: Array, b: Array) -> Array:
            return inner(from_bf16(a), from_bf16(b))

    a, b = d.source(d.operands[1], t), d.source(d.operands[2], t)
    c, negated = d.predicate(d.operands[3]) if join else (-1, 0)
    first = d.operands[0]
    p = d.predicate_target(first.first if isinstance(first, Pair) else first)
    q = d.predicate_target(first.second) if isinstance(first, Pair) else -1
    if not join and q < 0 and p >= 0:

        def simple(w: Any, m: int) -> None:
            value = bits(function(w.rows[a], w.rows[b]))
            w.preds[p] = value if m == FULL else (w.preds[p] & ~m) | (value & m)

        return simple

    def run(w: Any, m: int) -> None:
        value = bits(function(w.rows[a], w.rows[b]))
        other = ~value & FULL
        if join:
            x = w.preds[c] ^ negated
            if join == "and":
                value, other = value & x, other & x
            elif join == "or":
                value, other = value | x, other | x
            else:
                value, other = value ^ x, other ^ x
        set_pred(w, p, value, m)
        set_pred(w, q, other, m)

    return run


@decodes("selp")
def _selp(d: Decoder) -> Run:
    t = d.type("b16", "b32", "b64", *INTEGERS, *FLOATS)
    d.finish(4)
    a, b = d.source(d.operands[1], t), d.source(d.operands[2], t)
    p, negated = d.predicate(d.operands[3])
    c = d.destination(d.operands[0], t)

    def run(w: Any, m: int) -> None:
        rows = w.rows
        np.copyto(rows[c], np.where(LANES[(w.preds[p] ^ negated) & FULL], rows[a], rows[b]), "unsafe", LANES[m])

    return run


# ---------------------------------------------------------------------- moves and conversions
@decodes("mov")
def _mov(d: Decoder) -> Run:
    t = d.type("pred", *DTYPES)
    d.finish(2)
    to, source = d.operands
    if t == "pred":
        a, negated = d.predicate(source)
        p = d.predicate_target(to)

        def move(w: Any, m: int) -> None:
            set_pred(w, p, w.preds[a] ^ negated, m)

        return move
    if isinstance(source, Special) and source.name in CLOCKS:
        if WIDTHS[t] != CLOCKS[source.name]:
            raise d.error(f"{source.name} has {CLOCKS[source.name]} bits")
        c = d.destination(to, t)

        def clock(w: Any, m: int) -> None:
            np.copyto(w.rows[c], w.machine.steps & (FULL if WIDTHS[t] == 32 else 2**63 - 1), "unsafe", LANES[m])

        return clock
    if isinstance(source, Vector) or isinstance(to, Vector):
        return _mov_vector(d, t, to, source)
    return d.apply(lambda a: a, [t], t)


def _mov_vector(d: Decoder, t: str, to: Any, source: Any) -> Run:
    """Packs or unpacks (9.7.9.4): the first item is the lowest."""
    vector = source if isinstance(source, Vector) else to
    if isinstance(source, Vector) and isinstance(to, Vector):
        raise d.error("a vector on both sides")
    n = len(vector.items)
    part = WIDTHS[t] // n
    if t[0] != "b" or n not in (2, 4) or part < 8:
        raise d.error("a vector that mov does not have")
    pt = f"b{part}"
    if isinstance(source, Vector):
        args = [d.source(o, pt) for o in source.items]
        c = d.destination(to, t)

        def packing(w: Any, m: int) -> None:
            value = np.stack([w.rows[a] for a in args], axis=1).view(DTYPES[t])[:, 0]
            np.copyto(w.rows[c], value, "unsafe", LANES[m])

        return packing
    a = d.source(source, t)
    targets = [(i, d.destination(o, pt)) for i, o in enumerate(to.items) if not isinstance(o, Sink)]

    def unpacking(w: Any, m: int) -> None:
        parts = w.rows[a].copy().view(DTYPES[pt]).reshape(32, n)
        for i, c in targets:
            np.copyto(w.rows[c], parts[:, i], "unsafe", LANES[m])

    return unpacking


@decodes("cvta")
def _cvta(d: Decoder) -> Run:
    """Parameter and global windows are the generic one; the shared window is kept apart (32-bit addresses)."""
    t = d.type("u64", "u32")
    d.drop("to")
    d.need("param", "global", "shared", "shared::cta")
    d.finish(2)
    return d.apply(lambda a: a, [t], t)


ROUND: dict[str, Any] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INT_TYPES = ("u8", "s8", *INTEGERS)


@decodes("cvt")
def _cvt(d: Decoder) -> Run:
    """PTX ISA 9.7.9.21. Floating point to integer saturates, NaN is 0."""
    source = d.mods.pop() if d.mods else ""
    target = d.mods.pop() if d.mods else ""
    pairs = ("bf16x2", "f16x2", "e4m3x2", "e5m2x2")
    if target in pairs and source == "f32":
        d.need("rn")
        relu = bool(d.take("relu"))
        if target[0] == "e":
            d.need("satfinite")
        d.finish(3)

        def pack_pair(a: Array, b: Array) -> Array:
            if relu:
                a, b = np.fmax(a, 0), np.fmax(b, 0)
            if target[0] == "e":
                kind = target[:4]
                return to_fp8(b, kind).astype(np.uint16) | (to_fp8(a, kind).astype(np.uint16) << np.uint16(8))
            # the first source is the upper half
            return pack(target, np.stack([b, a], axis=1).ravel())

        return d.apply(pack_pair, ["f32", "f32"], "b16" if target[0] == "e" else "b32")
    if target == "f16x2" and source in ("e4m3x2", "e5m2x2"):
        d.need("rn")
        d.finish(2)
        table = FP8[source[:4]].astype(np.float16)
        return d.apply(lambda a: table[a.view(np.uint8)].view(np.uint32), ["b16"], "b32")
    simple = (*INT_TYPES, "f32", "f64", "f16", "bf16")
    if source not in simple or target not in simple:
        raise d.error(f"cvt from .{source} to .{target} is not modelled")
    from_float, to_float = source[-3:] in ("f32", "f64", "f16"), target[-3:] in ("f32", "f64", "f16")
    saturate = d.take("sat")
    d.drop("ftz")
    dtype = DTYPES[target]
    function: Any
    if not from_float and not to_float:
        if saturate:
            info = np.iinfo(dtype)

            def function(a: Array) -> Array:
                low, high = (
                    max(int(info.min), int(np.iinfo(a.dtype).min)),
                    min(int(info.max), int(np.iinfo(a.dtype).max)),
                )
                return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)

        else:

            def function(a: Array) -> Array:
                return a.astype(dtype)

    elif from_float and not to_float:
        rounding = ROUND[d.need(*ROUND)]
        info = np.iinfo(dtype)

        def function(a: Array) -> Array:
            x = from_bf16(a) if source == "bf16" else a
            y = rounding(x.astype(np.float64))
            out = np.clip(np.nan_to_num(y, nan=0.0), float(info.min), float(info.max))
            return np.where(out >= float(info.max), info.max, out.astype(dtype)).astype(dtype)

    elif not from_float:
        d.need("rn")

        def function(a: Array) -> Array:
            return to_bf16(a.astype(np.float32)) if target == "bf16" else a.astype(dtype)

    else:
        narrow = WIDTHS[target] < WIDTHS[source] or {source, target} == {"f16", "bf16"}
        whole = None if narrow else d.take(*ROUND)
        if narrow:
            d.need("rn")
        relu_one = bool(d.take("relu"))

        def function(a: Array) -> Array:
            x = from_bf16(a) if source == "bf16" else a
            if whole:
                x = ROUND[whole](x)
            if relu_one:
                x = np.fmax(x, 0)
            if saturate:
                x = np.clip(np.nan_to_num(x, nan=0.0), 0, 1)
            return to_bf16(x.astype(np.float32)) if target == "bf16" else x.astype(dtype)

    d.finish(2)
    inner = function

    def converted(a: Array) -> Array:
        out: Array = inner(a)
        return out

    # an integer is extended to a longer register by the sign of its type, which `destination` sees to
    args = [d.source(d.operands[1], source, wide=source in INT_TYPES)]
    return compute(converted, d.destination(d.operands[0], target, wide=not to_float), args)


# ---------------------------------------------------------------------- control
@decodes("bra")
def _bra(d: Decoder) -> Run:
    uniform = d.take("uni")
    d.finish(1)
    label = d.operands[0]
    assert isinstance(label, Label)
    target = label.target

    def run(w: Any, m: int) -> int:
        fragment = w.fragment
        rest = fragment.mask & ~m
        if rest:
            if uniform:
                raise ProtocolError("bra.uni, but the lanes do not agree")
            w.split(target, m)
            fragment = w.fragment
            fragment.pc += 1
        else:
            fragment.pc = target
        return JUMPED

    return run


@decodes("ret", "exit")
def _exit(d: Decoder) -> Run:
    d.drop("uni")
    d.finish(0)

    def run(w: Any, m: int) -> int:
        w.leave(m)
        return JUMPED

    return run


@decodes("trap")
def _trap(d: Decoder) -> Run:
    d.finish(0)

    def run(w: Any, m: int) -> None:
        raise Trap("trap", only(m))

    return run


@decodes("nanosleep")
def _nanosleep(d: Decoder) -> Run:
    d.type("u32")
    d.finish(1)
    d.source(d.operands[0], "u32")
    return lambda w, m: YIELD


@decodes("griddepcontrol")
def _griddepcontrol(d: Decoder) -> Run:
    waits = d.need("wait", "launch_dependents") == "wait"
    d.finish(0)

    def run(w: Any, m: int) -> None:
        if waits:
            w.waited |= m
            w.machine.waited = True
            w.machine.memory.shut = w.shut()
        elif w.machine.dependent is None and w.waited & m != m:
            raise ProtocolError("griddepcontrol.launch_dependents before .wait: what comes next may read too early")

    return run


# ---------------------------------------------------------------------- between lanes
def same_lanes(mask: int, m: int, what: str) -> None:
    if mask != m:
        raise ProtocolError(f"{what}: the mask {mask:#010x} is not the lanes that are here, {m:#010x}")


def member_mask(w: Any, row: int, m: int, what: str) -> None:
    values = w.rows[row]
    lane = only(m)
    mask = int(values[lane])
    if m == FULL and mask == FULL and (values == FULL).all():
        return
    if (values[LANES[m]] != mask).any():
        raise ProtocolError(f"{what}: the lanes have different masks", lane)
    same_lanes(mask, m, what)


@decodes("shfl")
def _shfl(d: Decoder) -> Run:
    d.type("b32")
    d.need("sync")
    how = d.need("idx", "bfly", "up", "down")
    d.finish(5)
    first = d.operands[0]
    a, b, c = d.source(d.operands[1], "b32"), d.source(d.operands[2], "u32"), d.source(d.operands[3], "u32")
    members = d.source(d.operands[4], "b32")
    to = first.first if isinstance(first, Pair) else first
    t = -1 if isinstance(to, Sink) else d.destination(to, "b32")
    p = d.predicate_target(first.second) if isinstance(first, Pair) else -1

    def sources(n: Any, clamp: Any) -> tuple[Array, Array]:
        segment, clamp = (clamp >> 8) & 31, clamp & 31
        top = (LANE & segment) | (clamp & ~segment)
        if how == "up":
            source = LANE - n
            valid = source >= top
        elif how == "down":
            source = LANE + n
            valid = source <= top
        elif how == "bfly":
            source = LANE ^ n
            valid = source <= top
        else:
            source = (LANE & segment) | (n & ~segment)
            valid = source <= top
        return np.where(valid, source, LANE), valid

    same = [int(o.value) if isinstance(o, Immediate) else None for o in d.operands[2:5]]
    if None not in same and same[2] & FULL == FULL:  # nearly all of them: every warp has the same lanes
        always, valid_always = sources(same[0] & 31, same[1])
        bits_always, always = bits(valid_always), always & 31
    else:
        always = None

    def run(w: Any, m: int) -> None:
        rows = w.rows
        if always is not None and m == FULL:
            if t >= 0:
                np.copyto(rows[t], rows[a][always], "unsafe")
            if p >= 0:
                set_pred(w, p, bits_always, m)
            return
        member_mask(w, members, m, "shfl.sync")
        source, valid = sources(rows[b].astype(np.int64) & 31, rows[c].astype(np.int64))
        lanes = LANES[m]
        absent = lanes & ~lanes[source & 31]
        if absent.any():
            lane = int(np.flatnonzero(absent)[0])
            raise ProtocolError(f"shfl.sync reads lane {int(source[lane])}, which is not here", lane)
        if t >= 0:
            np.copyto(rows[t], rows[a][source & 31], "unsafe", lanes)
        set_pred(w, p, bits(valid), m)

    return run


@decodes("vote")
def _vote(d: Decoder) -> Run:
    t = d.type("pred", "b32")
    d.need("sync")
    how = d.need("ballot") if t == "b32" else d.need("any", "all", "uni")
    d.finish(3)
    q, negated = d.predicate(d.operands[1])
    members = d.source(d.operands[2], "b32")
    if t == "b32":
        c = d.destination(d.operands[0], "b32")

        def ballot(w: Any, m: int) -> None:
            member_mask(w, members, m, "vote.sync")
            np.copyto(w.rows[c], (w.preds[q] ^ negated) & m, "unsafe", LANES[m])

        return ballot
    p = d.predicate_target(d.operands[0])

    def run(w: Any, m: int) -> None:
        member_mask(w, members, m, "vote.sync")
        value = (w.preds[q] ^ negated) & m
        result = value != 0 if how == "any" else value == m if how == "all" else value in (0, m)
        set_pred(w, p, FULL if result else 0, m)

    return run


@decodes("redux")
def _redux(d: Decoder) -> Run:
    t = d.type("u32", "s32", "b32")
    d.need("sync")
    how = d.need("and", "or", "xor") if t == "b32" else d.need("add", "min", "max")
    d.finish(3)
    function: Any = {**LOGIC, "add": np.add, "min": np.minimum, "max": np.maximum}[how]
    a, members = d.source(d.operands[1], t), d.source(d.operands[2], "b32")
    c = d.destination(d.operands[0], t)

    def run(w: Any, m: int) -> None:
        member_mask(w, members, m, "redux.sync")
        x = w.rows[a][LANES[m]]
        np.copyto(w.rows[c], function.reduce(x, dtype=x.dtype), "unsafe", LANES[m])

    return run


@decodes("activemask")
def _activemask(d: Decoder) -> Run:
    d.type("b32")
    d.finish(1)
    c = d.destination(d.operands[0], "b32")

    def run(w: Any, m: int) -> None:
        np.copyto(w.rows[c], m, "unsafe", LANES[m])

    return run


@decodes("elect")
def _elect(d: Decoder) -> Run:
    d.need("sync")
    d.finish(2)
    first = d.operands[0]
    if not isinstance(first, Pair):
        raise d.error("elect.sync has two destinations")
    members = d.source(d.operands[1], "b32")
    c = -1 if isinstance(first.first, Sink) else d.destination(first.first, "b32")
    p = d.predicate_target(first.second)

    def run(w: Any, m: int) -> None:
        member_mask(w, members, m, "elect.sync")
        if c >= 0:
            np.copyto(w.rows[c], only(m), "unsafe", LANES[m])
        set_pred(w, p, m & -m, m)

    return run
