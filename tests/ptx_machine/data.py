"""Instructions that move data: ld, st, atom, ldmatrix, stmatrix, cp.async, bulk copies, mbarriers, barriers, fences.

PTX ISA 9.7.9 (data movement), 9.7.13 (synchronisation), 9.7.14.5 (ldmatrix), 9.7.20 (setmaxnreg).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .cluster import cluster_barrier
from .decode import BLOCKED, DTYPES, FULL, LANE, LANES, LISTS, YIELD, Decoder, Run, decodes, member_mask, only, set_pred
from .errors import MemoryFault, ProtocolError, Race
from .memory import Buffer, TensorMap
from .parse import PARAM_BASE, WIDTHS, Address, Immediate, Param, Register, Shared, Sink, Vector
from .shared import WINDOW, Mbarrier, SharedMemory

Array = npt.NDArray[Any]
SCOPES = ("cta", "cluster", "gpu", "sys")
SHARED_SPACES = ("shared", "shared::cta", "shared::cluster")
MEMORY_TYPES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
MASK64 = 2**64 - 1


# ---------------------------------------------------------------------- addresses
def shared_address(d: Decoder, operand: Any) -> tuple[int, int]:
    """(row, offset) of an address in shared memory."""
    if not isinstance(operand, Address) or operand.coordinates:
        raise d.error("not an address")
    base = operand.base
    if isinstance(base, Register):
        return d.source(base, "u32" if base.width == 32 else "u64"), operand.offset
    if isinstance(base, Shared):
        return d.constant(base.address + operand.offset, np.int64), 0
    if isinstance(base, Immediate):
        return d.constant(base.value, np.int64), 0
    raise d.error("not an address in shared memory")


def shared_lanes(w: Any, row: int, offset: int, m: int) -> tuple[Array, Array]:
    """(addresses of the active lanes, the lanes)."""
    at = w.rows[row].astype(np.int64)
    if offset:
        at += offset
    return (at, LANE) if m == FULL else (at[LANES[m]], LISTS[m])


def global_address(d: Decoder, operand: Any) -> tuple[int, Any]:
    if not isinstance(operand, Address) or operand.coordinates or not isinstance(operand.base, Register):
        raise d.error("not an address in global memory")
    return d.source(operand.base, "u64"), np.uint64(operand.offset & MASK64)


def uniform_address(w: Any, row: int, offset: int, m: int) -> int:
    return int(w.rows[row][only(m)]) + offset


# ---------------------------------------------------------------------- bank conflicts
_waves: dict[tuple[bytes, int], int] = {}


def wavefronts(addresses: Array, nbytes: int) -> int:
    """Passes over 32 banks of 4 bytes: 16-byte accesses go 8 lanes at a time, 8-byte ones 16, others 32."""
    key = addresses.tobytes(), nbytes
    if key not in _waves:
        if len(_waves) > 100_000:
            _waves.clear()
        group = 8 if nbytes == 16 else 16 if nbytes == 8 else 32
        total = 0
        for i in range(0, len(addresses), group):
            words = {(a + b) >> 2 for a in addresses[i : i + group].tolist() for b in range(0, nbytes, 4)}
            banks: dict[int, int] = {}
            for word in words:
                banks[word & 31] = banks.get(word & 31, 0) + 1
            total += max(banks.values(), default=0)
        _waves[key] = total
    return _waves[key]


def count_conflicts(w: Any, name: str, addresses: Array, nbytes: int) -> None:
    group = 8 if nbytes == 16 else 16 if nbytes == 8 else 32
    entry = w.machine.statistics.conflicts.setdefault(name, [0, 0, 0])
    entry[0] += 1
    entry[1] += wavefronts(addresses, nbytes)
    entry[2] += -(-len(addresses) // group)


# ---------------------------------------------------------------------- ld, st
CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
L1 = tuple(f"L1::{x}" for x in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate"))
L2 = tuple(f"L2::{x}" for x in ("evict_normal", "evict_first", "evict_last", "64B", "128B", "256B"))


def policy_operand(d: Decoder) -> None:
    """L2::cache_hint brings a last operand, a 64-bit register."""
    if d.take("L2::cache_hint"):
        d.source(d.operands.pop(), "b64")


@decodes("ld", "ldu", "st")
def _load_store(d: Decoder) -> Run:
    d.operands = list(d.operands)
    t = d.type(*MEMORY_TYPES)
    load = d.base != "st"
    vector = d.take("v2", "v4")
    count = int(vector[1]) if vector else 1
    strong = d.take("weak", "relaxed", "acquire", "release", "volatile") not in (None, "weak")
    d.drop(*SCOPES)
    space = d.need("global", *SHARED_SPACES, "param")
    constant = load and space == "global" and bool(d.take("nc"))
    d.drop(*CACHES, *L1, *L2)
    policy_operand(d)
    d.finish(2)
    values, at = d.operands if load else reversed(d.operands)
    items = list(values.items) if isinstance(values, Vector) else [values]
    if len(items) != count or isinstance(values, Vector) != bool(vector):
        raise d.error("the vector is not as long as the instruction says")
    size = WIDTHS[t] // 8
    if size * count > 16:
        raise d.error("an access of more than 16 bytes a lane")
    if load:
        rows = [-1 if isinstance(o, Sink) else d.destination(o, t, wide=True) for o in items]
    else:
        rows = [d.source(o, t, wide=True) for o in items]
    if space == "param":
        return _load_param(d, t, rows, at, load)
    if space == "global":
        return _global(d, t, rows, at, load, strong, constant)
    if space == "shared::cluster":
        return _of_cluster(d, t, rows, at, load)
    if strong:
        return _strong_shared(d, t, rows, at, load)
    return _shared(d, t, rows, at, load)


def _load_param(d: Decoder, t: str, rows: list[int], at: Any, load: bool) -> Run:
    if not load or not isinstance(at, Address) or not isinstance(at.base, Param):
        raise d.error("only ld.param of a named parameter is modelled")
    offset, size, dtype = at.base.offset + at.offset, WIDTHS[t] // 8, DTYPES[t]
    if at.offset < 0 or at.offset + size * len(rows) > at.base.width:
        raise d.error("outside the parameter")
    if offset % (size * len(rows)):
        raise d.error("a misaligned parameter")

    def run(w: Any, m: int) -> None:
        for i, row in enumerate(rows):
            if row >= 0:
                start = offset + i * size
                value = w.machine.parameters[start : start + size].view(dtype)[0]
                np.copyto(w.rows[row], value, "unsafe", LANES[m])

    return run


def _global(d: Decoder, t: str, rows: list[int], at: Any, load: bool, strong: bool, constant: bool) -> Run:
    row, offset = global_address(d, at)
    size, dtype, count = WIDTHS[t] // 8, DTYPES[t], len(rows)
    shift = size.bit_length() - 1
    d.builder.global_shift = min(d.builder.global_shift, (size * count).bit_length() - 1)
    d.builder.strong |= strong

    def guess(w: Any, m: int) -> None:
        """What lies there before griddepcontrol.wait may be anything: what it will be, something small, any bits."""
        machine = w.machine
        found = machine.memory.groups(w.rows[row] + offset, LISTS[m], size * count, False, early=True)
        for buffer, lanes, place in found:
            view, index = buffer.views[size], place >> shift
            for i, r in enumerate(rows):
                if r >= 0:
                    there = view[index + i].view(dtype)
                    _, same = np.unique(place, return_inverse=True)  # lanes that read the same see the same
                    width = 8 * size if machine.random.random() < 0.5 else machine.random.randrange(1, 12)
                    bits = np.array([machine.random.getrandbits(width) for _ in lanes], view.dtype)
                    true = machine.truthful or machine.random.random() < 0.5
                    w.rows[r][lanes] = there if true else bits[same].view(dtype)

    def run(w: Any, m: int) -> None:
        machine = w.machine
        if load and strong and machine.dependent is None and w.waited & m != m:
            guess(w, m)
            return
        groups = machine.memory.groups(w.rows[row] + offset, LISTS[m], size * count, not load)
        watch = None if strong else machine.watch
        if load and not strong and machine.dependent != frozenset() and w.waited & m != m:
            raise ProtocolError("a weak read before griddepcontrol.wait: it may see what was there before")
        for buffer, lanes, place in groups:
            if watch is not None and buffer.writable:
                if load:
                    watch.read(w, buffer, lanes, place, size * count, constant)
                else:
                    watch.write(w, buffer, lanes, place, size * count)
            view = buffer.views[size]
            index = place >> shift
            for i, r in enumerate(rows):
                if load:
                    if r >= 0:
                        w.rows[r][lanes] = view[index + i].view(dtype)
                else:
                    view[index + i] = w.rows[r][lanes].view(view.dtype)
            if load:
                machine.statistics.global_read += len(lanes) * size * count
            else:
                machine.statistics.global_written += len(lanes) * size * count

    return run


def _shared(d: Decoder, t: str, rows: list[int], at: Any, load: bool) -> Run:
    row, offset = shared_address(d, at)
    size, dtype, count = WIDTHS[t] // 8, DTYPES[t], len(rows)
    total = size * count
    d.builder.unit_shift = min(d.builder.unit_shift, total.bit_length() - 1)
    shift = size.bit_length() - 1
    name = d.statement.op

    def run(w: Any, m: int) -> None:
        shared = w.shared
        addresses, lanes = shared_lanes(w, row, offset, m)
        shared.check(addresses, total, lanes)
        if shared.checks:
            units = shared.units(addresses, total)
            if load:
                shared.read(w.index, units)
            else:
                shared.write(w.index, units)
        count_conflicts(w, name, addresses, total)
        view = shared.views[size]
        index = addresses >> shift
        for i, r in enumerate(rows):
            if load:
                if r >= 0:
                    w.rows[r][lanes] = view[index + i].view(dtype)
                continue
            _put(shared, size, addresses + i * size, w.rows[r][lanes].view(view.dtype), lanes)

    return run


def _strong_shared(d: Decoder, t: str, rows: list[int], at: Any, load: bool) -> Run:
    """Strong accesses order nothing and are no races among themselves; what is loaded may be from before any store."""
    if len(rows) != 1:
        raise d.error("a strong access of a vector")
    row, offset = shared_address(d, at)
    size, dtype = WIDTHS[t] // 8, DTYPES[t]
    d.builder.unit_shift = min(d.builder.unit_shift, size.bit_length() - 1)

    def run(w: Any, m: int) -> None:
        shared, random = w.shared, w.machine.random
        addresses, lanes = shared_lanes(w, row, offset, m)
        shared.check(addresses, size, lanes)
        if shared.checks:
            shared.strong(shared.units(addresses, size))
        view = shared.views[size]
        if not load:
            _put(shared, size, addresses, w.rows[rows[0]][lanes].view(view.dtype), lanes)
        elif rows[0] >= 0:
            bits = random.choice((0, random.getrandbits(8 * size)))
            there = view[addresses // size]
            found = there if random.random() < 0.5 else np.full_like(there, bits)
            w.rows[rows[0]][lanes] = found.view(dtype)

    return run


def _put(shared: SharedMemory, size: int, addresses: Any, values: Any, lanes: Any) -> None:
    """A value of `size` bytes of each lane, in whose order nothing may depend."""
    view, index = shared.views[size], addresses // size
    view[index] = values
    other = view[index] != values
    if shared.checks and other.any():
        i = int(np.flatnonzero(other)[0])
        raise Race(f"two lanes write different values to {shared.name(int(addresses[i]))}", int(lanes[i]))


def _of_cluster(d: Decoder, t: str, rows: list[int], at: Any, load: bool) -> Run:
    """ld or st.shared::cluster: each lane of the own CTA, or of another where mapa has led it."""
    row, offset = shared_address(d, at)
    own = _shared(d, t, rows, at, load)
    size, dtype = WIDTHS[t] // 8, DTYPES[t]
    total = size * len(rows)
    shift = size.bit_length() - 1
    name = d.statement.op

    def run(w: Any, m: int) -> None:
        addresses, lanes = shared_lanes(w, row, offset, m)
        windows = addresses >> WINDOW
        if not windows.any():
            own(w, m)
            return
        count_conflicts(w, name, addresses, total)
        for window in np.unique(windows).tolist():
            here = windows == window
            places, some = addresses[here] & ((1 << WINDOW) - 1), lanes[here]
            shared = w.cta.cluster.memory(w, window, int(some[0]))
            shared.check(places, total, some)
            if shared.checks:
                units = shared.units(places, total)
                if shared is w.shared:
                    (shared.read if load else shared.write)(w.index, units)
                else:
                    (shared.far_read if load else shared.far_write)(w.shared, w.index, units)
            view = shared.views[size]
            index = places >> shift
            for i, r in enumerate(rows):
                if not load:
                    _put(shared, size, places + i * size, w.rows[r][some].view(view.dtype), some)
                elif r >= 0:
                    w.rows[r][some] = view[index + i].view(dtype)

    return run


@decodes("prefetch", "prefetchu")
def _prefetch(d: Decoder) -> Run:
    d.operands = list(d.operands)
    d.need("L1", "L2", "tensormap", "L2::evict_last", "L2::evict_normal")
    d.drop("global", "param")
    d.finish(1)
    global_address(d, d.operands[0])
    return lambda w, m: None


@decodes("createpolicy")
def _createpolicy(d: Decoder) -> Run:
    d.need("fractional")
    d.type("b64")
    if not all(x.startswith("L2::evict_") for x in d.mods):
        raise d.error("createpolicy of this kind is not modelled")
    d.mods.clear()
    d.finish(1, 2)
    c = d.destination(d.operands[0], "b64")

    def run(w: Any, m: int) -> None:
        np.copyto(w.rows[c], 0, "unsafe", LANES[m])

    return run


# ---------------------------------------------------------------------- atomics on global memory
@decodes("atom", "red")
def _atom(d: Decoder) -> Run:
    """Lane after lane; CTAs are not preempted within an instruction, so each is atomic."""
    d.operands = list(d.operands)
    t = d.type("u32", "s32", "u64", "s64", "b32", "b64", "f32")
    d.take("relaxed", "acquire", "release", "acq_rel")
    d.drop(*SCOPES)
    d.need("global")
    atom = d.base == "atom"
    vector = d.take("v2", "v4") if not atom else None
    what = d.need("add", "inc", "dec", "cas", "max", "min", "exch", "and", "or", "xor")
    if (t == "f32" and what != "add") or (t[0] == "b" and what not in ("cas", "exch", "and", "or", "xor")):
        raise d.error(f"{d.base}.{what} of .{t} is not modelled")
    if not atom and what in ("cas", "exch"):
        raise d.error(f"red has no {what}")
    policy_operand(d)
    d.finish((3 if atom else 2) + (what == "cas"))
    to = d.operands.pop(0) if atom else Sink()
    row, offset = global_address(d, d.operands[0])
    values = d.operands[1]
    if isinstance(values, Vector) != bool(vector) or (vector and (t != "f32" or len(values.items) != int(vector[1]))):
        raise d.error("the vector is not as long as the instruction says")
    b = [d.source(o, t) for o in (values.items if isinstance(values, Vector) else [values])]
    c = d.source(d.operands[2], t) if what == "cas" else -1
    target = -1 if isinstance(to, Sink) else d.destination(to, t)
    size, dtype = WIDTHS[t] // 8, DTYPES[t]
    d.builder.strong = True
    wrap = (1 << WIDTHS[t]) - 1

    def new(old: Any, x: Any, y: Any) -> Any:
        if what == "add":
            return old + x
        if what == "inc":
            return 0 if old >= x else old + 1
        if what == "dec":
            return x if old == 0 or old > x else old - 1
        if what == "cas":
            return y if old == x else old
        if what == "exch":
            return x
        if what in ("max", "min"):
            return max(old, x) if what == "max" else min(old, x)
        return old & x if what == "and" else old | x if what == "or" else old ^ x

    def run(w: Any, m: int) -> None:
        machine = w.machine
        groups = machine.memory.groups(w.rows[row] + offset, LISTS[m], size * len(b), True)
        for buffer, lanes, place in groups:
            view = buffer.views[size].view(dtype)
            for lane, index in zip(lanes.tolist(), (place // size).tolist(), strict=True):
                for i, r in enumerate(b):
                    old = view[index + i]
                    x = w.rows[r][lane]
                    if t == "f32":
                        view[index + i] = old + x
                    else:
                        value = new(int(old), int(x), int(w.rows[c][lane]) if c >= 0 else 0) & wrap
                        view[index + i] = value - wrap - 1 if t[0] == "s" and value > wrap >> 1 else value
                    if target >= 0:
                        w.rows[target][lane] = old
            machine.statistics.global_read += len(lanes) * size * len(b)
            machine.statistics.global_written += len(lanes) * size * len(b)

    return run


# ---------------------------------------------------------------------- ldmatrix, stmatrix
@decodes("ldmatrix", "stmatrix")
def _matrix(d: Decoder) -> Run:
    """Lane 8i + r brings the address of row r of matrix i; lane l holds row l / 4, elements 2 (l % 4) and the next."""
    d.need("sync")
    d.need("aligned")
    d.need("m8n8")
    count = int(d.need("x1", "x2", "x4")[1])
    trans = d.take("trans")
    d.need(*SHARED_SPACES)
    d.type("b16")
    d.finish(2)
    load = d.base == "ldmatrix"
    values, at = d.operands if load else reversed(d.operands)
    items = list(values.items) if isinstance(values, Vector) else [values]
    if len(items) != count:
        raise d.error(f".x{count} has {count} registers")
    rows = [d.destination(o, "b32") if load else d.source(o, "b32") for o in items]
    row, offset = shared_address(d, at)
    name = d.statement.op
    base = d.base

    def run(w: Any, m: int) -> None:
        if m != FULL:
            raise ProtocolError(f"{base} is .aligned, but only lanes {m:#010x} are here")
        shared = w.shared
        addresses = w.rows[row][: 8 * count].astype(np.int64) + offset
        shared.check(addresses, 16, LANE)
        if shared.checks:
            units = shared.units(addresses, 16)
            if load:
                shared.read(w.index, units)
            else:
                shared.write(w.index, units)
        count_conflicts(w, name, addresses, 16)
        start = addresses.reshape(count, 8)
        if trans:
            first = (start[:, 2 * (LANE % 4)] >> 1) + LANE // 4
            index = np.stack([first, (start[:, 2 * (LANE % 4) + 1] >> 1) + LANE // 4], axis=-1)
            view = shared.views[2]
            if load:
                data = view[index].view(np.uint32)[..., 0]
            else:
                view[index] = np.stack([w.rows[r] for r in rows]).view(np.uint16).reshape(count, 32, 2)
        else:
            index = (start[:, LANE // 4] >> 2) + LANE % 4
            view = shared.views[4]
            if load:
                data = view[index]
            else:
                view[index] = np.stack([w.rows[r] for r in rows])
        if load:
            for i, r in enumerate(rows):
                w.rows[r][:] = data[i]

    return run


# ---------------------------------------------------------------------- asynchronous copies
@dataclass
class Bulk:
    """A bulk copy under way (9.7.9.25): written and counted by its mbarrier when the scheduler says so."""

    cta: Any
    units: slice
    barrier: int
    destination: int
    map: TensorMap | None
    source: tuple[int, int]  # (x, y) of a tensor map, (address, bytes)
    nbytes: int
    line: str
    first: bool = True  # of a multicast, which reads device memory once

    def complete(self) -> None:
        shared, machine = self.cta.shared, self.cta.machine
        mbarrier: Mbarrier = shared.mbarrier(None, self.barrier)
        if self.map is not None:
            box, read = self.map.box(machine.memory, *self.source)
            machine.statistics.global_read += read if self.first else 0
            pitch = box.shape[1]
            at = self.destination + (np.arange(box.shape[0]) * pitch)[:, None] + np.arange(0, pitch, 16)
            if self.map.swizzle:
                at ^= ((at >> 7) & (self.map.swizzle // 16 - 1)) << 4
            shared.bytes.reshape(-1, 16)[at.ravel() >> 4] = box.reshape(-1, 16)
        else:
            data = machine.memory.read_bytes(*self.source)
            shared.bytes[self.destination : self.destination + self.nbytes] = data
            machine.statistics.global_read += self.nbytes
        if shared.checks:
            shared.async_done(self.units, mbarrier.slot, mbarrier.base + mbarrier.phase + 1)
        machine.statistics.tma_bytes += self.nbytes
        shared.expect(mbarrier, -self.nbytes)
        shared.settle(mbarrier)


@dataclass(eq=False)
class BulkOut:
    """A bulk copy out of shared memory (9.7.9.25.4): read and written when the scheduler says so, or at the wait."""

    w: Any
    units: slice
    source: int
    buffer: Buffer
    place: int  # in its views
    nbytes: int
    line: str
    written: Array | None  # units of device memory
    data: Array | None = None
    done: bool = False
    free: bool = False  # the source may be written again: the read was waited for

    def read(self) -> None:
        if self.data is None:
            self.data = self.w.shared.bytes[self.source : self.source + self.nbytes].copy()

    def complete(self) -> None:
        self.read()
        self.buffer.views[1][self.place : self.place + self.nbytes] = self.data
        self.w.machine.statistics.global_written += self.nbytes
        self.done = True

    def wait(self, read: bool) -> None:
        """By its thread; `read`: only until its source has been read."""
        w = self.w
        if read:
            self.read()
        elif not self.done:
            w.cta.pending.remove(self)
            self.complete()
        if not self.free and w.shared.checks:
            w.shared.bulk_waited(w.index, self.units)
        self.free = True
        if not read and self.written is not None:
            w.machine.watch.copy_waited(w, self.buffer, self.written)


@dataclass
class Copy:
    """The cp.async of one warp (9.7.9.25.3.1)."""

    w: Any
    units: Array
    chunks: Array  # 16-byte places in shared memory, or bytes if narrower
    data: Array
    serial: int
    arrivals: list[Arrival] = field(default_factory=list)
    done: bool = False

    def complete(self) -> None:
        w, shared = self.w, self.w.shared
        shared.bytes[self.chunks] = self.data
        self.done = True
        if shared.checks:
            shared.async_done(self.units, shared.n + w.index, self.serial)
            shared.fence_epoch[self.units] = 2**31 - 1
        for arrival in self.arrivals:
            arrival.left -= 1
            arrival.settle()


@dataclass
class Arrival:
    """cp.async.mbarrier.arrive: arrives when the copies before it are complete."""

    w: Any
    address: int
    count: int
    left: int
    clock: Array
    inc: bool

    def settle(self) -> None:
        if not self.left:
            shared = self.w.shared
            shared.arrive(shared.mbarrier(None, self.address), self.count, self.clock)


@decodes("cp")
def _cp(d: Decoder) -> Run:
    d.operands = list(d.operands)
    d.need("async")
    if d.take("bulk"):
        return _bulk(d)
    if d.take("commit_group"):
        d.finish(0)

        def commit(w: Any, m: int) -> None:
            w.copy_groups.append(w.open_copies)
            w.open_copies = []

        return commit
    if d.mods and d.mods[0] in ("wait_group", "wait_all"):
        everything = d.mods.pop() == "wait_all"
        d.finish(0 if everything else 1)
        left = 0 if everything else d.integer(d.operands[0])

        def wait(w: Any, m: int) -> None:
            if everything:
                w.copy_groups.append(w.open_copies)
                w.open_copies = []
            while len(w.copy_groups) > left:
                for copy in w.copy_groups.pop(0):
                    if not copy.done:
                        w.cta.pending.remove(copy)
                        copy.complete()
                    if w.shared.checks:
                        w.shared.copy_waited(w.index, copy.units)

        return wait
    if "mbarrier" in d.mods:
        return _cp_arrive(d)
    return _cp_async(d)


def _cp_async(d: Decoder) -> Run:
    cache = d.need("ca", "cg")
    d.need("shared", "shared::cta")
    d.need("global")
    d.drop("L2::64B", "L2::128B", "L2::256B")
    policy_operand(d)
    d.finish(3, 4)
    row, offset = shared_address(d, d.operands[0])
    source, shift = global_address(d, d.operands[1])
    size = d.integer(d.operands[2])
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise d.error(f"cp.async.{cache} of {size} bytes")
    take = d.source(d.operands[3], "u32") if len(d.operands) == 4 else -1

    def run(w: Any, m: int) -> None:
        shared, machine = w.shared, w.machine
        addresses, lanes = shared_lanes(w, row, offset, m)
        shared.check(addresses, size, lanes)
        units = shared.units(addresses, size)
        where = w.rows[source] + shift
        data = np.zeros((len(lanes), size), np.uint8)
        for i, lane in enumerate(lanes.tolist()):
            n = size if take < 0 else int(w.rows[take][lane])
            if n > size:
                raise ProtocolError(f"cp.async with a source of {n} bytes", lane)
            if int(where[lane]) % size:
                raise MemoryFault(f"address {int(where[lane]):#x} is not a multiple of {size}", lane)
            if n:
                at = int(where[lane])
                machine.memory.find(at, at + n, False, lane)
                data[i, :n] = machine.memory.read_bytes(at, n)
                machine.statistics.global_read += n
        if shared.checks:
            shared.copy_issue(w.index, units)
        w.copy_serial += 1
        chunks = (addresses[:, None] + np.arange(size)).ravel()
        shared.bytes[chunks] = 0xFF
        copy = Copy(w, units, chunks, data.ravel(), w.copy_serial)
        w.open_copies.append(copy)
        w.cta.pending.append(copy)

    return run


def _cp_arrive(d: Decoder) -> Run:
    d.need("mbarrier")
    d.need("arrive")
    inc = not d.take("noinc")
    d.drop(*SHARED_SPACES)
    d.type("b64")
    d.finish(1)
    row, offset = shared_address(d, d.operands[0])

    def run(w: Any, m: int) -> None:
        shared = w.shared
        addresses, _ = shared_lanes(w, row, offset, m)
        for address, count in zip(*np.unique(addresses, return_counts=True), strict=True):
            mbarrier = shared.mbarrier(w.index, int(address))
            if inc:
                mbarrier.pending += int(count)
            copies = [c for g in [*w.copy_groups, w.open_copies] for c in g if not c.done]
            clock = shared.clock[w.index].copy()
            clock[shared.n + w.index] = w.copy_serial
            arrival = Arrival(w, int(address), int(count), len(copies), clock, inc)
            for copy in copies:
                copy.arrivals.append(arrival)
            shared.release(w.index)
            arrival.settle()

    return run


def _bulk(d: Decoder) -> Run:
    if d.take("prefetch"):
        d.need("tensor")
        d.need("2d")
        d.drop("tile")
        d.need("L2")
        d.need("global")
        policy_operand(d)
        d.finish(1)
        source, shift, (column, row) = tensor_operand(d, d.operands[0])

        def ask(w: Any, m: int) -> None:  # a box outside of the tensor is none
            for lane in LISTS[m].tolist():
                if (at := int(w.rows[source][lane]) + int(shift)) not in w.machine.maps:
                    raise MemoryFault(f"{at:#x} is not the address of a tensor map", lane)
                w.machine.asked.add((at, int(w.rows[column][lane]), int(w.rows[row][lane])))

        return ask
    if d.mods and d.mods[0] in ("commit_group", "wait_group"):
        return _bulk_groups(d)
    multicast = d.take("multicast::cluster")
    tensor = d.take("tensor")
    if tensor:
        d.need("2d")
        d.drop("tile")
    spaces = [x for x in d.mods if x in (*SHARED_SPACES, "global")]
    if spaces == ["global", "shared::cta"] and not tensor:
        return _bulk_out(d)
    if len(spaces) != 2 or spaces[1] != "global":
        raise d.error("only bulk copies from global to shared memory are modelled, and those back that are no tensor")
    d.drop(*spaces)
    d.need("mbarrier::complete_tx::bytes")
    policy_operand(d)
    to_ranks = d.source(d.operands.pop(), "b16") if multicast else -1
    d.finish(3 if tensor else 4)
    row, offset = shared_address(d, d.operands[0])
    bar, bar_offset = shared_address(d, d.operands[-1])
    if tensor:
        source, shift, coordinates = tensor_operand(d, d.operands[1])
        size = -1
    else:
        source, shift = global_address(d, d.operands[1])
        coordinates = []
        size = d.source(d.operands[2], "u32")

    def run(w: Any, m: int) -> None:
        shared, machine = w.shared, w.machine
        for lane in LISTS[m].tolist():
            to = int(w.rows[row][lane]) + offset
            barrier = int(w.rows[bar][lane]) + bar_offset
            at = int(w.rows[source][lane]) + int(shift)
            mbarrier = shared.mbarrier(w.index, barrier)
            if not mbarrier.fenced and shared.checks:
                raise ProtocolError(
                    f"mbarrier {shared.name(barrier)} is used by the async proxy, but its init was not followed by "
                    "fence.mbarrier_init or fence.proxy.async",
                    lane,
                )
            map_: TensorMap | None = None
            if tensor:
                map_ = machine.maps.get(at)
                if map_ is None:
                    raise MemoryFault(f"{at:#x} is not the address of a tensor map", lane)
                where = int(w.rows[coordinates[0]][lane]), int(w.rows[coordinates[1]][lane])
                machine.copied.add((at, *where))
                nbytes, align = map_.nbytes, map_.alignment
            else:
                nbytes = int(w.rows[size][lane])
                where, align = (at & MASK64, nbytes), 16
                if nbytes % 16 or at % 16 or not nbytes:
                    raise MemoryFault(f"a bulk copy of {nbytes} bytes from {at:#x}: not multiples of 16", lane)
                machine.memory.find(at, at + nbytes, False, lane)
            machine.memory.opened(None, lane)
            units = shared.range(to, nbytes, align)
            line = machine.line_of(w.fragment.pc)
            cluster = w.cta.cluster
            ranks = int(w.rows[to_ranks][lane]) if multicast else 1 << w.cta.rank
            if not 0 < ranks < 1 << cluster.size:
                raise MemoryFault(f"multicast to the ranks {ranks:#b} of a cluster of {cluster.size} CTAs", lane)
            first = True
            for rank in range(cluster.size):
                if not ranks >> rank & 1:
                    continue
                cta = cluster.ctas[rank]
                there = cluster.memory(w, rank + 1, lane)
                if cta is not w.cta:
                    mbarrier = there.far_mbarrier(barrier, w.cta.cluster_phases)
                if there.checks:
                    known, proxy = shared.clock[w.index], shared.proxy_clock[w.index]
                    known, proxy = shared.seen_from(there, known), shared.seen_from(there, proxy)
                    there.pc = shared.pc
                    there.async_write(known, proxy, units, mbarrier.slot)
                there.bytes[to : to + nbytes] = 0xFF
                cta.pending.append(Bulk(cta, units, barrier, to, map_, where, nbytes, line, first))
                first = False

    return run


def _bulk_out(d: Decoder) -> Run:
    """Each thread has its own copies and groups of them."""
    d.drop("global", "shared::cta")
    d.need("bulk_group")
    policy_operand(d)
    d.finish(3)
    target, shift = global_address(d, d.operands[0])
    row, offset = shared_address(d, d.operands[1])
    size = d.source(d.operands[2], "u32")

    def run(w: Any, m: int) -> None:
        shared, machine = w.shared, w.machine
        for lane in LISTS[m].tolist():
            to = int(w.rows[target][lane] + shift)
            at = int(w.rows[row][lane]) + offset
            nbytes = int(w.rows[size][lane])
            if nbytes % 16 or to % 16 or not nbytes:
                raise MemoryFault(f"a bulk copy of {nbytes} bytes to {to:#x}: not multiples of 16", lane)
            buffer = machine.memory.find(to, to + nbytes, True, lane)
            units = shared.range(at, nbytes, 16)
            place = to - buffer.base
            written = None
            if shared.checks:
                shared.bulk_read(w.index, units)
                written = machine.watch.copy_issue(w, buffer, lane, place, nbytes)
            line = machine.line_of(w.fragment.pc)
            copy = BulkOut(w, units, at, buffer, place, nbytes, line, written)
            w.bulk_open.setdefault(lane, []).append(copy)
            w.cta.pending.append(copy)

    return run


def _bulk_groups(d: Decoder) -> Run:
    if d.take("commit_group"):
        d.finish(0)

        def commit(w: Any, m: int) -> None:
            for lane in LISTS[m].tolist():
                w.bulk_groups.setdefault(lane, []).append(w.bulk_open.pop(lane, []))

        return commit
    d.need("wait_group")
    read = bool(d.take("read"))
    d.finish(1)
    left = d.integer(d.operands[0])

    def wait(w: Any, m: int) -> None:
        for lane in LISTS[m].tolist():
            groups = w.bulk_groups.get(lane, [])
            done = max(0, len(groups) - left)
            for copy in [c for group in groups[:done] for c in group]:
                copy.wait(read)
            if not read:
                del groups[:done]

    return wait


def tensor_operand(d: Decoder, operand: Any) -> tuple[int, int, list[int]]:
    """[map, {x, y}]: x counts elements along a row, y rows."""
    if not isinstance(operand, Address) or operand.coordinates is None or len(operand.coordinates.items) != 2:
        raise d.error("a tensor has an address and two coordinates")
    base = operand.base
    if isinstance(base, Param):
        row = d.constant(PARAM_BASE + base.offset, np.uint64)
    elif isinstance(base, Register):
        row = d.source(base, "u64")
    else:
        raise d.error("a tensor map is given by a 64-bit address")
    return row, operand.offset, [d.source(o, "s32") for o in operand.coordinates.items]


# ---------------------------------------------------------------------- mbarriers
class MbarrierWait:
    def __init__(self, w: Any, mbarrier: Mbarrier, phase: int, parity: bool) -> None:
        self.w, self.mbarrier, self.phase, self.parity = w, mbarrier, phase, parity

    def ready(self) -> bool:
        if self.parity:
            return self.mbarrier.ended(self.phase)
        return self.mbarrier.phase != self.phase

    def __str__(self) -> str:
        name = self.w.shared.name(self.mbarrier.address)
        return f"waits for {'parity' if self.parity else 'phase'} {self.phase} of mbarrier {name}: {self.mbarrier}"


@decodes("mbarrier")
def _mbarrier(d: Decoder) -> Run:
    d.operands = list(d.operands)
    d.type("b64")
    what = d.mods.pop(0) if d.mods else ""
    if what in ("test_wait", "try_wait"):
        return _wait(d, what)
    expect = bool(d.take("expect_tx")) if what == "arrive" else False
    d.take("release", "relaxed")
    d.drop("cta", "cluster", *SHARED_SPACES)
    if what == "init":
        d.finish(2)
        row, offset = shared_address(d, d.operands[0])
        count = d.source(d.operands[1], "u32")

        def init(w: Any, m: int) -> None:
            for lane in LISTS[m].tolist():
                w.shared.mbarrier_init(w.index, int(w.rows[row][lane]) + offset, int(w.rows[count][lane]))

        return init
    if what == "inval":
        d.finish(1)
        row, offset = shared_address(d, d.operands[0])

        def invalidate(w: Any, m: int) -> None:
            for lane in LISTS[m].tolist():
                w.shared.mbarrier_invalidate(w.index, int(w.rows[row][lane]) + offset)

        return invalidate
    if what in ("expect_tx", "complete_tx"):
        d.finish(2)
        row, offset = shared_address(d, d.operands[0])
        amount = d.source(d.operands[1], "u32")
        sign = 1 if what == "expect_tx" else -1

        def transact(w: Any, m: int) -> None:
            for lane in LISTS[m].tolist():
                mbarrier = w.shared.mbarrier(w.index, int(w.rows[row][lane]) + offset)
                w.shared.expect(mbarrier, sign * int(w.rows[amount][lane]))
                if sign < 0:
                    w.shared.settle(mbarrier)

        return transact
    if what != "arrive":
        raise d.error(f"mbarrier.{what} is not modelled")
    state = d.operands.pop(0) if d.operands and not isinstance(d.operands[0], Address) else Sink()
    d.finish(2) if expect else d.finish(1, 2)
    row, offset = shared_address(d, d.operands[0])
    amount = d.source(d.operands[1], "u32") if len(d.operands) == 2 else -1
    target = -1 if isinstance(state, Sink) else d.destination(state, "b64")

    def arrive(w: Any, m: int) -> None:
        own, cluster = w.shared, w.cta.cluster
        for lane in LISTS[m].tolist():
            window, address = divmod(int(w.rows[row][lane]) + offset, 1 << WINDOW)
            shared, clock = own, own.clock[w.index]
            if window:
                shared = cluster.memory(w, window, lane)
                if target >= 0 or expect:
                    raise d.error("of another CTA's mbarrier there is no state, and no expect_tx is modelled")
                clock = own.seen_from(shared, clock)
                mbarrier = shared.far_mbarrier(address, w.cta.cluster_phases)
            else:
                mbarrier = shared.mbarrier(w.index, address)
            if target >= 0:
                w.rows[target][lane] = mbarrier.phase
            if expect:
                shared.expect(mbarrier, int(w.rows[amount][lane]))
            count = 1 if expect or amount < 0 else int(w.rows[amount][lane])
            shared.arrive(mbarrier, count, clock)
        own.release(w.index)

    return arrive


def _wait(d: Decoder, what: str) -> Run:
    """try_wait blocks its warp, but now and then gives up, as the ISA allows; test_wait never blocks."""
    parity = bool(d.take("parity"))
    d.take("acquire", "relaxed")
    d.drop("cta", "cluster", *SHARED_SPACES)
    d.finish(3) if what == "test_wait" else d.finish(3, 4)
    p = d.predicate_target(d.operands[0])
    row, offset = shared_address(d, d.operands[1])
    value = d.source(d.operands[2], "u32" if parity else "b64")
    if len(d.operands) == 4:
        d.source(d.operands[3], "u32")
    give_up = 1.0 if what == "test_wait" else 0.25

    def run(w: Any, m: int) -> Any:
        shared = w.shared
        result = 0
        wait = None
        for place in {
            (int(a), int(v)): None
            for a, v in zip(w.rows[row][LANES[m]].tolist(), w.rows[value][LANES[m]].tolist(), strict=True)
        }:
            mbarrier = shared.mbarrier(w.index, place[0] + offset)
            if parity and place[1] not in (0, 1):
                raise ProtocolError(f"a parity of {place[1]}")
            here = MbarrierWait(w, mbarrier, place[1], parity)
            if not here.ready():
                wait = here
                continue
            if not parity and mbarrier.phase != place[1] + 1:
                raise ProtocolError(f"the state is of phase {place[1]}, neither this one nor the last: {mbarrier}")
            shared.acquire(w.index, mbarrier.released)
            lanes = (w.rows[row] == place[0]) & (w.rows[value] == place[1])
            result |= int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")
        if wait is None or result:
            set_pred(w, p, result, m)
            return None
        if w.machine.random.random() < give_up:
            set_pred(w, p, 0, m)
            w.fragment.pc += 1
            return YIELD
        w.fragment.blocked = wait
        return BLOCKED

    return run


# ---------------------------------------------------------------------- named barriers
class BarrierWait:
    """Ended by SharedMemory.bar_arrive."""

    def __init__(self, w: Any, number: int, told: Callable[[bool], None] | None = None) -> None:
        self.w, self.number, self.told = w, number, told  # told: whether bar.red found it true of any, or of all

    def ready(self) -> bool:
        return False

    def __str__(self) -> str:
        barrier = self.w.shared.barriers[self.number]
        return (
            f"waits at barrier {self.number}: {barrier.arrived} of {barrier.expected} threads have arrived "
            f"(warps {sorted(barrier.warps)})"
        )


class LanesWait:
    """At a bar.warp.sync for lanes that are elsewhere; who comes last takes all on."""

    def __init__(self, mask: int) -> None:
        self.mask = mask

    def ready(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"waits at bar.warp.sync for lanes {self.mask:#010x}"


@decodes("bar", "barrier")
def _bar(d: Decoder) -> Run:
    if d.base == "bar" and d.take("warp"):
        d.need("sync")
        d.finish(1)
        members = d.source(d.operands[0], "b32")

        def warp_sync(w: Any, m: int) -> int | None:
            fragment, mask = w.fragment, int(w.rows[members][only(m)])
            for other in w.fragments:  # who waits for these here goes on with them
                if other is not fragment and other.pc == fragment.pc and isinstance(other.blocked, LanesWait):
                    fragment.mask |= other.mask
                    other.mask = 0
            if mask & w.live & ~fragment.mask:
                fragment.blocked = LanesWait(mask & ~fragment.mask)
                return BLOCKED
            member_mask(w, members, fragment.mask, "bar.warp.sync")
            return None

        return warp_sync
    if d.base == "barrier" and d.take("cluster"):
        return cluster_barrier(d)
    d.drop("cta")
    how = d.need("sync", "arrive", "red")
    sync = how != "arrive"
    operands, told, vote, negated = list(d.operands), -1, -1, 0
    if how == "red":
        how = d.need("or", "and")
        d.type("pred")
        told = d.predicate_target(operands.pop(0))
        vote, negated = d.predicate(operands.pop())
    aligned = bool(d.take("aligned")) or d.base == "bar"
    d.finish(*((3, 4) if vote >= 0 else (1, 2) if sync else (2,)))
    number = d.source(operands[0], "u32")
    threads = d.source(operands[1], "u32") if len(operands) == 2 else -1
    name = d.statement.op

    def run(w: Any, m: int) -> Any:
        if m != w.live or w.live != FULL:
            raise ProtocolError(
                f"{name} by lanes {m:#010x} of a warp of which {w.live:#010x} live: "
                + ("all lanes of a warp execute it" if aligned else "parts of warps are not modelled")
            )
        n = int(w.rows[number][0])
        count = len(w.cta.warps) * 32 if threads < 0 else int(w.rows[threads][0])
        if (w.rows[number] != n).any() or (threads >= 0 and (w.rows[threads] != count).any()):
            raise ProtocolError(f"{name}: the lanes differ in its operands")
        fragment = w.fragment
        said = None
        if vote >= 0:
            value = (w.preds[vote] ^ negated) & FULL
            said = (how, value != 0 if how == "or" else value == FULL)
        if sync:
            tell = (lambda found: set_pred(w, told, FULL if found else 0, FULL)) if vote >= 0 else None
            fragment.blocked = BarrierWait(w, n, tell)
        fragment.pc += 1
        w.shared.bar_arrive(w.index, n, count, fragment if sync else None, threads >= 0, said)
        return BLOCKED if fragment.blocked is not None else YIELD

    return run


# ---------------------------------------------------------------------- fences
@decodes("fence", "membar")
def _fence(d: Decoder) -> Run:
    """Only fence.proxy.async and fence.mbarrier_init have an effect that is checked."""
    if d.base == "membar":
        d.need("cta", "gl", "sys")
        d.finish(0)
        return lambda w, m: None
    if d.take("mbarrier_init"):
        d.need("release")
        d.need("cluster")
        d.finish(0)

        def initialised(w: Any, m: int) -> None:
            for mbarrier in w.shared.mbarriers.values():
                if mbarrier.init_warp == w.index:
                    mbarrier.fenced = True
            w.shared.announce(w.index, w.cta.cluster.phase + bool(w.arrived & m))

        return initialised
    if d.take("proxy"):
        d.need("async")
        space = d.take("global", *SHARED_SPACES)
        d.finish(0)
        if space == "global":
            return lambda w, m: None

        def fence(w: Any, m: int) -> None:
            if w.shared.checks:
                w.shared.fence_async(w.index, m)

        return fence
    d.take("sc", "acq_rel", "acquire", "release")
    d.need(*SCOPES)
    d.finish(0)
    return lambda w, m: None


# ---------------------------------------------------------------------- setmaxnreg
class RegisterWait:
    def __init__(self, w: Any, count: int) -> None:
        self.w, self.count = w, count

    def ready(self) -> bool:
        return bool(self.w.cta.registers_fit(self.w, self.count))

    def __str__(self) -> str:
        return f"waits for {self.count} registers a thread: the warps of the CTA hold {self.w.cta.registers}"


@decodes("setmaxnreg")
def _setmaxnreg(d: Decoder) -> Run:
    d.type("u32")
    more = d.need("inc", "dec") == "inc"
    d.need("sync")
    d.need("aligned")
    d.finish(1)
    count = d.integer(d.operands[0])
    if count % 8 or not 24 <= count <= 256:
        raise d.error("setmaxnreg takes a multiple of 8 from 24 to 256")

    def run(w: Any, m: int) -> Any:
        if m != FULL:
            raise ProtocolError(f"setmaxnreg is .aligned, but only lanes {m:#010x} are here")
        module = w.machine.program.module
        if module.reqntid is None and module.maxntid is None:
            raise ProtocolError("setmaxnreg is ignored without .reqntid or .maxntid")
        cta = w.cta
        held = cta.registers[w.index]
        if (count < held) if more else (count > held):
            raise ProtocolError(f"setmaxnreg.{'inc' if more else 'dec'} to {count} of a warp that has {held} registers")
        if more and not cta.registers_fit(w, count):
            w.fragment.blocked = RegisterWait(w, count)
            return BLOCKED
        cta.registers[w.index] = count
        cta.register_calls.append((w.index, w.fragment.pc))
        return None

    return run


def pack_parameters(module: Any, arguments: list[Any]) -> tuple[Array, dict[int, TensorMap]]:
    """(the bytes of the parameters, tensor maps by address)."""
    if len(arguments) != len(module.parameters):
        raise TypeError(f"{module.name} has {len(module.parameters)} parameters, {len(arguments)} arguments came")
    end = max((p.offset + p.nbytes for p in module.parameters), default=0)
    raw = bytearray(end + 16)
    maps = {}
    for parameter, value in zip(module.parameters, arguments, strict=True):
        if parameter.array != isinstance(value, TensorMap):
            raise TypeError(f"parameter {parameter.name}: {value!r}")
        if isinstance(value, TensorMap):
            maps[PARAM_BASE + parameter.offset] = value
            continue
        if parameter.type in ("f32", "f64"):
            data = struct.pack("<f" if parameter.type == "f32" else "<d", value)
        elif isinstance(value, float):
            raise TypeError(f"parameter {parameter.name} is no floating-point number")
        else:
            data = (int(value) & ((1 << 8 * parameter.nbytes) - 1)).to_bytes(parameter.nbytes, "little")
        raw[parameter.offset : parameter.offset + parameter.nbytes] = data
    return np.frombuffer(bytes(raw), np.uint8), maps
