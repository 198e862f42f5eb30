"""The torch operators: their schemas and fakes, what they compute, and `mla_jit.decode` under torch.compile."""

from __future__ import annotations

import importlib
import inspect
import sys
import timeit
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
from cases import Call, Case

import mla_jit
from mla_jit import api, torch_ops
from mla_jit.errors import InvalidInput

CASES = (
    Case(),
    Case(q_split=True, kv_split=True, q_view="heads", q_len=2, q_3d=False),
    Case(csr=True, page=7, lens=(49, 50, 0), sinks=True),
    Case(q_lens=(1, 3, 0, 2), lens=(40, 3, 9, 0), index64=True),
    Case(q_dtype="bf16", kv_dtype="fp8_e4m3", kv_scale="tensor", q_scale="float", cap=20.0, num_kv_splits=2),
    Case(cp=(1, 2), lens=(100, 33), lse_base="2", kv_3d=True, hint=True),
    Case(q_dtype="fp8_e4m3", kv_dtype="fp8_e4m3", q_len=2, batch_invariant=True, causal=False),
    Case(**cases.SCALED, q_len=2),
    Case(**{**cases.SCALED, "R": 0}, q_lens=(1, 3), lens=(40, 9)),
)
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def operands(call: Call) -> tuple[Any, ...]:
    """(q, q_pe, kv_cache, kpe) as the operators take them."""
    cache = call.kv_cache[::2] if call.case.scaled else call.kv_cache
    pairs = (x if isinstance(x, tuple) else (x, None) for x in (call.q, cache))
    return tuple(part for pair in pairs for part in pair)


def keywords(call: Call) -> dict[str, Any]:
    """The operators' keywords for a call, without those about its results."""
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("out", "lse", "out_dtype", "return_lse")}
    for name in ("q_scale", "kv_scale"):
        if isinstance(kwargs[name], float):
            kwargs[f"{name}_value"] = kwargs.pop(name)
    return kwargs | ({"kv_scales": call.kv_cache[1]} if call.case.scaled else {})


