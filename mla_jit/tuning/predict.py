"""What ships for devices that nobody has measured: configs that a model and really compiled kernels put far ahead.

The analytic model (heuristic.py) has constants of one H200. Of pairs of configs that it saw at least 15 % apart there,
98 of 100 were in that order by their measured times, of pairs 3 to 6 % apart 73. So a config is taken only where it is
that far ahead of what a call takes without a row, and is still ahead with the target's bandwidth, matrix rate and
launch cost each halved and doubled, and if spills cost nothing. Kernels go through the cache, as a call would compile
them; no GPU is needed. Times in µs.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import ahead, ops, plan, settings
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, NoVariant
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target
from mla_jit.tuning import lookup, shipped, space
from mla_jit.tuning.heuristic import predicted_us
from mla_jit.tuning.rows import PROVENANCES, Trial, slug
from mla_jit.tuning.store import Store

PROVENANCE = PROVENANCES[-1]
MARGIN, LEAST_MARGIN = 0.15, 0.03  # faster than the default by; the latter also under every doubt
MOST_KERNELS = 40  # first kernels that one `predict` compiles
POLICY = (
    "predicted, never run. Model v1: heuristic.predicted_us, its constants fitted on one H200 and scaled by "
    "configs/targets.yaml, with registers, shared memory and spills of the compiled first kernel"
)
_RATES = ("bandwidth_gbps", "bf16_tflops", "launch_us")
_SIZES = ("G", "BATCH_POW2")  # constants that hardly move what a kernel uses: 8 to 128 heads, by 8 % of the registers
_TILE = ("block_m", "block_n")
_PROBES = 0.6  # part of the kernels that the choice may cost; the others are those of the rows
_TRIED = 3  # kernels beside the defaults' that a kind of problem gets
_CUTS = 24  # of a kernel's configs, by the model without its artifact
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
    """A problem, what a call takes without a row, and other configs by their first kernel, the most promising first."""

    problem: DecodeProblem
    default: Config
    kernel: Source  # the default's
    others: dict[Source, tuple[Config, ...]]


@dataclass(frozen=True)
class _Pick:
    """A config to take instead of a default. `gains`: the default's time over its; first without, then with doubts."""

    shape: _Shape
    config: Config
    kernel: Source
    time_us: float
    default_us: float
    gains: tuple[float, ...]


def predict(
    problems: Iterable[DecodeProblem], target: Target, *, margin: float = MARGIN, most_kernels: int = MOST_KERNELS,
    workers: int | None = None, kept: Iterable[Trial] = (), command: str = "mla-tune predict",
    on_built: Callable[[ahead.Built], None] | None = None,
) -> Prediction:  # fmt: skip
    """Rows for the problems where another config is predicted to be faster than the default by the margin.

    `most_kernels` first kernels are compiled, `workers` at a time (if absent, one a usable CPU): those of the defaults
    and of what promises most; kernels that differ in heads or lanes alone stand for each other until a row is made,
    which has the figures of its own. Where they do not suffice, the rows that gain most are made. Every kernel of a row
    was compiled and is legal. Left out is a row that a lookup would take for another problem which it slows down, asked
    for or between those asked for, beside the rows `kept`. InvalidInput for a margin that is within the model's noise,
    and for a target without kernels.
    """
    if margin < LEAST_MARGIN:
        raise InvalidInput(f"a margin of {margin:.0%} is within the model's noise; the least is {LEAST_MARGIN:.0%}")
    if not target.triton:
        raise InvalidInput(f"{target.name} has no kernels that could be compiled ahead; `mla-tune run` measures there")
    asked = list(dict.fromkeys(problems))
    search = _Search(target, margin, _Kernels(target, most_kernels, workers, on_built))
    shapes = [shape for problem in asked if (shape := search.shape(problem)) is not None]
    search.probe(shapes)
    picks = search.made([pick for shape in shapes if (pick := search.pick(shape)) is not None])
    others = [trial for trial in kept if (trial.provenance, trial.target) == (PROVENANCE, target.name)]
    trials = search.harmless([search.trial(pick, command) for pick in picks], asked, others)
    without = {problem: why for problem, why in search.without.items() if problem not in {t.problem for t in trials}}
    kernels = search.kernels
    return Prediction(tuple(trials), without, len(kernels.own), kernels.combines, tuple(kernels.faults.items()))


