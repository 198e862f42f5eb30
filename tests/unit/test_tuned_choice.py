"""The tuning database at work in `plan`: what a call gets, why, when it is frozen, and how ranks come to agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mla_jit
from mla_jit import ahead, errors, plan, settings, target
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.ops.decode import splitk
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import lookup, store
from mla_jit.tuning.rows import Trial

HOPPER = target.targets()["sm_90"]
# An operand that the PTX kernels refuse: Triton's is the default.
PROBLEM = DecodeProblem(num_heads=16, batch=4, max_kv_len=4096, hinted=True, misaligned=("q",))
DEFAULT = splitk.default(PROBLEM, HOPPER)
OTHER = DEFAULT.replace(combine_s=4, num_kv_splits=7)


def trial(config: Config = OTHER, problem: DecodeProblem = PROBLEM, us: float = 10.0, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "problem": problem, "config": config, "target": HOPPER.name, "device": HOPPER.device,
        "revision": splitk.DECODE_SPLITK_TRITON.revision, "median_us": us, "toolchain": triton.version(),
    }  # fmt: skip
    return Trial(**{**fields, **changes})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tuning.db"
    with settings.scope(tuning_db=path, shipped_db=False):
        mla_jit.reload()
        yield path
    mla_jit.reload()


def fill(path: Path, *trials: Trial) -> None:
    with store.Store(path) as opened:
        opened.add(trials)
    lookup.forget()


def test_without_a_database_the_default_is_taken_and_none_is_made(database: Path) -> None:
    choice = plan.choose(PROBLEM, HOPPER)
    assert choice.config == DEFAULT
    assert choice.provenance == "default"
    assert not database.exists()


def test_a_measured_row_is_taken_and_named(database: Path) -> None:
    fill(database, trial(), trial(DEFAULT, us=11.0))
    choice = plan.choose(PROBLEM, HOPPER)
    assert (choice.config, choice.provenance) == (OTHER, "measured")
    assert choice.why
    assert choice.variant is splitk.DECODE_SPLITK_TRITON
    assert set(choice.rejected) == {
        "decode_splitk_gluon", "decode_persistent_gluon", "decode_persistent_triton", "decode_blocked_cpu",
        "decode_splitk_asm", "decode_narrow_asm", "decode_narrow_pair_asm", "decode_mixed_asm", "decode_persistent_asm",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"revision": 1}, {"toolchain": "triton 0.0"}],
    ids=["another template", "another toolchain"],
)
def test_a_row_of_another_time_is_stale(database: Path, changes: dict[str, Any]) -> None:
    fill(database, trial(**changes))
    choice = plan.choose(PROBLEM, HOPPER)
    assert (choice.config, choice.provenance) == (OTHER, "stale")


@pytest.mark.parametrize(
    "bad",
    [
        trial(OTHER.replace(combine_d=512, combine_s=128)),
        trial(Config.of("decode_gone", a=1)),
        trial(Config.of(splitk.NAME, block_m=16)),
        trial(device="NVIDIA A100"),
        trial(status="wrong", median_us=None),
    ],
    ids=["illegal", "no such variant", "old tunables", "another device", "a fault"],
)
def test_what_cannot_serve_is_passed_over(database: Path, bad: Trial) -> None:
    fill(database, bad)
    assert plan.choose(PROBLEM, HOPPER).provenance == "default"


def test_a_neighbour_serves_what_lies_between_measured_shapes_and_nothing_beyond(database: Path) -> None:
    ends = [dataclasses.replace(PROBLEM, batch=batch) for batch in (1, 16)]
    fill(database, *(trial(problem=problem) for problem in ends))
    assert plan.choose(dataclasses.replace(PROBLEM, batch=12), HOPPER).provenance == "neighbour"
    assert plan.choose(dataclasses.replace(PROBLEM, batch=64), HOPPER).provenance == "default"
    assert plan.choose(dataclasses.replace(PROBLEM, kv_dtype="fp8_e4m3"), HOPPER).provenance == "default"


def test_a_neighbours_kernel_is_taken_and_its_splits_are_made_to_fit(database: Path) -> None:
    """Of a kernel that was twice as fast as the default's; as many splits beside the default rule's as it had there."""
    wanted = {batch: dataclasses.replace(PROBLEM, batch=batch) for batch in (16, 24, 64)}
    fast = DEFAULT.replace(block_n=32, num_warps=4, num_kv_splits=8)
    few = {"default_us": 40.0}
    fill(database, trial(fast, wanted[16], us=20.0, **few), trial(fast.replace(num_kv_splits=2), wanted[64], **few))
    choice = plan.choose(wanted[24], HOPPER)
    assert choice.provenance == "neighbour"
    assert choice.config == splitk.resize(wanted[16], wanted[24], HOPPER, fast)
    assert choice.config.int("num_kv_splits") < 8
    assert "batch 16 for 24" in choice.why
    assert choice.why.endswith(f"; num_kv_splits 8 -> {choice.config['num_kv_splits']} for these sizes")
    unhinted = plan.choose(dataclasses.replace(PROBLEM, batch=16, max_kv_len=4096, hinted=False), HOPPER)
    assert unhinted.config == fast  # a length that is but a capacity changes nothing


def test_how_a_neighbour_cuts_its_work_is_no_reason_to_cut_other_sizes_like_it(database: Path) -> None:
    """The default's kernel with another cut: the default cuts for the sizes at hand."""
    wanted = {batch: dataclasses.replace(PROBLEM, batch=batch) for batch in (16, 24, 64)}
    half = DEFAULT.replace(num_kv_splits=4, combine_s=4)
    fill(database, trial(half, wanted[16]), trial(half, wanted[64], us=30.0))
    choice = plan.choose(wanted[24], HOPPER)
    assert (choice.config, choice.provenance) == (plan.analytic(wanted[24], HOPPER).config, "neighbour")
    assert choice.trial is not None
    assert choice.trial.problem == wanted[16]
    assert choice.why.endswith("; for these sizes nothing near by promises more than the default")