def results(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN-filled outputs of a call."""
    out, lse = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    return torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)


def opcheck(operator: Any, call: Call, **outputs: torch.Tensor) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" in call.case.kv_dtype:
        tests.remove("test_schema")  # multiplies its tensors, which fp8 does not know
    torch.library.opcheck(operator, operands(call), {**keywords(call), **outputs}, test_utils=tests)


def compiled(function: Any, backend: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("name", ["decode", "decode_out"])
def test_the_schemas_have_every_keyword_of_decode(name: str) -> None:
    schema = getattr(torch.ops.mla_jit, name).default._schema
    have = {a.name: a for a in schema.arguments}
    want = set(inspect.signature(api.decode).parameters) - {"return_lse", "metadata"}
    want |= {"q_pe", "kpe", "kv_scales", "q_scale_value", "kv_scale_value"}
    want -= {"out", "lse", "workspace"} if name == "decode" else {"out_dtype"}
    assert set(have) == want
    for parameter in inspect.signature(api.decode).parameters.values():
        if parameter.name in have and parameter.default is not parameter.empty and parameter.name != "out":
            assert have[parameter.name].default_value == parameter.default, parameter.name
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == (set() if name == "decode" else {"out", "lse", "workspace"})
    assert [r.name for r in schema.returns] == (["out", "lse"] if name == "decode" else [])


@by_id
def test_opcheck_decode(case: Case) -> None:
    call = cases.build(case)
    opcheck(torch.ops.mla_jit.decode.default, call)


@by_id
def test_opcheck_decode_out(case: Case) -> None:
    call = cases.build(case)
    out, lse = results(call)
    out, lse = out.fill_(1.0), lse.fill_(1.0)  # opcheck compares with copies; NaN differs from itself
    opcheck(torch.ops.mla_jit.decode_out.default, call, out=out, lse=lse)
    opcheck(torch.ops.mla_jit.decode_out.default, call, out=out)


@by_id
def test_operators_give_the_bits_of_decode(case: Case) -> None:
    call = cases.build(case)
    want_out, want_lse = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    cases.check(call, want_out, want_lse)
    out, lse = torch.ops.mla_jit.decode(*operands(call), **keywords(call))
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)
    out, lse = results(call)
    assert torch.ops.mla_jit.decode_out(*operands(call), **keywords(call), out=out, lse=lse) is None
    assert torch.equal(out, want_out)
    assert torch.equal(lse, want_lse)


@by_id
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float32])
def test_fakes_promise_what_decode_gives(case: Case, out_dtype: torch.dtype | None) -> None:
    call = cases.build(case)
    want = mla_jit.decode(call.q, call.kv_cache, **call.kwargs, out_dtype=out_dtype)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in keywords(call).items()}
    tensors = (None if t is None else t.to("meta") for t in operands(call))
    got = torch.ops.mla_jit.decode(*tensors, **meta, out_dtype=out_dtype)
    for fake, real in zip(got, want, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@by_id
@backends
def test_compiled_decode(case: Case, backend: str) -> None:
    call = cases.build(case)
    want = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    got = compiled(mla_jit.decode, backend)(call.q, call.kv_cache, **call.kwargs)
    assert isinstance(got, tuple)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize("given", ["", "out", "lse", "out lse", "out workspace", "workspace"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_decode_returns_what_decode_returns(backend: str, given: str, return_lse: bool) -> None:
    call = cases.build(Case())
    want_out, want_lse = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    out, lse = results(call)
    mine = {"out": out, "lse": lse, "workspace": torch.empty(64, dtype=torch.uint8)}
    kwargs = {**call.kwargs, **{name: mine[name] for name in given.split()}, "return_lse": return_lse}
    got = compiled(mla_jit.decode, backend)(call.q, call.kv_cache, **kwargs)
    assert isinstance(got, tuple) == return_lse
    got_out, got_lse = got if return_lse else (got, lse)
    assert torch.equal(got_out, want_out)
    if "out" in given:
        assert got_out is out
    if "lse" in given:
        assert got_lse is lse
    if return_lse or "lse" in given:
        assert torch.equal(got_lse, want_lse)


@backends
def test_compiled_writes_come_before_later_reads(backend: str) -> None:
    call = cases.build(Case(lse=False))
    buffer = torch.zeros(2, 4, 64)

    def twice(q: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = buffer * 2
        mla_jit.decode(q, cache, **call.kwargs, out=buffer)
        return before, buffer * 2

    before, after = compiled(twice, backend)(call.q, call.kv_cache)
    assert before.eq(0).all()
    assert torch.equal(after, 2 * mla_jit.decode(call.q, call.kv_cache, **call.kwargs))


def test_one_compilation_serves_any_batch() -> None:
    graphs: list[set[Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append({node.target for node in module.graph.nodes})
        return module.forward

    function = compiled(lambda q, cache, kwargs: mla_jit.decode(q, cache, **kwargs), backend, dynamic=True)
    for lens in ((100, 37), (5, 60, 20), (30, 31, 200, 1, 2)):
        call = cases.build(Case(lens=lens, hint=True, extra_pages=0))
        cases.check(call, *function(call.q, call.kv_cache, call.kwargs))
    assert len(graphs) == 1
    assert any("mla_jit.decode" in str(target) for target in graphs[0])


def test_exported_program() -> None:
    call = cases.build(Case(lse=False))

    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lens: torch.Tensor) -> Any:
            return mla_jit.decode(q, cache, kv_lora_rank=64, sm_scale=0.25, block_table=table, seq_lens=lens)

    arguments = (call.q, call.kv_cache, call.kwargs["block_table"], call.kwargs["seq_lens"])
    program = torch.export.export(Model(), arguments)
    assert torch.equal(program.module()(*arguments), Model()(*arguments))


def test_eager_calls_bypass_the_dispatcher() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(func.namespace)
            return func(*args, **(kwargs or {}))

    call = cases.build(Case())
    for function, namespaces in ((mla_jit.decode, {"aten"}), (torch.ops.mla_jit.decode, {"mla_jit"})):
        names: set[str] = set()
        arguments = (call.q, call.kv_cache) if function is mla_jit.decode else operands(call)
        with Seen():
            function(*arguments, **(call.kwargs if function is mla_jit.decode else keywords(call)))
        assert names - {"prim", "prims"} == namespaces


def test_a_warm_call_knows_which_operand_is_misaligned() -> None:
    """Two calls that differ only in this must not share a kernel."""
    for view, misaligned in (("q_view", ("q",)), ("kv_view", ("kv",)), ("q_view", ("q",))):
        call = cases.build(Case(**{view: "odd"}))
        mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
        assert mla_jit.last_dispatch().problem.misaligned == misaligned


def test_the_question_whether_to_trace_costs_nothing() -> None:
    best = min(timeit.repeat(torch.compiler.is_compiling, number=2000, repeat=7)) / 2000
    assert best < 0.5e-6  # 0.06 µs on an idle machine


def test_reloading_the_module_keeps_one_registration() -> None:
    before = torch.ops.mla_jit.decode
    importlib.reload(torch_ops)
    assert torch.ops.mla_jit.decode is before
    call = cases.build(Case())
    cases.check(call, *torch.ops.mla_jit.decode(*operands(call), **keywords(call)))


@pytest.mark.parametrize(
    "wrong",
    [{"metadata": 1}, {"out": torch.empty(2, 4, 64), "out_dtype": torch.float16}],
    ids=["metadata", "out_dtype"],
)
def test_refusals_are_those_of_decode(wrong: dict[str, Any]) -> None:
    call = cases.build(Case(lse=False))
    for function in (mla_jit.decode, torch_ops.traced_decode):
        with pytest.raises(InvalidInput, match=r"metadata|out_dtype"):
            function(call.q, call.kv_cache, **call.kwargs, **wrong)


def test_a_bad_call_is_refused_when_a_compiled_graph_runs() -> None:
    call = cases.build(Case(lse=False))
    function = compiled(lambda q: mla_jit.decode(q, call.kv_cache, **call.kwargs), "aot_eager")
    function(call.q)
    with pytest.raises(InvalidInput, match="elements a head"):
        function(call.q[..., 16:].contiguous())
