"""What the databases say of a problem: the user's rows, then the shipped, then the nearest measured neighbour's.

A serving process without a database of its own never loads SQLite, and no lookup writes or creates a file. Nothing here
imports torch. Times in µs, lengths in tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter, ne
from pathlib import Path
from typing import Any

from mla_jit.compile import layers
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, StoreError
from mla_jit.problem import Problem
from mla_jit.target import Target
from mla_jit.tuning import shipped
from mla_jit.tuning.rows import OK, PROVENANCES, Trial, preferred, simplest
from mla_jit.tuning.store import Store, read_trials, user_path

Legal = Callable[[Config], str | None]  # the reason why a config cannot be used, or None

_LOOKUP_TIMEOUT_S = 2.0  # a call does not wait longer for a locked database; readers wait on no writer under WAL
_MIX = "mix"  # a soft field: a call does not know its own, it asks for the default
_NEAR = 8  # rows from which an answer for other sizes is made
_ALIKE = 1.2  # of worst cases: up to a fifth worse for a better mean over the lengths
_STEP = 0.005  # of means, which noise tells apart no finer
_PLAYOFF = 2  # the effort from which times of different configs are comparable
_AXES = ("batch", "num_heads", "q_len", "kv")  # of a shape; kv is max_kv_len's bucket
_MEANS = ("mean length", "mean q_len")  # of a cell's lengths
_getter = functools.cache(attrgetter)  # of these fields

Shape = tuple[int, ...]


def _hard(problem: Problem) -> tuple[Any, ...]:
    found: tuple[Any, ...] = _getter(*problem.HARD)(problem)
    return found


def _soft(problem: Problem) -> tuple[Any, ...]:
    found: tuple[Any, ...] = _getter(*problem.SOFT)(problem)
    return found


@dataclass(frozen=True)
class Found:
    """What `lookup` found. `provenance`: "measured", "imported", "stale", "neighbour" or "predicted".

    `stale` was measured for this very problem, but at another revision of the template or with another toolchain;
    `neighbour` was measured for another; what is only predicted is "predicted" for a neighbour too. `why` is one line.
    near: where sizes differ, the rows from which an answer may be made, with their distances; the nearest first.
    """

    config: Config
    provenance: str
    trial: Trial
    why: str
    near: tuple[tuple[Trial, float], ...] = ()


@dataclass(frozen=True)
class _Row:
    trial: Trial
    shipped: bool

    @functools.cached_property
    def order(self) -> tuple[Any, ...]:
        """Timed in a playoff; the user's; the fastest; of equals the one with the fewest splits, then by its text."""
        trial = self.trial
        playoff = trial.effort >= _PLAYOFF
        return not playoff, self.shipped, -trial.effort, trial.median_us, *simplest(trial.config), trial.created


