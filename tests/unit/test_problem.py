"""What a decode call refuses before anything is launched, and what it makes of what it takes."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch

import mla_jit
from mla_jit import ops, plan, target
from mla_jit.errors import InvalidInput, MlaJitError, NoVariant
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.problem import DecodeProblem, bucket


def arguments(**changes: Any) -> dict[str, Any]:
    """A good padded call of batch 2, with some arguments changed; None drops one."""
    call = cases.build(cases.Case(q_dtype="bf16", kv_dtype="bf16"))
    return _merged({"q": call.q, "kv_cache": call.kv_cache, **call.kwargs}, changes)


def csr(**changes: Any) -> dict[str, Any]:
    """A good CSR call of batch 2."""
    call = cases.build(cases.Case(csr=True, q_dtype="bf16", kv_dtype="bf16"))
    return _merged({"q": call.q, "kv_cache": call.kv_cache, **call.kwargs}, changes)


def ragged(**changes: Any) -> dict[str, Any]:
    """A good ragged call of 2 + 1 query tokens."""
    call = cases.build(cases.Case(q_lens=(2, 1), q_dtype="bf16", kv_dtype="bf16"))
    return _merged({"q": call.q, "kv_cache": call.kv_cache, **call.kwargs}, changes)


def _merged(good: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in {**good, **changes}.items() if v is not None or k in ("q_scale", "kv_scale", "num_kv_splits")
    }


def scaled(
    latent: torch.Tensor | None = None, scales: torch.Tensor | str | None = "", kpe: torch.Tensor | str | None = "",
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A good padded call of batch 2 whose cache is (ckv, kv_scales, kpe), with some arguments changed."""
    cache = (
        LATENT if latent is None else latent, torch.ones(8, 16, 1, 1) if isinstance(scales, str) else scales,
        half(8, 16, 1, 16) if isinstance(kpe, str) else kpe,
    )  # fmt: skip
    return arguments(**{"q": half(2, 4, 144), "kv_cache": cache, "kv_lora_rank": 128, **changes})


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CACHE = half(8, 16, 1, 80)
LATENT = half(8, 16, 1, 128).to(torch.float8_e4m3fn)
Q = half(2, 4, 80)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # q
    "q of two dimensions": (arguments(q=half(2, 80)), r"^q has shape \(2, 80\); it must be \[B, H, 80\]"),
    "q too narrow": (arguments(q=half(2, 4, 72)), r"^q has 72 elements a head"),
    "q of strided elements": (
        arguments(q=half(2, 4, 160)[..., ::2]),
        r"^q has stride 2 in its last dimension; it must be 1",
    ),
    "q in float64": (arguments(q=Q.double()), r"^q has dtype torch.float64; supported: "),
    "q of three parts": (arguments(q=(Q, Q, Q)), r"^q\b.*(tuple of 3|pairs of tensors)"),
    "q_pe with other heads": (
        arguments(q=(half(2, 4, 64), half(2, 3, 16))),
        r"^q_nope \(2, 4, 64\) and q_pe \(2, 3, 16\) differ",
    ),
    "q_pe in another dtype": (
        arguments(q=(half(2, 4, 64), torch.zeros(2, 4, 16))),
        r"^q_nope is torch.bfloat16, q_pe is torch.float32",
    ),
    "q_nope of another width": (arguments(q=(half(2, 4, 60), half(2, 4, 20))), r"^q_nope has 60 elements a head"),
    "q_pe of another width": (arguments(q=(half(2, 4, 64), half(2, 4, 20))), r"^q_pe has 20 elements a head"),
    "q_pe strided": (arguments(q=(half(2, 4, 64), half(2, 4, 32)[..., ::2])), r"^q_pe has stride 2"),
    "q of four dimensions and ragged": (
        ragged(q=half(2, 2, 4, 80)),
        r"^q has shape \(2, 2, 4, 80\); it must be .*qo_indptr",
    ),
    "q tokens that do not merge": (
        arguments(q=half(2, 5, 4, 80)[:, :3]),
        r"^q has strides .*must merge into one token dimension",
    ),
    # cache
    "cache of two dimensions": (
        arguments(kv_cache=half(8, 80)),
        r"^kv_cache has shape \(8, 80\); it must be \[pages, page_size",
    ),
    "cache too narrow": (arguments(kv_cache=half(8, 16, 1, 48)), r"^kv_cache is 48 wide, kv_lora_rank is 64"),
    "cache strided": (arguments(kv_cache=half(8, 16, 1, 160)[..., ::2]), r"^kv_cache has stride 2"),
    "cache in int32": (
        arguments(kv_cache=torch.zeros(8, 16, 1, 80, dtype=torch.int32)),
        r"^kv_cache has dtype torch.int32",
    ),
    "cache of four parts": (
        arguments(kv_cache=(CACHE, CACHE, CACHE, CACHE)),
        r"^(q, )?kv_cache\b.*(tuple of 4|pairs of tensors)",
    ),
    "ckv of another width": (
        arguments(kv_cache=(half(8, 16, 1, 72), half(8, 16, 1, 8))),
        r"^ckv is 72 wide, kv_lora_rank is 64",
    ),
    "kpe with other pages": (
        arguments(kv_cache=(half(8, 16, 1, 64), half(7, 16, 1, 16))),
        r"^ckv \(8, 16, 1, 64\) and kpe .* differ",
    ),
    "kpe in another dtype": (
        arguments(kv_cache=(half(8, 16, 1, 64), torch.zeros(8, 16, 1, 16))),
        r"^ckv is .*, kpe is torch.float32",
    ),
    "heads that KV heads do not share": (
        arguments(kv_cache=half(8, 16, 3, 80)),
        r"^4 query heads cannot be shared by 3 KV heads",
    ),
    "kv_lora_rank too small": (arguments(kv_lora_rank=8), r"^kv_lora_rank is 8; the least is 16"),
    # a cache with scales
    "ckv with scales in bf16": (scaled(half(8, 16, 1, 128)), r"^ckv is bf16; beside kv_scales it must be fp8 e4m3"),
    "ckv with scales of another width": (
        scaled(LATENT[..., :64]),
        r"^ckv is 64 wide, kv_lora_rank is 128",
    ),
    "scales left out": (scaled(scales=None), r"^kv_scales is None; kv_cache must be tensors"),
    "scales and kpe left out": (scaled(scales=None, kpe=None), r"^kv_scales is None; kv_cache must be tensors"),
    "scales in bf16": (scaled(scales=half(8, 16, 1, 1)), r"^kv_scales is torch.bfloat16, 1 wide; it must be float32"),
    "scales of every column": (
        scaled(scales=torch.ones(8, 16, 1, 128)),
        r"^kv_scales is torch.float32, 128 wide; it must be float32 and 1 wide, a scale for 128 columns",
    ),
    "scales of two dimensions": (scaled(scales=torch.ones(8, 1)), r"^kv_scales has shape \(8, 1\); it must be"),
    "scales of other pages": (
        scaled(scales=torch.ones(7, 16, 1, 1)),
        r"^ckv \(8, 16, 1, 128\) and kv_scales \(7, 16, 1, 1\) differ",
    ),
    "scales strided": (
        scaled(LATENT.repeat(1, 1, 1, 2), torch.ones(8, 16, 1, 4)[..., ::2], q=half(2, 4, 272), kv_lora_rank=256),
        r"^kv_scales has stride 2 in its last dimension",
    ),
    "kpe of other pages than scales": (
        scaled(kpe=half(7, 16, 1, 16)),
        r"^ckv \(8, 16, 1, 128\) and kpe \(7, 16, 1, 16\) differ",
    ),
    "kpe beside scales in another dtype": (
        scaled(kpe=half(8, 16, 1, 16).half()),
        r"^kpe is torch.float16, q is torch.bfloat16; they must be the same",
    ),
    "q in fp8 with scales": (
        scaled(kpe=None, q=half(2, 4, 128).to(torch.float8_e4m3fn)),
        r"^q is fp8_e4m3; with kv_scales it must be bf16 or fp16",
    ),
    "q wider than a cache without kpe": (scaled(kpe=None), r"^q has 144 elements a head"),
    "kv_lora_rank of no whole groups": (
        scaled(
            LATENT[..., :96].contiguous(),
            torch.ones(8, 16, 1, 1),
            q=half(2, 4, 112),
            kv_lora_rank=96,
        ),
        r"^kv_lora_rank is 96; kv_scales has one scale for 128 columns",
    ),
    "kv_scale beside scales": (scaled(kv_scale=0.5), r"^kv_scale is given beside kv_scales"),
    "kv_scale tensor beside scales": (scaled(kv_scale=torch.ones(1)), r"^kv_scale is given beside kv_scales"),
    # scalars
    "sm_scale zero": (arguments(sm_scale=0.0), r"^sm_scale is 0.0; it must be a positive float"),
    "sm_scale nan": (arguments(sm_scale=float("nan")), r"^sm_scale is nan"),
    "sm_scale infinite": (arguments(sm_scale=float("inf")), r"^sm_scale is inf"),
    "logit_cap negative": (arguments(logit_cap=-1.0), r"^logit_cap is -1.0"),
    "lse_base": (arguments(lse_base="10"), r"^lse_base is '10'; use 'e'"),
    "cp_rank out of range": (arguments(cp_rank=2, cp_world=2), r"^cp_rank 2 does not lie in 0 … cp_world - 1"),
    "cp_world zero": (arguments(cp_rank=0, cp_world=0), r"^cp_rank 0 does not lie in"),
    "sinks with cp_world": (arguments(sinks=torch.zeros(4), cp_world=2), r"^sinks with cp_world > 1"),
    "num_kv_splits zero": (arguments(num_kv_splits=0), r"^num_kv_splits is 0; it must be at least 1"),
    "max_kv_len negative": (arguments(max_kv_len=-1), r"^max_kv_len is -1"),
    "max_q_len below q": (arguments(q=half(2, 3, 4, 80), max_q_len=2), r"^max_q_len is 2, q holds 3"),
    # padded table
    "no page table": (arguments(block_table=None, seq_lens=None), r"^no page table: pass block_table"),
    "table without lengths": (arguments(seq_lens=None), r"^block_table needs seq_lens"),
    "two page tables": (arguments(kv_indptr=ints(0, 1, 2)), r"^pass block_table \+ seq_lens, or kv_indptr"),
    "table in float": (
        arguments(block_table=torch.zeros(2, 8)),
        r"^block_table has dtype torch.float32; it must be int32",
    ),
    "table of one dimension": (
        arguments(block_table=ints(1, 2)),
        r"^block_table has shape \(2,\); it must have 2 dimensions",
    ),
    "table strided": (
        arguments(block_table=torch.zeros(2, 16, dtype=torch.int32)[:, ::2]),
        r"^block_table must be contiguous",
    ),
    "table of another batch": (
        arguments(block_table=torch.zeros(3, 8, dtype=torch.int32)),
        r"^q has batch 2, block_table 3",
    ),
    "lengths of another batch": (arguments(seq_lens=ints(1, 2, 3)), r"^q has batch 2, block_table 2, seq_lens 3"),
    "lengths in float": (arguments(seq_lens=torch.zeros(2)), r"^seq_lens has dtype torch.float32"),
    # CSR
    "CSR without indices": (csr(kv_indices=None), r"^no page table: pass block_table"),
    "CSR of another batch": (csr(kv_indptr=ints(0, 1)), r"^kv_indptr has 2 entries, batch is 2; it needs batch \+ 1"),
    "CSR without last lengths": (csr(kv_last_page_lens=None), r"^page_size 16 needs kv_last_page_lens"),
    "CSR with short last lengths": (csr(kv_last_page_lens=ints(1)), r"^kv_last_page_lens has 1 entries, batch is 2"),
    "CSR with short lengths": (csr(seq_lens=ints(1)), r"^seq_lens has 1 entries, batch is 2"),
    "CSR and cp_world": (csr(cp_world=2), r"^cp_world > 1 needs seq_lens"),
    "CSR indptr in float": (csr(kv_indptr=torch.zeros(3)), r"^kv_indptr has dtype torch.float32"),
    "CSR indices in uint8": (csr(kv_indices=torch.zeros(9, dtype=torch.uint8)), r"^kv_indices has dtype torch.uint8"),
    # ragged
    "ragged without max_q_len": (ragged(max_q_len=None), r"^qo_indptr needs max_q_len"),
    "ragged and empty": (ragged(qo_indptr=ints()), r"^qo_indptr is empty"),
    "ragged in float": (ragged(qo_indptr=torch.zeros(3)), r"^qo_indptr has dtype torch.float32"),
    # extras
    "sinks of other heads": (arguments(sinks=torch.zeros(3)), r"^sinks must be a contiguous float32 \[4\]"),
    "sinks in bf16": (arguments(sinks=half(4)), r"^sinks must be a contiguous float32 \[4\]"),
    "kv_scale of two": (arguments(kv_scale=torch.ones(2)), r"^kv_scale must be a float or a 1-element float32 tensor"),
    "q_scale in bf16": (arguments(q_scale=half(1)), r"^q_scale must be a float or a 1-element float32 tensor"),
    "metadata": (arguments(metadata=object()), r"^metadata is for the persistent scheduler"),
    # results
    "out of another shape": (arguments(out=half(2, 4, 80)), r"^out has shape \(2, 4, 80\); it must be \(2, 4, 64\)"),
    "out strided": (arguments(out=half(2, 4, 128)[..., ::2]), r"^out has stride 2"),
    "out in int8": (arguments(out=torch.zeros(2, 4, 64, dtype=torch.int8)), r"^out has dtype torch.int8"),
    "out against out_dtype": (
        arguments(out=half(2, 4, 64), out_dtype=torch.float16),
        r"^out is torch.bfloat16, out_dtype asks for",
    ),
    "out_dtype unknown": (arguments(out_dtype=torch.int8), r"^out_dtype torch.int8 is not supported"),
    "lse in bf16": (arguments(lse=half(2, 4)), r"^lse is torch.bfloat16; it must be float32"),
    "lse of another shape": (arguments(lse=torch.zeros(4, 2)), r"^lse has shape \(4, 2\); it must be \(2, 4\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_argument_is_refused_by_name(name: str) -> None:
    kwargs, message = REFUSED[name]
    with pytest.raises(InvalidInput, match=message) as caught:
        mla_jit.decode(**kwargs)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MlaJitError)


