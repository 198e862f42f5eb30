"""Candidates with a fault each, for test_tuner.py: their rows, their kernels, and a toolchain that aborts.

Each does the real work of decode_splitk_triton and then, in a kernel of its own, what its name says. `setup` makes this
process know them: the test's, and each worker. What compiles a kernel of theirs imports this file, too.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from mla_jit import launch, ops, settings
from mla_jit.compile import cache
from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Artifact, Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.launch import interpreter
from mla_jit.launch.base import Arg, Binding, Launch
from mla_jit.ops.decode import splitk
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

STEPS, INTERPRETED_STEPS = 1000, 20  # of `crawl`, each waiting for memory; in the interpreter each takes milliseconds
HOARD = 1 << 28  # bytes that the slow one wants beside what the work needs
TOO_MUCH = 1 << 50  # bytes that no device has

# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def spoil(out_ptr, NAN: tl.constexpr):
    """One element of the output made NaN, or wrong."""
    value = 100.0
    if NAN:
        value = float("nan")
    tl.store(out_ptr, value)


@triton.jit
def stray(out_ptr):
    """Writes terabytes behind the output."""
    tl.store(out_ptr + (1 << 40), 0.0)


@triton.jit
def endless(lens_ptr, out_ptr):
    """Waits for a length to become negative."""
    length = tl.load(lens_ptr, volatile=True)
    while length >= 0:
        length = tl.load(lens_ptr, volatile=True)
    tl.store(out_ptr, 0.0)


@triton.jit
def crawl(part_ptr, steps):
    """Loads that wait for each other."""
    place = tl.zeros((), tl.int64)
    for _ in range(steps):
        value = tl.load(part_ptr + place, volatile=True)
        place = tl.where(value == 12345.0, place + 1, place)
    tl.store(part_ptr, tl.load(part_ptr + place))


@triton.jit
def hungry(kv_ptr, out_ptr, steps, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Products of tiles of which more are kept in shared memory than the device has."""
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        a = tl.load(kv_ptr + i * BLOCK * BLOCK + tile)
        total = tl.dot(a, tl.trans(a), total)
    tl.store(out_ptr + tile, total.to(out_ptr.dtype.element_ty), mask=total > 1e30)


@triton.jit
def unmatched(out_ptr):
    """A product of tiles that do not fit each other."""
    product = tl.dot(tl.zeros((16, 32), tl.float16), tl.zeros((16, 32), tl.float16))
    tl.store(out_ptr, tl.sum(product))


def compile_source(source: Source) -> Artifact:
    """The toolchain "planted": ends the process that compiles, as an assertion in a compiler does."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stderr.write(f"planted: LLVM ERROR: cannot select {source.name}\n")
    sys.stderr.flush()
    os.abort()


# ----------------------------------------------------------------------------------------------------------------- rows


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is planted: a kernel with its arguments and constants, or memory. `checked`: its resources are looked at."""

    kernel: str
    pointers: tuple[str, ...] = ("out",)
    constants: tuple[tuple[str, Scalar], ...] = ()
    steps: int | None = None
    workspace_bytes: int = 0
    toolchain: str = "triton"
    checked: bool = True

    def variant(self, name: str) -> Variant:
        """The real row with this done at the end. Its first Source is the fault's, so no real kernel is blamed."""
        return Variant(
            name=name, op="decode", backend="triton", rejects=lambda p, t, c: splitk.rejects(p, t, _real(c)),
            default=lambda p, t: Config.of(name, **splitk.default(p, t).replace(pdl=False)),
            sources=lambda p, t, c: (self._source(name, p, t), *splitk.sources(p, t, _real(c))),
            launches=lambda p, t, c: (*_later(splitk.launches(p, t, _real(c))), Launch(0, (1, 1, 1), self._args())),
            workspace_bytes=lambda p, t, c: splitk.workspace_bytes(p, t, _real(c)) + self.workspace_bytes,
            cost=lambda p, t, c: _dearer(splitk.cost(p, t, _real(c))),
            numbers=lambda p, t, c: splitk.numbers(p, t, _real(c)) | {"steps": self._steps()},
            offsets=lambda p, t, c: splitk.workspace_offsets(p, t, _real(c)),
        )  # fmt: skip

    def _args(self) -> tuple[Arg, ...]:
        steps = () if self.steps is None else (Arg("i32", "steps"),)
        return tuple(Arg("ptr", name) for name in self.pointers) + steps

    def _steps(self) -> int:
        return min(self.steps or 0, INTERPRETED_STEPS if settings.interpreting() else STEPS)

    def _source(self, name: str, p: DecodeProblem, target: Target) -> Source:
        backend, arch, warp_size = target.triton
        signature = [(f"{pointer}_ptr", splitk._pointer(p, target, pointer)) for pointer in self.pointers]
        options: dict[str, Scalar] = {"num_warps": 4, "backend": backend, "arch": arch, "warp_size": warp_size}
        return Source(
            name=name, toolchain=self.toolchain, toolchain_version=toolchain.version(), isa=target.isa,
            content=toolchain.closure(__file__, self.kernel), constants=self.constants,
            signature=(*signature, *((("steps", "i32"),) if self.steps is not None else ())),
            options=tuple(sorted(options.items())), locator=f"{__name__}:{self.kernel}",
            limits=Limits(smem_bytes=target.smem_bytes) if self.checked else None,
        )  # fmt: skip


