"""Prefill and merge on an NVIDIA GPU through the public functions: `pytest -m gpu tests/gpu/test_prefill.py`.

Each case runs with both schedulers. Their kernels are compiled at once, on all CPUs, before the first case runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import helpers
import prefill_cases as cases
import pytest
import torch

import mla_jit
from mla_jit import ahead, errors, target
from mla_jit.ops.prefill.inputs import prefill_inputs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SCHEDULERS = {
    "tiles": ("prefill_gluon", "prefill_triton"),
    "persistent": ("prefill_persistent_gluon", "prefill_persistent_triton"),
}
PROMPTS = tuple(dataclasses.replace(case, scheduler=name) for case in cases.GPU for name in SCHEDULERS)
Result = tuple[torch.Tensor, torch.Tensor | None]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> set[cases.Case]:
    """The chosen cases; their kernels are in the cache. Tensors are made by each test: together they are gigabytes."""
    parameters = helpers.parameters(request.session, __file__)
    chosen = {p["prompt"] for p in parameters if "prompt" in p}
    there, problems = target.of_device("cuda", 0), []
    for case in chosen:
        call = cases.build(case, DEVICE)
        problems.append(prefill_inputs(call.q, call.k, call.v, **call.kwargs).problem)
    outcomes = ahead.build_all(ahead.jobs_of(problems, there).jobs)
    assert [each.error for each in outcomes if not each.ok] == []
    return chosen


def prefill(call: cases.Call, **changes: Any) -> Result:
    result = mla_jit.prefill(call.q, call.k, call.v, **{**call.kwargs, **changes})
    return result if call.case.lse else (result, None)


def leave_nan(*sizes: int) -> None:
    """Blocks of these sizes in bytes, full of NaN, handed back: what the next allocations are likely to get."""
    blocks = [torch.full((-(-size // 4),), float("nan"), device=DEVICE) for size in sizes]
    del blocks


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda c: c.id)
def test_case(prompt: cases.Case, built: set[cases.Case], record_property: Any) -> None:
    assert prompt in built
    call = cases.build(prompt, DEVICE)
    call.poison()
    rows = call.q.shape[0] * prompt.heads
    leave_nan(rows * prompt.DV * 4, rows * prompt.DV * 2, rows * 4)
    figures = cases.check(call, *prefill(call))
    record_property("rel_l2", figures.rel_l2)
    record_property("lse_error", figures.lse_error)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant in SCHEDULERS[prompt.scheduler]


SAME = (
    cases.Case(**cases.MLA, heads=16, kv_heads=16, q_lens=(900, 33, 128)),
    cases.Case(**cases.MLA, heads=2, kv_heads=2, q_lens=(40,), kv_lens=(9000,)),
)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("same", SAME, ids=lambda c: c.id)
def test_the_same_inputs_give_the_same_bits(same: cases.Case, scheduler: str) -> None:
    call = cases.build(same, DEVICE)
    out, lse = prefill(call, scheduler=scheduler)
    cases.check(call, out, lse)
    assert lse is not None
    for _ in range(5):
        leave_nan(out.numel() * 2, lse.numel() * 4)
        again, again_lse = prefill(call, scheduler=scheduler)
        assert torch.equal(again[call.owned], out[call.owned])
        assert torch.equal(again_lse[call.owned], lse[call.owned])  # type: ignore[index]


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_graph_serves_other_lengths(scheduler: str, heads: int) -> None:
    """Captured once; then the contents of the indptrs and tensors change, in tensors of the same shapes."""
    plain = cases.Case(
        **cases.MLA, heads=heads, kv_heads=heads, q_lens=(500, 300, 200), kv_lens=(900, 300, 600), out_view="", tail=0
    )
    call = cases.build(plain, DEVICE)
    kwargs = {"scheduler": scheduler, "max_q_len": 1000}
    prefill(call, **kwargs)  # compiled and loaded before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill(call, **kwargs)
    for q_lens, kv_lens in (
        ((500, 300, 200), (900, 300, 600)), ((1000, 0, 0), (1800, 0, 0)), ((1, 998, 1), (900, 100, 800)),
        ((0, 0, 64), (0, 0, 1700)), ((0, 0, 0), (3, 4, 5)), ((128, 256, 384), (128, 256, 384)),
    ):  # fmt: skip
        tails = 1000 - sum(q_lens), 1800 - sum(kv_lens)
        other = cases.build(dataclasses.replace(plain, q_lens=q_lens, kv_lens=kv_lens), DEVICE)
        for mine, theirs, tail in (
            (call.q, other.q, tails[0]),
            (call.k, other.k, tails[1]),
            (call.v, other.v, tails[1]),
        ):
            mine[: len(mine) - tail].copy_(theirs)
            mine[len(mine) - tail :] = float("nan")
        for name in ("qo_indptr", "kv_indptr"):
            call.kwargs[name].copy_(other.kwargs[name])
        call.poison()
        graph.replay()
        torch.cuda.synchronize()
        owned = sum(q_lens)
        cases.check(other, call.kwargs["out"][:owned], call.kwargs["lse"][:owned])
        assert bool(call.kwargs["out"][owned:].isnan().all())


def test_a_workspace_of_the_size_asked_for_is_enough() -> None:
    """It starts as NaN, nothing is written beside it, and less is refused."""
    call = cases.build(cases.Case(**cases.MLA, q_lens=(40,), kv_lens=(9000,), scheduler="persistent"), DEVICE)
    out, _ = prefill(call)
    size, red = mla_jit.last_dispatch().workspace_bytes, 1 << 16  # type: ignore[union-attr]
    memory = torch.full((size + 2 * red,), 0xFF, dtype=torch.uint8, device=DEVICE)
    result = prefill(call, workspace=memory[red : red + size])
    cases.check(call, *result)
    assert torch.equal(result[0][call.owned], out[call.owned])
    assert bool((memory[:red] == 0xFF).all())
    assert bool((memory[red + size :] == 0xFF).all())
    with pytest.raises(errors.InvalidInput, match=r"^workspace has \d+ bytes"):
        prefill(call, workspace=memory[: size - 1])


def test_offsets_beyond_31_bits() -> None:
    """Keys behind 2^31 elements of NaN."""
    heads, far = 128, 2**31 // (128 * 192) + 100
    k = torch.full((far + 300, heads, 192), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    v = torch.full((far + 300, heads, 128), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    call = cases.build(
        cases.Case(**cases.MLA, heads=heads, kv_heads=heads, q_lens=(200,), kv_lens=(300,), tail=0), DEVICE
    )
    k[far:], v[far:] = call.k, call.v
    moved = {**call.kwargs, "kv_indptr": call.kwargs["kv_indptr"] + far}
    for scheduler in SCHEDULERS:
        cases.check(call, *mla_jit.prefill(call.q, k, v, **{**moved, "scheduler": scheduler}))


def test_two_streams_at_once() -> None:
    calls = [
        cases.build(cases.Case(**cases.MLA, q_lens=q, kv_lens=k, scheduler="persistent"), DEVICE)
        for q, k in (((40,), (9000,)), ((300, 20), (300, 4000)))
    ]
    expected = [prefill(call) for call in calls]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[Result]] = [[], []]
    for _ in range(20):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                results[i].append(prefill(calls[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        cases.check(calls[i], *expected[i])
        assert all(torch.equal(out[calls[i].owned], expected[i][0][calls[i].owned]) for out, _ in results[i])


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dim"), [(16, 128), (3, 512), (5, 40)])
def test_merge(dtype: torch.dtype, heads: int, dim: int, base: str) -> None:
    generator = torch.Generator(device=DEVICE).manual_seed(dim)
    a, b = (torch.randn(1001, heads, dim, generator=generator, device=DEVICE).to(dtype) for _ in "ab")
    lses = torch.randn(2, 1001, heads, generator=generator, device=DEVICE) * 5
    lses[0, 0], lses[1, 1], lses[:, 2] = -torch.inf, -torch.inf, -torch.inf
    a[0], b[1], a[2], b[2] = torch.nan, torch.nan, torch.nan, torch.nan
    unit = 0.6931471805599453 if base == "2" else 1.0
    known = lses.double() * unit
    want_lse = torch.logaddexp(*known)
    weights = torch.exp(known - torch.where(want_lse == -torch.inf, 0.0, want_lse))
    want = sum(w[..., None] * x.double().nan_to_num(0.0) for w, x in zip(weights, (a, b), strict=True))
    for in_place in (False, True):
        more = {"out": a, "lse": lses[0]} if in_place else {}
        out, lse = mla_jit.merge_state(a, lses[0], b, lses[1], lse_base=base, **more)
        error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
        assert float(error.max()) <= (1e-5 if dtype == torch.float32 else 6e-3)
        gap = torch.where(lse == -torch.inf, (want_lse != -torch.inf).double(), (lse.double() * unit - want_lse).abs())
        assert float(gap.max()) <= 1e-4


@pytest.mark.parametrize("q_len", [64, 700])
def test_paged_prefill_is_prefill_of_the_same_keys(q_len: int) -> None:
    heads, rank, rope, page, kv_lens = 16, 512, 64, 64, (1500, 900)
    generator = torch.Generator(device=DEVICE).manual_seed(q_len)
    pages = [-(-n // page) for n in kv_lens]
    cache = torch.randn(sum(pages), page, rank + rope, generator=generator, device=DEVICE).bfloat16()
    q = torch.randn(2 * q_len, heads, rank + rope, generator=generator, device=DEVICE).bfloat16()
    table = torch.zeros(2, max(pages), dtype=torch.int32, device=DEVICE)
    for b, n in enumerate(pages):
        table[b, :n] = torch.arange(n, device=DEVICE) + sum(pages[:b])
    qo = torch.tensor([0, q_len, 2 * q_len], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE)
    out, lse = mla_jit.prefill_paged(
        q, cache, kv_lora_rank=rank, sm_scale=0.07, block_table=table, seq_lens=lens, qo_indptr=qo, max_q_len=q_len,
        return_lse=True,
    )  # fmt: skip
    from mla_jit.ops.decode import reference

    want, want_lse = reference.decode(
        q, cache, kv_lora_rank=rank, sm_scale=0.07, block_table=table, seq_lens=lens, qo_indptr=qo
    )
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(error.max()) <= 6e-3
    assert float((lse.double() - want_lse).abs().max()) <= 1e-3


def test_a_miss_under_capture_names_the_kernel() -> None:
    call = cases.build(cases.Case(**cases.MLA, heads=7, kv_heads=7, q_lens=(33,), out_view=""), DEVICE)
    count = torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(errors.CacheMiss, match="capture"):
            prefill(call)
        count += 1
    graph.replay()
    assert count.item() == 1
    cases.check(call, *prefill(call))
