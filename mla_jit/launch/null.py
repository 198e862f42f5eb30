"""The null runtime: packs and records launches and runs nothing. Most of the planning is tested on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mla_jit.compile.artifact import Artifact
from mla_jit.launch.base import Binding, Launch, Packed


@dataclass(frozen=True)
class Record:
    """One launch as it would have gone to a driver; `arguments`: each argument's packed bytes, tensor maps empty."""

    device: int
    stream: int
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    smem_bytes: int
    pdl: bool
    pointers: tuple[int, ...]
    floats: tuple[float, ...]


@dataclass
class NullBound:
    """See launch.base.Bound."""

    runtime: NullRuntime
    artifacts: Sequence[Artifact]
    launches: Sequence[Launch]
    device: int
    packed: Packed
    operands: tuple[tuple[str, int], ...] = ()
    float_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.operands, self.float_names = self.packed.operands, self.packed.float_names

    def run(self, pointers: Sequence[int], floats: Sequence[float], stream: int) -> None:
        self.packed.write(pointers, floats)
        for launch in self.launches:
            a = self.artifacts[launch.kernel]
            self.runtime.records.append(
                Record(
                    self.device,
                    stream,
                    a.name,
                    launch.grid,
                    a.threads,
                    a.smem_bytes,
                    launch.pdl,
                    tuple(pointers),
                    tuple(floats),
                )
            )


@dataclass
class NullRuntime:
    """Records what it is asked to load and launch, in order."""

    name: str = "null"
    records: list[Record] = field(default_factory=list)
    loaded: list[tuple[str, int]] = field(default_factory=list)

    def load(self, artifact: Artifact, device: int) -> str:
        if (artifact.key, device) not in self.loaded:
            self.loaded.append((artifact.key, device))
        return artifact.entry

    def has(self, artifact: Artifact, device: int) -> bool:
        return (artifact.key, device) in self.loaded

    def bind(
        self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int
    ) -> NullBound:
        for launch in launches:
            self.load(artifacts[launch.kernel], device)
        return NullBound(self, artifacts, launches, device, Packed(artifacts, launches, binding))
