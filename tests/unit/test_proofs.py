"""The proofs of the tuner, on small shapes of the CPU with real workers, and what their shapes are to be."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_jit import plan, settings, target
from mla_jit.compile import cache
from mla_jit.errors import MlaJitError
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import pool, proofs, rows, store, sweep

CPU = target.by_name("cpu")
HOPPER = target.by_name("sm_90")
SMALL = DecodeProblem(
    num_heads=4, kv_lora_rank=32, rope_dim=16, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32", max_kv_len=128,
    page_size=16, batch=2, hinted=True,
)  # fmt: skip
EXACT = ("measured", "imported", "stale")


@pytest.fixture(autouse=True)
def database(tmp_path: Path, cache_dir: str) -> Iterator[Path]:
    """The user's, not made yet; nothing is shipped."""
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        plan.forget()
        yield tmp_path / "tuning.db"
    plan.forget()


def put(path: Path, problem: DecodeProblem, splits: int) -> None:
    """A measured row of a config with so many splits."""
    choice = plan.analytic(problem, CPU)
    trial = rows.Trial(
        problem=problem, config=choice.config.replace(num_kv_splits=splits), target=CPU.name, device=CPU.device,
        revision=choice.variant.revision, median_us=1.0, toolchain=plan._toolchain(),
    )  # fmt: skip
    with store.Store(path) as opened:
        opened.add([trial])
    plan.forget()


# ----------------------------------------------------------------------------------------------------------- the shapes


def test_every_shape_of_quality_has_300_configs() -> None:
    assert len(set(proofs.QUALITY)) == len(proofs.QUALITY) == 16
    for problem in proofs.QUALITY:
        assert len(sweep.candidates(problem, HOPPER)) >= 300, problem


def test_held_out_shapes_are_not_in_the_shipped_database() -> None:
    assert len(set(proofs.HELD_OUT)) == len(proofs.HELD_OUT) == 26
    assert {problem.kv_dtype for problem in proofs.HELD_OUT} == {"bf16"}
    with settings.scope(shipped_db=True):
        plan.forget()
        assert set(proofs.untuned(HOPPER)) == set(proofs.HELD_OUT)


def test_others_rules_give_legal_configs() -> None:
    for problem in proofs.HELD_OUT:
        default = plan.analytic(problem, HOPPER)
        for splits in (proofs.aiter_splits(problem, HOPPER), proofs.vllm_splits(problem)):
            config = default.config.replace(num_kv_splits=splits)
            assert default.variant.rejects(problem, HOPPER, config) is None, (problem, config)


@pytest.mark.parametrize(
    ("batch", "kv_len", "of_aiter", "of_vllm"),
    [(1, 512, 16, 1), (1, 513, 16, 2), (1, 32768, 16, 64), (132, 4096, 1, 8), (66, 4096, 2, 8), (96, 2048, 4, 4)],
)
def test_others_rules(batch: int, kv_len: int, of_aiter: int, of_vllm: int) -> None:
    problem = DecodeProblem(num_heads=16, batch=batch, max_kv_len=kv_len)
    assert (proofs.aiter_splits(problem, HOPPER), proofs.vllm_splits(problem)) == (of_aiter, of_vllm)


# -------------------------------------------------------------------------------------------------------------- quality


def test_both_searches_start_from_nothing_and_their_winners_are_timed_again(database: Path) -> None:
    """Real searches in worker processes. The user's database is neither read nor written."""
    put(database, SMALL, 7)
    before = database.read_bytes()
    seconds: dict[str, float] = {}
    finished: list[tuple[str, DecodeProblem]] = []
    (row,) = proofs.quality_rows(
        CPU, "cpu", [SMALL], seconds.__setitem__, lambda how, done: finished.append((how, done.problem))
    )
    assert row.shape == "128 × 4 heads × 2 (32+16)"
    assert row.legal == len(sweep.candidates(SMALL, CPU))
    assert 0 < row.explored < row.legal
    assert row.spread >= 1.0
    assert row.exhaustive_us > 0
    assert row.reached == row.exhaustive_us / row.auto_us
    assert finished == [("exhaustive", SMALL), ("auto", SMALL)]
    assert 0 < row.exhaustive_s <= seconds["exhaustive"]
    assert 0 < row.auto_s <= seconds["auto"]
    assert database.read_bytes() == before