class _Kernels:
    """The first kernels that were compiled, each once, and what stands for others that are like them."""

    def __init__(
        self, target: Target, most: int, workers: int | None, on_built: Callable[[ahead.Built], None] | None
    ) -> None:
        self.target, self.most, self.workers, self.on_built = target, most, workers, on_built
        self.own: dict[Source, Artifact | None] = {}  # None: not legal
        self.alike: dict[Source, Artifact | None] = {}
        self.faults: dict[str, str] = {}
        self.combines = 0

    def compile(self, wanted: Iterable[tuple[Source, DecodeProblem]], most: int | None = None) -> None:
        """Those that are not known, in their order, as many as there is room for."""
        room = max(0, (self.most if most is None else most) - len(self.own))
        new = {source: problem for source, problem in wanted if source not in self.own}
        for built in self._build(dict(itertools.islice(new.items(), room))):
            self.own[built.job.source] = built.artifact
            self.alike.setdefault(_plain(built.job.source), built.artifact)

    def combine(self, wanted: dict[Source, DecodeProblem]) -> set[Source]:
        """Compiles second kernels; those that are not legal."""
        built = self._build(wanted)
        self.combines += len(built)
        return {one.job.source for one in built if not one.ok}

    def _build(self, wanted: dict[Source, DecodeProblem]) -> list[ahead.Built]:
        jobs = [ahead.Job(self.target.name, source, problem) for source, problem in wanted.items()]
        built = ahead.build_all(jobs, workers=self.workers, on_done=self.on_built) if jobs else []
        built.sort(key=lambda one: one.job.source.key)
        self.faults |= {f"{one.job.source.name} {one.job.source.key[:16]}": one.error for one in built if not one.ok}
        return built

    def like(self, source: Source) -> Artifact | None:
        """The kernel, else one that is like it; None if there is none that is legal."""
        return self.own.get(source) or self.alike.get(_plain(source))

    def known(self, source: Source) -> bool:
        return source in self.own or _plain(source) in self.alike


