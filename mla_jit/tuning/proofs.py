"""How good the tuner is: `auto` against the exhaustive search, and neighbours' configs against shapes' own.

All times compared here are measured again for the comparison, the configs in alternation in a fresh worker; none is the
search's own. The grids quality and neighbours of `mla-tune bench`.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_jit import plan, settings
from mla_jit.compile import cache
from mla_jit.config import Config
from mla_jit.errors import MlaJitError
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target
from mla_jit.tuning import search, sweep
from mla_jit.tuning.pool import Pool
from mla_jit.tuning.store import Store

Heard = Callable[[str, sweep.Finished], None]  # (search, shape) as each shape of a sweep is finished

_HANG_S = 20.0  # after which a candidate is killed
_BUDGET_S = 3600.0  # of a shape, on average; a search that it cuts short is an error
_TURNS = 4  # of each config in a comparison, there and back


def _shapes(*sizes: tuple[int, int, int], c: int = 512, r: int = 64) -> tuple[DecodeProblem, ...]:
    """(heads, batch, kv_len) each."""
    return tuple(
        DecodeProblem(num_heads=heads, batch=batch, max_kv_len=kv_len, kv_lora_rank=c, rope_dim=r, hinted=True)
        for heads, batch, kv_len in sizes
    )


# Each has at least 300 legal configs on the GPU for which the space was made, the best 1.5 times as fast as the median.
QUALITY = (
    *_shapes((16, 1, 4096), (16, 4, 4096), (16, 4, 16384), (16, 16, 4096), (16, 16, 16384)),
    *_shapes((64, 64, 1024), (64, 64, 4096), (64, 64, 16384), (64, 128, 1024), (64, 128, 4096)),
    *_shapes((128, 32, 1024), (128, 32, 4096), (128, 64, 1024), (128, 64, 4096)),
    *_shapes((32, 64, 1024), (32, 64, 4096)),
)
# None of these was tuned for the shipped database: other batches and lengths, some between the tuned head counts.
HELD_OUT = (
    *_shapes((16, 2, 2048), (16, 8, 8192), (16, 24, 2048), (16, 48, 8192), (16, 96, 2048), (16, 2, 32768)),
    *_shapes((32, 3, 2048), (32, 12, 8192), (32, 48, 2048), (32, 96, 8192)),
    *_shapes((64, 2, 2048), (64, 6, 8192), (64, 24, 8192), (64, 48, 2048), (64, 96, 2048), (64, 2, 32768)),
    *_shapes((128, 2, 2048), (128, 6, 8192), (128, 24, 2048), (128, 48, 8192), (128, 96, 2048), (128, 2, 32768)),
    *_shapes((24, 8, 4096), (24, 48, 2048), (48, 8, 4096), (96, 48, 2048)),
)


@dataclass(frozen=True)
class QualityRow:
    """A shape searched in both ways, each sweep from an empty kernel cache and an empty database. Times in µs.

    exhaustive_us, auto_us: of the two winners, measured again in alternation; `reached` is their ratio (1: as good).
    spread: median ÷ best of the legal configs' times. exhaustive_s, auto_s: the shape's part of the sweeps' seconds.
    """

    shape: str
    legal: int
    spread: float
    explored: int
    exhaustive_us: float
    auto_us: float
    exhaustive_s: float
    auto_s: float

    @property
    def reached(self) -> float:
        return self.exhaustive_us / self.auto_us


def quality_rows(
    target: Target, device: str, shapes: Sequence[DecodeProblem] = QUALITY,
    on_time: Callable[[str, float], None] | None = None, on_shape: Heard | None = None,
) -> Iterator[QualityRow]:  # fmt: skip
    """Searches all shapes exhaustively, then by `auto`, then compares the winners. `on_time` hears sweeps' seconds.

    MlaJitError where a search did not come to its end or measured nothing.
    """
    with tempfile.TemporaryDirectory(prefix="mla_jit-quality-") as root:
        found = {}
        for how in ("exhaustive", "auto"):
            started = time.monotonic()
            found[how] = _searched(target, device, shapes, Path(root, how), how, on_shape)
            if on_time is not None:
                on_time(how, time.monotonic() - started)
        with _cached(Path(root, "exhaustive")), Pool([device]) as pool:
            for problem in shapes:
                (all_, all_s), (auto, auto_s) = found["exhaustive"][problem], found["auto"][problem]
                times = sorted(m.median_us for _, e, m in all_.trials if e == 0 and m.median_us is not None)
                us = alternated(pool, device, problem, [all_.winner, auto.winner])
                yield QualityRow(
                    say(problem), len(times), statistics.median(times) / times[0], auto.explored, us[all_.winner],
                    us[auto.winner], all_s, auto_s,
                )  # fmt: skip


def _searched(
    target: Target, device: str, shapes: Sequence[DecodeProblem], root: Path, how: str, on_shape: Heard | None
) -> dict[DecodeProblem, tuple[search.Outcome, float]]:
    """What was found for each shape, and in how many seconds."""
    found = {}
    with _cached(root), Store(root / "tuning.db") as store, Pool([device]) as pool:
        for done in sweep.run(
            shapes, target, [device], pool, store, budget_s=_BUDGET_S * len(shapes), how=how, cross=False,
            timeout_s=_HANG_S, command=f"proof: {how}",
        ):  # fmt: skip
            found[done.problem] = _ended(done), done.seconds
            if on_shape is not None:
                on_shape(how, done)
    return found


def _ended(done: sweep.Finished) -> search.Outcome:
    """The outcome of a search that came to its end; MlaJitError otherwise."""
    found = done.outcome
    if found is None:
        raise MlaJitError(f"{say(done.problem)} was tuned before; use an empty database")
    if found.stopped != "done":
        raise MlaJitError(f"the search for {say(done.problem)} was not finished ({found.stopped}): {found.why}")
    if found.median_us is None:
        first = f"; {found.faults[0][1]}: {found.faults[0][2]}" if found.faults else ""
        raise MlaJitError(f"nothing could be measured of {say(done.problem)}: {found.why}{first}")
    return found


@contextlib.contextmanager
def _cached(root: Path) -> Iterator[None]:
    """With a kernel cache of its own, of which nothing is in memory."""
    with settings.scope(cache_dir=root / "cache", cache_layers=()):
        cache.forget()
        try:
            yield
        finally:
            cache.forget()


def alternated(pool: Pool, device: str, problem: DecodeProblem, configs: Sequence[Config]) -> dict[Config, float]:
    """µs of each config: the median of several measurements, in turn, every other turn in the opposite order."""
    each = list(dict.fromkeys(configs))
    rounds, window_ms = sweep.EFFORTS[sweep.LAST]
    times: dict[Config, list[float]] = {config: [] for config in each}
    for turn in range(_TURNS):
        for config in each if turn % 2 == 0 else reversed(each):
            found = pool.measure(device, problem, config, rounds=rounds, window_ms=window_ms)
            if found.median_us is None:
                raise MlaJitError(f"{config} on {problem}: {found.status}, {found.note}")
            times[config].append(found.median_us)
    return {config: statistics.median(us) for config, us in times.items()}


@dataclass(frozen=True)
class NeighbourRow:
    """A shape that the databases do not hold, in µs: its own tuned config, and what it is served with without that.

    neighbour: by the lookup (`whence` says from where). analytic: the default. aiter, vllm: the default's kernel with
    as many splits as those projects' rules say. `reached` is tuned ÷ neighbour.
    """

    shape: str
    tuned_us: float
    neighbour_us: float
    analytic_us: float
    aiter_us: float
    vllm_us: float
    whence: str

    @property
    def reached(self) -> float:
        return self.tuned_us / self.neighbour_us

    @property
    def analytic_reached(self) -> float:
        return self.tuned_us / self.analytic_us

    @property
    def aiter_reached(self) -> float:
        return self.tuned_us / self.aiter_us

    @property
    def vllm_reached(self) -> float:
        return self.tuned_us / self.vllm_us


def untuned(target: Target, shapes: Sequence[DecodeProblem] = HELD_OUT) -> dict[DecodeProblem, plan.Choice]:
    """What the user's and the shipped databases, as they are, give for shapes that they do not hold themselves.

    MlaJitError where they hold one.
    """
    chosen = {problem: plan.known(problem, target) for problem in shapes}
    for problem, choice in chosen.items():
        if choice.provenance in (*plan.MEASURED, "stale"):
            raise MlaJitError(
                f"{say(problem)} is no held-out shape: {choice.why}; use another database (MLA_JIT_TUNING_DB)"
            )
    return chosen


def neighbour_rows(
    target: Target, device: str, shapes: Sequence[DecodeProblem] = HELD_OUT
) -> Iterator[NeighbourRow]:  # fmt: skip
    """Tunes each shape into a database of its own, and compares its config with those it would be served with.

    MlaJitError where the databases hold a shape itself, and where a search did not come to its end.
    """
    chosen = untuned(target, shapes)
    with (
        tempfile.TemporaryDirectory(prefix="mla_jit-neighbours-") as root, Store(Path(root, "tuning.db")) as store,
        Pool([device]) as pool,
    ):  # fmt: skip
        for done in sweep.run(
            shapes, target, [device], pool, store, budget_s=_BUDGET_S * len(shapes), cross=False,
            timeout_s=_HANG_S, command="proof: neighbours",
        ):  # fmt: skip
            problem = done.problem
            default = plan.analytic(problem, target).config
            configs = {
                "tuned": _ended(done).winner, "neighbour": chosen[problem].config, "analytic": default,
                "aiter": default.replace(num_kv_splits=aiter_splits(problem, target)),
                "vllm": default.replace(num_kv_splits=vllm_splits(problem)),
            }  # fmt: skip
            us = alternated(pool, device, problem, list(configs.values()))
            times = {f"{name}_us": us[config] for name, config in configs.items()}
            yield NeighbourRow(say(problem), **times, whence=chosen[problem].why or chosen[problem].provenance)


def aiter_splits(problem: DecodeProblem, target: Target) -> int:
    """AITER's rule (aiter/mla.py): the i in 1…16 that fills the device best, less a cost of 84.1 tokens a split."""
    p = problem

    def score(i: int) -> float:
        waves = -(-p.batch * i // target.sms) * target.sms
        return p.batch * i / waves * p.max_kv_len / (p.max_kv_len + 84.1 * i)

    return max(range(1, 17), key=lambda i: (score(i), -i))


def vllm_splits(problem: DecodeProblem) -> int:
    """vLLM's rule (its Triton MLA backend): the power of two not below kv_len ÷ 512."""
    return bucket(-(-problem.max_kv_len // 512))


def say(p: DecodeProblem) -> str:
    """ "4096 × 128 heads × 64"."""
    dims = "" if (p.kv_lora_rank, p.rope_dim) == (512, 64) else f" ({p.kv_lora_rank}+{p.rope_dim})"
    return f"{p.max_kv_len} × {p.num_heads} heads × {p.batch}{dims}"
