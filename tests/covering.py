"""Pairwise covering arrays: few rows in which every allowed pair of values of any two factors occurs; and the worker
that compiles what such rows describe. Imports neither torch nor pytest: compiling children import this file.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool] = lambda row: True,
    ascending: Sequence[str] = (),
) -> list[Row]:
    """Rows that cover every pair of values that `allowed` (asked of partial rows) lets stand together. Deterministic.

    Greedy: each row starts from an uncovered pair and takes, factor by factor, the value that covers most new pairs. Of
    those that cover as many the factors `ascending` take the first, which is the cheapest to compile; the others turn.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    left = {
        _pair(a, x, b, y): None
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
        if allowed({a: factors[a][x], b: factors[b][y]})
    }
    rows = []
    while left:
        (a, x), (b, y) = start = next(iter(left))
        chosen = _complete({a: x, b: y}, names, factors, left, allowed, ascending)
        del left[start]  # a pair that no row can hold is dropped too
        if chosen is not None:
            for p, q in itertools.combinations(names, 2):
                left.pop(_pair(p, chosen[p], q, chosen[q]), None)
            rows.append({name: factors[name][chosen[name]] for name in factors})
    return rows


def _pair(a: str, x: int, b: str, y: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ((a, x), (b, y)) if a < b else ((b, y), (a, x))


def _complete(chosen: dict[str, int], names: Sequence[str], factors: Mapping[str, Sequence[Any]], left: dict[Any, None],
              allowed: Callable[[Row], bool], ascending: Sequence[str]) -> dict[str, int] | None:  # fmt: skip
    """The rest of a row, by depth-first search that prefers values which cover more; None where there is none."""
    open_ = [name for name in names if name not in chosen]
    if not open_:
        return chosen
    name = open_[0]
    known = {n: factors[n][i] for n, i in chosen.items()}

    def gain(i: int) -> int:
        return sum(_pair(name, i, n, j) in left for n, j in chosen.items())

    turn = 0 if name in ascending else len(left)
    for i in sorted(range(len(factors[name])), key=lambda i: (-gain(i), (i + turn) % len(factors[name]))):
        if allowed(known | {name: factors[name][i]}):
            found = _complete(chosen | {name: i}, names, factors, left, allowed, ascending)
            if found is not None:
                return found
    return None


def foreign_fp8(row: Row) -> bool:
    """Of a row's target and dtypes, as far as it has them: an fp8 that is not the target's own, which is made of
    integers there and takes up to three times as long to compile."""
    from mla_jit import models, target

    if "target" not in row:
        return False
    own, _ = models.dtypes_on("fp8xfp8", target.by_name(row["target"]))
    return any(dtype.startswith("fp8") and dtype != own for dtype in row.get("dtypes", ()))


def share_of_today(full: bool) -> tuple[int, int]:
    """(first, step) of what is too much for each run without --full: every second, the others the day after."""
    return (0, 1) if full else (dt.date.today().toordinal() % 2, 2)


def of_today(rows: Sequence[Row], full: bool) -> list[Row]:
    """All, but of those with a foreign fp8 today's share."""
    first, step = share_of_today(full)
    foreign = [row for row in rows if foreign_fp8(row)]
    return [row for row in rows if row not in foreign or row in foreign[first::step]]


@dataclass(frozen=True)
class Kernel:
    """What a compiled kernel takes: registers and spilled bytes a thread (the latter with the variant's limit)."""

    name: str
    registers: int
    spill_bytes: int
    spill_limit: int
    smem_bytes: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """What came of compiling: the configs, their kernels, and why not (rejected; or an error's class and message)."""

    configs: list[str]
    kernels: list[Kernel]
    rejected: str = ""
    error: str = ""
    message: str = ""


def compile_problem(target_name: str, fields: Row, variant_name: str | None, knobs: Row, which: slice) -> Outcome:
    """Compiles these kernels of a problem with the variant's default config, changed by knobs. Runs in a child.

    No name: every Triton variant that accepts the problem with its default config.
    """
    from mla_jit import ops, target
    from mla_jit.compile.triton import compile_source
    from mla_jit.errors import CompileError
    from mla_jit.tuning.rows import PROBLEMS

    there, problem = target.by_name(target_name), PROBLEMS[fields.get("op", "decode")](**fields)
    configs, kernels, reasons = [], {}, []
    try:
        for variant in ops.variants(problem.op):
            if variant.backend != "triton" or variant_name not in (None, variant.name):
                continue
            config = variant.default(problem, there).replace(**knobs)
            if (reason := variant.rejects(problem, there, config)) is not None:
                reasons.append(reason)
                continue
            configs.append(str(config))
            for source in variant.sources(problem, there, config)[which]:
                if source.key not in kernels:
                    a = compile_source(source)
                    limit = source.limits.spill_bytes if source.limits is not None else 0
                    kernels[source.key] = Kernel(a.name, a.registers, a.spill_bytes, limit, a.smem_bytes, a.threads)
    except CompileError as error:
        return Outcome(configs, list(kernels.values()), "", type(error).__name__, f"{error}\n{error.log[-2000:]}")
    return Outcome(configs, list(kernels.values()), "" if configs else "; ".join(reasons))
