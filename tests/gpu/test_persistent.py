"""The persistent scheduler on an NVIDIA GPU: every case that needs no split slots, by its own list and a shared one."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import cases
import pytest
import torch

import mla_jit
from mla_jit import ahead, target
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.ops.decode.worklist import work_list

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = tuple(
    dict.fromkeys(dataclasses.replace(case, num_kv_splits=None, batch_invariant=False) for case in cases.GPU)
)  # fmt: skip


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[cases.Case, cases.Call]:
    """The chosen cases' tensors, with their kernels in the cache."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    calls = {p["listed"]: cases.build(p["listed"], DEVICE) for p in parameters if "listed" in p}
    problems = [
        decode_inputs(call.q, call.kv_cache, **call.kwargs, scheduler="persistent").problem for call in calls.values()
    ]
    ahead.build_all(ahead.jobs_of(problems, target.of_device("cuda", 0)).jobs)
    return calls


def decode(call: cases.Call, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = mla_jit.decode(call.q, call.kv_cache, **call.kwargs, **more)
    return result if call.case.lse else (result, None)


@pytest.mark.parametrize("listed", CASES, ids=lambda c: c.id)
def test_case(listed: cases.Case, built: dict[cases.Case, cases.Call]) -> None:
    call = built.pop(listed)
    call.poison()
    out, lse = decode(call, scheduler="persistent")
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == "decode_persistent_triton"
    first = out.clone()
    call.poison()
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs)
    again, lse = decode(call, metadata=metadata)
    cases.check(call, again, lse)
    written = len(first) if "qo_indptr" not in call.kwargs else int(call.kwargs["qo_indptr"][-1])
    again, first = again[:written], first[:written]
    assert torch.equal(again.view(torch.uint8), first.view(torch.uint8))  # the same inputs, the same bits


def test_the_list_is_the_hosts() -> None:
    rng = random.Random(0)
    for batch in (1, 3, 64, 257, 1500):
        lens = [rng.choice((0, 1, 63, 64, 65, rng.randrange(30000))) for _ in range(batch)]
        table = torch.zeros(batch, 512, dtype=torch.int32, device=DEVICE)
        q = torch.zeros(batch, 16, 576, dtype=torch.bfloat16, device=DEVICE)
        cache = torch.zeros(512, 64, 576, dtype=torch.bfloat16, device=DEVICE)
        arguments = {
            "kv_lora_rank": 512, "sm_scale": 0.1, "block_table": table,
            "seq_lens": torch.tensor(lens, dtype=torch.int32, device=DEVICE),
        }  # fmt: skip
        metadata = mla_jit.decode_metadata(q, cache, **arguments)
        call = mla_jit.decode_plan(q, cache, **arguments, metadata=metadata)
        config = call.dispatch.config
        tiles = [-(-n // config.int("block_n")) for n in lens]
        want = work_list(tiles, len(metadata.groups) - 1, config.int("overhead"))
        assert metadata.groups.tolist() == list(want.groups)
        assert metadata.info.tolist() == [list(row) for row in want.info]
        assert metadata.sums.tolist() == [list(row) for row in want.sums]


@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_with_its_list_serves_other_lengths(heads: int) -> None:
    case = cases.Case(heads=heads, lens=(4096,) * 6, extra_pages=64, out_view="", **cases.PLAIN)
    call = cases.build(case, DEVICE)
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs)
    decode(call, metadata=metadata)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs, metadata=metadata)
        for _ in range(3):  # layers
            decode(call, metadata=metadata)
    for lens in ((4096, 1, 0, 777, 65, 2000), (0,) * 6, (64,) * 6, (1, 1, 1, 1, 1, 4095)):
        call.kwargs["seq_lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        call.poison()
        call._expected = None
        graph.replay()
        torch.cuda.synchronize()
        cases.check(call, call.kwargs["out"], call.kwargs["lse"])
