"""What `mla-tune bench` times: its shapes, the rows that come of them, and the figures that sum the rows up.

Peers' figures measured elsewhere are in tuning_db/<device>/peers_decode.jsonl. S is the geometric mean of the scores: a
score is best peer ÷ ours.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mla_jit import api, api_metadata, resources, settings
from mla_jit import target as targets
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import bench, peers, prefill_grid, proofs
from mla_jit.tuning.bench import Runner, Shape
from mla_jit.tuning.rows import slug

Decode = Callable[..., Any]
Times = Mapping[str, float | None]  # µs by peer; None for one that cannot serve the shape


@dataclass(frozen=True)
class Figure:
    """A line of a summary. `value` is None where the rows do not give it; `aim`: what it is to reach, or not exceed."""

    name: str
    what: str
    value: float | None
    aim: float | None = None
    at_most: bool = False
    spec: str = ".3f"

    @property
    def met(self) -> bool:
        if self.aim is None:
            return True
        if self.value is None:
            return False
        return self.value <= self.aim if self.at_most else self.value >= self.aim

    def __str__(self) -> str:
        value = "-" if self.value is None else format(self.value, self.spec)
        if self.aim is None:
            return f"{self.what}: {value}"
        return f"{self.what}: {value} (aim: at {'most' if self.at_most else 'least'} {self.aim:g}){_MISSED[self.met]}"


_MISSED = {True: "", False: ", MISSED"}


# ----------------------------------------------------------------------------------------------------- beside the peers


@dataclass(frozen=True)
class Row:
    """A shape, in µs: our time with low and high over `runs`, peers of this run, peers' recorded figures.

    spread_us: the largest max - min over the rounds of a run. `score` is best peer ÷ ours, the recorded figure of a
    peer timed in this run replaced by today's; None where no peer has a time.
    """

    shape: str
    ours_us: float
    low_us: float
    high_us: float
    spread_us: float
    timed_us: Times
    recorded_us: Mapping[str, float]
    roof_us: float
    error: float

    @property
    def best_us(self) -> float | None:
        return _best(self.timed_us, self.recorded_us)

    @property
    def score(self) -> float | None:
        return _score(self.best_us, self.ours_us)


def _best(timed_us: Times, recorded_us: Mapping[str, float]) -> float | None:
    today = {peers.RECORDED.get(name, name): us for name, us in timed_us.items() if us is not None}
    return min({**recorded_us, **today}.values(), default=None)


def _score(best_us: float | None, ours_us: float) -> float | None:
    return None if best_us is None else best_us / ours_us


def ragged_lens(batch: int = 64, low: int = 128, high: int = 32768, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths, the same everywhere: round(exp(uniform(log low, log high)))."""
    rng = random.Random(seed)
    return tuple(round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(batch))


_RECORDED_ON = "nvidia_h200"  # the GPU on which peers were measured, as tuning_db/ spells it


