"""Two GPUs in one process: calls go where their tensors are, whichever device is current. Skipped with one GPU."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

import mla_jit
from mla_jit import settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs in one process")]

CASES = (
    cases.Case(heads=16, lens=(3000, 1, 0, 65), **cases.PLAIN),
    cases.Case(heads=128, lens=(5000,), **cases.PLAIN),
    cases.Case(heads=64, lens=(700, 129), q_len=2, **{**cases.PLAIN, "page": 1}),
    cases.Case(heads=16, lens=(900, 64), **{**cases.PLAIN, **cases.FP8}),
)


@pytest.mark.parametrize("backends", ["", "triton"], ids=["all", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_call_runs_where_its_tensors_are(case: cases.Case, backends: str) -> None:
    """In turn on both devices while 0 is current: the same bits, and the current device is what it was."""
    calls = [cases.build(case, f"cuda:{index}") for index in (1, 0)]
    with settings.scope(backends=tuple(backends.split())), torch.cuda.device(0):
        mla_jit.reload()
        for _ in range(3):
            results = [mla_jit.decode(call.q, call.kv_cache, **call.kwargs) for call in calls]
            assert torch.cuda.current_device() == 0
            for call, (out, lse) in zip(calls, results, strict=True):
                assert out.device == lse.device == call.q.device
                torch.cuda.synchronize(out.device)
                cases.check(call, out, lse)
            assert torch.equal(results[0][0].cpu(), results[1][0].cpu())
            assert torch.equal(results[0][1].cpu(), results[1][1].cpu())
    mla_jit.reload()


@pytest.mark.parametrize("current", [0, 1])
def test_a_graph_of_the_second_device(current: int) -> None:
    """Captured on device 1's stream, replayed while another device is current."""
    call = cases.build(cases.Case(heads=128, lens=(4096, 300), out_view="", **cases.PLAIN), "cuda:1")
    mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    torch.cuda.synchronize(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=torch.cuda.Stream(1)):  # the default one is of one device
        mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    call.poison()
    torch.cuda.synchronize(1)
    with torch.cuda.device(current):
        graph.replay()
    torch.cuda.synchronize(1)
    cases.check(call, call.kwargs["out"], call.kwargs["lse"])


@pytest.mark.parametrize("heads", [16, 128])
def test_two_ranks_of_one_context(heads: int) -> None:
    """Each GPU holds every second token of each sequence; `merge_state` makes of both what one GPU gives."""
    generator = torch.Generator().manual_seed(heads)
    lens, page, world = (3001, 64, 1, 130), 64, 2
    q = torch.randn(len(lens), heads, 576, generator=generator).to(torch.bfloat16)
    tokens = [torch.randn(n, 576, generator=generator).to(torch.bfloat16) for n in lens]
    options: dict[str, Any] = {"kv_lora_rank": 512, "sm_scale": 192**-0.5, "return_lse": True}

    def decoded(device: str, held: list[torch.Tensor], **ranks: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pages = [max(1, -(-len(t) // page)) for t in held]
        kv_cache = torch.full((sum(pages), page, 1, 576), torch.nan, dtype=torch.bfloat16)
        table = torch.full((len(held), max(pages)), -1, dtype=torch.int32)
        for b, t in enumerate(held):
            first = sum(pages[:b])
            kv_cache[first : first + pages[b]].view(-1, 576)[: len(t)] = t
            table[b, : pages[b]] = torch.arange(first, first + pages[b])
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        out, lse = mla_jit.decode(
            q.to(device), kv_cache.to(device), block_table=table.to(device), seq_lens=seq_lens, **options, **ranks
        )
        return out, lse

    want, want_lse = decoded("cuda:0", tokens)
    parts = [
        decoded(f"cuda:{rank}", [t[rank::world] for t in tokens], cp_rank=rank, cp_world=world) for rank in range(world)
    ]
    assert [out.device.index for out, _ in parts] == [0, 1]
    for device in (0, 1):
        (a, lse_a), (b, lse_b) = ([t.to(f"cuda:{device}") for t in part] for part in parts)
        out, lse = mla_jit.merge_state(a, lse_a, b, lse_b)
        assert out.device.index == device
        error = (out.cpu().double() - want.cpu().double()).norm(dim=-1) / want.cpu().double().norm(dim=-1)
        assert error.max() < 8e-3  # three roundings to bf16: of each part, and of their sum
        assert (lse.cpu() - want_lse.cpu()).abs().max() < 1e-3
