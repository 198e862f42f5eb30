"""The persistent scheduler on an NVIDIA GPU: every case that needs no split slots, by its own list and a shared one."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import cases
import helpers
import pytest
import torch

import mla_jit
from mla_jit import ahead, ops, plan, settings, target
from mla_jit.config import Config
from mla_jit.ops.decode import asm_persistent, persistent, persistent_gluon
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.ops.decode.worklist import work_list
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target
from mla_jit.tuning import bench

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MODES = (
    {}, {"max_split_per_batch": 1}, {"max_split_per_batch": 3}, {"intra_batch_mode": True},
    {"intra_batch_mode": True, "max_split_per_batch": 4},
)  # fmt: skip
CASES = tuple(
    dict.fromkeys(dataclasses.replace(case, num_kv_splits=None, batch_invariant=False) for case in cases.GPU)
)  # fmt: skip


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[cases.Case, cases.Call]:
    """The chosen cases' tensors, with their kernels in the cache."""
    parameters = helpers.parameters(request.session, __file__)
    calls = {p["listed"]: cases.build(p["listed"], DEVICE) for p in parameters if "listed" in p}
    here, jobs = target.of_device("cuda", 0), []
    for call in calls.values():
        problem = decode_inputs(call.q, call.kv_cache, **call.kwargs, scheduler="persistent").problem
        sources = persistent.sources(problem, here, persistent.default(problem, here))
        jobs += [ahead.Job(here.name, source, problem) for source in sources]
    ahead.build_all(list({job.source.key: job for job in jobs}.values()))
    return calls


FOLDED = CASES[::3]