class _Search:
    """The choice for all shapes of one target. `without` collects why problems get no row."""

    def __init__(self, target: Target, margin: float, kernels: _Kernels) -> None:
        self.target, self.margin, self.kernels = target, margin, kernels
        self.variants = {variant.name: variant for variant in ops.variants("decode")}
        self.doubts = list(_doubted(target))
        self.without: dict[Any, str] = {}  # by DecodeProblem
        self.served: dict[tuple[DecodeProblem, Config], float] = {}

    def us(self, problem: DecodeProblem, config: Config, kernel: Artifact | None, target: Target) -> float:
        return predicted_us(problem, target, self.variants[config.variant], config, kernel)

    def guess(self, problem: DecodeProblem, config: Config) -> float:
        """Without a kernel."""
        return self.us(problem, config, None, self.target)

    def timed(self, problem: DecodeProblem, config: Config, kernel: Source) -> float:
        return self.us(problem, config, self.kernels.like(kernel), self.target)

    def source(self, problem: DecodeProblem, config: Config) -> Source | None:
        """The first kernel; None of a host variant, which has none."""
        return next(iter(self.variants[config.variant].sources(problem, self.target, config)), None)

    # --------------------------------------------------------------------------------------- what is worth compiling

    def shape(self, problem: DecodeProblem) -> _Shape | None:
        """The problem with its candidates, of the default's variant alone, or None, with the reason noted."""
        try:
            default = plan.analytic(problem, self.target).config
        except NoVariant as error:
            self.without[problem] = str(error)
            return None
        kernel = self.source(problem, default)
        if kernel is None or not _described(default):
            self.without[problem] = f"a call takes {default.variant}, of which the model says nothing"
            return None
        groups: dict[object, list[Config]] = {}
        for config in space.candidates(problem, self.target, [self.variants[default.variant]]):
            if config != default and _promises(config, default):
                groups.setdefault(space.first_kernel(config), []).append(config)
        others = {}
        for configs in groups.values():
            configs.sort(key=lambda config: (self.guess(problem, config), config.to_json()))
            if (source := self.source(problem, configs[0])) is not None:
                others[source] = tuple(configs[:_CUTS])
        return _Shape(problem, default, kernel, others)

    def probe(self, shapes: Sequence[_Shape]) -> None:
        """Compiles what the choice rests on: the defaults' kernels, and for each kind of problem what promises most."""
        most = int(_PROBES * self.kernels.most)
        defaults = {_plain(shape.kernel): (shape.kernel, shape.problem) for shape in reversed(shapes)}
        self.kernels.compile(reversed(defaults.values()))
        kinds: dict[DecodeProblem, list[_Shape]] = {}
        for shape in shapes:
            kinds.setdefault(_kind(shape.problem), []).append(shape)
        legal = dict.fromkeys(kinds, 0)
        while len(self.kernels.own) < most:
            wishes = {kind: wish for kind in kinds if legal[kind] < _TRIED and (wish := self.wish(kinds[kind]))}
            if not wishes:
                return
            self.kernels.compile((wish[1:] for wish in sorted(wishes.values(), key=lambda w: (-w[0], w[1].key))), most)
            for kind, (_, source, _) in wishes.items():
                legal[kind] += self.kernels.own.get(source) is not None

    def wish(self, shapes: Sequence[_Shape]) -> tuple[float, Source, DecodeProblem] | None:
        """The unknown kernel of which the shapes together hope most: (how much, kernel, for which problem)."""
        hopes: dict[Source, list[tuple[float, str, Source, DecodeProblem]]] = {}
        for shape in shapes:
            best = min([self.timed(shape.problem, c, s) for s, c in self.legal(shape)], default=math.inf)
            best = min(best, self.timed(shape.problem, shape.default, shape.kernel))
            unknown = [
                (self.guess(shape.problem, configs[0]), source.key, source)
                for source, configs in shape.others.items() if not self.kernels.known(source)
            ]  # fmt: skip
            if unknown and (first := min(unknown))[0] * (1 + LEAST_MARGIN) < best:
                hope = math.log(best / first[0]), *first[1:], shape.problem
                hopes.setdefault(_plain(first[2]), []).append(hope)
        if not hopes:
            return None
        most = max(hopes.values(), key=lambda some: (sum(one[0] for one in some), some[0][1]))
        return sum(one[0] for one in most), *max(most, key=lambda one: one[:2])[2:]

    def legal(self, shape: _Shape) -> Iterator[tuple[Source, Config]]:
        """The candidates whose kernels, or the like, are known to be legal."""
        for source, configs in shape.others.items():
            if (artifact := self.kernels.like(source)) is not None and _roomy(source, artifact):
                yield from ((source, config) for config in configs)

    # ---------------------------------------------------------------------------------------------------- what is taken

    def pick(self, shape: _Shape) -> _Pick | None:
        """What to take instead of the default: of configs that noise cannot tell apart the one most like it."""
        if self.kernels.like(shape.kernel) is None:
            self.without[shape.problem] = "the default's kernel is not legal, or was not compiled"
            return None
        timed = [(self.timed(shape.problem, config, source), config, source) for source, config in self.legal(shape)]
        if not timed:
            self.without[shape.problem] = "no other config promises more than the default"
            return None
        fastest = min(time_us for time_us, *_ in timed)
        ties = [one for one in timed if one[0] <= fastest * (1 + LEAST_MARGIN)]
        ties.sort(
            key=lambda one: (one[2] != shape.kernel, _differences(one[1], shape.default), one[0], one[1].to_json())
        )
        picks = [self.compared(shape, config, source) for _, config, source in ties]
        found = next((pick for pick in picks if self.ahead(pick)), None)
        if found is None:
            gain = self.timed(shape.problem, shape.default, shape.kernel) / fastest - 1
            doubt = ", but not under every doubt" if gain >= self.margin else ""
            self.without[shape.problem] = f"the best is predicted {gain:+.1%} faster than the default{doubt}"
        return found

    def compared(self, shape: _Shape, config: Config, source: Source) -> _Pick:
        """The config beside the default: at the rates as they are, at doubted ones, and as if spills cost nothing."""
        pair = (shape.default, self.kernels.like(shape.kernel)), (config, self.kernels.like(source))
        cases = [(there, pair) for there in self.doubts]
        cases.append((self.target, (_unspilled(*pair[0]), _unspilled(*pair[1]))))
        times = [[self.us(shape.problem, *one, there) for one in both] for there, both in cases]
        (default_us, time_us), *_ = times
        return _Pick(shape, config, source, time_us, default_us, tuple(a / b for a, b in times))

    def ahead(self, pick: _Pick) -> bool:
        return pick.gains[0] >= 1 + self.margin and min(pick.gains) >= 1 + LEAST_MARGIN

    def made(self, picks: Sequence[_Pick]) -> list[_Pick]:
        """The picks whose own kernels were compiled, are legal and leave them ahead; the most gainful kernels first."""
        weights: dict[Source, float] = {}
        for pick in picks:
            weights[pick.kernel] = weights.get(pick.kernel, 0.0) + math.log(pick.gains[0])
        problems = {pick.kernel: pick.shape.problem for pick in picks}
        order = sorted(weights, key=lambda source: (-weights[source], source.key))
        self.kernels.compile((source, problems[source]) for source in order)
        left = []
        for pick in picks:
            artifact, problem = self.kernels.own.get(pick.kernel), pick.shape.problem
            again = self.compared(pick.shape, pick.config, pick.kernel)
            if pick.kernel not in self.kernels.own:
                self.without[problem] = f"{pick.gains[0] - 1:.0%} faster, but the {self.kernels.most} kernels are spent"
            elif artifact is None or not _roomy(pick.kernel, artifact) or not self.ahead(again):
                self.without[problem] = (
                    "what promised most is not legal, or not far ahead, with the problem's own kernel"
                )
            else:
                left.append(again)
        return self.combined(left)

    def combined(self, picks: Sequence[_Pick]) -> list[_Pick]:
        """The picks whose further kernels compile."""
        rest = [self.variants[p.config.variant].sources(p.shape.problem, self.target, p.config)[1:] for p in picks]
        wanted = {source: p.shape.problem for p, sources in zip(picks, rest, strict=True) for source in sources}
        bad = self.kernels.combine(wanted)
        for pick, sources in zip(picks, rest, strict=True):
            if bad.intersection(sources):
                self.without[pick.shape.problem] = "the combine of what promised most is not legal"
        return [pick for pick, sources in zip(picks, rest, strict=True) if not bad.intersection(sources)]

    def trial(self, pick: _Pick, command: str) -> Trial:
        artifact = self.kernels.own[pick.kernel]
        assert artifact is not None, "`made` leaves no pick without its kernel"
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
        """As many trials as can stand together, the most gainful first, so that no call gets one that the model says is
        slower there than its default. One by one, because a row may keep a call from another that does harm.
        """
        taken: list[Trial] = []
        cases = _around(asked)
        with tempfile.TemporaryDirectory(prefix="mla_jit-predict-") as folder:
            before = set(self.slowed(cases, kept, Path(folder)))
            left = sorted(
                trials, key=lambda trial: (-(trial.default_us or 0.0) / (trial.median_us or 1.0), trial.to_json())
            )
            while left:
                kin, found = {}, []
                for trial in left:
                    hard = lookup._hard(trial.problem)  # rows of other kinds have no part in it
                    if hard not in kin:
                        kin[hard] = [problem for problem in cases if lookup._hard(problem) == hard]
                    slowed = self.slowed(kin[hard], [*kept, *taken, trial], Path(folder))
                    if harm := {problem: by for problem, by in slowed.items() if problem not in before}:
                        worst = max(harm, key=lambda problem: harm[problem])
                        self.without[trial.problem] = (
                            f"a call of {worst} would get its row and be {harm[worst]:.0%} slower"
                        )
                    else:
                        taken.append(trial)
                        found.append(trial)
                left = [trial for trial in left if trial not in taken] if found else []
        return taken

    def slowed(
        self, problems: Iterable[DecodeProblem], rows: Sequence[Trial], folder: Path
    ) -> dict[DecodeProblem, float]:
        """The problems for which a call would take another's row and be slower than with its default, and how much."""
        found = {}
        for problem, choice in self.calls(problems, rows, folder):
            if choice.trial is None or choice.trial.problem == problem:
                continue
            default = plan.analytic(problem, self.target).config
            if not _described(default):
                continue
            by = self.served_us(problem, choice.config) / self.served_us(problem, default) - 1
            if by > LEAST_MARGIN:
                found[problem] = by
        return found

    def calls(
        self, problems: Iterable[DecodeProblem], rows: Sequence[Trial], folder: Path
    ) -> Iterator[tuple[DecodeProblem, plan.Choice]]:
        """What calls take if there are these rows and no others."""
        path = folder / f"{len(list(folder.iterdir()))}.db"
        with Store(path) as store:
            store.add(rows)
        try:
            with settings.scope(tuning_db=path, shipped_db=False):
                lookup.forget()
                for problem in problems:
                    try:
                        yield problem, plan.known(problem, self.target)
                    except NoVariant:
                        continue
        finally:
            lookup.forget()

    def served_us(self, problem: DecodeProblem, config: Config) -> float:
        if (problem, config) not in self.served:
            source = self.source(problem, config)
            kernel = None if source is None else self.kernels.like(source)
            self.served[problem, config] = self.us(problem, config, kernel, self.target)
        return self.served[problem, config]


