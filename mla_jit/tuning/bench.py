"""Timing of decode calls on a GPU: CUDA-graph replays over input sets rotated past the L2, peers alternated.

A measurement is the median over replays of (replay time ÷ calls in the graph). Every runner is checked against the
reference before its time counts. Peers' figures measured elsewhere are in tuning_db/<device>/peers_decode.jsonl.
What a call costs beside its kernels is measured in overhead.py.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mla_jit import dtypes, resources
from mla_jit.errors import MlaJitError
from mla_jit.ops.decode import reference

ROTATE_BYTES = 240 << 20  # KV that passes between two uses of the same bytes: four times the largest L2 of the targets
MOST_SETS = 256


@dataclass(frozen=True)
class Shape:
    """One row of a grid. `lens` are the sequences' lengths in tokens."""

    heads: int
    lens: tuple[int, ...]
    q_len: int = 1
    page_size: int = 64
    dtype: str = "bf16"
    label: str = ""

    @property
    def batch(self) -> int:
        return len(self.lens)

    def __str__(self) -> str:
        tokens = f" × q{self.q_len}" if self.q_len > 1 else ""
        return f"{self.label or max(self.lens)} × {self.heads} heads × {self.batch}{tokens}"


@dataclass
class Set:
    """One set of inputs: q [B, q_len, H, 576], the shared cache [pages, page, 1, 576], its own table."""

    q: torch.Tensor
    cache: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor
    scale: float
    longest: int  # of lens, on the host

    @property
    def keywords(self) -> dict[str, Any]:
        """What a decode call on it has to be told beside q and the cache."""
        return {"kv_lora_rank": 512, "sm_scale": self.scale, "block_table": self.table, "seq_lens": self.lens}


Runner = Callable[[Set], torch.Tensor]


