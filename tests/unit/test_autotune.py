"""`mla_jit.autotune` with real workers on the CPU: what is measured, when, what is stored, and what calls get."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import children

import mla_jit
from mla_jit import api, plan, settings, target, trial
from mla_jit.errors import CacheMiss, InvalidInput
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import auto, rows, store, sweep
from mla_jit.tuning.rows import Trial

ROOT = Path(mla_jit.__file__).parents[1]
CPU = target.targets()["cpu"]
SMALL = DecodeProblem(
    num_heads=2, kv_lora_rank=32, rope_dim=16, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32", page_size=8, batch=2,
    max_kv_len=32, lse=True, hinted=True,
)  # fmt: skip
ONE = dataclasses.replace(SMALL, batch_invariant=True)  # which leaves one config to measure
SLOW = dataclasses.replace(SMALL, num_heads=32, q_len=4, batch=4, max_kv_len=2048)


@pytest.fixture(autouse=True)
def database(tmp_path: Path, cache_dir: str) -> Iterator[Path]:
    """The user's database, not made yet. Afterwards no hook and no worker may be left."""
    before = children()
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()
    assert plan.on_miss is None
    assert children() <= before


def decode(problem: DecodeProblem, **more: Any) -> plan.Dispatch:
    """A call of the problem, judged; what served it."""
    call = trial.make_call(problem, "cpu")
    keywords = {**call.keywords, "batch_invariant": problem.batch_invariant, **more}
    if problem.hinted:
        keywords.setdefault("max_kv_len", problem.max_kv_len)
    out, lse = mla_jit.decode(call.q, call.kv_cache, **keywords)
    assert trial.judge(call, out, lse).ok
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.problem == problem
    return dispatch


def stored(path: Path) -> list[Trial]:
    if not path.exists():
        return []
    with store.Store(path, readonly=True) as opened:
        return list(opened.trials())


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "mla_jit.tuning" and r.levelno >= logging.WARNING]


# --------------------------------------------------------------------------------------------------- what is measured


def test_the_first_call_in_the_block_is_tuned_and_the_choice_stays(database: Path) -> None:
    assert decode(SMALL).provenance == "default"
    assert not database.exists()  # outside nothing is measured
    with mla_jit.autotune():
        tuned = decode(SMALL)  # resolved before the block, and again
        trials = stored(database)
        assert tuned.provenance == "measured"
        assert {(t.problem, t.device, t.provenance, t.command) for t in trials} == {
            (SMALL, "CPU", "measured", "mla_jit.autotune")
        }
        assert len({t.config for t in trials}) > 3
        assert {t.effort for t in trials} == {0, 1, 2}
        with store.Store(database, readonly=True) as opened:
            assert [best.config for best in opened.best()] == [tuned.config]
        assert decode(SMALL) == tuned
        assert mla_jit.last_dispatch() is tuned
        assert len(stored(database)) == len(trials)  # a warm call measures nothing
    assert decode(SMALL) is tuned
    mla_jit.reload()
    assert decode(SMALL).config == tuned.config
    assert decode(dataclasses.replace(SMALL, batch=3)).provenance == "default"
    assert len(stored(database)) == len(trials)


def test_what_is_measured_already_is_not_tuned_again(database: Path) -> None:
    with mla_jit.autotune():
        decode(ONE)
    before = stored(database)
    mla_jit.reload()
    running = children()
    with mla_jit.autotune():
        assert decode(ONE).provenance == "measured"
        assert children() == running  # not even a worker
        assert plan.choose(dataclasses.replace(ONE, batch=0), CPU).provenance == "default"  # nothing to compute
        assert children() == running
    assert stored(database) == before


def test_a_stale_row_and_a_neighbour_are_not_enough(database: Path) -> None:
    with mla_jit.autotune():
        decode(ONE)
    good = stored(database)
    database.unlink()
    with store.Store(database) as opened:
        opened.add(dataclasses.replace(t, toolchain="triton 0.0") for t in good)
        opened.add(dataclasses.replace(t, problem=dataclasses.replace(ONE, batch=b)) for t in good for b in (4, 8))
    mla_jit.reload()
    wanted = [ONE, dataclasses.replace(ONE, batch=6)]
    assert [decode(problem).provenance for problem in wanted] == ["stale", "neighbour"]
    with mla_jit.autotune():
        assert [decode(problem).provenance for problem in wanted] == ["measured", "measured"]