def _described(config: Config) -> bool:
    """Whether the model is one of the config's kernels: split-K, then a combine."""
    return {"num_kv_splits", "combine_d"} <= set(config)


def _promises(config: Config, default: Config) -> bool:
    """Whether the model has something to say of a candidate that holds on other devices, too.

    Not of larger tiles: for 64 tokens instead of 32 it promises almost twice the speed where a like kernel was measured
    to gain nothing (sgl-project/sglang#34580, MI355X). Nor of stages where tiles are gathered, see heuristic.py.
    """
    if any(config.int(name) > default.int(name) for name in _TILE):
        return False
    return config.get("tma") is not False or config.get("num_stages") == default.get("num_stages")


def _doubted(target: Target) -> Iterator[Target]:
    """The target, and with its rates halved and doubled: the model's times at other constants, but for their scale."""
    yield target
    for factors in itertools.product((0.5, 2.0), repeat=len(_RATES)):
        rates = {name: factor * getattr(target, name) for name, factor in zip(_RATES, factors, strict=True)}
        yield dataclasses.replace(target, **rates)


def _plain(source: Source) -> Source:
    """The kernel without what hardly moves its resources."""
    return dataclasses.replace(source, constants=tuple(c for c in source.constants if c[0] not in _SIZES))


def _kind(problem: DecodeProblem) -> DecodeProblem:
    """The problem without its sizes, but for whether a sequence has several tokens: that is another kernel."""
    q_len = min(problem.q_len, 2)
    return dataclasses.replace(
        problem, num_heads=problem.num_kv_heads, batch=1, q_len=q_len, max_kv_len=1, total_kv=None
    )


