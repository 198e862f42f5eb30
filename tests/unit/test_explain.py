"""What `explain` tells of a config from the tuning database: the row, its rivals' times, and what it differs in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mla_jit
from mla_jit import explain, plan, resources, settings, target
from mla_jit.cli import main
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.explain import Difference, Time
from mla_jit.ops.decode import splitk
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import lookup, rows, shipped, store
from mla_jit.tuning.rows import Trial

HOPPER = target.targets()["sm_90"]
# A cache that the PTX kernels refuse: Triton's is the default, with the templates and, as below, without.
PROBLEM = DecodeProblem(num_heads=16, kv_dtype="fp8_e4m3", batch=4, max_kv_len=4096, hinted=True)
DEFAULT = plan.analytic(PROBLEM, HOPPER).config
TAKEN, SECOND = DEFAULT.replace(combine_s=4, num_kv_splits=7), DEFAULT.replace(num_kv_splits=5)


def trial(config: Config = TAKEN, us: float | None = 10.0, problem: DecodeProblem = PROBLEM, **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "problem": problem, "config": config, "target": HOPPER.name, "device": HOPPER.device,
        "revision": splitk.DECODE_SPLITK_TRITON.revision, "median_us": us, "spread_us": 0.25,
        "toolchain": triton.version(), "created": "2026-01-02T03:04:05+00:00", "policy": "v1", "command": "a test",
    }  # fmt: skip
    return Trial(**{**fields, **changes})


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> Iterator[Path]:
    """The path of the user's database, not made yet; nothing is shipped."""
    with settings.scope(tuning_db=tmp_path / "tuning.db"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resources, "PACKAGE", tmp_path / "data" / "package")
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()


def fill(path: Path, *trials: Trial) -> None:
    with store.Store(path) as opened:
        opened.add(trials)
    lookup.forget()


def ship(*trials: Trial) -> None:
    shipped.export(trials, resources.PACKAGE.parent / "tuning_db" / rows.slug(HOPPER.device) / "decode.jsonl")
    lookup.forget()


def told(problem: DecodeProblem = PROBLEM) -> explain.Explanation:
    return explain.explain(problem, HOPPER, build=False)


def row(problem: DecodeProblem = PROBLEM) -> explain.Tuned:
    found = told(problem).tuned
    assert found is not None
    return found


def time_of(config: Config, us: float, effort: int = 2, spread_us: float | None = 0.25) -> Time:
    return Time(config.variant, dict(config), us, spread_us, effort)


def test_a_default_has_no_row_and_no_changes() -> None:
    found = told()
    assert (found.provenance, found.tuned, found.changes) == ("default", None, [])


def test_the_users_row_with_the_times_of_its_rivals(database: Path) -> None:
    fill(database, trial(), trial(DEFAULT, 15.0), trial(SECOND, 12.0), trial(SECOND, 9.0, effort=0))
    found = told()
    assert (found.provenance, found.config) == ("measured", dict(TAKEN))
    tuned = row()
    assert (tuned.source, tuned.file, tuned.provenance) == ("user", str(database), "measured")
    assert (tuned.problem, tuned.differences) == (PROBLEM, [])
    assert tuned.taken == time_of(TAKEN, 10.0)
    assert tuned.default == time_of(DEFAULT, 15.0)
    assert tuned.runner_up == time_of(SECOND, 12.0)  # its short measurement is not comparable
    assert (tuned.created, tuned.policy, tuned.command) == ("2026-01-02T03:04:05+00:00", "v1", "a test")
    assert found.changes == [
        Difference("combine_s", 4, DEFAULT["combine_s"]), Difference("num_kv_splits", 7, DEFAULT["num_kv_splits"]),
    ]  # fmt: skip


def test_rows_of_both_databases_count(database: Path) -> None:
    ship(trial(SECOND, 12.0), trial(DEFAULT, 15.0))
    fill(database, trial())
    tuned = row()
    assert (tuned.source, tuned.runner_up, tuned.default) == ("user", time_of(SECOND, 12.0), time_of(DEFAULT, 15.0))
    database.unlink()
    lookup.forget()
    tuned = row()
    assert (tuned.source, tuned.file) == ("shipped", f"tuning_db/{rows.slug(HOPPER.device)}/decode.jsonl")
    assert (tuned.taken, tuned.runner_up) == (time_of(SECOND, 12.0), time_of(DEFAULT, 15.0))
    assert not database.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"status": "wrong", "us": None, "spread_us": None}, {"revision": 1}, {"toolchain": "triton 0.0"},
        {"provenance": "predicted"}, {"problem": dataclasses.replace(PROBLEM, batch=8)}, {"device": "NVIDIA A100"},
    ],
    ids=lambda value: next(iter(value)),
)  # fmt: skip
def test_what_is_not_comparable_is_no_rival(database: Path, other: dict[str, Any]) -> None:
    fill(database, trial(), trial(SECOND, **{"us": 11.0, **other}))
    tuned = row()
    assert (tuned.taken, tuned.runner_up, tuned.default) == (time_of(TAKEN, 10.0), None, None)