def test_without_hints_the_lengths_that_the_capacity_may_stand_for_are_tuned(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "LENGTHS", (8, 64))  # 1024 and more take long on a CPU
    asked = dataclasses.replace(SMALL, hinted=False)
    with mla_jit.autotune():
        dispatch = decode(asked)
    assert dispatch.provenance == "measured"
    assert dispatch.why.startswith("steady over kv 8, 32; ")
    assert {t.problem for t in stored(database)} == {dataclasses.replace(SMALL, max_kv_len=n) for n in (8, 32)}
    assert decode(SMALL).provenance == "measured"  # the capacity as a hint


def test_the_shapes_of_a_problem() -> None:
    def lengths(problem: DecodeProblem, room: float = math.inf) -> list[int]:
        found = auto.shapes(problem, room)  # type: ignore[arg-type]
        assert all(dataclasses.replace(shape, max_kv_len=0) == dataclasses.replace(problem, max_kv_len=0, hinted=True)
                   for shape in found)  # fmt: skip
        return [shape.max_kv_len for shape in found]

    asked = DecodeProblem(num_heads=16, batch=4, max_kv_len=131072)
    token = 4 * 576 * 2  # bytes, of all sequences
    assert lengths(asked) == [1024, 8192, 131072]
    assert lengths(asked, 20_000 * token) == [1024, 8192, 16384]
    assert lengths(asked, 8191 * token) == [1024, 4096]
    assert lengths(dataclasses.replace(asked, num_kv_heads=2), 20_000 * token) == [1024, 8192]
    assert lengths(dataclasses.replace(asked, max_kv_len=2048)) == [1024, 2048]
    assert lengths(dataclasses.replace(asked, max_kv_len=1024)) == [1024]
    assert lengths(dataclasses.replace(asked, max_kv_len=100)) == [100]
    assert lengths(asked, 0) == []
    hinted = dataclasses.replace(asked, hinted=True)
    assert lengths(hinted) == [131072]
    assert lengths(hinted, 131071 * token) == []
    with_total = dataclasses.replace(hinted, total_kv=4096)
    assert auto.shapes(with_total, 4096 * 576 * 2) == [with_total]


def test_a_cache_that_does_not_fit_is_left_as_it_is(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "_HOST_BYTES", 1000)
    with mla_jit.autotune():
        assert decode(SMALL).provenance == "default"
        assert decode(dataclasses.replace(SMALL, batch=3)).provenance == "default"
        tiny = dataclasses.replace(ONE, batch=1, max_kv_len=4)  # of 768 bytes
        assert decode(tiny).provenance == "measured"
    (said,) = warnings(caplog)
    assert "its cache does not fit cpu" in said


def test_strict_mode_is_tuned_too() -> None:
    with settings.scope(mode="strict"), mla_jit.autotune():
        assert decode(ONE).provenance == "measured"


def test_warmup_plans_and_exports_tune_and_supports_does_not(database: Path) -> None:
    with settings.scope(target="cpu"), mla_jit.autotune():
        assert mla_jit.supports(ONE)
        assert not database.exists()
        (done,) = mla_jit.warmup([ONE])
        assert done.provenance == "measured"
        other = dataclasses.replace(ONE, batch=3)
        data = mla_jit.export_plan([other])
        mla_jit.load_plan(data)
        assert plan.choose(other, CPU).why.endswith("(loaded plan)")
    assert {t.problem.batch for t in stored(database)} == {2, 3}


