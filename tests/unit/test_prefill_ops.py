"""`prefill` and `merge_state` as torch operators: schemas, fakes, torch.compile; and in AITER's spelling."""

from __future__ import annotations

import inspect
from typing import Any

import interpreted_merge
import prefill_cases as cases
import pytest
import torch

import mla_jit
from mla_jit import api_prefill, torch_ops
from mla_jit.compat import aiter as theirs
from mla_jit.errors import InvalidInput

CASES = (
    cases.Case(tail=0),
    cases.Case(tail=0, q_lens=(20, 17), kv_lens=(70, 33), causal=False, index64=True, hint=True),
    cases.Case(tail=0, heads=6, kv_heads=2, q_dtype="bf16", kv_dtype="bf16", cap=20.0, lse_base="2"),
    cases.Case(tail=0, scales="tensor", q_lens=(30, 0), kv_lens=(12, 4)),
    cases.Case(tail=0, **cases.MIXED, scales="float", q_view="heads"),
)
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
backends = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def keywords(call: cases.Call) -> dict[str, Any]:
    """The operators' keywords for a call, without those about its results."""
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("out", "lse", "out_dtype", "return_lse")}
    for name in ("q_scale", "k_scale", "v_scale"):
        if isinstance(kwargs[name], float):
            kwargs[f"{name}_value"] = kwargs.pop(name)
    return kwargs


def opcheck(operator: Any, call: cases.Call, **outputs: torch.Tensor) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "fp8" in call.case.kv_dtype:
        tests.remove("test_schema")  # multiplies its tensors, which fp8 does not know
    torch.library.opcheck(operator, (call.q, call.k, call.v), {**keywords(call), **outputs}, test_utils=tests)


