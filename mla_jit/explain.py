"""Which kernel would serve a problem on a target, with which config, from where, and why not another one.

Of a config from the tuning database: the row, its time beside the default's and the runner-up's, and what it was
measured for where that is not what is asked. Times in µs a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mla_jit import ops, plan
from mla_jit.compile import cache
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, MlaJitError, NoVariant, StoreError
from mla_jit.ops.variant import Cost
from mla_jit.problem import Problem
from mla_jit.target import Target
from mla_jit.tuning import shipped
from mla_jit.tuning.rows import OK, Trial, slug
from mla_jit.tuning.store import Store, user_path


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
class Time:
    """What a stored trial says of a config. `effort` is that of its measurement; times of one effort are comparable."""

    variant: str
    config: dict[str, Any]
    median_us: float
    spread_us: float | None
    effort: int

    @classmethod
    def of(cls, trial: Trial) -> Time:
        assert trial.median_us is not None
        return cls(trial.variant, dict(trial.config), trial.median_us, trial.spread_us, trial.effort)


@dataclass
class Difference:
    """A field that differs: `here` in what is asked or taken, `there` in what it is held against; None: not there."""

    name: str
    here: Any
    there: Any


@dataclass
class Tuned:
    """The row of the tuning database that the config comes from.

    source, file: "user" and the database, or "shipped" and the file of rows. provenance: the row's own, whatever
    `Explanation.provenance` makes of it. problem: what it was measured for; `differences`: where that is not what is
    asked for. taken, default, runner_up: of `problem`, the times of this config, of its default config, and of the
    fastest other one of the row's effort; from what both databases hold of it, made with the row's compiler. None:
    nothing is stored.
    """

    source: str
    file: str
    provenance: str
    problem: Problem
    differences: list[Difference]
    taken: Time
    default: Time | None
    runner_up: Time | None
    created: str
    toolchain: str
    revision: int
    policy: str
    command: str


@dataclass
class Explanation:
    """The choice for a problem. `rejected`: by variant, why not. `cost` is the analytic model's, not a measurement.

    tuned: the row that the config comes from; None for a default and for a loaded plan. changes: in what the config is
    another than the default one, `there`.
    """

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
    tuned: Tuned | None = None
    changes: list[Difference] = field(default_factory=list)
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

    Measures nothing, in an autotune block neither. Raises NoVariant, which has every variant's reason.
    """
    choice = plan.known(problem, target)
    variant, config = choice.variant, choice.config
    result = Explanation(
        problem=problem, target=target.name, device=target.device, variant=variant.name, backend=variant.backend,
        config=dict(config), provenance=choice.provenance, why=choice.why, rejected=choice.rejected,
        workspace_bytes=variant.workspace_bytes(problem, target, config), cost=variant.cost(problem, target, config),
        tuned=None if choice.trial is None else _tuned(choice.trial, problem, target),
        changes=_differences(_flat(config), _flat(_default(problem, target))),
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


def _tuned(trial: Trial, problem: Problem, target: Target) -> Tuned:
    users = _users(trial)
    times = _times([*users, *shipped.rows(trial.device, trial.op)], trial)
    rivals = [row for config, row in times.items() if config != trial.config and row.effort == trial.effort]
    runner_up = min(rivals, key=lambda row: (row.median_us or 0.0, row.config.to_json()), default=None)
    mine = trial in users
    return Tuned(
        source="user" if mine else "shipped",
        file=str(user_path()) if mine else f"tuning_db/{slug(trial.device)}/{trial.op}.jsonl",
        provenance=trial.provenance, problem=trial.problem,
        differences=_differences(_shape(problem), _shape(trial.problem)), taken=Time.of(trial),
        default=_default_time(trial, target, times), runner_up=None if runner_up is None else Time.of(runner_up),
        created=trial.created, toolchain=trial.toolchain, revision=trial.revision, policy=trial.policy,
        command=trial.command,
    )  # fmt: skip


def _users(trial: Trial) -> list[Trial]:
    """The user's trials of the same problem; none where there is no database that can be read."""
    place = {"target": trial.target, "device": trial.device}
    try:
        with Store(user_path(), readonly=True) as store:
            return list(store.trials(**_shape(trial.problem), **place))
    except (StoreError, InvalidInput):  # the lookup has told of these
        return []


def _times(rows: Iterable[Trial], taken: Trial) -> dict[Config, Trial]:
    """Of each config the row to hold against the one taken: of its effort, else of the most; of these the fastest."""
    revisions = {variant.name: variant.revision for variant in ops.every(taken.op)} | {taken.variant: taken.revision}
    alike = [row for row in rows if row.status == OK and _kind(row) == _kind(taken)]
    found: dict[Config, Trial] = {}
    for row in sorted(alike, key=lambda row: (row.effort != taken.effort, -row.effort, row.median_us or 0.0)):
        if row.revision == revisions.get(row.variant):
            found.setdefault(row.config, row)
    return found | {taken.config: taken}


def _kind(row: Trial) -> tuple[Any, ...]:
    """Where, for what and how a row was made."""
    return _shape(row.problem), row.target, row.device, row.toolchain, row.provenance == "predicted"


def _default_time(trial: Trial, target: Target, times: Mapping[Config, Trial]) -> Time | None:
    """The stored time of the default config of a row's problem, or what the row itself tells of it."""
    default = _default(trial.problem, target)
    if default is None:
        return None
    if default not in times and trial.default_us is not None:
        return Time(default.variant, dict(default), trial.default_us, None, trial.effort)
    return Time.of(times[default]) if default in times else None


def _default(problem: Problem, target: Target) -> Config | None:
    try:
        return plan.analytic(problem, target).config
    except NoVariant:
        return None


def _shape(problem: Problem) -> dict[str, Any]:
    """The fields that a lookup looks at: whether the length was a hint says how it asks, not what a row is of."""
    return {name: value for name, value in problem.fields().items() if name != "hinted"}


def _flat(config: Config | None) -> dict[str, Any]:
    return {} if config is None else {"variant": config.variant, **config}


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Difference]:
    names = dict.fromkeys((*here, *there))
    return [Difference(n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n)]
