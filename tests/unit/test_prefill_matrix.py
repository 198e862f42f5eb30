"""Prefill templates × knobs × targets, really compiled: a pairwise covering array, as there is one for decode.

With its default config every problem that the predicate accepts must compile to a legal kernel on every target; the
scheduler is a factor like the others, so a row has one. With other tunables a kernel may turn out illegal, but the
compiler must neither fail nor crash.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import covering
import pytest
from covering import Outcome, Row

from mla_jit import models, support
from mla_jit import target as targets
from mla_jit.ops.prefill import persistent, tiles

GPU_TARGETS = [name for name, row in targets.targets().items() if row.triton]
DTYPES = [pair for pair in support.DTYPE_PAIRS if "fp32" not in pair]
PROBLEMS = {
    "target": GPU_TARGETS,
    "dtypes": DTYPES,
    "dims": [(96, 64), (80, 72), (128, 128), (192, 128), (256, 256)],  # the quickest to compile first
    "heads": [(16, 16), (8, 2), (200, 200)],  # (query, KV)
    "q_len": [4096, 48],
    "batch": [1, 3, 300],
    "causal": [True, False],
    "soft_cap": [False, True],
    "lse": [False, True],
    "scales": [False, True],
    "misaligned": [(), ("q",), ("k", "v"), ("q", "k", "v", "out")],
    "token_major": [True, False],
    "index64": [False, True],
    "wide_out": [False, True],
    "scheduler": ["tiles", "persistent"],
}
KNOBS = {
    "target": GPU_TARGETS,
    "dtypes": ["bf16", "fp8"],
    "dims": [(64, 64), (192, 128)],
    "causal": [True, False],
    "block_m": [32, 64, 128],
    "block_n": [32, 64, 128],
    "num_warps": [4, 8],
    "num_stages": [1, 2, 3],
    "tma": [False, True],
}
TUNABLES = ("block_m", "block_n", "num_warps", "num_stages", "tma")


def dtypes_of(row: Row) -> tuple[str, str]:
    named = row["dtypes"]
    return models.dtypes_on(named, targets.by_name(row["target"])) if isinstance(named, str) else named


def fields_of(row: Row) -> Row:
    """A row as the fields of a PrefillProblem."""
    q, kv = dtypes_of(row)
    same = ("q_len", "batch", "causal", "soft_cap", "lse", "misaligned", "token_major", "scheduler")
    heads, scales = row.get("heads", (16, 16)), row.get("scales", False)
    out = "bf16" if q.startswith("fp8") else q
    return {
        **{name: row[name] for name in same if name in row},
        "op": "prefill", "num_heads": heads[0], "num_kv_heads": heads[1], "qk_dim": row["dims"][0],
        "v_dim": row["dims"][1], "q_dtype": q, "kv_dtype": kv, "out_dtype": "fp32" if row.get("wide_out") else out,
        "q_scale": scales and q.startswith("fp8"), "k_scale": scales, "v_scale": scales,
        "index64": ("qo_indptr", "kv_indptr") if row.get("index64") else (), "total_q": 8192,
    }  # fmt: skip


def allowed_knobs(row: Row) -> bool:
    """What the variant's predicate accepts, as far as it can be told from some of the values."""
    there = targets.by_name(row.get("target", "sm_90"))
    if row.get("tma") and not (there.has("tma") and row.get("dtypes", "bf16") == "bf16"):
        return False
    least = {name: row.get(name, min(KNOBS[name])) for name in TUNABLES}
    problem = fields_of({"target": there.name, "dtypes": "bf16", "dims": row.get("dims", (64, 64))})
    config = tiles.default(_problem(problem), there).replace(**least)
    return tiles.refuses(_problem(problem), there, config) is None


def _problem(fields: Row) -> tiles.PrefillProblem:
    return tiles.PrefillProblem(**{k: v for k, v in fields.items() if k != "op"})


def name_of(row: Row) -> str:
    q, kv = dtypes_of(row)
    return f"{row['target']}-{q}x{kv}-d{row['dims'][0]}v{row['dims'][1]}"


