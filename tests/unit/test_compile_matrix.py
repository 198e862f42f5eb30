"""Templates × knobs × targets, really compiled: a pairwise covering array in CI, the full product with `--full`.

With its default config every problem that the predicate accepts must compile to a legal kernel on every target. With
other tunables a kernel may turn out illegal (that is what the check after compilation is for), but the compiler must
neither fail nor crash.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import covering
import pytest
from covering import Outcome, Row

from mla_jit import models, support
from mla_jit import target as targets
from mla_jit.ops.decode import gluon, persistent, splitk

GPU_TARGETS = [name for name, row in targets.targets().items() if row.triton]
DTYPES = [pair for pair in support.DTYPE_PAIRS if "fp32" not in pair]

PROBLEMS = {
    "target": GPU_TARGETS,
    "dtypes": DTYPES,
    "heads": [(1, 1), (12, 1), (16, 1), (32, 2), (40, 1), (128, 1)],  # (query, KV)
    "page_size": [64, 1, 7, 16],
    "q_len": [1, 2, 3],
    "dims": [(96, 0), (256, 32), (512, 64)],
    "paging": ["table", "csr", "csr+lens"],
    "scheduler": ["split", "persistent"],
    "splits": [1, None, 8, 300],
    "misaligned": [(), ("q",), ("kv",), ("q", "kv", "out")],
    "lse": [False, True],
    "causal": [True, False],
    "soft_cap": [False, True],
    "sinks": [False, True],
    "scales": [False, True],
    "context_parallel": [False, True],
    "ragged": [False, True],
    "index64": [False, True],
    "split_operands": [False, True],
    "scaled": [False, True],  # a cache (ckv, kv_scales, kpe)
    "flat_pages": [True, False],
}
KNOBS = {  # of stage 1
    "target": GPU_TARGETS,
    "dtypes": ["bf16", "fp8", "fp8xfp8"],  # fp8: the target's own, if it has one
    "heads": [(16, 1), (32, 1), (128, 1)],
    "page_size": [64, 1],
    "dims": [(96, 0), (256, 32), (512, 64)],
    "scaled": [False, True],
    **{name: list(values) for name, values in splitk.SPACE.items() if not name.startswith("combine_")},
}
COMBINE = {
    "target": GPU_TARGETS,
    "dtypes": ["bf16"],
    "heads": [(128, 1), (12, 1)],
    "page_size": [64],
    "dims": [(512, 64), (96, 0)],
    "splits": [None, 8],
    **{name: list(values) for name, values in splitk.SPACE.items() if name.startswith("combine_")},
}
GLUON = {
    "target": [
        name for name in GPU_TARGETS if targets.by_name(name).has("tma") and targets.by_name(name).has("mma_m64")
    ],
    "dtypes": ["bf16", "fp16"],
    "heads": [(128, 1), (40, 2)],
    "page_size": [64, 256],
    "dims": [(256, 0), (256, 64), (512, 0), (512, 64)],
    "q_len": [1, 2],
    "paging": ["table", "csr"],
    "soft_cap": [False, True],
    "sinks": [False, True],
    "lse": [False, True],
    "context_parallel": [False, True],
    **{name: list(values) for name, values in gluon.SPACE.items() if not name.startswith("combine_")},
}


def dtypes_of(row: Row) -> tuple[str, str]:
    named = row["dtypes"]
    return models.dtypes_on(named, targets.by_name(row["target"])) if isinstance(named, str) else named


def fields_of(row: Row) -> Row:
    """A row as the fields of a DecodeProblem."""
    q, kv = dtypes_of(row)
    paging = row.get("paging", "table")
    same = (
        "page_size",
        "q_len",
        "lse",
        "causal",
        "soft_cap",
        "sinks",
        "context_parallel",
        "ragged",
        "flat_pages",
        "misaligned",
        "scheduler",
    )
    return {
        **{name: row[name] for name in same if name in row},
        "num_heads": row["heads"][0], "num_kv_heads": row["heads"][1],
        "kv_lora_rank": row["dims"][0], "rope_dim": row["dims"][1],
        "q_dtype": q, "kv_dtype": kv, "out_dtype": "bf16" if q.startswith("fp8") else q,
        "paging": paging.partition("+")[0],
        "has_lens": paging != "csr", "num_kv_splits": row.get("splits"), "batch": 3, "max_kv_len": 8192,
        "q_scale": row.get("scales", False) and q.startswith("fp8"), "kv_scale": row.get("scales", False),
        "layout": "three" if row.get("scaled") else "split" if row.get("split_operands") else "joint",
        "q_split": bool(row.get("split_operands")),
        "index64": ("table", "lens", "kv_indptr", "last", "qo_indptr") if row.get("index64") else (),
    }  # fmt: skip


def allowed_problem(row: Row) -> bool:
    """Context parallelism needs global lengths, and does not go with sinks (`DecodeProblem` says why).

    A cache with scales is fp8 beside q in 16 bits, has no other scale, and groups of 128 columns.
    """
    if row.get("scaled"):
        q, kv = row.get("dtypes", ("bf16", "fp8_e4m3"))
        if q.startswith("fp8") or not kv.startswith("fp8") or row.get("scales") or row.get("dims", (512, 64))[0] % 128:
            return False
    if row.get("scheduler") == "persistent" and row.get("splits") is not None:
        return False
    return not (row.get("context_parallel") and (row.get("sinks") or row.get("paging") == "csr"))


def allowed_knobs(row: Row) -> bool:
    """What the variant's predicate accepts, as far as it can be told from some of the values."""
    there = targets.by_name(row.get("target", "sm_90"))
    if row.get("scaled") and (row.get("dtypes", "fp8") != "fp8" or row.get("dims", (512, 64))[0] % 128):
        return False
    wide = row.get("dtypes", "bf16") == "bf16" and not row.get("scaled")
    if (row.get("swap") and not wide) or (row.get("pdl") and not there.has("pdl")):
        return False
    whole = row.get("page_size", 64) % row.get("block_n", 16) == 0 and row.get("dims", (512, 64))[1] >= 64
    if row.get("tma") and not (there.has("tma") and wide and whole):
        return False
    results = row.get("block_m", 16) * row.get("dims", (256, 32))[0]
    threads = row.get("num_warps", 8) * there.triton[2]
    if results / threads >= there.registers and not there.has("tmem"):
        return False
    tile = row.get("block_n", 16) * row.get("dims", (256, 32))[0] * (2 if "dtypes" in row and wide else 1)
    return tile * max(1, row.get("num_stages", 1) - 1) <= there.smem_bytes


