"""decode_splitk_gluon: what needs no GPU. Its pieces are cut as decode_splitk's are, and it compiles without spills."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mla_jit import target
from mla_jit.compile.artifact import Source
from mla_jit.compile.triton import compile_source
from mla_jit.ops import decode
from mla_jit.ops.decode import gluon
from mla_jit.problem import DecodeProblem

HOPPER = target.targets()["sm_90"]
KERNELS = Path(next(iter(decode.__path__)))


def functions(file: str, dialect: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file with its dialect's name spelt `lang`, without docstrings."""
    tree = ast.parse((KERNELS / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == dialect:
            node.id = "lang"
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in found.values():
        if ast.get_docstring(node) is not None:
            del node.body[0]
    return found


THEIRS, OURS = functions("triton_pieces.py", "tl"), functions("gluon_splitk.py", "gl")


@pytest.mark.parametrize("name", ["_lengths", "_visible", "_even_pieces", "_inverse", "_pieces"])
def test_both_kernels_measure_sequences_alike(name: str) -> None:
    mine, other = OURS[name], THEIRS[name]
    assert ast.dump(mine.args) == ast.dump(other.args)
    assert [ast.dump(s) for s in mine.body] == [ast.dump(s) for s in other.body]


def assigned(function: ast.FunctionDef, name: str) -> list[str]:
    """The expressions that a function assigns to a name, in order."""
    return [
        ast.unparse(node.value)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name
    ]


@pytest.mark.parametrize(
    "name", ["lengths", "tiles", "total", "even", "share", "cuts", "rounds", "time", "fits", "pieces"]
)
def test_both_kernels_cut_a_batch_alike(name: str) -> None:
    """`combine` finds the pieces by triton_pieces' rule. Layouts, `wanted` and the search of the least may differ."""
    mine, other = assigned(OURS["_schedule"], name), assigned(THEIRS["_schedule"], name)
    assert other
    assert mine[: len(other)] == other


@pytest.mark.parametrize(
    "problem",
    [
        DecodeProblem(num_heads=128, batch=128, page_size=64),
        DecodeProblem(num_heads=64, batch=3, page_size=128, q_len=2, lse=True, soft_cap=True, sinks=True),
    ],
    ids=["plain", "much"],
)
def test_compiles_without_spills(problem: DecodeProblem) -> None:
    config = gluon.default(problem, HOPPER)
    assert gluon.rejects(problem, HOPPER, config) is None
    source: Source = gluon.sources(problem, HOPPER, config)[0]
    artifact = compile_source(source)
    assert (artifact.threads, artifact.spill_bytes, artifact.registers) == (384, 0, 168)
    assert list(artifact.extra["tma"]) == ["kv_desc", "kpe_desc"]
    assert all(box["block_size"] == [64, 64] for box in artifact.extra["tma"].values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 16}, "page size 16"),
        ({"q_dtype": "fp16"}, "both must be"),
        ({"kv_lora_rank": 128}, "kv_lora_rank 128"),
        ({"rope_dim": 32}, "rope_dim 32"),
    ],
)
def test_says_why_not(changes: dict[str, int | str], reason: str) -> None:
    problem = DecodeProblem(**{"num_heads": 128, "batch": 1, "page_size": 64, **changes})  # type: ignore[arg-type]
    assert reason in (gluon.rejects(problem, HOPPER, gluon.default(problem, HOPPER)) or "")


def test_only_where_the_instructions_are() -> None:
    problem = DecodeProblem(num_heads=128, batch=1, page_size=64)
    for name, row in target.targets().items():
        legal = gluon.rejects(problem, row, gluon.default(problem, row)) is None
        assert legal == (row.has("tma") and row.has("mma_m64")), name
