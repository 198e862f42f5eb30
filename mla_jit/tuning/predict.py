"""What ships for devices that nobody has measured: configs that a model and really compiled kernels put far ahead.

The model (heuristic.py) has constants of one H200. Of pairs of configs that it saw at least 15 % apart there, 98 of 100
were so ordered by their measured times; of pairs less than 6 % apart 73. So a config is taken only where it is that far
ahead of what a call would take, and is still ahead with the target's bandwidth, matrix rate and launch cost each halved
and doubled. Kernels go through the cache, as a call would compile them; no GPU is needed. Times in µs.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_jit import ahead, ops, plan
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.errors import InvalidInput, NoVariant
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target
from mla_jit.tuning import lookup, shipped, space
from mla_jit.tuning.heuristic import predicted_us
from mla_jit.tuning.rows import PROVENANCES, Trial, slug

PROVENANCE = PROVENANCES[-1]
MARGIN, LEAST_MARGIN = 0.15, 0.03  # how much faster than the default; the latter whatever the target's rates
MOST_KERNELS = 40  # first kernels that one `predict` compiles
POLICY = (
    "predicted, model v1: the analytic model, its constants fitted on one H200 and scaled by configs/targets.yaml, with "
    "registers, shared memory and spills of the compiled first kernel; never run"
)
_RATES = ("bandwidth_gbps", "bf16_tflops", "launch_us")
_SIZES = ("G", "BATCH_POW2")  # constants that hardly move what a kernel uses: 8 to 128 heads, by 8 % of the registers
_PROBES = 0.6  # part of the kernels that the choice may cost; the others are those of the rows
_TRIED = 3  # kernels beside the defaults' that a kind of problem gets
_CUTS = 24  # of a kernel's configs, by the model without its artifact
_NOT_COMPILED = ("num_kv_splits", "min_tiles", "combine_s", "combine_h", "combine_d")  # into the first kernel
_TILE = ("block_m", "block_n")
_NOISE = 0.06  # by which configs differ that the model does not order reliably
_SPILL_ROOM = 0.5  # part of the allowed spills: the same kernel with further operands spills more


@dataclass(frozen=True)
class Prediction:
    """What `predict` found: rows to ship, and of all other problems why they have none.

    `kernels` and `combines`: how many were compiled, or were in the cache; `faults`: (kernel, why it is not legal).
    """

    trials: tuple[Trial, ...]
    without: dict[DecodeProblem, str]
    kernels: int
    combines: int
    faults: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Shape:
    """A problem, what a call takes without tuning, and other configs by their first kernel, the most promising first."""

    problem: DecodeProblem
    default: Config
    kernel: Source  # the default's
    others: dict[Source, tuple[Config, ...]]


@dataclass(frozen=True)
class _Pick:
    """A config that may replace a default. `gains`: the default's time over its, at the rates as they are and doubted."""

    shape: _Shape
    config: Config
    kernel: Source
    time_us: float
    default_us: float
    gains: tuple[float, ...]

    @property
    def weight(self) -> float:
        return math.log(self.gains[0])


def predict(
    problems: Iterable[DecodeProblem], target: Target, *, margin: float = MARGIN, most_kernels: int = MOST_KERNELS,
    workers: int | None = None, kept: Iterable[Trial] = (), command: str = "mla-tune predict",
    on_built: Callable[[ahead.Built], None] | None = None,
) -> Prediction:  # fmt: skip
    """Rows for the problems where another config is predicted to be faster than the default by the margin.

    `most_kernels` first kernels are compiled, `workers` at a time (if absent, one a usable CPU): those of the defaults
    and of what promises most; kernels that differ in heads or lanes alone stand for each other until a row is made,
    which has figures of its own kernel. Where they do not suffice, the rows that gain most are made. Every kernel of a
    row was compiled and is legal. A row that a lookup would take for another problem which it slows down, asked for
    or between those asked for, is left out; `kept` are rows that will stand beside. InvalidInput for a margin that is
    within the model's noise, and for a target without kernels.
    """
    if margin < LEAST_MARGIN:
        raise InvalidInput(f"a margin of {margin:.0%} is within the model's noise; the least is {LEAST_MARGIN:.0%}")
    if not target.triton:
        raise InvalidInput(f"{target.name} has no kernels that could be compiled ahead; `mla-tune run` measures there")
    asked = list(dict.fromkeys(problems))
    found = _Search(target, margin, _Kernels(target, most_kernels, workers, on_built))
    shapes = [shape for problem in asked if (shape := found.shape(problem)) is not None]
    found.probe(shapes)
    between = _nearest(asked)
    picks = found.made([p for shape in shapes if (p := found.pick(shape, between[shape.problem])) is not None])
    trials = [found.trial(pick, command) for pick in picks]
    trials = found.harmless(trials, asked, [t for t in kept if t.provenance == PROVENANCE and t.target == target.name])
    for trial in trials:
        found.without.pop(trial.problem, None)
    kernels = found.kernels
    return Prediction(tuple(trials), found.without, len(kernels.own), kernels.combines, tuple(kernels.faults.items()))


