"""From a problem to a loaded, bound `Executable`: which variant and config, compiled or found, memoised.

A choice is frozen at its first resolve in a process. `supports` and `Dispatch` say why it was made.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mla_jit import launch, ops
from mla_jit.compile import cache, triton
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.errors import CacheMiss, CompileError, InvalidInput, NoVariant
from mla_jit.launch.base import Binding, Bound
from mla_jit.ops.variant import Variant
from mla_jit.problem import MIXES, DecodeProblem, Problem
from mla_jit.target import Target
from mla_jit.tuning import lookup
from mla_jit.tuning.rows import PROBLEMS, Trial
from mla_jit.tuning.transfer import transfer

_MOST = 8192  # resolved problems kept; sizes are bucketed, so a serving process has hundreds
MEASURED = ("measured", "imported")  # provenances of a row that was timed for the very problem, as things are today


@dataclass(frozen=True)
class Choice:
    """A variant with a config for a problem: where the config came from, and why the others were not taken.

    provenance: "measured", "imported", "stale", "neighbour" or "predicted", of a row of the tuning database that `why`
    names; else "default". `trial` is that row.
    """

    variant: Variant
    config: Config
    provenance: str
    rejected: dict[str, str]
    why: str = ""
    trial: Trial | None = None


@dataclass(frozen=True)
class Dispatch:
    """What served a call. `origins` says of each kernel "memory", "disk", "layer" or "compiled"; times in seconds.

    compile_s is that of the kernel that took longest: they are compiled side by side.
    """

    problem: Problem
    target: str
    variant: str
    backend: str
    config: Config
    provenance: str
    why: str
    rejected: dict[str, str]
    kernels: tuple[Artifact, ...]
    origins: tuple[str, ...]
    workspace_bytes: int
    compile_s: float
    resolve_s: float

    def __str__(self) -> str:
        lines = [f"{self.variant} on {self.target}: {self.problem}", f"  config ({self.provenance}): {self.config}"]
        lines += [f"  {self.why}"] if self.why else []
        for kernel, origin in zip(self.kernels, self.origins, strict=True):
            lines.append(
                f"  {kernel.name}: {origin}, {kernel.registers} registers, {kernel.spill_bytes} B spilled, "
                f"{kernel.smem_bytes} B shared memory, {kernel.threads} threads, key {kernel.key[:16]}"
            )
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Support:
    """Whether a problem can be served. `reasons`: by variant, why not (empty for those that can)."""

    ok: bool
    variant: str | None
    reasons: dict[str, str]

    def __bool__(self) -> bool:
        return self.ok


# What `choose` asks for a problem without a measured row of its own: how `autotune` comes in. None for its choice: no
# better one. Never asked in a warm call.
on_miss: Callable[[Problem, Target, Choice], Choice | None] | None = None


def choose(problem: Problem, target: Target) -> Choice:
    """The choice that a call resolves to: what is `known`, or what `on_miss` gives. Raises NoVariant."""
    choice, ask = known(problem, target), on_miss
    known_here = (_chosen_alike(problem), target.name) in _installed
    if ask is None or not problem.TUNED or choice.provenance in MEASURED or known_here:
        return choice
    return ask(problem, target, choice) or choice


def known(problem: Problem, target: Target) -> Choice:
    """What `load` installed; else the tuning database's config for the problem, else the default. Raises NoVariant."""
    if (installed := _installed.get((_chosen_alike(problem), target.name))) is not None:
        return installed
    default = analytic(problem, target)
    if not problem.TUNED:
        return default
    rows, legal = _rows(problem, target)
    found = lookup.lookup(
        problem, target, legal, _revisions(rows), _toolchain(), hinted=getattr(problem, "hinted", True)
    )
    if found is None:
        return default
    config, trial, why = _fitted(found, problem, target, rows, legal, default.config)
    rejected = {
        name: reason
        for name, reason in {**default.rejected, default.variant.name: "another row of the tuning database"}.items()
        if name != config.variant
    }
    return Choice(rows[config.variant], config, found.provenance, rejected, why, trial)


def _chosen_alike(problem: Problem) -> Problem:
    """The problem without what no choice depends on: for how many groups the caller's work list is made."""
    return dataclasses.replace(problem, groups=None) if isinstance(problem, DecodeProblem) else problem


