"""The torch operators on a GPU: the bits of `mla_jit.decode`, under torch.compile and in CUDA graphs."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
from cases import Case
from unit.test_torch_ops import CASES, compiled, keywords, opcheck, operands, results

import mla_jit

pytestmark = pytest.mark.gpu

BF16 = [dataclasses.replace(c, q_dtype="bf16", kv_dtype="bf16") if c.q_dtype == "fp32" else c for c in CASES]
by_id = pytest.mark.parametrize("case", BF16, ids=lambda case: case.id)


@by_id
def test_operators_give_the_bits_of_decode(case: Case) -> None:
    call = cases.build(case, "cuda")
    want_out, want_lse = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    cases.check(call, want_out, want_lse)
    out, lse = torch.ops.mla_jit.decode(*operands(call), **keywords(call))
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)
    out, lse = results(call)
    torch.ops.mla_jit.decode_out(*operands(call), **keywords(call), out=out, lse=lse)
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)


@by_id
def test_opcheck(case: Case) -> None:
    call = cases.build(case, "cuda")
    opcheck(torch.ops.mla_jit.decode.default, call)
    out, lse = results(call)
    opcheck(torch.ops.mla_jit.decode_out.default, call, out=out.fill_(1.0), lse=lse.fill_(1.0))


@by_id
@pytest.mark.parametrize("backend", ["aot_eager", "cudagraphs"])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch captures one to make a memory pool
def test_compiled_decode(case: Case, backend: str) -> None:
    call = cases.build(case, "cuda")
    want = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    function = compiled(mla_jit.decode, backend)
    for _ in range(3):  # warm-up, capture, replay
        out, lse = function(call.q, call.kv_cache, **call.kwargs)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize("splits", [1, 5])
def test_a_captured_operator_replayed_at_other_lengths(splits: int) -> None:
    calls = [
        cases.build(
            Case(q_dtype="bf16", kv_dtype="bf16", lens=lens, num_kv_splits=splits, page=64, extra_pages=extra), "cuda"
        )
        for lens, extra in (((900, 1), 2), ((64, 700), 6), ((0, 1000), 1))
    ]
    first = calls[0]
    tables = [c.kwargs["block_table"] for c in calls]
    assert {t.shape for t in tables} == {tables[0].shape}
    pages = max(c.kv_cache.shape[0] for c in calls)
    cache = first.kv_cache.new_full((pages, *first.kv_cache.shape[1:]), torch.nan)
    q, table, lens = first.q.clone(), tables[0].clone(), first.kwargs["seq_lens"].clone()
    out, lse = results(first)
    kwargs = {**keywords(first), "block_table": table, "seq_lens": lens, "out": out, "lse": lse}
    torch.ops.mla_jit.decode_out(q, None, cache, None, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.mla_jit.decode_out(q, None, cache, None, **kwargs)
    for call in calls:
        q.copy_(call.q)
        table.copy_(call.kwargs["block_table"])
        lens.copy_(call.kwargs["seq_lens"])
        cache.fill_(torch.nan)[: call.kv_cache.shape[0]] = call.kv_cache
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        cases.check(call, out, lse)
