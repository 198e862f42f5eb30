"""Clusters: barrier.cluster (PTX ISA 9.7.13.4), mapa, and which accesses of CTAs to global memory are ordered.

The CTAs of a cluster know of each other through barrier.cluster and arrivals at each other's mbarriers (data.py): an
arrival publishes what its warp knows, if it is not .relaxed, and the wait of that phase joins it. In each warp's vector
clock (shared.py) stand, from `peers` on, the agents of all CTAs of the cluster; what bar and mbarrier pass on within a
CTA goes on with it. Only so do reads of another CTA's shared memory (ld.shared::cluster) come after its writes and
before its end. Per unit of a writable buffer stand the last write and the last reads. Plain accesses to one unit by two
CTAs, of which one writes, are a Race unless the later one knows of the earlier one; CTAs of two clusters never do.
ld.global.nc may read nothing that the kernel writes. Strong accesses (.relaxed, .acquire, .release, .volatile) and
atomics are not looked at, nor what copies read; what a copy writes is there for others when it has been waited for.
Atomics and fences order nothing here, but in a kernel that has them CTAs of two clusters are not compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .decode import BLOCKED, FULL, LISTS, YIELD, Decoder, Run, decodes
from .errors import MemoryFault, ProtocolError, Race
from .memory import Buffer
from .shared import NEVER, WINDOW, SharedMemory

Array = npt.NDArray[Any]
NOBODY, MANY = -1, -2


class Cluster:
    """The barrier of some CTAs that run concurrently. `ctas` are filled in by the machine, by their rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ctas: list[Any] = []
        self.number = 0
        self.phase = 0
        self.arrived = False  # anybody, in this phase

    def reset(self, number: int) -> None:
        self.number, self.phase, self.arrived = number, 0, False
        shared = self.ctas[0].shared
        self.clock = np.zeros((self.size, shared.slots), np.int32)  # what the arrivals of each CTA publish within it
        self.known = np.zeros(shared.slots - shared.peers, np.int32)  # and to the others
        self.released, self.released_known = self.clock.copy(), self.known.copy()

    def arrive(self, w: Any, mask: int, release: bool) -> None:
        if twice := w.arrived_unwaited & mask:
            raise ProtocolError(
                "barrier.cluster.arrive a second time without barrier.cluster.wait", (twice & -twice).bit_length() - 1
            )
        w.arrived |= mask
        w.arrived_unwaited |= mask
        self.arrived = True
        if release:
            shared, rank = w.shared, w.cta.rank
            own = shared.clock[w.index]
            np.maximum(self.clock[rank], own, out=self.clock[rank])
            if self.size > 1:
                known = own.copy()
                known[shared.part(rank)] = own[: shared.peers]
                np.maximum(self.known, known[shared.peers :], out=self.known)
            shared.release(w.index)
        self.settle()

    def missing(self) -> list[tuple[Any, int]]:
        """(warp, lanes) that live and have not arrived in this phase."""
        return [(w, w.live & ~w.arrived) for cta in self.ctas for w in cta.warps if w.live & ~w.arrived]

    def settle(self) -> None:
        """Ends the phase if all live threads have arrived; called at arrivals and exits."""
        if not self.arrived or any(w.live & ~w.arrived for cta in self.ctas for w in cta.warps):
            return
        for cta in self.ctas:
            for w in cta.warps:
                w.arrived = 0
        self.released, self.released_known = self.clock.copy(), self.known.copy()
        self.phase += 1
        self.arrived = False

    def passed(self, w: Any, mask: int) -> None:
        w.arrived_unwaited &= ~mask
        w.cta.cluster_phases = self.phase
        shared = w.shared
        shared.acquire(w.index, self.released[w.cta.rank])
        if self.size > 1:
            known = shared.clock[w.index, shared.peers :]
            np.maximum(known, self.released_known, out=known)

    def memory(self, w: Any, window: int, lane: int) -> SharedMemory:
        """Of the CTA in whose window of shared::cluster warp w finds an address."""
        rank = w.cta.rank if window == 0 else window - 1
        if not 0 <= rank < self.size:
            raise MemoryFault(f"the shared::cluster address is of rank {rank}, the cluster has {self.size} CTAs", lane)
        cta = self.ctas[rank]
        if not any(other.live for other in cta.warps):
            raise MemoryFault(f"use of the shared memory of CTA {cta.index}, which has exited", lane)
        shared: SharedMemory = cta.shared
        return shared


