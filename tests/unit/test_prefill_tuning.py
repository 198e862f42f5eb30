"""Prefill in the tuner: candidates, how one is checked and timed, and what a call makes of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import prefill_cases as cases
import pytest
from helpers import invoke, invoke_json

import mla_jit
from mla_jit import ahead, explain, models, ops, plan, settings, target
from mla_jit.config import Config
from mla_jit.ops.prefill import blocked_cpu
from mla_jit.problem import PrefillProblem
from mla_jit.tuning import auto, candidate, prompts, shipped, space
from mla_jit.tuning.rows import Trial
from mla_jit.tuning.store import Store

HOPPER, CPU = target.by_name("sm_90"), target.by_name("cpu")
VARIANTS = ops.variants("prefill")
SMALL = PrefillProblem(
    num_heads=4, num_kv_heads=2, qk_dim=48, v_dim=32, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32", lse=True,
    batch=3, q_len=80, total_q=160, max_kv_len=128, total_kv=256, hinted=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sm_90", {}),
        ("sm_90", {"kv_dtype": "fp8_e4m3", "qk_dim": 96, "v_dim": 64}),
        ("sm_80", {"q_len": 40, "scheduler": "persistent"}),
        ("gfx942", {"scheduler": "tiles"}),
        ("cpu", {"q_len": 100}),
    ],
)
def test_candidates_are_legal_different_and_start_with_the_default(name: str, fields: dict[str, Any]) -> None:
    there, rows = target.by_name(name), {v.name: v for v in VARIANTS}
    problem = PrefillProblem(num_heads=16, num_kv_heads=16, **fields)
    found = space.candidates(problem, there, VARIANTS)
    assert len(found) == len(set(found)) > 8
    for config in found:
        assert rows[config.variant].rejects(problem, there, config) is None
        assert set(config) == set(rows[config.variant].default(problem, there))
    assert found[0] == plan.analytic(problem, there).config
    assert found == space.candidates(problem, there, VARIANTS)


def test_the_space_names_tunables_of_the_variants_and_all_variants() -> None:
    spaces = space.load("prefill")
    assert set(spaces) == {variant.name for variant in VARIANTS}
    for variant in VARIANTS:
        for name, values in spaces[variant.name].items():
            lists = values.values() if isinstance(values, dict) else [values]
            assert set(itertools.chain(*lists)) <= set(variant.space[name]), name


@pytest.mark.parametrize("change", [{}, {"causal": False}, {"batch": 1, "q_len": 64}, {"lse": False}])
def test_cases_stay_within_the_problem(change: dict[str, Any]) -> None:
    problem = dataclasses.replace(SMALL, **change)
    cases = prompts.lengths(problem)
    for q_lens, kv_lens in cases:
        assert len(q_lens) == len(kv_lens) == problem.batch
        assert max(q_lens) <= problem.q_len
        assert max(kv_lens) <= problem.max_kv_len
        assert sum(q_lens) <= problem.total_q
        assert sum(kv_lens) <= problem.keys
    assert len({str(case) for case in cases}) > 1 or problem.batch == 1


@pytest.mark.parametrize("config", [None, {"block_m": 16, "block_n": 32, "heads": 1}])
@pytest.mark.parametrize("change", [{}, {"causal": False, "soft_cap": True}, {"q_scale": True, "v_scale": True}])
def test_a_candidate_is_checked_and_timed(config: dict[str, Any] | None, change: dict[str, Any]) -> None:
    problem = dataclasses.replace(SMALL, **change)
    chosen = blocked_cpu.default(problem, CPU) if config is None else Config.of(blocked_cpu.NAME, **config)
    found = candidate.run_candidate(problem, chosen, "cpu", 2, 1.0)
    assert found.status == "ok", found.note
    assert found.rel_l2 is not None
    assert found.rel_l2 < 1e-5
    assert found.median_us is not None
    assert found.median_us > 0


def _lost(inputs: Any) -> None:
    inputs.tensors["out"][1] *= 1.5


def _unwritten(inputs: Any) -> None:
    inputs.tensors["out"][0, 0, 0] = float("nan")


def _beyond(inputs: Any) -> None:
    inputs.tensors["out"][-1] = 0.0


def _base(inputs: Any) -> None:
    inputs.tensors["lse"] *= 1.4426950408889634


@pytest.mark.parametrize(
    ("harm", "status"), [(_lost, "wrong"), (_unwritten, "nan"), (_beyond, "wrong"), (_base, "wrong")]
)
def test_a_wrong_candidate_is_never_timed(harm: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(p: PrefillProblem, config: Config, inputs: Any) -> None:
        blocked_cpu.run(p, config, inputs)
        harm(inputs)

    row = dataclasses.replace(blocked_cpu.PREFILL_BLOCKED_CPU, host=run)
    monkeypatch.setattr(ops, "variants", lambda op: (row,))
    candidate._kept.clear()
    found = candidate.run_candidate(SMALL, blocked_cpu.default(SMALL, CPU), "cpu", 2, 1.0)
    assert found.status == status, found.note
    assert found.median_us is None


def _trial(problem: PrefillProblem, config: Config, where: target.Target, us: float) -> Trial:
    return Trial(
        problem=problem, config=config, target=where.name, device=where.device, revision=1, median_us=us,
        spread_us=0.0, toolchain=plan._toolchain(), created="2026-11-28T00:00:00",
    )  # fmt: skip


def test_a_measured_row_serves_the_problem_and_its_neighbours(tmp_path: Path) -> None:
    problem = PrefillProblem(
        num_heads=16, num_kv_heads=16, batch=2, q_len=1024, total_q=2048, max_kv_len=1024, total_kv=2048, hinted=True
    )
    best = ops.variants("prefill")[0].default(problem, HOPPER).replace(block_n=64, num_stages=3)
    path = tmp_path / "tuning.db"
    longer = dataclasses.replace(problem, q_len=4096, total_q=8192, max_kv_len=4096, total_kv=8192)
    with settings.scope(tuning_db=path, shipped_db=False), Store(path) as store:
        store.add([_trial(problem, best, HOPPER, 100.0), _trial(longer, best.replace(num_warps=4), HOPPER, 900.0)])
        assert [t.problem for t in store.trials(op="prefill")] == [problem, longer]
        assert list(store.trials(op="decode")) == []
        plan.forget()
        choice = plan.choose(problem, HOPPER)
        assert (choice.provenance, choice.config) == ("measured", best)
        between = dataclasses.replace(problem, q_len=1280, total_q=2560)
        near = plan.choose(between, HOPPER)
        assert (near.provenance, near.config) == ("neighbour", best)
        assert "with q_len 1024 for 1280: measured" in near.why
        other = plan.choose(dataclasses.replace(problem, causal=False), HOPPER)
        assert other.provenance == "default"
        told = explain.explain(problem, HOPPER, build=False)
        assert told.tuned is not None
        assert told.tuned.taken.median_us == 100.0
    plan.forget()


def test_rows_go_to_a_file_and_back(tmp_path: Path) -> None:
    config = blocked_cpu.default(SMALL, CPU)
    trials = [
        _trial(SMALL, config, CPU, 5.0),
        _trial(dataclasses.replace(SMALL, misaligned=("q", "out")), config, CPU, 6.0),
    ]
    path = tmp_path / "cpu" / "prefill.jsonl"
    assert shipped.export(trials, path) == 2
    assert shipped.check(path) == []
    assert sorted(path.read_text().splitlines()) == sorted(trial.to_json() for trial in trials)
    assert {Trial.from_json(line) for line in path.read_text().splitlines()} == set(trials)


def test_a_plan_with_prompts_is_exported_and_loaded() -> None:
    problem = PrefillProblem(num_heads=16, num_kv_heads=4, misaligned=("q",))
    with settings.scope(shipped_db=False):
        data = plan.export([problem], HOPPER)
        plan.forget()
        assert plan.load(data, HOPPER) == 1
        assert "(loaded plan)" in plan.choose(problem, HOPPER).why
    plan.forget()


def test_a_first_call_in_an_autotune_block_is_tuned(tmp_path: Path) -> None:
    call = cases.build(cases.Case(q_lens=(40, 9), kv_lens=(60, 9), tail=0))
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        mla_jit.reload()
        with mla_jit.autotune(budget_s=20):
            cases.check(call, *mla_jit.prefill(call.q, call.k, call.v, **call.kwargs))
        dispatch = mla_jit.last_dispatch()
        assert dispatch is not None
        assert dispatch.provenance == "measured", dispatch.why
        with Store(tmp_path / "tuning.db", readonly=True) as store:
            trials = list(store.trials(op="prefill"))
        assert len({trial.config for trial in trials if trial.status == "ok"}) > 1
        assert {trial.problem for trial in trials} == {dataclasses.replace(dispatch.problem, hinted=True)}
    mla_jit.reload()


def test_prompts_that_do_not_fit_are_not_tuned() -> None:
    size = SMALL.data_bytes
    assert size == 160 * 4 * (48 + 32) * 4 + 256 * 2 * (48 + 32) * 4
    assert auto.shapes(dataclasses.replace(SMALL, hinted=False), size) == [SMALL]
    assert auto.shapes(SMALL, size - 1) == []


# ------------------------------------------------------------------------------------------------- compiling ahead


@pytest.mark.parametrize(("name", "tp"), [("sm_90", 1), ("sm_90", 8), ("gfx942", 8)])
def test_what_is_compiled_ahead_is_all_that_calls_need(name: str, tp: int) -> None:
    there, model, rng = target.by_name(name), models.by_name("deepseek-v3"), random.Random(0)
    kinds = models.prefill_problems(model, there, tp=tp)
    ready = {job.source.key for job in ahead.jobs_of(ahead.prompts_of_any_size(kinds), there).jobs}
    for _ in range(200):
        q, kv = models.dtypes_on(rng.choice(model.dtypes), there)
        batch, q_len = rng.randint(1, ahead.MAX_BATCH), rng.choice([1, 60, 64, 65, 700, 20_000])
        problem = PrefillProblem(
            num_heads=model.local_heads(tp), num_kv_heads=model.local_heads(tp), q_dtype=q, kv_dtype=kv, batch=batch,
            q_len=q_len, total_q=rng.randint(q_len, q_len * batch), max_kv_len=1 << rng.randint(0, 17),
            causal=rng.random() < 0.5, lse=rng.random() < 0.5, scheduler=rng.choice(["auto", "tiles", "persistent"]),
        )  # fmt: skip
        choice = plan.choose(problem, there)
        for source in choice.variant.sources(problem, there, choice.config):
            assert source.key in ready, f"{source.name} of {problem}"


def test_compile_and_explain_know_prompts(cache_dir: str) -> None:
    few = ("--model", "minicpm3-4b", "--target", "sm_80", "--lse", "no", "--max-batch", "1")
    made = invoke_json("compile", "--op", "prefill", *few)
    assert made["ok"]
    names = {kernel["name"].removeprefix("prefill_") for kernel in made["kernels"]}
    assert names == {
        "merge_triton", "triton", "persistent_triton_prefill_persistent", "persistent_triton_schedule",
        "persistent_triton_combine_pieces",
    }  # fmt: skip
    asked = ("--prefill", "--model", "minicpm3-4b", "--target", "sm_80", "--q-len", "5000", "--max-kv-len", "5000")
    told = invoke_json("explain", *asked, "--no-build")
    assert told["variant"] == "prefill_triton"
    assert told["problem"]["qk_dim"] == 96
    assert [kernel["origin"] for kernel in told["kernels"]] == ["cache"]
    assert "prefill_persistent_triton" in told["rejected"]
    assert "prefill 40 heads/40 × 96/64" in invoke("explain", *asked, "--no-build")
    assert "--prefill needs --model" in invoke("explain", "--prefill", "--heads", "16", code=2)