def test_another_database_may_be_named(database: Path, tmp_path: Path) -> None:
    with mla_jit.autotune(db=tmp_path / "other.db"):
        assert decode(ONE).provenance == "measured"
    assert settings.current().tuning_db == database
    assert (len(stored(tmp_path / "other.db")) > 0, database.exists()) == (True, False)
    assert decode(ONE).provenance == "measured"  # as this process has resolved it
    mla_jit.reload()
    assert decode(ONE).provenance == "default"


def test_entering_drops_only_what_is_not_measured() -> None:
    with mla_jit.autotune():
        tuned = decode(ONE)
    decode(dataclasses.replace(ONE, batch=3))
    assert {call.dispatch.provenance for call in api._calls.values()} == {"measured", "default"}
    with mla_jit.autotune():
        assert [call.dispatch for call in api._calls.values()] == [tuned]
        assert [executable.dispatch for executable in plan._memo.values()] == [tuned]


def test_a_loaded_plan_holds_in_the_block(database: Path) -> None:
    other = dataclasses.replace(SMALL, batch=3)
    data = plan.export([SMALL], CPU)
    plan.load(data, CPU)
    first, second = decode(SMALL), decode(other)
    assert "(loaded plan)" in first.why
    with mla_jit.autotune(budget_s=0.0):
        assert decode(SMALL) is first
        assert (other, CPU) not in plan._memo
        assert decode(other) is not second
    assert stored(database) == []


# ------------------------------------------------------------------------------------------------------------- limits


