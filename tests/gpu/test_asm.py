"""The PTX templates on an NVIDIA GPU: every case that they accept, forced onto each; bits, replays, bounded waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cases
import helpers
import pytest
import torch
import triton
import triton.language as tl
from gpu.forced import (
    AHEAD,
    BF16,
    CHANGES,
    DEVICE,
    MIXED,
    SHARED,
    VARIANTS,
    WALK,
    configured,
    decode,
    heads_of,
    install,
)  # fmt: skip
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

import mla_jit
from mla_jit import ahead, settings, target
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.problem import DecodeProblem

pytestmark = pytest.mark.gpu
MINICPM3 = cases.Case(heads=40, lens=(4096,), lse=False, **{**BF16, "C": 256, "R": 32})

# Up to four sequences, cut alike: about as long as what is short for the default, and features that meet there. Their
# tables have room for longer ones.
SHORT = [
    cases.Case(heads=128, lens=(n,), **{**BF16, "page": page})
    for n, page in ((1, 64), (64, 1), (1000, 16), (1024, 64), (2048, 64), (2049, 64), (2047, 1), (5000, 64))
] + [
    cases.Case(heads=64, lens=(2000, 2048, 2040, 1999), **BF16),
    cases.Case(heads=40, lens=(900,), q_len=3, **{**BF16, "page": 7}),
    cases.Case(heads=128, lens=(1500, 1510), q_len=2, **{**BF16, "cap": 30.0, "sinks": True}),
    cases.Case(heads=96, lens=(2048,), csr=True, **{**BF16, "page": 1}),
    cases.Case(heads=40, lens=(2100, 2000), q_lens=(2, 1), csr=True, **{**BF16, "C": 256, "R": 32}),
    cases.Case(heads=64, lens=(3000,), cp=(1, 2), **BF16),
    cases.Case(heads=64, lens=(130,), **{**BF16, "out_dtype": "fp32"}),
    cases.Case(heads=128, kv_heads=2, lens=(1024,), **BF16),
]  # fmt: skip
SHORT = [dataclasses.replace(case, extra_pages=5000 // case.page) for case in SHORT]


def accepted(name: str) -> list[cases.Case]:
    """The cases that a variant takes; told without a GPU."""
    variant, hopper = VARIANTS[name], target.by_name("sm_90")
    found: list[cases.Case] = []
    for case in dict.fromkeys((*cases.GPU, MINICPM3, *(SHORT if name == MIXED else ()))):
        plain = case.q_dtype == case.kv_dtype in ("bf16", "fp16") and "odd" not in (case.q_view, case.kv_view)
        rows = case.heads // case.kv_heads * max(case.q_tokens, default=1)
        config = variant.default(DecodeProblem(num_heads=max(1, rows)), hopper)
        problem = DecodeProblem(num_heads=max(1, rows), kv_lora_rank=case.C, rope_dim=case.R, batch=len(case.lens))
        if name in SHARED and (
            case.page % 8 or -(-rows // 64) % 2 or (case.q_lens and case.heads // case.kv_heads % 128)
        ):
            continue  # nothing to share
        if SHARED.get(name, name) == WALK and (len(case.lens) == 1 or case.num_kv_splits or case.batch_invariant):
            continue  # nothing to walk
        if name == AHEAD and max(case.lens, default=0) < 1000:
            continue  # few pieces
        if plain and variant.rejects(problem, hopper, config) is None:
            found.append(case)
    return found


CASES = [(name, case) for name in VARIANTS for case in accepted(name)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Choices that a test has installed are forgotten."""
    yield
    mla_jit.reload()


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> dict[tuple[str, cases.Case], cases.Call]:
    """The chosen cases' tensors, with their kernels in the cache."""
    here = target.of_device("cuda", 0)
    parameters = helpers.parameters(request.session, __file__)
    chosen = [each["which"] for each in parameters if "which" in each]
    calls, jobs = {}, []
    for name, case in chosen:
        call = calls[name, case] = cases.build(case, DEVICE)
        problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
        config = configured(problem, here, name)
        if VARIANTS[name].rejects(problem, here, config) is None:
            jobs += [ahead.Job(here.name, source, problem) for source in VARIANTS[name].sources(problem, here, config)]
    ahead.build_all(list({job.source.key: job for job in jobs}.values()))
    return calls


