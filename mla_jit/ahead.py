"""Compiling ahead: all kernels that a set of problems needs on a target, each once, on a machine that need not have a GPU.

Kernels go to the cache as a call would put them there; each compiler runs in a child process of its own, so that one that
aborts or hangs costs one kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from mla_jit import plan, settings
from mla_jit.compile import cache
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.errors import MlaJitError, NoVariant
from mla_jit.problem import Problem
from mla_jit.target import Target


@dataclass(frozen=True)
class Job:
    """A kernel to compile, for the first problem that asked for it."""

    target: str
    source: Source
    problem: Problem


@dataclass(frozen=True)
class Built:
    """A job's outcome: an artifact and where it came from ("disk", "layer", "compiled"), or the error."""

    job: Job
    artifact: Artifact | None
    origin: str
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.artifact is not None


@dataclass
class Plan:
    """What `jobs_of` found: kernels, each once; problems seen; problems that nothing serves, with the reason."""

    jobs: list[Job] = field(default_factory=list)
    problems: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def jobs_of(problems: Iterable[Problem], target: Target) -> Plan:
    """The kernels that the problems need on the target, by the same choices as a call makes. Compiles nothing."""
    found: dict[str, Job] = {}
    result = Plan()
    for problem in problems:
        result.problems += 1
        try:
            choice = plan.choose(problem, target)
        except NoVariant as error:
            result.refused[f"{problem} on {target.name}"] = "; ".join(f"{k}: {v}" for k, v in error.reasons.items())
            continue
        for source in choice.variant.sources(problem, target, choice.config):
            found.setdefault(source.key, Job(target.name, source, problem))
    result.jobs = list(found.values())
    return result


def build_all(jobs: Sequence[Job], *, workers: int | None = None, on_done: Callable[[Built], None] | None = None) -> list[Built]:
    """Compiles the jobs that are not in the cache, `workers` at a time (the CPUs that this process may use, if absent)."""
    done: list[Built] = []
    with settings.scope(safe_compile=True, mode="serve"), ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        for future in as_completed([pool.submit(_build, job) for job in jobs]):
            done.append(future.result())
            if on_done is not None:
                on_done(done[-1])
    return done


def _build(job: Job) -> Built:
    try:
        artifact, origin = cache.build_traced(job.source)
    except MlaJitError as error:
        return Built(job, None, "", str(error))
    return Built(job, artifact, origin)
