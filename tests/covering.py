"""Pairwise covering arrays: few rows in which every allowed pair of values of any two factors occurs; and the worker
that compiles what such rows describe. Imports neither torch nor pytest: compiling children import this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows that cover every pair of values that `allowed` (asked of partial rows) lets stand together. Deterministic.

    Greedy: each row starts from an uncovered pair and takes, factor by factor, the value that covers most new pairs.
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
        chosen = _complete({a: x, b: y}, names, factors, left, allowed)
        del left[start]  # a pair that no row can hold is dropped too
        if chosen is not None:
            for p, q in itertools.combinations(names, 2):
                left.pop(_pair(p, chosen[p], q, chosen[q]), None)
            rows.append({name: factors[name][chosen[name]] for name in factors})
    return rows


def _pair(a: str, x: int, b: str, y: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ((a, x), (b, y)) if a < b else ((b, y), (a, x))


def _complete(chosen: dict[str, int], names: Sequence[str], factors: Mapping[str, Sequence[Any]], left: dict[Any, None],
              allowed: Callable[[Row], bool]) -> dict[str, int] | None:  # fmt: skip
    """The rest of a row, by depth-first search that prefers values which cover more; None where there is none."""
    open_ = [name for name in names if name not in chosen]
    if not open_:
        return chosen
    name = open_[0]
    known = {n: factors[n][i] for n, i in chosen.items()}

    def gain(i: int) -> int:
        return sum(_pair(name, i, n, j) in left for n, j in chosen.items())

    for i in sorted(range(len(factors[name])), key=lambda i: (-gain(i), (i + len(left)) % len(factors[name]))):
        if allowed(known | {name: factors[name][i]}):
            found = _complete(chosen | {name: i}, names, factors, left, allowed)
            if found is not None:
                return found
    return None


@dataclass(frozen=True)
class Outcome:
    """What came of compiling: of each kernel (name, registers, spilled bytes, shared bytes, threads), or why not."""

    config: str
    kernels: tuple[tuple[str, int, int, int, int], ...] = ()
    rejected: str = ""
    error: str = ""  # the error's class
    message: str = field(default="", compare=False)
    seconds: float = 0.0


def compile_problem(target_name: str, fields: Row, knobs: Row, which: slice) -> Outcome:
    """Compiles these kernels of a problem with the default config, changed by knobs. Runs in a child."""
    from mla_jit import target
    from mla_jit.compile.triton import compile_source
    from mla_jit.errors import CompileError
    from mla_jit.ops.decode import splitk
    from mla_jit.problem import DecodeProblem

    there, problem = target.by_name(target_name), DecodeProblem(**fields)
    config = splitk.default(problem, there)
    config = config.replace(**{name: value for name, value in knobs.items() if value is not None})
    if (reason := splitk.rejects(problem, there, config)) is not None:
        return Outcome(str(config), rejected=reason)
    kernels, seconds = [], 0.0
    try:
        for source in splitk.sources(problem, there, config)[which]:
            a = compile_source(source)
            kernels.append((a.name, a.registers, a.spill_bytes, a.smem_bytes, a.threads))
            seconds += a.compile_seconds
    except CompileError as error:
        return Outcome(str(config), tuple(kernels), error=type(error).__name__, message=f"{error}\n{error.log[-2000:]}")
    return Outcome(str(config), tuple(kernels), seconds=seconds)