@dataclass(frozen=True)
class _Cell:
    """Rows of one shape whose problems differ in nothing that a lookup looks at."""

    shape: Shape
    soft: tuple[Any, ...]
    means: tuple[int | None, ...]  # mean lengths, of the keys first; None: all as long as the bound
    wish: int | None  # num_kv_splits
    names: tuple[str, ...]  # of the soft fields
    fixed: tuple[int, ...]  # places in the shape of the axes that decide between kernels
    rows: tuple[_Row, ...] = ()

    @classmethod
    def of(cls, problem: Any) -> _Cell:
        """The empty cell of a problem."""
        kind = type(problem)
        fixed = tuple(_AXES.index(name) for name in kind.FIXED)
        wish = getattr(problem, "num_kv_splits", None)
        return cls(problem.shape, _soft(problem), problem.means, wish, kind.SOFT, fixed)

    @property
    def length(self) -> int:
        """The mean length of the keys, tokens."""
        return self.lengths[0]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Mean lengths: of the keys and, where the problem tells it, of q."""
        bounds = self.shape[3], self.shape[2]
        return tuple(b if mean is None else mean for mean, b in zip(self.means, bounds, strict=False))

    @property
    def fixed_sizes(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.fixed)

    def lengths_of(self, asked: _Cell, shape: Shape) -> _Cell:
        """The empty cell of this shape with the mean length, and the mix of lengths, that are asked for."""
        pairs = zip(self.names, self.soft, asked.soft, strict=True)
        soft = tuple(wanted if name == _MIX else has for name, has, wanted in pairs)
        return dataclasses.replace(self, shape=shape, soft=soft, means=asked.means, rows=())

    def differences(self, asked: _Cell) -> tuple[int, float]:
        """In how many soft fields, hints and wishes it is another than what is asked for, and how far off in length."""
        count = sum(map(ne, self.soft, asked.soft)) + (self.wish != asked.wish)
        if self.means == asked.means:
            return count, 0.0
        return count + 1, _distance(self.lengths, asked.lengths)

    def exactly(self, asked: _Cell) -> bool:
        return self.shape == asked.shape and not self.differences(asked)[0]

    def say(self, asked: _Cell) -> str:
        """The differences, one after the other: "batch 64 for 48, page_size 64 for 16"."""
        pairs: list[tuple[str, Any, Any]] = [*zip(_AXES, self.shape, asked.shape, strict=True)]
        pairs += zip(self.names, self.soft, asked.soft, strict=True)
        if self.means != asked.means:
            pairs += zip(_MEANS, self.lengths, asked.lengths, strict=False)
        pairs.append(("num_kv_splits", self.wish, asked.wish))
        return ", ".join(f"{name} {has} for {wanted}" for name, has, wanted in pairs if has != wanted)


def _ranked(rows: Iterable[_Row]) -> list[_Row]:
    """Best first; of the best kind (see `_Row.order`) the preferred config leads, whatever the noise says."""
    order = sorted(rows, key=lambda row: row.order)
    kind = [row for row in order if row.order[:3] == order[0].order[:3]]
    first = preferred((row.trial.config, row.trial.median_us or 0.0, row.trial.spread_us) for row in kind)
    return sorted(order, key=lambda row: (row.order[:3], row.trial.config != first))


class _Pool:
    """Rows that may be neighbours: of one target, with equal hard fields, all measured or all predicted."""

    def __init__(self, rows: Iterable[_Row]):
        cells: dict[_Cell, list[_Row]] = {}
        for problem, group in itertools.groupby(rows, key=lambda row: row.trial.problem):
            cells.setdefault(_Cell.of(problem), []).extend(group)
        self.cells = [  # in an order that does not depend on the rows'
            dataclasses.replace(cell, rows=tuple(_ranked(cells[cell])))
            for cell in sorted(cells, key=lambda cell: (cell.shape, *(-(mean or 0) for mean in cell.means), str(cell)))
        ]
        self.shapes: dict[Shape, list[_Cell]] = {}
        for cell in self.cells:
            self.shapes.setdefault(cell.shape, []).append(cell)
        self.range = [(min(axis), max(axis)) for axis in zip(*self.shapes, strict=True)]

    def spans(self, shape: Shape) -> bool:
        """Whether each axis of the shape (the first ones, if it is shorter) is inside the range of the rows'."""
        return all(low <= x <= high for x, (low, high) in zip(shape, self.range, strict=False))