class _Kernels:
    """The first kernels that were compiled, each once: themselves, and standing for those that are like them."""

    def __init__(
        self, target: Target, most: int, workers: int | None, on_built: Callable[[ahead.Built], None] | None
    ) -> None:
        self.target, self.most, self.workers, self.on_built = target, most, workers, on_built
        self.own: dict[Source, Artifact | None] = {}  # None: not legal
        self.alike: dict[Source, Artifact | None] = {}
        self.faults: dict[str, str] = {}
        self.combines = 0

    def compile(self, wanted: Sequence[tuple[Source, DecodeProblem]], most: int | None = None) -> None:
        """Those that are not known, as many as there is room for."""
        room = max(0, (self.most if most is None else most) - len(self.own))
        new = {source: problem for source, problem in wanted if source not in self.own}
        for built in self._build(dict(itertools.islice(new.items(), room))):
            source = built.job.source
            self.own[source] = built.artifact
            self.alike.setdefault(_plain(source), built.artifact)

    def combine(self, wanted: dict[Source, DecodeProblem]) -> set[Source]:
        """Compiles second kernels; which are not legal."""
        built = self._build(wanted)
        self.combines += len(built)
        return {done.job.source for done in built if done.artifact is None}

    def _build(self, wanted: dict[Source, DecodeProblem]) -> list[ahead.Built]:
        jobs = [ahead.Job(self.target.name, source, problem) for source, problem in wanted.items()]
        done = ahead.build_all(jobs, workers=self.workers, on_done=self.on_built)
        self.faults |= {f"{one.job.source.name} {one.job.source.key[:16]}": one.error for one in done if not one.ok}
        return sorted(done, key=lambda one: one.job.source.key)

    def like(self, source: Source) -> Artifact | None:
        """The kernel, or one that is like it; None if there is none or it is not legal."""
        return self.own.get(source) or self.alike.get(_plain(source))

    def known(self, source: Source) -> bool:
        return source in self.own or _plain(source) in self.alike


def _plain(source: Source) -> Source:
    """The kernel without what hardly moves its resources."""
    return dataclasses.replace(source, constants=tuple(c for c in source.constants if c[0] not in _SIZES))


