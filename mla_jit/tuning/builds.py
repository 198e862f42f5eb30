"""The kernels of candidates, compiled side by side in child processes before the candidates are measured.

A compiler that refuses, aborts or hangs costs the candidates of one kernel, and is asked once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mla_jit import ops
from mla_jit.compile import cache
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.errors import MlaJitError
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target
from mla_jit.tuning.candidate import fault_of
from mla_jit.tuning.rows import Measurement


class Builds:
    """Compiles into the cache, `jobs` kernels at a time (one a usable CPU if absent). A context manager; thread-safe.

    Kernels are asked for in the order of the configs that need them, each once, however many configs and problems do.
    """

    def __init__(self, target: Target, jobs: int | None = None):
        self._target = target
        self._pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)), thread_name_prefix="mla_jit-compile")
        self._asked: dict[Source, Future[Artifact | MlaJitError]] = {}
        self._lock = threading.Lock()

    def ready(self, problem: DecodeProblem, configs: Sequence[Config], seconds: float) -> Iterator[Config]:
        """The configs, each when its kernels are compiled or refused; after `seconds` those that are left."""
        deadline = time.monotonic() + seconds
        waiting = {config: self._ask(problem, config) for config in configs}
        while waiting:
            for config in [c for c, kernels in waiting.items() if all(kernel.done() for _, kernel in kernels)]:
                del waiting[config]
                yield config
            open_ = {kernel for kernels in waiting.values() for _, kernel in kernels if not kernel.done()}
            if open_ and not wait(open_, max(0.0, deadline - time.monotonic()), FIRST_COMPLETED).done:
                yield from waiting
                return

    def start(self, problem: DecodeProblem, configs: Sequence[Config]) -> None:
        """Begins with the kernels of these configs; `ready` waits for them."""
        for config in configs:
            self._ask(problem, config)

    def fault(self, problem: DecodeProblem, config: Config) -> Measurement | None:
        """How the candidate ends, where a kernel of it was refused; None where all are compiled, or not asked for."""
        for source, kernel in self._ask(problem, config, new=False):
            if kernel.done() and isinstance(error := kernel.result(), MlaJitError):
                fault = fault_of(error)
                return Measurement(fault.status, note=" ".join(fault.note.split())[:500], source_hash=source.key[:16])
        return None

    def _ask(
        self, problem: DecodeProblem, config: Config, *, new: bool = True
    ) -> list[tuple[Source, Future[Artifact | MlaJitError]]]:  # fmt: skip
        variant = next((v for v in ops.variants(problem.op) if v.name == config.variant), None)
        sources = () if variant is None or variant.host else variant.sources(problem, self._target, config)
        with self._lock:
            for source in sources if new else ():
                if source not in self._asked:
                    self._asked[source] = self._pool.submit(_build, source)
            return [(source, self._asked[source]) for source in sources if source in self._asked]

    def close(self) -> None:
        """Kernels that no compiler has begun are not compiled any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Builds:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _build(source: Source) -> Artifact | MlaJitError:
    try:
        return cache.build_traced(source, apart=True)[0]
    except MlaJitError as error:
        return error
