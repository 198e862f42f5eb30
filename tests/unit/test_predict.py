"""Predicted rows: made of a model and real compiles, only where they are far ahead, and never before a measured one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mla_jit
from mla_jit import ops, plan, resources, settings, support, target
from mla_jit.cli import main
from mla_jit.compile import cache, triton
from mla_jit.compile.artifact import Artifact
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.ops.decode import splitk
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target
from mla_jit.tuning import lookup, predict, shipped, store
from mla_jit.tuning.heuristic import predicted_us
from mla_jit.tuning.rows import Trial

VARIANT = splitk.DECODE_SPLITK_TRITON
AMPERE = target.by_name("sm_80")
# 64 programs of the default's for 108 SMs, and a shape that fills them
IDLE = DecodeProblem(num_heads=128, batch=16, max_kv_len=8192, hinted=True)
FULL = DecodeProblem(num_heads=128, batch=128, max_kv_len=8192, hinted=True)
DEFAULT = splitk.default(IDLE, AMPERE)
MORE_SPLITS = DEFAULT.replace(num_kv_splits=7)


def trial(config: Config = MORE_SPLITS, problem: DecodeProblem = IDLE, us: float = 10.0, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "problem": problem, "config": config, "target": AMPERE.name, "device": AMPERE.device,
        "revision": VARIANT.revision, "median_us": us, "default_us": 2 * us, "toolchain": triton.version(),
    }  # fmt: skip
    return Trial(**{**fields, **changes})


def predicted(config: Config = MORE_SPLITS, problem: DecodeProblem = IDLE, us: float = 10.0, **changes: Any) -> Trial:
    return trial(config, problem, us, provenance="predicted", effort=0, **changes)


# ------------------------------------------------------------------------------------------------- the model's artifact


def kernel(**changes: Any) -> Artifact:
    """The resources of the default kernel for IDLE, as the compiler gives them."""
    plain = {"threads": 256, "smem_bytes": 102400, "registers": 170, "spill_bytes": 0}
    return Artifact(key="", name="", isa="", entry="", binary=b"", **{**plain, **changes})


def us(config: Config = DEFAULT, problem: DecodeProblem = FULL, where: Target = AMPERE, **changes: Any) -> float:
    return predicted_us(problem, where, VARIANT, config, kernel(**changes))


def test_spills_cost_time() -> None:
    assert us(spill_bytes=0) < us(spill_bytes=400) < us(spill_bytes=800)


def test_what_leaves_no_room_for_a_second_program_costs_time() -> None:
    roomy = us(smem_bytes=80000, registers=120)
    assert roomy == us(smem_bytes=83000, registers=128)
    assert roomy < us(smem_bytes=84000, registers=128)
    assert roomy < us(smem_bytes=80000, registers=129)


def test_stages_of_gathered_tiles_change_nothing_once_there_is_a_kernel() -> None:
    two, four = DEFAULT, DEFAULT.replace(num_stages=4)
    assert us(two) == us(four)
    assert predicted_us(FULL, AMPERE, VARIANT, two) != predicted_us(FULL, AMPERE, VARIANT, four)


# ---------------------------------------------------------------------------------------------------------- predictions


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A kernel cache for the module."""
    with settings.scope(cache_dir=tmp_path_factory.mktemp("kernels")):
        cache.forget()
        yield
    cache.forget()


@pytest.fixture(scope="module")
def found(built: None) -> predict.Prediction:
    return predict.predict([IDLE, FULL], AMPERE, command="mla-tune predict …")


def test_a_row_is_a_legal_config_that_is_far_ahead_of_the_default(found: predict.Prediction) -> None:
    (row,) = found.trials
    assert row.problem == IDLE
    assert row.config != plan.analytic(IDLE, AMPERE).config
    assert VARIANT.rejects(IDLE, AMPERE, row.config) is None
    assert row.median_us is not None
    assert row.default_us is not None
    assert row.default_us >= row.median_us * (1 + predict.MARGIN)
    assert (row.provenance, row.status, row.spread_us, row.rel_l2, row.effort) == ("predicted", "ok", None, None, 0)
    assert (row.target, row.device, row.command) == (AMPERE.name, AMPERE.device, "mla-tune predict …")
    assert "never run" in row.policy