META = {
    "kv_cache": ("kv_cache", arguments),
    "block_table": ("block_table", arguments),
    "seq_lens": ("seq_lens", arguments),
    "kv_indptr": ("kv_indptr", csr),
    "kv_indices": ("kv_indices", csr),
    "kv_last_page_lens": ("kv_last_page_lens", csr),
    "qo_indptr": ("qo_indptr", ragged),
}


@pytest.mark.parametrize("name", META)
def test_a_tensor_on_another_device_is_refused_by_name(name: str) -> None:
    argument, make = META[name]
    kwargs = make()
    with pytest.raises(InvalidInput, match=rf"^{argument} is on meta, q is on cpu"):
        mla_jit.decode(**{**kwargs, argument: kwargs[argument].to("meta")})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sinks", torch.zeros(4)),
        ("kv_scale", torch.ones(1)),
        ("q_scale", torch.ones(1)),
        ("out", half(2, 4, 64)),
        ("lse", torch.zeros(2, 4)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_extra_on_another_device_is_refused_by_name(name: str, value: torch.Tensor) -> None:
    with pytest.raises(InvalidInput, match=rf"^{name} .*on meta"):
        mla_jit.decode(**arguments(**{name: value.to("meta")}))


def test_half_of_a_pair_on_another_device_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"^kpe is on meta"):
        mla_jit.decode(**arguments(kv_cache=(half(8, 16, 1, 64), half(8, 16, 1, 16).to("meta"))))
    with pytest.raises(InvalidInput, match=r"^kv_scales is on meta"):
        mla_jit.decode(**scaled(scales=torch.ones(8, 16, 1, 1, device="meta")))
    with pytest.raises(InvalidInput, match=r"^kpe is on meta"):
        mla_jit.decode(**scaled(kpe=half(8, 16, 1, 16).to("meta")))
    with pytest.raises(InvalidInput, match=r"^q_pe is on meta"):
        mla_jit.decode(**arguments(q=(half(2, 4, 64), half(2, 4, 16).to("meta"))))