@dataclass(frozen=True)
class _Question:
    """A lookup: the problem's empty cell, and by what a row is judged."""

    asked: _Cell
    legal: Legal
    revisions: Mapping[str, int]
    toolchain: str

    def nearest(self, pool: _Pool) -> Found | None:
        """The row of the problem itself, else of the nearest shape that has a usable one, inside the pool's range."""
        asked = self.asked
        if (found := self._among(pool.shapes.get(asked.shape, ()))) is not None:
            return found
        if not pool.spans(asked.shape):
            return None
        return self._around(cell for cell in pool.cells if cell.shape != asked.shape)

    def _around(self, cells: Iterable[_Cell]) -> Found | None:
        """The best legal row of the nearest cell that has one, and those of the next ones."""
        asked = self.asked
        founds = [
            (found, _distance(cell.shape, asked.shape))
            for cell in self._order(self._alike(cells)) if (found := self._first([cell])) is not None
        ]  # fmt: skip
        if not founds:
            return None
        first = founds[0][0].trial.provenance
        near = [(found.trial, d) for found, d in founds if found.trial.provenance == first or PROVENANCES[-1] != first]
        return dataclasses.replace(founds[0][0], near=tuple(near[:_NEAR]))

    def _alike(self, cells: Iterable[_Cell]) -> Iterator[_Cell]:
        """Those with as many rows; else with the next ones below and above.

        Rows, the product of the fixed axes (heads, and query tokens of decode), decide between kernels; the other sizes
        only say how their work is cut.
        """
        rows: dict[int, list[_Cell]] = {}
        for cell in self._usable(cells):
            rows.setdefault(math.prod(cell.fixed_sizes), []).append(cell)
        asked = math.prod(self.asked.fixed_sizes)
        below, above = (n for n in rows if n <= asked), (n for n in rows if n >= asked)
        for n in sorted({max(below, default=0), min(above, default=0)}):
            yield from rows.get(n, ())

    def _among(self, cells: Iterable[_Cell]) -> Found | None:
        """The best legal row of the nearest cell that has one; in a cell, stale rows after all others."""
        return self._first(self._order(self._usable(cells)))

    def _order(self, cells: Iterable[_Cell]) -> list[_Cell]:
        asked = self.asked
        return sorted(cells, key=lambda c: (_distance(c.shape, asked.shape), c.differences(asked)))

    def _first(self, cells: Iterable[_Cell]) -> Found | None:
        for cell, stale in itertools.product(cells, (False, True)):
            for row in cell.rows:
                if bool(self._stale(row.trial)) == stale and self._legal(row):
                    return self._found(cell, row)
        return None

    def robust(self, pool: _Pool) -> Found | None:
        """The config that is steady over lengths up to max_kv_len, at the nearest other sizes."""
        return self._robust(pool.cells) if pool.spans(self.asked.shape[:3]) else None

    def longest(self, pool: _Pool) -> Found | None:
        """The row of the greatest length up to max_kv_len, at the nearest other sizes: where no worst case is known."""
        found = self._longest(pool.cells) if pool.spans(self.asked.shape[:3]) else None
        if found is None:
            return None
        apart = _distance(_Cell.of(found.trial.problem).shape[:3], self.asked.shape[:3])
        return dataclasses.replace(found, near=((found.trial, apart),) if apart else ())

    def _longest(self, cells: Iterable[_Cell]) -> Found | None:
        asked = self.asked
        return self._first(
            cell
            for _, near in self._by_sizes(cells)
            for cell in sorted(near, key=lambda c: (-c.shape[3], c.differences(asked)))
        )

    def _robust(self, cells: Iterable[_Cell]) -> Found | None:
        """`robust` of some cells, whatever their range; of the nearest sizes that have a legal row, no others."""
        asked = self.asked
        for sizes, near in self._by_sizes(cells):
            lines: dict[tuple[Any, ...], list[_Cell]] = {}  # cells that differ in lengths alone
            for cell in near:
                key = cell.lengths_of(asked, (*sizes, asked.shape[3]))
                lines.setdefault((key.differences(asked), str(key)), []).append(cell)
            for _, line in sorted(lines.items()):
                if (found := self._worst_case(line)) is not None:
                    return found
            if any(self._legal(row) for cell in near for row in cell.rows):
                return None
        return None

    def _by_sizes(self, cells: Iterable[_Cell]) -> list[tuple[Shape, list[_Cell]]]:
        """The usable cells of lengths up to max_kv_len, by all sizes but the length, the nearest ones first."""
        found: dict[Shape, list[_Cell]] = {}
        for cell in self._usable(cells):
            if cell.shape[3] <= self.asked.shape[3]:
                found.setdefault(cell.shape[:3], []).append(cell)
        return sorted(found.items(), key=lambda item: (_distance(item[0], self.asked.shape[:3]), item[0]))

    def _worst_case(self, line: Sequence[_Cell]) -> Found | None:
        """The robust config of cells that differ in lengths alone; user's before shipped rows, current before stale."""
        rows = [(cell, row) for cell in line for row in cell.rows if self._legal(row)]
        for stale, foreign in itertools.product((False, True), repeat=2):
            some = [(c, r) for c, r in rows if r.shipped == foreign and (stale or not self._stale(r.trial))]
            if (config := robust(row.trial for _, row in some)) is None:
                continue
            mine = [(c, r) for c, r in some if r.trial.config == config]
            # A stale one before all others: the answer rests on each.
            cell, row = min(mine, key=lambda pair: (not self._stale(pair[1].trial), -pair[0].shape[3], pair[1].order))
            lengths = sorted({(c.shape[3], c.length) for c, _ in mine})
            told = ", ".join(f"{kv}" if kv == mean else f"{kv} (mean {mean})" for kv, mean in lengths)
            unhinted = cell.lengths_of(self.asked, (*cell.shape[:3], self.asked.shape[3]))
            found = self._found(unhinted, row, f"steady over kv {told}; ")
            apart = _distance(cell.shape[:3], self.asked.shape[:3])
            return dataclasses.replace(found, near=tuple((r.trial, apart) for _, r in mine) if apart else ())
        return None

    def _usable(self, cells: Iterable[_Cell]) -> Iterator[_Cell]:
        """Without those timed under another wish for splits than the problem's, which overrides the config's."""
        return (cell for cell in cells if cell.wish in (None, self.asked.wish))

    def reachable(self, pool: _Pool) -> Iterator[Config]:
        """The configs that this question may be answered with for any sizes but the fixed ones, hinted or not."""
        mine = self.asked.shape
        if not all(low <= mine[i] <= high for i, (low, high) in enumerate(pool.range) if i in self.asked.fixed):
            return
        places: dict[Shape, list[_Cell]] = {}  # by all sizes but the length
        for cell in pool.cells:
            sizes = tuple(mine[i] if i in cell.fixed else size for i, size in enumerate(cell.shape[:3]))
            places.setdefault(sizes, []).append(cell)
        for cell in self._alike(pool.cells):  # any of them may be near some sizes
            if (found := self._first([cell])) is not None:
                yield found.config
        # In one place they differ in what is fixed, and in lengths: which is the nearest does not depend on the place.
        for sizes, rivals in places.items():
            for kv in {cell.shape[3] for cell in rivals}:
                cells = [cell for cell in rivals if cell.shape[3] == kv]
                asked = dataclasses.replace(self.asked, shape=(*sizes, kv))
                for means in {(None,) * len(asked.means), *(cell.means for cell in cells)}:
                    hinted = dataclasses.replace(self, asked=dataclasses.replace(asked, means=means))
                    if (found := hinted._among(cells)) is not None:
                        yield found.config
                unhinted = dataclasses.replace(self, asked=asked)
                for answer in (unhinted._robust, unhinted._longest):
                    if (found := answer(rivals)) is not None:
                        yield found.config

    def _legal(self, row: _Row) -> bool:
        config = row.trial.config
        try:  # a row of an older revision may lack a tunable, or have one of another type
            return config.variant in self.revisions and self.legal(config) is None
        except (KeyError, AssertionError):
            return False

    def _stale(self, trial: Trial) -> str:
        """Why the row is stale, or ""."""
        now = self.revisions.get(trial.config.variant)
        if trial.revision != now:
            return f"stale: revision {trial.revision}, now {now}"
        return "" if trial.toolchain == self.toolchain else f"stale: {trial.toolchain}, now {self.toolchain}"

    def _found(self, cell: _Cell, row: _Row, how: str = "") -> Found:
        trial, stale = row.trial, self._stale(row.trial)
        exact = cell.exactly(self.asked)
        provenance = trial.provenance
        if provenance != PROVENANCES[-1] and (stale or not exact):
            provenance = "stale" if exact else "neighbour"
        whose = "shipped row" if row.shipped else "the user's row"
        match = f"{whose} of this problem" if exact else f"nearest is a {whose.split()[-2]} row with "
        match += "" if exact else cell.say(self.asked)
        why = f"{how}{match}: {trial.provenance}, {trial.median_us:.2f} us" + (f"; {stale}" if stale else "")
        return Found(trial.config, provenance, trial, why)