def test_without_time_calls_are_served_as_before_with_one_warning(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with mla_jit.autotune(budget_s=0.0):
        assert [decode(SMALL).provenance, decode(ONE).provenance] == ["default", "default"]
    (said,) = warnings(caplog)
    assert said.startswith("the 0 s of this autotune block are spent; give it a larger budget_s. Untuned calls")
    assert not database.exists()


def test_the_budget_is_the_whole_blocks(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = dataclasses.replace(ONE, batch=3)
    with mla_jit.autotune(budget_s=0.2):  # the start of the worker takes longer
        decode(ONE)
        measured = len(stored(database))
        assert decode(other).provenance == "default"
        assert decode(dataclasses.replace(ONE, batch=4)).provenance == "default"
    assert {t.problem for t in stored(database)} <= {ONE}
    assert len(stored(database)) == measured
    assert len(warnings(caplog)) == 1
    with mla_jit.autotune():
        assert decode(other).provenance == "measured"  # another block has its own


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/python"])
def test_a_worker_that_cannot_start_costs_one_warning(
    executable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with mla_jit.autotune():
        assert [decode(SMALL).provenance, decode(ONE).provenance] == ["default", "default"]
    (said,) = warnings(caplog)
    assert said.startswith("autotune cannot go on: ")


def test_a_database_that_cannot_be_written_costs_one_warning(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    database.write_text("not a database, " * 100)
    with mla_jit.autotune():
        assert [decode(SMALL).provenance, decode(ONE).provenance] == ["default", "default"]
    (said,) = warnings(caplog)
    assert f"the tuning database {database} cannot be used" in said


def test_a_candidate_that_fails_is_told_and_stored(
    database: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The worker has a reference that raises, so that every candidate fails."""
    (tmp_path / "sitecustomize.py").write_text(
        "from mla_jit.ops.decode import reference\n"
        "def decode(*_, **__): raise RuntimeError('no reference')\n"
        "reference.decode = decode\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    with mla_jit.autotune():
        assert decode(ONE).provenance == "default"
    assert {(t.status, t.median_us) for t in stored(database)} == {("error", None)}
    (said,) = warnings(caplog)
    assert "error, RuntimeError: no reference" in said


def test_a_target_that_is_not_here_is_served_by_its_default(caplog: pytest.LogCaptureFixture) -> None:
    with mla_jit.autotune():
        choice = plan.choose(DecodeProblem(num_heads=16, hinted=True), target.by_name("gfx942"))
    assert choice.provenance == "default"
    (said,) = warnings(caplog)
    assert "no device here is AMD Instinct MI300X (gfx942)" in said


def test_under_capture_nothing_is_measured(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that is only said to run; tests/gpu/test_autotune.py has a real one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    problem, hopper = DecodeProblem(num_heads=16), target.by_name("sm_90")
    message = r"decode 16 heads.* is not tuned, .* under graph capture; call it once"
    with mla_jit.autotune(), pytest.raises(CacheMiss, match=message):
        plan.choose(problem, hopper)
    with mla_jit.autotune(budget_s=0.0):
        assert plan.choose(problem, hopper).provenance == "default"
    assert not database.exists()


# --------------------------------------------------------------------------------------------------- blocks, threads


def test_a_block_in_a_block_is_refused_and_the_outer_one_goes_on() -> None:
    with mla_jit.autotune():
        hook = plan.on_miss
        with pytest.raises(InvalidInput, match="leave that block before"), mla_jit.autotune():
            pass
        assert plan.on_miss is hook


@pytest.mark.parametrize(
    ("options", "message"), [({"search": "fast"}, "use auto or exhaustive"), ({"budget_s": -1.0}, "budget_s is -1.0")]
)
def test_nonsense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message), mla_jit.autotune(**options):
        pass


def test_after_an_exception_the_block_is_over() -> None:
    def fail() -> None:
        with mla_jit.autotune():
            decode(ONE)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert plan.on_miss is None
    assert decode(dataclasses.replace(ONE, batch=3)).provenance == "default"
    assert decode(ONE).provenance == "measured"


def test_one_thread_tunes_and_the_others_wait(database: Path) -> None:
    problems = [dataclasses.replace(ONE, batch=batch) for batch in (2, 3, 2, 3, 2)]
    found: list[plan.Executable] = []

    def resolve(problem: DecodeProblem) -> None:
        found.append(plan.executable_for(problem, CPU))

    with mla_jit.autotune():
        threads = [threading.Thread(target=resolve, args=(problem,)) for problem in problems]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert [e.dispatch.provenance for e in found] == ["measured"] * 5
    measured = [(t.problem, t.config, t.effort) for t in stored(database)]
    assert len(measured) == len(set(measured))
    assert {problem for problem, _, _ in measured} == set(problems)


def test_a_thread_that_is_still_tuning_when_the_block_ends_is_served(database: Path) -> None:
    found: list[plan.Choice] = []
    with mla_jit.autotune(search="exhaustive", budget_s=600.0):
        thread = threading.Thread(target=lambda: found.append(plan.choose(SLOW, CPU)))
        thread.start()
        wait_for_trials(database, 1)
        started = time.monotonic()
    assert time.monotonic() - started < 30
    thread.join(30)
    (choice,) = found
    kept = stored(database)
    assert choice.provenance == "measured"
    assert len({t.config for t in kept}) < len(sweep.candidates(SLOW, CPU))


def wait_for_trials(path: Path, count: int, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while len(ok(path)) < count:
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def ok(path: Path) -> list[Trial]:
    try:
        return [t for t in stored(path) if t.status == rows.OK]
    except mla_jit.errors.StoreError:  # just being made
        return []


def test_a_forked_child_is_served_without_the_tuner(database: Path) -> None:
    with mla_jit.autotune():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if plan.choose(ONE, CPU).provenance == "default" else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert not database.exists()
        assert plan.choose(ONE, CPU).provenance == "measured"


INTERRUPTED = """
import mla_jit
from mla_jit import plan, target
from mla_jit.problem import DecodeProblem
cpu, problem = target.by_name("cpu"), DecodeProblem(**{fields!r})
try:
    with mla_jit.autotune(search="exhaustive", budget_s=600.0):
        plan.choose(problem, cpu)
except KeyboardInterrupt:
    print("interrupted", plan.on_miss, plan.choose(problem, cpu).provenance)
"""


def test_ctrl_c_keeps_what_was_measured(database: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLA_JIT_TUNING_DB": str(database)}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(fields=SLOW.fields())],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_trials(database, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
        process.communicate()
    assert (out, err) == ("interrupted None measured\n", "")
    kept = {t.config for t in ok(database)}
    assert 2 <= len(kept) < len(sweep.candidates(SLOW, CPU))