PROBLEM = {
    "num_heads": (0, "^num_heads is 0"),
    "num_kv_heads": (0, "^num_kv_heads is 0"),
    "kv_lora_rank": (15, "^kv_lora_rank is 15"),
    "rope_dim": (-1, "^rope_dim is -1"),
    "page_size": (0, "^page_size is 0"),
    "batch": (-1, r"^batch, q_len and max_kv_len"),
    "q_len": (-1, r"^batch, q_len and max_kv_len"),
    "max_kv_len": (-1, r"^batch, q_len and max_kv_len"),
    "q_dtype": ("int4", "^q_dtype 'int4' is unknown; known: bf16"),
    "kv_dtype": ("int4", "^kv_dtype 'int4' is unknown"),
    "out_dtype": ("int4", "^out_dtype 'int4' is unknown"),
    "layout": ("ring", "^layout 'ring' is unknown; known: joint, split"),
    "paging": ("tree", "^paging 'tree' is unknown"),
    "num_kv_splits": (0, "^num_kv_splits is 0"),
}


@pytest.mark.parametrize("field", PROBLEM)
def test_a_problem_made_by_hand_is_checked_too(field: str) -> None:
    value, message = PROBLEM[field]
    with pytest.raises(InvalidInput, match=message):
        DecodeProblem(**{"num_heads": 16, field: value})