class ClusterWait:
    def __init__(self, w: Any, mask: int) -> None:
        self.w, self.mask = w, mask

    def ready(self) -> bool:
        return not self.w.arrived & self.mask

    def __str__(self) -> str:
        cluster = self.w.cta.cluster
        missing = cluster.missing()
        places = [
            f"CTA {w.cta.index} warp {w.index}" + ("" if mask == FULL else f" lanes {mask:#010x}")
            for w, mask in missing[:4]
        ]
        more = f" and {len(missing) - 4} warps more" if len(missing) > 4 else ""
        return f"waits for phase {cluster.phase} of barrier.cluster: {', '.join(places)}{more} did not arrive"


def cluster_barrier(d: Decoder) -> Run:
    """Parts of a warp may arrive by themselves if it is not .aligned."""
    arrive = d.need("arrive", "wait") == "arrive"
    release = (d.take("release", "relaxed") if arrive else d.take("acquire")) != "relaxed"
    aligned = d.take("aligned")
    d.finish(0)
    name = d.statement.op

    def run(w: Any, m: int) -> Any:
        if aligned and m != w.live:
            raise ProtocolError(f"{name} by lanes {m:#010x} of a warp of which {w.live:#010x} live: all execute it")
        cluster: Cluster = w.cta.cluster
        if arrive:
            cluster.arrive(w, m, release)
            return YIELD
        if alone := m & ~w.arrived_unwaited:
            raise ProtocolError(f"{name} without barrier.cluster.arrive before it", (alone & -alone).bit_length() - 1)
        if w.arrived & m:
            w.fragment.blocked = ClusterWait(w, m)
            return BLOCKED
        cluster.passed(w, m)
        return None

    return run


@decodes("mapa")
def _mapa(d: Decoder) -> Run:
    d.type("u32")
    d.need("shared::cluster")
    d.finish(3)
    a, b = d.source(d.operands[1], "u32"), d.source(d.operands[2], "u32")
    c = d.destination(d.operands[0], "u32")

    def run(w: Any, m: int) -> None:
        lanes = LISTS[m]
        address, rank = w.rows[a][lanes].astype(np.int64), w.rows[b][lanes].astype(np.int64)
        size = w.cta.cluster.size
        if rank.max() >= size:
            i = int(rank.argmax())
            raise MemoryFault(f"mapa to rank {rank[i]} of a cluster of {size} CTAs", int(lanes[i]))
        w.shared.check(address, 1, lanes)
        w.rows[c][lanes] = np.where(rank == w.cta.rank, address, address | rank + 1 << WINDOW)

    return run


class Shadow:
    """Of one writable buffer; a warp is numbered through the grid, `local` is its number in its cluster."""

    def __init__(self, units: int, locals_: int) -> None:
        self.writer = np.full(units, NOBODY, np.int32)  # warp
        self.write_epoch = np.zeros(units, np.int32)
        self.write_pc = np.zeros(units, np.int32)
        self.constant = np.zeros(units, np.bool_)  # read by ld.global.nc
        self.reader = np.full(units, NOBODY, np.int32)  # cluster, or MANY
        self.read_epoch = np.zeros((locals_, units), np.int32)  # of local warps, of the only cluster that has read