def _distance(a: Shape, b: Shape) -> float:
    """Euclidean, of the sizes' binary logarithms."""
    return round(math.dist(_logs(a), _logs(b)), 9)


@functools.lru_cache(maxsize=65536)
def _logs(shape: Shape) -> tuple[float, ...]:
    return tuple(math.log2(max(x, 1)) for x in shape)


@dataclass(frozen=True)
class _Index:
    """What is in memory of a device's rows of equal hard fields: pools, measured first, and what `configs` found."""

    signature: object
    pools: list[_Pool]
    reachable: dict[object, tuple[Config, ...]] = dataclasses.field(default_factory=dict)


_indexes: dict[tuple[object, ...], _Index] = {}


def lookup(
    problem: Problem, target: Target, legal: Legal, revisions: Mapping[str, int], toolchain: str, *,
    hinted: bool = True,
) -> Found | None:  # fmt: skip
    """The best stored config for a problem on a target's device, or None where nothing stored says anything of it.

    The rows of the problem itself, else of the nearest shape with the same hard fields that `legal` lets pass, never
    beyond the sizes measured; the user's before the shipped, current before stale, measured before predicted. Without
    hints (`hinted` False: max_kv_len is but a capacity) the config that is steady over the lengths measured (`robust`),
    and their distributions; where there is only one, its own best, as a neighbour's.
    `revisions` and `toolchain` are today's, by variant; rows of a variant without a revision are not used.
    Never raises for what a database holds or lacks, and never creates one.
    """
    question = _Question(_Cell.of(problem), legal, revisions, toolchain)
    for pool in _index(target, problem).pools:
        found = None if hinted else question.robust(pool)
        found = found or question.nearest(pool)
        found = found or (None if hinted else question.longest(pool))
        if found is not None:
            return found
    return None