class _Search:
    """The choice for all shapes of one target."""

    def __init__(self, target: Target, margin: float, kernels: _Kernels) -> None:
        self.target, self.margin, self.kernels = target, margin, kernels
        self.variants = {variant.name: variant for variant in ops.variants("decode")}
        self.doubts = list(_doubted(target))
        self.without: dict[DecodeProblem, str] = {}
        self.times: dict[tuple[DecodeProblem, Config], float] = {}
        self.defaults: dict[DecodeProblem, Config | None] = {}

    def us(self, problem: DecodeProblem, config: Config, kernel: Artifact | None, target: Target | None = None) -> float:
        return predicted_us(problem, target or self.target, self.variants[config.variant], config, kernel)

    def source(self, problem: DecodeProblem, config: Config) -> Source | None:
        """The first kernel; None of a host variant, which has none."""
        return next(iter(self.variants[config.variant].sources(problem, self.target, config)), None)

    def shape(self, problem: DecodeProblem) -> _Shape | None:
        """The problem with its candidates, or None, with the reason noted."""
        try:
            default = plan.analytic(problem, self.target).config
        except NoVariant as error:
            self.without[problem] = str(error)
            return None
        if (kernel := self.source(problem, default)) is None:
            self.without[problem] = f"{default.variant} has no kernel to compile"
            return None
        groups: dict[object, list[Config]] = {_kernel(default): []}
        for config in space.candidates(problem, self.target, list(self.variants.values())):
            if config != default and self._promises(config, default):
                groups.setdefault(_kernel(config), []).append(config)
        others = {}
        for configs in groups.values():
            configs.sort(key=lambda config: (self.us(problem, config, None), config.to_json()))
            if configs and (source := self.source(problem, configs[0])) is not None:
                others[source] = tuple(configs[:_CUTS])
        return _Shape(problem, default, kernel, others)

    def _promises(self, config: Config, default: Config) -> bool:
        """Whether the model has something to say of a candidate that holds elsewhere too.

        Not of larger tiles: it promises almost twice the speed for 64 tokens instead of 32 where a like kernel was
        measured to gain nothing (sgl-project/sglang#34580). Nor of stages where tiles are gathered, see
        heuristic.py.
        """
        if any(config.int(name) > default.int(name) for name in _TILE):
            return False
        return config.get("tma") is not False or config.get("num_stages") == default.get("num_stages")

    def probe(self, shapes: Sequence[_Shape]) -> None:
        """Compiles what the choice rests on: the defaults' kernels, and for each kind of problem what promises most."""
        most = int(_PROBES * self.kernels.most)
        self.kernels.compile(self._unlike((shape.kernel, shape.problem) for shape in shapes))
        kinds: dict[DecodeProblem, list[_Shape]] = {}
        for shape in shapes:
            kinds.setdefault(_kind(shape.problem), []).append(shape)
        legal = dict.fromkeys(kinds, 0)
        while True:
            wishes = {kind: self._wish(kinds[kind]) for kind in kinds if legal[kind] < _TRIED}
            wanted = sorted((wish for wish in wishes.values() if wish is not None), key=lambda wish: -wish[0])
            before = len(self.kernels.own)
            self.kernels.compile([wish[1:] for wish in wanted], most)
            if len(self.kernels.own) == before:
                return
            for kind, wish in wishes.items():
                legal[kind] += wish is not None and self.kernels.own.get(wish[1]) is not None

    def _unlike(self, wanted: Iterable[tuple[Source, DecodeProblem]]) -> list[tuple[Source, DecodeProblem]]:
        """One of each that are like each other."""
        found: dict[Source, tuple[Source, DecodeProblem]] = {}
        for source, problem in wanted:
            found.setdefault(_plain(source), (source, problem))
        return list(found.values())

    def _wish(self, shapes: Sequence[_Shape]) -> tuple[float, Source, DecodeProblem] | None:
        """(how much is hoped of it, kernel, problem) of the unknown kernel that all shapes together want most."""
        hopes: dict[Source, list[tuple[float, Source, DecodeProblem]]] = {}
        for shape in shapes:
            best = min([self._timed(shape, c, s) for s, cs in self._legal(shape) for c in cs], default=math.inf)
            best = min(best, self._timed(shape, shape.default, shape.kernel))
            unknown = [
                (self.us(shape.problem, configs[0], None), source.key, source)
                for source, configs in shape.others.items() if not self.kernels.known(source)
            ]  # fmt: skip
            if unknown and (first := min(unknown))[0] * (1 + LEAST_MARGIN) < best:
                hopes.setdefault(_plain(first[2]), []).append((math.log(best / first[0]), first[2], shape.problem))
        if not hopes:
            return None
        most = max(hopes.values(), key=lambda hope: (sum(one[0] for one in hope), hope[0][1].key))
        return (sum(one[0] for one in most), *max(most, key=lambda one: (one[0], one[1].key))[1:])

    def _legal(self, shape: _Shape) -> Iterator[tuple[Source, tuple[Config, ...]]]:
        for source, configs in shape.others.items():
            if (artifact := self.kernels.like(source)) is not None and _roomy(source, artifact):
                yield source, configs

    def _timed(self, shape: _Shape, config: Config, kernel: Source) -> float:
        return self.us(shape.problem, config, self.kernels.like(kernel))

    def pick(self, shape: _Shape, between: Sequence[DecodeProblem] = ()) -> _Pick | None:
        """What to take instead of the default: of configs that noise cannot tell apart the one that suits the problems
        `between` best, which a lookup will serve with it; of equals the one most like the default.
        """
        timed = [(self._timed(shape, c, source), c, source) for source, cs in self._legal(shape) for c in cs]
        fastest = min((time_us for time_us, *_ in timed), default=math.inf)
        ties = [one for one in timed if one[0] <= fastest * (1 + _NOISE)]
        harm = {config: self._harm(config, between) for _, config, _ in ties}
        ties.sort(
            key=lambda one: (
                harm[one[1]], one[2] != shape.kernel, _differences(one[1], shape.default), one[0], one[1].to_json()
            )
        )  # fmt: skip
        for _, config, source in ties:
            found = self._compared(shape, config, source)
            if self._ahead(found):
                return found
        if self.kernels.like(shape.kernel) is None:
            self.without[shape.problem] = "the default's kernel was not compiled, or is not legal"
        else:
            gain = self._timed(shape, shape.default, shape.kernel) / fastest - 1
            doubtful = "; not at other rates" if gain >= self.margin else ""
            self.without[shape.problem] = f"the best is predicted {gain:.1%} faster than the default{doubtful}"
        return None

    def _harm(self, config: Config, problems: Iterable[DecodeProblem]) -> float:
        """How much slower than their defaults it makes problems, all logarithms together; in steps that are no noise."""
        found = 0.0
        for problem in problems:
            if (default := self._default(problem)) is not None:
                ratio = self._served_us(problem, config) / self._served_us(problem, default)
                found += math.log(max(1.0, ratio))
        return round(found / math.log1p(LEAST_MARGIN))

    def _compared(self, shape: _Shape, config: Config, source: Source) -> _Pick:
        """The config beside the default: at the rates as they are, at doubted ones, and as if spills cost nothing."""
        default = shape.default, self.kernels.like(shape.kernel)
        other = config, self.kernels.like(source)
        cases = [(default, other, there) for there in self.doubts]
        cases.append((_unspilled(default), _unspilled(other), self.target))
        times = [[self.us(shape.problem, *one, there) for one in pair] for *pair, there in cases]
        return _Pick(shape, config, source, times[0][1], times[0][0], tuple(a / b for a, b in times))

    def _ahead(self, pick: _Pick) -> bool:
        known = self.kernels.like(pick.shape.kernel) is not None
        return known and pick.gains[0] >= 1 + self.margin and min(pick.gains) >= 1 + LEAST_MARGIN

    def made(self, picks: Sequence[_Pick]) -> list[_Pick]:
        """The picks whose own kernels were compiled, are legal and leave them ahead; the most gainful kernels first."""
        weights: dict[Source, float] = {}
        for pick in picks:
            weights[pick.kernel] = weights.get(pick.kernel, 0.0) + pick.weight
        problems = {pick.kernel: pick.shape.problem for pick in picks}
        self.kernels.compile([(source, problems[source]) for source in sorted(weights, key=lambda s: -weights[s])])
        left = []
        for pick in picks:
            artifact, problem = self.kernels.own.get(pick.kernel), pick.shape.problem
            again = self._compared(pick.shape, pick.config, pick.kernel)
            if pick.kernel not in self.kernels.own:
                self.without[problem] = f"{pick.gains[0] - 1:.0%} faster, but the {self.kernels.most} kernels are spent"
            elif artifact is None or not _roomy(pick.kernel, artifact) or not self._ahead(again):
                self.without[problem] = "what promised most is not so, or not legal, with the problem's own kernel"
            else:
                left.append(again)
        return self._combined(left)

    def _combined(self, picks: Sequence[_Pick]) -> list[_Pick]:
        """The picks whose further kernels compile."""
        rest = {pick.shape.problem: self._sources(pick)[1:] for pick in picks}
        bad = self.kernels.combine({source: problem for problem, sources in rest.items() for source in sources})
        for pick in picks:
            if bad.intersection(rest[pick.shape.problem]):
                self.without[pick.shape.problem] = "the combine of what promised most is not legal"
        return [pick for pick in picks if not bad.intersection(rest[pick.shape.problem])]

    def _sources(self, pick: _Pick) -> tuple[Source, ...]:
        return self.variants[pick.config.variant].sources(pick.shape.problem, self.target, pick.config)

    def trial(self, pick: _Pick, command: str) -> Trial:
        artifact = self.kernels.own[pick.kernel]
        assert artifact is not None, "made() has left picks with a kernel only"
        return Trial(
            problem=pick.shape.problem, config=pick.config, target=self.target.name, device=self.target.device,
            revision=self.variants[pick.config.variant].revision, median_us=round(pick.time_us, 2),
            default_us=round(pick.default_us, 2), registers=artifact.registers, spill_bytes=artifact.spill_bytes,
            smem_bytes=artifact.smem_bytes, source_hash=pick.kernel.key[:16], toolchain=pick.kernel.toolchain_version,
            effort=0, policy=POLICY, command=command, provenance=PROVENANCE,
            created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------- what a lookup makes of rows

    def harmless(self, trials: Sequence[Trial], asked: Sequence[DecodeProblem], kept: Sequence[Trial]) -> list[Trial]:
        """As many trials as can stand together, the most gainful first, so that no lookup takes one for a problem that
        the model says it slows down. One by one, because a row may keep a lookup from another that does harm.
        """
        cases: dict[object, list[DecodeProblem]] = {}
        for problem in _around(asked):
            cases.setdefault(lookup._hard(problem), []).append(problem)
        taken: list[Trial] = []
        for hard, problems in cases.items():
            mine = [trial for trial in kept if lookup._hard(trial.problem) == hard]
            before = self._slowed(problems, mine)
            left = sorted((t for t in trials if lookup._hard(t.problem) == hard), key=_by_gain)
            while left:
                found = []
                for trial in left:
                    slowed = {p: by for p, by in self._slowed(problems, [*mine, trial]).items() if p not in before}
                    if not slowed:
                        mine.append(trial)
                        found.append(trial)
                    else:
                        worst = max(slowed, key=lambda problem: slowed[problem])
                        self.without[trial.problem] = f"a lookup would take its row for a neighbour, {worst}, and slow "
                        self.without[trial.problem] += f"that down by {slowed[worst]:.0%}"
                taken += found
                left = [trial for trial in left if trial not in found] if found else []
        return taken

    def _slowed(self, problems: Iterable[DecodeProblem], rows: Sequence[Trial]) -> dict[DecodeProblem, float]:
        """Problems for which a lookup takes another's row that is slower than their default, and by which part."""
        shelf = _Rows(self.target, rows)
        found = {}
        for problem in problems:
            row, default = shelf.of(problem), self._default(problem)
            if row is not None and default is not None and problem != row.problem and default != row.config:
                slower = self._served_us(problem, row.config) / self._served_us(problem, default) - 1
                if slower > LEAST_MARGIN:
                    found[problem] = slower
        return found

    def _default(self, problem: DecodeProblem) -> Config | None:
        if problem not in self.defaults:
            try:
                self.defaults[problem] = plan.analytic(problem, self.target).config
            except NoVariant:
                self.defaults[problem] = None
        return self.defaults[problem]

    def _served_us(self, problem: DecodeProblem, config: Config) -> float:
        key = problem, config
        if key not in self.times:
            source = self.source(problem, config)
            self.times[key] = self.us(problem, config, None if source is None else self.kernels.like(source))
        return self.times[key]


def _doubted(target: Target) -> Iterator[Target]:
    """The target, and with its rates halved and doubled: the model's times at other constants, but for their scale."""
    yield target
    for factors in itertools.product((0.5, 2.0), repeat=len(_RATES)):
        rates = {name: factor * getattr(target, name) for name, factor in zip(_RATES, factors, strict=True)}
        yield dataclasses.replace(target, **rates)


def _kind(problem: DecodeProblem) -> DecodeProblem:
    """The problem without its sizes, but for whether a sequence has several tokens: that is another kernel."""
    return dataclasses.replace(
        problem, num_heads=problem.num_kv_heads, batch=1, q_len=min(problem.q_len, 2), max_kv_len=1, total_kv=None
    )


def _kernel(config: Config) -> tuple[object, ...]:
    """What determines the first kernel."""
    return config.variant, tuple(item for item in config.items_ if item[0] not in _NOT_COMPILED)


def _unspilled(one: tuple[Config, Artifact | None]) -> tuple[Config, Artifact | None]:
    config, artifact = one
    return config, None if artifact is None else dataclasses.replace(artifact, spill_bytes=0)


def _differences(config: Config, default: Config) -> int:
    return sum(default.get(name) != value for name, value in config.items())


def _roomy(source: Source, artifact: Artifact) -> bool:
    """Whether the kernel may spill somewhat more, as it does with an LSE, lengths or sinks, and stay legal."""
    return source.limits is None or artifact.spill_bytes <= _SPILL_ROOM * source.limits.spill_bytes


def _around(problems: Sequence[DecodeProblem]) -> list[DecodeProblem]:
    """The problems, and those between their sizes, with hints and without."""
    groups: dict[DecodeProblem, list[DecodeProblem]] = {}
    for problem in problems:
        alike = dataclasses.replace(problem, num_heads=problem.num_kv_heads, batch=1, q_len=1, max_kv_len=1)
        groups.setdefault(alike, []).append(problem)
    found = dict.fromkeys(problems)
    for alike, group in groups.items():
        axes = [_with_means({getattr(p, axis) for p in group}) for axis in ("batch", "q_len", "num_heads", "max_kv_len")]
        for batch, q_len, heads, kv in itertools.product(*axes):
            heads -= heads % alike.num_kv_heads
            sizes = {"batch": batch, "q_len": q_len, "num_heads": heads, "max_kv_len": bucket(kv)}
            found |= dict.fromkeys(dataclasses.replace(alike, **sizes, hinted=hinted) for hinted in (True, False))
    return list(found)


def _by_gain(trial: Trial) -> tuple[float, str]:
    assert trial.median_us is not None, "a prediction has a time"
    assert trial.default_us is not None, "and its default's"
    return -trial.default_us / trial.median_us, trial.to_json()


def _nearest(asked: Sequence[DecodeProblem]) -> dict[DecodeProblem, list[DecodeProblem]]:
    """By problem, those between that are nearer to it, as a lookup sees it, than to all others."""
    found: dict[DecodeProblem, list[DecodeProblem]] = {problem: [] for problem in asked}
    shapes = {problem: lookup._Cell.of(problem).shape for problem in asked}
    for problem in _around(asked):
        if problem in found:
            continue
        shape = lookup._Cell.of(problem).shape
        alike = [p for p in asked if lookup._hard(p) == lookup._hard(problem)]
        found[min(alike, key=lambda p: (lookup._distance(shapes[p], shape), shapes[p]))].append(problem)
    return found


def _with_means(sizes: set[int]) -> list[int]:
    """Sizes, and the geometric means of adjacent ones."""
    known = sorted(sizes)
    return sorted(sizes | {round(math.sqrt(a * b)) for a, b in itertools.pairwise(known)})


class _Rows:
    """What `lookup` takes of these rows, all predicted, where they are shipped."""

    def __init__(self, target: Target, rows: Iterable[Trial]) -> None:
        self.target = target
        groups: dict[object, list[lookup._Row]] = {}
        for row in rows:
            groups.setdefault(lookup._hard(row.problem), []).append(lookup._Row(row, True))
        self.pools = {hard: lookup._Pool(group) for hard, group in groups.items()}

    def of(self, problem: DecodeProblem) -> Trial | None:
        if (pool := self.pools.get(lookup._hard(problem))) is None:
            return None
        variants, legal = plan._rows(problem, self.target)
        question = lookup._Question(lookup._Cell.of(problem), legal, plan._revisions(variants), plan._toolchain())
        found = (None if problem.hinted else question.robust(pool)) or question.nearest(pool)
        return None if found is None else found.trial


# ---------------------------------------------------------------------------------------------------------------- files


def path_of(directory: Path, target: Target, op: str = "decode") -> Path:
    """Where the shipped rows of a target's device lie in a directory like tuning_db."""
    return directory / slug(target.device) / f"{op}.jsonl"


def beside(path: Path, problems: Iterable[DecodeProblem], target: Target) -> list[Trial]:
    """The rows of a file that stay when predictions for the problems are written: what was measured, and other problems.

    InvalidInput for a file with faults.
    """
    if not path.exists():
        return []
    kept, faults, _ = shipped._examine(path)
    if faults:
        raise InvalidInput(f"{path}: {faults[0]}; correct the file or remove it")
    asked = set(problems)
    return [t for t in kept if t.provenance != PROVENANCE or t.target != target.name or t.problem not in asked]


def write(path: Path, trials: Sequence[Trial], kept: Sequence[Trial]) -> int:
    """The file with these rows, its number of rows; no file where there are none."""
    if trials or kept:
        return shipped.export([*kept, *trials], path)
    path.unlink(missing_ok=True)
    return 0