def compiled(function: Any, backend: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("name", ["prefill", "prefill_out"])
def test_the_schemas_have_every_keyword_of_prefill(name: str) -> None:
    schema = getattr(torch.ops.mla_jit, name).default._schema
    have = {a.name: a for a in schema.arguments}
    want = set(inspect.signature(api_prefill.prefill).parameters) - {"return_lse"}
    want |= {f"{x}_scale_value" for x in "qkv"}
    want -= {"out", "lse", "workspace"} if name == "prefill" else {"out_dtype"}
    assert set(have) == want
    for parameter in inspect.signature(api_prefill.prefill).parameters.values():
        if parameter.name in have and parameter.default is not parameter.empty and parameter.name != "out":
            assert have[parameter.name].default_value == parameter.default, parameter.name
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == (set() if name == "prefill" else {"out", "lse", "workspace"})


@by_id
def test_opcheck(case: cases.Case) -> None:
    call = cases.build(case)
    opcheck(torch.ops.mla_jit.prefill.default, call)
    want, want_lse = mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    out, lse = torch.ones_like(want), torch.ones_like(want_lse)
    opcheck(torch.ops.mla_jit.prefill_out.default, call, out=out, lse=lse)
    torch.ops.mla_jit.prefill_out(call.q, call.k, call.v, **keywords(call), out=out, lse=lse)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@by_id
def test_fakes_promise_what_prefill_gives(case: cases.Case) -> None:
    call = cases.build(case)
    want = mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in keywords(call).items()}
    got = torch.ops.mla_jit.prefill(call.q.to("meta"), call.k.to("meta"), call.v.to("meta"), **meta)
    for fake, real in zip(got, want, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@by_id
@backends
def test_compiled_prefill(case: cases.Case, backend: str) -> None:
    call = cases.build(case)
    want = mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    got = compiled(mla_jit.prefill, backend)(call.q, call.k, call.v, **call.kwargs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize("given", ["", "out", "lse", "out lse", "out workspace"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_prefill_returns_what_prefill_returns(backend: str, given: str, return_lse: bool) -> None:
    call = cases.build(cases.Case(tail=0))
    want, want_lse = mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    mine = {"out": torch.full_like(want, torch.nan), "lse": torch.full_like(want_lse, torch.nan)}
    mine["workspace"] = torch.empty(64, dtype=torch.uint8)
    kwargs = {**call.kwargs, **{name: mine[name] for name in given.split()}, "return_lse": return_lse}
    got = compiled(mla_jit.prefill, backend)(call.q, call.k, call.v, **kwargs)
    assert isinstance(got, tuple) == return_lse
    out, lse = got if return_lse else (got, mine["lse"])
    assert torch.equal(out, want)
    assert "out" not in given or out is mine["out"]
    assert "lse" not in given or lse is mine["lse"]
    if return_lse or "lse" in given:
        assert torch.equal(lse, want_lse)


def test_one_compilation_serves_any_length() -> None:
    graphs: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    function = compiled(lambda q, k, v, kwargs: mla_jit.prefill(q, k, v, **kwargs), backend, dynamic=True)
    for q_lens in ((37, 20), (5, 60, 20), (30, 31, 2, 9)):
        call = cases.build(cases.Case(q_lens=q_lens))
        cases.check(call, *function(call.q, call.k, call.v, call.kwargs))
    assert len(graphs) == 1


def test_refusals_are_those_of_prefill() -> None:
    call = cases.build(cases.Case(tail=0, lse=False))
    wrong = {"out": torch.empty(57, 2, 32), "out_dtype": torch.float16}
    for function in (mla_jit.prefill, torch_ops.traced_prefill):
        with pytest.raises(InvalidInput, match="out_dtype"):
            function(call.q, call.k, call.v, **call.kwargs, **wrong)


# ------------------------------------------------------------------------------------------------------- merge_state


def _states(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(9, 3, 40, generator=generator).to(dtype) for _ in "ab")
    lse_a, lse_b = torch.randn(2, 9, 3, generator=generator) * 4
    lse_a[0], lse_b[1], lse_a[2], lse_b[2] = (-torch.inf,) * 4
    return a, lse_a, b, lse_b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["e", "2"])
def test_merge_is_the_attention_of_both(dtype: torch.dtype, base: str) -> None:
    a, lse_a, b, lse_b = _states(dtype)
    out, lse = mla_jit.merge_state(a, lse_a, b, lse_b, lse_base=base)
    unit = 0.6931471805599453 if base == "2" else 1.0
    want_lse = torch.logaddexp(lse_a.double() * unit, lse_b.double() * unit)
    weight = torch.exp(lse_a.double() * unit - want_lse).nan_to_num(0.0)[..., None]
    want = weight * a.double() + (1 - weight) * b.double()
    want[2] = 0.0
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert torch.allclose(out.double(), want, atol=tolerance)
    assert torch.allclose(lse.double() * unit, want_lse, atol=1e-5)
    assert out.dtype == dtype


def test_merge_in_place_and_what_an_empty_side_holds() -> None:
    a, lse_a, b, lse_b = _states()
    want, want_lse = mla_jit.merge_state(a, lse_a, b, lse_b)
    a[0], b[1], a[2], b[2] = (torch.nan,) * 4
    lse_a[0] = torch.inf  # FlashMLA's way to say it
    out, lse = mla_jit.merge_state(a, lse_a, b, lse_b, out=a, lse=lse_b)
    assert out is a
    assert lse is lse_b
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


def test_a_prefix_and_a_chunk_merge_to_the_whole() -> None:
    call = cases.build(cases.Case(q_lens=(20, 17), kv_lens=(70, 33), tail=0, heads=4, kv_heads=2))
    starts, parts = call.kwargs["kv_indptr"].tolist(), []
    for chunk in (False, True):
        kept = [
            range(starts[b + 1] - n, starts[b + 1]) if chunk else range(starts[b], starts[b + 1] - n)
            for b, n in enumerate(call.case.q_lens)
        ]
        rows = torch.tensor([i for r in kept for i in r])
        indptr = torch.tensor([0, len(kept[0]), len(kept[0]) + len(kept[1])], dtype=torch.int32)
        kwargs = {**call.kwargs, "kv_indptr": indptr, "causal": chunk}
        parts += mla_jit.prefill(call.q, call.k[rows], call.v[rows], **kwargs)
    cases.check(call, *mla_jit.merge_state(*parts))


@backends
def test_compiled_merge(backend: str) -> None:
    states = _states()
    want = mla_jit.merge_state(*states)
    got = compiled(mla_jit.merge_state, backend)(*states)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    out, lse = torch.empty_like(states[0]), torch.empty_like(states[1])
    again = compiled(mla_jit.merge_state, backend)(*states, out=out, lse=lse)
    assert again[0] is out
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])
    torch.library.opcheck(torch.ops.mla_jit.merge_state.default, states)


MERGE_WRONG: dict[str, tuple[dict[int, Any], dict[str, Any], str]] = {
    "two dimensions": ({0: torch.zeros(9, 3)}, {}, "out_a has shape"),
    "other shape": ({2: torch.zeros(9, 3, 41)}, {}, r"out_b has shape \(9, 3, 41\); it must be \(9, 3, 40\)"),
    "lse's shape": ({1: torch.zeros(3, 9)}, {}, "lse_a has shape"),
    "lse's dtype": ({3: torch.zeros(9, 3, dtype=torch.float64)}, {}, "lse_b is torch.float64"),
    "base": ({}, {"lse_base": "10"}, "lse_base is '10'"),
    "stride": ({0: torch.zeros(40, 3, 9).transpose(0, 2)}, {}, "stride .* in its last dimension"),
    "no tensor": ({2: None}, {}, "out_b is None"),
}


@pytest.mark.parametrize("what", MERGE_WRONG)
def test_a_wrong_state_is_named(what: str) -> None:
    changes, keywords, message = MERGE_WRONG[what]
    states = [changes.get(i, t) for i, t in enumerate(_states())]
    with pytest.raises(InvalidInput, match=message):
        mla_jit.merge_state(*states, **keywords)


def test_fp8_states_are_refused_with_the_reason() -> None:
    a, lse_a, b, lse_b = _states()
    with pytest.raises(mla_jit.errors.NoVariant, match="a state in fp8_e4m3"):
        mla_jit.merge_state(a.to(torch.float8_e4m3fn), lse_a, b, lse_b)


# ------------------------------------------------------------------------------------------------- AITER's spelling


@pytest.mark.parametrize("page", [1, 16])
def test_aiters_paged_prefill(page: int) -> None:
    generator = torch.Generator().manual_seed(page)
    heads, rank, rope, q_lens, kv_lens = 3, 32, 16, (20, 5), (50, 5)
    pages = [-(-n // page) for n in kv_lens]
    cache = torch.randn(sum(pages), page, 1, rank + rope, generator=generator)
    q = torch.randn(sum(q_lens), heads, rank + rope, generator=generator)
    indptr = [torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in (q_lens, pages)]
    last = torch.tensor([n - (p - 1) * page for n, p in zip(kv_lens, pages, strict=True)], dtype=torch.int32)
    out = torch.full((sum(q_lens), heads, rank), torch.nan)
    indices = torch.arange(sum(pages), dtype=torch.int32)
    got, lse = theirs.mla_prefill_fwd(q, cache, out, *indptr, indices, last, max(q_lens), 0.2, 0.0, None)
    assert got is out
    flat = cache.view(-1, 1, rank + rope)
    rows = torch.cat([torch.arange(n) + page * sum(pages[:b]) for b, n in enumerate(kv_lens)])
    kv_indptr = torch.tensor([0, kv_lens[0], sum(kv_lens)], dtype=torch.int32)
    want, want_lse = mla_jit.prefill(
        q, flat[rows], flat[rows][..., :rank], qo_indptr=indptr[0], kv_indptr=kv_indptr, max_q_len=max(q_lens),
        sm_scale=0.2, return_lse=True,
    )  # fmt: skip
    assert torch.allclose(out, want, atol=1e-5)
    assert torch.allclose(lse[:, 0, :, 0], want_lse, atol=1e-5)
    with pytest.raises(InvalidInput, match="kv_buffer has shape"):
        theirs.mla_prefill_fwd(q, cache[0], out, *indptr, indices, last, max(q_lens))


@pytest.mark.parametrize("listed", [False, True])
def test_aiters_persistent_prefill(listed: bool) -> None:
    call = cases.build(cases.Case(q_lens=(20, 17), kv_lens=(70, 3), tail=0, scales="tensor", lse_base="e"))
    rows, k, v = None, call.k, call.v
    if listed:  # keys in another order in memory, garbage behind the last index
        order = torch.randperm(k.shape[0], generator=torch.Generator().manual_seed(0))
        k, v = torch.empty_like(k), torch.empty_like(v)
        k[order], v[order] = call.k, call.v
        rows = torch.cat([order.to(torch.int32), torch.tensor([-7, 2**30], dtype=torch.int32)])
    out = torch.full((*call.q.shape[:2], call.case.DV), torch.nan)
    made = {"reduce_indptr": rows, "reduce_final_map": rows, "reduce_partial_map": rows}
    got, lse = theirs.mla_prefill_ps_fwd(
        call.q, k, v, out, call.kwargs["qo_indptr"], call.kwargs["kv_indptr"], rows, None, None, 20, True, **made,
        softmax_scale=call.kwargs["sm_scale"], **{f"{x}_scale": call.kwargs[f"{x}_scale"] for x in "qkv"},
        return_lse=True,
    )  # fmt: skip
    assert got is out
    assert lse is not None
    assert bool((lse[call.expected()[1] == -torch.inf] == torch.inf).all())
    cases.check(call, out, torch.where(lse == torch.inf, -torch.inf, lse))
    none = theirs.mla_prefill_ps_fwd(
        call.q, k, v, out, call.kwargs["qo_indptr"], call.kwargs["kv_indptr"], rows, None, None, 20, True
    )
    assert none[1] is None


def test_aiters_reduction() -> None:
    arguments, want, written = interpreted_merge.partials()
    out = torch.full((22, 3, 40), torch.nan)
    assert theirs.mla_prefill_reduce(*arguments, out, tile_q=8) is None
    assert torch.allclose(out[written].double(), want[written], atol=1e-5)
    assert bool(out[~written].isnan().all())
    part, lse, indptr, final_map, partial_map = arguments
    with pytest.raises(InvalidInput, match=r"output has shape .*; it must be \[T, 3, 40\]"):
        theirs.mla_prefill_reduce(*arguments, out[:, :2])
    with pytest.raises(InvalidInput, match=r"partial_lse is torch\.float64"):
        theirs.mla_prefill_reduce(part, lse.double(), indptr, final_map, partial_map, out)
    with pytest.raises(InvalidInput, match="reduce_final_map has shape"):
        theirs.mla_prefill_reduce(part, lse, indptr, final_map[:2], partial_map, out)
    kept = out.clone()
    theirs.mla_prefill_reduce(part, lse, indptr[:1], final_map, partial_map, out)  # no group
    assert torch.equal(out.nan_to_num(), kept.nan_to_num())
