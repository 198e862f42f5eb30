"""Decode on an NVIDIA GPU through the public function: `pytest -m gpu tests/gpu`.

All kernels of the chosen cases are compiled at once, on all CPUs, before the first case runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import cases
import helpers
import pytest
import torch

import mla_jit
from mla_jit import ahead, errors, settings, target
from mla_jit.dtypes import DTYPES
from mla_jit.ops.decode.inputs import decode_inputs

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16 = cases.PLAIN
SCALED = {**BF16, **cases.FP8, "scaled": "buffers"}
Result = tuple[torch.Tensor, torch.Tensor | None]

_figures: dict[str, list[tuple[cases.Figures, str]]] = {}


@pytest.fixture(scope="session")
def built(request: pytest.FixtureRequest) -> Iterator[dict[cases.Case, cases.Call]]:
    """The chosen cases' tensors, with their kernels in the cache; afterwards the worst figures are printed."""
    started = time.perf_counter()
    parameters = helpers.parameters(request.session, __file__)
    calls = {p["case"]: cases.build(p["case"], DEVICE) for p in parameters if "case" in p}
    problems = [decode_inputs(call.q, call.kv_cache, **call.kwargs).problem for call in calls.values()]
    jobs = []
    for backends in {p["backends"] for p in parameters if "backends" in p}:
        with only(backends):
            jobs += ahead.jobs_of(problems, target.of_device("cuda", 0)).jobs
    outcomes = ahead.build_all(list({job.source.key: job for job in jobs}.values()))
    compiled = [each.artifact.compile_seconds for each in outcomes if each.artifact is not None]
    took = time.perf_counter() - started
    yield calls
    report = request.config.pluginmanager.get_plugin("terminalreporter")
    report.write_line("")
    report.write_line(
        f"{len(problems)} cases, {len(outcomes)} kernels ({sum(compiled):.0f} s of compiling) ready in {took:.0f} s"
    )
    for types, figures in sorted(_figures.items()):
        worst = max(figures, key=lambda f: f[0].rel_l2)
        gap = max(figures, key=lambda f: f[0].lse_error)
        report.write_line(f"{types}: {len(figures)} cases, worst rel L2 {worst[0].rel_l2:.2e} ({worst[1]})")
        report.write_line(f"{'':{len(types)}}  worst |dLSE| {gap[0].lse_error:.2e} ({gap[1]})")


@contextlib.contextmanager
def only(backends: str) -> Iterator[None]:
    """With kernels of these backends alone ("" for all), chosen anew."""
    with settings.scope(backends=tuple(backends.split())):
        mla_jit.reload()
        yield
    mla_jit.reload()


def decode(call: cases.Call, **changes: Any) -> Result:
    result = mla_jit.decode(call.q, call.kv_cache, **{**call.kwargs, **changes})
    return result if call.case.lse else (result, None)


