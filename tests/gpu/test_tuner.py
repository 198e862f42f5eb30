"""A sweep with planted bad candidates: each costs itself alone, and what wins is good.

The kernels are real ones (planted.py). On a GPU they run; without one Triton's interpreter runs them, and they are
compiled all the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu import planted

import mla_jit
from mla_jit import ops, settings, target, trial
from mla_jit.compile import cache, triton
from mla_jit.errors import IllegalArtifact
from mla_jit.ops.decode import splitk
from mla_jit.ops.decode.blocked_cpu import DECODE_BLOCKED_CPU
from mla_jit.ops.decode.gluon import DECODE_SPLITK_GLUON
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target
from mla_jit.tuning import report, space, sweep
from mla_jit.tuning.pool import Pool
from mla_jit.tuning.rows import Trial
from mla_jit.tuning.store import Store

SETUP = "gpu.planted:setup"
GOOD = (DECODE_SPLITK_GLUON, splitk.DECODE_SPLITK_TRITON, DECODE_BLOCKED_CPU)
SPACE = {splitk.NAME: {"num_kv_splits": [1, 2], "num_stages": [2, 3]}}  # beside the defaults

# What each planted candidate ends as, and what its note says.
COMPILED = {
    "abort": ("compiler_abort", "SIGABRT: planted: LLVM ERROR: cannot select planted_abort"),
    "unmatched": ("compile_error", "planted_unmatched does not compile"),
    "hungry": ("too_many_resources", "bytes of shared memory, the target has"),
}
RUN = {
    "wrong": ("wrong", "relative L2 error"),
    "nan": ("nan", "NaN in the output"),
    "endless": ("hang", "while checking"),
    "slow": ("ok", ""),
}
ON_GPU = {
    "stray": ("illegal_access", "illegal memory access"),
    "hoarder": ("out_of_memory", "CUDA out of memory"),
    "hungry_unchecked": ("too_many_resources", "shared memory of planted_hungry_unchecked"),
}
INTERPRETED = {
    "stray": ("illegal_access", "SIGSEGV"),
    "hoarder": ("out_of_memory", "annot allocate memory"),
}
FATAL = ("stray", "endless", "hoarder")  # each costs a worker


@dataclass(frozen=True)
class Place:
    """Where a sweep runs, what it tunes there, and what the planted ones come to."""

    device: str
    target: Callable[[], Target]
    problems: tuple[DecodeProblem, ...]
    wanted: dict[str, tuple[str, str]]
    timeout_s: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


SMALL = DecodeProblem(
    num_heads=2, kv_lora_rank=16, rope_dim=16, page_size=16, q_dtype="fp16", kv_dtype="fp16", out_dtype="fp32",
    max_kv_len=64, lse=True, hinted=True,
)  # fmt: skip
USUAL = DecodeProblem(num_heads=16, batch=4, max_kv_len=2048, lse=True, hinted=True)
PLACES = {
    "gpu": Place("cuda:0", lambda: target.of_device("cuda", 0),
                 (USUAL, dataclasses.replace(USUAL, max_kv_len=1024)), COMPILED | RUN | ON_GPU, 8.0),
    "interpreter": Place("cpu", lambda: target.by_name("sm_80"), (SMALL, dataclasses.replace(SMALL, max_kv_len=80)),
                         COMPILED | RUN | INTERPRETED, 12.0, {"TRITON_INTERPRET": "1"}),
}  # fmt: skip


@dataclass
class Swept:
    """What came of a sweep: by problem its outcome, its trials in their order, and all of the page about them."""

    place: Place
    target: Target
    outcomes: dict[DecodeProblem, Any]
    trials: dict[DecodeProblem, list[Trial]]
    page: str
    database: Path

    def planted(self, problem: DecodeProblem) -> dict[str, Trial]:
        """The first trial of each planted candidate."""
        found: dict[str, Trial] = {}
        for row in self.trials[problem]:
            if row.variant.startswith("planted_"):
                found.setdefault(row.variant.removeprefix("planted_"), row)
        return found

    def good(self, problem: DecodeProblem) -> list[Trial]:
        return [row for row in self.trials[problem] if not row.variant.startswith("planted_")]


@contextlib.contextmanager
def known_here(names: set[str]) -> Iterator[None]:
    """The planted rows of these names in this process, and of good candidates no more than a few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "ROWS", tuple(r for r in planted.ROWS if r.name.removeprefix("planted_") in names))
        patch.setattr(cache, "_modules", dict(cache._modules))
        patch.setattr(ops, "variants", lambda op: GOOD)
        patch.setattr(space, "load", lambda op: SPACE)
        planted.setup()
        yield


