"""Which of many candidates is fastest: by all of them, or by a model's rank, short measurements and a playoff.

The search measures nothing itself. `measure(config, effort)` is handed in and never raises for a bad candidate; effort
0 is the shortest window, 2 the playoff's. Neither torch nor the worker is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mla_jit import ops
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning.heuristic import predicted_us
from mla_jit.tuning.rows import OK, preferred
from mla_jit.tuning.space import first_kernel as _kernel

SEARCHES = ("auto", "exhaustive")
SHORT, LONGER, PLAYOFF = 0, 1, 2  # efforts
_SHARE, _LEAST, _MOST = 0.06, 16, 130  # of the candidates that `auto` measures: least part, and bounds
_COST, _TAIL = 0.115, 20  # where they are many: so large a part, less what the longer measurements cost
_BATCHES = (0.4, 0.3, 0.15, 0.15)  # in which it chooses them, each with what those before have shown
_KIN_BATCHES = 2  # the last of these are kin of the best
_KERNELS, _MORE_KERNELS = 0.2, 1.7  # part of the first kernels that it has compiled, and how many times that for kin
_LEADERS = (4, 8)  # of them measured again, longer: an eighth, within these bounds
_FINALISTS = 3  # in the playoff, beside the default and the incumbent
_PASSES = 2  # of the playoff: there and back
_ALIKE = 0.5  # how alike configs are that differ in one tunable, or by twice the splits
_CURIOSITY = 0.12  # how much faster (log) than predicted a config may be of whose like none was measured
_TRUST = 0.5  # measured likes that weigh as much as the mean of all
_FAULTY = math.log(8)  # a fault counts as so much slower than predicted, so that its like come later
_CUT = ("min_tiles", "overhead", "waves", "per_sm")  # how work is cut, beside the splits


class Measurement(Protocol):
    """What `measure` returns: a dataclass with at least these. Times in µs a call; None unless status is "ok"."""

    @property
    def status(self) -> str: ...
    @property
    def median_us(self) -> float | None: ...
    @property
    def spread_us(self) -> float | None: ...
    @property
    def note(self) -> str: ...


Measure = Callable[[Config, int], Measurement]
OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """What a search found. Times in µs a call, None where nothing was measured.

    `trials` are all measurements that it rests on, those handed in with `done` among them; the passes of the playoff
    are merged into one of effort 2. `faults` are (config, status, note) of what never wins. `explored` configs were
    measured, `skipped` candidates were not. `stopped` is "done", "budget" or "interrupted"; `why` says it in a line.
    """

    winner: Config
    median_us: float | None
    spread_us: float | None
    default_us: float | None
    runner_up: tuple[Config, float] | None
    trials: tuple[tuple[Config, int, Measurement], ...]
    faults: tuple[tuple[Config, str, str], ...]
    explored: int
    skipped: int
    seconds: float
    stopped: str
    why: str


def tune(
    problem: Tunable, target: Target, candidates: Sequence[Config], measure: Measure, *, budget_s: float,
    search: str = "auto", incumbents: Sequence[Config] = (), default: Config | None = None,
    on_event: OnEvent | None = None, clock: Callable[[], float] = time.monotonic,
    rank: Callable[[Config], float] | None = None, done: Mapping[tuple[Config, int], Measurement] | None = None,
    ready: Callable[[Sequence[Config], float], Iterable[Config]] | None = None,
) -> Outcome:  # fmt: skip
    """The fastest of the candidates as far as `budget_s` seconds allow. Deterministic but for what `measure` says.

    `default` is the first candidate unless given; it and the `incumbents` are measured first and are in the playoff.
    `rank` predicts a config's µs (`heuristic.predicted_us`). `done` are measurements made before: none is repeated.
    `ready(configs, seconds)` gives the configs of a batch in the order in which to measure them, as they are compiled.
    The budget is looked at before each measurement, and `measure` may raise BudgetSpent; a search that either or Ctrl-C
    stops gives the best so far. Of configs that the noise cannot tell apart, the one with the fewest splits wins, then
    the first by its JSON.

    Events: "start" {candidates, planned}; "shortlist" {effort, configs} before they are measured (to compile them side
    by side); "trial" {config, effort, measurement, explored} for each new entry of `trials`; "pass" {config, effort,
    measurement} for each run of the playoff; "done" {outcome}. InvalidInput for an unknown search or no candidate.
    """
    if search not in SEARCHES:
        raise InvalidInput(f"search {search!r} is unknown; use {' or '.join(SEARCHES)}")
    if default is None:
        if not candidates:
            raise InvalidInput(f"no candidate for {problem} on {target.name}: no variant accepts it; see supports()")
        default = candidates[0]
    asked = list(dict.fromkeys([default, *incumbents]))
    sweep = _Sweep(measure, budget_s, clock, on_event or (lambda name, data: None), dict(done or {}), ready)
    stopped = "done"
    try:
        everything = list(dict.fromkeys([*asked, *candidates]))
        predict = rank or _predictor(problem, target)
        predicted = {c: predict(c) for c in everything}
        everything.sort(key=lambda c: (predicted[c], c.to_json()))
        sweep.search(_by_backend(problem, everything), asked, predicted, exhaustive=search == "exhaustive")
    except BudgetSpent:
        stopped = "budget"
    except KeyboardInterrupt:
        stopped = "interrupted"
    outcome = sweep.outcome(default, set(candidates) | set(asked), stopped)
    sweep.on_event("done", {"outcome": outcome})
    return outcome


def first(problem: Tunable, target: Target, candidates: Sequence[Config]) -> list[Config]:
    """With which of the candidates an `auto` search begins, as far as can be said before it: to compile them early."""
    families = _by_backend(problem, _ranked(problem, target, candidates))
    return [*candidates[:1], *itertools.chain(*map(_leaders, families))]


def measured(problem: Tunable, candidates: Iterable[Config]) -> int:
    """How many of the candidates `auto` measures."""
    return sum(_count(len(family)) for family in _by_backend(problem, candidates))


def compiled(problem: Tunable, candidates: Iterable[Config]) -> int:
    """How many of their first kernels it may have compiled."""
    counts = [len({_kernel(config) for config in family}) for family in _by_backend(problem, candidates)]
    return sum(math.ceil(_MORE_KERNELS * _most_kernels(count)) for count in counts)


def kernels(problem: Tunable, target: Target, candidates: Sequence[Config]) -> list[Config]:
    """Of each first kernel the config that is ranked first, in the order of the rank."""
    return list(_foremost(_ranked(problem, target, candidates), lambda config: {_kernel(config)}))


def both_kernels(problem: Tunable, target: Target, candidates: Sequence[Config]) -> list[Config]:
    """The same, of each first kernel and of each second one."""
    ranked = _ranked(problem, target, candidates)
    return list(_foremost(ranked, lambda config: {_kernel(config), (config.variant, *_combined(config))}))


def _foremost(ranked: Iterable[Config], parts: Callable[[Config], set[Any]]) -> Iterator[Config]:
    """The configs of which a part has not been there before."""
    known: set[Any] = set()
    for config in ranked:
        if new := parts(config) - known:
            known |= new
            yield config


def _ranked(problem: Tunable, target: Target, candidates: Iterable[Config]) -> list[Config]:
    predict = _predictor(problem, target)
    return sorted(candidates, key=lambda c: (predict(c), c.to_json()))


def _by_backend(problem: Tunable, ranked: Iterable[Config]) -> list[list[Config]]:
    """Families, by the backend of the variant: what one teaches says little of another, so none takes its places."""
    backends = {variant.name: variant.backend for variant in ops.variants(problem.op)}
    found: dict[str, list[Config]] = {}
    for config in ranked:
        found.setdefault(backends.get(config.variant, ""), []).append(config)
    return list(found.values())


def _count(candidates: int) -> int:
    """How many of so many of a family `auto` measures."""
    share = max(_SHARE * candidates, _COST * candidates - _TAIL)
    return min(candidates, max(_LEAST, min(_MOST, math.ceil(share))))


def _leaders(ranked: Sequence[Config]) -> list[Config]:
    """The best of each group as ranked; no more than the first batch has room for and than may be compiled with it."""
    found: dict[Any, Config] = {}
    for config in ranked:
        found.setdefault(_group(config), config)
    room = round((_count(len(ranked)) - 1) * _BATCHES[0]) // 2  # of the family that has the default it is one of them
    return list(found.values())[: max(1, min(room, _most_kernels(len({_kernel(c) for c in ranked})) - 1))]


def _most_kernels(count: int) -> int:
    """How many of so many first kernels are compiled before kin of the best: the default's is one of them."""
    return max(6, math.ceil(_KERNELS * count))


