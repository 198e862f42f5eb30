"""The other libraries' spellings on a GPU: their results, and that nothing in them waits for the device."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
from cases import Case
from unit.test_compat import (
    AITER_CASES,
    FLASH_MLA_CASES,
    aiter_arguments,
    flash_mla_arguments,
    metadata_arguments,
    work_buffers,
)

import mla_jit
from mla_jit.compat.aiter import get_mla_metadata_v1, mla_decode_fwd
from mla_jit.compat.flash_mla import flash_mla_with_kvcache

pytestmark = pytest.mark.gpu


def on_gpu(made: tuple[Case, ...]) -> Any:
    kept = [dataclasses.replace(c, q_dtype="bf16", kv_dtype="bf16") if c.q_dtype == "fp32" else c for c in made]
    return pytest.mark.parametrize("case", list(dict.fromkeys(kept)), ids=lambda case: case.id)


@on_gpu(AITER_CASES)
@pytest.mark.parametrize("captured", [False, True])
def test_aiter_decode(case: Case, captured: bool) -> None:
    call = cases.build(case, "cuda")
    arguments = aiter_arguments(call)
    _, lse = mla_decode_fwd(**arguments, return_lse=True)
    if captured:  # a call that reads from the device cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, lse = mla_decode_fwd(**arguments, return_lse=True)
        arguments["o"].fill_(torch.nan)
        graph.replay()
    cases.check(call, arguments["o"], lse)


@on_gpu(AITER_CASES)
@pytest.mark.parametrize("modes", [{}, {"intra_batch_mode": True, "max_split_per_batch": 2}], ids=str)
def test_aiter_decode_by_a_schedule(case: Case, modes: dict[str, Any]) -> None:
    """Buffers for a larger batch; the schedule and three layers in a graph."""
    call = cases.build(case, "cuda")
    work = work_buffers(call, batch=2 * len(case.lens))
    metadata = metadata_arguments(call, work, **modes)
    arguments = aiter_arguments(call)
    get_mla_metadata_v1(**metadata)
    _, lse = mla_decode_fwd(**arguments, **work, return_lse=True)
    cases.check(call, arguments["o"], lse)
    assert mla_jit.last_dispatch().variant in ("decode_persistent_asm", "decode_persistent_triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        get_mla_metadata_v1(**metadata)
        for _ in range(3):
            _, lse = mla_decode_fwd(**arguments, **work, return_lse=True)
    work["work_info_set"].fill_(-7)
    work["reduce_partial_map"].fill_(-7)
    arguments["o"].fill_(torch.nan)
    graph.replay()
    cases.check(call, arguments["o"], lse)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_aiter_context_parallel(rank: int) -> None:
    case = Case(
        csr=True,
        csr_lens=True,
        page=1,
        q_lens=(3, 1, 2),
        lens=(50, 1, 31),
        cp=(rank, 3),
        q_dtype="bf16",
        kv_dtype="bf16",
    )
    call = cases.build(case, "cuda")
    arguments = aiter_arguments(call)
    g_kv_indptr = torch.tensor([0, 50, 51, 82], dtype=torch.int32, device="cuda")
    _, lse = mla_decode_fwd(**arguments, return_lse=True, g_kv_indptr=g_kv_indptr, cp_world_size=3, cp_rank=rank)
    cases.check(call, arguments["o"], lse)


@on_gpu(FLASH_MLA_CASES)
@pytest.mark.parametrize("captured", [False, True])
def test_flash_mla_decode(case: Case, captured: bool) -> None:
    call = cases.build(case, "cuda")
    arguments = flash_mla_arguments(call)
    out, lse = flash_mla_with_kvcache(**arguments)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = flash_mla_with_kvcache(**arguments)
        out.fill_(torch.nan)
        graph.replay()
    batch, q_len, heads = call.q.shape[:3]
    assert lse.shape == (batch, heads, q_len)
    assert lse.is_contiguous()
    empty = call.expected()[1].transpose(1, 2) == -torch.inf
    assert torch.equal(lse == torch.inf, empty)
    cases.check(call, out, torch.where(empty, -torch.inf, lse).transpose(1, 2))