def test_its_figures_are_those_of_its_own_compiled_kernel(built: None, found: predict.Prediction) -> None:
    (row,) = found.trials
    stage1, combine = VARIANT.sources(IDLE, AMPERE, row.config)
    artifact, origin = cache.build_traced(stage1)
    assert origin != "compiled"
    assert cache.build_traced(combine)[1] != "compiled"
    assert (row.registers, row.spill_bytes, row.smem_bytes) == (
        artifact.registers, artifact.spill_bytes, artifact.smem_bytes,
    )  # fmt: skip
    assert row.source_hash == stage1.key[:16]
    assert (row.toolchain, row.revision) == (triton.version(), VARIANT.revision)
    assert row.median_us == round(predicted_us(IDLE, AMPERE, VARIANT, row.config, artifact), 2)


def test_a_default_that_is_as_good_has_no_row_but_a_reason(found: predict.Prediction) -> None:
    assert found.without == {FULL: "no other config promises more than the default"}


def test_what_is_not_so_far_ahead_is_left_out(built: None, found: predict.Prediction) -> None:
    assert len(found.trials) == 1
    above = predict.predict([IDLE], AMPERE, margin=9.0)
    assert above.trials == ()
    assert above.without[IDLE].startswith("the best is predicted +")


def test_no_more_kernels_are_compiled_than_allowed(built: None, found: predict.Prediction) -> None:
    assert 1 <= found.kernels <= predict.MOST_KERNELS
    few = predict.predict([IDLE, dataclasses.replace(IDLE, num_heads=16)], AMPERE, most_kernels=1)
    assert few.kernels == 1


def test_a_kernel_that_is_not_legal_makes_no_row(built: None) -> None:
    """The default's tiles fit by its own estimate; what the compiler makes of them needs 83968 bytes."""
    small = dataclasses.replace(AMPERE, smem_bytes=80000)
    asked = dataclasses.replace(IDLE, scheduler="split")
    result = predict.predict([asked], small)
    assert result.trials == ()
    assert any("bytes of shared memory, the target has 80000" in fault for _, fault in result.faults)
    assert result.without == {asked: "the default's kernel is not legal, or was not compiled"}


def test_a_default_that_the_model_does_not_describe_is_left_alone() -> None:
    asked = dataclasses.replace(IDLE, scheduler="persistent")
    without = predict.predict([asked], AMPERE).without
    assert without == {asked: "a call takes decode_persistent_triton, of which the model says nothing"}


def test_what_nothing_can_serve_has_a_reason() -> None:
    wide = DecodeProblem(num_heads=16, kv_lora_rank=1024, hinted=True)
    assert "kv_lora_rank 1024 > 512" in predict.predict([wide], AMPERE).without[wide]


