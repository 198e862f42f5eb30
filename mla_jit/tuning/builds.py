"""The kernels of candidates, compiled side by side before the candidates are measured.

A compiler that refuses, aborts or hangs costs the candidates of one kernel, and is asked once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait

from mla_jit import ops
from mla_jit.compile.artifact import Source
from mla_jit.compile.farm import Farm
from mla_jit.config import Config
from mla_jit.errors import MlaJitError
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning.candidate import fault_of
from mla_jit.tuning.rows import Measurement


class Builds:
    """A farm that is asked for configs. `jobs` children; one a usable CPU if absent. A context manager; thread-safe."""

    def __init__(self, target: Target, jobs: int | None = None):
        self._target = target
        self._farm = Farm(jobs)

    def start(self, problem: Tunable, configs: Iterable[Config], *, idle: int = 0) -> None:
        """Begins with the kernels of these configs; `idle`: as Farm has it."""
        for config in configs:
            for source in self._sources(problem, config):
                self._farm.submit(source, idle=idle)

    def ready(self, problem: Tunable, configs: Sequence[Config], seconds: float) -> Iterator[Config]:
        """The configs, each when its kernels are compiled or refused; after `seconds` those that are left."""
        deadline = time.monotonic() + seconds
        waiting = {c: [self._farm.submit(source) for source in self._sources(problem, c)] for c in configs}
        while waiting:
            for config in [c for c, kernels in waiting.items() if all(kernel.done() for kernel in kernels)]:
                del waiting[config]
                yield config
            open_ = {kernel for kernels in waiting.values() for kernel in kernels if not kernel.done()}
            if open_ and not wait(open_, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED).done:
                yield from waiting
                return

    def fault(self, problem: Tunable, config: Config) -> Measurement | None:
        """How the candidate ends, where a kernel of it was refused; None where all are compiled, or not asked for."""
        for source in self._sources(problem, config):
            kernel = self._farm.get(source)
            if kernel is None or not kernel.done() or kernel.cancelled():
                continue
            if isinstance(error := kernel.result(), MlaJitError):
                fault = fault_of(error)
                return Measurement(fault.status, note=" ".join(fault.note.split())[:500], source_hash=source.key[:16])
        return None

    def _sources(self, problem: Tunable, config: Config) -> tuple[Source, ...]:
        variant = next((v for v in ops.variants(problem.op) if v.name == config.variant), None)
        return () if variant is None or variant.host else variant.sources(problem, self._target, config)

    def close(self) -> None:
        """Ends all compilers."""
        self._farm.close()

    def __enter__(self) -> Builds:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