def install(call: cases.Call, config_of: Callable[[DecodeProblem, Target], Config]) -> bool:
    """From now on calls like this one, with and without a list, have this config; False where its variant refuses."""
    here, chosen = target.of_device("cuda", 0), []
    for planned in (False, True):
        given = {name: value for name, value in call.kwargs.items() if name not in ("num_kv_splits", "batch_invariant")}
        problem = decode_inputs(call.q, call.kv_cache, **given, scheduler="persistent", planned=planned).problem
        exported = json.loads(plan.export([problem], here))
        config = config_of(problem, here)
        variant = next(v for v in ops.every("decode") if v.name == config.variant)
        if variant.rejects(problem, here, config) is not None:
            return False
        chosen.append({**exported["choices"][0], "config": config.to_json()})
    mla_jit.reload()
    assert plan.load(json.dumps({**exported, "choices": chosen}).encode(), here) == 2
    return True


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Choices that a test has installed are forgotten."""
    yield
    mla_jit.reload()


@pytest.fixture
def backends(request: pytest.FixtureRequest) -> Iterator[None]:
    """Calls are served by these backends alone, by all if none is named."""
    with settings.scope(backends=request.param):
        mla_jit.reload()
        yield
    mla_jit.reload()


def decode(call: cases.Call, **more: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = mla_jit.decode(call.q, call.kv_cache, **call.kwargs, **more)
    return result if call.case.lse else (result, None)


@pytest.mark.parametrize("listed", CASES, ids=lambda c: c.id)
@pytest.mark.usefixtures("forgotten")
def test_case(listed: cases.Case, built: dict[cases.Case, cases.Call]) -> None:
    call = built.pop(listed)
    assert install(call, persistent.default)
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


WARP_SPECIALISED = tuple(
    case for case in CASES
    if case.q_dtype == case.kv_dtype in ("bf16", "fp16") and case.page % 64 == 0 and not case.kv_view
    and case.C in (256, 512) and case.R in (0, 64)
)  # fmt: skip


@pytest.mark.parametrize("listed", WARP_SPECIALISED, ids=lambda c: c.id)
@pytest.mark.usefixtures("forgotten")
def test_a_case_in_gluon(listed: cases.Case) -> None:
    """Right with a list of its own and with a shared one, and the same bits."""
    call = cases.build(listed, DEVICE)
    assert install(call, persistent_gluon.default)
    call.poison()
    out, lse = decode(call, scheduler="persistent")
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == "decode_persistent_gluon"
    written = len(out) if "qo_indptr" not in call.kwargs else int(call.kwargs["qo_indptr"][-1])
    first = out[:written].clone()
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs)
    for _ in range(3):
        call.poison()
        again, lse = decode(call, metadata=metadata)
        cases.check(call, again, lse)
        assert torch.equal(again[:written].view(torch.uint8), first.view(torch.uint8))


def folding(problem: DecodeProblem, here: Target) -> Config:
    return persistent.default(problem, here).replace(fold=True)


FOLDS = {"decode_persistent_triton": folding, asm_persistent.NAME: asm_persistent.default}
IN_PTX = tuple(
    case for case in CASES
    if case.q_dtype == case.kv_dtype in ("bf16", "fp16") and "odd" not in (case.q_view, case.kv_view, case.out_view)
    and not case.kv_scale and case.C % 8 == case.R % 8 == 0 and case.C <= 512 and case.R <= 64
)  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "listed"),
    [("decode_persistent_triton", case) for case in FOLDED] + [(asm_persistent.NAME, case) for case in IN_PTX],
    ids=lambda v: v if isinstance(v, str) else v.id,
)
@pytest.mark.usefixtures("forgotten")
def test_a_folded_case(variant: str, listed: cases.Case) -> None:
    """Right, with no third kernel; the same bits from layer to layer, the counts being zero after each."""
    call = cases.build(listed, DEVICE)
    if not install(call, FOLDS[variant]):
        return  # its tensors lie in a way that the predicate refuses, which other tests are about
    call.poison()
    out, lse = decode(call, scheduler="persistent")
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == variant
    assert len(dispatch.kernels) == 2
    assert dispatch.kernels[1].name.endswith("schedule")
    written = len(out) if "qo_indptr" not in call.kwargs else int(call.kwargs["qo_indptr"][-1])
    first = out[:written].clone()
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs)
    for _ in range(3):
        call.poison()
        again, lse = decode(call, metadata=metadata)
        cases.check(call, again, lse)
        assert torch.equal(again[:written].view(torch.uint8), first.view(torch.uint8))
        assert not metadata.arrivals.any()


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("variant", FOLDS)
@pytest.mark.usefixtures("forgotten")
def test_whoever_is_last_the_bits_are_the_same(variant: str, heads: int) -> None:
    """200 calls of a batch in which every sequence is cut, in a graph of 10 layers."""
    case = cases.Case(heads=heads, lens=(9000, 30000, 64, 0, 5000), extra_pages=0, out_view="", **cases.PLAIN)
    call = cases.build(case, DEVICE)
    assert install(call, FOLDS[variant])
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs)
    assert int(metadata.sums[:, 1].max()) > 2
    first, _ = decode(call, metadata=metadata)
    cases.check(call, first, call.kwargs["lse"])
    first = first.clone()
    outs = [torch.empty_like(first) for _ in range(10)]
    layers = [call.changed(out=out) for out in outs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            decode(layer, metadata=metadata)
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out.view(torch.uint8), first.view(torch.uint8)) for out in outs)
    assert not metadata.arrivals.any()


@pytest.mark.parametrize("wishes", MODES, ids=str)
@pytest.mark.parametrize("heads", [16, 128])
def test_the_modes(heads: int, wishes: dict[str, Any]) -> None:
    case = cases.Case(heads=heads, lens=(9000, 1, 64, 0, 5000, 12345), extra_pages=0, out_view="", **cases.PLAIN)
    call = cases.build(case, DEVICE)
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.kwargs, **wishes)
    parts = metadata.sums[:, 1].tolist()
    assert max(parts) <= wishes.get("max_split_per_batch", 2**20)
    config = mla_jit.decode_plan(call.q, call.kv_cache, **call.kwargs, metadata=metadata).dispatch.config
    tiles = [-(-n // 64) for n in case.lens]
    want = work_list(
        tiles, len(metadata.groups) - 1, config.int("overhead"), wishes.get("max_split_per_batch", 1 << 20),
        even=wishes.get("intra_batch_mode", False),
    )  # fmt: skip
    assert metadata.groups.tolist() == list(want.groups)
    assert metadata.info[: len(want.info)].tolist() == [list(row) for row in want.info]
    assert metadata.sums.tolist() == [list(row) for row in want.sums]
    call.poison()
    out, lse = decode(call, metadata=metadata)
    cases.check(call, out, lse)


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("padded", [256, 1024])
@pytest.mark.parametrize(
    ("repeated", "backends"),
    [(True, ()), (False, ()), (True, ("triton",)), (False, ("triton",))],
    ids=["no query tokens", "a query token each", "no query tokens, triton", "a query token each, triton"],
    indirect=["backends"],
)
@pytest.mark.usefixtures("backends")
def test_padding_costs_less_than_a_percent(heads: int, padded: int, repeated: bool) -> None:
    """128 sequences of 4096 tokens in a call of more, the others empty; calls alternate in graphs, medians count.

    As a captured graph pads them, with a repeated qo_indptr; or with a query token each, whose zeros are written, too:
    these may take their bytes at 1 TB/s (16 heads × 896: 0.9 us a sequence of a group, one after the other).
    """
    shapes = [bench.Shape(heads, (4096,) * 128 + (0,) * (n - 128)) for n in (128, padded)]
    graphs, kept = {}, []
    for shape in shapes:
        (first, *_) = sets = bench.make_sets(shape)
        more: dict[str, Any] = {}
        if repeated:
            indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE).clamp(max=128)
            more = {"qo_indptr": indptr, "max_q_len": 1}

        def q_of(s: bench.Set, few: bool = repeated) -> torch.Tensor:
            return s.q[:128, 0] if few else s.q

        metadata = mla_jit.decode_metadata(q_of(first), first.cache, **first.keywords, **more)

        def call(s: bench.Set, metadata: Any = metadata, more: dict[str, Any] = more) -> torch.Tensor:
            return mla_jit.decode(q_of(s), s.cache, **s.keywords, **more, metadata=metadata)  # equal lengths: one list

        out = call(first).view(-1, 1, heads, 512)
        assert len(out) == (128 if repeated else shape.batch)
        assert bench.worst_row(out, first, [0, 64, 127]) < 8e-3
        assert not out[128:].any()
        graphs[str(shape.batch)] = bench.graph_of(call, sets)
        kept.append((sets, metadata, more))
        calls = len(sets)
    times = {name: statistics.median(us) for name, us in bench.time_alternating(graphs, calls).items()}
    zeros_us = 0.0 if repeated else (padded - 128) * heads * 512 * 2 / 1e6
    assert times[str(padded)] <= 1.01 * times["128"] + zeros_us, times


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
        tiles = [-(-n // persistent.UNIT) for n in lens]
        want = work_list(tiles, len(metadata.groups) - 1, config.int("overhead"))
        assert metadata.groups.tolist() == list(want.groups)
        assert metadata.info[: len(want.info)].tolist() == [list(row) for row in want.info]
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
