"""A schedule: the shapes that a sweep will tune on a device, which models share each, and about how long that takes.

Plain data, which a file of JSON keeps between `mla-tune plan` and `mla-tune run --plan`. Imports neither torch nor
triton.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import models, ops, plan, resources
from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, MlaJitError, NoVariant
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning import search, sweep
from mla_jit.tuning.rows import PROBLEMS

VERSION = 1  # of the file's format
# What a sweep took on one NVIDIA H200, 2026-11-24, in seconds: a config measured for the first time, a shape's playoff,
# a kernel compiled on one CPU.
MEASURED_S, PLAYOFF_S, COMPILED_S = 0.021, 0.8, 2.5
MEASURED_ON = "one NVIDIA H200, 2026-11-24"


@dataclass(frozen=True)
class Shape:
    """A problem to tune; `models` are those that make it. Of its `candidates`, `auto` measures `measured`.

    `kernels` are the distinct first kernels of all candidates. The times, in seconds, are estimates for one GPU, and of
    kernels that no shape before this one has; None where no kernel is compiled, on the CPU.
    """

    problem: Tunable
    models: tuple[str, ...] = ()
    candidates: int = 0
    kernels: int = 0
    measured: int = 0
    auto_s: float | None = None
    exhaustive_s: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """A shape that will not be tuned, and why: its cache is too large here, or (`unserved`) nothing can serve it."""

    problem: Tunable
    reason: str
    unserved: bool = False


@dataclass(frozen=True)
class Schedule:
    """What a sweep will do, in this order. `options` are those of `mla-tune plan` that made it."""

    target: str
    device: str
    options: dict[str, Any]
    shapes: tuple[Shape, ...]
    left_out: tuple[LeftOut, ...] = ()
    jobs: int = 1  # kernels compiled at a time

    @property
    def problems(self) -> list[Tunable]:
        return [shape.problem for shape in self.shapes]

    def seconds(self, how: str) -> float | None:
        """The estimate for all shapes by a search; None where there is none."""
        found = [getattr(shape, f"{how}_s") for shape in self.shapes]
        return None if not found or None in found else float(sum(found))

    def check(self, there: Target, path: Path) -> None:
        """InvalidInput unless it was made for this device."""
        if (self.target, self.device) != (there.name, there.device):
            raise InvalidInput(
                f"{path} was planned for {self.device} ({self.target}), and this machine has {there.device} "
                f"({there.name}); plan again here: {self._command()} --out {shlex.quote(str(path))}"
            )

    def _command(self) -> str:
        words = ["mla-tune", "plan"]
        for name, value in (self.options or {"model": "MODEL"}).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words += [flag] if value else []
                continue
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words += [flag, text] if text else []
        return shlex.join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain data, `from_json` reads it."""
        shapes = [dataclasses.asdict(shape) | {"problem": shape.problem.fields()} for shape in self.shapes]
        left_out = [dataclasses.asdict(left) | {"problem": left.problem.fields()} for left in self.left_out]
        return {
            "version": VERSION, "target": self.target, "device": self.device, "options": self.options,
            "shapes": shapes, "left_out": left_out,
            "total": {f"{how}_s": self.seconds(how) for how in search.SEARCHES},
            "estimate": {
                "measured_s": MEASURED_S, "playoff_s": PLAYOFF_S, "compiled_s": COMPILED_S, "jobs": self.jobs,
                "measured_on": MEASURED_ON,
            },
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Any) -> Schedule:
        """InvalidInput for what is no schedule, or one of another format. A shape may have its problem alone."""
        try:
            version, shapes = data["version"], data["shapes"]
            if version != VERSION:
                raise InvalidInput(f"format {version!r} is unknown, this mla_jit reads {VERSION}; plan again with it")
            options = dict(data.get("options", {}))
            if (how := options.get("search", "auto")) not in search.SEARCHES:
                raise InvalidInput(f"search {how!r} is unknown; use {' or '.join(search.SEARCHES)}")
            return cls(str(data["target"]), str(data["device"]), options, tuple(map(_shape, shapes)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error) if isinstance(error, InvalidInput) else repr(error)
            raise InvalidInput(f"no schedule of mla_jit: {reason}") from error


def _shape(row: dict[str, Any]) -> Shape:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["problem"].items()}
    problem = PROBLEMS[fields.get("op", "decode")](**fields)
    return Shape(**{**row, "problem": problem, "models": tuple(row.get("models", ()))})


def read(path: Path) -> Schedule:
    """The schedule that `write` has kept. InvalidInput for a file that is none, or cannot be read."""
    try:
        return Schedule.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}; name another file") from error
    except ValueError as error:  # InvalidInput is one
        raise InvalidInput(f"{path} is {error}; `mla-tune plan --out FILE` makes one") from error