def configs(
    problem: Problem, target: Target, legal: Legal, revisions: Mapping[str, int], toolchain: str
) -> tuple[Config, ...]:  # fmt: skip
    """The configs that `lookup` may give for the problem in any sizes but the fixed ones: what to compile ahead.

    Hinted or not. Memoised for the problem without these sizes; `legal` is asked for the first of them.
    """
    question = _Question(_Cell.of(problem), legal, revisions, toolchain)
    index, asked = _index(target, problem), question.asked
    kind = asked.soft, asked.wish, asked.fixed_sizes, toolchain, tuple(sorted(revisions.items()))
    if kind not in index.reachable:
        found = {config for pool in index.pools for config in question.reachable(pool)}
        index.reachable[kind] = tuple(sorted(found, key=lambda config: (config.variant, *simplest(config))))
    return index.reachable[kind]


def robust(trials: Iterable[Trial]) -> Config | None:
    """The config that is steady over the lengths of these trials, sorted by problem; None if only one: the first
    `by_worst_case`.

    Of a length the trials of the most effort: one that a search has but looked at everywhere may be bad everywhere.
    """
    return next(iter(by_worst_case(trials, of_most_effort=True)), None)


def pillars(trials: Iterable[Trial]) -> list[Config]:
    """What `robust` rests on: its config, and the one whose worst case is the best, which says what is alike to it."""
    ratios = _ratios(trials, of_most_effort=True)
    found = _by_worst_case(ratios)[:1]
    return list(dict.fromkeys((*found, *sorted(found and ratios, key=lambda c: (max(ratios[c]), *simplest(c)))[:1])))


def by_worst_case(trials: Iterable[Trial], *, of_most_effort: bool = False) -> list[Config]:
    """Configs by their worst ratio to the fastest, over the cases in which they were timed; [] if these are only one.

    First those whose worst is within _ALIKE of the best worst, by their mean ratio, in steps of _STEP. On an H200,
    16 heads × 4 sequences of 512 to 131072 tokens: one is 19 % slower at worst, where sequences are long, and 11 % in
    the mean; another 39 % with 512 tokens, 20 with 1024, and the fastest with more, 9 % in the mean.

    A case is a length with a mean length. Only configs that were timed in the most cases count: of the others the worst
    is not known. Of a config's times in a case the one of the most effort counts, of a case the best of the most.
    of_most_effort: in a case only configs that were timed with its most effort count.
    """
    return _by_worst_case(_ratios(trials, of_most_effort))