def test_a_choice_is_frozen_until_reload(database: Path, tmp_path: Path) -> None:
    with settings.scope(cache_dir=tmp_path / "cache"):
        first = plan.executable_for(PROBLEM, HOPPER)
        fill(database, trial())
        assert plan.executable_for(PROBLEM, HOPPER) is first
        mla_jit.reload()
        again = plan.executable_for(PROBLEM, HOPPER)
    assert (first.dispatch.provenance, again.dispatch.provenance) == ("default", "measured")
    assert again.config == OTHER
    assert again.dispatch.why in str(again.dispatch)


def test_kernels_of_tuned_configs_are_compiled_ahead(database: Path) -> None:
    before = {job.source for job in ahead.jobs_of([PROBLEM], HOPPER).jobs}
    tuned = OTHER.replace(block_n=32, num_stages=4)
    fill(database, trial(tuned, problem=dataclasses.replace(PROBLEM, batch=64)))
    after = {job.source for job in ahead.jobs_of([PROBLEM], HOPPER).jobs}
    assert before < after
    assert set(splitk.sources(PROBLEM, HOPPER, tuned)) <= after


class TestRanks:
    def test_a_plan_brings_its_choices_whatever_the_database_says(self, database: Path) -> None:
        fill(database, trial())
        data = plan.export([PROBLEM], HOPPER)
        database.unlink()
        mla_jit.reload()
        assert plan.choose(PROBLEM, HOPPER).provenance == "default"
        assert plan.load(data, HOPPER) == 1
        assert (plan.choose(PROBLEM, HOPPER).config, plan.choose(PROBLEM, HOPPER).provenance) == (OTHER, "measured")
        mla_jit.reload()
        assert plan.choose(PROBLEM, HOPPER).provenance == "default"

    def test_exports_are_equal_bytes(self, database: Path) -> None:
        fill(database, trial())
        problems = [PROBLEM, DecodeProblem(num_heads=128)]
        assert plan.export(problems, HOPPER) == plan.export(problems, HOPPER)

    def test_it_is_refused_whole(self, database: Path, tmp_path: Path) -> None:
        data = plan.export([PROBLEM, DecodeProblem(num_heads=128)], HOPPER)
        with pytest.raises(errors.InvalidInput, match="no plan"):
            plan.load(b"{}", HOPPER)
        with pytest.raises(errors.InvalidInput, match="for sm_90; here are format 1 and gfx942"):
            plan.load(data, target.by_name("gfx942"))
        changed = json.loads(data)
        changed["choices"][1]["config"] = OTHER.replace(combine_d=512, combine_s=128).to_json()
        with pytest.raises(errors.InvalidInput, match="illegal here"):
            plan.load(json.dumps(changed).encode(), HOPPER)
        assert plan._installed == {}
        changed["choices"] = [{**changed["choices"][0], "config": OTHER.to_json()}]
        with settings.scope(cache_dir=tmp_path / "cache"):
            plan.executable_for(PROBLEM, HOPPER)
        with pytest.raises(errors.InvalidInput, match="resolved already"):
            plan.load(json.dumps(changed).encode(), HOPPER)

    def test_the_public_names(self, database: Path) -> None:
        problem = DecodeProblem(num_heads=4, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32")
        assert mla_jit.load_plan(mla_jit.export_plan([problem])) == 1
