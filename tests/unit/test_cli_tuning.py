"""`mla-tune plan` and `run`, on the CPU and on targets that are not here, and what other verbs make of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from helpers import invoke, invoke_json
from rich.console import Console

import mla_jit
from mla_jit import cli_progress, cli_tuning, models, ops, settings, target
from mla_jit.cli import main
from mla_jit.compile.artifact import Source
from mla_jit.errors import InvalidInput
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.tuning import builds, pool, rows, schedule, search, shipped, store, sweep


def small(batch: str = "1", kv_len: str = "128") -> tuple[str, ...]:
    return ("--model", "minicpm3-4b", "--tp", "8", "--dtype", "bf16", "--batch", batch, "--kv-len", kv_len)


SMALL = small()


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> Iterator[Path]:
    with settings.scope(tuning_db=tmp_path / "tuning.db", target="cpu"):
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()


# ----------------------------------------------------------------------------------------------------------------- plan

TWO = ("--model", "deepseek-v3,kimi-k2", "--dtype", "bf16", "--batch", "1,4", "--kv-len", "1024")


def test_plan_lists_each_shape_once_and_needs_no_gpu() -> None:
    found = invoke_json("plan", "--target", "sm_90", *TWO, "--tp", "8")
    shapes = [(row["problem"]["num_heads"], row["problem"]["batch"]) for row in found["shapes"]]
    assert shapes == [(16, 1), (16, 4), (8, 1), (8, 4)]
    assert all(row["candidates"] >= 300 for row in found["shapes"])
    text = invoke("plan", "--target", "sm_90", *TWO, "--tp", "8")
    assert text.startswith("4 shapes for sm_90 (NVIDIA H200)")


def test_plan_says_which_models_share_a_shape() -> None:
    arguments = ("plan", "--target", "sm_90", *TWO, "--tp", "4,8")
    found = {row["problem"]["num_heads"]: row["models"] for row in invoke_json(*arguments)["shapes"]}
    both = ["deepseek-v3 --tp 8", "kimi-k2 --tp 4"]  # 128 / 8 and 64 / 4 heads
    assert found == {32: ["deepseek-v3 --tp 4"], 16: both, 8: ["kimi-k2 --tp 8"]}
    text = invoke(*arguments)
    assert "16 heads × 512+64, bf16×bf16, page 64: deepseek-v3 --tp 8, kimi-k2 --tp 4\n" in text
    assert text.startswith("6 shapes ")


def test_plan_estimates_the_time_from_what_is_measured_and_compiled() -> None:
    shapes = ("--model", "deepseek-v3", "--tp", "8", "--dtype", "bf16", "--batch", "1,64", "--kv-len", "1024")
    arguments = ("plan", "--target", "sm_90", *shapes, "--lengths", "even,ragged")
    found = invoke_json(*arguments, "--jobs", "5")
    every: set[Source] = set()
    for row in found["shapes"]:
        problem, where = problem_of(row), target.by_name("sm_90")
        configs = sweep.candidates(problem, where)
        sources = {
            v.sources(problem, where, c)[0] for c in configs for v in ops.variants("decode") if v.name == c.variant
        }
        new = sources - every
        every |= sources
        assert (row["candidates"], row["measured"]) == (len(configs), search.measured(problem, configs))
        assert row["kernels"] == len({search._kernel(c) for c in configs}) == len(sources)
        assert row["exhaustive_s"] == pytest.approx(0.021 * len(configs) + 0.8 + 2.5 * len(new) / 5)
        few = 0.021 * row["measured"] + 0.8
        assert few <= row["auto_s"] <= few + 2.5 * len(new) / 5
        assert row["measured"] < row["candidates"]
    assert [row["problem"]["total_kv"] is None for row in found["shapes"]] == [True, True, False]
    uneven = {"decode_persistent_asm", "decode_persistent_gluon", "decode_persistent_triton"}
    assert {source.name.partition("_decode")[0] for source in new} == uneven
    for how in ("auto_s", "exhaustive_s"):
        assert found["total"][how] == pytest.approx(sum(row[how] for row in found["shapes"]))
    assert found["total"]["auto_s"] < found["total"]["exhaustive_s"]
    slow = invoke_json(*arguments, "--jobs", "1")["total"]
    assert slow["exhaustive_s"] - found["total"]["exhaustive_s"] == pytest.approx(2.5 * len(every) * (1 - 1 / 5))
    text = invoke(*arguments, "--jobs", "5")
    assert "0.021 s a measured config, 0.8 s a shape for its playoff, 2.5 s of a CPU a kernel" in text
    assert "estimated for one GPU and 5 kernels compiled at a time, from one NVIDIA H200, 2026-11-24" in text


def test_a_plan_for_the_cpu_has_no_estimate() -> None:
    found = invoke_json("plan", *SMALL)
    (row,) = found["shapes"]
    assert (found["ok"], row["kernels"], row["auto_s"], found["total"]["auto_s"]) == (True, 0, None, None)
    assert row["candidates"] == len(sweep.candidates(problem_of(row), target.by_name("cpu")))
    assert "no estimate of the time" in invoke("plan", *SMALL)


def test_a_plan_says_what_it_leaves_out() -> None:
    large = ("--model", "deepseek-v3", "--tp", "8", "--dtype", "bf16", "--batch", "1,128", "--kv-len", "65536")
    found = invoke_json("plan", *large)
    assert [row["problem"]["batch"] for row in found["shapes"]] == [1]
    (left,) = found["left_out"]
    assert (left["problem"]["batch"], left["unserved"]) == (128, False)
    assert "left out: 16 heads × 128 × 65536: its cache takes 9.0 GiB, and there is room for 2.0" in invoke(
        "plan", *large
    )
    assert len(invoke_json("plan", "--target", "sm_90", *large)["shapes"]) == 2  # what that machine has is not known
    refused = invoke_json("plan", "--target", "sm_90", *large, "--dtype", "bf16,fp32", code=1)
    assert len(refused["shapes"]) == 2
    assert {left["unserved"] for left in refused["left_out"]} == {True}
    assert "fp32 q or cache" in refused["left_out"][0]["reason"]


def problem_of(row: dict[str, Any]) -> DecodeProblem:
    return DecodeProblem(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["problem"].items()})


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "a plan.json"
    text = invoke(
        "plan", "--target", "sm_90", *TWO, "--search", "exhaustive", "--lengths", "even,ragged", "--out", file
    )
    assert f"mla-tune run --plan '{file}'" in text
    where = target.by_name("sm_90")
    wanted = [(models.by_name(name), 1) for name in ("deepseek-v3", "kimi-k2")]
    made = schedule.make(
        wanted, where, dtypes=["bf16"], batches=[1, 4], kv_lens=[1024], lengths=["even", "ragged"]
    )  # fmt: skip
    found = schedule.read(file)
    assert found.shapes == made.shapes
    assert (found.target, found.device, found.options["search"]) == ("sm_90", "NVIDIA H200", "exhaustive")
    found.check(where, file)


# ------------------------------------------------------------------------------------------------------------------ run


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


def test_a_run_by_a_plan_tunes_its_shapes_by_its_search(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    invoke("plan", *small("2", "64"), "--lengths", "even,ragged", "--search", "exhaustive", "--out", file)
    planned = schedule.read(file)
    found = invoke_json("run", "--plan", file)
    assert [problem_of(row) for row in found["shapes"]] == planned.problems
    assert [row["problem"]["total_kv"] for row in found["shapes"]] == [None]  # 64 tokens are too few for ragged ones
    assert (found["ok"], found["search"], found["interrupted"]) == (True, "exhaustive", False)
    (shape,) = found["shapes"]
    assert (shape["explored"], shape["skipped"]) == (planned.shapes[0].candidates, 0)
    again = invoke_json("run", "--plan", file, "--search", "auto")
    (before,) = again["shapes"]
    assert (again["search"], before["finished_before"]) == ("auto", True)
    assert (before["variant"], before["median_us"] > 0) == ("decode_blocked_cpu", True)
    # by its problems alone, as a script may write it
    data = json.loads(file.read_text())
    data["shapes"] = [{"problem": {"num_heads": 5, "kv_lora_rank": 256, "rope_dim": 32, "max_kv_len": 128}}]
    file.write_text(json.dumps({name: data[name] for name in ("version", "target", "device", "shapes")}))
    (shape,) = schedule.read(file).shapes
    assert (shape.problem.num_heads, shape.problem.max_kv_len, shape.models) == (5, 128, ())


def test_a_plan_for_another_device_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    invoke("plan", "--target", "sm_90", *TWO, "--tp", "8", "--out", file)
    message = invoke_json("run", "--plan", file, code=2)["message"]
    assert "was planned for NVIDIA H200 (sm_90), and this machine has CPU (cpu)" in message
    command = message.partition("plan again here: ")[2].split()
    assert command[:2] == ["mla-tune", "plan"]
    invoke(*command[1:])  # it is a command
    assert schedule.read(file).device == "CPU"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no schedule of mla_jit"), ("[]", "no schedule of mla_jit"), ("no JSON", "is Expecting value"),
        ('{"version": 2, "shapes": []}', "format 2 is unknown, this mla_jit reads 1"),
        ('{"version": 1, "target": "cpu", "device": "CPU", "shapes": [{"problem": {"hue": 1}}]}', "unexpected keyword"),
        ('{"version": 1, "target": "cpu", "device": "CPU", "shapes": [{"problem": {"num_heads": 0}}]}', "at least 1"),
        ('{"version": 1, "target": "cpu", "device": "CPU", "shapes": [], "options": {"search": "best"}}', "auto or ex"),
        (None, "cannot be read: No such file"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    told = invoke("run", "--plan", file, code=2)
    assert message in told or (text == "" and "Expecting value" in told)
    assert str(file) in told


def test_a_plan_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    assert "cannot be written: No such file" in invoke("plan", *SMALL, "--out", tmp_path / "no" / "file", code=1)


def test_a_run_leaves_out_what_does_not_fit() -> None:
    large = ("--model", "deepseek-v3", "--tp", "8", "--dtype", "bf16", "--batch", "128", "--kv-len", "65536")
    found = invoke_json("run", *large, code=1)
    assert "no shape to tune: 1 shape left out" in found["message"]
    text = invoke("run", *large, code=1)
    assert "left out: 16 heads × 128 × 65536: its cache takes 9.0 GiB" in text
    found = invoke_json("run", *small("1,32768", "256"), "--budget", "0s", code=1)
    assert [row["problem"]["batch"] for row in found["shapes"]] == [1]
    assert [row["problem"]["batch"] for row in found["left_out"]] == [32768]


def test_without_the_gpu_that_is_asked_for_nothing_is_done(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with settings.scope(target="sm_90"):
        message = invoke_json("run", *small("1", "1024"), code=2)["message"]
    assert "cuda:0 is not among the 0 devices" in message
    with store.Store(database, readonly=True) as opened:
        assert list(opened.trials()) == []


def test_gpus_of_two_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are stored for the first one's name."""
    first = target.by_name("sm_90")
    monkeypatch.setattr(target, "of_device", lambda kind, index: dataclasses.replace(first, device=f"Number {index}"))
    cli_tuning._check_kind("cuda:0", first)
    with pytest.raises(InvalidInput, match="GPU 1 is Number 1, the first one NVIDIA H200"):
        cli_tuning._check_kind("cuda:1", first)