@pytest.mark.parametrize(
    ("where", "margin", "message"),
    [(AMPERE, 0.01, "within the model's noise; the least is 3%"), (target.by_name("cpu"), 0.15, "`mla-tune run`")],
    ids=["noise", "no kernels"],
)
def test_what_cannot_be_predicted_is_refused(where: Target, margin: float, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        predict.predict([IDLE], where, margin=margin)


def test_tiles_are_not_predicted_to_be_better_because_they_are_larger() -> None:
    search = predict._Search(AMPERE, predict.MARGIN, predict._Kernels(AMPERE, 40, None, None))
    shape = search.shape(IDLE)
    assert shape is not None
    tiles = {(config.int("block_m"), config.int("block_n")) for some in shape.others.values() for config in some}
    assert (DEFAULT.int("block_m"), DEFAULT.int("block_n")) == (32, 32)
    assert tiles
    assert all(rows <= 32 and tokens <= 32 for rows, tokens in tiles)


# ------------------------------------------------------------------------------------------------ what others get of it


def search() -> predict._Search:
    return predict._Search(AMPERE, predict.MARGIN, predict._Kernels(AMPERE, 40, None, None))


SHORT = DecodeProblem(num_heads=16, batch=1, max_kv_len=1024, hinted=True)
LONG = dataclasses.replace(SHORT, max_kv_len=65536)
# A tile a piece at SHORT. Without hints a call of any capacity from 1024 tokens on gets the row, as it is.
FOR_SHORT = predicted(splitk.default(SHORT, AMPERE).replace(num_kv_splits=32, combine_s=32, combine_d=64), SHORT)


def test_a_row_that_a_neighbour_would_suffer_from_is_left_out() -> None:
    at = search()
    assert at.harmless([FOR_SHORT], [SHORT, LONG], []) == []
    assert "would get its row and be" in at.without[SHORT]
    assert search().harmless([FOR_SHORT], [SHORT], []) == [FOR_SHORT]


def test_a_row_may_protect_a_neighbour_from_another() -> None:
    twice = dataclasses.replace(SHORT, max_kv_len=2048)
    shield = predicted(FOR_SHORT.config.replace(num_kv_splits=64, combine_s=128), twice, default_us=11.0)
    assert search().harmless([FOR_SHORT], [SHORT, twice], []) == []
    assert search().harmless([FOR_SHORT, shield], [SHORT, twice], []) == [shield, FOR_SHORT]


def test_the_users_database_is_neither_read_nor_written(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    with store.Store(path) as users:
        users.add([trial(DEFAULT.replace(num_kv_splits=1), us=1.0)])
    before = path.read_bytes()
    with settings.scope(tuning_db=path):
        assert search().harmless([predicted()], [IDLE], []) == [predicted()]
        assert settings.current().tuning_db == path
    assert path.read_bytes() == before


# --------------------------------------------------------------------------------------------------------------- lookup


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """The path of the user's database, not made yet; nothing is shipped but the evidence."""
    folder = tmp_path / "data" / "tuning_db"
    folder.mkdir(parents=True)
    shutil.copy(resources.path(*support.EVIDENCE), folder)
    target.targets()
    with settings.scope(tuning_db=tmp_path / "tuning.db"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "PACKAGE", tmp_path / "data" / "package")
        support.evidence.cache_clear()
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    support.evidence.cache_clear()
    mla_jit.reload()


def ship(*trials: Trial) -> Path:
    path = predict.path_of(resources.PACKAGE.parent / "tuning_db", AMPERE)
    shipped.export(trials, path)
    assert shipped.check(path) == []
    mla_jit.reload()
    return path


def test_a_call_takes_a_predicted_row_and_says_so(database: Path) -> None:
    assert plan.choose(IDLE, AMPERE).provenance == "default"
    ship(predicted())
    choice = plan.choose(IDLE, AMPERE)
    assert (choice.config, choice.provenance) == (MORE_SPLITS, "predicted")
    assert choice.why == "shipped row of this problem: predicted, 10.00 us"


@pytest.mark.parametrize(
    "measured",
    [
        [trial(DEFAULT, us=999.0)],
        [trial(DEFAULT, us=999.0, provenance="imported")],
        [trial(DEFAULT, us=999.0, revision=VARIANT.revision - 1)],
        [trial(DEFAULT, us=999.0, effort=0)],
        [trial(DEFAULT, dataclasses.replace(IDLE, batch=batch), us=999.0) for batch in (1, 64)],
    ],
    ids=["measured", "imported", "stale", "in haste", "neighbours"],
)
@pytest.mark.parametrize("shipped_too", [True, False], ids=["shipped", "the user's"])
def test_it_loses_to_every_measured_row(database: Path, measured: list[Trial], shipped_too: bool) -> None:
    ship(predicted(us=1.0), *(measured if shipped_too else ()))
    if not shipped_too:
        with store.Store(database) as users:
            users.add([predicted(us=0.5), *measured])
        lookup.forget()
    choice = plan.choose(IDLE, AMPERE)
    assert choice.provenance in ("measured", "imported", "stale", "neighbour")
    assert choice.config.replace(num_kv_splits=1) == DEFAULT.replace(num_kv_splits=1)
    assert choice.trial is not None
    assert choice.trial.median_us == 999.0


def test_nothing_counts_it_as_tuned_or_measured(database: Path) -> None:
    """The support matrix and the shapes of a problem's call stay what they were."""
    before = support.matrix()
    ship(predicted(), predicted(problem=FULL))
    assert plan.choose(FULL, AMPERE).provenance == "predicted"
    cells = support.matrix()
    assert cells == before
    assert support.markdown(cells) == support.markdown(before)
    states = {cell.state for cell in cells if cell.target == AMPERE.name}
    assert states <= {"refused", "unproven", "compiled"}
    assert plan.choose(FULL, AMPERE).provenance not in plan.MEASURED


# ---------------------------------------------------------------------------------------------------------------- files


def test_measured_rows_and_those_of_other_problems_stay_in_the_file(tmp_path: Path) -> None:
    path = predict.path_of(tmp_path, AMPERE)
    assert path == tmp_path / "nvidia_a100_sxm4_80gb" / "decode.jsonl"
    assert predict.beside(path, [IDLE], AMPERE) == []
    measured, old, other = trial(DEFAULT), predicted(us=11.0), predicted(problem=FULL)
    shipped.export([measured, old, other], path)
    kept = predict.beside(path, [IDLE], AMPERE)
    assert set(kept) == {measured, other}
    assert predict.write(path, [predicted()], kept) == 3
    assert shipped.check(path) == []
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {Trial.from_json(line) for line in lines} == {measured, other, predicted()}


def test_a_file_without_rows_is_none(tmp_path: Path) -> None:
    path = predict.path_of(tmp_path, AMPERE)
    assert predict.write(path, [], []) == 0
    assert not path.exists()
    shipped.export([predicted()], path)
    assert predict.write(path, [], predict.beside(path, [IDLE], AMPERE)) == 0
    assert not path.exists()


def test_a_file_with_faults_is_not_overwritten(tmp_path: Path) -> None:
    path = predict.path_of(tmp_path, AMPERE)
    path.parent.mkdir()
    path.write_text("no row\n")
    with pytest.raises(InvalidInput, match=r"line 1: .*; correct the file or remove it"):
        predict.beside(path, [IDLE], AMPERE)


def shipped_predictions() -> list[tuple[Path, Trial]]:
    found = []
    for path in sorted(resources.path("tuning_db").glob("*/decode.jsonl")):
        rows = [Trial.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found += [(path, row) for row in rows if row.provenance == "predicted"]
    return found


def test_shipped_predictions_still_say_something() -> None:
    """Else `mla-tune predict` makes new ones."""
    rows = {variant.name: variant for variant in ops.variants("decode")}
    for path, row in shipped_predictions():
        there, default = target.by_name(row.target), plan.analytic(row.problem, target.by_name(row.target)).config
        assert path == predict.path_of(path.parents[1], there)
        assert row.device == there.device
        assert row.config != default
        assert set(row.config) == set(rows[row.variant].default(row.problem, there))
        assert rows[row.variant].rejects(row.problem, there, row.config) is None
        assert row.default_us is not None
        assert row.median_us is not None
        assert row.default_us >= row.median_us * (1 + predict.MARGIN) * 0.999  # both are rounded


# -------------------------------------------------------------------------------------------------------------- command

SHAPE = ("--model", "deepseek-v3", "--dtype", "bf16", "--batch", "16", "--kv-len", "8192", "--target", AMPERE.name)


def invoke(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_the_command_writes_the_file_and_says_what_it_rests_on(built: None, tmp_path: Path) -> None:
    data = json.loads(invoke(*SHAPE, tmp_path, "--json").stdout)
    assert (data["ok"], data["shapes"], data["kept"], len(data["rows"])) == (True, 1, 0, 1)
    assert data["gain"] >= 1.15
    assert data["kernels"] >= 1
    path = Path(data["file"])
    assert shipped.check(path) == []
    (row,) = [Trial.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (row.problem, dict(row.config)) == (IDLE, data["rows"][0]["config"])
    assert row.provenance == "predicted"

    text = invoke(*SHAPE, tmp_path).stdout
    assert f"1 of 1 shapes for {AMPERE.name} ({AMPERE.device}), by the model " in text
    assert "0 rows kept" in text
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((*SHAPE, "--margin", "1"), 2, "within the model's noise"),
        ((*SHAPE[:-1], "cpu"), 2, "no kernels that could be compiled ahead"),
        ((*SHAPE[:-1], "abacus"), 2, "no target 'abacus'"),
        (("--model", "minicpm3-4b", "--kv-len", "65536", "--target", AMPERE.name), 1, "0 of 0 shapes"),
    ],
    ids=["noise", "no kernels", "no target", "no shape"],
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], code: int, message: str, tmp_path: Path) -> None:
    assert message in invoke(*arguments, tmp_path, code=code).output
    assert list(tmp_path.iterdir()) == []
