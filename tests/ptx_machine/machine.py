"""The machine: warps of 32 lanes in lockstep with reconvergence at the lowest pc, CTAs, and a random scheduler."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from . import data as _data  # registers its instructions
from .cluster import Cluster, Watch
from .decode import DECODERS, FULL, LANE, LISTS, Builder, Decoder, Run
from .errors import Deadlock, MachineError, ProtocolError, PtxError, Race, Uninitialised
from .memory import Memory
from .parse import SHARED_BASE, Module, Parser
from .shared import SharedMemory
from .wgmma import ACCUMULATOR, Issued, Operands

Array = npt.NDArray[Any]
FILE_TYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class Instruction:
    run: Run
    guard: int  # register of the predicate, or -1
    invert: int  # FULL if the guard is negated
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    line: int
    text: str
    op: str


@dataclass
class Program:
    module: Module
    builder: Builder
    code: list[Instruction]


@dataclass
class Statistics:
    """What ran. Bytes and FLOPs are of the whole grid; a wgmma counts once a warpgroup."""

    instructions: dict[str, int] = field(default_factory=dict)
    wgmmas: int = 0
    flops: int = 0
    tma_bytes: int = 0
    asked: int = 0  # boxes that the L2 was asked for
    global_read: int = 0  # by threads and copies
    global_written: int = 0
    wgmma_shared_bytes: int = 0  # A and B operands of wgmma, as if nothing were reused
    conflicts: dict[str, list[int]] = field(default_factory=dict)  # op → [executed, wavefronts, least wavefronts]
    registers: dict[int, int] = field(default_factory=dict)  # warpgroup → registers a thread at its end
    register_budget: int = 0  # registers a thread at launch
    ctas: int = 0
    steps: int = 0
    seconds: float = 0.0

    def ways(self, op: str) -> float:
        """How many times as many wavefronts as without bank conflicts."""
        _, waves, least = self.conflicts[op]
        return waves / least


def parse(text: str) -> Program:
    """PTX text with one entry → a program. Whatever is not modelled is a PtxError."""
    module = Parser(text).parse()
    builder = Builder(module)
    code = []
    for statement in module.statements:
        decoder = Decoder(builder, statement)
        function = DECODERS.get(decoder.base)
        if function is None:
            raise decoder.error(f"instruction {decoder.base} is not modelled")
        run = function(decoder)
        guard = statement.guard.index if statement.guard else -1
        invert = FULL if statement.negate else 0
        sources, targets = tuple(decoder.sources), tuple(decoder.targets)
        code.append(Instruction(run, guard, invert, sources, targets, statement.line, statement.text, statement.op))
    if not code:
        raise PtxError("the entry has no instructions")
    return Program(module, builder, code)


class Fragment:
    """Lanes of a warp that are at one pc."""

    __slots__ = ("blocked", "mask", "pc")

    def __init__(self, pc: int, mask: int) -> None:
        self.pc, self.mask = pc, mask
        self.blocked: Any = None

    def ready(self) -> bool:
        if self.blocked is None:
            return True
        if self.blocked.ready():
            self.blocked = None
            return True
        return False


class Warp:
    def __init__(self, cta: Cta, index: int) -> None:
        self.cta, self.machine, self.index, self.shared = cta, cta.machine, index, cta.shared
        module, builder = self.machine.program.module, self.machine.program.builder
        self.files = {w: np.zeros((max(1, module.rows.get(w, 0)), 32), t) for w, t in FILE_TYPES.items()}
        self.special: dict[str, list[Array]] = {}
        self.rows: list[Array] = []
        for kind, key, dtype in builder.views:
            if kind == "constant":
                row = key
            elif kind == "special":
                row = np.zeros(32, dtype)
                self.special.setdefault(key, []).append(row)
            else:
                row = self.files[key.width][key.row].view(dtype)[:: key.width // (8 * dtype.itemsize)]
            self.rows.append(row)
        n = len(module.registers)
        self.preds = [0] * n
        self.written = [0] * n
        self.wrote = [-1] * n  # the number of wgmma.fences before the last ordinary write
        self.read = [-1] * n  # and read
        self.reset()

    def reset(self) -> None:
        n = len(self.written)
        self.written[:] = [0] * n
        self.wrote[:] = [-1] * n
        self.read[:] = [-1] * n
        self.live = FULL
        self.fragments = [Fragment(0, FULL)]
        self.fragment = self.fragments[0]
        self.fences = 0
        self.locked: dict[int, int] = {}
        self.groups: list[list[Issued]] = []
        self.open_group: list[Issued] = []
        self.wgmma_serial = 0
        self.copy_groups: list[list[Any]] = []
        self.open_copies: list[Any] = []
        self.copy_serial = 0
        self.bulk_open: dict[int, list[Any]] = {}  # by lanes: bulk copies out of shared memory that are in no group
        self.bulk_groups: dict[int, list[list[Any]]] = {}
        self.waited = 0  # lanes, for the grid before
        self.arrived = 0  # lanes, at barrier.cluster in its phase
        self.arrived_unwaited = 0  # in any phase, without a wait since
        thread = self.index * 32 + LANE
        x, y, z = self.cta.index
        gx, gy, gz = self.machine.grid
        size = self.machine.cluster
        values: dict[str, Any] = {
            "%tid.x": thread, "%ntid.x": self.machine.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z, "%nctaid.x": gx, "%nctaid.y": gy, "%nctaid.z": gz,
            "%clusterid.x": x // size, "%clusterid.y": y, "%clusterid.z": z,
            "%nclusterid.x": gx // size, "%nclusterid.y": gy, "%nclusterid.z": gz,
            "%cluster_ctaid.x": self.cta.rank, "%cluster_ctarank": self.cta.rank,
            "%cluster_nctaid.x": size, "%cluster_nctaid.y": 1, "%cluster_nctaid.z": 1, "%cluster_nctarank": size,
            "%laneid": LANE, "%warpid": self.index, "%nwarpid": self.machine.threads // 32, "%nsmid": gx - gx // 3,
            "%lanemask_eq": 1 << LANE, "%lanemask_lt": (1 << LANE) - 1, "%lanemask_le": (2 << LANE) - 1,
            "%lanemask_gt": FULL - ((2 << LANE) - 1), "%lanemask_ge": FULL - ((1 << LANE) - 1),
            "%dynamic_smem_size": self.machine.smem_bytes, "%total_smem_size": self.shared.size,
        }  # fmt: skip
        for name, rows in self.special.items():
            for row in rows:
                np.copyto(row, values.get(name, 0), "unsafe")

    def shut(self) -> frozenset[str] | None:
        """Buffers that this warp may not touch yet; None: all."""
        return self.machine.dependent if self.waited & self.live != self.live else frozenset()

    # ------------------------------------------------------------------ divergence
    def split(self, pc: int, mask: int) -> None:
        """The lanes of `mask` go to pc; the others stay in the running fragment."""
        self.fragment.mask &= ~mask
        self.fragments.append(Fragment(pc, mask))

    def leave(self, mask: int) -> None:
        self.live &= ~mask
        self.fragment.mask &= ~mask
        if self.cta.cluster.arrived:
            self.cta.cluster.settle()
        if not self.live and (self.groups or self.open_group):
            raise ProtocolError("the warp exits with wgmmas that were not committed and waited for")
        if self.bulk_open or self.bulk_groups:
            self.no_bulk_reads(mask)
        if not self.fragment.mask:
            self.fragments.remove(self.fragment)
        else:
            self.fragment.pc += 1

    def no_bulk_reads(self, mask: int) -> None:
        """Shared memory stays until bulk copies have read it: threads that exit have waited for that."""
        for lane in LISTS[mask].tolist():
            if left := self.bulk_open.get(lane):
                raise ProtocolError(f"the thread exits with a bulk copy that was not committed: {left[0].line}", lane)
            if left := [c for group in self.bulk_groups.get(lane, []) for c in group if not c.free]:
                raise ProtocolError(f"the thread exits with a bulk copy that was not waited for: {left[0].line}", lane)

    def choose(self) -> bool:
        """Merges lanes that have met and takes the ready fragment of the lowest pc; False: none is ready."""
        fragments = self.fragments
        if len(fragments) > 1:
            at: dict[int, Fragment] = {}
            for fragment in fragments:
                if fragment.blocked is None:
                    other = at.get(fragment.pc)
                    if other is not None:
                        other.mask |= fragment.mask
                        fragment.mask = 0
                    else:
                        at[fragment.pc] = fragment
            self.fragments = fragments = sorted((f for f in fragments if f.mask), key=lambda f: f.pc)
        for fragment in fragments:
            if fragment.ready():
                self.fragment = fragment
                return True
        return False

    def uninitialised(self, register: int) -> None:
        name = self.machine.program.module.registers[register].name
        missing = self.fragment.mask & ~self.written[register]
        raise Uninitialised(f"{name} is read before it is written", (missing & -missing).bit_length() - 1)


class Cta:
    """A slot for one CTA; its arrays serve one CTA after another."""

    def __init__(self, machine: Machine, cluster: Cluster) -> None:
        self.machine, self.cluster, self.rank = machine, cluster, len(cluster.ctas)
        cluster.ctas.append(self)
        self.index = (0, 0, 0)
        self.number = 0
        module = machine.program.module
        warps = machine.threads // 32
        self.shared = SharedMemory(
            module.static_bytes + machine.smem_bytes,
            warps,
            machine.program.builder.unit_shift,
            machine.checks,
            module.shared,
            machine.cluster,
            self.rank,
        )
        self.shared.line_of = machine.line_of
        self.warps = [Warp(self, i) for i in range(warps)]
        self.pending: list[Any] = []

    def start(self, index: tuple[int, int, int], rng: random.Random) -> None:
        self.index = index
        gx, gy, _ = self.machine.grid
        self.number = index[0] + gx * (index[1] + gy * index[2])
        self.shared.reset()
        self.cluster_phases = 0  # of barrier.cluster, whose end one of its warps has waited for
        self.pending = []
        self.wgmma_log: dict[int, list[tuple[Any, ...]]] = {}
        self.registers = [self.machine.register_budget] * len(self.warps)
        self.register_calls: list[tuple[int, int]] = []
        for warp in self.warps:
            warp.reset()
        self.weights = [rng.choice((1, 1, 1, 10)) for _ in self.warps]
        self.completion = rng.choice((0.02, 0.2, 0.9))

    def registers_fit(self, w: Warp, count: int) -> bool:
        return sum(self.registers) - self.registers[w.index] + count <= self.machine.register_budget * len(self.warps)

    def finish(self) -> None:
        """What must hold when all warps have left."""
        try:
            for group in range(0, len(self.warps), 4):
                calls = [[pc for w, pc in self.register_calls if w == i] for i in range(group, group + 4)]
                if any(c != calls[0] for c in calls[: len(self.warps) - group]):
                    raise ProtocolError(f"setmaxnreg is not executed alike by the warps of warpgroup {group // 4}")
                self.machine.statistics.registers[group // 4] = self.registers[group]
            for group_index, log in self.wgmma_log.items():
                for warp in self.warps[4 * group_index : 4 * group_index + 4]:
                    if warp.wgmma_serial != len(log):
                        raise ProtocolError(f"warp {warp.index} executed fewer wgmmas than its warpgroup")
            if self.pending:
                raise ProtocolError("the CTA ends with an asynchronous copy under way that nothing waited for")
            self.shared.go()
        except MachineError as error:
            error.place(self.index, None, 0, "(end of the CTA)")
            raise


class Machine:
    def __init__(
        self, program: Program, grid: tuple[int, int, int], threads: int, memory: Memory, smem_bytes: int, checks: bool,
        cluster: int, dependent: frozenset[str] | None, truthful: bool,
    ) -> None:  # fmt: skip
        self.program, self.grid, self.threads, self.memory = program, grid, threads, memory
        self.dependent, self.waited, self.truthful = dependent, False, truthful
        self.asked: set[tuple[int, int, int]] = set()  # of the L2: (tensor map, column, row) of boxes
        self.copied: set[tuple[int, int, int]] = set()
        self.smem_bytes, self.checks, self.cluster = smem_bytes, checks, cluster
        self.watch = Watch(self) if checks else None
        self.statistics = Statistics()
        self.operands = Operands(program.builder.unit_shift)
        self.counts = [0] * len(program.code)
        self.steps = 0
        self.random = random.Random(0)
        self.parameters: Array = np.zeros(0, np.uint8)
        self.maps: dict[int, Any] = {}
        module = program.module
        budget = module.max_registers or 65536 // (threads * module.min_ctas) // 8 * 8
        self.register_budget = min(budget, 255 if module.max_registers else 248)

    def line_of(self, pc: int) -> str:
        return f"line {self.program.code[pc].line}: {self.program.code[pc].text}"

    def burst(self, w: Warp, limit: int) -> None:
        """Runs up to `limit` instructions of a warp."""
        self.memory.shut = w.shut()
        code, counts = self.program.code, self.counts
        written, wrote, read, preds, locked = w.written, w.wrote, w.read, w.preds, w.locked
        shared = w.shared
        f = w.fragment
        while limit > 0:
            limit -= 1
            pc = f.pc
            i = code[pc]
            m = f.mask
            counts[pc] += 1
            guard = i.guard
            if guard >= 0:
                if written[guard] & m != m:
                    w.uninitialised(guard)
                m &= preds[guard] ^ i.invert
                if not m:
                    f.pc = pc + 1
                    if len(w.fragments) > 1:
                        if not w.choose():
                            return
                        f = w.fragment
                    continue
            if locked:
                for s in i.sources:
                    if locked.get(s) == ACCUMULATOR:
                        raise Race(f"{self.register(s)} is read while a wgmma that has not been waited for writes it")
                for s in i.targets:
                    if s in locked:
                        raise Race(f"{self.register(s)} is written while a wgmma that has not been waited for uses it")
            fences = w.fences
            for s in i.sources:
                if written[s] & m != m:
                    w.uninitialised(s)
                read[s] = fences
            shared.pc, shared.mask = pc, m
            result = i.run(w, m)
            for s in i.targets:
                written[s] |= m
                wrote[s] = fences
            if result is None:
                f.pc = pc + 1
                if len(w.fragments) == 1:
                    continue
            elif result == 2:  # BLOCKED
                if not w.choose():
                    return
                f = w.fragment
                continue
            elif result == 3:  # YIELD
                if f.pc == pc:
                    f.pc = pc + 1
                limit = 0
            if not w.fragments or not w.choose():
                return
            f = w.fragment

    def register(self, index: int) -> str:
        return self.program.module.registers[index].name

    def run_warp(self, w: Warp, limit: int) -> None:
        try:
            self.burst(w, limit)
        except MachineError as error:
            i = self.program.code[w.fragment.pc] if w.fragment.pc < len(self.program.code) else None
            error.place(w.cta.index, w.index, i.line if i else 0, i.text if i else "(end of the text)")
            raise
        except IndexError:
            if w.fragment.pc < len(self.program.code):
                raise
            over = ProtocolError("control runs over the end of the entry")
            over.place(w.cta.index, w.index, 0, "(end of the text)")
            raise over from None

    def complete(self, cta: Cta) -> None:
        copy = cta.pending.pop(self.random.randrange(len(cta.pending)))
        try:
            copy.complete()
        except MachineError as error:
            line = getattr(copy, "line", "a cp.async")
            error.place(cta.index, None, 0, f"at the end of the copy of {line}")
            raise

    def deadlock(self, ctas: list[Cta]) -> Deadlock:
        lines = []
        for cta in ctas:
            for w in cta.warps:
                for f in w.fragments:
                    pc = f.pc - 1 if isinstance(f.blocked, _data.BarrierWait) else f.pc
                    lanes = "" if f.mask == FULL else f" lanes {f.mask:#010x}"
                    lines.append(f"  CTA {cta.index} warp {w.index}{lanes} {f.blocked}\n    at {self.line_of(pc)}")
                if not w.fragments:
                    lines.append(f"  CTA {cta.index} warp {w.index} has exited")
        return Deadlock("nothing can run and no copy is under way\n" + "\n".join(lines))

    def slot(self) -> Cluster:
        """For one cluster after another."""
        cluster = Cluster(self.cluster)
        for _ in range(self.cluster):
            Cta(self, cluster)
        return cluster

    def launch(
        self, order: Sequence[list[tuple[int, int, int]]], seed: int, concurrent: int, max_steps: int, sequential: bool
    ) -> None:
        rng = self.random = random.Random(seed)
        waiting = list(order)
        idle = [self.slot() for _ in range(min(concurrent, len(waiting)))]
        active: list[Cta] = []
        spent = 0
        while waiting or active:
            while idle and waiting:
                cluster = idle.pop()
                for cta, index in zip(cluster.ctas, waiting.pop(0), strict=True):
                    cta.start(index, rng)
                    active.append(cta)
                cluster.reset(cluster.ctas[0].number // self.cluster)
            candidates = active if len(active) == 1 else rng.sample(active, len(active))
            ran = False
            for cta in candidates:
                if cta.pending and rng.random() < cta.completion:
                    self.complete(cta)
                runnable = [w for w in cta.warps if w.fragments and w.choose()]
                if runnable:
                    if sequential:
                        w = runnable[0]
                    else:
                        w = rng.choices(runnable, [cta.weights[w.index] for w in runnable])[0]
                    burst = rng.choice((2, 10, 40, 200))
                    self.run_warp(w, burst)
                    self.steps += burst
                    ran = True
                elif cta.pending:
                    self.complete(cta)
                    ran = True
                elif not any(w.fragments for w in cta.warps):
                    cta.finish()
                    active.remove(cta)
                    if not any(other in active for other in cta.cluster.ctas):
                        idle.append(cta.cluster)
                    self.statistics.ctas += 1
                    ran = True
                if ran:
                    break
            if not ran:
                raise self.deadlock(active)
            spent += 1
            if spent > max_steps:
                raise Deadlock(f"no end after {spent} bursts of instructions")


def run(
    program: Program,
    grid: int | tuple[int, ...],
    arguments: Sequence[Any],
    memory: Memory,
    smem_bytes: int,
    *,
    seed: int = 0,
    threads: int | None = None,
    order: str = "random",
    concurrent: int = 1,
    checks: bool = True,
    max_steps: int = 300_000,
    cluster: int = 1,
    dependent: frozenset[str] | None = frozenset(),
    truthful: bool = False,
) -> Statistics:
    """Runs a grid. CTAs come in random order (`order="sequential"`: as numbered, and the lowest warp first).

    CTAs `cluster` i to `cluster` i + `cluster` - 1 are a cluster and run concurrently. `concurrent` clusters are
    interleaved; `checks=False` leaves out the shadows of shared and global memory; `max_steps` bounds the bursts of
    instructions before the run counts as hung. `dependent`: buffers that no thread may touch before
    griddepcontrol.wait; None: all, as where anything may come before in the stream. Then strong reads before it find
    anything, or, `truthful`, what they would find behind it; boxes that the L2 is asked for must all be copied then.
    """
    module = program.module
    count = threads or module.reqntid or module.maxntid
    if count is None:
        raise TypeError("the entry has no .reqntid or .maxntid: threads must be given")
    if count % 32 or not 0 < count <= 1024:
        raise ValueError(f"{count} threads: whole warps, 1024 at most")
    if (module.reqntid and count != module.reqntid) or (module.maxntid and count > module.maxntid):
        raise ValueError(f"{count} threads do not fit the entry")
    if order not in ("random", "sequential"):
        raise ValueError(order)
    if smem_bytes and not module.dynamic:
        raise ValueError("the module declares no dynamic shared memory")
    if module.static_bytes + smem_bytes > 227 * 1024:
        raise ValueError(f"{module.static_bytes + smem_bytes} bytes of shared memory: 232448 at most")
    shape = (grid,) if isinstance(grid, int) else tuple(grid)
    x, y, z = (*shape, 1, 1)[:3]
    if not 1 <= cluster <= 16:
        raise MachineError(f"a cluster of {cluster} CTAs: 1 to 16")
    if module.cluster not in (None, cluster):
        raise MachineError(f"a cluster of {cluster} CTAs, but the entry has .reqnctapercluster {module.cluster}")
    if x % cluster:
        raise MachineError(f"clusters of {cluster} CTAs do not divide a grid of {x}")
    machine = Machine(program, (x, y, z), count, memory, smem_bytes, checks, cluster, dependent, truthful)
    machine.parameters, machine.maps = _data.pack_parameters(module, list(arguments))
    ctas = [
        [(i + rank, j, k) for rank in range(cluster)] for k in range(z) for j in range(y) for i in range(0, x, cluster)
    ]
    if order == "random":
        random.Random(f"grid {seed}").shuffle(ctas)
    started = time.perf_counter()
    with np.errstate(all="ignore"):
        machine.launch(ctas, seed, concurrent, max_steps, order == "sequential")
    if dependent != frozenset() and not machine.waited:
        raise ProtocolError("no thread has executed griddepcontrol.wait: this grid may end before the one before it")
    if truthful and (vain := machine.asked - machine.copied):
        raise ProtocolError(f"the L2 is asked for {len(vain)} boxes that are not copied, one at {min(vain)[1:]}")
    statistics = machine.statistics
    statistics.asked = len(machine.asked)
    for i, n in zip(program.code, machine.counts, strict=True):
        if n:
            statistics.instructions[i.op] = statistics.instructions.get(i.op, 0) + n
    statistics.steps = sum(machine.counts)
    statistics.register_budget = machine.register_budget
    statistics.seconds = time.perf_counter() - started
    return statistics


__all__ = ["SHARED_BASE", "Program", "Statistics", "parse", "run"]