def _fitted(
    found: lookup.Found, problem: Problem, target: Target, rows: dict[str, Variant],
    legal: Callable[[Config], str | None], default: Config,
) -> tuple[Config, Trial, str]:  # fmt: skip
    """(config, the row it rests on, why): of rows at other sizes one that is made to fit, or else the default."""
    if found.provenance != "neighbour" or not found.near or not isinstance(problem, DecodeProblem):
        return found.config, found.trial, found.why
    config, trial = transfer(
        problem, target, rows, legal, default, lambda other: analytic(other, target).config, found.near
    )
    if trial is None:
        return config, found.trial, f"{found.why}; for these sizes nothing near by promises more than the default"
    changes = [f"{k} {trial.config[k]} -> {v}" for k, v in config.items() if v != trial.config[k]]
    why = found.why
    if trial is not found.trial:
        why += f"; more is promised by the row of {trial.problem}: {trial.median_us:.2f} us"
    return config, trial, why + (f"; {', '.join(changes)} for these sizes" if changes else "")


def choices(problem: Problem, target: Target) -> list[Choice]:
    """All that `choose` may give for this kind of problem in any batch and length: the default, and tuned configs."""
    found = [choice for choice in tuned(problem, target) if serves(choice, problem, target)]
    return [analytic(problem, target), *found]


def tuned(problem: Problem, target: Target) -> list[Choice]:
    """The configs of the tuning database that may serve this kind of problem in some batch and length."""
    if not problem.TUNED:
        return []
    rows, legal = _rows(problem, target)
    found = lookup.configs(problem, target, legal, _revisions(rows), _toolchain())
    return [Choice(rows[config.variant], cut, "tuned", {}) for config in found for cut in _cuts(config)]


def serves(choice: Choice, problem: Problem, target: Target) -> bool:
    """Whether a tuned config is legal for the problem in just these sizes."""
    return _rows(problem, target)[1](choice.config) is None


def _cuts(config: Config) -> list[Config]:
    """The config with one, two and more splits, as a neighbour's may be any: they differ in the kernels needed.

    More: its own number, as a variant may refuse few.
    """
    if "num_kv_splits" not in config:
        return [config]
    return [config.replace(num_kv_splits=n) for n in (1, 2, max(3, config.int("num_kv_splits")))]


def _rows(problem: Problem, target: Target) -> tuple[dict[str, Variant], Callable[[Config], str | None]]:
    """The op's variants by name, and why a stored config cannot serve the problem today."""
    rows = {variant.name: variant for variant in ops.variants(problem.op)}
    # what was measured, or by whom it was exported, must not decide where one choice serves all batches
    only = analytic(problem, target).config if getattr(problem, "batch_invariant", False) else None

    def legal(config: Config) -> str | None:
        variant = rows.get(config.variant)
        if variant is None:
            return f"there is no variant {config.variant}"
        if set(config) != set(variant.default(problem, target)):
            return f"{variant.name} has other tunables by now; tune again with `mla-tune run`"
        if only is not None and config != only:
            return f"batch_invariant: one config serves every batch, {only}"
        return variant.rejects(problem, target, config)

    return rows, legal


def _revisions(rows: dict[str, Variant]) -> dict[str, int]:
    return {name: variant.revision for name, variant in rows.items()}


def export(problems: Iterable[Problem], target: Target) -> bytes:
    """The choices of these problems as bytes for `load` in other processes. Raises NoVariant."""
    rows = []
    for problem in problems:
        choice = choose(problem, target)
        row = {"problem": problem.fields(), "config": choice.config.to_json(), "why": choice.why}
        rows.append({**row, "provenance": choice.provenance})
    return json.dumps({"plan": 1, "target": target.name, "device": target.device, "choices": rows}).encode()


def load(data: bytes, target: Target) -> int:
    """Installs the choices of an exported plan for this process, before any resolve of them; their number.

    InvalidInput, with nothing installed, for what is no plan, one for another target, or a choice that is illegal here
    or contradicts one that this process has made.
    """
    try:
        text = json.loads(data)
        version, made_for, rows = text["plan"], text["target"], text["choices"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"these bytes are no plan of mla_jit.export_plan: {error!r}") from error
    if version != 1 or made_for != target.name:
        raise InvalidInput(f"the plan is of format {version} for {made_for}; here are format 1 and {target.name}")
    found: dict[tuple[Problem, str], Choice] = {}
    for row in rows:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["problem"].items()}
        problem, config = PROBLEMS[fields["op"]](**fields), Config.from_json(row["config"])
        variants, legal = _rows(problem, target)
        if (reason := legal(config)) is not None:
            raise InvalidInput(
                f"the plan's {config} for {problem} is illegal here: {reason}; export it on a like device"
            )
        made = _memo.get((problem, target))
        if made is not None and made.config != config:
            raise InvalidInput(
                f"{problem} is resolved already, as {made.config}, the plan says {config}; load plans before the first "
                "call, or call mla_jit.reload() first"
            )
        found[_chosen_alike(problem), target.name] = Choice(
            variants[config.variant], config, row["provenance"], {}, f"{row['why']} (loaded plan)".strip()
        )
    _installed.update(found)
    return len(found)