@pytest.fixture(scope="module", params=[pytest.param("gpu", marks=pytest.mark.gpu), "interpreter"])
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A sweep over two problems, in real workers."""
    place, home = PLACES[request.param], tmp_path_factory.mktemp("planted")
    where, path = place.target(), home / "tuning.db"
    override = None if place.device.startswith("cuda") else where.name
    with settings.scope(cache_dir=home / "cache", tuning_db=path), known_here(set(place.wanted)):
        mla_jit.reload()
        cache.forget()  # the workers look on disk
        pool = Pool([place.device], target=override, environment=place.environment, setup=SETUP,
                    quarantine=home / "quarantine")  # fmt: skip
        with pool, Store(path) as store:
            done = list(sweep.run(place.problems, where, [place.device], pool, store, budget_s=400.0, how="exhaustive",
                                  timeout_s=place.timeout_s, cross=False))  # fmt: skip
        with Store(path, readonly=True) as store:
            trials, best = list(store.trials()), list(store.best())
        yield Swept(
            place, where, {d.problem: d.outcome for d in done},
            {p: [t for t in trials if t.problem == p] for p in place.problems},
            report.html(trials, best, target.targets(), database=str(path)), path,
        )  # fmt: skip
    mla_jit.reload()
    cache.forget()


def test_each_planted_candidate_has_its_status(swept: Swept) -> None:
    found = swept.planted(swept.place.problems[0])
    assert {name: row.status for name, row in found.items()} == {name: s for name, (s, _) in swept.place.wanted.items()}
    for name, (_, note) in swept.place.wanted.items():
        assert note in found[name].note, name
    assert found["endless"].note.startswith(f"killed after {swept.place.timeout_s:g} s")


def test_the_sweep_finishes_and_a_good_candidate_wins(swept: Swept) -> None:
    faulty = {name for name, (status, _) in swept.place.wanted.items() if status != "ok"}
    for problem in swept.place.problems:
        outcome = swept.outcomes[problem]
        assert outcome.stopped == "done"
        faults = {config.variant: note for config, _, note in outcome.faults}
        assert set(faults) == {f"planted_{name}" for name in faulty}, faults
        assert not outcome.winner.variant.startswith("planted_")
        assert outcome.median_us is not None
        slow = swept.planted(problem)["slow"]
        assert slow.median_us is not None
        assert slow.median_us > outcome.median_us * (1.5 if swept.place.device.startswith("cuda") else 1.0)
        with Store(swept.database, readonly=True) as store:
            (best,) = store.best(problem=problem)
        assert (best.config, best.status) == (outcome.winner, "ok")


def test_good_candidates_are_measured_well_before_and_after(swept: Swept) -> None:
    for problem in swept.place.problems:
        good = swept.good(problem)
        assert len({row.config for row in good}) >= 3
        for row in good:
            assert row.status == "ok", row.note
            assert row.rel_l2 is not None
            assert row.rel_l2 < 1e-2
        numbers = {id(row): number for number, row in enumerate(swept.trials[problem])}
        worst = max(numbers[id(row)] for name, row in swept.planted(problem).items() if name in FATAL)
        assert any(row.effort == sweep.LAST and numbers[id(row)] > worst for row in good)


def test_what_ended_a_worker_is_not_run_for_the_next_problem(swept: Swept) -> None:
    first, second = (swept.planted(problem) for problem in swept.place.problems)
    for name in ("stray", "endless"):
        assert second[name].note == f"quarantined: {first[name].note}"
    for name, row in second.items():
        assert row.status == first[name].status, (name, first[name].note, row.note)


def test_the_report_names_every_fault(swept: Swept) -> None:
    faults = swept.page.partition('<h2 id="faults">')[2]
    for name, (status, _) in swept.place.wanted.items():
        assert (f"<code>planted_{name}(" in faults) == (status != "ok"), name
        assert (f'<span class="bad">{status}</span>' in faults) == (status != "ok")


def test_the_device_is_usable_afterwards_and_calls_get_the_winner(swept: Swept) -> None:
    problem, on_gpu = swept.place.problems[0], swept.place.device.startswith("cuda")
    call = trial.make_call(problem, "cuda" if on_gpu else "cpu")
    out, lse = mla_jit.decode(call.q, call.kv_cache, **call.keywords, max_kv_len=problem.max_kv_len)
    assert trial.judge(call, out, lse).ok
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.problem == problem
    if on_gpu:
        assert (dispatch.config, dispatch.provenance) == (swept.outcomes[problem].winner, "measured")


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_the_planted_kernels_compile_as_they_are_to(name: str) -> None:
    """All that a GPU is to run, and what it is to refuse."""
    where = target.by_name(name)
    for kind, fault in planted.FAULTS.items():
        row = fault.variant(f"planted_{kind}")
        config = row.default(USUAL, where)
        assert row.rejects(USUAL, where, config) is None
        source, *_ = row.sources(USUAL, where, config)
        if kind == "hungry":
            with pytest.raises(IllegalArtifact, match="bytes of shared memory, the target has"):
                triton.compile_source(source)
        elif kind not in ("abort", "unmatched"):
            artifact = triton.compile_source(source)
            assert (artifact.smem_bytes > where.smem_bytes) == (kind == "hungry_unchecked")