class Watch:
    """Reports races of CTAs through global memory."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.shift: int = machine.program.builder.global_shift
        self.strangers: bool = not machine.program.builder.strong  # compare CTAs of two clusters
        self.warps = machine.threads // 32
        self.span: int = machine.cluster * self.warps
        self.alone = machine.cluster == 1
        self.slots: Array = np.zeros(0, np.int64)  # of local warps, in the clocks
        self.shadows: dict[int, Shadow] = {}

    def known(self, w: Any) -> Array:
        """The epochs of local warps that warp w knows."""
        shared = w.shared
        if not len(self.slots):
            self.slots = (np.arange(shared.peers, shared.slots).reshape(-1, shared.peers)[:, : self.warps]).ravel()
        epochs: Array = shared.clock[w.index, self.slots]
        return epochs

    def shadow(self, buffer: Buffer) -> Shadow:
        found = self.shadows.get(buffer.address)
        if found is None:
            units = buffer.views[1].size >> self.shift
            found = self.shadows[buffer.address] = Shadow(units, 0 if self.alone else self.span)
        return found

    def units(self, place: Array, nbytes: int) -> Array:
        first = place >> self.shift
        count = nbytes >> self.shift
        return first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def agent(self, warp: int) -> str:
        number, index = divmod(warp, self.warps)
        x, y, _ = self.machine.grid
        return f"warp {index} of CTA {(number % x, number // x % y, number // (x * y))}"

    def race(self, buffer: Buffer, lanes: Array, units: Array, bad: Array, message: str) -> Race:
        """`message` with {at} for the place and {writer} for who wrote it, at the first bad unit."""
        i = int(np.flatnonzero(bad)[0])
        unit = int(units[i])
        at = f"{buffer.name}+{(unit << self.shift) - (buffer.address - buffer.base)}"
        shadow = self.shadow(buffer)
        writer = ""
        if shadow.writer[unit] >= 0:
            writer = f"{self.agent(int(shadow.writer[unit]))}, {self.machine.line_of(int(shadow.write_pc[unit]))}"
        return Race(message.format(at=at, writer=writer), int(lanes[i * len(lanes) // len(units)]))

    def after_writes(self, w: Any, buffer: Buffer, lanes: Array, units: Array, writer: Array, what: str) -> None:
        """Raises unless warp w knows of the writes of other CTAs to these units."""
        local = writer - w.cta.cluster.number * self.span
        near = (local >= 0) & (local < self.span)
        if self.strangers:
            bad = (writer >= 0) & ~near
            if bad.any():
                text = "{at} that a CTA of another cluster has written, {writer}"
                raise self.race(buffer, lanes, units, bad, f"{what} of {text}")
        if self.alone:
            return
        known = self.known(w)
        bad = near & (self.shadow(buffer).write_epoch[units] > known[np.where(near, local, 0)])
        if bad.any():
            text = "{at} is not ordered by barrier.cluster after the write by {writer}"
            raise self.race(buffer, lanes, units, bad, f"{what} of {text}")

    def read(self, w: Any, buffer: Buffer, lanes: Array, place: Array, nbytes: int, constant: bool) -> None:
        """A plain read of nbytes a lane; `constant`: ld.global.nc."""
        shadow = self.shadow(buffer)
        units = self.units(place, nbytes)
        writer = shadow.writer[units]
        if constant:
            bad = writer >= 0
            if bad.any():
                raise self.race(buffer, lanes, units, bad, "ld.global.nc of {at}, which this kernel writes: {writer}")
            shadow.constant[units] = True
            return
        if writer.max() >= 0:
            self.after_writes(w, buffer, lanes, units, writer, "read")
        mine = w.cta.cluster.number
        seen = shadow.reader[units]
        shadow.reader[units] = np.where((seen == NOBODY) | (seen == mine), mine, MANY)
        if not self.alone:
            shadow.read_epoch[w.cta.rank * self.warps + w.index, units] = w.shared.clock[w.index, w.index]

    def write(self, w: Any, buffer: Buffer, lanes: Array, place: Array, nbytes: int) -> None:
        shadow = self.shadow(buffer)
        units = self.units(place, nbytes)
        writer = shadow.writer[units]
        if writer.max() >= 0:
            self.after_writes(w, buffer, lanes, units, writer, "write")
        bad = shadow.constant[units]
        if bad.any():
            raise self.race(buffer, lanes, units, bad, "write of {at}, which this kernel reads with ld.global.nc")
        seen = shadow.reader[units]
        if seen.min() != NOBODY or seen.max() != NOBODY:
            mine = w.cta.cluster.number
            bad = (seen != NOBODY) & (seen != mine)
            if self.strangers and bad.any():
                raise self.race(buffer, lanes, units, bad, "write of {at} that a CTA of another cluster has read")
            if not self.alone:
                late = (shadow.read_epoch[:, units] > self.known(w)[:, None]) & (seen == mine)
                if late.any():
                    reader = int(np.flatnonzero(late.any(axis=1))[0])
                    who = self.agent(mine * self.span + reader)
                    text = "write of {at} is not ordered by barrier.cluster after the read by " + who
                    raise self.race(buffer, lanes, units, late[reader], text)
        shadow.writer[units] = w.cta.number * self.warps + w.index
        shadow.write_epoch[units] = w.shared.clock[w.index, w.index]
        shadow.write_pc[units] = w.shared.pc

    def copy_issue(self, w: Any, buffer: Buffer, lane: int, place: int, nbytes: int) -> Array:
        """A bulk copy to device memory; nobody knows of it before it is waited for. Its units."""
        at = np.array([place])
        self.write(w, buffer, np.array([lane]), at, nbytes)
        units = self.units(at, nbytes)
        self.shadow(buffer).write_epoch[units] = NEVER
        return units

    def copy_waited(self, w: Any, buffer: Buffer, units: Array) -> None:
        shadow = self.shadow(buffer)
        mine = units[
            (shadow.writer[units] == w.cta.number * self.warps + w.index) & (shadow.write_epoch[units] == NEVER)
        ]
        shadow.write_epoch[mine] = w.shared.clock[w.index, w.index]