def _predictor(problem: Tunable, target: Target) -> Callable[[Config], float]:
    rows = {variant.name: variant for variant in ops.variants(problem.op)}
    known = _predictions(problem, target, tuple(rows.values()))

    def predict(config: Config) -> float:  # an incumbent may be of a variant that is no more
        if (us := known.get(config)) is None:
            variant = rows.get(config.variant)
            us = known[config] = math.inf if variant is None else predicted_us(problem, target, variant, config)
        return us

    return predict


@functools.lru_cache(maxsize=8)
def _predictions(problem: Tunable, target: Target, variants: tuple[Any, ...]) -> dict[Config, float]:
    """What was predicted for the problem: its candidates are ranked for the compilers, and then for the search."""
    return {}


class BudgetSpent(Exception):
    """No time is left for another measurement, or for the one that was begun: `measure` may raise it, too."""


class _Sweep:
    """The measurements of one search."""

    def __init__(
        self, measure: Measure, budget_s: float, clock: Callable[[], float], on_event: OnEvent,
        done: dict[tuple[Config, int], Measurement],
        ready: Callable[[Sequence[Config], float], Iterable[Config]] | None,
    ) -> None:  # fmt: skip
        self.measure, self.clock, self.on_event, self.done = measure, clock, on_event, done
        self.ready = ready or (lambda configs, seconds: configs)
        self.started = clock()
        self.deadline = self.started + budget_s
        self.trials: dict[tuple[Config, int], Measurement] = {}
        self.tried: set[Config] = set()
        self.faults: dict[Config, tuple[str, str]] = {}
        self.finalists: list[Config] = []  # once the playoff is over
        self.asked: Sequence[Config] = ()

    def search(
        self, families: Sequence[Sequence[Config]], asked: Sequence[Config], predicted: Mapping[Config, float],
        exhaustive: bool,
    ) -> None:  # fmt: skip
        ranked = list(itertools.chain(*families))
        count = sum(_count(len(family)) for family in families)
        exhaustive = exhaustive or count == len(ranked)
        count = len(ranked) if exhaustive else count
        leaders = max(_LEADERS[0], min(_LEADERS[1], count // 8))
        planned = count + leaders + _PASSES * (_FINALISTS + len(asked))
        self.asked = asked
        self.on_event("start", {"candidates": len(ranked), "planned": planned})
        if not exhaustive:  # so that these are compiled while the first are measured
            configs = (*asked, *itertools.chain(*map(_leaders, families)))
            self.on_event("shortlist", {"effort": SHORT, "configs": configs})
        self.rung(asked, SHORT)
        if exhaustive:
            self.rung([c for c in ranked if c not in asked], SHORT)
        else:
            self.explore([_Guide(family, predicted) for family in families], asked)
        self.rung(self.best()[:leaders], LONGER)
        self.playoff(list(dict.fromkeys([*self.best()[:_FINALISTS], *asked])))

    def explore(self, guides: Sequence[_Guide], asked: Sequence[Config]) -> None:
        """Measures in batches, of each family in turn: each group's best, what promises most, kin of the best."""
        before: list[list[Config]] = []
        for guide in guides:
            before.append([guide.choose(config) for config in asked if config in guide.place])
        left = [_count(len(guide.ranked)) - len(mine) for guide, mine in zip(guides, before, strict=True)]
        for i, share in enumerate(_BATCHES):
            for n, guide in enumerate(guides):
                for config in before[n]:
                    guide.learn(config, self.trials.get((config, SHORT)))
                size = max(1, round(left[n] * share))
                best = [config for config in self.best() if config in guide.place]
                kin = best and i >= len(_BATCHES) - _KIN_BATCHES
                before[n] = guide.kin(best, size) if kin else []
                before[n] += guide.next(size - len(before[n]), by_group=i == 0)
            turns = itertools.chain(*itertools.zip_longest(*before))
            self.rung([config for config in turns if config is not None], SHORT)

    def rung(self, configs: Sequence[Config], effort: int) -> None:
        todo = []
        for config in configs:
            if config not in self.faults and (config, effort) not in self.trials:
                if (found := self.done.get((config, effort))) is not None:
                    self.record(config, effort, found, new=False)
                else:
                    todo.append(config)
        self.on_event("shortlist", {"effort": effort, "configs": tuple(todo)})
        for config in self.ready(todo, self.deadline - self.clock()):
            self.record(config, effort, self.run(config, effort), new=True)

    def playoff(self, configs: Sequence[Config]) -> None:
        """The finalists in turn, each pass in the opposite order. What was measured counts if the search is stopped."""
        self.on_event("shortlist", {"effort": PLAYOFF, "configs": tuple(configs)})
        runs: dict[Config, list[Measurement]] = {}
        for config in configs:
            if (found := self.done.get((config, PLAYOFF))) is not None:
                self.record(config, PLAYOFF, found, new=False)
        due = [c for c in configs if (c, PLAYOFF) not in self.trials]
        try:
            for i in range(_PASSES):
                for config in due if i % 2 == 0 else reversed(due):
                    if config not in self.faults:
                        found = self.run(config, PLAYOFF)
                        self.on_event("pass", {"config": config, "effort": PLAYOFF, "measurement": found})
                        if not _ran(found):
                            self.record(config, PLAYOFF, found, new=True)
                        runs.setdefault(config, []).append(found)
            self.finalists = list(configs)
        finally:
            for config, found_ in sorted(runs.items(), key=lambda run: run[0] not in self.asked):  # the default first
                if config not in self.faults:
                    # Of one that was stopped nothing is kept: by a playoff's trials a shape is known as finished.
                    self.record(config, PLAYOFF, _merged(found_), new=bool(self.finalists))

    def run(self, config: Config, effort: int) -> Measurement:
        if self.clock() >= self.deadline:
            raise BudgetSpent
        return self.measure(config, effort)

    def record(self, config: Config, effort: int, found: Measurement, *, new: bool) -> None:
        self.trials[config, effort] = found
        self.tried.add(config)
        if not _ran(found):
            status = found.status if found.status != OK else "error"
            self.faults.setdefault(config, (status, found.note or f"median is {found.median_us}"))
        if new:
            data = {"config": config, "effort": effort, "measurement": found, "explored": len(self.tried)}
            self.on_event("trial", data)

    def estimates(self) -> dict[Config, Measurement]:
        """Of each config without a fault, its measurement of the greatest effort; after the playoff, finalists only."""
        found = {c: m for (c, _), m in sorted(self.trials.items(), key=lambda t: t[0][1]) if c not in self.faults}
        final = {c: found[c] for c in self.finalists if c in found}
        return final or found

    def best(self) -> list[Config]:
        """The configs without a fault, fastest first."""
        known = self.estimates()
        return sorted(known, key=lambda c: (_us(known[c]), c.to_json()))

    def outcome(self, default: Config, candidates: Iterable[Config], stopped: str) -> Outcome:
        known, order = self.estimates(), self.best()
        times = {c: (c, _us(known[c]), known[c].spread_us) for c in order}
        winner = preferred(times.values()) if order else default
        second = next((c for c in order if c != winner), None)
        return Outcome(
            winner=winner,
            median_us=known[winner].median_us if winner in known else None,
            spread_us=known[winner].spread_us if winner in known else None,
            default_us=known[default].median_us if default in known else None,
            runner_up=(second, _us(known[second])) if second is not None else None,
            trials=tuple((config, effort, found) for (config, effort), found in self.trials.items()),
            faults=tuple((config, *what) for config, what in self.faults.items()),
            explored=len(self.tried),
            skipped=len(set(candidates) - self.tried),
            seconds=self.clock() - self.started,
            stopped=stopped,
            why=self.why(winner, default, stopped),
        )

    def why(self, winner: Config, default: Config, stopped: str) -> str:
        known, tried = self.estimates(), len(self.tried)
        early = {"budget": "; the budget is spent", "interrupted": "; interrupted"}.get(stopped, "")
        if winner not in known:
            cause = f"none of {tried} measured ran" if tried else "nothing was measured"
            return f"the default, unmeasured: {cause}{early}"
        text = f"of {tried} measured "
        text += "the fastest" if winner == self.best()[0] else "the simplest of those within the noise of the fastest"
        if winner == default:
            text = f"the default: {text}"
        elif default in known:
            text += f", {_us(known[default]) / _us(known[winner]):.3f} times as fast as the default"
        else:
            text += "; the default did not run"
        return text + early


class _Guide:
    """What to measure next: the rank, corrected by how much slower than predicted measured configs of a kind were.

    How alike two configs are is 1, halved for each tunable that differs and for each doubling of the splits; 0 between
    variants. Everything is by place in `ranked`.
    """

    def __init__(self, ranked: Sequence[Config], predicted: Mapping[Config, float]) -> None:
        self.ranked = ranked
        self.place = {config: i for i, config in enumerate(ranked)}
        self.log = [math.log(max(predicted[c], 1e-9)) for c in ranked]
        self.kernel, self.kernels_alike = _codes([_kernel(c) for c in ranked], _kernels_alike)
        self.rest, rest_alike = _codes([_rest(c) for c in ranked], _halved)
        splits, splits_alike = _codes([_splits(c) for c in ranked], lambda a, b: min(a, b) / max(a, b))
        self.codes = list(zip(self.kernel, self.rest, splits, strict=True))
        self.alike_by = (self.kernels_alike, rest_alike, splits_alike)
        self.near = [0.0] * len(ranked)  # configs chosen so far, each by how alike it is
        self.known = [0.0] * len(ranked)  # measured ones, likewise
        self.slower = [0.0] * len(ranked)  # and how much slower (log) these were than predicted
        self.errors: list[float] = []
        self.chosen: dict[int, list[float]] = {}  # with how alike all others are
        self.kernels: set[int] = set()
        self.most_kernels = _most_kernels(len(self.kernels_alike))

    def next(self, count: int, *, by_group: bool) -> list[Config]:
        """The next `count` configs; `by_group`: the best of each group as ranked first, in half of the places."""
        batch: list[Config] = []
        for config in _leaders(self.ranked)[: max(1, count // 2)] if by_group else ():
            if self.allowed(self.place[config]):
                batch.append(self.choose(config))
        mean = statistics.fmean(self.errors) if self.errors else 0.0
        expected = [
            log + (slower + _TRUST * mean) / (known + _TRUST)
            for log, slower, known in zip(self.log, self.slower, self.known, strict=True)
        ]
        while len(batch) < count:
            open_ = [i for i in range(len(self.ranked)) if self.allowed(i)]
            if not open_:
                break
            best = min(open_, key=lambda i: expected[i] - _CURIOSITY / (1 + self.near[i]))
            batch.append(self.choose(self.ranked[best]))
        return batch

    def kin(self, best: Sequence[Config], count: int) -> list[Config]:
        """Configs with up to two tunables of the first kernel unlike the best's, or those of the best of another group.

        Of both in turn; some may want kernels beyond those that `next` allows itself.
        """
        rivals = [config for config in best if _group(config) != _group(best[0])]
        lines = [self._kin_of(config) for config in (*best[:1], *rivals[:1])]
        found: list[Config] = []
        for i in itertools.chain(*itertools.zip_longest(*lines)):
            room = len(self.kernels) < _MORE_KERNELS * self.most_kernels
            if i is not None and i not in self.chosen and (room or self.kernel[i] in self.kernels):
                found.append(self.choose(self.ranked[i]))
            if len(found) >= count:
                break
        return found

    def _kin_of(self, config: Config) -> list[int]:
        kernel, *cut = self.codes[self.place[config]]
        alike = self.kernels_alike[kernel]
        kin = [i for i, (k, *c) in enumerate(self.codes) if c == cut and alike[k] >= _ALIKE**2 and i not in self.chosen]
        return sorted(kin, key=lambda i: (-alike[self.kernel[i]], i))

    def allowed(self, i: int) -> bool:
        return i not in self.chosen and (len(self.kernels) < self.most_kernels or self.kernel[i] in self.kernels)

    def choose(self, config: Config) -> Config:
        i = self.place[config]
        kernels, rests, splits = (alike[code] for alike, code in zip(self.alike_by, self.codes[i], strict=True))
        self.chosen[i] = [kernels[k] * rests[r] * splits[s] for k, r, s in self.codes]
        self.kernels.add(self.kernel[i])
        self.near = [a + b for a, b in zip(self.near, self.chosen[i], strict=True)]
        return config

    def learn(self, config: Config, found: Measurement | None) -> None:
        if found is None:
            return
        i = self.place[config]
        error = math.log(_us(found)) - self.log[i] if _ran(found) else _FAULTY
        if _ran(found):
            self.errors.append(error)
        self.known = [a + b for a, b in zip(self.known, self.chosen[i], strict=True)]
        self.slower = [a + b * error for a, b in zip(self.slower, self.chosen[i], strict=True)]


_T = TypeVar("_T", bound=Hashable)


def _codes(values: Sequence[_T], alike: Callable[[_T, _T], float]) -> tuple[list[int], list[list[float]]]:
    """(for each value the place of its like among the distinct ones, how alike each two of these are)."""
    places: dict[_T, int] = {}
    codes = [places.setdefault(value, len(places)) for value in values]
    return codes, [[alike(a, b) for b in places] for a in places]


def _halved(a: tuple[Any, ...], b: tuple[Any, ...]) -> float:
    return _ALIKE ** sum(x != y for x, y in zip(a, b, strict=False))


def _kernels_alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> float:
    return _halved(a[1], b[1]) if a[0] == b[0] else 0.0


def _rest(config: Config) -> tuple[Any, ...]:
    """How partials are combined, and how work is cut."""
    return (_combined(config), *map(config.get, _CUT))


def _combined(config: Config) -> tuple[Any, ...]:
    return tuple(v for name, v in config.items_ if name.startswith("combine_"))


def _group(config: Config) -> tuple[Any, ...]:
    return (config.variant, *(config.get(name) for name in ("block_m", "block_n", "num_warps")))


def _splits(config: Config) -> int:
    return config.int("num_kv_splits") if "num_kv_splits" in config else 1


def _ran(found: Measurement) -> bool:
    return found.status == OK and found.median_us is not None and 0 < found.median_us < math.inf


def _us(found: Measurement) -> float:
    assert found.median_us is not None
    return found.median_us


def _merged(runs: Sequence[Measurement]) -> Measurement:
    """One measurement for a finalist's runs: the median of their medians; the spread covers them all."""
    medians = [_us(run) for run in runs]
    spread = max(max(medians) - min(medians), *(run.spread_us or 0.0 for run in runs))
    changed: Any = dataclasses.replace(runs[-1], median_us=statistics.median(medians), spread_us=spread)  # type: ignore[type-var]
    found: Measurement = changed
    return found
