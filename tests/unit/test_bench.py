"""`mla-tune bench` without a GPU: what it asks for, what it makes of the times, and the processes it starts."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import mla_jit
from mla_jit import api, cli, launch
from mla_jit.compile import cache
from mla_jit.errors import MlaJitError
from mla_jit.tuning import bench, overhead

pytestmark = pytest.mark.usefixtures("cache_dir")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, ["bench", *arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result.stdout if code == 0 else result.stderr


def run_json(*arguments: str):
    result = CliRunner().invoke(cli.main, ["bench", *arguments, "--json"])
    data = json.loads(result.stdout)
    assert data["ok"] == (result.exit_code == 0)
    return data


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def timer(monkeypatch):
    """A GPU that times as it is told: `us(name, shape, seed)`. `asked` lists the calls of decode: shape, hint."""
    made = SimpleNamespace(asked=[], us=lambda name, shape, seed: 100.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")

    def decode(q, cache, *, max_kv_len, **keywords):
        assert set(keywords) == {"kv_lora_rank", "sm_scale", "block_table", "seq_lens"}
        made.asked[-1] += (max_kv_len,)
        return q

    def fake(shape, runners, *, rounds, seed):
        empty = torch.empty(0)
        times = {}
        for name, runner in runners.items():
            made.asked.append((name, str(shape)))
            runner(bench.Set(empty, empty, empty, empty, 0.1, max(shape.lens)))
            times[name] = made.us(name, shape, seed)
        return bench.Result(shape, times, 0.0, 1e-3 * (seed + 1), bench.roof_us(shape, 4500.0, 762.0))

    monkeypatch.setattr(api, "decode", decode)
    monkeypatch.setattr(bench, "bench", fake)
    return made


def test_two_query_tokens_are_another_grid():
    peers = bench.peers_grid()
    assert len(peers) == 57
    assert {shape.q_len for shape, _ in peers} == {1}
    assert len({str(shape) for shape, _ in peers}) == 57
    assert [(str(shape), shape.lens, shape.q_len, recorded) for shape, recorded in bench.peers_grid(2)] == [
        ("4096 × 128 heads × 64 × q2", (4096,) * 64, 2, {"flashmla": 240.7, "fi_fa3": 246.4}),
        ("4096 × 128 heads × 128 × q2", (4096,) * 128, 2, {"flashmla": 498.2, "fi_fa3": 523.9}),
    ]


@pytest.mark.parametrize("page_size", [16, 64])
def test_sets_are_paged_as_the_shape_says(page_size):
    shape = bench.Shape(4, (100, 7), q_len=2, page_size=page_size, dtype="fp32")
    sets = bench.make_sets(shape, capacity=1024, device="cpu", c=32, r=16, rotate_bytes=0)
    assert len(sets) == 2
    assert len(bench.make_sets(shape, capacity=1024, device="cpu", c=32, r=16, rotate_bytes=1 << 17)) > 2
    used = [-(-n // page_size) for n in shape.lens]
    pages = [int(page) for s in sets for row, n in zip(s.table, used, strict=True) for page in row[:n]]
    assert sorted(pages) == list(range(sum(used) * 2))  # no page in two sets
    for s in sets:
        assert s.q.shape == (2, 2, 4, 48)
        assert s.table.shape == (2, 1024 // page_size)
        assert set(s.table[0, used[0] :].tolist()) == {2**30}
        assert s.keywords["seq_lens"].tolist() == [100, 7]


# --------------------------------------------------------------------------------------------------------------- graphs


def test_the_peers_grid(timer):
    timer.us = lambda name, shape, seed: {0: 30.0, 1: 10.0, 2: 20.0}[seed]
    data = run_json()
    assert (data["device"], data["torch"], data["grid"], data["runs"]) == ("a GPU", torch.__version__, "peers", 3)
    assert len(data["rows"]) == 57
    row = data["rows"][0]
    assert set(row) == {
        "shape", "ours_us", "low_us", "high_us", "timed_us", "recorded_us", "roof_us", "error", "best_us", "score",
    }  # fmt: skip
    assert (row["ours_us"], row["low_us"], row["high_us"], row["error"]) == (20.0, 10.0, 30.0, 3e-3)
    assert (row["best_us"], row["score"], row["timed_us"]) == (8.2, 8.2 / 20, {})
    best = [min(recorded.values()) for _, recorded in bench.peers_grid()]
    assert data["geometric_mean"] == pytest.approx(math.exp(statistics.mean(math.log(us / 20) for us in best)))
    assert {hint for _, _, hint in timer.asked} == {None}


def test_two_query_tokens_beside_a_peer(timer, monkeypatch):
    monkeypatch.setitem(bench.PEERS, "flash_mla", lambda: lambda s: s.q)
    timer.us = lambda name, shape, seed: {"mla_jit": 250.0, "flash_mla": 248.0}[name] * shape.batch / 64
    data = run_json("--grid", "q2", "--against", "flash_mla", "--runs", "1", "--capacity-hint")
    assert [row["timed_us"] for row in data["rows"]] == [{"flash_mla": 248.0}, {"flash_mla": 496.0}]
    assert [row["best_us"] for row in data["rows"]] == [246.4, 496.0]  # today's FlashMLA stands for the recorded one
    assert data["geometric_mean"] == pytest.approx(math.sqrt(246.4 / 250 * 496 / 500))
    assert [hint for name, _, *hint in timer.asked if name == "mla_jit"] == [[4096], [4096]]
    lines = run("--grid", "q2", "--against", "flash_mla", "--runs", "1").splitlines()
    assert lines[0] == f"a GPU, torch {torch.__version__}, 1 runs, q2 grid"
    roof = f"{data['rows'][0]['roof_us']:.1f}"
    assert " ".join(lines[2].split()) == (
        f"4096 × 128 heads × 64 × q2 250.0 250.0 250.0 246.4 0.99 {roof} 1.0e-03 flash_mla 248.0"
    )
    assert lines[1].index("score") + len("score") == lines[2].index("0.99") + len("0.99")  # columns are columns
    assert lines[-1] == f"geometric mean of best peer / ours over 2 shapes: {data['geometric_mean']:.3f}"


def test_a_capture_at_capacity_against_the_exact_hint(timer):
    def us(name, shape, seed):
        return (10.0 + seed) * ((1.02, 1.06, 1.01)[seed] if name == "mla_jit" and shape.batch == 64 else 1.0)

    timer.us = us
    data = run_json("--grid", "capture")
    assert len(data["rows"]) == len(bench.CAPTURED) == 11
    row = next(row for row in data["rows"] if row["shape"] == "4096 × 128 heads × 64")
    assert row == pytest.approx({
        "shape": "4096 × 128 heads × 64", "capacity_us": 11.66, "hint_us": 11.0, "ratio": 1.02, "low": 1.01,
        "high": 1.06, "error": 3e-3,
    })  # fmt: skip
    assert data["worst_ratio"] == pytest.approx(1.02)
    hints = {(name, shape): hint for name, shape, hint in timer.asked}
    assert hints["mla_jit", "16384 × 16 heads × 1"] is None
    assert hints["hint", "16384 × 16 heads × 1"] == 16384
    assert run("--grid", "capture").splitlines()[-1] == "worst ratio over 11 shapes: 1.020"


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("grid", ["peers", "q2", "capture", "first-call"])
def test_without_a_gpu_there_is_one_error(grid, monkeypatch):
    monkeypatch.setattr(overhead, "_in_child", None)
    said = run("--grid", grid, code=1)
    assert said.startswith(f"MlaJitError: the grid {grid} needs a GPU")
    assert len(said.splitlines()) == 1
    assert "needs a GPU" in run_json("--grid", grid)["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "all"], "first-call"), (["--runs", "0"], "x>=1"), (["--against", "cutlass"], "there is flash_mla"),
        (["--grid", "capture", "--against", "flash_mla"], "not for capture"),
        (["--grid", "host", "--capacity-hint"], "not for host"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, said):
    assert said in run(*arguments, code=2)


@pytest.mark.usefixtures("timer")
def test_a_peer_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", None)
    assert "flash_mla cannot be timed" in run("--grid", "q2", "--against", "flash_mla", code=1)


# ---------------------------------------------------------------------------------------------------------- warm calls


@pytest.mark.usefixtures("no_gpu")
def test_host_time_on_the_null_runtime():
    data = run_json("--grid", "host", "--runs", "2")
    assert data["device"] == "no GPU, null runtime"
    assert [(row["case"], row["kernels"]) for row in data["rows"]] == [
        ("16 heads, kv 64, max_kv_len=64", 1), ("16 heads, kv 128, num_kv_splits=1", 1), ("16 heads, kv 128", 2),
        ("128 heads, kv 128", 2),
    ]  # fmt: skip
    for row in data["rows"]:
        assert 0 < row["min_us"] <= row["low_us"] <= row["median_us"] <= row["high_us"] < 1e4
    # Nothing of it stays: the same call here is computed again.
    assert launch._override is None
    call = overhead._call(16, 128, "cpu")
    assert call().isfinite().all()
    assert mla_jit.last_dispatch().target == "cpu"


def test_what_is_made_of_host_times(monkeypatch):
    calls = []
    times = iter([9.0, 5.0, 7.0, 11.0, 12.0, 10.0, 1.0, 8.0, 8.0])  # medians 7, 11, 8
    monkeypatch.setattr(overhead, "HOST_CASES", ((16, 128, {"num_kv_splits": 1}),))
    monkeypatch.setattr(overhead, "_call", lambda *a, **hints: lambda: calls.append((*a, hints)))
    monkeypatch.setattr(overhead, "_served", lambda: SimpleNamespace(kernels=("one",)))
    monkeypatch.setattr(overhead, "_host_us", lambda call, calls, device: next(times))
    (row,) = overhead.host_rows(runs=3, rounds=3)
    assert row == overhead.HostRow("16 heads, kv 128, num_kv_splits=1", 1, 8.0, 7.0, 11.0, 1.0)
    assert [(heads, kv_len, seed, hints) for heads, kv_len, _, seed, hints in calls] == [
        (16, 128, seed, {"num_kv_splits": 1}) for seed in range(3)
    ]  # one call each to warm up


# --------------------------------------------------------------------------------------------------------- first calls


def test_first_calls_in_processes_of_their_own(monkeypatch, tmp_path):
    """Really started. Neither the user's cache nor the user's mode reaches them."""
    monkeypatch.setenv("MLA_JIT_MODE", "strict")
    monkeypatch.setenv("MLA_JIT_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setattr(overhead, "FIRST_HEADS", ((16,),))
    empty, filled = overhead.first_rows(runs=1)
    assert (empty.cache, empty.call, empty.heads, empty.origins) == ("empty", "first", 16, ("compiled", "compiled"))
    assert (filled.cache, filled.call, filled.heads, filled.origins) == ("filled", "first", 16, ("disk", "disk"))
    assert empty.variant == filled.variant == "decode_splitk_triton"
    assert 0 < empty.compile_s * 1e3 <= empty.median_ms
    assert filled.compile_s == 0
    assert 0 < filled.median_ms < empty.median_ms
    assert not (tmp_path / "mine").exists()
    assert cache.entries() == []


def test_a_process_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("MLA_JIT_NONSENSE", "1")
    with pytest.raises(MlaJitError, match="status 1: SettingsError: MLA_JIT_NONSENSE is no setting"):
        overhead._in_child(str(tmp_path), [16])
    monkeypatch.setattr(overhead, "CHILD_TIMEOUT_S", 0.01)
    with pytest.raises(MlaJitError, match=r"did not end in 0\.01 s"):
        overhead._in_child(str(tmp_path), [16])


@pytest.mark.usefixtures("no_gpu")
def test_the_childs_side(monkeypatch, capsys, tmp_path):
    """What it prints, and that it imports Triton ahead of the clock only where it will compile."""
    imported = []
    monkeypatch.setattr(overhead, "importlib", SimpleNamespace(import_module=imported.append))
    monkeypatch.setattr(overhead, "_call", lambda heads, *_: lambda: None)
    served = SimpleNamespace(variant="v", origins=("compiled", "memory"), compile_s=1.5)
    monkeypatch.setattr(overhead, "_served", lambda: served)
    overhead.main([str(tmp_path), "16", "128"])
    answer = json.loads(capsys.readouterr().out)
    assert [row.pop("ms") >= 0 for row in answer] == [True, True]
    assert answer == [
        {"heads": n, "variant": "v", "origins": ["compiled", "memory"], "compile_s": 1.5} for n in (16, 128)
    ]
    assert "triton" in imported
    imported.clear()
    (tmp_path / "entry").touch()
    overhead.main([str(tmp_path), "16"])
    assert imported == ["cuda.bindings.driver"]


@pytest.fixture
def children(timer, monkeypatch):
    """Processes that answer at once. `started` lists (directory, heads); the first in a directory finds it empty."""
    made = SimpleNamespace(started=[], origin={"empty": "compiled", "filled": "disk"})

    def child(directory, heads):
        state = "filled" if directory in [d for d, _ in made.started] else "empty"
        made.started.append((directory, heads))
        assert Path(directory).stat().st_mode & 0o077 == 0
        ms = {"empty": 3000.0, "filled": 60.0}[state] + len(made.started)
        kernels = (made.origin[state],)
        return [overhead.First(n, ms + n, "v", kernels + ("memory",) * (n != heads[0]), 1.5) for n in heads]

    monkeypatch.setattr(overhead, "_in_child", child)
    return made


def test_the_first_call_grid(children):
    data = run_json("--grid", "first-call", "--runs", "3")
    assert [(row["cache"], row["call"], row["heads"]) for row in data["rows"]] == [
        ("empty", "first", 16), ("empty", "next", 128), ("filled", "first", 16), ("filled", "next", 128),
        ("empty", "first", 128), ("empty", "next", 16), ("filled", "first", 128), ("filled", "next", 16),
    ]  # fmt: skip
    assert data["rows"][0] == {
        "cache": "empty", "call": "first", "heads": 16, "median_ms": 3019.0, "min_ms": 3017.0, "max_ms": 3021.0,
        "compile_s": 1.5, "variant": "v", "origins": ["compiled"],
    }  # fmt: skip
    assert data["rows"][3]["origins"] == ["disk", "memory"]
    directories = [directory for directory, _ in children.started]
    assert len(directories) == 12
    assert directories[::2] == directories[1::2]  # one that fills and one that finds
    assert len(set(directories)) == 6
    assert not any(Path(directory).exists() for directory in directories)
    line = run("--grid", "first-call", "--runs", "1").splitlines()[5]
    assert line.split()[:4] == ["filled", "next", "128", "202.0"]
    assert line.endswith("disk, memory")


def test_a_first_call_that_was_none(children):
    children.origin["filled"] = "compiled"
    assert "was to have its kernels disk, with the cache filled; they were compiled" in run(
        "--grid", "first-call", code=1
    )
    assert run_json("--grid", "first-call")["error"] == "MlaJitError"