@pytest.mark.parametrize("which", CASES, ids=lambda w: f"{w[0]}-{w[1].id}")
def test_case(which: tuple[str, cases.Case], built: dict[tuple[str, cases.Case], cases.Call]) -> None:
    call = built.pop(which)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    if install(problem, which[0]) is None:
        return  # its tensors lie in a way that the predicate refuses, which other tests are about
    call.poison()
    out, lse = decode(call)
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == VARIANTS[which[0]].name
    first = out.clone()
    call.poison()
    again, _ = decode(call)
    written = len(first) if "qo_indptr" not in call.kwargs else int(call.kwargs["qo_indptr"][-1])
    assert torch.equal(again[:written].view(torch.uint8), first[:written].view(torch.uint8))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("page", [64, 1])
def test_a_graph_replayed_with_changed_lengths(name: str, page: int) -> None:
    heads = heads_of(name)
    long = cases.Case(heads=heads, lens=(5000, 3000, 700, 64), **{**BF16, "page": page})
    call = cases.build(long, DEVICE)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    assert install(problem, name) is not None
    replay(call, (1, 3000, 0, 64), (4999, 65, 128, 1), long.lens)


@pytest.mark.parametrize("heads", [40, 128])
@pytest.mark.parametrize("page", [64, 1])
@pytest.mark.parametrize("middle", [0, 6000])
def test_a_graph_of_a_sequence_that_turns_out_short_or_long(heads: int, page: int, middle: int) -> None:
    call = cases.build(cases.Case(heads=heads, lens=(9000,), **{**BF16, "page": page}), DEVICE)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    assert install(problem, MIXED, short=2048, short_m=16, middle=middle) is not None
    replay(call, (2048,), (1,), (9000,), (2049,), (6000,), (0,), (6001,), (65,))


def replay(call: cases.Call, *lengths: tuple[int, ...]) -> None:
    """A call, captured, then replayed with other lengths."""
    out, lse = decode(call)  # compiles and loads
    cases.check(call, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(call)
    for shorter in lengths:
        call.kwargs["seq_lens"].copy_(torch.tensor(shorter, device=DEVICE))
        call._expected = None
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        expected, _ = call.expected()
        found = out.double().reshape(expected.shape)
        gap = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
        owned = torch.tensor([n > 0 for n in shorter], device=DEVICE)
        assert (gap[owned] <= 6e-3).all()
        assert (found[~owned] == 0).all()


TOGETHER = [
    cases.Case(heads=16, lens=(4096,) * 4, **BF16),
    cases.Case(heads=20, lens=(4096, 4095, 4000, 4090), **{**BF16, "sinks": True}),
    cases.Case(heads=64, lens=(5000, 64, 1, 0, 3000), **BF16),
    cases.Case(heads=40, lens=(1000,) * 3, q_len=2, **{**BF16, "cap": 30.0}),
    cases.Case(heads=128, lens=(130, 129, 127), **{**BF16, "page": 16}),
    cases.Case(heads=8, lens=(700,), **{**BF16, "C": 256, "R": 32, "out_dtype": "fp32"}),
]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, v in VARIANTS.items()
        if True in v.space.get("together", ()) and not CHANGES.get(name, {}).get("walk")
    ],
)
@pytest.mark.parametrize("case", TOGETHER, ids=lambda case: case.id)
def test_pieces_are_put_together_by_pairs(name: str, case: cases.Case) -> None:
    """Sequences cut alike by pairs of programs, uneven ones by the combine; always with the same bits."""
    call = cases.build(case, DEVICE)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    assert install(problem, name, together=True, num_kv_splits=2, min_tiles=1) is not None
    first = None
    for _ in range(3):
        call.poison()
        out, lse = decode(call)
        cases.check(call, out, lse)
        dispatch = mla_jit.last_dispatch()
        assert dispatch is not None
        assert dispatch.config["together"] is True
        assert first is None or torch.equal(out.view(torch.uint8), first)
        first = out.view(torch.uint8).clone()