def test_so_many_kernels_are_compiled_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Told(builds.Builds):
        def __init__(self, there: target.Target, jobs: int | None = None):
            asked.append((there.name, jobs))
            super().__init__(there, jobs)

    monkeypatch.setattr(builds, "Builds", Told)
    invoke("run", *SMALL, "--budget", "0s", "--jobs", "3", code=1)
    invoke("run", *SMALL, "--budget", "0s", code=1)
    assert asked == [("cpu", 3), ("cpu", None)]


def test_a_line_a_shape_is_said_on_stderr_and_nothing_if_quiet() -> None:
    two = ("run", *small("1", "64,128"), "--budget", "0s")
    done = CliRunner().invoke(main, two)
    first, second = done.stderr.splitlines()
    assert first.startswith("decode 5 heads/1 × 256+32, bf16×bf16, page 64, batch 1, q_len 1, kv<=64: nothing measured")
    assert "kv<=128: nothing measured (budget)" in second
    assert re.match(r"0 shapes tuned in \d+ s, 0 finished before, 2 stopped early\n", done.stdout)
    assert "the budget is spent; what was measured is kept. To go on: mla-tune" in done.stdout
    quiet = CliRunner().invoke(main, [*two, "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (1, "")
    assert quiet.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1h30m", 5400), ("1m5s", 65), ("0s", 0)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert cli_tuning._seconds(None, None, text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "nan", "1s2h", "5 minutes", "1e3"])
def test_what_is_no_time_is_refused(text: str) -> None:
    assert "is no time; write 90s, 30m or 1h30m" in " ".join(invoke("run", *SMALL, "--budget", text, code=2).split())


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_help_says_what_each_option_does_and_its_default(verb: str) -> None:
    options = main.commands[verb].params
    for option in options:
        assert isinstance(option, click.Option)
        assert option.help is not None
        assert option.help[0].isupper()
        assert option.help.endswith(".")
    without = {option.name for option in options if isinstance(option, click.Option) and not option.show_default}
    assert without == {"plan": {"model", "out", "as_json"}, "run": {"file", "model", "quiet", "as_json"}}[verb]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run",), 2, "by one of --plan FILE and --model NAME"),
        (("run", *SMALL, "--plan", "any"), 2, "by one of --plan FILE and --model NAME"),
        (("run", "--plan", "any", "--tp", "1", "--kv-len", "64"), 2, "leave out --tp, --kv-len"),
        (("run", *SMALL, "--gpus", ""), 2, "--gpus is empty"),
        (("run", *SMALL, "--gpus", "-1"), 2, "-1 is no index of a GPU"),
        (("run", *SMALL, "--lengths", "long"), 2, "use even, ragged, log-uniform, uniform, one-long"),
        (("plan", *SMALL, "--lengths", "long"), 2, "use even, ragged, log-uniform, uniform, one-long"),
        (("plan",), 2, "Missing option '--model'"),
        (("plan", *SMALL, "--full"), 2, "--full: says nothing of decode; leave it out"),
        (("run", "--op", "prefill", *SMALL, "--page-size", "64"), 2, "--page-size: says nothing of prefill"),
        (("plan", "--op", "prefill", *SMALL, "--lengths", "even"), 2, "--lengths: says nothing of prefill"),
        (("run", "--plan", "any", "--op", "prefill", "--full"), 2, "leave out --op, --full"),
        (("plan", "--op", "merge", *SMALL), 2, "'merge' is not one of 'decode', 'prefill'"),
        (("run", "--op", "prefill", *SMALL, "--q-len", "256"), 1, "there is no shape to tune"),
        (("plan", "--model", "gpt-2"), 2, "no model 'gpt-2'"),
        (("plan", "--model", "deepseek-v3", "--tp", "3"), 2, "cannot share equally"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said(arguments: tuple[str, ...], code: int, message: str) -> None:
    assert message in invoke(*arguments, code=code)


# -------------------------------------------------------------------------------------------------------------- prompts

PROMPTS = ("--op", "prefill", *small("1,2", "32,64"))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers: on a busy machine several wait for each other at every small product."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def prompt_of(row: dict[str, Any]) -> PrefillProblem:
    return PrefillProblem(**{k: tuple(v) if isinstance(v, list) else v for k, v in row["problem"].items()})


def test_prompts_are_planned(tmp_path: Path) -> None:
    common = ("--op", "prefill", "--model", "deepseek-v3", "--tp", "8", "--target", "sm_90", "--batch", "1,4")
    found = [prompt_of(row) for row in invoke_json("plan", *common, "--dtype", "bf16,fp8")["shapes"]]
    assert len(found) == 2 * 2 * 3  # whole prompts, where nothing else is said
    assert {(p.q_len, p.total_q, p.max_kv_len, p.total_kv) for p in found if p.batch == 4} == {
        (n, 4 * n, n, 4 * n) for n in (1024, 4096, 16384)
    }
    assert {p.kv_dtype for p in found} == {"bf16", "fp8_e4m3"}
    assert {(p.causal, p.hinted, p.num_heads, p.num_kv_heads, p.qk_dim, p.v_dim) for p in found} == {
        (True, True, 16, 16, 192, 128)
    }
    chunks = (*common, "--dtype", "bf16", "--q-len", "512,2048", "--kv-len", "1000,8192")
    sizes = [(p.q_len, p.max_kv_len) for p in map(prompt_of, invoke_json("plan", *chunks)["shapes"]) if p.batch == 1]
    assert sizes == [(512, 1024), (512, 8192), (2048, 8192)]  # none longer than its keys
    file = tmp_path / "plan.json"
    text = invoke("plan", *chunks, "--full", "--search", "exhaustive", "--out", file)
    assert "prompts, 16 heads × 192/128, bf16×bf16, full: deepseek-v3 --tp 8\n" in text
    planned = schedule.read(file)
    full: list[Any] = [p for p in planned.problems if p.batch == 1]
    assert [(p.q_len, p.max_kv_len, p.causal) for p in full] == [
        (512, 1024, False), (2048, 1024, False), (512, 8192, False), (2048, 8192, False),
    ]  # fmt: skip
    for shape in planned.shapes:
        configs = sweep.candidates(shape.problem, target.by_name("sm_90"))
        assert (shape.candidates, shape.kernels) == (len(configs), len({search._kernel(c) for c in configs}))
    message = invoke("run", "--plan", file, code=2)
    again = message.partition("plan again here: ")[2].split()
    assert [word for word in again if word.startswith("--")] == [
        "--op", "--model", "--tp", "--dtype", "--batch", "--kv-len", "--q-len", "--full", "--search", "--out",
    ]  # fmt: skip


def test_a_plan_counts_the_kernels_of_prompts_and_the_time_of_long_calls() -> None:
    common = ("plan", "--op", "prefill", "--model", "deepseek-v3", "--target", "sm_90", "--dtype", "bf16")
    sizes = ("--batch", "1", "--kv-len", "1024,65536", "--jobs", "1")
    short, long = invoke_json(*common, *sizes)["shapes"]
    where, rows_ = target.by_name("sm_90"), {v.name: v for v in ops.variants("prefill")}
    configs = sweep.candidates(prompt_of(short), where)
    sources = {rows_[c.variant].sources(prompt_of(short), where, c)[0] for c in configs}
    assert short["kernels"] == len(sources)
    assert short["exhaustive_s"] == pytest.approx(0.021 * len(configs) + 0.8 + 2.5 * len(sources))
    # 128 heads × 65536² ÷ 2 pairs are more than 0.17 s at Hopper's rate, beside which the window is nothing
    assert long["exhaustive_s"] > 3 * 0.17 * long["candidates"]


@pytest.mark.usefixtures("one_thread")
def test_a_run_of_prompts_from_the_first_to_the_last_verb(database: Path, tmp_path: Path) -> None:
    first = invoke_json("run", *PROMPTS, "--budget", "120s")
    assert (first["ok"], first["left_out"]) == (True, [])
    assert {row["variant"] for row in first["shapes"]} == {"prefill_blocked_cpu"}
    assert sorted({(p.batch, p.q_len, p.max_kv_len) for p in map(prompt_of, first["shapes"])}) == [
        (1, 32, 32), (1, 64, 64), (2, 32, 32), (2, 64, 64),
    ]  # fmt: skip
    for row in first["shapes"]:
        assert (row["faults"], row["stopped"], row["median_us"] > 0) == ([], "done", True)
    again = invoke_json("run", *PROMPTS)
    assert [row["finished_before"] for row in again["shapes"]] == [True] * 4
    more = invoke_json("run", "--op", "prefill", *small("1", "32,64"), "--q-len", "32", "--full")
    assert [(row["finished_before"], prompt_of(row).causal) for row in more["shapes"]] == [(False, False)] * 2

    shown = invoke_json("show")
    assert {row["problem"]["op"] for row in shown["best"]} == {"prefill"}
    assert len(shown["best"]) == 6
    assert "prefill 5 heads/5 × 96/64, bf16×bf16, causal, batch 2, q_len<=64 of 128" in invoke("show")

    asked = ("--prefill", "--model", "minicpm3-4b", "--tp", "8", "--batch", "2", "--q-len", "64", "--max-kv-len", "64")
    told = invoke_json("explain", *asked)
    best = next(row for row in shown["best"] if prompt_of(row) == prompt_of({"problem": told["problem"]}))
    assert (told["provenance"], told["config"]) == ("measured", best["config"])
    assert (told["tuned"]["taken"]["median_us"], told["tuned"]["differences"]) == (best["median_us"], [])
    assert told["tuned"]["default"]["median_us"] > 0
    between = [word if word != "64" else "50" for word in asked]
    assert invoke_json("explain", *between)["provenance"] == "neighbour"
    assert invoke_json("explain", *between, "--dtype", "fp16")["provenance"] == "default"

    (path,) = map(Path, invoke_json("export", tmp_path / "out")["files"])
    assert path == tmp_path / "out" / "cpu" / "prefill.jsonl"
    assert shipped.check(path) == []
    other = tmp_path / "other.db"
    count = len(path.read_text().splitlines())
    assert invoke_json("import", "--db", other, path)["added"] == count >= 6
    assert invoke_json("merge", "--db", other, database)["added"] == shown["trials"]
    assert invoke_json("compare", database, path)["geometric_mean"] == 1.0
    assert invoke_json("diff", database, path, code=1)["changed_best"] == []

    with settings.scope(tuning_db=tmp_path / "none.db"):  # of an import, as of a measurement of its own
        mla_jit.reload()
        assert invoke_json("explain", *asked)["provenance"] == "default"
        invoke("import", "--db", tmp_path / "none.db", path)
        mla_jit.reload()
        assert invoke_json("explain", *asked)["provenance"] == "imported"
    verified = invoke_json("verify", "--limit", "2", "--tolerance", "100000%")  # that they run, and are right
    assert [row["ok"] for row in verified["rows"]] == [True, True]
    assert {prompt_of(row).op for row in verified["rows"]} == {"prefill"}
    assert invoke_json("report", "--html", tmp_path / "page.html")["shapes"] == 6


@pytest.mark.usefixtures("one_thread")
def test_a_call_is_served_with_what_a_run_found(database: Path) -> None:
    invoke("run", "--op", "prefill", *small("2", "64"), "--budget", "120s")
    (row,) = invoke_json("show")["best"]
    q, k = (torch.randn(128, 5, 96).bfloat16() for _ in range(2))
    indptr = torch.tensor([0, 64, 128], dtype=torch.int32)
    mla_jit.reload()
    for told in ({}, {"max_kv_len": 64}):
        mla_jit.prefill(
            q, k, k[..., :64].contiguous(), qo_indptr=indptr, kv_indptr=indptr, max_q_len=64, sm_scale=0.1, **told
        )
        dispatch = mla_jit.last_dispatch()
        assert dispatch is not None
        assert (dispatch.provenance, dict(dispatch.config)) == ("measured", row["config"]), dispatch.why


@pytest.mark.usefixtures("one_thread")
def test_a_stopped_run_of_prompts_goes_on(database: Path) -> None:
    file = database.with_name("plan.json")
    invoke("plan", "--op", "prefill", *small("1", "32,64"), "--search", "exhaustive", "--out", file)
    assert invoke_json("run", "--plan", file, "--budget", "0s", code=1)["shapes"][0]["stopped"] == "budget"
    found = invoke_json("run", "--plan", file, "--budget", "120s")
    assert (found["ok"], found["search"]) == (True, "exhaustive")
    assert [prompt_of(row) for row in found["shapes"]] == schedule.read(file).problems
    trials = trials_of(database)
    assert len({(trial.problem, trial.config, trial.effort) for trial in trials}) == len(trials)


def test_prompts_that_do_not_fit_are_left_out() -> None:
    large = ("--op", "prefill", "--model", "deepseek-v3", "--dtype", "bf16", "--batch", "1", "--kv-len", "512,131072")
    found = invoke_json("plan", *large)
    assert [prompt_of(row).q_len for row in found["shapes"]] == [512]
    text = invoke("plan", *large)
    assert "left out: prompt 128 heads × 1 × 131072: its prompt takes 20.0 GiB, and there is room for 2.0" in text


# ---------------------------------------------------------------------------------------------- processes of their own

# As a shell that has started it in the background does not: with Ctrl-C.
CODE = """
import atexit, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
heavy = ("torch", "triton", "numpy")
if report := sys.argv.pop(1):
    loaded = lambda: open(report, "w").write(" ".join(sorted({m.split(".")[0] for m in sys.modules} & set(heavy))))
    atexit.register(loaded)
from mla_jit.cli import main
main()
"""
SHORT = ("run", *small("1", "128,64"))
LONG = ("run", *small("1,2", "64,128"))


def start(database: Path, *arguments: object, report: Path | str = "", **more: Any) -> subprocess.Popen[bytes]:
    """`mla-tune` with these arguments, on the CPU."""
    env = {**os.environ, "MLA_JIT_TARGET": "cpu", "MLA_JIT_TUNING_DB": str(database), "TERM": "xterm"}
    env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}  # the terminal says it
    paths = [str(Path(mla_jit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", CODE, report, *arguments]
    return subprocess.Popen(
        [str(word) for word in command], env={**env, "PYTHONPATH": os.pathsep.join(paths)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
    )  # fmt: skip


def finish(process: subprocess.Popen[bytes], timeout_s: float = 120.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out.decode(), (err or b"").decode()


def trials_of(database: Path) -> list[rows.Trial]:
    with store.Store(database, readonly=True) as opened:
        return list(opened.trials())


def workers_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(database: Path) -> None:
    process = start(database, *SHORT, "--no-resume")
    wait_for(lambda: database.exists() and workers_of(process.pid))
    wait_for(lambda: len(trials_of(database)) >= 3)
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process, 30.0)
    assert code == 1
    assert "stopping after the running measurements, which are kept" in err
    assert "(interrupted: best so far)" in err
    assert "0 shapes tuned" in out
    assert "1 stopped early, 1 not reached" in out
    command = out.partition("interrupted; what was measured is kept. To go on: ")[2].split()
    assert command == ["mla-tune", *SHORT]  # without --no-resume, which would begin again
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    before = trials_of(database)
    assert len(before) >= 3

    process = start(database, *command[1:], "--json")
    code, out, err = finish(process)
    found = json.loads(out)
    assert (code, found["ok"], err) == (0, True, "")
    kept = [trial for trial in trials_of(database) if trial.problem == before[0].problem]
    assert kept[: len(before)] == before
    assert len({(trial.config, trial.effort) for trial in kept}) == len(kept)  # nothing was measured twice


def test_a_second_ctrl_c_ends_at_once(database: Path) -> None:
    process = start(database, *LONG)
    wait_for(lambda: workers_of(process.pid))  # a worker needs seconds until it can measure
    time.sleep(0.7)  # by then the sweep waits for it
    workers = workers_of(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"Ctrl-C again does not wait for them" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process, 30.0)
    assert time.monotonic() - began < 5.0
    assert code == 130
    assert "To go on: mla-tune run" in out
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_finished_run_again_loads_nothing_heavy(database: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert finish(start(database, "plan", *SMALL, "--out", file))[0] == 0
    first = start(database, "run", "--plan", file, report=tmp_path / "first")
    assert finish(first)[0] == 0
    for arguments in (SMALL, ("--plan", file)):
        code, out, _ = finish(start(database, "run", *arguments, report=tmp_path / "again"))
        assert code == 0
        assert re.match(r"0 shapes tuned in \d+ s, 1 finished before\n", out)
        assert (tmp_path / "again").read_text() == ""


def test_progress_on_a_terminal(database: Path) -> None:
    """A bar over the shapes with what is left, and one for the shape in work: how many configs, best, default."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    process = start(database, "run", *small("1,2"), "--json", stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: it has ended
        while data := os.read(ours, 1 << 16):
            seen += data
    os.close(ours)
    code, out, _ = finish(process)
    assert (code, json.loads(out)["ok"]) == (0, True)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    lines = [" ".join(re.sub("[━╸╺]", "", line).split()) for line in re.split(r"[\r\n]+", text)]
    for wanted in (
        r"shapes 0/2 \d:\d\d:\d\d", r"shapes 1/2 \d:\d\d:\d\d, about \d:\d\d:\d\d left",
        r"cpu \d+/\d\d 5 heads × 1 × 128 best \d+\.\d us, default \d+\.\d.*", r"cpu \d+/\d\d 5 heads × 2 × 128.*",
        r"decode 5 heads/1 .* kv<=128: \d+\.\d us, default .*",
    ):  # fmt: skip
        assert any(re.fullmatch(wanted, line) for line in lines), (
            wanted,
            sorted({x for x in lines if x.startswith(("shapes", "cpu"))}),
        )


# ------------------------------------------------------------------------------------------------------------ the watch


def measured(median_us: float) -> rows.Measurement:
    return rows.Measurement("ok", median_us, 0.1)


def test_the_watch_knows_what_is_done_and_what_is_left() -> None:
    where, clock = target.by_name("cpu"), [100.0]
    shapes = [
        DecodeProblem(num_heads=4, batch=n, max_kv_len=256, total_kv=300 if n == 3 else None) for n in (1, 2, 3, 4)
    ]
    watch = cli_progress.Watch(4, ["null:0", "null:1"], where, 60.0, lambda: clock[0])
    default, *others = sweep.candidates(shapes[0], where)

    def event(name: str, n: int, **more: object) -> None:
        watch.on_event(name, {"device": f"null:{n}", "problem": shapes[n], **more})

    def shown() -> list[str]:
        console = Console(file=io.StringIO(), width=120)
        console.print(watch)
        assert isinstance(console.file, io.StringIO)
        return [" ".join(re.sub("[━╸╺]", "", line).split()) for line in console.file.getvalue().splitlines()]

    assert shown() == ["shapes 0/4 0:00:00"]
    assert watch.left_s() is None
    event("start", 0, candidates=9, planned=20)
    event("start", 1, candidates=9, planned=20)
    event("trial", 0, config=others[0], effort=0, measurement=rows.Measurement("wrong", note="rel L2 0.5"))
    for i, config in enumerate(others[:3]):
        event("trial", 0, config=config, effort=0, measurement=measured(30.2 + i))
    event("trial", 0, config=default, effort=0, measurement=measured(33.1))
    event("pass", 0, config=default, effort=2, measurement=measured(33.0))
    event("trial", 0, config=default, effort=2, measurement=measured(33.0))  # of the passes: no measurement of its own
    clock[0] += 3.0
    assert shown()[1:] == [
        "null:0 6/20 4 heads × 1 × 256 best 30.2 us, default 33.0, 1 faulty", "null:1 0/20 4 heads × 2 × 256",
    ]  # fmt: skip
    assert watch.left_s() == pytest.approx((6 / 0.3) * (4 - 0.3) / 2)  # both devices' 3 s for 0.3 shapes
    watch.finished(sweep.Finished(shapes[3], "null:1", None, 0.0))  # finished before: says nothing of what is to come
    assert watch.left_s() == pytest.approx((6 / 0.3) * (3 - 0.3) / 2)
    outcome = search.Outcome(default, 33.0, 0.1, 33.0, None, (), (), 6, 3, 3.0, "done", "")
    event("done", 0, outcome=outcome)
    watch.finished(sweep.Finished(shapes[0], "null:0", outcome, 4.0))
    assert watch.left_s() == pytest.approx(4.0 * 2 / 2)
    assert shown()[0] == "shapes 2/4 0:00:03, about 0:00:04 left"
    clock[0] += 56.0
    assert watch.left_s() == pytest.approx(1.0)  # the budget ends it
    event("trial", 0, config=others[1], effort=2, measurement=measured(31.0))  # the best of another length
    assert shown()[1].startswith("null:0 1 4 heads × 1 × 256, the best of other lengths best 31.0 us")
    watch.on_event("start", {"device": "null:0", "problem": shapes[2], "candidates": 9, "planned": 20})
    assert "4 heads × 3 × 256, log-uniform" in shown()[1]
