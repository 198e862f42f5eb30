"""wgmma (PTX ISA 9.7.15): descriptors, operand layouts, accumulators; executed when its group is waited for.

Between issue and that wait a warp's wgmmas hold their registers (`warp.locked`) and their operands in shared memory
(read epoch NEVER), so that whatever touches them is a Race. Every warp is taken to read all of A and all of B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .decode import FP8, FULL, Decoder, Run, decodes, from_bf16
from .errors import ProtocolError, Race
from .parse import Immediate, Register, Vector
from .shared import NEVER

Array = npt.NDArray[Any]
ACCUMULATOR, OPERAND = 2, 1
SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}


@dataclass(frozen=True)
class Shape:
    """What is fixed in the text of one wgmma."""

    n: int
    k: int
    kind: str  # f16, bf16, e4m3, e5m2
    accumulators: tuple[int, ...]  # registers
    rows: tuple[int, ...]  # of these in the 32-bit file
    a_registers: tuple[int, ...]
    a_rows: tuple[int, ...]
    trans_a: bool
    trans_b: bool
    sign: int

    @property
    def element(self) -> int:
        return 1 if self.kind[0] == "e" else 2


@dataclass(frozen=True)
class Issued:
    shape: Shape
    a: int  # descriptors
    b: int
    accumulate: bool
    units: Array


def unpack_descriptor(value: int) -> tuple[int, int, int, int]:
    """(address, leading offset, stride offset, swizzle bytes) of a matrix descriptor (9.7.15.5.1.2.2)."""
    if value & ~((0x3FFF) | (0x3FFF << 16) | (0x3FFF << 32) | (7 << 49) | (3 << 62)):
        raise ProtocolError(f"descriptor {value:#018x} has bits set that mean nothing")
    if value >> 49 & 7:
        raise ProtocolError(f"descriptor {value:#018x}: a base offset is not modelled")
    return (value & 0x3FFF) << 4, (value >> 16 & 0x3FFF) << 4, (value >> 32 & 0x3FFF) << 4, SWIZZLE[value >> 62]


def operand_addresses(descriptor: int, mn: int, k: int, element: int, mn_major: bool) -> Array:
    """Byte addresses [mn, k] of an operand in shared memory."""
    start, leading, stride, swizzle = unpack_descriptor(descriptor)
    r, c = np.arange(mn)[:, None], np.arange(k)[None, :]
    if swizzle and start >> 7 & (swizzle // 16 - 1):
        raise ProtocolError(
            f"descriptor {descriptor:#018x}: with base offset 0 a tile starts at a multiple of {8 * swizzle} bytes"
        )
    if mn_major:
        if swizzle != 128 or element != 2:
            raise ProtocolError("MN-major operands are modelled with 128-byte swizzle and 16-bit elements only")
        if start & 127:
            raise ProtocolError(f"descriptor {descriptor:#018x}: an MN-major operand starts within a row of 128 bytes")
        address = start + (c // 8) * stride + (c % 8) * 128 + (r // 64) * leading + (r % 64) * 2
    elif swizzle:
        if (start & (swizzle - 1)) + k * element > swizzle:
            raise ProtocolError(f"descriptor {descriptor:#018x}: the k step leaves its row of {swizzle} bytes")
        address = start + (r // 8) * stride + (r % 8) * swizzle + c * element
    else:  # core matrices of 8 rows of 16 bytes
        byte = c * element
        address = start + (r // 8) * stride + (r % 8) * 16 + (byte // 16) * leading + byte % 16
    if swizzle:
        address = address ^ ((address >> 7) & (swizzle // 16 - 1)) << 4
    return np.asarray(address)


class Operands:
    """Index arrays of descriptors, made once each."""

    def __init__(self, unit_shift: int) -> None:
        self.shift = unit_shift
        self.elements: dict[Any, Array] = {}
        self.unit: dict[Any, tuple[Array, int, int]] = {}

    def of(self, descriptor: int, mn: int, k: int, element: int, mn_major: bool) -> Array:
        """Element indices [mn, k]."""
        key = descriptor, mn, k, element, mn_major
        if key not in self.elements:
            self.elements[key] = operand_addresses(descriptor, mn, k, element, mn_major) // element
        return self.elements[key]

    def units(self, parts: tuple[tuple[int, int, int, int, bool], ...]) -> tuple[Array, int, int]:
        """(shadow units of these operands, lowest byte, end)."""
        if parts not in self.unit:
            places = np.concatenate([(self.of(*p) * p[3]).ravel() for p in parts])
            self.unit[parts] = np.unique(places >> self.shift), int(places.min()), int(places.max()) + parts[0][3]
        return self.unit[parts]

    def joined(self, parts: tuple[tuple[int, int, int, int, bool], ...], first: int, last: int, flip: bool) -> Array:
        """Rows first…last of several operands side by side along k, transposed if `flip`."""
        key = parts, first, last, flip
        if key not in self.elements:
            value = np.concatenate([self.of(*p)[first:last] for p in parts], axis=1)
            self.elements[key] = np.ascontiguousarray(value.T if flip else value)
        return self.elements[key]


def decode_values(kind: str, raw: Array) -> Array:
    if kind == "bf16":
        return from_bf16(raw)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float32)
    return FP8[kind][raw]


def registers_a(w: Any, shape: Shape) -> Array:
    """A [16, k] of this warp from four registers (9.7.15.5.1.1): row lane / 4, k (lane % 4) …; +8 rows; +k / 2."""
    words = np.ascontiguousarray(w.files[32][list(shape.a_rows)])
    per_word = 4 // shape.element
    x = words.view(np.uint16 if shape.element == 2 else np.uint8).reshape(2, 2, 8, 4, per_word)  # kh, rh, row, c, e
    return decode_values(shape.kind, x.transpose(1, 2, 0, 3, 4).reshape(16, shape.k))


def accumulators(w: Any, shape: Shape) -> Array:
    """D [16, n] of this warp (9.7.15.5.1.1): d[4i + 2h + j] is row lane / 4 + 8h, column 8i + 2 (lane % 4) + j."""
    x = w.files[32][list(shape.rows)].view(np.float32).reshape(shape.n // 8, 2, 2, 8, 4)
    return np.ascontiguousarray(x.transpose(1, 3, 0, 4, 2)).reshape(16, shape.n)


def store_accumulators(w: Any, shape: Shape, d: Array) -> None:
    x = d.reshape(2, 8, shape.n // 8, 4, 2).transpose(2, 0, 4, 1, 3)
    w.files[32][list(shape.rows)] = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(-1, 32)


def execute(w: Any, issued: list[Issued]) -> None:
    """D += A B for wgmmas of one shape and accumulator, of which only the first may overwrite."""
    shape = issued[0].shape
    operands: Operands = w.machine.operands
    views = w.shared.views[shape.element]
    quarter = 16 * (w.index % 4)
    b = tuple((i.b, shape.n, shape.k, shape.element, shape.trans_b) for i in issued)
    right = decode_values(shape.kind, views.take(operands.joined(b, 0, shape.n, True)))
    if shape.a_registers:
        left = np.concatenate([registers_a(w, i.shape) for i in issued], axis=1)
    else:
        a = tuple((i.a, 64, shape.k, shape.element, shape.trans_a) for i in issued)
        left = decode_values(shape.kind, views.take(operands.joined(a, quarter, quarter + 16, False)))
    d = left @ right
    if shape.sign < 0:
        d = -d
    store_accumulators(w, shape, accumulators(w, shape) + d if issued[0].accumulate else d)


def alike(x: Shape, y: Shape) -> bool:
    return x is y or (
        x.rows == y.rows
        and (x.n, x.k, x.kind, x.trans_a, x.trans_b, x.sign) == (y.n, y.k, y.kind, y.trans_a, y.trans_b, y.sign)
        and bool(x.a_rows) == bool(y.a_rows)
    )


def retire(w: Any, group: list[Issued]) -> None:
    start = 0
    while start < len(group):
        end = start + 1
        while end < len(group) and group[end].accumulate and alike(group[start].shape, group[end].shape):
            end += 1
        execute(w, group[start:end])
        start = end
    shared = w.shared
    for issued in group:
        for register in issued.shape.accumulators:
            w.written[register] = FULL
        if shared.checks:
            now = shared.clock[w.index, w.index]
            shared.read_epoch[w.index, issued.units] = now
    w.locked.clear()
    for other in [i for g in w.groups for i in g] + w.open_group:
        lock(w, other)


def lock_registers(w: Any, shape: Shape) -> None:
    for register in shape.a_registers:
        w.locked.setdefault(register, OPERAND)
    for register in shape.accumulators:
        w.locked[register] = ACCUMULATOR


def lock(w: Any, issued: Issued) -> None:
    lock_registers(w, issued.shape)
    if w.shared.checks:
        w.shared.read_epoch[w.index, issued.units] = NEVER


def in_step(w: Any, what: tuple[Any, ...]) -> None:
    """The four warps of a warpgroup execute the same wgmma instructions in the same order."""
    log = w.cta.wgmma_log.setdefault(w.index // 4, [])
    if w.wgmma_serial < len(log):
        if log[w.wgmma_serial] != what:
            raise ProtocolError(
                "the warps of this warpgroup do not execute the same wgmma: another was at "
                f"{w.machine.line_of(log[w.wgmma_serial][0])} with {log[w.wgmma_serial][1:]}, this one with {what[1:]}"
            )
    else:
        log.append(what)
    w.wgmma_serial += 1


def whole_warpgroup(w: Any, m: int, what: str) -> None:
    if m != FULL:
        raise ProtocolError(f"{what} is .aligned, but only lanes {m:#010x} are here")
    if w.index // 4 * 4 + 4 > len(w.cta.warps):
        raise ProtocolError(f"{what} needs a warpgroup of 4 warps")


@decodes("wgmma")
def _wgmma(d: Decoder) -> Run:
    if d.take("fence"):
        d.need("sync")
        d.need("aligned")
        d.finish(0)

        def fence(w: Any, m: int) -> None:
            whole_warpgroup(w, m, "wgmma.fence")
            w.fences += 1

        return fence
    if d.take("commit_group"):
        d.need("sync")
        d.need("aligned")
        d.finish(0)

        def commit(w: Any, m: int) -> None:
            whole_warpgroup(w, m, "wgmma.commit_group")
            in_step(w, (w.fragment.pc, "commit"))
            w.groups.append(w.open_group)
            w.open_group = []

        return commit
    if d.take("wait_group"):
        d.need("sync")
        d.need("aligned")
        d.finish(1)
        left = d.integer(d.operands[0])

        def wait(w: Any, m: int) -> None:
            whole_warpgroup(w, m, "wgmma.wait_group")
            if len(w.groups) > left:
                done = w.groups[: len(w.groups) - left]
                w.groups = w.groups[len(w.groups) - left :]
                retire(w, [i for g in done for i in g])

        return wait
    return _mma(d)


def _mma(d: Decoder) -> Run:
    d.need("mma_async")
    d.need("sync")
    d.need("aligned")
    found = re.fullmatch(r"m64n(\d+)k(\d+)", d.mods.pop(0)) if d.mods else None
    if not found or len(d.mods) != 3 or d.mods[0] != "f32" or d.mods[1] != d.mods[2]:
        raise d.error("wgmma of this shape or these types is not modelled (m64nNkK.f32.T.T)")
    n, k, kind = int(found[1]), int(found[2]), d.mods[1]
    d.mods.clear()
    if kind not in ("f16", "bf16", "e4m3", "e5m2") or n % 8 or not 8 <= n <= 256:
        raise d.error("wgmma of this shape or these types is not modelled")
    fp8 = kind[0] == "e"
    if k != (32 if fp8 else 16):
        raise d.error(f"wgmma of .{kind} with k{k}")
    in_registers = isinstance(d.operands[1], Vector) if len(d.operands) > 1 else False
    d.finish(6 if fp8 else 7 if in_registers else 8)
    accumulator = d.operands[0]
    if not isinstance(accumulator, Vector) or len(accumulator.items) != n // 2:
        raise d.error(f"m64n{n} has {n // 2} accumulators a lane")

    def file(vector: Vector) -> tuple[tuple[int, ...], tuple[int, ...]]:
        for r in vector.items:
            if not isinstance(r, Register) or r.width != 32:
                raise d.error("not a vector of 32-bit registers")
        if len({r.index for r in vector.items}) != len(vector.items):
            raise d.error("a register stands twice in a vector")
        return tuple(r.index for r in vector.items), tuple(r.row for r in vector.items)

    registers, rows = file(accumulator)
    a_registers: tuple[int, ...] = ()
    a_rows: tuple[int, ...] = ()
    a_view = -1
    if in_registers:
        a_registers, a_rows = file(d.operands[1])
        if len(a_registers) != 4:
            raise d.error("A in registers has four")
        if set(a_registers) & set(registers):
            raise d.error("A and the accumulators share registers")
    else:
        a_view = d.source(d.operands[1], "b64")
    b_view = d.source(d.operands[2], "b64")
    scale = d.operands[3]
    p, negated = (-1, 0) if isinstance(scale, Immediate) else d.predicate(scale)
    constant = isinstance(scale, Immediate) and scale.value != 0
    signs = [d.integer(o) for o in d.operands[4:6]]
    flags = [d.integer(o) for o in d.operands[6:]]
    if any(s not in (1, -1) for s in signs) or any(f not in (0, 1) for f in flags):
        raise d.error("imm-scale is 1 or -1, imm-trans 0 or 1")
    trans_a = bool(flags[0]) if len(flags) == 2 else False
    trans_b = bool(flags[-1]) if flags else False
    shape = Shape(n, k, kind, registers, rows, a_registers, a_rows, trans_a, trans_b, signs[0] * signs[1])
    flops = 2 * 64 * n * k
    element = shape.element
    shared_bytes = (n + (0 if in_registers else 64)) * k * element
    names = d.builder.module.registers

    def descriptor(w: Any, view: int) -> int:
        values = w.rows[view]
        value = int(values[0])
        if (values != value).any():
            raise ProtocolError("the lanes have different matrix descriptors")
        return value

    def ready(w: Any, accumulate: bool) -> None:
        locked, written, fences = w.locked, w.written, w.fences
        if not fences:
            raise ProtocolError("no wgmma.fence before the first wgmma.mma_async")
        if locked.get(registers[0]) == ACCUMULATOR:
            for issued in [i for g in w.groups for i in g] + w.open_group:
                if issued.shape.accumulators != registers and set(issued.shape.accumulators) & set(registers):
                    raise ProtocolError("accumulators of a wgmma in flight of another shape")
        else:
            for register in registers:
                if register in locked:
                    raise Race(f"{names[register].name} is in use by a wgmma in flight")
                if accumulate and written[register] != FULL:
                    w.uninitialised(register)
                if w.wrote[register] >= fences or w.read[register] >= fences:
                    raise ProtocolError(f"no wgmma.fence after the last access to accumulator {names[register].name}")
        for register in a_registers:
            if locked.get(register) == ACCUMULATOR:
                raise Race(f"A register {names[register].name} is an accumulator of a wgmma in flight")
            if written[register] != FULL:
                w.uninitialised(register)
            if w.wrote[register] >= fences:
                raise ProtocolError(f"no wgmma.fence after the last write of A register {names[register].name}")

    def run(w: Any, m: int) -> None:
        whole_warpgroup(w, m, "wgmma.mma_async")
        accumulate = constant
        if p >= 0:
            value = (w.preds[p] ^ negated) & FULL
            if value not in (0, FULL):
                raise ProtocolError("the lanes have different scale-d")
            accumulate = value != 0
        ready(w, accumulate)
        a = -1 if in_registers else descriptor(w, a_view)
        b = descriptor(w, b_view)
        in_step(w, (w.fragment.pc, a, b, accumulate))
        operands: Operands = w.machine.operands
        shared = w.shared
        parts = [(b, n, k, element, trans_b)]
        if not in_registers:
            parts.append((a, 64, k, element, trans_a))
        units, low, end = operands.units(tuple(parts))
        shared.range(low, end - low, 1)
        if shared.checks:
            shared.wgmma_read(w.index, units)
        issued = Issued(shape, a, b, accumulate, units)
        w.open_group.append(issued)
        lock_registers(w, shape)
        if w.index % 4 == 0:
            statistics = w.machine.statistics
            statistics.wgmmas += 1
            statistics.flops += flops
            statistics.wgmma_shared_bytes += shared_bytes

    return run
