"""Prefill in the tuner: candidates, how one is checked and timed, and what a call makes of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
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
from mla_jit.tuning import auto, candidate, prompts, shipped, space, sweep
from mla_jit.tuning.pool import Pool
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


# ---------------------------------------------------------------------------------------------------------- the lookup

KEYED = PrefillProblem(num_heads=16, num_kv_heads=16, **PrefillProblem.sizes(4, 1024, 4096))
TILES = next(v for v in VARIANTS if v.name == "prefill_triton")


def _config(block_n: int, num_stages: int = 2) -> Config:
    return TILES.default(KEYED, HOPPER).replace(block_m=64, block_n=block_n, num_stages=num_stages)


def _sized(batch: int, q_len: int, kv_len: int, **changes: Any) -> PrefillProblem:
    return dataclasses.replace(KEYED, **{**PrefillProblem.sizes(batch, q_len, kv_len), **changes})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        plan.forget()
        yield tmp_path / "tuning.db"
    plan.forget()


def _fill(path: Path, *trials: Trial) -> None:
    with Store(path) as store:
        store.add(trials)
    plan.forget()


ENDS = (_sized(1, 256, 256), _sized(64, 16384, 65536))  # between them lies all that is asked below


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 32, "num_kv_heads": 32}, {"num_heads": 32}, {"num_kv_heads": 8}, {"qk_dim": 128}, {"v_dim": 64},
        {"q_dtype": "fp16", "kv_dtype": "fp16", "out_dtype": "fp16"}, {"kv_dtype": "fp8_e4m3"}, {"out_dtype": "fp32"},
        {"causal": False},
    ],
    ids=str,
)  # fmt: skip
def test_no_row_is_a_neighbour_across_what_decides(changes: dict[str, Any], database: Path) -> None:
    """Nor where rows of fewer and of more heads lie around it."""
    around = [dataclasses.replace(KEYED, num_heads=n, num_kv_heads=kv) for n, kv in ((8, 8), (64, 64), (64, 16))]
    _fill(database, *(_trial(p, _config(64), HOPPER, 9.0) for p in (*ENDS, KEYED, *around)))
    assert plan.known(KEYED, HOPPER).provenance == "measured"
    assert plan.known(dataclasses.replace(KEYED, **changes), HOPPER).provenance == "default"
    assert plan.known(_sized(8, 1024, 4096), HOPPER).provenance == "neighbour"
    assert plan.known(_sized(8, 1024, 4096, **changes), HOPPER).provenance == "default"


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ((4, 1280, 4096), (4, 1024, 4096)),  # log2 apart: 0.3 in q_len; 1 in the batch
        ((7, 1024, 4096), (8, 1024, 4096)),
        ((4, 1024, 16384), (4, 1024, 32768)),
        ((4, 1024, 8192), (4, 1024, 4096)),
        ((4, 3072, 32768), (4, 4096, 65536)),  # not as long a chunk behind an eighth of the prefix
        ((64, 512, 512), (64, 512, 1024)),
    ],
)
def test_the_nearest_is_so_in_batch_queries_and_keys(
    asked: tuple[int, int, int], nearest: tuple[int, int, int], database: Path
) -> None:
    sizes = [(4, 1024, 4096), (8, 1024, 4096), (4, 1024, 32768), (4, 4096, 65536), (4, 3072, 4096), (64, 512, 1024)]
    configs = {size: _config(block_n, stages) for size, (block_n, stages) in zip(
        sizes, itertools.product((32, 64), (2, 3, 4)), strict=True)}  # fmt: skip
    assert len(set(configs.values())) == len(sizes)
    _fill(database, *(_trial(p, _config(16), HOPPER, 9.0) for p in ENDS))
    _fill(database, *(_trial(_sized(*size), config, HOPPER, 9.0) for size, config in configs.items()))
    choice = plan.known(_sized(*asked), HOPPER)
    assert (choice.provenance, choice.config) == ("neighbour", configs[nearest]), choice.why


@pytest.mark.parametrize("beyond", [(128, 1024, 4096), (4, 128, 4096), (4, 32768, 65536), (4, 1024, 131072)])
def test_nothing_is_said_beyond_the_sizes_measured(beyond: tuple[int, int, int], database: Path) -> None:
    _fill(database, *(_trial(p, _config(64), HOPPER, 9.0) for p in (*ENDS, KEYED)))
    assert plan.known(_sized(*beyond), HOPPER).provenance == "default"


def test_the_user_then_what_ships_then_a_neighbour_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, folder = shipped.resources.path, tmp_path / "data"

    def path(*parts: str) -> Path:
        if parts[0] != "tuning_db":
            return real(*parts)
        if not (found := folder.joinpath(*parts)).exists():
            raise FileNotFoundError(found)
        return found

    monkeypatch.setattr(shipped.resources, "path", path)
    file = folder / "tuning_db" / "nvidia_h200" / "prefill.jsonl"
    shipped.export([_trial(KEYED, _config(32), HOPPER, 8.0), _trial(ENDS[1], _config(32), HOPPER, 99.0)], file)
    assert shipped.check(file) == []
    with settings.scope(tuning_db=tmp_path / "tuning.db"):
        plan.forget()
        first = plan.known(KEYED, HOPPER)
        assert (first.provenance, first.config) == ("measured", _config(32))
        assert "shipped row" in first.why
        told = explain.explain(KEYED, HOPPER, build=False)
        assert told.tuned is not None
        assert (told.tuned.source, told.tuned.file) == ("shipped", "tuning_db/nvidia_h200/prefill.jsonl")
        _fill(tmp_path / "tuning.db", _trial(KEYED, _config(128), HOPPER, 9.0))
        mine = plan.known(KEYED, HOPPER)
        assert (mine.provenance, mine.config) == ("measured", _config(128))
        near = plan.known(_sized(8, 1024, 4096), HOPPER)
        assert (near.provenance, near.config) == ("neighbour", _config(128))
        assert plan.known(_sized(2, 1024, 4096), HOPPER).provenance == "default"
        with settings.scope(shipped_db=False):
            plan.forget()
            assert plan.known(_sized(8, 1024, 4096), HOPPER).provenance == "default"
    plan.forget()


@pytest.mark.parametrize("changes", [{"revision": 0}, {"toolchain": "triton 0.0"}], ids=str)
def test_a_row_of_another_time_is_stale_and_comes_after_others(changes: dict[str, Any], database: Path) -> None:
    _fill(database, dataclasses.replace(_trial(KEYED, _config(32), HOPPER, 5.0), **changes))
    choice = plan.known(KEYED, HOPPER)
    assert (choice.provenance, choice.config) == ("stale", _config(32))
    assert "stale: " in choice.why
    _fill(database, _trial(KEYED, _config(64), HOPPER, 9.0))
    assert plan.known(KEYED, HOPPER).config == _config(64)


@pytest.mark.parametrize(
    "config",
    [_config(64).replace(num_stages=9), Config.of("prefill_gone", a=1), Config.of(TILES.name, block_m=64)],
    ids=["too large", "no such variant", "old tunables"],
)
def test_what_cannot_serve_is_passed_over(config: Config, database: Path) -> None:
    _fill(database, _trial(KEYED, config, HOPPER, 5.0))
    assert plan.known(KEYED, HOPPER).provenance == "default"


def test_of_rows_of_the_same_bounds_the_one_with_as_many_tokens_is_taken(database: Path) -> None:
    few, more = (_sized(4, 1024, 4096, total_q=n, total_kv=4 * n) for n in (1536, 3072))
    _fill(database, *(_trial(p, _config(n), HOPPER, 9.0) for p, n in ((KEYED, 32), (few, 64), (more, 128))))
    for problem, block_n in ((KEYED, 32), (few, 64), (more, 128)):
        choice = plan.known(problem, HOPPER)
        assert (choice.provenance, choice.config) == ("measured", _config(block_n))
    between = plan.known(_sized(4, 1024, 4096, total_q=1792, total_kv=8192), HOPPER)
    assert (between.provenance, between.config) == ("neighbour", _config(64))
    assert "mean q_len 384 for 448" in between.why
    # of several prompts of 1000 tokens a call has 1024 and 4000, as it rounds them: they are even
    assert _sized(4, 1000, 1000).means == (None, None)


def test_a_call_that_does_not_tell_the_longest_keys_finds_its_row(database: Path) -> None:
    """Its max_kv_len is all rows of K; whole prompts are as long as their q, chunks as their share of the keys."""
    whole = _sized(16, 1024, 1024)
    long = [_sized(16, 1024, n) for n in (4096, 16384)]
    _fill(database, _trial(whole, _config(32), HOPPER, 9.0), *(_trial(p, _config(64), HOPPER, 90.0) for p in long))

    def untold(problem: PrefillProblem) -> PrefillProblem:
        return dataclasses.replace(problem, hinted=False, max_kv_len=problem.total_kv)

    choice = plan.known(untold(whole), HOPPER)
    assert (choice.provenance, choice.config) == ("measured", _config(32)), choice.why
    # what was timed at several lengths of the keys serves where K may have more rows than are used
    everywhere = [_trial(p, _config(128), HOPPER, us) for p, us in zip((whole, *long), (9.5, 91, 91), strict=True)]
    _fill(database, *everywhere)
    assert "steady over kv 1024, 4096" in plan.known(untold(long[0]), HOPPER).why
    assert plan.known(long[0], HOPPER).config == _config(64)


def test_kernels_of_tuned_prompts_of_any_size_are_compiled_ahead(database: Path) -> None:
    """Of rows with other tokens and sizes than those that are looked at; none is missing in strict mode.

    Some are the fastest at a length, some only good at all lengths of the keys, for calls that do not tell these.
    """
    rng, model = random.Random(1), models.by_name("deepseek-v3")
    every = space.candidates(KEYED, HOPPER, VARIANTS)
    rows = []
    for batch, q_len, total in itertools.product((1, 8), (256, 4096), (1, 2)):
        steady = rng.choice(every)
        for kv_len in (4096, 16384, 65536):
            problem = _sized(batch, q_len, kv_len)
            if batch > 1:
                problem = dataclasses.replace(problem, total_q=problem.total_q // total)
            rows += [_trial(problem, config, HOPPER, 10.0) for config in rng.sample(every, 2)]
            rows.append(_trial(problem, steady, HOPPER, 11.0))
    _fill(database, *rows)
    kinds = models.prefill_problems(model, HOPPER, tp=8, dtypes=["bf16"], causal=(True,))
    ready = {job.source.key for job in ahead.jobs_of(ahead.prompts_of_any_size(kinds), HOPPER).jobs}
    seen, robust = set(), False
    for _ in range(200):
        batch, q_len = rng.randint(1, 8), rng.randint(256, 4096)
        kv_len = rng.randint(q_len, 65536)
        problem = _sized(batch, q_len, kv_len, lse=rng.random() < 0.5)
        if rng.random() < 0.5:
            problem = dataclasses.replace(
                problem, hinted=False, max_kv_len=problem.total_kv, total_q=rng.randint(q_len, problem.total_q)
            )
        choice = plan.known(problem, HOPPER)
        seen.add((choice.provenance, choice.config))
        robust |= "steady over" in choice.why
        for source in choice.variant.sources(problem, HOPPER, choice.config):
            assert source.key in ready, f"{source.name} of {problem}, {choice}"
    assert {provenance for provenance, _ in seen} <= {"neighbour", "measured"}
    assert robust
    assert len(seen) > 8


def test_candidates_are_compiled_for_a_gpu_that_is_not_here_and_timed_by_a_clock(
    cache_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the null runtime, in a worker: prompts come to it and go to the database as decodes do."""
    ampere = target.by_name("sm_80")
    (problem,) = sweep.prompts(
        [(models.by_name("minicpm3-4b"), 8)], ampere, dtypes=["bf16"], batches=[2], kv_lens=[256], q_lens=[64]
    )
    found = [c for c in space.candidates(problem, ampere, VARIANTS) if c.get("block_n") == 32 and c["num_warps"] == 4]
    few = [found[0], found[-1]]
    assert {config.variant for config in few} == {"prefill_triton", "prefill_persistent_triton"}
    (tmp_path / "clock.py").write_text(
        "def timer(problem, config, rounds):\n"
        "    return [problem.q_len / 64 * (5.0 if 'persistent' in config.variant else 7.0)] * rounds\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sweep, "candidates", lambda *_: few)
    with Store(tmp_path / "tuning.db") as store, Pool(["null:0"], target="sm_80", timer="clock:timer") as pool:
        (done,) = sweep.run([problem], ampere, ["null:0"], pool, store, budget_s=120.0)
        assert done.outcome is not None
        assert done.outcome.faults == ()
        assert (done.outcome.winner, done.outcome.median_us, done.outcome.default_us) == (few[1], 5.0, 7.0)
        (best,) = store.best(op="prefill")
    assert (best.problem, best.config, best.device) == (problem, few[1], "NVIDIA A100-SXM4-80GB")
    assert best.registers
    rows = {variant.name: variant for variant in VARIANTS}
    assert best.source_hash == rows[best.variant].sources(problem, ampere, best.config)[0].key[:16]


# ----------------------------------------------------------------------------------------------------------- its rows


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
        assert dispatch.problem.max_kv_len == 128  # all rows of K, as the call does not tell the longest keys; of two:
        assert {trial.problem for trial in trials} == {
            dataclasses.replace(dispatch.problem, hinted=True, max_kv_len=64)
        }
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