def allowed_combine(row: Row) -> bool:
    """The same for the combine: its tile stays in registers."""
    least = [row.get(name, min(splitk.SPACE[name])) for name in ("combine_s", "combine_h", "combine_d")]
    return math.prod(least) <= splitk._COMBINE_TILE


def knobs_of(row: Row) -> Row:
    return {name: row[name] for name in {**splitk.SPACE, **gluon.SPACE} if name in row}


def name_of(row: Row) -> str:
    q, kv = dtypes_of(row)
    scaled = "-scaled" if row.get("scaled") else ""
    return f"{row['target']}-{q}x{kv}-h{row['heads'][0]}-p{row['page_size']}{scaled}"


def quick(row: Row) -> bool:
    """What the array has, without --full: no foreign fp8 with large dims."""
    large = row.get("dims", PROBLEMS["dims"][0]) != PROBLEMS["dims"][0]
    return not (large and covering.foreign_fp8(row)) and allowed_problem(row)


# Listed by what a compiler needs for them, the least first; a single split has no combine, the persistent scheduler two
# kernels more.
ASCENDING = ("heads", "dims", "scaled", "scheduler", "splits")

PROBLEM_ROWS = covering.pairwise(PROBLEMS, quick, ASCENDING)
KNOB_ROWS = covering.pairwise(KNOBS, allowed_knobs, ASCENDING)
COMBINE_ROWS = covering.pairwise(COMBINE, allowed_combine)
GLUON_ROWS = covering.pairwise(GLUON, allowed_problem, ASCENDING)
FULL = ("target", "dtypes", "heads", "page_size", "q_len", "paging", "dims")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows; with --full, the product of the factors that change a kernel most, the others as the rows have them."""
    if "problem_row" in metafunc.fixturenames:
        rows = covering.of_today(PROBLEM_ROWS, metafunc.config.getoption("--full"))
        if metafunc.config.getoption("--full"):
            product = [
                dict(zip(FULL, values, strict=True)) for values in itertools.product(*(PROBLEMS[name] for name in FULL))
            ]
            mixed = [base | row for base, row in zip(itertools.cycle(PROBLEM_ROWS), product, strict=False)]
            rows = [row for row in mixed if allowed_problem(row)]
        metafunc.parametrize("problem_row", rows, ids=name_of)
    if "knob_row" in metafunc.fixturenames:
        metafunc.parametrize("knob_row", KNOB_ROWS, ids=name_of)
    if "combine_row" in metafunc.fixturenames:
        metafunc.parametrize("combine_row", COMBINE_ROWS, ids=name_of)
    if "gluon_row" in metafunc.fixturenames:
        metafunc.parametrize("gluon_row", GLUON_ROWS, ids=name_of)


WHICH = {  # by kind of row: which variant, and which of its kernels
    "problem_row": (None, slice(None)),
    "knob_row": (splitk.NAME, slice(0, 1)),
    "combine_row": (splitk.NAME, slice(1, None)),
    "gluon_row": (gluon.NAME, slice(0, 1)),
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """By test id: the compilations of all selected rows, on all CPUs, in spawned processes."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        futures = {}
        for item in request.session.items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            for kind, (variant, which) in WHICH.items():
                if (row := params.get(kind)) is not None:
                    job = (row["target"], fields_of(row), variant, knobs_of(row), which)
                    futures[item.nodeid] = pool.submit(covering.compile_problem, *job)
        yield futures
        pool.shutdown(cancel_futures=True)


