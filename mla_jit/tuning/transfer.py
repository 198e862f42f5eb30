"""What rows measured at other sizes say for a problem that nobody measured: which of their configs, or the default.

Each row's config is made to fit the sizes asked for, and the analytic model predicts its time there, corrected by how
far off the model was where that kind of kernel was measured. So measurements say which kernel is good, the model what
other sizes do to it (waves, splits, the combine). A config must promise to be clearly faster than the default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mla_jit.config import Config
from mla_jit.ops.variant import Variant
from mla_jit.target import Target
from mla_jit.tuning.heuristic import predicted_us
from mla_jit.tuning.rows import Trial

_CLEARLY = 0.02  # faster (log) than the default
_TRUST = 0.5  # rows of a kind, at no distance, that weigh as much as the mean of all kinds
_KIND = ("block_m", "block_n", "num_warps")  # of a kernel, beside its variant

Near = tuple[Trial, float]  # a row, and how far it is from what is asked for (log2 of the sizes)


def transfer(
    problem: Any, target: Target, variants: Mapping[str, Variant], legal: Callable[[Config], str | None],
    default: Config, default_of: Callable[[Any], Config], near: Sequence[Near],
) -> tuple[Config, Trial | None]:  # fmt: skip
    """(config, the row that it comes from): None for the default.

    near: rows at other sizes, the nearest first. default, default_of: the default config of the problem, and of others.
    Of a problem without hints (its length is but a capacity) the rows' lengths count, and the worst of them decides.
    """
    asked = list(dict.fromkeys(_asked(problem, trial.problem) for trial, _ in near))
    kinds = _Kinds(target, variants, default_of, near)
    candidates: dict[Config, Trial | None] = {default: None}
    for trial, _ in near:
        variant = variants[trial.config.variant]
        config = variant.resize(trial.problem, _asked(problem, trial.problem), target, trial.config)
        if legal(config) is not None:
            config = trial.config
        if legal(config) is None:
            candidates.setdefault(config, trial)
    times = {c: [kinds.log_us(p, c) for p in asked] for c in candidates}
    best = [min(by_length) for by_length in zip(*times.values(), strict=True)]
    worst = {c: max(t - b for t, b in zip(times[c], best, strict=True)) for c in candidates}
    found = min(candidates, key=lambda c: worst[c])  # the first of the least: the default, then the nearest
    if worst[default] - worst[found] <= _CLEARLY:
        found = default
    return found, candidates[found]


def _asked(problem: Any, measured: Any) -> Any:
    """The problem, at the measured length if its own is not known."""
    if problem.hinted:
        return problem
    return dataclasses.replace(problem, max_kv_len=measured.max_kv_len, total_kv=measured.total_kv, hinted=True)


class _Kinds:
    """The model of a config's time, corrected for each kind of kernel by the rows near by."""

    def __init__(
        self, target: Target, variants: Mapping[str, Variant], default_of: Callable[[Any], Config], near: Sequence[Near]
    ) -> None:  # fmt: skip
        self._target, self._variants = target, variants
        seen: dict[tuple[Any, ...], list[tuple[float, float]]] = {}  # by kind: (weight, log of measured ÷ predicted)
        for trial, distance in near:
            timed = {trial.config: trial.median_us}
            if trial.default_us:
                timed.setdefault(default_of(trial.problem), trial.default_us)
            for config, us in timed.items():
                off = math.log(us or 1.0) - self._predicted(trial.problem, config)
                seen.setdefault(_kind(config), []).append((2.0**-distance, off))
        every = [pair for pairs in seen.values() for pair in pairs]
        self._mean = _weighted(every, 0.0, 0.0)
        self._off = {kind: _weighted(pairs, self._mean, _TRUST) for kind, pairs in seen.items()}

    def _predicted(self, problem: Any, config: Config) -> float:
        us = predicted_us(problem, self._target, self._variants[config.variant], config)
        return math.log(max(us, 1e-9))

    def log_us(self, problem: Any, config: Config) -> float:
        """log of the µs that a config is expected to take."""
        return self._predicted(problem, config) + self._off.get(_kind(config), self._mean)


def _kind(config: Config) -> tuple[Any, ...]:
    return (config.variant, *(config.get(name) for name in _KIND))


def _weighted(pairs: Sequence[tuple[float, float]], prior: float, trust: float) -> float:
    total = sum(weight for weight, _ in pairs) + trust
    return (sum(weight * value for weight, value in pairs) + trust * prior) / total if total else 0.0