def ragged_lens(batch: int = 64, low: int = 128, high: int = 32768, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths, the same everywhere: round(exp(uniform(log low, log high)))."""
    rng = random.Random(seed)
    return tuple(round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(batch))


def peers_grid(q_len: int = 1, device: str = "nvidia_h200") -> list[tuple[Shape, dict[str, float]]]:
    """The shapes of `q_len` query tokens on which peers were measured, with their times in µs by peer."""
    rows = []
    for line in resources.path("tuning_db", device, "peers_decode.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("q_len", 1) == q_len:
            lens = ragged_lens(row["batch"]) if row["kv_len"] == "ragged" else (row["kv_len"],) * row["batch"]
            rows.append((Shape(row["heads"], lens, q_len, label=str(row["kv_len"])), row["peers_us"]))
    return rows


def make_sets(
    shape: Shape, *, capacity: int = 131072, device: str = "cuda", seed: int = 0, c: int = 512, r: int = 64,
    rotate_bytes: int = ROTATE_BYTES,
) -> list[Set]:  # fmt: skip
    """Input sets whose KV together exceeds `rotate_bytes`; tables are `capacity` tokens wide, garbage past the end."""
    torch.manual_seed(seed)
    page = shape.page_size
    pages = sum(-(-n // page) for n in shape.lens)
    dtype = getattr(torch, dtypes.DTYPES[shape.dtype].torch)
    set_bytes = pages * page * (c + r) * dtypes.DTYPES[shape.dtype].bytes
    count = min(MOST_SETS, max(2, -(-rotate_bytes // set_bytes)))
    cache = torch.empty(pages * count, page, 1, c + r, dtype=dtype, device=device)
    for chunk in cache.split(4096):
        chunk.copy_(torch.randn(chunk.shape, device=device, dtype=torch.float32))
    order = torch.randperm(pages * count, device=device).to(torch.int32)
    lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
    width = max(capacity // page, -(-max(shape.lens) // page))
    sets = []
    for i in range(count):
        table = torch.full((shape.batch, width), 2**30, dtype=torch.int32, device=device)
        start = i * pages
        for b, n in enumerate(shape.lens):
            used = -(-n // page)
            table[b, :used] = order[start : start + used]
            start += used
        q = torch.randn(shape.batch, shape.q_len, shape.heads, c + r, device=device).to(dtype)
        sets.append(Set(q, cache, table, lens, (128 + r) ** -0.5, max(shape.lens)))
    return sets


def ours(decode: Callable[..., Any], *, hinted: bool = False) -> Runner:
    """`mla_jit.decode` (handed in) as a user calls it: capacity-sized table, no hints; `hinted`: the longest length."""

    def run(s: Set) -> torch.Tensor:
        out = decode(s.q, s.cache, **s.keywords, max_kv_len=s.longest if hinted else None)
        assert isinstance(out, torch.Tensor)
        return out

    return run


def flash_mla() -> Runner:
    """FlashMLA without its scheduler kernel, if the `flash_mla` package imports. Page size 64 only."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata  # type: ignore[import-not-found]

    kept: dict[tuple[Any, ...], Any] = {}

    def run(s: Set) -> torch.Tensor:
        key = (tuple(s.q.shape), s.lens.data_ptr(), s.lens.shape[0])
        if key not in kept:
            kept.clear()  # one schedule, made by the first call on a shape and reused by the captured ones
            kept[key] = get_mla_metadata()[0]
        out: torch.Tensor = flash_mla_with_kvcache(
            s.q, s.cache, s.table, s.lens, 512, kept[key], softmax_scale=s.scale, causal=s.q.shape[1] > 1
        )[0]
        return out

    return run


PEERS: dict[str, Callable[[], Runner]] = {"flash_mla": flash_mla}


def worst_row(out: torch.Tensor, s: Set, sequences: Sequence[int]) -> float:
    """The relative L2 error of the worst (token, head) row of some sequences against the fp32 reference."""
    worst = 0.0
    for b in sequences:
        want, _ = reference.decode(
            s.q[b : b + 1], s.cache, kv_lora_rank=512, sm_scale=s.scale, block_table=s.table[b : b + 1],
            seq_lens=s.lens[b : b + 1], dtype=torch.float32,
        )  # fmt: skip
        error = (out[b : b + 1].float() - want).norm(dim=-1) / want.norm(dim=-1)
        worst = max(worst, error.max().item()) if not error.isnan().any() else math.inf
    return worst


def graph_of(run: Runner, sets: Sequence[Set]) -> torch.cuda.CUDAGraph:
    """One graph with a call on each set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(sets[0])
        run(sets[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for s in sets:
            run(s)
    return graph


def time_alternating(
    graphs: dict[str, torch.cuda.CUDAGraph], calls: int, *, rounds: int = 7, min_ms: float = 3.0
) -> dict[str, list[float]]:
    """µs a call of each graph, a value a round; the order reverses from round to round."""
    results: dict[str, list[float]] = {name: [] for name in graphs}
    repeats = {}
    for name, graph in graphs.items():
        graph.replay()
        repeats[name] = max(1, math.ceil(min_ms / max(_elapsed_ms(graph, 1), 1e-3)))
    names = list(graphs)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            results[name].append(_elapsed_ms(graphs[name], repeats[name]) / repeats[name] / calls * 1e3)
    return results


def _elapsed_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@dataclass(frozen=True)
class Result:
    """A row: medians in µs by runner, spread (max - min) of ours, worst relative error of ours, roofline in µs."""

    shape: Shape
    times_us: dict[str, float]
    spread_us: float
    error: float
    roof_us: float


def roof_us(shape: Shape, bandwidth_gbps: float, tflops: float, c: int = 512, r: int = 64) -> float:
    """max(bytes / bandwidth, FLOPs / rate) of a decode: KV read once, 2·rows·(2C + R) FLOPs a token."""
    tokens = sum(shape.lens)
    size = tokens * (c + r) * dtypes.DTYPES[shape.dtype].bytes
    flops = 2 * tokens * shape.heads * shape.q_len * (2 * c + r)
    return max(size / bandwidth_gbps * 1e-3, flops / tflops * 1e-6)


def bench(shape: Shape, runners: dict[str, Runner], *, capacity: int = 131072, rounds: int = 7, seed: int = 0,
          bandwidth_gbps: float = 4500.0, tflops: float = 762.0) -> Result:  # fmt: skip
    """Checks every runner on fresh inputs, then times them in alternation. Raises MlaJitError on a wrong result."""
    sets = make_sets(shape, capacity=capacity, seed=seed)
    limit = dtypes.tolerance(shape.dtype, shape.dtype)
    some = sorted({0, shape.batch // 2, shape.batch - 1})
    error = 0.0
    for name, run in runners.items():
        found = worst_row(run(sets[0]), sets[0], some)
        if name == "mla_jit":
            error = found
        if found > limit:
            raise MlaJitError(
                f"{name} on {shape}: worst row's relative error is {found:.2e}, the limit {limit:.0e}; not timed"
            )
    graphs = {name: graph_of(run, sets) for name, run in runners.items()}
    times = time_alternating(graphs, len(sets), rounds=rounds)
    mine = times.get("mla_jit", [0.0])
    return Result(
        shape, {n: statistics.median(t) for n, t in times.items()}, max(mine) - min(mine), error,
        roof_us(shape, bandwidth_gbps, tflops),
    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A shape of the peers' grid, in µs: our time and spread over `runs`, peers of this run, peers' recorded figures.

    `score` is best recorded peer ÷ ours, the recorded figure of a peer timed in this run replaced by today's.
    """

    shape: str
    ours_us: float
    low_us: float
    high_us: float
    timed_us: dict[str, float]
    recorded_us: dict[str, float]
    roof_us: float
    error: float

    @property
    def best_us(self) -> float:
        return min({**self.recorded_us, **{_RECORDED.get(n, n): t for n, t in self.timed_us.items()}}.values())

    @property
    def score(self) -> float:
        return self.best_us / self.ours_us


_RECORDED = {"flash_mla": "flashmla"}  # names of the peers in the recorded grid


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


def _runs(shape: Shape, runners: dict[str, Runner], runs: int, rounds: int) -> tuple[dict[str, list[float]], Result]:
    """`runs` times `bench`, each on fresh inputs: µs by runner, a value a run; and the result with the worst error."""
    results = [bench(shape, runners, rounds=rounds, seed=seed) for seed in range(runs)]
    return {name: [r.times_us[name] for r in results] for name in runners}, max(results, key=lambda r: r.error)


def peers_rows(decode: Callable[..., Any], against: Sequence[str] = (), *, q_len: int = 1, runs: int = 3,
               rounds: int = 5, hinted: bool = False) -> Iterator[Row]:  # fmt: skip
    """Our decode on every shape of the peers' grid, `runs` times each on fresh inputs, installed peers alternated."""
    runners = {"mla_jit": ours(decode, hinted=hinted), **{name: _peer(name) for name in against}}
    for shape, recorded in peers_grid(q_len):
        times, worst = _runs(shape, runners, runs, rounds)
        mine = times.pop("mla_jit")
        timed = {name: statistics.median(t) for name, t in times.items()}
        yield Row(
            str(shape), statistics.median(mine), min(mine), max(mine), timed, recorded, worst.roof_us, worst.error
        )


def _peer(name: str) -> Runner:
    try:
        return PEERS[name]()
    except ImportError as error:
        raise MlaJitError(f"{name} cannot be timed: {error}; install its package, or leave it out") from error


def capture_rows(decode: Callable[..., Any], *, runs: int = 3, rounds: int = 7) -> Iterator[CaptureRow]:
    """What a capture at capacity costs a replay at the real length, on the shapes CAPTURED, both in alternation."""
    runners = {"mla_jit": ours(decode), "hint": ours(decode, hinted=True)}
    for shape in CAPTURED:
        times, worst = _runs(shape, runners, runs, rounds)
        ratios = [capacity / hint for capacity, hint in zip(times["mla_jit"], times["hint"], strict=True)]
        capacity_us, hint_us = (statistics.median(times[name]) for name in runners)
        yield CaptureRow(
            str(shape), capacity_us, hint_us, statistics.median(ratios), min(ratios), max(ratios), worst.error
        )


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def as_json(row: Any) -> dict[str, Any]:
    """A row of any grid: its fields, then its properties."""
    computed = [name for name, value in vars(type(row)).items() if isinstance(value, property)]
    return {**asdict(row), **{name: getattr(row, name) for name in computed}}