SCALED: dict[str, tuple[dict[str, Any], str]] = {
    "a cache in bf16": ({"kv_dtype": "bf16"}, "^ckv is bf16"),
    "q in fp8": ({"q_dtype": "fp8_e4m3"}, "^q is fp8_e4m3"),
    "no whole groups": ({"kv_lora_rank": 500}, "^kv_lora_rank is 500; kv_scales has one scale for 128 columns"),
    "kv_scale": ({"kv_scale": True}, "^kv_scale is given beside kv_scales"),
}


@pytest.mark.parametrize("what", SCALED)
def test_a_problem_with_scales_is_checked_too(what: str) -> None:
    fields, message = SCALED[what]
    with pytest.raises(InvalidInput, match=message):
        DecodeProblem(**{"num_heads": 16, "layout": "three", "kv_dtype": "fp8_e4m3", **fields})


def test_a_problem_with_scales_describes_its_call() -> None:
    call = cases.build(cases.Case(**{**cases.SCALED, "C": 256}, page=7, kv_heads=2))
    inputs = decode_inputs(call.q, call.kv_cache, **call.kwargs)
    problem = inputs.problem
    assert (problem.layout, problem.q_dtype, problem.kv_dtype, problem.rope_dtype) == (
        "three", "bf16", "fp8_e4m3", "bf16",
    )  # fmt: skip
    assert (problem.kv_lora_rank, problem.rope_dim, problem.kv_scale, problem.misaligned) == (256, 16, False, ())
    assert problem.token_bytes == 2 * (256 + 2 * 4 + 16 * 2)
    assert inputs.tensors["scales"] is call.kv_cache[1]
    assert {k: v for k, v in inputs.numbers.items() if k.startswith("scales")} == {
        "scales_stride_page": 7 * 2 * 2, "scales_stride_tok": 2 * 2, "scales_stride_head": 2,
    }  # fmt: skip
    assert "bf16×fp8_e4m3 scaled" in str(problem)
    plain = DecodeProblem(num_heads=4, kv_dtype="fp8_e4m3")
    assert "scaled" not in f"{plain} {plain.kind} {plain.label}"
    assert plain.token_bytes == 576


