"""Which kernel would serve a problem on a target, with which config, from where, and why not another one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mla_jit import plan
from mla_jit.compile import cache
from mla_jit.errors import MlaJitError
from mla_jit.ops.variant import Cost
from mla_jit.problem import Problem
from mla_jit.target import Target


@dataclass
class Kernel:
    """One kernel. `origin` is "memory", "disk", "layer", "compiled", or "missing" with the `error` if there was one."""

    name: str
    key: str
    origin: str
    path: Path | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    smem_bytes: int | None = None
    threads: int | None = None
    size_bytes: int | None = None
    compile_s: float | None = None
    error: str = ""


@dataclass
class Explanation:
    """The choice for a problem. `rejected`: by variant, why not. `cost` is the analytic model's, not a measurement."""

    problem: Problem
    target: str
    device: str
    variant: str
    backend: str
    config: dict[str, Any]
    provenance: str
    why: str
    rejected: dict[str, str]
    workspace_bytes: int
    cost: Cost
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(kernel.error for kernel in self.kernels)

    def to_json(self) -> dict[str, Any]:
        data = {"ok": self.ok, **asdict(self)}
        for kernel in data["kernels"]:
            kernel["path"] = None if kernel["path"] is None else str(kernel["path"])
        return data


def explain(problem: Problem, target: Target, *, build: bool = True) -> Explanation:
    """The choice that a call makes; its kernels are compiled if they are not in the cache, unless `build` is false.

    Raises NoVariant, which has every variant's reason.
    """
    choice = plan.choose(problem, target)
    variant, config = choice.variant, choice.config
    result = Explanation(
        problem=problem, target=target.name, device=target.device, variant=variant.name, backend=variant.backend,
        config=dict(config), provenance=choice.provenance, why=choice.why, rejected=choice.rejected,
        workspace_bytes=variant.workspace_bytes(problem, target, config), cost=variant.cost(problem, target, config),
    )  # fmt: skip
    for source in variant.sources(problem, target, config):
        kernel = Kernel(source.name, source.key, "missing")
        result.kernels.append(kernel)
        try:
            if build:
                artifact, kernel.origin = cache.build_traced(source)
            elif (found := cache.lookup(source)) is not None:
                artifact, kernel.origin = found, "cache"
            else:
                continue
        except MlaJitError as error:
            kernel.error = str(error)
            continue
        kernel.path = cache.path_of(source.key)
        kernel.registers, kernel.spill_bytes, kernel.smem_bytes = (
            artifact.registers,
            artifact.spill_bytes,
            artifact.smem_bytes,
        )
        kernel.threads, kernel.size_bytes, kernel.compile_s = (
            artifact.threads,
            len(artifact.binary),
            artifact.compile_seconds,
        )
    return result