def _toolchain() -> str:
    try:
        return triton.version()
    except CompileError:
        return ""


def analytic(problem: Problem, target: Target) -> Choice:
    """The cheapest variant, by its own model, that accepts the problem with its default config. Raises NoVariant."""
    served = ops.variants(problem.op)
    rejected = {v.name: "its backend is not among settings.backends" for v in ops.every(problem.op) if v not in served}
    best: tuple[float, Variant, Config] | None = None
    sized = _of_any_batch(problem)
    for variant in served:
        config = variant.default(sized, target)
        if (reason := variant.rejects(problem, target, config)) is not None:
            rejected[variant.name] = reason
            continue
        if variant.measured_only:
            rejected[variant.name] = "taken by measured rows alone"
            continue
        time_us = variant.cost(sized, target, config).time_us
        if best is not None and best[0] <= time_us:
            rejected[variant.name] = f"{time_us:.1f} us predicted, {best[1].name} {best[0]:.1f} us"
            continue
        if best is not None:
            rejected[best[1].name] = f"{best[0]:.1f} us predicted, {variant.name} {time_us:.1f} us"
        best = (time_us, variant, config)
    if best is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise NoVariant(f"nothing can serve {problem} on {target.name}. {reasons}", rejected)
    return Choice(best[1], best[2], "default", rejected)


def _of_any_batch(problem: Problem) -> Problem:
    """With batch_invariant, for which one choice must serve every batch and length: the problem of one size for all."""
    if not isinstance(problem, DecodeProblem) or not problem.batch_invariant:
        return problem
    return dataclasses.replace(problem, batch=64, max_kv_len=8192, total_kv=None, mix=MIXES[0], hinted=False)


def supports(problem: Problem, target: Target) -> Support:
    """Whether any variant accepts the problem on this target, from the variants' own predicates; compiles nothing."""
    try:
        choice = known(problem, target)
    except NoVariant as error:
        return Support(False, None, error.reasons)
    return Support(True, choice.variant.name, choice.rejected)