def _real(config: Config) -> Config:
    return Config(splitk.NAME, config.items_)


def _later(launches: Sequence[Launch]) -> list[Launch]:
    """The real launches, whose kernels stand behind the fault's."""
    return [dataclasses.replace(one, kernel=one.kernel + 1) for one in launches]


def _dearer(cost: Cost) -> Cost:
    """So that none of them is the default."""
    return dataclasses.replace(cost, time_us=100 * cost.time_us)


_HUNGRY = (("BLOCK", 128), ("STAGES", 9))
FAULTS = {
    "wrong": Fault("spoil", constants=(("NAN", False),)),
    "nan": Fault("spoil", constants=(("NAN", True),)),
    "stray": Fault("stray"),
    "endless": Fault("endless", ("lens", "out")),
    "abort": Fault("spoil", constants=(("NAN", False),), toolchain="planted"),
    "unmatched": Fault("unmatched"),
    "hungry": Fault("hungry", ("kv", "out"), _HUNGRY, steps=0),
    "hungry_unchecked": Fault("hungry", ("kv", "out"), _HUNGRY, steps=0, checked=False),  # the driver refuses it
    "hoarder": Fault("spoil", constants=(("NAN", False),), workspace_bytes=TOO_MUCH),
    "slow": Fault("crawl", ("part",), steps=STEPS, workspace_bytes=HOARD),
}
ROWS = tuple(fault.variant(f"planted_{name}") for name, fault in FAULTS.items())

# --------------------------------------------------------------------------------------------------------- this process

_sources: dict[str, Source] = {}  # of this process, by key


class _Interpreted:
    """A runtime: the kernels of the sources that this process has seen, run on host memory."""

    name = "interpreter"

    def bind(self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int) -> Any:
        return interpreter.bind([_sources[a.key] for a in artifacts], launches, binding)


def _recorded(variant: Variant) -> Variant:
    def sources(p: Any, target: Target, config: Config) -> tuple[Source, ...]:
        found = variant.sources(p, target, config)
        _sources.update({source.key: source for source in found})
        return found

    return dataclasses.replace(variant, sources=sources)


def setup() -> None:
    """Adds the rows and the toolchain to this process; where Triton interprets, kernels then run in its interpreter."""
    rows = (*ops.variants("decode"), *ROWS)
    cache.register_toolchain("planted", __name__)
    if settings.interpreting():
        rows = tuple(map(_recorded, rows))
        launch.override(_Interpreted())  # type: ignore[arg-type]
    ops.variants = lambda op: rows  # type: ignore[assignment]