def _differences(config: Config, default: Config) -> int:
    return sum(default.get(name) != value for name, value in config.items())


def _unspilled(config: Config, artifact: Artifact | None) -> tuple[Config, Artifact | None]:
    return config, None if artifact is None else dataclasses.replace(artifact, spill_bytes=0)


def _roomy(source: Source, artifact: Artifact) -> bool:
    """Whether the kernel may spill somewhat more, as it does with an LSE, lengths or sinks, and stay legal."""
    return source.limits is None or artifact.spill_bytes <= _SPILL_ROOM * source.limits.spill_bytes


def _around(problems: Sequence[DecodeProblem]) -> list[DecodeProblem]:
    """The problems, and those between their sizes, with hints and without."""
    groups: dict[DecodeProblem, list[DecodeProblem]] = {}
    for problem in problems:
        alike = dataclasses.replace(
            problem, num_heads=problem.num_kv_heads, batch=1, q_len=1, max_kv_len=1, total_kv=None
        )
        groups.setdefault(alike, []).append(problem)
    found = dict.fromkeys(problems)
    for alike, group in groups.items():
        axes = (_with_means(getattr(p, name) for p in group) for name in ("batch", "q_len", "num_heads", "max_kv_len"))
        for (batch, q_len, heads, kv), hinted in itertools.product(itertools.product(*axes), (True, False)):
            heads -= heads % alike.num_kv_heads
            found[
                dataclasses.replace(
                    alike, batch=batch, q_len=q_len, num_heads=heads, max_kv_len=bucket(kv), hinted=hinted
                )
            ] = None
    return list(found)


def _with_means(sizes: Iterable[int]) -> list[int]:
    """Sizes, and the geometric means of adjacent ones."""
    known = sorted(set(sizes))
    return sorted({*known, *(round(math.sqrt(a * b)) for a, b in itertools.pairwise(known))})


# ---------------------------------------------------------------------------------------------------------------- files


def path_of(directory: Path, target: Target, op: str = "decode") -> Path:
    """Where the shipped rows of a target's device lie in a directory like tuning_db."""
    return directory / slug(target.device) / f"{op}.jsonl"


def beside(path: Path, problems: Iterable[DecodeProblem], target: Target) -> list[Trial]:
    """The rows of a file that stay where predictions for the problems are written: the measured, and other problems'.

    InvalidInput for a file with faults.
    """
    if not path.exists():
        return []
    if faults := shipped.check(path):
        raise InvalidInput(f"{path}: {faults[0]}; correct the file or remove it")
    asked = set(problems)
    rows = [Trial.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [t for t in rows if t.provenance != PROVENANCE or t.target != target.name or t.problem not in asked]


def write(path: Path, trials: Sequence[Trial], kept: Sequence[Trial]) -> int:
    """Makes it the file of these rows, or none where there are none; their number."""
    if trials or kept:
        return shipped.export([*kept, *trials], path)
    path.unlink(missing_ok=True)
    return 0