@pytest.mark.parametrize("target_name", ["sm_80", "sm_90", "gfx942", "gfx950", "cpu"])
def test_a_cache_with_scales_is_served_or_refused_with_the_reason(target_name: str) -> None:
    fields = {"num_heads": 16, "layout": "three", "kv_dtype": "fp8_e4m3"}
    found = mla_jit.supports(on=target_name, **fields)
    assert found.variant == ("decode_blocked_cpu" if target_name == "cpu" else "decode_splitk_triton")
    walked = mla_jit.supports(on=target_name, scheduler="persistent", **fields)
    assert walked.variant == ("decode_blocked_cpu" if target_name == "cpu" else "decode_persistent_triton")
    if target_name == "sm_90":
        for name in ("decode_splitk_asm", "decode_narrow_asm", "decode_splitk_gluon"):
            assert "a cache with scales is multiplied group by group" in found.reasons[name]
        assert "a cache with scales is multiplied group by group" in walked.reasons["decode_persistent_gluon"]


def test_a_problem_describes_its_call() -> None:
    case = cases.Case(
        heads=12,
        kv_heads=3,
        C=128,
        R=32,
        page=7,
        q_lens=(2, 0, 5),
        lens=(30, 9, 100),
        q_dtype="bf16",
        kv_dtype="fp8_e4m3",
        csr=True,
        q_split=True,
        kv_split=True,
        kv_view="gap",
        out_view="odd",
        causal=False,
        cap=5.0,
        sinks=True,
        kv_scale="tensor",
        index64=True,
        q_tail=1,
        num_kv_splits=3,
        batch_invariant=True,
        hint=True,
    )
    call = cases.build(case)
    problem = decode_inputs(call.q, call.kv_cache, **call.kwargs).problem
    assert problem == DecodeProblem(
        num_heads=12,
        kv_lora_rank=128,
        rope_dim=32,
        num_kv_heads=3,
        q_dtype="bf16",
        kv_dtype="fp8_e4m3",
        out_dtype="bf16",
        page_size=7,
        layout="split",
        q_split=True,
        paging="csr",
        has_lens=False,
        ragged=True,
        causal=False,
        soft_cap=True,
        sinks=True,
        lse=True,
        q_scale=False,
        kv_scale=True,
        context_parallel=False,
        misaligned=("out",),
        flat_pages=False,
        index64=("table", "kv_indptr", "last", "qo_indptr"),
        batch=3,
        q_len=5,
        max_kv_len=128,
        total_kv=256,
        hinted=True,
        num_kv_splits=3,
        batch_invariant=True,
    )
    assert (problem.gqa_ratio, problem.rows, problem.head_dim) == (4, 20, 160)
    assert "12 heads/3 × 128+32, bf16×fp8_e4m3, page 7, batch 3, q_len 5 ragged" in str(problem)
    assert problem.fields()["page_size"] == 7


