"""prefill_gluon and prefill_persistent_gluon: what needs no GPU.

Their blocks are ordered as prefill_triton's are, and they compile without spills.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton

from mla_jit import plan, target
from mla_jit.compile.artifact import Artifact
from mla_jit.compile.triton import compile_source
from mla_jit.ops import prefill
from mla_jit.ops.prefill import gluon, persistent, persistent_gluon
from mla_jit.problem import PrefillProblem

HOPPER = target.targets()["sm_90"]
KERNELS = Path(next(iter(prefill.__path__)))
LONG = PrefillProblem(num_heads=128, num_kv_heads=128, q_len=8192, total_q=8192, max_kv_len=8192, total_kv=8192)


def function(file: str, name: str, dialect: str) -> ast.FunctionDef:
    """A function of a file with its dialect's name spelt `lang`, without its docstring."""
    tree = ast.parse((KERNELS / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == dialect:
            node.id = "lang"
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    if ast.get_docstring(found) is not None:
        del found.body[0]
    return found


def test_both_kernels_order_blocks_alike() -> None:
    mine, other = function("gluon_prefill.py", "_ordered", "gl"), function("triton_prefill.py", "_ordered", "tl")
    assert ast.dump(mine.args) == ast.dump(other.args)
    assert [ast.dump(s) for s in mine.body] == [ast.dump(s) for s in other.body]


@pytest.mark.parametrize("row", [gluon, persistent_gluon], ids=["tiles", "persistent"])
@pytest.mark.parametrize(
    ("changes", "tunables"),
    [
        ({}, {}),
        ({"causal": False, "lse": True, "soft_cap": True, **{f"{x}_dtype": "fp16" for x in ("q", "kv", "out")}}, {}),
        ({"q_scale": True, "k_scale": True, "v_scale": True, "num_kv_heads": 4}, {"block_n": 64, "num_stages": 4}),
        ({"qk_dim": 128, "index64": ("qo_indptr", "kv_indptr")}, {"num_stages": 3}),
        ({"qk_dim": 64, "v_dim": 64}, {}),
    ],
    ids=["plain", "much", "scales", "128", "64"],
)  # fmt: skip
def test_compiles_without_spills(changes: dict[str, Any], tunables: dict[str, int], row: Any) -> None:
    problem = dataclasses.replace(LONG, **changes)
    config = row.default(problem, HOPPER).replace(**tunables)
    assert row.rejects(problem, HOPPER, config) is None
    artifact = compile_source(row.sources(problem, HOPPER, config)[0])
    assert (artifact.threads, artifact.spill_bytes, artifact.registers) == (384, 0, 168)
    tiles = 128 * problem.qk_dim + config.int("num_stages") * config.int("block_n") * (problem.qk_dim + problem.v_dim)
    assert 2 * tiles < artifact.smem_bytes <= 2 * tiles + 1024
    assert products_overlap(artifact)
    assert list(artifact.extra["tma"]) == ["k_desc", "v_desc"]
    assert all(box["block_size"] == [config.int("block_n"), 64] for box in artifact.extra["tma"].values())


@pytest.mark.parametrize(
    ("changes", "tunables", "reason"),
    [
        ({"kv_dtype": "fp8_e4m3"}, {}, "all must be bf16 or all fp16"),
        ({"out_dtype": "fp32"}, {}, "one type is written"),
        ({"qk_dim": 96}, {}, "qk_dim 96 is not 64, 128 or 192"),
        ({"qk_dim": 64}, {}, "or more than qk_dim"),
        ({"token_major": False}, {}, "do not lie within a token's row"),
        ({"misaligned": ("k",)}, {}, "not multiples of 16"),
        ({"scheduler": "persistent"}, {}, "persistent scheduler"),
        ({}, {"num_stages": 3}, "bytes of shared memory"),
        ({"batch": 1 << 20}, {}, "largest grid"),
    ],
)
def test_says_why_not(changes: dict[str, Any], tunables: dict[str, int], reason: str) -> None:
    problem = dataclasses.replace(LONG, **changes)
    config = gluon.default(problem, HOPPER).replace(**tunables)
    assert reason in (gluon.rejects(problem, HOPPER, config) or "")


def products_overlap(artifact: Artifact) -> bool:
    """Whether the assembler has left groups of wgmmas on their way: where it serialises them, each waits for itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(artifact.binary)
        file.flush()
        tool = Path(triton.__file__).with_name("backends") / "nvidia/bin/nvdisasm"
        code = subprocess.run([tool, "-c", file.name], capture_output=True, check=True).stdout
    return code.count(b"HGMMA") >= 5 * code.count(b"WARPGROUP.DEPBAR") > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler": "tiles"}, "a program a block of queries is asked for"),
        ({"kv_dtype": "fp8_e4m3fnuz"}, "of fp8 types e4m3 is made wide"),
        ({"q_dtype": "fp8_e4m3"}, "fp8 q needs k and v of the same dtype"),
        ({"kv_dtype": "fp16"}, "all must be bf16 or all fp16"),
        ({"out_dtype": "fp16"}, "one type is written"),
        ({"kv_dtype": "fp8_e4m3", "out_dtype": "fp32"}, "it must be bf16 or fp16"),
        ({"kv_dtype": "fp8_e4m3", "num_kv_heads": 1 << 25, "num_heads": 1 << 25}, "largest grid"),
        ({"num_heads": 1 << 20, "num_kv_heads": 1 << 20, "total_q": 1 << 20}, "largest grid"),
    ],
)
def test_says_why_there_is_no_list(changes: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(LONG, **changes)
    config = persistent_gluon.default(problem, HOPPER)
    assert reason in (persistent_gluon.rejects(problem, HOPPER, config) or "")


@pytest.mark.parametrize("heads", [2, 16, 200])
def test_the_list_and_the_sums_are_those_of_the_triton_row(heads: int) -> None:
    """One list, one workspace, one combine: only who walks the list differs."""
    problem = dataclasses.replace(LONG, num_heads=heads, num_kv_heads=heads, lse=True)
    config = persistent_gluon.default(problem, HOPPER)
    like = persistent_gluon._like(config)
    mine, theirs = (row.sources(problem, HOPPER, c) for row, c in ((persistent_gluon, config), (persistent, like)))
    assert [s.key for s in mine[1:]] == [s.key for s in theirs[1:]]
    assert len(mine) == (3 if heads < HOPPER.sms else 2)
    launches = persistent_gluon.launches(problem, HOPPER, config)
    assert [one.kernel for one in launches] == ([1, 0, 2] if heads < HOPPER.sms else [1, 0])
    assert launches[1].grid == (HOPPER.sms, 1, 1)
    assert [s.split(":")[0] for _, s in mine[0].signature].count("tma<bf16[128,64]>") == 2


@pytest.mark.parametrize("out_dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("q_dtype", ["bf16", "fp16", "fp8_e4m3"])
def test_fp8_keys_and_values_are_made_wide_in_the_workspace(q_dtype: str, out_dtype: str) -> None:
    wide = "bf16" if q_dtype == "bf16" else "fp16"
    few = dataclasses.replace(LONG, num_heads=16, num_kv_heads=8, q_dtype=q_dtype, kv_dtype="fp8_e4m3",
                              out_dtype=out_dtype, misaligned=("k",), token_major=False)  # fmt: skip
    config = persistent_gluon.default(few, HOPPER)
    assert persistent_gluon.rejects(few, HOPPER, config) is None
    assert plan.analytic(few, HOPPER).variant is persistent_gluon.PREFILL_PERSISTENT_GLUON
    walk, *_, widen = persistent_gluon.sources(few, HOPPER, config)
    artifact = compile_source(widen)
    assert (artifact.spill_bytes, artifact.threads) == (0, 256)
    assert compile_source(walk).spill_bytes == 0
    assert dict(walk.signature)["k_desc"] == f"tma<{wide}[128,64]>"
    assert dict(walk.signature)["out_ptr"].split(":")[0] == f"*{out_dtype}"
    offsets = persistent_gluon.workspace_offsets(few, HOPPER, config)
    views = persistent_gluon.views(few, HOPPER, config)
    assert {name: (v.rows, v.columns, v.row_bytes, v.dtype) for name, v in views.items()} == {
        "k_wide": (8192, 8 * 192, 8 * 192 * 2, wide), "v_wide": (8192, 8 * 128, 8 * 128 * 2, wide),
    }  # fmt: skip
    assert offsets["k_wide"] % 256 == offsets["v_wide"] % 256 == 0
    assert offsets["v_wide"] >= offsets["k_wide"] + 8192 * 8 * 192 * 2
    assert persistent_gluon.workspace_bytes(few, HOPPER, config) == offsets["v_wide"] + 8192 * 8 * 128 * 2
    first, *rest = persistent_gluon.launches(few, HOPPER, config)
    assert (first.kernel, first.grid) == (3, (8192 // 16 * (2 + 1), 1, 1))  # runs of 1024 of 1536 and of 1024
    assert [one.kernel for one in rest] == [1, 0, 2]


def test_only_where_the_instructions_are() -> None:
    for name, row in target.targets().items():
        legal = gluon.rejects(LONG, row, gluon.default(LONG, row)) is None
        assert legal == (row.has("tma") and row.has("mma_m64")), name


def test_it_serves_prompts_and_leaves_short_queries_to_smaller_blocks() -> None:
    assert plan.analytic(LONG, HOPPER).config == gluon.default(LONG, HOPPER)
    short = dataclasses.replace(LONG, q_len=48, total_q=48)
    assert plan.analytic(short, HOPPER).variant is not gluon.PREFILL_GLUON


WIDENED = """
import dataclasses, torch
from mla_jit import target
from mla_jit.launch import interpreter
from mla_jit.launch.base import Binding
from mla_jit.ops.prefill import persistent_gluon as row
from mla_jit.ops.prefill.inputs import prefill_inputs
there = target.by_name("sm_90")
whole = torch.randn(150, 3, 400).to(torch.float8_e4m3fn)  # K and V are views of it, and not all of it is theirs
k, v = whole[:, :, :192], whole[:, :, 200:328]
ends = torch.tensor([0, 0, 100, 140], dtype=torch.int32)
q = torch.zeros(6, 3, 192).to(torch.float8_e4m3fn)
starts = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
inputs = prefill_inputs(q, k, v, qo_indptr=starts, kv_indptr=ends, max_q_len=2, sm_scale=1.0)
p = inputs.problem
config = row.default(p, there)
assert row.rejects(p, there, config) is None
source, launch = row.sources(p, there, config)[-1], row.launches(p, there, config)[0]
numbers = {**inputs.binding.numbers, **row.numbers(p, there, config)}
bound = interpreter.bind([source], [dataclasses.replace(launch, kernel=0)], Binding(numbers))
wide = {name: torch.full((150, 3, dim), 7.0, dtype=torch.float16) for name, dim in (("k_wide", 192), ("v_wide", 128))}
tensors = {**inputs.tensors, **wide}
bound.run([tensors[name].data_ptr() + offset for name, offset in bound.operands], [])
for name, x in (("k_wide", k), ("v_wide", v)):
    assert torch.equal(wide[name][:140], x[:140].half()), name
    assert bool((wide[name][140:] == 7.0).all()), name  # of no sequence
"""


def test_what_is_made_wide_has_the_same_values() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", WIDENED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