PROBLEM_ROWS = covering.pairwise(PROBLEMS, ascending=("dims", "scheduler"))
KNOB_ROWS = covering.pairwise(KNOBS, allowed_knobs, ascending=("dims",))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """By test id: the compilations of all selected rows, on all CPUs, in spawned processes."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        futures = {}
        for item in request.session.items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if (row := params.get("prompt_row")) is not None:
                job = (row["target"], fields_of(row), None, {}, slice(None))
                futures[item.nodeid] = pool.submit(covering.compile_problem, *job)
            if (row := params.get("prompt_knobs")) is not None:
                knobs = {name: row[name] for name in TUNABLES}
                job = (row["target"], fields_of(row), tiles.NAME, knobs, slice(None))
                futures[item.nodeid] = pool.submit(covering.compile_problem, *job)
        yield futures
        pool.shutdown(cancel_futures=True)


def check_bounds(there: targets.Target, outcome: Outcome) -> None:
    """The numbers themselves, apart from the library's own check: nothing beyond the target."""
    assert outcome.kernels
    for kernel in outcome.kernels:
        assert 8 <= kernel.registers <= there.registers, kernel
        assert kernel.smem_bytes <= there.smem_bytes, kernel
        assert kernel.spill_bytes <= kernel.spill_limit <= 1024, kernel
        assert kernel.threads % there.triton[2] == 0, kernel
        assert kernel.registers * kernel.threads <= there.registers_sm * (2 if there.runtime == "hip" else 1), kernel


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "prompt_row" in metafunc.fixturenames:
        rows = covering.of_today(PROBLEM_ROWS, metafunc.config.getoption("--full"))
        metafunc.parametrize("prompt_row", rows, ids=name_of)


def test_default_compiles_and_is_legal(
    prompt_row: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest
) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert (outcome.rejected, outcome.error) == ("", ""), f"{outcome.configs}\n{outcome.message}"
    names = {kernel.name for kernel in outcome.kernels}
    assert (tiles.NAME in names) == (prompt_row["scheduler"] == "tiles")
    assert ({f"{persistent.NAME}_prefill_persistent", f"{persistent.NAME}_schedule"} <= names) == (
        tiles.NAME not in names
    )
    check_bounds(targets.by_name(prompt_row["target"]), outcome)


@pytest.mark.parametrize("prompt_knobs", KNOB_ROWS, ids=name_of)
def test_knobs_compile(prompt_knobs: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert outcome.rejected == ""
    if outcome.error:
        assert outcome.error == "IllegalArtifact", f"{outcome.configs}\n{outcome.message}"
        assert "bytes" in outcome.message, outcome.message  # shared memory or stack, by so many bytes
    else:
        check_bounds(targets.by_name(prompt_knobs["target"]), outcome)


def test_every_supported_cell_is_compiled() -> None:
    """The matrix says "compiled and legal" of nothing that the array above does not compile, of a foreign fp8 on every
    second day."""
    compiled = {(*row["dtypes"], row["target"]) for row in PROBLEM_ROWS}
    cells = [c for c in support.matrix() if (c.op, c.backend) == ("prefill", "triton") and c.state != "refused"]
    assert cells
    assert {(c.q_dtype, c.kv_dtype, c.target) for c in cells} <= compiled


@pytest.mark.parametrize("which", ["problems", "knobs"])
def test_every_pair_occurs(which: str) -> None:
    rows, factors = {"problems": (PROBLEM_ROWS, PROBLEMS), "knobs": (KNOB_ROWS, KNOBS)}[which]
    allowed = allowed_knobs if which == "knobs" else lambda row: True
    for a, b in itertools.combinations(factors, 2):
        seen = {(repr(row[a]), repr(row[b])) for row in rows}
        wanted = {(repr(x), repr(y)) for x, y in itertools.product(factors[a], factors[b]) if allowed({a: x, b: y})}
        assert wanted == seen, (a, b)