def _ratios(trials: Iterable[Trial], of_most_effort: bool) -> dict[Config, list[float]]:
    """By config the ratios to the fastest, of those that were timed in the most cases; {} if these are only one."""
    cells: dict[tuple[object, _Cell], dict[Config, tuple[int, float]]] = {}
    for problem, group in itertools.groupby(trials, key=lambda trial: trial.problem):
        times = cells.setdefault((_hard(problem), _Cell.of(problem)), {})
        for trial in group:
            if trial.median_us is not None:
                time = -trial.effort, trial.median_us
                times[trial.config] = min(time, times.get(trial.config, time))
    ratios: dict[Config, list[float]] = {}
    for times in cells.values():
        most, best = min(times.values(), default=(0, 0.0))
        for config, (effort, time_us) in times.items():
            if of_most_effort and effort != most:
                continue
            ratios.setdefault(config, []).append(time_us / best if best > 0 else 1.0)
    cases = max(map(len, ratios.values()), default=0)
    return {config: found for config, found in ratios.items() if len(found) == cases > 1}


def _by_worst_case(ratios: Mapping[Config, Sequence[float]]) -> list[Config]:
    limit = _ALIKE * min(map(max, ratios.values()), default=0.0)

    def order(config: Config) -> tuple[Any, ...]:
        worst = max(ratios[config])
        if worst > limit:
            return math.inf, worst, *simplest(config)
        return round(statistics.fmean(map(math.log, ratios[config])) / _STEP), worst, *simplest(config)

    return sorted(ratios, key=order)


def forget() -> None:
    """The next lookup reads the user's database and the shipped rows again."""
    _indexes.clear()
    shipped.forget()


def _index(target: Target, problem: Problem) -> _Index:
    """Read once for problems of equal hard fields, and again when the user's database has changed."""
    path = user_path()
    signature = (path, _signature(str(path)), _signature(f"{path}-wal"))
    hard = dict(zip(problem.HARD, _hard(problem), strict=True))
    key = target.device, target.name, *hard.values()
    held = _indexes.get(key)
    if held is not None and held.signature == signature:
        return held
    rows = [_Row(trial, False) for trial in (_users(path, target, hard) if signature[1] is not None else ())]
    rows += [
        _Row(trial, True) for trial in shipped.rows(target.device, **hard)
        if trial.status == OK and (trial.device, trial.target) == (target.device, target.name)
    ]  # fmt: skip
    groups: dict[bool, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.trial.provenance == PROVENANCES[-1], []).append(row)
    _indexes[key] = _Index(signature, [_Pool(groups[predicted]) for predicted in sorted(groups)])
    return _indexes[key]


def _signature(path: str) -> object:
    """What changes when a file does; None for one that is not there, or is empty as a log is after its checkpoint."""
    try:
        seen = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return str(error)
    return (seen.st_ino, seen.st_mtime_ns, seen.st_size) if seen.st_size else None


def _users(path: Path, target: Target, hard: Mapping[str, Any]) -> list[Trial]:
    """The user's good trials for a device and these hard fields; what cannot be read is skipped, with one warning."""
    bad: list[InvalidInput] = []
    try:
        with Store(path, readonly=True, timeout_s=_LOOKUP_TIMEOUT_S) as store:
            wanted = {"device": target.device, "target": target.name, "status": OK, **hard}
            records = store._select("trials", wanted)
        found = list(read_trials(records, bad.append))
    except StoreError as error:
        layers.warn_once(f"tuning database {path}", f"mla_jit does without its user's tuning rows: {error}")
        return []
    if bad:
        layers.warn_once(f"rows of {path}", f"mla_jit skips {len(bad)} rows of {path}, the first: {bad[0]}")
    return found
