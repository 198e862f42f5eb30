"""Shared memory with its shadow state: who wrote and read what, when, and what of it is ordered.

Every warp has a vector clock. An agent of it is a warp, the cp.async copies of a warp, or an mbarrier, which stands for
the bulk copies that end its phases. Releases (mbarrier arrivals, bar.sync, bar.arrive) publish a warp's clock, acquires
(a successful wait, the end of bar.sync) join it. Per unit of shared memory (4 bytes, less if the kernel has narrower
accesses) stand the last writer with its epoch, and each warp's last read. An access that is not ordered after what it
meets is a Race (PTX ISA 8, Memory consistency model; 8.x, Proxies; 9.7.13.15, mbarrier). What other CTAs of the cluster
have read and written stands apart, and so do the reads of bulk copies out of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MemoryFault, ProtocolError, Race, Uninitialised
from .parse import SHARED_BASE

Array = npt.NDArray[Any]
Units = Any  # an index array or a slice

NEVER = 2**31 - 1
PENDING, BARRIER, UNWRITTEN, STRONG = 1, 2, 4, 8
MAX_BARRIERS = 256
WINDOW = 24  # a shared::cluster address is (rank + 1) << WINDOW | address, or the address alone in the own CTA


@dataclass
class Mbarrier:
    """PTX ISA 9.7.13.15.1: a phase ends when no arrivals and no bytes are outstanding."""

    address: int
    count: int
    slot: int  # in the vector clocks
    pending: int
    clock: Array  # of the arrivals of this phase
    released: Array  # of the phase before
    fenced: bool = False  # the initialisation is visible to the async proxy
    announced: int = NEVER  # and to other CTAs of the cluster when this phase of barrier.cluster has ended
    init_warp: int = 0
    tx: int = 0
    phase: int = 0
    base: int = 0  # epochs of the slot before this object
    waiters: list[Any] = field(default_factory=list)

    def ended(self, parity: int) -> bool:
        """The phase of this parity is the one that has ended (9.7.13.15.16)."""
        return (self.phase & 1) != (parity & 1)

    def __str__(self) -> str:
        return f"phase {self.phase}, arrivals outstanding {self.pending} of {self.count}, bytes outstanding {self.tx}"


@dataclass
class NamedBarrier:
    expected: int = 0
    counted: bool = True  # by who arrives, in the instruction
    arrived: int = 0
    warps: list[int] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)  # (warp, fragment)
    said: list[tuple[str, bool]] = field(default_factory=list)  # by bar.red: (or | and, of a warp)
    clock: Array | None = None


class SharedMemory:
    def __init__(
        self, nbytes: int, warps: int, unit_shift: int, checks: bool, names: dict[str, int], cluster: int, rank: int
    ) -> None:
        self.size, self.n, self.shift, self.checks, self.names = nbytes, warps, unit_shift, checks, names
        self.cluster, self.rank = cluster, rank
        self.end = SHARED_BASE + nbytes
        padded = (self.end + 1023) & ~1023
        # Index 0 is address 0, so that addresses index the views; the first KiB is never valid.
        self.bytes = np.zeros(padded, np.uint8)
        self.views: dict[int, Array] = {
            1: self.bytes,
            2: self.bytes.view(np.uint16),
            4: self.bytes.view(np.uint32),
            8: self.bytes.view(np.uint64),
        }
        units = padded >> unit_shift
        self.flags = np.zeros(units, np.uint8)
        self.writer = np.zeros(units, np.int16)
        self.write_epoch = np.zeros(units, np.int32)
        self.write_pc = np.zeros(units, np.int32)
        self.fence_epoch = np.zeros(units, np.int32)
        self.read_epoch = np.zeros((warps, units), np.int32)
        self.leaving = np.zeros(units, np.int16)  # bulk copies out of here that have not been waited for
        self.peers = 2 * warps + MAX_BARRIERS  # from here on, as many slots of each CTA of the cluster
        self.slots = self.peers * (1 + cluster if cluster > 1 else 1)
        self.clock = np.zeros((warps, self.slots), np.int32)
        # The agent whose clock says that a write has been fenced: the warp itself for its cp.async copies.
        self.fence_slot = np.arange(self.slots, dtype=np.int16)
        self.fence_slot[warps : 2 * warps] -= warps
        self.pc = 0  # of the running instruction
        self.mask = 0  # and its lanes
        self.line_of: Any = None
        self.reset()

    def reset(self) -> None:
        self.bytes.fill(0xFF)  # NaN in every format
        self.flags.fill(UNWRITTEN)
        self.writer.fill(0)
        self.write_epoch.fill(0)
        self.fence_epoch.fill(0)
        self.read_epoch.fill(0)
        self.clock.fill(0)
        self.clock[np.arange(self.n), np.arange(self.n)] = 1
        self.clock[:, self.part(self.rank)] = NEVER  # within a CTA, global memory is not looked at
        self.far_epoch: Array | None = None  # [rank, warp, unit] of accesses by other CTAs, when there is one
        self.leaving.fill(0)
        self.copies_out = 0
        self.dirty: list[dict[int, list[Units]]] = [{} for _ in range(self.n)]  # by lanes: writes to fence
        self.proxy_clock = np.zeros_like(self.clock)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.slot_of: dict[int, tuple[int, int]] = {}
        self.barriers = [NamedBarrier() for _ in range(16)]

    # ------------------------------------------------------------------ addresses
    def part(self, rank: int) -> slice:
        """The slots of a CTA of the cluster in the clocks of all."""
        return slice(self.peers * (1 + rank), self.peers * (2 + rank))

    def name(self, address: int) -> str:
        if address >> WINDOW > 0:
            return f"{self.name(address & ((1 << WINDOW) - 1))} of rank {(address >> WINDOW) - 1} of the cluster"
        for name, base in sorted(self.names.items(), key=lambda x: -x[1]):
            if address >= base:
                return f"{name}+{address - base}"
        return f"{address:#x}"

    def check(self, addresses: Array, nbytes: int, lanes: Array) -> None:
        """Bounds and alignment of one access per lane."""
        low, high = int(addresses.min()), int(addresses.max())
        if low < SHARED_BASE or high + nbytes > self.end:
            i = int(np.flatnonzero((addresses < SHARED_BASE) | (addresses + nbytes > self.end))[0])
            raise MemoryFault(
                f"shared address {self.name(int(addresses[i]))} ({nbytes} bytes) is outside the {self.size} bytes",
                int(lanes[i]),
            )
        if nbytes > 1 and (addresses & (nbytes - 1)).any():
            i = int(np.flatnonzero(addresses & (nbytes - 1))[0])
            raise MemoryFault(
                f"shared address {self.name(int(addresses[i]))} is not a multiple of {nbytes}", int(lanes[i])
            )

    def range(self, address: int, nbytes: int, align: int) -> slice:
        if address < SHARED_BASE or address + nbytes > self.end:
            raise MemoryFault(f"shared {self.name(address)} + {nbytes} bytes is outside the {self.size} bytes")
        if address % align:
            raise MemoryFault(f"shared {self.name(address)} is not a multiple of {align}")
        return slice(address >> self.shift, (address + nbytes + (1 << self.shift) - 1) >> self.shift)

    def units(self, addresses: Array, nbytes: int) -> Units:
        """The units of one access of nbytes per address."""
        first = addresses >> self.shift
        count = nbytes >> self.shift
        if count <= 1:
            return first
        return (first[:, None] + np.arange(count)).ravel()

    # ------------------------------------------------------------------ who and where, for messages
    def place(self, units: Units, bad: Array) -> tuple[int, int]:
        """The first offending unit and its index among `units`."""
        i = int(np.flatnonzero(bad)[0])
        unit = units.start + i if isinstance(units, slice) else int(np.asarray(units).ravel()[i])
        return unit, i

    def agent(self, slot: int) -> str:
        if slot < self.n:
            return f"warp {slot}"
        if slot < 2 * self.n:
            return f"a cp.async of warp {slot - self.n}"
        if slot >= self.peers:
            rank, warp = divmod(slot - self.peers, self.peers)
            return f"warp {warp} of rank {rank} of the cluster"
        for address, (other, _) in self.slot_of.items():
            if other == slot:
                return f"a bulk copy on mbarrier {self.name(address)}"
        return "a bulk copy"

    def written(self, unit: int) -> str:
        where = f", {self.line_of(int(self.write_pc[unit]))}" if self.line_of else ""
        return f"{self.name(unit << self.shift)}, last written by {self.agent(int(self.writer[unit]))}{where}"

    def bad_flags(self, units: Units, flags: Array, what: str) -> None:
        for flag in (PENDING, BARRIER, STRONG, UNWRITTEN):
            bad = (flags & flag) != 0
            if not bad.any():
                continue
            unit, _ = self.place(units, bad)
            name = self.name(unit << self.shift)
            if flag == PENDING:
                raise Race(f"{what} of {name} while an asynchronous copy writes it: {self.written(unit)}")
            if flag == BARRIER:
                raise ProtocolError(f"{what} of {name}, which holds an mbarrier")
            if flag == STRONG:
                raise Race(f"{what} of {name}, which others access strongly, in no order with it")
            raise Uninitialised(f"{what} of {name}, which nothing has written yet")

    # ------------------------------------------------------------------ accesses
    def ordered_read(self, w: int, units: Units, what: str) -> Array:
        flags = self.flags[units]
        if flags.any():
            self.bad_flags(units, flags, what)
        writer: Array = self.writer[units]
        bad = self.write_epoch[units] > self.clock[w][writer]
        if bad.any():
            unit, _ = self.place(units, bad)
            raise Race(f"{what} is not ordered after the write of {self.written(unit)}")
        return writer

    def read(self, w: int, units: Units) -> None:
        """An ordinary read by warp w."""
        self.ordered_read(w, units, "read")
        self.read_epoch[w, units] = self.clock[w, w]

    def ordered_write(self, clock: Array, units: Units, what: str) -> None:
        """By who knows what is in `clock`."""
        flags = self.flags[units] & (PENDING | BARRIER | STRONG)
        if flags.any():
            self.bad_flags(units, flags, what)
        bad = self.write_epoch[units] > clock[self.writer[units]]
        if bad.any():
            unit, _ = self.place(units, bad)
            raise Race(f"{what} is not ordered after the write of {self.written(unit)}")
        bad = self.read_epoch[:, units] > clock[: self.n, None]
        if bad.any():
            reader = int(np.flatnonzero(bad.any(axis=1))[0])
            unit, _ = self.place(units, bad[reader])
            if self.read_epoch[reader, unit] == NEVER:
                raise Race(
                    f"{what} of {self.name(unit << self.shift)} while a wgmma of warp {reader} reads it that has not "
                    "been waited for"
                )
            raise Race(f"{what} of {self.name(unit << self.shift)} is not ordered after the read by warp {reader}")
        if self.copies_out and (leaving := self.leaving[units] != 0).any():
            unit, _ = self.place(units, leaving)
            raise Race(f"{what} of {self.name(unit << self.shift)} while a bulk copy reads it that was not waited for")
        if self.far_epoch is not None:
            late = self.far_epoch[:, :, units] > self.far_known(clock)[:, :, None]
            if late.any():
                rank, reader = np.argwhere(late.any(axis=2))[0].tolist()
                unit, _ = self.place(units, late[rank, reader])
                raise Race(
                    f"{what} of {self.name(unit << self.shift)} is not ordered by barrier.cluster after the access by "
                    f"warp {reader} of rank {rank} of the cluster"
                )

    def strong(self, units: Units) -> None:
        """A strong access, of units that have no others."""
        if (flags := self.flags[units] & (PENDING | BARRIER)).any():
            self.bad_flags(units, flags, "a strong access")
        if ((flags := self.flags[units]) == 0).any():
            unit, _ = self.place(units, flags == 0)
            raise Race(f"strong and other accesses to {self.name(unit << self.shift)}")
        self.flags[units] = STRONG

    def write(self, w: int, units: Units) -> None:
        """An ordinary (generic proxy) write by warp w."""
        self.ordered_write(self.clock[w], units, "write")
        self.flags[units] = 0
        self.writer[units] = w
        self.write_epoch[units] = self.clock[w, w]
        self.write_pc[units] = self.pc
        self.fence_epoch[units] = NEVER
        self.soil(w, units)

    def soil(self, w: int, units: Units) -> None:
        dirty = self.dirty[w].setdefault(self.mask, [])
        dirty.append(units)
        if len(dirty) > 512:
            self.dirty[w][self.mask] = [np.unique(np.concatenate(dirty))]

    def announce(self, w: int, phase: int) -> None:
        """fence.mbarrier_init.release.cluster by warp w, which then arrives in this phase of barrier.cluster."""
        for mbarrier in self.mbarriers.values():
            if mbarrier.init_warp == w:
                mbarrier.announced = min(mbarrier.announced, phase)

    def fence_async(self, w: int, mask: int) -> None:
        """fence.proxy.async by lanes of warp w: what they wrote so far is visible to the async proxy (9.7.13.4)."""
        now = self.clock[w, w]
        for lanes in [x for x in self.dirty[w] if not x & ~mask]:
            for units in self.dirty[w].pop(lanes):
                mine = units[(self.writer[units] == w) & (self.fence_epoch[units] == NEVER)]
                self.fence_epoch[mine] = now
        self.proxy_clock[w] = self.clock[w]
        for mbarrier in self.mbarriers.values():
            if mbarrier.init_warp == w:
                mbarrier.fenced = True

    def fenced(self, proxy: Array, units: Units, writer: Array, clock: Array, what: str) -> None:
        """Ordinary writes that the async proxy meets lie behind the writer's proxy fence; after cp.async, anyone's.

        proxy: what was known at the last such fence of who is at work here."""
        bad = self.fence_epoch[units] > clock[self.fence_slot[writer]]
        if bad.any():
            copied = (writer >= self.n) & (writer < 2 * self.n) & (self.write_epoch[units] <= proxy[writer])
            bad &= ~copied
            if bad.any():
                unit, _ = self.place(units, bad)
                raise Race(f"{what} without fence.proxy.async, not fenced after the write of {self.written(unit)}")

    def async_write(self, clock: Array, proxy: Array, units: Units, slot: int) -> None:
        """A bulk copy issued by who knows `clock`: from here to its end nothing may touch the bytes."""
        self.ordered_write(clock, units, "asynchronous copy")
        self.fenced(proxy, units, self.writer[units], clock, "asynchronous copy")
        self.flags[units] = PENDING
        self.writer[units] = slot
        self.write_pc[units] = self.pc
        self.fence_epoch[units] = 0

    def async_done(self, units: Units, slot: int, epoch: int) -> None:
        self.flags[units] = 0
        self.writer[units] = slot
        self.write_epoch[units] = epoch

    def copy_issue(self, w: int, units: Units) -> None:
        """cp.async (not bulk): the generic proxy, but nothing may touch the bytes until it is complete."""
        self.ordered_write(self.clock[w], units, "cp.async")
        self.flags[units] = PENDING
        self.writer[units] = self.n + w
        self.write_pc[units] = self.pc
        self.fence_epoch[units] = NEVER

    def copy_waited(self, w: int, units: Units) -> None:
        """The issuing warp has waited for its copies: they count as its own writes from now on."""
        mine = units[self.writer[units] == self.n + w]
        self.writer[mine] = w
        self.write_epoch[mine] = self.clock[w, w]
        self.soil(w, mine)

    def wgmma_read(self, w: int, units: Units) -> None:
        writer = self.ordered_read(w, units, "wgmma's read")
        self.fenced(self.proxy_clock[w], units, writer, self.clock[w], "wgmma's read")
        self.read_epoch[w, units] = NEVER

    def bulk_read(self, w: int, units: Units) -> None:
        """A bulk copy out of shared memory, issued by warp w: until it is waited for nothing may write the bytes."""
        writer = self.ordered_read(w, units, "bulk copy's read")
        self.fenced(self.proxy_clock[w], units, writer, self.clock[w], "bulk copy's read")
        self.leaving[units] += 1
        self.copies_out += 1

    def bulk_waited(self, w: int, units: Units) -> None:
        self.leaving[units] -= 1
        self.copies_out -= 1
        self.read_epoch[w, units] = np.maximum(self.read_epoch[w, units], self.clock[w, w])

    # ------------------------------------------------------------------ accesses by other CTAs of the cluster
    def far_read(self, reader: SharedMemory, w: int, units: Units) -> None:
        """By warp w of the CTA of `reader`; what that knows of us, barrier.cluster has told it."""
        flags = self.flags[units]
        if flags.any():
            self.bad_flags(units, flags, f"read by rank {reader.rank} of the cluster")
        bad = self.write_epoch[units] > reader.seen_from(self, reader.clock[w])[self.writer[units]]
        if bad.any():
            unit, _ = self.place(units, bad)
            raise Race(
                f"read of rank {self.rank} of the cluster is not ordered by barrier.cluster after the write of "
                + self.written(unit)
            )
        self.far_access(reader, w, units)

    def far_write(self, writer: SharedMemory, w: int, units: Units) -> None:
        """The same of a write. No fence of the writer's is modelled after which the async proxy could meet it here."""
        what = f"write by rank {writer.rank} of the cluster"
        self.ordered_write(writer.seen_from(self, writer.clock[w]), units, what)
        self.flags[units] = 0
        self.writer[units] = self.part(writer.rank).start + w
        self.write_epoch[units] = writer.clock[w, w]
        self.write_pc[units] = writer.pc
        self.fence_epoch[units] = NEVER
        self.far_access(writer, w, units)

    def far_access(self, other: SharedMemory, w: int, units: Units) -> None:
        if self.far_epoch is None:
            self.far_epoch = np.zeros((self.cluster, self.n, len(self.flags)), np.int32)
        self.far_epoch[other.rank, w, units] = other.clock[w, w]

    def far_known(self, clock: Array) -> Array:
        """[rank, warp] of a clock."""
        return clock[self.peers :].reshape(self.cluster, self.peers)[:, : self.n]

    def go(self) -> None:
        """The memory goes with its CTA, which ends after all that its warps know of."""
        if self.far_epoch is None:
            return
        late = self.far_epoch.max(axis=2) > self.far_known(self.clock.max(axis=0))
        if late.any():
            rank, reader = np.argwhere(late)[0].tolist()
            unit = int(self.far_epoch[rank, reader].argmax())
            raise ProtocolError(
                f"the end of the CTA is not ordered by barrier.cluster after the access to "
                f"{self.name(unit << self.shift)} by warp {reader} of rank {rank} of the cluster"
            )

    # ------------------------------------------------------------------ clocks
    def seen_from(self, other: SharedMemory, clock: Array) -> Array:
        """A clock of this CTA's in the slots of another's of the cluster."""
        if other is self:
            return clock
        known = clock.copy()
        known[self.part(self.rank)] = clock[: self.peers]
        known[: self.peers] = known[other.part(other.rank)]
        known[other.part(other.rank)] = 0  # the other's clocks have NEVER there already
        return known

    def far_mbarrier(self, address: int, phase: int) -> Mbarrier:
        """Of this CTA, used by another of the cluster, which has waited for so many phases of barrier.cluster."""
        mbarrier = self.mbarrier(None, address)
        if mbarrier.announced >= phase:
            raise ProtocolError(
                f"mbarrier {self.name(address)} of rank {self.rank} of the cluster is used by another CTA, but after "
                "its init no fence.mbarrier_init.release.cluster and barrier.cluster came"
            )
        return mbarrier

    def release(self, w: int) -> None:
        self.clock[w, w] += 1

    def acquire(self, w: int, clock: Array) -> None:
        np.maximum(self.clock[w], clock, out=self.clock[w])

    # ------------------------------------------------------------------ mbarriers
    def mbarrier_init(self, w: int, address: int, count: int) -> None:
        units = self.range(address, 8, 8)
        if address in self.mbarriers:
            raise ProtocolError(f"mbarrier.init of {self.name(address)}, which is a live mbarrier")
        if not 1 <= count < 2**20:
            raise ProtocolError(f"mbarrier count {count}")
        index = np.arange(units.start, units.stop)
        if self.checks:
            self.write(w, index)
        slot, base = self.slot_of.get(address, (2 * self.n + len(self.slot_of), 0))
        if slot >= self.peers:
            raise ProtocolError(f"more than {MAX_BARRIERS} mbarriers are not modelled")
        self.slot_of[address] = slot, base
        self.flags[units] = BARRIER
        empty = np.zeros(self.slots, np.int32)
        self.mbarriers[address] = Mbarrier(address, count, slot, count, empty, empty.copy(), init_warp=w, base=base)

    def mbarrier_invalidate(self, w: int, address: int) -> None:
        mbarrier = self.mbarrier(w, address)
        self.slot_of[address] = mbarrier.slot, mbarrier.base + mbarrier.phase + 1
        del self.mbarriers[address]
        self.flags[self.range(address, 8, 8)] = 0

    def mbarrier(self, w: int | None, address: int) -> Mbarrier:
        mbarrier = self.mbarriers.get(address)
        if mbarrier is None:
            self.range(address, 8, 8)
            raise ProtocolError(f"{self.name(address)} is used as an mbarrier before mbarrier.init")
        if w is not None and self.checks:
            unit = address >> self.shift
            if self.write_epoch[unit] > self.clock[w, self.writer[unit]]:
                raise ProtocolError(
                    f"mbarrier {self.name(address)} is used by warp {w} without a barrier after its mbarrier.init by "
                    f"warp {mbarrier.init_warp}"
                )
        return mbarrier

    def arrive(self, mbarrier: Mbarrier, count: int, clock: Array) -> None:
        if count < 1 or count > mbarrier.pending:
            raise ProtocolError(
                f"{count} arrivals at mbarrier {self.name(mbarrier.address)}: more than it counts ({mbarrier})"
            )
        mbarrier.pending -= count
        np.maximum(mbarrier.clock, clock, out=mbarrier.clock)
        self.settle(mbarrier)

    def expect(self, mbarrier: Mbarrier, nbytes: int) -> None:
        mbarrier.tx += nbytes
        if abs(mbarrier.tx) >= 2**20:
            raise ProtocolError(
                f"the transaction count of mbarrier {self.name(mbarrier.address)} overflows: {mbarrier}"
            )

    def settle(self, mbarrier: Mbarrier) -> None:
        """Ends the phase if nothing is outstanding."""
        if mbarrier.pending:
            return
        if mbarrier.tx < 0:
            raise ProtocolError(
                f"mbarrier {self.name(mbarrier.address)}: copies brought {-mbarrier.tx} bytes more than were expected"
            )
        if mbarrier.tx:
            return
        mbarrier.released = mbarrier.clock
        mbarrier.phase += 1
        mbarrier.released[mbarrier.slot] = mbarrier.base + mbarrier.phase
        mbarrier.clock = np.zeros(self.slots, np.int32)
        mbarrier.pending = mbarrier.count

    # ------------------------------------------------------------------ named barriers (9.7.13.1)
    def bar_arrive(
        self,
        w: int,
        number: int,
        threads: int,
        waiting: Any,
        counted: bool = True,
        said: tuple[str, bool] | None = None,
    ) -> bool:
        """One warp arrives; True when that completes the barrier and wakes those who wait. `counted`: it says of how
        many threads; of all of a CTA it may not, but then nobody may: an H200 calls it an illegal instruction. `said`:
        by a bar.red, whether it was true of any lane, or of all."""
        if not 0 <= number < 16:
            raise ProtocolError(f"barrier {number}: there are 16")
        if threads % 32 or not 0 < threads <= 1024:
            raise ProtocolError(f"barrier {number}: a count of {threads} threads is no multiple of a warp")
        barrier = self.barriers[number]
        if barrier.arrived and barrier.expected != threads:
            raise ProtocolError(
                f"barrier {number}: {threads} threads here, {barrier.expected} for those who came before"
            )
        if barrier.arrived and barrier.counted != counted:
            raise ProtocolError(f"barrier {number}: with a count of threads here, without one there")
        barrier.counted = counted
        if barrier.arrived and ({how for how, _ in barrier.said} or {None}) != {said[0] if said else None}:
            raise ProtocolError(f"barrier {number}: a bar.red of one kind here, not there")
        barrier.said += [said] if said else []
        if w in barrier.warps:
            raise ProtocolError(f"barrier {number}: warp {w} arrives a second time before the barrier is complete")
        barrier.expected = threads
        barrier.arrived += 32
        barrier.warps.append(w)
        barrier.clock = self.clock[w].copy() if barrier.clock is None else np.maximum(barrier.clock, self.clock[w])
        self.release(w)
        if waiting is not None:
            barrier.waiting.append((w, waiting))
        if barrier.arrived < threads:
            return False
        for warp, fragment in barrier.waiting:
            self.acquire(warp, barrier.clock)
            if barrier.said:
                fragment.blocked.told((any if barrier.said[0][0] == "or" else all)(found for _, found in barrier.said))
            fragment.blocked = None
        self.barriers[number] = NamedBarrier()
        return True