@pytest.mark.parametrize("name", VARIANTS)
def test_bounded_waits_end_well(name: str) -> None:
    """The debug build gives the same bits, and no wait of it is in vain."""
    call = cases.build(cases.Case(heads=heads_of(name), lens=(5000, 64, 1), **BF16), DEVICE)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    assert install(problem, name) is not None
    plain, _ = decode(call)
    with settings.scope(bounded_waits=True):
        assert install(problem, name) is not None
        bounded, lse = decode(call)
    cases.check(call, bounded, lse)
    assert torch.equal(plain, bounded)


@triton.jit
def _written_late(to, values, COUNT: tl.constexpr):
    """A kernel that lets the next one start, and writes only then."""
    gdc_wait()
    gdc_launch_dependents()
    at = tl.arange(0, COUNT)
    late = tl.inline_asm_elementwise(
        "nanosleep.u32 20000; mov.b32 $0, $1;", "=r,r", [tl.load(values + at)], tl.int32, is_pure=False, pack=1
    )
    tl.store(to + at, late)


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("before", ["a kernel", "a copy", "a join", "a kernel that lets us start"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_call_reads_what_came_right_before_it(name: str, before: str, captured: bool) -> None:
    """A launch may begin before what comes before it has ended. Each call's q is the result of the one before; right
    before some of them the cache and the lengths are written, too. The same bits as with everybody waited for."""
    steps, heads = 24, heads_of(name)
    generator = torch.Generator(DEVICE).manual_seed(5)
    cache = torch.randn(64, 64, 576, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    fresh = torch.randn(steps, 64, 576, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    table = torch.randperm(64, generator=generator, device=DEVICE).to(torch.int32).reshape(2, 32)
    start = torch.tensor([700, 1500], dtype=torch.int32, device=DEVICE)
    lens_of = start + 17 * torch.arange(steps, dtype=torch.int32, device=DEVICE)[:, None]
    first = torch.randn(2, heads, 576, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    side = torch.cuda.Stream()

    def write(i: int, kv: torch.Tensor, lens: torch.Tensor) -> None:
        kv[i].copy_(fresh[i])
        if before == "a kernel":
            torch.add(lens_of[i], 0, out=lens)
        elif before == "a copy":
            lens.copy_(lens_of[i])
        else:
            _written_late[(1,)](lens, lens_of[i], COUNT=2, num_warps=1, launch_pdl=True)

    results = []
    for waits in (True, False):
        kv, lens, q = cache.clone(), start.clone(), first.repeat(steps + 1, 1, 1, 1)
        keywords: dict[str, Any] = {"kv_lora_rank": 512, "sm_scale": 0.2, "block_table": table, "seq_lens": lens}

        def run(kv: torch.Tensor = kv, lens: torch.Tensor = lens, q: torch.Tensor = q, waits: bool = waits,
                keywords: dict[str, Any] = keywords) -> None:  # fmt: skip
            for i in range(steps):
                if i % 3 and before == "a join":
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side):
                        write(i, kv, lens)
                    torch.cuda.current_stream().wait_stream(side)
                elif i % 3:
                    write(i, kv, lens)
                if waits:
                    torch.cuda.synchronize()
                mla_jit.decode(q[i], kv, out=q[i + 1, :, :, :512], **keywords)

        problem = decode_inputs(q[0], kv, **keywords, out=q[1, :, :, :512]).problem
        assert install(problem, name) is not None
        mla_jit.decode(q[0], kv, out=torch.empty_like(q[1])[:, :, :512], **keywords)  # compiles and loads
        if captured and not waits:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            kv.copy_(cache)
            lens.copy_(start)
            graph.replay()
        else:
            run()
        torch.cuda.synchronize()
        results.append(q[1:, :, :, :512].clone())
    assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))
