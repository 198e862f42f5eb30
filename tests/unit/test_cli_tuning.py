"""`mla-tune plan` and `run`, on the CPU and on targets that are not here, and what other verbs make of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mla_jit
from mla_jit import settings
from mla_jit.cli import main
from mla_jit.tuning import pool, rows, shipped, store

SMALL = ("--model", "minicpm3-4b", "--tp", "8", "--dtype", "bf16", "--batch", "1", "--kv-len", "128")


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> Iterator[Path]:
    with settings.scope(tuning_db=tmp_path / "tuning.db", target="cpu"):
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()


def invoke(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def invoke_json(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(main, [*(str(a) for a in arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_plan_lists_each_shape_once_and_needs_no_gpu() -> None:
    arguments = ("--model", "deepseek-v3,kimi-k2", "--tp", "8", "--dtype", "bf16", "--batch", "1,4", "--kv-len", "1024")
    found = invoke_json("plan", "--target", "sm_90", *arguments)
    shapes = [(row["problem"]["num_heads"], row["problem"]["batch"]) for row in found["shapes"]]
    assert shapes == [(16, 1), (16, 4), (8, 1), (8, 4)]
    assert all(row["candidates"] >= 300 for row in found["shapes"])
    text = invoke("plan", "--target", "sm_90", *arguments)
    assert text.startswith("4 shapes for sm_90 (NVIDIA H200)")


def test_a_run_fills_the_database_and_the_next_one_has_nothing_to_do(database: Path, tmp_path: Path) -> None:
    first = invoke_json("run", *SMALL, "--budget", "60s", "--timeout", "30")
    (shape,) = first["shapes"]
    assert (first["ok"], shape["finished_before"], shape["variant"]) == (True, False, "decode_blocked_cpu")
    assert shape["median_us"] > 0
    again = invoke_json("run", *SMALL, "--budget", "60s")
    assert [row["finished_before"] for row in again["shapes"]] == [True]

    shown = invoke_json("show")
    (best,) = shown["best"]
    # the search prefers fewer splits among what noise cannot tell apart; the database has the fastest of the playoff
    assert 0 < best["median_us"] <= shape["median_us"]
    assert f"{best['median_us']:.1f} us" in invoke("show")

    files = invoke_json("export", tmp_path / "out")["files"]
    assert list(files.values()) == [1]
    (path,) = map(Path, files)
    assert shipped.check(path) == []
    (row,) = [rows.Trial.from_json(line) for line in path.read_text().splitlines()]
    assert dict(row.config) == best["config"]

    other = tmp_path / "other.db"
    assert invoke_json("import", "--db", other, path) == {"ok": True, "database": str(other), "read": 1, "added": 1}
    assert invoke_json("merge", "--db", other, database)["added"] == shown["trials"]
    assert invoke_json("merge", "--db", other, database)["added"] == 0
    assert invoke_json("import", "--db", other, path)["added"] == 0
    with store.Store(other, readonly=True) as merged:
        assert {t.provenance for t in merged.trials()} == {"measured", "imported"}
    assert invoke_json("compare", database, path)["geometric_mean"] == 1.0


def test_a_budget_that_is_too_short_is_said() -> None:
    found = invoke_json("run", *SMALL, "--budget", "0s", code=1)
    assert (found["ok"], found["shapes"][0]["stopped"]) == (False, "budget")


def test_a_run_in_which_every_candidate_fails_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = rows.Measurement("error", note="RuntimeError: the bench itself is broken")
    monkeypatch.setattr(pool.Pool, "measure", lambda *_, **__: broken)
    found = invoke_json("run", *SMALL, "--budget", "60s", code=1)
    (shape,) = found["shapes"]
    assert (found["ok"], shape["median_us"]) == (False, None)
    assert {fault["note"] for fault in shape["faults"]} == {broken.note}
    assert "error: RuntimeError: the bench itself is broken" in invoke("run", *SMALL, "--no-resume", code=1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", *SMALL, "--budget", "soon"), 2, "'soon' is no time"),
        (("plan", "--model", "gpt-2"), 2, "no model 'gpt-2'"),
        (("plan", "--model", "deepseek-v3", "--tp", "3"), 2, "cannot share equally"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], code: int, message: str) -> None:
    assert message in invoke(*arguments, code=code)