def test_the_defaults_time_may_be_told_by_the_row_or_be_short(database: Path) -> None:
    fill(database, trial(default_us=14.0))
    assert row().default == time_of(DEFAULT, 14.0, spread_us=None)
    fill(database, trial(DEFAULT, 16.0, effort=0))
    assert row().default == time_of(DEFAULT, 16.0, effort=0)
    assert row().runner_up is None


def test_a_stale_row_is_held_against_those_of_its_time(database: Path) -> None:
    old = {"toolchain": "triton 0.0"}
    fill(database, trial(**old), trial(SECOND, 12.0, **old))
    found = told()
    assert (found.provenance, row().provenance, row().toolchain) == ("stale", "measured", "triton 0.0")
    assert row().runner_up == time_of(SECOND, 12.0)


def test_a_neighbour_is_told_with_what_it_differs_in(database: Path) -> None:
    near, far = dataclasses.replace(PROBLEM, batch=8, page_size=16), dataclasses.replace(PROBLEM, batch=1)
    fill(database, trial(problem=near), trial(SECOND, 11.0, near), trial(DEFAULT, 5.0, far))
    asked = dataclasses.replace(PROBLEM, batch=6)
    assert told(asked).provenance == "neighbour"
    tuned = row(asked)
    assert (tuned.provenance, tuned.problem) == ("measured", near)
    assert tuned.differences == [Difference("page_size", 64, 16), Difference("batch", 6, 8)]
    assert tuned.runner_up == time_of(SECOND, 11.0)  # at the neighbour's sizes, as all three times are
    default = plan.analytic(near, HOPPER).config
    assert tuned.default is None
    fill(database, trial(default, 13.0, near))
    assert row(asked).default == time_of(default, 13.0)


def test_without_hints_the_row_is_of_the_longest_length(database: Path) -> None:
    short = dataclasses.replace(PROBLEM, max_kv_len=1024)
    fill(database, trial(problem=short), trial(), trial(SECOND, 20.0, short), trial(SECOND, 11.0))
    asked = dataclasses.replace(PROBLEM, max_kv_len=8192, hinted=False)
    found = told(asked)
    assert (found.provenance, found.config) == ("measured", dict(TAKEN))
    tuned = row(asked)
    assert (tuned.problem, tuned.differences) == (PROBLEM, [Difference("max_kv_len", 8192, 4096)])
    assert tuned.runner_up == time_of(SECOND, 11.0)


def test_a_loaded_plan_has_no_row(database: Path) -> None:
    fill(database, trial())
    data = plan.export([PROBLEM], HOPPER)
    plan.load(data, HOPPER)
    found = told()
    assert (found.config, found.tuned) == (dict(TAKEN), None)
    assert [change.name for change in found.changes] == ["combine_s", "num_kv_splits"]


OPTIONS = ("explain", "--heads", "16", "--dtype", "fp8", "--target", "sm_90", "--batch", "4", "--no-build")


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*OPTIONS, *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_verb_tells_all_of_it(database: Path) -> None:
    fill(database, trial(), trial(DEFAULT, 15.0))
    text = invoke("--hinted")
    assert "from     measured: the user's row of this problem: measured, 10.00 us" in text
    assert f"row      user, {database}: 2026-01-02T03:04:05+00:00, {triton.version()}, revision" in text
    assert "time     10.00 us measured, spread 0.25 us" in text
    assert f"  default: 15.00 us, 1.500 times as long: {DEFAULT.variant} " in text
    assert f"unlike the default: combine_s 4 (there {DEFAULT['combine_s']}), num_kv_splits 7 (there " in text
    assert "  where" not in text
    data = json.loads(invoke("--hinted", "--json"))
    assert data["tuned"]["taken"] == dataclasses.asdict(time_of(TAKEN, 10.0))
    assert data["tuned"]["default"]["median_us"] == 15.0
    assert data["tuned"]["runner_up"] == data["tuned"]["default"]
    assert data["changes"][0] == {"name": "combine_s", "here": 4, "there": DEFAULT["combine_s"]}
    assert data["tuned"]["problem"]["num_heads"] == 16


def test_the_verb_shows_how_far_a_neighbour_is(database: Path) -> None:
    near = dataclasses.replace(PROBLEM, batch=8)
    fill(database, trial(problem=near), trial(problem=dataclasses.replace(PROBLEM, batch=1)))
    fill(database, trial(plan.analytic(near, HOPPER).config, 30.0, near, effort=0))
    text = invoke("--hinted", "--batch", "6")
    assert "from     neighbour: nearest is a user's row with batch 8 for 6" in text
    assert f"  of     {near}\n  where  batch 6 (there 8)\n" in text
    assert "  default: 30.00 us, of effort 0: " in text
    assert "  runner-up: no time stored" in text
    data = json.loads(invoke("--hinted", "--batch", "6", "--json"))
    assert data["tuned"]["differences"] == [{"name": "batch", "here": 6, "there": 8}]
    assert data["tuned"]["runner_up"] is None


def test_without_a_row_nothing_of_it_is_printed() -> None:
    text = invoke()
    assert "from     default" in text
    assert not {"row", "time", "unlike"} & {line.partition(" ")[0] for line in text.splitlines()}
    data = json.loads(invoke("--json"))
    assert (data["tuned"], data["changes"]) == (None, [])