def leave_nan(*sizes: int) -> None:
    """Blocks of these sizes in bytes, full of NaN, handed back: what the next allocations are likely to get."""
    blocks = [torch.full((-(-size // 4),), float("nan"), device=DEVICE) for size in sizes]
    del blocks


def judge(call: cases.Call, result: Result) -> cases.Figures:
    figures = cases.check(call, *result)
    types = f"{call.case.q_dtype} x {call.case.kv_dtype}{' scaled' if call.case.scaled else ''}"
    _figures.setdefault(types, []).append((figures, call.case.id))
    return figures


@pytest.mark.parametrize("backends", ["", "triton"], ids=["all", "triton"])
@pytest.mark.parametrize("case", cases.GPU, ids=lambda c: c.id)
def test_case(case: cases.Case, backends: str, built: dict[cases.Case, cases.Call], record_property: Any) -> None:
    call = built[case]
    call.poison()
    rows = len(call.owned) * case.heads
    leave_nan(rows * case.C * DTYPES[cases.out_dtype(case)].bytes, rows * 4)
    with only(backends):
        figures = judge(call, decode(call))
        dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.backend in (backends or "asm triton").split()
    record_property("rel_l2", figures.rel_l2)
    record_property("lse_error", figures.lse_error)


FAR = (
    cases.Case(heads=16, lens=(3000, 65), far=True, spare_pages=2**31 // (64 * 576) + 7, **BF16),
    cases.Case(heads=128, lens=(700, 1), far=True, spare_pages=2**31 // 576 + 99, **{**BF16, "page": 1}, csr=True),
    cases.Case(
        heads=16, lens=(300, 129), far=True, spare_pages=2**31 // (16 * 576) + 5, q_len=2, **{**BF16, "page": 16}
    ),
    cases.Case(heads=16, lens=(900, 64), far=True, spare_pages=2**31 // (64 * 512) + 9, kv_split=True, **BF16),
    cases.Case(heads=16, lens=(900, 64), far=True, spare_pages=2**31 // (64 * 576) + 9, **{**BF16, **cases.FP8}),
    cases.Case(heads=128, lens=(900, 64, 2000), far=True, spare_pages=2**31 // (64 * 576) + 9, **BF16),
    cases.Case(heads=16, lens=(900, 64), far=True, spare_pages=2**31 // (64 * 512) + 9, **SCALED),
)


@pytest.mark.parametrize("far", FAR, ids=lambda c: c.id)
def test_offsets_beyond_31_bits(far: cases.Case) -> None:
    """Every page in use lies behind 2^31 elements of NaN."""
    call = cases.build(far, DEVICE)
    buffer = call.kv_cache[0] if far.kv_split or far.scaled else call.kv_cache
    assert buffer.numel() > 2**31
    judge(call, decode(call))


SAME = (
    cases.Case(heads=16, lens=(1000, 777, 64, 65, 1), **BF16),
    cases.Case(heads=128, lens=(5000,), **BF16),
    cases.Case(heads=16, lens=(5000, 5), q_len=4, **{**BF16, "page": 1}),
    cases.Case(heads=16, lens=(3000, 31), **{**BF16, **cases.FP8}),
    cases.Case(heads=64, lens=(3000, 31), **SCALED),
)


@pytest.mark.parametrize("same", SAME, ids=lambda c: c.id)
def test_the_same_inputs_give_the_same_bits(same: cases.Case) -> None:
    call = cases.build(same, DEVICE)
    first = decode(call)
    judge(call, first)
    for _ in range(5):
        leave_nan(first[0].numel() * 2, first[1].numel() * 4)
        again = decode(call)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("narrow", [False, True], ids=["same table", "own table"])
@pytest.mark.parametrize("heads", [16, 128])
def test_batch_invariant_bits_do_not_depend_on_neighbours(heads: int, narrow: bool) -> None:
    """Each sequence alone, by the batch's table or one of its own width, gives the bits that it gave in the batch."""
    lens = (50_000, 9000, 0, 2048, 2049, 77, 1)
    case = cases.Case(heads=heads, lens=lens, q_len=2, batch_invariant=True, extra_pages=600, **BF16)
    call = cases.build(case, DEVICE)
    out, lse = decode(call)
    judge(call, (out, lse))
    for b, n in enumerate(lens):
        table = call.kwargs["block_table"][b : b + 1]
        own = {
            "seq_lens": call.kwargs["seq_lens"][b : b + 1],
            "block_table": table[:, : max(1, -(-n // 64))] if narrow else table,
        }
        alone = mla_jit.decode(call.q[b : b + 1], call.kv_cache, **{**call.kwargs, **own})
        assert torch.equal(alone[0], out[b : b + 1]), b
        assert torch.equal(alone[1], lse[b : b + 1]), b


def test_two_streams_at_once() -> None:
    """Alternating launches on two streams, each with its own scratch memory, give the bits of one stream."""
    calls = [cases.build(cases.Case(heads=16, lens=lens, **BF16), DEVICE) for lens in ((9000, 1), (4000, 4100, 7))]
    expected = [decode(call) for call in calls]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[list[Result]] = [[], []]
    for _ in range(50):
        for i in (0, 1):
            with torch.cuda.stream(streams[i]):
                results[i].append(decode(calls[i]))
    torch.cuda.synchronize()
    for i in (0, 1):
        judge(calls[i], expected[i])
        assert all(torch.equal(out, expected[i][0]) and torch.equal(lse, expected[i][1]) for out, lse in results[i])


def test_q_made_late_on_another_stream() -> None:
    """The launch goes to the current stream, after what that stream still has to do."""
    call = cases.build(cases.Case(heads=16, lens=(3000, 100), **BF16), DEVICE)
    truth = call.q.clone()
    decode(call)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    call.q.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds
        call.q.copy_(truth)
        result = decode(call)
    stream.synchronize()
    judge(call, result)


def fitted(case: cases.Case, lens: tuple[int, ...]) -> cases.Case:
    """The case with other, not longer lengths, in tensors of the same shapes."""
    pages = [[-(-n // case.page) for n in lengths] for lengths in (case.lens, lens)]
    spare = case.spare_pages + sum(pages[0]) - sum(pages[1])
    return dataclasses.replace(
        case, lens=lens, spare_pages=spare, extra_pages=case.extra_pages + max(pages[0]) - max(pages[1])
    )


def refill(call: cases.Call, other: cases.Call) -> cases.Call:
    """Puts another call's data where a graph reads them; the other call, to judge by."""
    call.q.copy_(other.q)
    caches = [c if isinstance(c, tuple) else (c,) for c in (call.kv_cache, other.kv_cache)]
    for mine, theirs in zip(*caches, strict=True):
        if mine.element_size() == 1:
            mine.view(torch.uint8).copy_(theirs.view(torch.uint8))
        else:
            mine.copy_(theirs)
    for name in ("block_table", "seq_lens"):
        call.kwargs[name].copy_(other.kwargs[name])
    call.poison()
    return other


def capture(call: cases.Call) -> torch.cuda.CUDAGraph:
    decode(call)  # compiled and loaded before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(call)
    return graph


CAPTURED = (
    cases.Case(heads=16, lens=(4096,) * 5, extra_pages=500, out_view="", **BF16),
    cases.Case(heads=128, lens=(4096,) * 5, out_view="", q_len=2, **BF16),
    cases.Case(heads=16, lens=(8192,), out_view="", **{**BF16, "page": 1}),
    cases.Case(heads=16, lens=(4096,) * 3, num_kv_splits=8, out_view="", **{**BF16, **cases.FP8}),
    cases.Case(heads=128, lens=(4096,) * 5, out_view="", **SCALED),
)


@pytest.mark.parametrize("captured", CAPTURED, ids=lambda c: c.id)
def test_a_graph_captured_at_capacity_serves_any_length(captured: cases.Case) -> None:
    call = cases.build(captured, DEVICE)
    graph = capture(call)
    batch = len(captured.lens)
    steps = (
        (4096, 1, 0, 777, 65),
        (63, 64, 65, 127, 128),
        (0, 0, 0, 0, 0),
        (1, 1, 4095, 1, 1),
        (300, 301, 302, 303, 304),
        captured.lens,
    )
    for lens in steps:
        other = refill(call, cases.build(fitted(captured, lens[:batch]), DEVICE))
        graph.replay()
        torch.cuda.synchronize()
        judge(other, (call.kwargs["out"], call.kwargs["lse"]))


def test_two_graphs_replayed_alternately() -> None:
    """And eager calls between them: none writes over what another left."""
    calls = [
        cases.build(case, DEVICE)
        for case in (CAPTURED[0], dataclasses.replace(CAPTURED[0], heads=64, lens=(2000, 3000, 4000)))
    ]
    graphs = [capture(call) for call in calls]
    eager = cases.build(cases.Case(heads=16, lens=(5000, 600), **BF16), DEVICE)
    for _ in range(4):
        for call, graph in zip(calls, graphs, strict=True):
            call.poison()
            graph.replay()
            result = decode(eager)
            torch.cuda.synchronize()
            judge(call, (call.kwargs["out"], call.kwargs["lse"]))
            judge(eager, result)


def test_a_miss_under_capture_names_the_kernel() -> None:
    """Nothing is compiled or loaded while a graph is captured, and the capture goes on."""
    case = cases.Case(heads=7, lens=(100,), out_view="", **{**BF16, "page": 48})
    call = cases.build(case, DEVICE)
    count = torch.zeros(1, device=DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(errors.CacheMiss, match="capture"):
            decode(call)
        count += 1
    graph.replay()
    assert count.item() == 1
    judge(call, decode(call))


@pytest.mark.parametrize(
    "case",
    [cases.Case(heads=16, lens=(5000, 600, 1), **BF16), cases.Case(heads=128, lens=(3000,), q_len=2, **BF16)],
    ids=lambda c: c.id,
)
def test_a_workspace_of_the_planned_size_is_enough(case: cases.Case, built: dict[cases.Case, cases.Call]) -> None:
    """It starts as NaN, nothing is written beside it, and less is refused."""
    call = built.pop(case)
    plan = mla_jit.decode_plan(call.q, call.kv_cache, **call.kwargs)
    size, red = plan.workspace_bytes, 1 << 16
    assert size > 0
    memory = torch.full((size + 2 * red,), 0xFF, dtype=torch.uint8, device=DEVICE)
    result = decode(call, workspace=memory[red : red + size])
    judge(call, result)
    assert bool((memory[:red] == 0xFF).all())
    assert bool((memory[red + size :] == 0xFF).all())
    assert bool((memory[red : red + size] != 0xFF).any())
    with pytest.raises(errors.InvalidInput, match=r"^workspace has \d+ bytes"):
        decode(call, workspace=memory[: size - 1])
    planned = plan.run(call.q, call.kv_cache, workspace=memory[red : red + size])
    assert torch.equal(planned[0], result[0])
    assert torch.equal(planned[1], result[1])


def test_empty_calls_launch_nothing() -> None:
    for case in (
        cases.Case(lens=(), **BF16),
        cases.Case(q_len=0, q_3d=False, **BF16),
        cases.Case(q_lens=(0, 0), **BF16),
    ):
        out, lse = decode(cases.build(case, DEVICE))
        assert out.numel() == 0
        assert lse is not None
        assert lse.numel() == 0
    torch.cuda.synchronize()


def test_what_the_gpu_refuses_says_why() -> None:
    call = cases.build(cases.Case(), DEVICE)
    with pytest.raises(errors.NoVariant, match="fp32"):
        decode(call)