def peers_grid(q_len: int = 1, on: str | None = None) -> list[tuple[Shape, dict[str, float]]]:
    """The shapes of `q_len` query tokens on which peers were measured, with their times in µs by peer.

    on: a GPU's name; without times where it is another model than the one on which they were taken.
    """
    rows = []
    alike = on is None or slug(on) == _RECORDED_ON
    for line in resources.path("tuning_db", _RECORDED_ON, "peers_decode.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("q_len", 1) == q_len:
            lens = ragged_lens(row["batch"]) if row["kv_len"] == "ragged" else (row["kv_len"],) * row["batch"]
            rows.append((Shape(row["heads"], lens, q_len, label=str(row["kv_len"])), row["peers_us"] if alike else {}))
    return rows


def rows(
    decode: Decode, grid: Iterable[tuple[Shape, Mapping[str, float]]], against: Sequence[str] = (), *, runs: int = 3,
    rounds: int = 5, hinted: bool = False, apart: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """Our decode on shapes with peers' recorded times, `runs` times each on fresh inputs, peers alternated.

    apart: with another kernel between calls, as bench.bench has it.
    """
    runners = {"mla_jit": bench.ours(decode, hinted=hinted), **{name: peers.by_name(name) for name in against}}
    for shape, recorded in grid:
        found = _timed(shape, runners, runs, rounds, apart)
        mine = found.times["mla_jit"]
        yield Row(
            str(shape), statistics.median(mine), min(mine), max(mine), found.spread_us, found.medians(against),
            recorded, found.roof_us, found.error,
        )  # fmt: skip


@dataclass(frozen=True)
class _Timed:
    """Several runs of `bench` on a shape: µs by runner, a value a run; the largest spread and error of ours."""

    times: dict[str, list[float]]
    spread_us: float
    error: float
    roof_us: float

    def medians(self, names: Iterable[str]) -> dict[str, float | None]:
        return {name: statistics.median(us) if (us := self.times[name]) else None for name in names}


def _timed(shape: Shape, runners: Mapping[str, Runner], runs: int, rounds: int, apart: bool = False) -> _Timed:
    results = [bench.bench(shape, runners, rounds=rounds, seed=seed, apart=apart) for seed in range(runs)]
    times = {name: [r.times_us[name] for r in results if name in r.times_us] for name in runners}
    return _Timed(times, max(r.spread_us for r in results), max(r.error for r in results), results[0].roof_us)


def score_figures(found: Sequence[Row]) -> list[Figure]:
    """S, if any shape has a score."""
    scores = [row.score for row in found if row.score is not None]
    if not scores:
        return []
    what = f"geometric mean of best peer / ours over {len(scores)} shapes"
    return [Figure("geometric_mean", what, geometric_mean(scores))]


# -------------------------------------------------------------------------------------------------------------- capture


@dataclass(frozen=True)
class CaptureRow:
    """A shape, in µs: captured at the table's capacity and replayed at the real length; with the exact `max_kv_len`.

    `ratio`, `low`, `high`: the median, least and largest of the runs' capacity ÷ hint.
    """

    shape: str
    capacity_us: float
    hint_us: float
    ratio: float
    low: float
    high: float
    error: float


CAPTURED = tuple(
    Shape(heads, (kv_len,) * batch)
    for heads, batch, kv_len in (
        (16, 1, 1024), (16, 1, 16384), (16, 64, 4096), (64, 1, 4096), (64, 16, 4096), (64, 64, 1024), (128, 1, 1024),
        (128, 1, 16384), (128, 4, 4096), (128, 64, 4096), (128, 128, 1024),
    )
)  # fmt: skip


def capture_rows(decode: Decode, *, runs: int = 3, rounds: int = 7) -> Iterator[CaptureRow]:
    """What a capture at capacity costs a replay at the real length, on the shapes CAPTURED, both in alternation."""
    runners = {"mla_jit": bench.ours(decode), "hint": bench.ours(decode, hinted=True)}
    for shape in CAPTURED:
        found = _timed(shape, runners, runs, rounds)
        capacity, hint = (found.times[name] for name in runners)
        ratios = [a / b for a, b in zip(capacity, hint, strict=True)]
        yield CaptureRow(
            str(shape), statistics.median(capacity), statistics.median(hint), statistics.median(ratios), min(ratios),
            max(ratios), found.error,
        )  # fmt: skip


def capture_figures(found: Sequence[CaptureRow]) -> list[Figure]:
    return [Figure("worst_ratio", f"worst ratio over {len(found)} shapes", max(row.ratio for row in found))]


# ------------------------------------------------------------------------------------------------------------ databases


@dataclass(frozen=True)
class DatabaseRow:
    """A shape, in µs: ours with the databases as they are and with none, and the peers as in `Row`.

    held_out: no database holds the shape, and its peers have no recorded figures. provenance: of the choice that the
    databases gave, as `Choice` has it.
    """

    shape: str
    held_out: bool
    tuned_us: float
    untuned_us: float
    timed_us: Times
    recorded_us: Mapping[str, float]
    roof_us: float
    error: float
    provenance: str

    @property
    def best_us(self) -> float | None:
        return _best(self.timed_us, self.recorded_us)

    @property
    def tuned_score(self) -> float | None:
        return _score(self.best_us, self.tuned_us)

    @property
    def untuned_score(self) -> float | None:
        return _score(self.best_us, self.untuned_us)


def database_rows(
    decode: Decode, against: Sequence[str] = (), *, runs: int = 3, rounds: int = 5, hinted: bool = False,
    grid: Iterable[tuple[Shape, Mapping[str, float]]] | None = None,
    held_out: Sequence[DecodeProblem] = proofs.HELD_OUT,
) -> Iterator[DatabaseRow]:  # fmt: skip
    """What the databases are worth: our decode with them and without any, peers alternated, on the peers' grid.

    Then on shapes that the databases do not hold; MlaJitError, before anything is timed, where they hold one.
    """
    proofs.untuned(targets.here(), held_out)
    provenances: list[str] = []

    def noted(*arguments: Any, **keywords: Any) -> Any:
        out = decode(*arguments, **keywords)
        if (dispatch := api.last_dispatch()) is not None:
            provenances[:] = [dispatch.provenance]
        return out

    with tempfile.TemporaryDirectory(prefix="mla_jit-bench-") as root:
        nothing = partial(_resolved, shipped_db=False, tuning_db=Path(root, "none.db"))
        runners = {
            "mla_jit": bench.ours(noted, hinted=hinted, scope=_resolved),
            "untuned": bench.ours(decode, hinted=hinted, scope=nothing),
            **{name: peers.by_name(name) for name in against},
        }
        known = [(shape, recorded, False) for shape, recorded in (peers_grid() if grid is None else grid)]
        for shape, recorded, out in [*known, *((_shape(problem), {}, True) for problem in held_out)]:
            found = _timed(shape, runners, runs, rounds)
            tuned, untuned = (statistics.median(found.times[name]) for name in ("mla_jit", "untuned"))
            yield DatabaseRow(
                str(shape), out, tuned, untuned, found.medians(against), recorded, found.roof_us, found.error,
                provenances[0],
            )  # fmt: skip


@contextlib.contextmanager
def _resolved(**changes: object) -> Iterator[None]:
    """With settings changed and every choice made anew; what was chosen is forgotten again."""
    with settings.scope(**changes):
        api.reload()
        try:
            yield
        finally:
            api.reload()


def _shape(problem: DecodeProblem) -> Shape:
    p = problem
    return Shape(p.num_heads, (p.max_kv_len,) * p.batch, p.q_len, p.page_size, p.kv_dtype, q_dtype=p.q_dtype)


def database_figures(found: Sequence[DatabaseRow]) -> list[Figure]:
    """S with the databases, without any, and with them on the shapes that they do not hold."""

    def s(name: str, what: str, held_out: bool, score: Callable[[DatabaseRow], float | None]) -> Figure:
        scores = [x for row in found if row.held_out == held_out and (x := score(row)) is not None]
        return Figure(name, f"{what}, {len(scores)} shapes", geometric_mean(scores) if scores else None)

    return [
        s("with_databases", "S with the databases as they are", False, lambda row: row.tuned_score),
        s("without_databases", "S without any database", False, lambda row: row.untuned_score),
        s("untuned_shapes", "S on shapes that no database holds", True, lambda row: row.tuned_score),
    ]


# --------------------------------------------------------------------------------------------------------------- ragged


@dataclass(frozen=True)
class RaggedRow:
    """A call by one scheduler or a peer, or the kernel that makes a list, in µs: median, least, largest of the runs.

    `kind`: "call"; "list", the kernel alone, of a batch; "full" and "padded", a layer's calls without and with empty
    sequences, which read the step's list; "full, list" and "padded, list", the same with a list made in each call.
    `aim_us`: what it is not to exceed. `error` is None where there is no result.
    """

    kind: str
    shape: str
    scheduler: str
    heads: int
    ours_us: float
    low_us: float
    high_us: float
    aim_us: float | None = None
    error: float | None = None


RAGGED_AIMS_US = {16: 216.0, 64: 248.0, 128: 340.0}  # by heads, of 64 log-uniform lengths, the list made in each call
LIST_AIM_US, LISTED = 6.0, (1, 64, 256)  # of the kernel that makes a list, for these batches
PADDING_AIM = 1.01  # a layer's time with empty sequences ÷ without
PADDED = tuple((heads, 4096, 128, 1024) for heads in (16, 128))  # heads, length, sequences, with the empty ones
_LISTS_A_SET = 20  # calls in a row of the kernel that makes a list, in a graph


def ragged_rows(decode: Decode, against: Sequence[str] = (), *, runs: int = 3, rounds: int = 5) -> Iterator[RaggedRow]:
    """Both schedulers and peers on the peers' ragged shapes; the kernel that makes a list; what empty sequences cost.

    A peer's schedule is made before, and not timed; ours is made in each call.
    """
    for shape in (shape for shape, _ in peers_grid() if shape.label == "ragged"):
        runners = {name: bench.ours(partial(decode, scheduler=way)) for name, way in _WAYS.items()}
        runners |= {name: peers.by_name(name) for name in against}
        found = _timed(shape, runners, runs, rounds)
        for name, times in found.times.items():
            way, mine = _WAYS.get(name, name), name in _WAYS
            aim = RAGGED_AIMS_US.get(shape.heads) if way == "persistent" else None
            if times:
                yield _ragged_row("call", str(shape), way, shape.heads, times, aim, found.error if mine else None)
    for batch in LISTED:
        times = [_list_us(bench.Shape(16, ragged_lens(batch, seed=seed)), rounds, seed) for seed in range(runs)]
        yield _ragged_row("list", f"the list of {batch} sequences", "persistent", 16, times, LIST_AIM_US)
    for heads, kv_len, batch, padded in PADDED:
        for kind, empty in (("full", 0), ("padded", padded - batch)):
            shape = bench.Shape(heads, (kv_len,) * batch + (0,) * empty)
            each = partial(decode, scheduler="persistent")
            runners = {"mla_jit": _captured(each, batch, listed=True), "list": _captured(each, batch, listed=False)}
            found = _timed(shape, runners, runs, rounds)
            label = f"{kv_len} × {heads} heads × {batch}" + (f" + {empty} empty" if empty else "")
            yield _ragged_row(kind, label, "persistent", heads, found.times["mla_jit"], None, found.error)
            label += ", with its list"
            yield _ragged_row(f"{kind}, list", label, "persistent", heads, found.times["list"], None, found.error)


_WAYS = {"mla_jit": "persistent", "split": "split"}  # by runner


def _captured(decode: Decode, filled: int, *, listed: bool) -> bench.Runner:
    """Calls as a padded graph makes them: sequences past the first `filled` have no query token (qo_indptr repeats).

    listed: as a layer of many makes them, all of which read one list, made before; else each call makes its own.
    """

    def prepare(sets: Sequence[bench.Set]) -> bench.Call:
        lens = sets[0].lens
        tokens = torch.arange(len(lens) + 1, dtype=torch.int32, device=lens.device).clamp(max=filled)
        more: dict[str, Any] = {"qo_indptr": tokens, "max_q_len": 1}
        if listed:  # the sets have the same lengths
            first = sets[0]
            more["metadata"] = api_metadata.decode_metadata(first.q[:filled, 0], first.cache, **more, **first.keywords)

        def call(s: bench.Set) -> torch.Tensor:
            out: torch.Tensor = decode(s.q[:filled, 0], s.cache, **more, **s.keywords)
            return out[:, None]

        return call

    return bench.Runner(prepare)


def _ragged_row(
    kind: str, shape: str, scheduler: str, heads: int, times: Sequence[float], aim_us: float | None = None,
    error: float | None = None,
) -> RaggedRow:  # fmt: skip
    median = statistics.median(times)
    return RaggedRow(kind, shape, scheduler, heads, median, min(times), max(times), aim_us, error)


def _list_us(shape: Shape, rounds: int, seed: int) -> float:
    """µs of the kernel that makes a list, launched again and again in a graph: the median of the rounds."""
    first = bench.make_sets(shape, seed=seed, rotate_bytes=0)[0]
    metadata = api_metadata.decode_metadata(first.q, first.cache, **first.keywords)

    def once(s: bench.Set) -> Any:
        return api_metadata.decode_metadata(s.q, s.cache, **s.keywords, metadata=metadata)

    calls = [first] * _LISTS_A_SET
    graph = bench.graph_of(once, calls)
    return statistics.median(bench.time_alternating({"": graph}, len(calls), rounds=rounds)[""])


def ragged_figures(found: Sequence[RaggedRow]) -> list[Figure]:
    """The persistent scheduler at each head count, the slowest list, and the dearest padding, with their aims."""
    figures = [
        Figure(f"persistent_{row.heads}_us", f"us, persistent, {row.shape}", row.ours_us, row.aim_us, True, ".1f")
        for row in found if row.kind == "call" and row.scheduler == "persistent"
    ]  # fmt: skip
    split = {row.shape: row.ours_us for row in found if row.kind == "call" and row.scheduler == "split"}
    gains = [split[row.shape] / row.ours_us for row in found if row.scheduler == "persistent" and row.shape in split]
    lists = [row.ours_us for row in found if row.kind == "list"]
    full = {(row.kind, row.heads): row.ours_us for row in found if row.kind.startswith("full")}

    def padding(more: str) -> float | None:
        rows = [row for row in found if row.kind == f"padded{more}" and (f"full{more}", row.heads) in full]
        return max((row.ours_us / full[f"full{more}", row.heads] for row in rows), default=None)

    return [
        *figures,
        Figure("gain", f"geometric mean of split / persistent over {len(gains)} shapes", _mean(gains)),
        Figure("list_us", "us, the slowest list", max(lists, default=None), LIST_AIM_US, True, ".2f"),
        Figure("padding", "worst padded / full of a layer", padding(""), PADDING_AIM, True, ".4f"),
        Figure("padding_listed", "worst padded / full with a list in each call", padding(", list"), None, True, ".4f"),
    ]


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None


# --------------------------------------------------------------------------------------------------------------- proofs


def quality_figures(found: Sequence[proofs.QualityRow], seconds: Mapping[str, float]) -> list[Figure]:
    """Of `proofs.quality_rows`; `seconds` are the sweeps', "exhaustive" and "auto"."""
    reached = [row.reached for row in found]
    exhaustive_s, auto_s = seconds["exhaustive"], seconds["auto"]
    mean = f"geometric mean of exhaustive / auto over {len(found)} shapes"
    return [
        Figure("reached", mean, geometric_mean(reached), 0.98),
        Figure("worst_reached", "worst exhaustive / auto", min(reached), 0.94),
        Figure("exhaustive_s", "seconds of the exhaustive sweep", exhaustive_s, spec=".1f"),
        Figure("auto_s", "seconds of the auto sweep", auto_s, spec=".1f"),
        Figure("time_share", "auto's seconds / exhaustive's", auto_s / exhaustive_s, 0.20, at_most=True),
        Figure("least_legal", "fewest legal configs of a shape", min(row.legal for row in found), 300, spec=".0f"),
        Figure("least_spread", "least median / best of a shape", min(row.spread for row in found), 1.5, spec=".2f"),
    ]  # fmt: skip


def neighbour_figures(found: Sequence[proofs.NeighbourRow]) -> list[Figure]:
    """Of `proofs.neighbour_rows`: how much of the tuned config's speed each way to do without tuning has."""

    def mean(values: Iterable[float]) -> float:
        return geometric_mean(list(values))

    what = f"geometric mean of tuned / %s over {len(found)} shapes"
    return [
        Figure("neighbour", what % "neighbour", mean(row.reached for row in found), 0.95),
        Figure("worst_neighbour", "worst tuned / neighbour", min(row.reached for row in found), 0.85),
        Figure("analytic", what % "analytic", mean(row.analytic_reached for row in found), 0.80),
        Figure("aiter", what % "aiter's rule", mean(row.aiter_reached for row in found)),
        Figure("vllm", what % "vllm's rule", mean(row.vllm_reached for row in found)),
    ]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def as_json(row: Any) -> dict[str, Any]:
    """A row of any grid: its fields, then its properties."""
    computed = [name for name, value in vars(type(row)).items() if isinstance(value, property)]
    return {**asdict(row), **{name: getattr(row, name) for name in computed}}


# -------------------------------------------------------------------------------------------------------------- prefill


def prefill_figures(found: Sequence[prefill_grid.PromptRow]) -> list[Figure]:
    """Of `prefill_grid.rows`: ours beside cuDNN's, what uneven lengths cost, each scheduler on these, and fp8."""
    scores = [row.score for row in found if row.score is not None]
    rates = {row.shape: row.tflops for row in found}
    uneven, equal = (rates.get(str(shape)) for shape in (prefill_grid.UNEVEN, prefill_grid.EQUAL))
    narrow = [row.ours_us / row.fp8_us for row in found if row.fp8_us is not None]
    both = [(row.tiles_us, row.persistent_us) for row in found if row.shape == str(prefill_grid.UNEVEN)]
    listed = next((tiles / one for tiles, one in both if tiles is not None and one is not None), None)
    return [
        Figure("cudnn", f"geometric mean of cuDNN / ours over {len(scores)} shapes",
               geometric_mean(scores) if scores else None),
        Figure("least", "least cuDNN / ours", min(scores, default=None), prefill_grid.LEAST_SCORE),
        Figure("uneven", "rate on uneven prompts / on equal ones of the same work",
               uneven / equal if uneven and equal else None, prefill_grid.LEAST_RATE),
        Figure("listed", "tiles / persistent on uneven prompts", listed, prefill_grid.LEAST_LISTED),
        Figure("fp8", f"geometric mean of bf16 / fp8 over {len(narrow)} shapes",
               geometric_mean(narrow) if narrow else None, prefill_grid.LEAST_FP8),
    ]  # fmt: skip
