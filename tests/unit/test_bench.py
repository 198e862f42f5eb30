"""`mla-tune bench` without a GPU: what it asks for, what it makes of the times, and the processes it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import mla_jit
from mla_jit import api, api_metadata, cli, compat, launch, plan, resources, settings, target
from mla_jit.compile import cache
from mla_jit.errors import MlaJitError, SettingsError
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import bench, grids, overhead, peers, proofs, shipped, store, sweep
from mla_jit.tuning.rows import Trial

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
    """A GPU that times as it is told: `us(name, shape, seed)`. `asked` lists calls: runner, shape, decode's hint."""
    made = SimpleNamespace(asked=[], planned=0, apart=set(), us=lambda name, shape, seed: 100.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")

    def decode(q, cache, *, max_kv_len=None, scheduler=None, **keywords):
        if "qo_indptr" in keywords:  # as a padded graph has it: no query token where there are no keys
            tokens, lens = keywords.pop("qo_indptr"), keywords["seq_lens"]
            assert torch.equal(tokens.diff(), lens.clamp(max=1))
            assert (len(q), keywords.pop("max_q_len")) == (tokens[-1], 1)
        if "metadata" in keywords:
            assert keywords.pop("metadata") == f"a list of {len(keywords['seq_lens'])}"
            made.planned += 1
        assert set(keywords) == {"kv_lora_rank", "sm_scale", "block_table", "seq_lens"}
        made.asked[-1] += (max_kv_len,) if scheduler is None else (max_kv_len, scheduler)
        return q

    def fake(shape, runners, *, rounds, seed, apart):
        made.apart.add(apart)
        empty = torch.empty(0)
        q, lens = torch.empty(shape.batch, 1, 1, 1), torch.tensor(shape.lens, dtype=torch.int32)
        one = bench.Set(q, empty, empty, lens, 0.1, max(shape.lens))
        times = {}
        for name, runner in runners.items():
            with runner.scope():
                if (call := runner.prepare([one])) is not None:
                    made.asked.append((name, str(shape)))
                    call(one)
                    times[name] = made.us(name, shape, seed)
        return bench.Result(shape, times, 0.0, 1e-3 * (seed + 1), bench.roof_us(shape, 4500.0, 762.0))

    monkeypatch.setattr(api, "decode", decode)
    monkeypatch.setattr(
        api_metadata, "decode_metadata", lambda q, cache, **keywords: f"a list of {len(keywords['seq_lens'])}"
    )
    monkeypatch.setattr(bench, "bench", fake)
    return made


def test_two_query_tokens_are_another_grid():
    grid = grids.peers_grid()
    assert len(grid) == 57
    assert {shape.q_len for shape, _ in grid} == {1}
    assert len({str(shape) for shape, _ in grid}) == 57
    assert [(str(shape), shape.lens, shape.q_len, recorded) for shape, recorded in grids.peers_grid(2)] == [
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


def test_figures_of_another_gpu_are_no_peers(timer, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = run_json("--grid", "q2", "--runs", 1)["rows"]
    assert [row["recorded_us"] for row in rows] == [{}] * len(rows)
    assert [row["score"] for row in rows] == [None] * len(rows)


def test_the_peers_grid(timer):
    timer.us = lambda name, shape, seed: {0: 30.0, 1: 10.0, 2: 20.0}[seed]
    data = run_json()
    assert (data["device"], data["torch"], data["grid"], data["runs"]) == ("NVIDIA H200", torch.__version__, "peers", 3)
    assert len(data["rows"]) == 57
    row = data["rows"][0]
    assert set(row) == {
        "shape", "ours_us", "low_us", "high_us", "spread_us", "timed_us", "recorded_us", "roof_us", "error", "best_us",
        "score",
    }  # fmt: skip
    assert (row["ours_us"], row["low_us"], row["high_us"], row["error"]) == (20.0, 10.0, 30.0, 3e-3)
    assert (row["best_us"], row["score"], row["timed_us"]) == (8.2, 8.2 / 20, {})
    best = [min(recorded.values()) for _, recorded in grids.peers_grid()]
    assert data["geometric_mean"] == pytest.approx(math.exp(statistics.mean(math.log(us / 20) for us in best)))
    assert {hint for _, _, hint in timer.asked} == {None}


def test_two_query_tokens_beside_a_peer(timer, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "flash_mla", lambda: bench.Runner(lambda sets: lambda s: s.q))
    timer.us = lambda name, shape, seed: {"mla_jit": 250.0, "flash_mla": 248.0}[name] * shape.batch / 64
    data = run_json("--grid", "q2", "--against", "flash_mla", "--runs", "1", "--capacity-hint")
    assert [row["timed_us"] for row in data["rows"]] == [{"flash_mla": 248.0}, {"flash_mla": 496.0}]
    assert [row["best_us"] for row in data["rows"]] == [246.4, 496.0]  # today's FlashMLA stands for the recorded one
    assert data["geometric_mean"] == pytest.approx(math.sqrt(246.4 / 250 * 496 / 500))
    assert [hint for name, _, *hint in timer.asked if name == "mla_jit"] == [[4096], [4096]]
    lines = run("--grid", "q2", "--against", "flash_mla", "--runs", "1").splitlines()
    assert lines[0] == f"NVIDIA H200, torch {torch.__version__}, 1 runs, q2 grid"
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
    assert len(data["rows"]) == len(grids.CAPTURED) == 11
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


def test_peers_that_cannot_serve_a_shape(timer, monkeypatch):
    """They have "-" in their column, and no part in the score."""
    monkeypatch.setitem(peers.PEERS, "flash_mla", lambda: bench.Runner(lambda sets: None))
    monkeypatch.setitem(peers.PEERS, "sdpa", lambda: bench.Runner(lambda sets: lambda s: s.q))
    timer.us = lambda name, shape, seed: 200.0
    arguments = ["--grid", "q2", "--against", "flash_mla,sdpa", "--runs", "2"]
    data = run_json(*arguments)
    assert [row["timed_us"] for row in data["rows"]] == [{"flash_mla": None, "sdpa": 200.0}] * 2
    assert [row["best_us"] for row in data["rows"]] == [200.0, 200.0]  # the recorded ones are slower
    assert run(*arguments).splitlines()[2].endswith("flash_mla - sdpa 200.0")


@pytest.mark.parametrize(("dtype", "cache"), [("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "fp8_e4m3")])
def test_shapes(timer, monkeypatch, dtype, cache):
    seen = []

    def us(name, shape, seed):
        seen.append(shape)
        return 10.0 + seed if name == "mla_jit" else 15.0

    timer.us = us
    monkeypatch.setitem(peers.PEERS, "sdpa", lambda: bench.Runner(lambda sets: lambda s: s.q))
    arguments = ["--shape", "128x4x4096x2", "--shape", "16x1x100,16x2x100", "--dtype", dtype, "--page-size", "16"]
    with settings.scope(target="sm_90"):
        data = run_json(*arguments, "--against", "sdpa")
        lines = run(*arguments).splitlines()
    assert (data["grid"], data["runs"], data["aims"], data["missed"]) == ("shapes", 3, {}, [])
    assert seen[0] == bench.Shape(128, (4096,) * 4, 2, 16, cache, q_dtype="bf16" if dtype == "fp8" else dtype)
    row = data["rows"][0]
    assert row["shape"] == "4096 × 128 heads × 4 × q2"
    assert (row["ours_us"], row["low_us"], row["high_us"], row["spread_us"]) == (11.0, 10.0, 12.0, 0.0)
    assert (row["timed_us"], row["recorded_us"], row["best_us"]) == ({"sdpa": 15.0}, {}, 15.0)
    assert row["roof_us"] == bench.roof_us(seen[0], 4500.0, 762.0)  # the ceilings measured with the peers
    assert data["geometric_mean"] == pytest.approx(15 / 11)
    assert [row["shape"] for row in data["rows"][1:]] == ["100 × 16 heads × 1", "100 × 16 heads × 2"]
    assert lines[0] == f"NVIDIA H200, torch {torch.__version__}, 3 runs, {dtype}, page 16"
    assert len(lines) == 2 + 3  # without a peer there is no score, and no summary
    assert lines[3].split()[6:12] == ["11.0", "10.0", "12.0", "0.00", "-", "-"]


def test_the_roof_of_an_fp8_cache_has_half_the_bytes():
    short, half = (bench.Shape(16, (1024,), dtype=dtype, q_dtype="bf16") for dtype in ("bf16", "fp8_e4m3"))
    assert bench.roof_us(half, 4500.0, 1e9) == bench.roof_us(short, 4500.0, 1e9) / 2


def test_the_databases(timer, monkeypatch):
    """S with them, S with none, S on what they do not hold; what each call saw."""
    saw = []

    def dispatch():
        current = settings.current()
        saw.append((current.shipped_db, current.tuning_db))
        return SimpleNamespace(provenance="measured")

    monkeypatch.setattr(api, "last_dispatch", dispatch)
    monkeypatch.setitem(peers.PEERS, "sdpa", lambda: bench.Runner(lambda sets: lambda s: s.q))
    timer.us = lambda name, shape, seed: {"mla_jit": 10.0, "untuned": 20.0, "sdpa": 1.0}[name]
    with settings.scope(target="sm_90"):
        data = run_json("--grid", "databases", "--against", "sdpa", "--runs", "1")
        assert settings.current().shipped_db
        alone = run_json("--grid", "databases", "--runs", "1")
        lines = run("--grid", "databases", "--runs", "1").splitlines()
    assert set(saw) == {(True, None)}
    rows = data["rows"]
    assert [row["held_out"] for row in rows] == [False] * 57 + [True] * 26
    assert [row["shape"] for row in rows[57:]] == [proofs.say(p) for p in proofs.HELD_OUT]
    assert rows[0]["recorded_us"] == grids.peers_grid()[0][1]
    assert (rows[0]["best_us"], rows[0]["tuned_score"], rows[0]["untuned_score"]) == (1.0, 0.1, 0.05)
    assert {row["provenance"] for row in rows} == {"measured"}
    assert [data[name] for name in ("with_databases", "without_databases", "untuned_shapes")] == pytest.approx(
        [0.1, 0.05, 0.1]
    )
    best = [min(recorded.values()) for _, recorded in grids.peers_grid()]
    assert alone["with_databases"] == pytest.approx(math.exp(statistics.mean(math.log(us / 10) for us in best)))
    assert alone["untuned_shapes"] is None
    assert {(row["best_us"], row["tuned_score"]) for row in alone["rows"][57:]} == {(None, None)}
    assert lines[-3:] == [
        f"S with the databases as they are, 57 shapes: {alone['with_databases']:.3f}",
        f"S without any database, 57 shapes: {alone['without_databases']:.3f}",
        "S on shapes that no database holds, 0 shapes: -",
    ]
    assert lines[2 + 57].split()[6:] == ["10.0", "20.0", "-", "-", "-", "1.0e-03", "measured"]


def quality_row(**changes) -> proofs.QualityRow:
    row = proofs.QualityRow("4096 × 16 heads × 4", 600, 2.5, 90, 99.0, 100.0, 50.0, 9.0)
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    ("changes", "auto_s", "missed"),
    [
        ({}, 20.0, []), ({}, 20.5, ["time_share"]), ({"auto_us": 106.0}, 1.0, ["reached", "worst_reached"]),
        ({"legal": 299}, 1.0, ["least_legal"]), ({"spread": 1.49}, 1.0, ["least_spread"]),
    ],
)  # fmt: skip
def test_the_tuners_quality(timer, monkeypatch, changes, auto_s, missed):
    """One missed aim is exit code 1, and says so beside its figure."""
    asked = []

    def rows(where, device, *, on_time, on_shape):
        asked.append((where.name, device))
        on_shape("auto", sweep.Finished(proofs.QUALITY[0], device, None, 3.0))
        on_time("exhaustive", 100.0)
        on_time("auto", auto_s)
        yield quality_row(auto_us=99.0)
        yield quality_row(**changes)

    monkeypatch.setattr(proofs, "quality_rows", rows)
    with settings.scope(target="sm_90"):
        data = run_json("--grid", "quality")
        result = CliRunner().invoke(cli.main, ["bench", "--grid", "quality"])
    assert asked == [("sm_90", "cuda:0")] * 2
    assert (data["missed"], data["ok"], data["runs"]) == (missed, not missed, None)
    assert result.exit_code == (1 if missed else 0)
    assert data["aims"] == {
        "reached": 0.98, "worst_reached": 0.94, "time_share": 0.2, "least_legal": 300, "least_spread": 1.5,
    }  # fmt: skip
    assert data["worst_reached"] == min(99 / changes.get("auto_us", 100), 1)
    assert data["reached"] == pytest.approx(math.sqrt(data["worst_reached"]))
    assert (data["exhaustive_s"], data["auto_s"], data["time_share"]) == (100.0, auto_s, auto_s / 100)
    assert "auto: 4096 × 16 heads × 1, 3.0 s" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"NVIDIA H200, torch {torch.__version__}, quality grid"
    assert len(lines) == 2 + 2 + 7
    assert sum(line.endswith("MISSED") for line in lines) == len(missed)
    share = next(line for line in lines if line.startswith("auto's seconds / exhaustive's"))
    assert f": {auto_s / 100:.3f} (aim: at most 0.2)" in share


def neighbour_row(**us) -> proofs.NeighbourRow:
    times = {"tuned_us": 10.0, "neighbour_us": 10.0, "analytic_us": 12.0, "aiter_us": 20.0, "vllm_us": 40.0}
    return proofs.NeighbourRow("2048 × 16 heads × 2", **{**times, **us}, whence="nearest is a shipped row")


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []), ({"neighbour_us": 11.5}, []), ({"neighbour_us": 11.8}, ["worst_neighbour"]),
        ({"neighbour_us": 12.5}, ["neighbour", "worst_neighbour"]), ({"analytic_us": 15.0}, ["analytic"]),
    ],
)  # fmt: skip
def test_how_well_neighbours_serve(timer, monkeypatch, changes, missed):
    rows = [*[neighbour_row()] * 3, neighbour_row(**changes)]
    monkeypatch.setattr(proofs, "neighbour_rows", lambda where, device: iter(rows))
    with settings.scope(target="sm_90"):
        data = run_json("--grid", "neighbours")
        text = CliRunner().invoke(cli.main, ["bench", "--grid", "neighbours"]).stdout
    assert data["missed"] == missed
    assert data["aims"] == {"neighbour": 0.95, "worst_neighbour": 0.85, "analytic": 0.8}
    assert data["neighbour"] == pytest.approx((10 / changes.get("neighbour_us", 10)) ** (1 / 4))
    assert (data["aiter"], data["vllm"]) == pytest.approx((0.5, 0.25))
    assert "nearest is a shipped row" in text
    assert f"worst tuned / neighbour: {data['worst_neighbour']:.3f} (aim: at least 0.85)" in text


# -------------------------------------------------------------------------------------------------------------- runners


@pytest.fixture
def on_cpu(monkeypatch):
    """`bench.bench` with input sets on the CPU; a graph calls at once, and all take 1 µs."""
    calls = []

    def graph_of(call, sets):
        calls.append([call(s) for s in sets])

    monkeypatch.setattr(bench, "make_sets", functools.partial(bench.make_sets, device="cpu", rotate_bytes=0))
    monkeypatch.setattr(bench, "graph_of", graph_of)
    monkeypatch.setattr(bench, "time_alternating", lambda graphs, n, *, rounds: {name: [1.0] for name in graphs})
    return calls


def sets_of(*lens: int, dtype: str = "fp32", **shape) -> list[bench.Set]:
    of = bench.Shape(4, lens, dtype=dtype, **shape)
    return bench.make_sets(of, capacity=512, device="cpu", rotate_bytes=0)


class FlashInfer:
    """`flashinfer.mla.BatchMLAPagedAttentionWrapper` with its own signatures, in torch."""

    made: list[FlashInfer]

    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None, backend="auto",
    ):  # fmt: skip
        assert (float_workspace_buffer.numel(), backend, use_cuda_graph) == (128 << 20, "auto", False)
        self.workspace, self.runs = float_workspace_buffer, 0
        self.made.append(self)

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type, use_profiler=False,
    ):  # fmt: skip
        assert {t.dtype for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert kv_indices.shape == (kv_indptr[-1],)
        assert (head_dim_ckv, head_dim_kpe) == (512, 64)
        self.index = [t.tolist() for t in (qo_indptr, kv_indptr, kv_len_arr)]
        self.pages, self.heads, self.page_size, self.causal = kv_indices.long(), num_heads, page_size, causal
        self.scale, self.dtypes = sm_scale, (q_data_type, kv_data_type)

    def run(
        self, q_nope, q_pe, ckv_cache, kpe_cache, out=None, lse=None, return_lse=False, profiler_buffer=None,
        kv_len=None, page_table=None, return_lse_base_on_e=False,
    ):  # fmt: skip
        assert not return_lse
        assert (q_nope.dtype, ckv_cache.dtype) == self.dtypes
        assert q_nope.shape[1:] == (self.heads, 512)
        assert q_pe.shape[1:] == (self.heads, 64)
        assert ckv_cache.shape[1:] == (self.page_size, 512)
        assert kpe_cache.shape[1:] == (self.page_size, 64)
        assert kpe_cache.data_ptr() == ckv_cache.data_ptr() + 512 * ckv_cache.element_size()  # views of one cache
        self.runs += 1
        starts, page_starts, lens = self.index
        q, cache = torch.cat([q_nope, q_pe], -1), torch.cat([ckv_cache, kpe_cache], -1)
        made = []
        for b, n in enumerate(lens):
            key = cache[self.pages[page_starts[b] : page_starts[b + 1]]].flatten(0, 1)[:n]
            logits = torch.einsum("thd,nd->htn", q[starts[b] : starts[b + 1]], key) * self.scale
            if self.causal:
                logits += torch.full(logits.shape[1:], -math.inf).triu(n - logits.shape[1] + 1)
            made.append(torch.einsum("htn,nc->thc", logits.softmax(-1), key[:, :512]))
        return torch.cat(made)


@pytest.fixture
def flashinfer(monkeypatch):
    FlashInfer.made = []
    module = ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = FlashInfer
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    return FlashInfer


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("q_len", [1, 3])
def test_flashinfer_is_planned_once_a_set(flashinfer, page_size, q_len):
    sets = sets_of(100, 7, 64, q_len=q_len, page_size=page_size)
    call = peers.by_name("flashinfer").prepare(sets)
    assert len(flashinfer.made) == len(sets) == 2
    assert len({wrapper.workspace.data_ptr() for wrapper in flashinfer.made}) == 1
    for s in (*sets, *sets):
        out = call(s)
        assert out.shape == (3, q_len, 4, 512)
        assert bench.worst_row(out, s, range(3)) < 1e-5
    assert [wrapper.runs for wrapper in flashinfer.made] == [2, 2]
    assert {wrapper.causal for wrapper in flashinfer.made} == {q_len > 1}


@pytest.mark.parametrize("q_len", [1, 3])
def test_flash_mla_has_a_schedule_a_shape(monkeypatch, q_len):
    """Against our own module of its spelling, which computes."""
    asked = []
    monkeypatch.setitem(sys.modules, "flash_mla", compat.flash_mla)
    schedule = compat.flash_mla.get_mla_metadata
    monkeypatch.setattr(compat.flash_mla, "get_mla_metadata", lambda: asked.append(1) or schedule())
    sets = sets_of(100, 7, q_len=q_len)
    runner = peers.by_name("flash_mla")
    call = runner.prepare(sets)
    assert [bench.worst_row(call(s), s, range(2)) < 1e-5 for s in sets] == [True, True]
    assert asked == [1]
    assert runner.prepare(sets_of(100, 7, page_size=16)) is None


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("page_size", [1, 16])
def test_sdpa(q_len, page_size):
    sets = sets_of(75, 75, q_len=q_len, page_size=page_size)
    call = peers.by_name("sdpa").prepare(sets)
    for s in sets:
        out = call(s)
        assert out.shape == (2, q_len, 4, 512)
        assert bench.worst_row(out, s, range(2)) < 1e-5


def test_sdpa_gathers_before_it_is_timed():
    first, second = sets_of(75, 75)
    call = peers.by_name("sdpa").prepare([first, second])
    before = [call(s) for s in (first, second)]
    first.cache.zero_()
    assert all(torch.equal(call(s), out) for s, out in zip((first, second), before, strict=True))


def test_sdpa_is_left_out_where_its_copies_do_not_fit(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peers.functional, "scaled_dot_product_attention", full)
    assert peers.by_name("sdpa").prepare(sets_of(75, 75)) is None


@pytest.mark.usefixtures("flashinfer")
def test_what_peers_do_not_serve(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_mla", compat.flash_mla)
    assert peers.by_name("sdpa").prepare(sets_of(75, 74)) is None
    mixed = sets_of(64, 64, dtype="fp8_e4m3", q_dtype="bf16")
    assert (mixed[0].q.dtype, mixed[0].cache.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    assert [peers.by_name(name).prepare(mixed) for name in peers.PEERS] == [None] * 3


def test_a_runner_is_checked_and_captured_in_its_scope(on_cpu):
    entered = []

    @contextlib.contextmanager
    def scope():
        entered.append("in")
        yield
        entered.append("out")

    def prepare(sets):
        entered.append("prepare")

        def call(s):
            entered.append("call")
            return mla_jit.decode(s.q, s.cache, **s.keywords)

        return call

    runners = {"mla_jit": bench.Runner(prepare, scope), "none": bench.Runner(lambda sets: None)}
    found = bench.bench(bench.Shape(4, (100, 7), page_size=16, dtype="fp32"), runners)
    assert entered == ["in", "prepare", "call", "call", "call", "out"]  # the check, and one a set
    assert found.times_us == {"mla_jit": 1.0}
    assert 0 < found.error < 1e-5


def test_calls_apart_have_another_kernel_between(on_cpu, monkeypatch):
    """Its own time is subtracted: of graphs with a call and of one without."""
    kernels = []
    monkeypatch.setattr(torch.Tensor, "add_", lambda x, y, true=torch.Tensor.add_: (kernels.append(y), true(x, y))[1])
    monkeypatch.setattr(
        bench, "time_alternating",
        lambda graphs, n, *, rounds: {name: [5.0, 6.0, 9.0] if name.strip() else [1.0, 2.0, 4.0] for name in graphs},
    )  # fmt: skip
    shape = bench.Shape(4, (100, 7), page_size=16, dtype="fp32")
    found = bench.bench(shape, {"mla_jit": bench.ours(mla_jit.decode)}, apart=True)
    assert len(kernels) == sum(map(len, on_cpu)) == 2 * len(on_cpu[0])
    assert (found.times_us, found.spread_us) == ({"mla_jit": 4.0}, 4.0)


@pytest.mark.parametrize("wrong", ["nan", "scaled"])
def test_a_wrong_result_is_not_timed(on_cpu, wrong):
    def call(s):
        return mla_jit.decode(s.q, s.cache, **s.keywords) * (math.nan if wrong == "nan" else 1.001)

    with pytest.raises(MlaJitError, match=r"peer on 100 × 4 heads × 2: worst row's relative error is .* not timed"):
        bench.bench(bench.Shape(4, (100, 7), dtype="fp32"), {"peer": bench.Runner(lambda sets: call)})
    assert on_cpu == []


def test_an_fp8_cache_is_checked_too(on_cpu):
    shape = bench.Shape(4, (100, 7), dtype="fp8_e4m3", q_dtype="bf16")
    assert 0 < bench.bench(shape, {"mla_jit": bench.ours(mla_jit.decode)}).error < 8e-3


# ------------------------------------------------------------------------------------------------------------ databases


CPU = target.by_name("cpu")
SMALL = bench.Shape(4, (100, 64), page_size=16, dtype="fp32")


@pytest.fixture
def nothing_stored(tmp_path, monkeypatch):
    """A user's database that is not there, and an empty folder of shipped rows."""
    (tmp_path / "data" / "tuning_db").mkdir(parents=True)
    plan.analytic(DecodeProblem(num_heads=4), CPU)  # reads the data files that are about to vanish
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "data" / "package")
    with settings.scope(tuning_db=tmp_path / "tuning.db"):
        api.reload()
        yield tmp_path
    api.reload()


def keep(where: Path, whose: str, trial: Trial) -> None:
    if whose == "user":
        with store.Store(where / "tuning.db") as opened:
            opened.add([trial])
    else:
        shipped.export([trial], where / "data" / "tuning_db" / "cpu" / "decode.jsonl")
    api.reload()


def tuned(problem: DecodeProblem) -> Trial:
    """A measured row of a config that is not the default."""
    choice = plan.analytic(problem, CPU)
    return Trial(
        problem=problem, config=choice.config.replace(num_kv_splits=7), target=CPU.name, device=CPU.device,
        revision=choice.variant.revision, median_us=1.0, toolchain=plan._toolchain(),
    )  # fmt: skip


def test_shipped_rows_can_be_turned_off(nothing_stored):
    problem = DecodeProblem(num_heads=4, max_kv_len=256, hinted=True)
    keep(nothing_stored, "shipped", tuned(problem))
    assert plan.choose(problem, CPU).provenance == "measured"
    with settings.scope(shipped_db=False):
        assert shipped.rows(CPU.device, "decode") == ()
        mla_jit.reload()
        assert plan.choose(problem, CPU).provenance == "default"
        keep(nothing_stored, "user", dataclasses.replace(tuned(problem), median_us=2.0))
        assert plan.choose(problem, CPU).trial.median_us == 2.0  # the user's stay
    mla_jit.reload()
    assert len(shipped.rows(CPU.device, "decode")) == 1
    (nothing_stored / "tuning.db").unlink()
    assert plan.choose(problem, CPU).trial.median_us == 1.0


@pytest.mark.parametrize(("text", "value"), [("0", False), ("off", False), ("1", True), ("True", True), ("", True)])
def test_the_setting_of_shipped_rows(text, value):
    assert settings.Settings.from_env({"MLA_JIT_SHIPPED_DB": text}).shipped_db is value
    with pytest.raises(SettingsError, match="MLA_JIT_SHIPPED_DB='no way'"):
        settings.Settings.from_env({"MLA_JIT_SHIPPED_DB": "no way"})


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("whose", ["user", "shipped"])
def test_each_scope_has_its_own_choices(nothing_stored, whose):
    """Real calls: with the databases the stored config serves, without them the default, in every run."""
    (one, *_) = bench.make_sets(SMALL)
    mla_jit.decode(one.q, one.cache, **one.keywords)
    keep(nothing_stored, whose, tuned(mla_jit.last_dispatch().problem))
    served = []

    def decode(*arguments, **keywords):
        out = mla_jit.decode(*arguments, **keywords)
        served.append((mla_jit.last_dispatch().provenance, mla_jit.last_dispatch().config.get("num_kv_splits")))
        return out

    held_out = [DecodeProblem(num_heads=2, batch=3, page_size=16, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32",
                              max_kv_len=32, hinted=True)]  # fmt: skip
    known, new = grids.database_rows(decode, ["sdpa"], runs=2, grid=[(SMALL, {"fi_fa3": 3.0})], held_out=held_out)
    assert (known.shape, known.held_out, known.provenance) == ("100 × 4 heads × 2", False, "measured")
    assert (known.timed_us, known.best_us, known.tuned_score) == ({"sdpa": None}, 3.0, 3.0)  # lengths differ
    assert (new.shape, new.held_out, new.provenance) == ("32 × 2 heads × 3", True, "default")
    assert (new.timed_us, new.best_us) == ({"sdpa": 1.0}, 1.0)
    default = plan.analytic(mla_jit.last_dispatch().problem, CPU).config.get("num_kv_splits")
    assert served[:12] == [*[("measured", 7)] * 3, *[("default", default)] * 3] * 2
    assert plan._memo == {}  # nothing of it stays


@pytest.mark.usefixtures("on_cpu")
def test_a_held_out_shape_that_is_stored(nothing_stored):
    problem = DecodeProblem(num_heads=4, batch=2, max_kv_len=256, hinted=True)
    keep(nothing_stored, "user", tuned(problem))
    rows = grids.database_rows(mla_jit.decode, grid=[], held_out=[problem])
    with pytest.raises(MlaJitError, match=r"256 × 4 heads × 2 is no held-out shape: the user's row.*use another"):
        next(rows)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.usefixtures("no_gpu")
def test_uneven_lengths_by_both_schedulers(timer, monkeypatch):
    """With the list in each call; the lists alone; and what empty sequences cost: each beside its aim."""
    lists = []

    def list_us(shape, rounds, seed):
        lists.append((shape.batch, seed))
        return shape.batch / 64 + seed

    monkeypatch.setattr(grids, "_list_us", list_us)
    us = {"mla_jit": 200.0, "split": 250.0, "list": 203.0}
    timer.us = lambda name, shape, seed: us[name] + seed + (1.5 if name == "mla_jit" else 4.0) * (0 in shape.lens)
    data = run_json("--grid", "ragged", "--runs", "2")
    calls = [(row["shape"], row["scheduler"], row["heads"], row["ours_us"], row["aim_us"]) for row in data["rows"]]
    assert calls[:6] == [
        (f"ragged × {heads} heads × 64", scheduler, heads, us, aim)
        for heads, aim in ((16, 216.0), (64, 248.0), (128, 340.0))
        for scheduler, us, aim in (("persistent", 200.5, aim), ("split", 250.5, None))
    ]  # fmt: skip
    assert calls[6:9] == [(f"the list of {n} sequences", "persistent", 16, n / 64 + 0.5, 6.0) for n in (1, 64, 256)]
    assert lists == [(n, seed) for n in (1, 64, 256) for seed in (0, 1)]
    assert [row[0] for row in calls[9:]] == [
        f"4096 × {heads} heads × 128{more}{listed}"
        for heads in (16, 128) for more in ("", " + 896 empty") for listed in ("", ", with its list")
    ]  # fmt: skip
    assert (data["padding"], data["padding_listed"]) == (pytest.approx(202 / 200.5), pytest.approx(207.5 / 203.5))
    assert (data["list_us"], data["persistent_128_us"], data["gain"]) == (4.5, 200.5, pytest.approx(250.5 / 200.5))
    assert data["missed"] == []
    assert timer.planned == 8  # two shapes, full and padded, in two runs
    assert {asked[3] for asked in timer.asked} == {"persistent", "split"}
    monkeypatch.setitem(peers.PEERS, "flash_mla", lambda: bench.Runner(lambda sets: lambda s: s.q))
    timer.us = lambda name, shape, seed: 160.0 if name == "flash_mla" else 200.0
    data = run_json("--grid", "ragged", "--runs", "1", "--against", "flash_mla,sdpa")
    assert "sdpa" not in {row["scheduler"] for row in data["rows"]}  # it serves no uneven lengths
    beside = [row for row in data["rows"] if row["scheduler"] == "flash_mla"]
    assert [(row["kind"], row["heads"], row["ours_us"], row["aim_us"]) for row in beside] == [
        ("call", heads, 160.0, None) for heads in (16, 64, 128)
    ]
    assert (data["persistent_128_us"], data["gain"], data["missed"]) == (200.0, pytest.approx(1.0), [])
    timer.us = lambda name, shape, seed: 220.0 + 5.0 * (0 in shape.lens)
    text = run("--grid", "ragged", "--runs", "1", code=1)
    assert text == ""
    missed = run_json("--grid", "ragged", "--runs", "1")["missed"]
    assert missed == ["persistent_16_us", "padding"]


def test_a_list_is_timed_by_itself(on_cpu, monkeypatch):
    made = []
    monkeypatch.setattr(
        api_metadata, "decode_metadata", lambda *a, metadata=None, **k: made.append(metadata) or "lists"
    )
    assert grids._list_us(bench.Shape(4, (100, 7)), 3, 0) == 1.0
    assert made == [None, *["lists"] * 20]
    assert on_cpu == [["lists"] * 20]


@pytest.mark.parametrize(
    "grid", ["peers", "q2", "capture", "ragged", "prefill", "databases", "quality", "neighbours", "first-call"]
)
def test_without_a_gpu_there_is_one_error(grid, monkeypatch):
    monkeypatch.setattr(overhead, "_in_child", None)
    said = run("--grid", grid, code=1)
    assert said.startswith(f"MlaJitError: the grid {grid} needs a GPU")
    assert len(said.splitlines()) == 1
    assert "needs a GPU" in run_json("--grid", grid)["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "all"], "first-call"), (["--runs", "0"], "x>=1"),
        (["--against", "cutlass"], "there is flash_mla, flashinfer, sdpa"),
        (["--grid", "capture", "--against", "flash_mla"], "not for capture"),
        (["--grid", "host", "--capacity-hint"], "not for host"), (["--grid", "ragged", "--apart"], "not for ragged"),
        (["--grid", "quality", "--runs", "3"], "--runs is not for quality"),
        (["--shape", "16x4"], "'16x4' is no shape; write HEADSxBATCHxKV"), (["--shape", "16x0x4096"], "no shape"),
        (["--shape", "16x4x1024", "--grid", "peers"], "either --shape or --grid peers"),
        (["--dtype", "fp8"], "are for --shape"), (["--grid", "q2", "--page-size", "64"], "are for --shape"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, said):
    assert said in run(*arguments, code=2)


@pytest.mark.usefixtures("timer")
@pytest.mark.parametrize("name", ["flash_mla", "flashinfer"])
def test_a_peer_that_does_not_import(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert f"{name} cannot be timed" in run("--grid", "q2", "--against", name, code=1)


@pytest.mark.usefixtures("no_gpu")
def test_a_shape_needs_a_gpu():
    assert run("--shape", "16x4x1024", code=1).startswith("MlaJitError: a shape needs a GPU")


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
    assert empty.variant == filled.variant == "decode_narrow_asm"
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
    assert imported == ["cuda.bindings.driver", "yaml"]


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