@pytest.mark.parametrize(("view", "expected"), [("", ()), ("padded", ()), ("heads", ()), ("odd", ("q",))])
def test_alignment_is_part_of_the_problem(view: str, expected: tuple[str, ...]) -> None:
    call = cases.build(cases.Case(q_view=view, q_dtype="bf16", kv_dtype="bf16"))
    assert decode_inputs(call.q, call.kv_cache, **call.kwargs).problem.misaligned == expected


def test_a_part_without_elements_is_aligned() -> None:
    """A cache (ckv, kpe) without a rotary part: the empty tensor has strides of 1; nothing is read there."""
    call = cases.build(cases.Case(R=0, q_split=True, kv_split=True, page=16, q_dtype="bf16", kv_dtype="bf16"))
    assert decode_inputs(call.q, call.kv_cache, **call.kwargs).problem.misaligned == ()


@pytest.mark.parametrize(("rank", "expected"), [(48, ()), (24, ("q", "kv", "out"))])
def test_an_allocated_output_is_aligned_only_if_its_rows_are(rank: int, expected: tuple[str, ...]) -> None:
    inputs = decode_inputs(
        half(2, 4, rank), half(3, 16, rank), kv_lora_rank=rank, sm_scale=0.1, block_table=ints(0, 1).view(2, 1),
        seq_lens=ints(3, 4),
    )  # fmt: skip
    assert inputs.problem.misaligned == expected


def test_steps_of_one_generation_share_a_problem() -> None:
    """Lengths, hints and table widths change from token to token; what is compiled for must not."""

    def problem(columns: int, hint: int) -> DecodeProblem:
        table = torch.zeros(2, columns, dtype=torch.int32)
        kwargs = arguments(block_table=table, max_kv_len=hint, total_kv=hint + 1)
        return decode_inputs(
            kwargs.pop("q"), half(4096, 16, 1, 80), **{k: v for k, v in kwargs.items() if k != "kv_cache"}
        ).problem

    assert problem(100, 1025) == problem(128, 1500) == problem(65, 2000)
    assert problem(100, 1025) != problem(100, 3000)
    assert problem(10, 5000).max_kv_len == 256  # the table's capacity bounds a looser hint
    assert [bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]


def test_contents_are_never_read() -> None:
    """The same problem for garbage in every index tensor: nothing is read back from the device."""
    good = arguments()
    bad = {name: good[name].fill_(-7) for name in ("block_table", "seq_lens")}
    first, second = ({**arguments(), **changes} for changes in ({}, bad))
    problems = [decode_inputs(k.pop("q"), k.pop("kv_cache"), **k).problem for k in (first, second)]
    assert problems[0] == problems[1]


def test_what_no_variant_serves_lists_every_reason() -> None:
    problem = DecodeProblem(num_heads=16, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32")
    with pytest.raises(NoVariant, match="fp32 q or cache") as caught:
        plan.choose(problem, target.by_name("sm_80"))
    assert set(caught.value.reasons) == {variant.name for variant in ops.variants("decode")}
    assert all(reason in str(caught.value) for reason in caught.value.reasons.values())
    support = mla_jit.supports(problem, on="sm_80")
    assert not support
    assert support.reasons == caught.value.reasons
    assert mla_jit.supports(problem, on="cpu").variant == "decode_blocked_cpu"