class Executable:
    """A problem with its compiled kernels. `bind` loads them on a device and packs what a call signature fixes.

    `only`: which of the variant's kernels were compiled, where not all of them were.
    """

    def __init__(
        self, problem: Problem, target: Target, choice: Choice, artifacts: Sequence[Artifact], dispatch: Dispatch,
        only: tuple[int, ...] | None = None,
    ):  # fmt: skip
        self.only = only
        self.problem, self.target, self.dispatch = problem, target, dispatch
        self.variant, self.config = choice.variant, choice.config
        self.artifacts = tuple(artifacts)
        self.workspace_bytes = dispatch.workspace_bytes
        self.offsets = choice.variant.offsets(problem, target, choice.config)

    def bind(
        self, binding: Binding, device: int, *, forbid_load: str | None = None, prepare: bool = False,
        wishes: Mapping[str, int] | None = None,
    ) -> Bound:  # fmt: skip
        """The launches of this problem on a device, with strides and sizes packed.

        `prepare`: those that fill the buffers which the caller of a planned problem brings; `wishes` are numbers
        instead of the variant's own. `forbid_load` is a reason, such as graph capture, for which a kernel that is not
        on the device raises CacheMiss.
        """
        if forbid_load is not None:
            self._check_loaded(device, forbid_load)
        fixed = self.variant.numbers(self.problem, self.target, self.config)
        numbers = {**binding.numbers, **fixed, **(wishes or {})}
        rule = self.variant.prepare if prepare else self.variant.launches
        launches = rule(self.problem, self.target, self.config)
        if self.only is not None:
            launches = tuple(dataclasses.replace(each, kernel=self.only.index(each.kernel)) for each in launches)
        runtime = launch.runtime(self.target.runtime)
        views = {**binding.views, **self.variant.views(self.problem, self.target, self.config)}
        return runtime.bind(self.artifacts, launches, Binding(numbers, views), device)

    @property
    def lists(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the buffers that the caller of a planned problem brings, int32, by name."""
        return self.variant.lists(self.problem, self.target, self.config)

    def _check_loaded(self, device: int, reason: str) -> None:
        runtime = launch.runtime(self.target.runtime)
        for artifact in self.artifacts:
            if not runtime.has(artifact, device):
                raise CacheMiss(
                    f"{artifact.name} (key {artifact.key[:16]}) is not loaded on device {device}, and "
                    f"cannot be {reason}; call mla_jit.warmup([...]) or decode once before, for {self.problem}"
                )

    def load(self, device: int) -> None:
        """Loads the kernels on a device, so that a later call under graph capture finds them there."""
        for artifact in self.artifacts:
            launch.runtime(self.target.runtime).load(artifact, device)


_memo: dict[tuple[Problem, Target], Executable] = {}
_preparations: dict[tuple[Problem, Target], Executable] = {}
_installed: dict[tuple[Problem, str], Choice] = {}
_lock = threading.Lock()


def executable_for(problem: Problem, target: Target, *, forbid_compile: str | None = None) -> Executable:
    """The executable of a problem; resolves, compiles or reads from the cache at the first call. Thread-safe.

    `forbid_compile` is a reason, such as graph capture, for which a miss raises CacheMiss instead. Raises NoVariant,
    CompileError, CacheMiss.
    """
    found = _memo.get((problem, target))
    if found is not None:
        return found
    made = make(problem, target, choose(problem, target), forbid_compile=forbid_compile)
    with _lock:
        if len(_memo) >= _MOST:
            _memo.clear()
        return _memo.setdefault((problem, target), made)


def preparation_for(problem: Problem, target: Target, *, forbid_compile: str | None = None) -> Executable:
    """As `executable_for`, with no other kernels than those that fill the buffers of a planned problem.

    For callers that fill them before it is known what reads them; `bind` it with `prepare` alone.
    """
    found = _preparations.get((problem, target))
    if found is None:
        choice = choose(problem, target)
        fills = choice.variant.prepare(problem, target, choice.config)
        only = tuple(sorted({launch.kernel for launch in fills}))
        found = make(problem, target, choice, forbid_compile=forbid_compile, only=only)
        with _lock:
            if len(_preparations) >= _MOST:
                _preparations.clear()
            found = _preparations.setdefault((problem, target), found)
    return found


def make(
    problem: Problem, target: Target, choice: Choice, *, forbid_compile: str | None = None,
    only: tuple[int, ...] | None = None,
) -> Executable:  # fmt: skip
    """The executable of a given choice; not memoised (the tuner's way in). `only`: which kernels, if not all."""
    started = time.perf_counter()
    sources = choice.variant.sources(problem, target, choice.config)
    if only is not None:
        sources = tuple(sources[kernel] for kernel in only)
    if len(sources) > 1:  # side by side: what is missing is compiled at the same time
        with ThreadPoolExecutor(len(sources)) as pool:
            built = list(pool.map(lambda source: _build(source, problem, forbid_compile), sources))
    else:
        built = [_build(source, problem, forbid_compile) for source in sources]
    artifacts, origins = [artifact for artifact, _ in built], [origin for _, origin in built]
    compile_s = max((a.compile_seconds for a, origin in built if origin == "compiled"), default=0.0)
    dispatch = Dispatch(
        problem=problem, target=target.name, variant=choice.variant.name, backend=choice.variant.backend,
        config=choice.config,
        provenance=choice.provenance, why=choice.why, rejected=choice.rejected, kernels=tuple(artifacts),
        origins=tuple(origins),
        workspace_bytes=choice.variant.workspace_bytes(problem, target, choice.config), compile_s=compile_s,
        resolve_s=time.perf_counter() - started,
    )  # fmt: skip
    return Executable(problem, target, choice, artifacts, dispatch, only)


def _build(source: Source, problem: Problem, forbid_compile: str | None) -> tuple[Artifact, str]:
    try:
        return cache.build_traced(source, forbid_compile=forbid_compile)
    except CompileError as error:
        error.add_note(f"while serving {problem}") if hasattr(error, "add_note") else None
        raise


def forget() -> None:
    """Drops all resolved and installed choices of the process: the next calls resolve again, with newer tuning rows."""
    with _lock:
        _memo.clear()
        _preparations.clear()
        _installed.clear()
    lookup.forget()