def write(schedule: Schedule, path: Path) -> None:
    """MlaJitError if the file cannot be written."""
    try:
        resources.write_whole(path, json.dumps(schedule.to_json(), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise MlaJitError(f"{path} cannot be written: {error.strerror or error}; name another file") from error


def shared(
    wanted: Iterable[tuple[models.Model, int]], target: Target, *, op: str = "decode", **axes: Any
) -> dict[Tunable, list[str]]:
    """The problems of (model, tensor-parallel ranks) pairs, as `sweep.SHAPES` has them, with the pairs of each."""
    found: dict[Tunable, list[str]] = {}
    for model, tp in dict.fromkeys(wanted):
        for problem in sweep.SHAPES[op]([(model, tp)], target, **axes):
            found.setdefault(problem, []).append(f"{model.name} --tp {tp}")
    return found


def fitting(
    problems: Iterable[Tunable], target: Target, memory_bytes: int | None
) -> tuple[list[Tunable], list[LeftOut]]:
    """Which of the problems can be tuned where so much memory is free for a cache (None: any), and which cannot."""
    kept: list[Tunable] = []
    left_out: list[LeftOut] = []
    for problem in problems:
        if memory_bytes is not None and (size := problem.data_bytes) > memory_bytes:
            taken, room = (f"{n / 2**30:.1f}" for n in (size, memory_bytes))
            reason = f"its {problem.DATA} takes {taken} GiB, and there is room for {room}"
            left_out.append(LeftOut(problem, reason))
            continue
        try:
            plan.analytic(problem, target)
        except NoVariant as error:
            reason = "; ".join(f"{name}: {why}" for name, why in error.reasons.items())
            left_out.append(LeftOut(problem, reason, unserved=True))
            continue
        kept.append(problem)
    return kept, left_out


def make(
    wanted: Iterable[tuple[models.Model, int]], target: Target, *, options: dict[str, Any] | None = None,
    memory_bytes: int | None = None, jobs: int | None = None, op: str = "decode",
    on_count: Callable[[int, int], None] = lambda counted, of: None, **axes: Any,
) -> Schedule:  # fmt: skip
    """The schedule of a sweep over models; `axes` as for the op's function of `sweep.SHAPES`.

    `jobs`: a kernel a usable CPU if absent.
    """
    makers = shared(wanted, target, op=op, **axes)
    kept, left_out = fitting(makers, target, memory_bytes)
    jobs = jobs or len(os.sched_getaffinity(0))
    compiled: dict[str, set[Source]] = {how: set() for how in search.SEARCHES}
    shapes = []
    for problem in kept:
        shapes.append(_counted(problem, tuple(makers[problem]), target, jobs, compiled))
        on_count(len(shapes), len(kept))
    return Schedule(target.name, target.device, dict(options or {}), tuple(shapes), tuple(left_out), jobs)


def _counted(
    problem: Tunable, makers: tuple[str, ...], target: Target, jobs: int, compiled: dict[str, set[Source]]
) -> Shape:  # fmt: skip
    """`compiled` are the first kernels of the shapes before, by search; this one's are added."""
    candidates = sweep.candidates(problem, target)
    measured = {"auto": search.measured(problem, candidates), "exhaustive": len(candidates)}
    rows = {variant.name: variant for variant in ops.variants(problem.op)}
    first = [
        rows[config.variant].sources(problem, target, config)[0]
        for config in search.kernels(problem, target, candidates)
        if rows[config.variant].host is None
    ]
    slow_s = [_beyond_s(problem, target, candidates[:1], effort) for effort in (0, sweep.LAST)]
    seconds: dict[str, float] = {}
    for how, count in measured.items():
        # which kernels `auto` comes to want is not known before: so many as it may, of those that are ranked first
        wanted = set(first if count == len(candidates) else first[: search.compiled(problem, candidates)])
        seconds[f"{how}_s"] = MEASURED_S * count + PLAYOFF_S + COMPILED_S * len(wanted - compiled[how]) / jobs
        seconds[f"{how}_s"] += slow_s[0] * count + slow_s[1] * search._PASSES * (search._FINALISTS + 1)
        compiled[how] |= wanted
    return Shape(
        problem, makers, len(candidates), len(first), measured["auto"], **(seconds if first else {})
    )  # fmt: skip


def _beyond_s(problem: Tunable, target: Target, default: Sequence[Config], effort: int) -> float:
    """Seconds that a measurement takes longer because a call is longer than the window: a round has one at least."""
    rounds, window_ms = sweep.EFFORTS[effort]
    call_ms = min((search._predictor(problem, target)(config) for config in default), default=0.0) * 1e-3
    return rounds * max(0.0, call_ms - window_ms) * 1e-3


def families(shapes: Sequence[Shape]) -> dict[tuple[Tunable, tuple[str, ...]], list[Shape]]:
    """The shapes of the same models that differ in nothing but sizes, in their order; the key has none of these."""
    found: dict[tuple[Tunable, tuple[str, ...]], list[Shape]] = {}
    for shape in shapes:
        like = dataclasses.replace(shape.problem, **{**shape.problem.KIN, "q_len": 0})
        found.setdefault((like, shape.models), []).append(shape)
    return found