def check_bounds(there: targets.Target, outcome: Outcome) -> None:
    """The numbers themselves, apart from the library's own check: nothing beyond the target."""
    assert outcome.kernels
    for kernel in outcome.kernels:
        assert 8 <= kernel.registers <= there.registers, kernel
        assert kernel.smem_bytes <= there.smem_bytes, kernel
        assert kernel.spill_bytes <= kernel.spill_limit <= 2048, kernel
        assert kernel.threads % there.triton[2] == 0, kernel
        assert kernel.registers * kernel.threads <= there.registers_sm * (2 if there.runtime == "hip" else 1), kernel


def test_default_compiles_and_is_legal(
    problem_row: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest
) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert (outcome.rejected, outcome.error) == ("", ""), f"{outcome.configs}\n{outcome.message}"
    names = {kernel.name for kernel in outcome.kernels}
    if problem_row["scheduler"] == "split":
        assert (splitk.NAME in names, f"{splitk.NAME}_combine" in names) == (True, problem_row["splits"] != 1)
    else:
        assert {f"{persistent.NAME}_{kernel}" for kernel in ("schedule", "decode_persistent")} <= names
    check_bounds(targets.by_name(problem_row["target"]), outcome)


def test_knobs_compile(knob_row: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert outcome.rejected == ""
    if outcome.error:
        assert outcome.error == "IllegalArtifact", f"{outcome.configs}\n{outcome.message}"
        assert "bytes" in outcome.message, outcome.message  # shared memory or stack, by so many bytes
    else:
        check_bounds(targets.by_name(knob_row["target"]), outcome)


def test_gluon_knobs_compile(
    gluon_row: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest
) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert (outcome.rejected, outcome.error) == ("", ""), f"{outcome.configs}\n{outcome.message}"
    check_bounds(targets.by_name(gluon_row["target"]), outcome)


def test_combine_knobs_compile(
    combine_row: Row, outcomes: dict[str, Future[Outcome]], request: pytest.FixtureRequest
) -> None:
    outcome = outcomes[request.node.nodeid].result()
    assert (outcome.rejected, outcome.error) == ("", ""), f"{outcome.configs}\n{outcome.message}"
    check_bounds(targets.by_name(combine_row["target"]), outcome)


def test_every_supported_cell_is_compiled() -> None:
    """The matrix says "compiled and legal" of nothing that the array above does not compile, of a foreign fp8 on every
    second day."""
    compiled = {(*row["dtypes"], row["target"]) for row in PROBLEM_ROWS}
    cells = [c for c in support.matrix() if c.backend == "triton" and c.state != "refused"]
    assert cells
    assert {(c.q_dtype, c.kv_dtype, c.target) for c in cells} <= compiled


@pytest.mark.parametrize("which", ["problems", "knobs", "combine", "gluon"])
def test_every_pair_occurs(which: str) -> None:
    rows, factors, allowed = {
        "problems": (PROBLEM_ROWS, PROBLEMS, quick),
        "knobs": (KNOB_ROWS, KNOBS, allowed_knobs),
        "combine": (COMBINE_ROWS, COMBINE, allowed_combine),
        "gluon": (GLUON_ROWS, GLUON, allowed_problem),
    }[which]
    assert all(allowed(row) for row in rows)
    for a, b in itertools.combinations(factors, 2):
        seen = {(repr(row[a]), repr(row[b])) for row in rows}
        wanted = {(repr(x), repr(y)) for x, y in itertools.product(factors[a], factors[b]) if allowed({a: x, b: y})}
        assert wanted == seen, (a, b)
