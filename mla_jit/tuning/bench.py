"""Timing of decode calls on a GPU: CUDA-graph replays over input sets rotated past the L2, peers alternated.

A measurement is the median over replays of (replay time ÷ calls in the graph). Every runner is checked against the
reference before its time counts. The peers are in peers.py, what is timed in grids.py; what a call costs beside its
kernels is measured in overhead.py.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from mla_jit import dtypes
from mla_jit.errors import MlaJitError
from mla_jit.ops.decode import reference

ROTATE_BYTES = 240 << 20  # KV that passes between two uses of the same bytes: four times the largest L2 of the targets
MOST_SETS = 256


@dataclass(frozen=True)
class Shape:
    """One row of a grid. `lens` are the sequences' lengths in tokens; q has the cache's dtype unless q_dtype is set."""

    heads: int
    lens: tuple[int, ...]
    q_len: int = 1
    page_size: int = 64
    dtype: str = "bf16"
    label: str = ""
    q_dtype: str = ""

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


Call = Callable[[Set], torch.Tensor]


@dataclass(frozen=True)
class Runner:
    """What is timed. Its `prepare` makes the call on any of a shape's sets, and beforehand all that is not to be timed.

    It gives None for sets that it cannot serve. `scope` is the context in which it is prepared, checked and captured.
    """

    prepare: Callable[[Sequence[Set]], Call | None]
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def make_sets(
    shape: Shape, *, capacity: int = 131072, device: str = "cuda", seed: int = 0, c: int = 512, r: int = 64,
    rotate_bytes: int = ROTATE_BYTES,
) -> list[Set]:  # fmt: skip
    """Input sets whose KV together exceeds `rotate_bytes`; tables are `capacity` tokens wide, garbage past the end."""
    torch.manual_seed(seed)
    page = shape.page_size
    pages = sum(-(-n // page) for n in shape.lens)
    dtype, q_dtype = (getattr(torch, dtypes.DTYPES[name].torch) for name in (shape.dtype, shape.q_dtype or shape.dtype))
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
        q = torch.randn(shape.batch, shape.q_len, shape.heads, c + r, device=device).to(q_dtype)
        sets.append(Set(q, cache, table, lens, (128 + r) ** -0.5, max(shape.lens)))
    return sets


def ours(
    decode: Callable[..., Any], *, hinted: bool = False,
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Runner:  # fmt: skip
    """`mla_jit.decode` (handed in) as a user calls it: capacity-sized table, no hints; `hinted`: the longest length."""

    def call(s: Set) -> torch.Tensor:
        out = decode(s.q, s.cache, **s.keywords, max_kv_len=s.longest if hinted else None)
        assert isinstance(out, torch.Tensor)
        return out

    return Runner(lambda sets: call, scope)


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


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected within: a graph or a module that is destroyed while another is captured ends that."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def graph_of(run: Call, sets: Sequence[Set]) -> torch.cuda.CUDAGraph:
    """One graph with a call on each set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(sets[0])
        run(sets[-1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with _uncollected(), torch.cuda.graph(graph):
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
    """A row: medians in µs by runner that serves the shape, spread (max - min) and worst relative error of ours, roof.

    Ours is the runner called mla_jit.
    """

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


def _apart(call: Call, device: torch.device) -> Call:
    """The call with another kernel before it, which knows nothing of launches that overlap."""
    some = torch.zeros(4096, device=device)

    def run(s: Set) -> torch.Tensor:
        some.add_(1.0)
        return call(s)

    return run


_BETWEEN = " "  # the kernels between calls, without calls


def bench(shape: Shape, runners: Mapping[str, Runner], *, capacity: int = 131072, rounds: int = 7, seed: int = 0,
          bandwidth_gbps: float = 4500.0, tflops: float = 762.0, apart: bool = False) -> Result:  # fmt: skip
    """Checks every runner on fresh inputs, then times them in alternation. Raises MlaJitError on a wrong result.

    Calls come one right after the other, so kernels that may overlap do; `apart`: a small kernel of torch's comes
    between, and its time is subtracted.
    """
    sets = make_sets(shape, capacity=capacity, seed=seed)
    calls: dict[str, Call] = {}  # kept until all is timed, with what the graphs use of theirs
    graphs, errors = {}, {}
    for name, runner in runners.items():
        with runner.scope():
            if (call := runner.prepare(sets)) is not None:
                errors[name] = _checked(name, call, sets[0], shape)
                calls[name] = _apart(call, sets[0].q.device) if apart else call
                graphs[name] = graph_of(calls[name], sets)
    if apart:
        calls[_BETWEEN] = _apart(lambda s: s.q, sets[0].q.device)
        graphs[_BETWEEN] = graph_of(calls[_BETWEEN], sets)
    times = time_alternating(graphs, len(sets), rounds=rounds)
    between = statistics.median(times.pop(_BETWEEN)) if apart else 0.0
    times = {name: [us - between for us in found] for name, found in times.items()}
    mine = times.get("mla_jit", [0.0])
    return Result(
        shape, {n: statistics.median(t) for n, t in times.items()}, max(mine) - min(mine), errors.get("mla_jit", 0.0),
        roof_us(shape, bandwidth_gbps, tflops),
    )  # fmt: skip


def _checked(name: str, call: Call, s: Set, shape: Shape) -> float:
    """The relative error of some of its rows; MlaJitError where it is too large. An empty sequence has none."""
    filled = [b for b, n in enumerate(shape.lens) if n]
    found = worst_row(call(s), s, sorted({filled[0], filled[len(filled) // 2], filled[-1]}))
    limit = dtypes.tolerance(shape.q_dtype or shape.dtype, shape.dtype)
    if found > limit:
        raise MlaJitError(
            f"{name} on {shape}: worst row's relative error is {found:.2e}, the limit {limit:.0e}; not timed"
        )
    return found