def test_a_sweep_has_a_kernel_cache_of_its_own(tmp_path: Path) -> None:
    with settings.scope(cache_layers=(tmp_path / "image",)):
        outside = settings.current()
        with proofs._cached(tmp_path / "own"):
            assert (settings.current().cache_dir, settings.current().cache_layers) == (tmp_path / "own" / "cache", ())
            assert cache.root() == tmp_path / "own" / "cache"
        assert settings.current() == outside


def test_a_search_that_the_budget_cuts_short_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "_BUDGET_S", 0.0)
    with pytest.raises(MlaJitError, match=r"the search for 128 × 4 heads × 2 \(32\+16\) was not finished \(budget\)"):
        next(proofs.quality_rows(CPU, "cpu", [SMALL]))


def test_a_shape_of_which_nothing_runs_is_no_proof() -> None:
    """The workers do not know the target."""
    with pytest.raises(MlaJitError, match="nothing could be measured of"), settings.scope(target="sm_90"):
        next(proofs.quality_rows(CPU, "cpu", [SMALL]))


def test_configs_are_timed_in_alternation(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: iter([5.0, 9.0, 1.0, 4.0]), 2: iter([2.0, 8.0, 3.0, 2.0])}
    order = []

    class Timer:
        def measure(self, device: str, problem: DecodeProblem, config: plan.Config, **_: float) -> rows.Measurement:
            order.append(config.int("num_kv_splits"))
            return rows.Measurement("ok", next(times[order[-1]]), 0.1)

    default = plan.analytic(SMALL, CPU).config
    one, two = (default.replace(num_kv_splits=n) for n in (1, 2))
    found = proofs.alternated(Timer(), "cpu", SMALL, [one, two, one])  # type: ignore[arg-type]
    assert found == {one: statistics.median([5, 9, 1, 4]), two: statistics.median([2, 8, 3, 2])}
    assert order == [1, 2, 2, 1, 1, 2, 2, 1]


def test_a_config_that_does_not_run_is_named() -> None:
    illegal = plan.analytic(SMALL, CPU).config.replace(num_kv_splits=0)
    with pool.Pool(["cpu"]) as workers, pytest.raises(MlaJitError, match=r"num_kv_splits=0.* illegal"):
        proofs.alternated(workers, "cpu", SMALL, [illegal])


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_a_shape_beside_what_it_would_be_served_with(database: Path) -> None:
    """Between two stored shapes; really tuned, in a database of its own."""
    for batch in (1, 4):
        put(database, dataclasses.replace(SMALL, batch=batch), 3)
    before = database.read_bytes()
    (row,) = proofs.neighbour_rows(CPU, "cpu", [SMALL])
    assert row.shape == "128 × 4 heads × 2 (32+16)"
    assert row.whence.startswith("nearest is a user's row with batch ")
    for us, reached in (
        (row.neighbour_us, row.reached), (row.analytic_us, row.analytic_reached), (row.aiter_us, row.aiter_reached),
        (row.vllm_us, row.vllm_reached),
    ):  # fmt: skip
        assert us > 0
        assert reached == row.tuned_us / us
    assert database.read_bytes() == before


def test_a_stored_shape_is_not_held_out(database: Path) -> None:
    put(database, SMALL, 3)
    with pytest.raises(MlaJitError, match=r"128 × 4 heads × 2 \(32\+16\) is no held-out shape: .* another database"):
        next(proofs.neighbour_rows(CPU, "cpu", [SMALL]))
    other = dataclasses.replace(SMALL, batch=8)
    assert proofs.untuned(CPU, [other])[other].provenance not in EXACT
