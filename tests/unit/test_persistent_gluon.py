"""decode_persistent_gluon: what needs no GPU. It takes the list and the combine of the other, and has no spills."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from mla_jit import plan, settings, target
from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.triton import compile_source
from mla_jit.ops import decode
from mla_jit.ops.decode import gluon, persistent, persistent_gluon
from mla_jit.problem import DecodeProblem

HOPPER = target.targets()["sm_90"]
KERNELS = Path(next(iter(decode.__path__)))
PLAIN = DecodeProblem(num_heads=128, batch=128, page_size=64, scheduler="persistent")
MUCH = DecodeProblem(
    num_heads=64, batch=3, page_size=128, q_len=2, lse=True, soft_cap=True, sinks=True, scheduler="persistent"
)  # fmt: skip
RAGGED = DecodeProblem(
    num_heads=20, batch=3, page_size=64, q_len=4, paging="csr", has_lens=False, ragged=True, lse=True,
    context_parallel=True, q_dtype="fp16", kv_dtype="fp16", out_dtype="fp16", scheduler="persistent",
)  # fmt: skip
NARROW = DecodeProblem(num_heads=64, batch=3, page_size=64, kv_lora_rank=256, rope_dim=0, scheduler="persistent")


@pytest.mark.parametrize(
    ("problem", "lazy"),
    [(PLAIN, True), (PLAIN, False), (MUCH, True), (RAGGED, False), (NARROW, True)],
    ids=["plain", "plain, not lazy", "much", "ragged, not lazy", "no rope"],
)
def test_compiles_without_spills(problem: DecodeProblem, lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And neighbouring columns go out together: a thread has two of a result, eight of an empty sequence's zeros."""
    config = persistent_gluon.default(problem, HOPPER).replace(lazy=lazy)
    assert persistent_gluon.rejects(problem, HOPPER, config) is None
    source: Source = persistent_gluon.sources(problem, HOPPER, config)[0]
    seen: list[str] = []
    legal = toolchain.check_legal

    def noted(source: Source, artifact: Artifact, assembly: str) -> None:
        seen.append(assembly)
        legal(source, artifact, assembly)

    monkeypatch.setattr(toolchain, "check_legal", noted)
    artifact = compile_source(source)
    assert (artifact.threads, artifact.registers, artifact.spill_bytes) == (384, 168, 0)
    assert artifact.smem_bytes <= HOPPER.smem_bytes
    assert list(artifact.extra["tma"]) == (["kv_desc", "kpe_desc"] if problem.rope_dim else ["kv_desc"])
    assert all(box["block_size"] == [64, 64] for box in artifact.extra["tma"].values())
    widths = Counter(re.findall(r"st\.global\.(\S+)", seen[0]))
    assert set(widths) == {"b32", "v2.b32", "v4.b32"}
    assert widths["v4.b32"] > 0  # zeros, 16 bytes
    columns = problem.kv_lora_rank // 2  # of a consumer, 64 rows in 128 threads, two columns at a time
    assert widths["v2.b32"] == 2 * columns // 4  # partials
    assert widths["b32"] <= 2 * columns // 4 + 32  # the result's pairs of 16 bits, and LSE


@pytest.mark.parametrize("problem", [PLAIN, MUCH, RAGGED], ids=["plain", "much", "ragged"])
@pytest.mark.parametrize("planned", [False, True])
def test_list_and_combine_are_those_of_the_other(problem: DecodeProblem, planned: bool) -> None:
    """Whoever makes a list, either walks it: same buffers, same kernel that makes it, same sums after it."""
    p = dataclasses.replace(problem, planned=planned, groups=33 if planned else None)
    mine = persistent_gluon.default(p, HOPPER)
    other = persistent.default(p, HOPPER).replace(block_m=64)
    assert persistent_gluon.lists(p, HOPPER, mine) == persistent.lists(p, HOPPER, other)
    assert persistent_gluon.workspace_offsets(p, HOPPER, mine) == persistent.workspace_offsets(p, HOPPER, other)
    ours, theirs = persistent_gluon.sources(p, HOPPER, mine), persistent.sources(p, HOPPER, other)
    assert ours[1:] == theirs[1:]
    launches = persistent_gluon.launches(p, HOPPER, mine)
    assert [launch.kernel for launch in launches] == ([0, 2] if planned else [1, 0, 2])
    (walk,) = (launch for launch in launches if launch.kernel == 0)
    assert len(walk.args) == len(ours[0].signature)
    blocks = -(-p.rows // 64)
    assert walk.grid == ((33 if planned else HOPPER.sms // blocks) * blocks, 1, 1)


def functions(file: str, dialect: str) -> dict[str, str]:
    """The functions of a file without docstrings, its dialect's name spelt `lang`."""
    tree = ast.parse((KERNELS / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == dialect:
            node.id = "lang"
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return {n.name: ast.dump(ast.Module(n.body, [])) for n in tree.body if isinstance(n, ast.FunctionDef)}


def test_both_walks_find_query_tokens_alike() -> None:
    assert functions("gluon_persistent.py", "gl")["_tokens"] == functions("triton_pieces.py", "tl")["_tokens"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"page_size": 16}, "page size 16"),
        ({"q_dtype": "fp16"}, "both must be"),
        ({"kv_lora_rank": 128}, "kv_lora_rank 128"),
        ({"rope_dim": 32}, "rope_dim 32"),
        ({"scheduler": "split"}, "split slots are asked for"),
        ({"num_kv_splits": 4}, "num_kv_splits asks for split slots"),
        ({"batch_invariant": True}, "depends on the whole batch"),
    ],
)
def test_says_why_not(changes: dict[str, int | str], reason: str) -> None:
    problem = DecodeProblem(**{"num_heads": 128, "batch": 1, "page_size": 64, **changes})  # type: ignore[arg-type]
    assert reason in (persistent_gluon.rejects(problem, HOPPER, persistent_gluon.default(problem, HOPPER)) or "")


def test_only_where_the_instructions_are() -> None:
    for name, row in target.targets().items():
        legal = persistent_gluon.rejects(PLAIN, row, persistent_gluon.default(PLAIN, row)) is None
        assert legal == (row.has("tma") and row.has("mma_m64")), name


@pytest.mark.parametrize(("heads", "without_asm"), [(16, "triton"), (64, "gluon"), (128, "gluon")])
def test_the_model_takes_it_for_more_rows_than_a_block_of_tritons_where_there_is_no_ptx(
    heads: int, without_asm: str
) -> None:
    p = DecodeProblem(num_heads=heads, batch=64, page_size=64, max_kv_len=32768, scheduler="persistent")
    assert plan.analytic(p, HOPPER).variant.name == "decode_persistent_asm"
    with settings.scope(backends=("triton",)):
        assert plan.analytic(p, HOPPER).variant.name == f"decode_persistent_{without_asm}"


def test_registers_are_those_of_the_other_gluon_kernel() -> None:
    source = persistent_gluon.sources(PLAIN, HOPPER, persistent_gluon.default(PLAIN, HOPPER))[0]
    assert dict(source.constants)["REGISTERS"] == gluon._REGISTERS
    assert dict(source.options)["num_warps"] == 4
