"""Compiling ahead: all kernels that a set of problems needs on a target, each once; no GPU needed.

Kernels go to the cache as a call would put them there; each compiler runs in a child process of its own, so that one
that aborts or hangs costs one kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field

from mla_jit import plan
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.farm import Farm, Result
from mla_jit.errors import MlaJitError, NoVariant
from mla_jit.problem import DecodeProblem, PrefillProblem, Problem, bucket
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


MAX_BATCH = 1024


@dataclass
class Plan:
    """What `jobs_of` found: kernels, each once; problems seen; problems that nothing serves, with the reason."""

    jobs: list[Job] = field(default_factory=list)
    problems: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def jobs_of(problems: Iterable[Problem], target: Target) -> Plan:
    """The kernels that the problems need on the target, by the same choices as a call makes. Compiles nothing."""
    found: dict[Source, Job] = {}
    result = Plan()
    for problem in problems:
        result.problems += 1
        try:
            sources = _sources(problem, target)
        except NoVariant as error:
            result.refused[f"{problem} on {target.name}"] = "; ".join(f"{k}: {v}" for k, v in error.reasons.items())
            continue
        for source in sources:
            found.setdefault(source, Job(target.name, source, problem))
    result.jobs = list(found.values())
    return result


def _sources(problem: Problem, target: Target) -> tuple[Source, ...]:
    """Of every choice that a call may make: what is tuned depends on sizes, the default too (see `_sizes`)."""
    return tuple(s for c in plan.choices(problem, target) for s in c.variant.sources(problem, target, c.config))


def of_any_size(
    problems: Iterable[DecodeProblem], target: Target, *, max_batch: int = MAX_BATCH, max_kv_len: int | None = None
) -> Iterator[DecodeProblem]:
    """Each problem in as many sizes as it takes to need every kernel that any size up to the limits needs.

    Sizes reach the machine code by a few thresholds, which are the same for problems that differ only in what is passed
    and returned; so they are looked for once for those.
    """
    known: dict[DecodeProblem, list[tuple[int, int]]] = {}
    for problem in problems:
        alike = dataclasses.replace(
            problem, lse=False, ragged=False, paging="table", has_lens=True, q_scale=False, kv_scale=False, batch=1,
            max_kv_len=bucket(max_kv_len or problem.max_kv_len),
        )  # fmt: skip
        if alike not in known:
            known[alike] = _sizes(alike, target, max_batch)
        for batch, length in known[alike]:
            yield dataclasses.replace(problem, batch=batch, max_kv_len=length)


# Longest q of a sequence: up to the first blocks are lower; fp8 keys are made wide for many queries, not for few
_QUERIES = (64, 128, 8192)
_BATCHES = (1, 2, 257, 4097, 65537)  # from which on a sequence is looked for in more steps


def prompts_of_any_size(
    problems: Iterable[PrefillProblem], *, max_batch: int = MAX_BATCH
) -> Iterator[PrefillProblem]:  # fmt: skip
    """Each problem with both schedulers, in as many sizes as it takes to need every kernel that any size needs."""
    batches = [n for n in _BATCHES if n <= max_batch]
    for problem, q_len, batch in itertools.product(problems, _QUERIES, batches):
        for scheduler in ("tiles", "persistent"):
            yield dataclasses.replace(
                problem, q_len=q_len, total_q=q_len * batch, batch=batch, scheduler=scheduler
            )  # fmt: skip


def _sizes(problem: DecodeProblem, target: Target, max_batch: int) -> list[tuple[int, int]]:
    """(batch, length) pairs that together need every kernel that any needs up to these.

    Of the default, which is another choice at other sizes, all powers of two are looked at as lengths; of a tuned
    config the first and the last, and those between where these two need different kernels.
    """
    lengths = [1 << i for i in range(problem.max_kv_len.bit_length())]
    ends = lengths[:1] + lengths[-1:]

    def sized(batch: int, length: int) -> DecodeProblem:
        return dataclasses.replace(problem, batch=batch, max_kv_len=length)

    def default(batch: int, length: int) -> tuple[Source, ...]:
        asked = sized(batch, length)
        choice = plan.analytic(asked, target)
        return choice.variant.sources(asked, target, choice.config)

    def tuned(choice: plan.Choice, batch: int, length: int) -> tuple[Source, ...]:
        asked = sized(batch, length)
        return choice.variant.sources(asked, target, choice.config) if plan.serves(choice, asked, target) else ()

    try:
        found = [_by_size(default, lengths, max_batch)]
    except NoVariant:
        return [(1, problem.max_kv_len)]  # it will say why
    for choice in plan.tuned(problem, target):
        needs = functools.cache(functools.partial(tuned, choice))
        needed = _by_size(needs, ends, max_batch)
        if any(needs(batch, ends[0]) != needs(batch, ends[-1]) for batch, _ in needed):
            needed = _by_size(needs, lengths, max_batch)
        found.append(needed)
    new: set[Source] = set()
    sizes = []
    for size in sorted({size for needed in found for size in needed}):
        sources = {source for needed in found for source in needed.get(size, ())}
        if not new.issuperset(sources):
            new.update(sources)
            sizes.append(size)
    return sizes


def _by_size(
    needs: Callable[[int, int], tuple[Source, ...]], lengths: Sequence[int], max_batch: int
) -> dict[tuple[int, int], tuple[Source, ...]]:
    """What is needed by (batch, length): between two batches that need different kernels the threshold is bisected."""
    found: dict[tuple[int, int], tuple[Source, ...]] = {}

    def at(batch: int, length: int) -> tuple[Source, ...]:
        if (batch, length) not in found:
            found[batch, length] = needs(batch, length)
        return found[batch, length]

    batches = sorted(
        {min(n, max_batch) for i in range(max_batch.bit_length() + 1) for n in (1 << i, (1 << i) + 1, 3 << i)}
    )
    for length in lengths:
        todo = list(itertools.pairwise(batches)) or [(1, 1)]
        while todo:
            low, high = todo.pop()
            if at(low, length) != at(high, length) and high - low > 1:
                todo += [(low, (low + high) // 2), ((low + high) // 2, high)]
    return found


def build_all(
    jobs: Sequence[Job], *, workers: int | None = None, on_done: Callable[[Built], None] | None = None
) -> list[Built]:
    """Compiles the jobs that are not in the cache, `workers` at a time (if absent, one a usable CPU)."""
    done: list[Built] = []
    with Farm(workers) as farm:
        asked: dict[Future[Result], list[Job]] = {}
        for job in jobs:
            asked.setdefault(farm.submit(job.source), []).append(job)
        for future in as_completed(asked):
            result = future.result()
            for job in asked[future]:
                built = (
                    Built(job, None, "", str(result)) if isinstance(result, MlaJitError) else Built(job, *result)
                )  # fmt: skip
                done.append(built)
                if on_done is not None:
                    on_done(built)
    return done
