"""The other libraries' spellings: their argument order and defaults, what they return, and what they refuse."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import cases
from cases import Call, Case

import mla_jit
from mla_jit import launch, settings, target
from mla_jit.compat import flash_mla
from mla_jit.compat.aiter import get_mla_metadata_info_v1, get_mla_metadata_v1, mla_decode_fwd
from mla_jit.errors import InvalidInput
from mla_jit.launch.null import NullRuntime
from mla_jit.ops.decode import persistent

AITER_ORDER = (
    "q kv_buffer o qo_indptr kv_indptr kv_indices kv_last_page_lens max_seqlen_q page_size nhead_kv sm_scale "
    "logit_cap num_kv_splits num_kv_splits_indptr work_meta_data work_indptr work_info_set reduce_indptr "
    "reduce_final_map reduce_partial_map q_scale kv_scale intra_batch_mode return_logits return_lse g_kv_indptr "
    "cp_world_size cp_rank causal"
)
AITER_DEFAULTS = {
    "page_size": 1, "nhead_kv": 1, "logit_cap": 0.0, "intra_batch_mode": False, "return_logits": False,
    "return_lse": False, "cp_world_size": 1, "cp_rank": 0, "causal": True,
}  # fmt: skip
FLASH_MLA_ORDER = (
    "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata num_splits softmax_scale causal "
    "is_fp8_kvcache indices attn_sink extra_k_cache extra_indices_in_kvcache topk_length extra_topk_length"
)

AITER_CASES = (
    Case(csr=True, page=1, q_lens=(1, 1, 1), lens=(45, 0, 33)),
    Case(csr=True, page=1, q_lens=(2, 2), lens=(45, 33), heads=12),
    Case(csr=True, page=7, q_lens=(3, 0, 1), lens=(49, 50, 0)),
    Case(csr=True, page=64, q_lens=(1, 1), lens=(200, 64), heads=8, kv_heads=2, num_kv_splits=3),
    Case(csr=True, page=16, q_lens=(4, 2), lens=(100, 3), cap=15.0, q_dtype="bf16", kv_dtype="bf16"),
    Case(csr=True, page=1, q_lens=(2, 1), lens=(90, 20), causal=False),
    Case(csr=True, page=1, q_lens=(1, 1), lens=(90, 20), q_dtype="bf16", kv_dtype="fp8_e4m3", kv_scale="tensor"),
)
FLASH_MLA_CASES = (
    Case(q_3d=False, lens=(100, 37, 0)),
    Case(q_len=3, lens=(100, 2, 0, 1), heads=12),
    Case(q_len=2, lens=(100, 37), causal=False, heads=8, kv_heads=2),
    Case(q_len=2, lens=(100, 1), sinks=True, page=64),
    Case(q_3d=False, lens=(130, 64), q_dtype="bf16", kv_dtype="bf16", page=64),
)


WORK = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
INFO_ORDER = (
    "batch_size max_seqlen_qo num_head_qo q_dtype kv_dtype is_sparse fast_mode num_kv_splits intra_batch_mode "
    "max_split_per_batch"
)
METADATA_ORDER = (
    "seqlens_qo_indptr seqlens_kv_indptr kv_last_page_lens num_heads_per_head_k num_heads_k is_causal "
    "work_metadata_ptrs work_info_set work_indptr reduce_indptr reduce_final_map reduce_partial_map page_size "
    "kv_granularity max_seqlen_qo uni_seqlen_qo fast_mode topk max_split_per_batch intra_batch_mode is_cp_round_robin "
    "mla_version dtype_q_nope dtype_q_rope dtype_kv_nope dtype_kv_rope dtype_q dtype_kv"
)


def work_buffers(call: Call, *, batch: int | None = None) -> dict[str, torch.Tensor]:
    """The six buffers for a call, or for a larger batch, full of -7; by the names of mla_decode_fwd."""
    case = call.case
    info = get_mla_metadata_info_v1(
        batch or len(case.lens), call.kwargs["max_q_len"], case.heads, call.q.dtype, call.kv_cache.dtype,
        is_sparse=False, fast_mode=True,
    )  # fmt: skip
    device = call.q.device
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in info]
    for tensor in made:
        if tensor.dtype == torch.int32:
            tensor.fill_(-7)
    return dict(zip(WORK, made, strict=True))


def metadata_arguments(call: Call, work: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    """Of get_mla_metadata_v1, as serving frameworks call it: dtypes and the longest query by keyword."""
    kwargs, case = call.kwargs, call.case
    return {
        "seqlens_qo_indptr": kwargs["qo_indptr"], "seqlens_kv_indptr": kwargs["kv_indptr"],
        "kv_last_page_lens": kwargs["kv_last_page_lens"], "num_heads_per_head_k": case.heads // case.kv_heads,
        "num_heads_k": case.kv_heads, "is_causal": case.causal, "work_metadata_ptrs": work["work_meta_data"],
        **{name: work[name] for name in WORK[1:]}, "page_size": case.page, "kv_granularity": max(case.page, 16),
        "max_seqlen_qo": kwargs["max_q_len"], "uni_seqlen_qo": kwargs["max_q_len"], "fast_mode": False,
        "dtype_q": call.q.dtype, "dtype_kv": call.kv_cache.dtype, **more,
    }  # fmt: skip


def defaults(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def aiter_arguments(call: Call) -> dict[str, Any]:
    """A call in AITER's words, with outputs full of NaN."""
    kwargs, case = call.kwargs, call.case
    out = call.q.new_full((*call.q.shape[:-1], case.C), torch.nan)
    last = kwargs["kv_last_page_lens"]
    if case.page == 1:
        last = torch.full_like(last, 2**31 - 1)
    return {
        "q": call.q, "kv_buffer": call.kv_cache, "o": out, "qo_indptr": kwargs["qo_indptr"],
        "kv_indptr": kwargs["kv_indptr"], "kv_indices": kwargs["kv_indices"], "kv_last_page_lens": last,
        "max_seqlen_q": kwargs["max_q_len"],
        "page_size": case.page, "nhead_kv": case.kv_heads, "sm_scale": kwargs["sm_scale"], "logit_cap": case.cap,
        "num_kv_splits": case.num_kv_splits, "q_scale": kwargs["q_scale"], "kv_scale": kwargs["kv_scale"],
        "causal": case.causal,
    }  # fmt: skip


def flash_mla_arguments(call: Call) -> dict[str, Any]:
    kwargs = call.kwargs
    return {
        "q": call.q, "k_cache": call.kv_cache, "block_table": kwargs["block_table"],
        "cache_seqlens": kwargs["seq_lens"], "head_dim_v": call.case.C,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        "softmax_scale": kwargs["sm_scale"], "causal": call.case.causal, "attn_sink": kwargs.get("sinks"),
    }  # fmt: skip


def test_aiter_signature() -> None:
    assert " ".join(inspect.signature(mla_decode_fwd).parameters) == AITER_ORDER
    assert {name: value for name, value in defaults(mla_decode_fwd).items() if value is not None} == AITER_DEFAULTS


def test_aiter_signatures_of_the_schedule() -> None:
    assert " ".join(inspect.signature(get_mla_metadata_info_v1).parameters) == INFO_ORDER
    assert " ".join(inspect.signature(get_mla_metadata_v1).parameters) == METADATA_ORDER
    given = {name: value for name, value in defaults(get_mla_metadata_v1).items() if value is not None}
    assert given == {
        "page_size": 1, "kv_granularity": 16, "max_seqlen_qo": -1, "uni_seqlen_qo": -1, "fast_mode": True, "topk": -1,
        "max_split_per_batch": -1, "intra_batch_mode": False, "is_cp_round_robin": False, "mla_version": 0,
    }  # fmt: skip


@pytest.fixture
def null() -> Iterator[NullRuntime]:
    """Calls on CPU tensors planned for sm_90 and sent to the null runtime."""
    runtime = NullRuntime()
    with settings.scope(target="sm_90", shipped_db=False):
        launch.override(runtime)
        mla_jit.reload()
        yield runtime
    launch.override(None)
    mla_jit.reload()


def scheduled_call(batch: int = 3, page: int = 64, q_len: int = 1, heads: int = 16) -> Call:
    case = Case(csr=True, page=page, q_lens=(q_len,) * batch, lens=(200,) * batch, heads=heads, C=512, R=64,
                q_dtype="bf16", kv_dtype="bf16")  # fmt: skip
    return cases.build(case)


def test_aiter_schedule_is_made_once_and_run_by_each_layer(null: NullRuntime) -> None:
    """Buffers for 10 sequences serve 3; the kernels get them, and a split wish for them is none for the call."""
    call = scheduled_call()
    work = work_buffers(call, batch=10)
    get_mla_metadata_v1(**metadata_arguments(call, work))
    for _ in range(2):
        mla_decode_fwd(**{**aiter_arguments(call), "num_kv_splits": 16}, **work, intra_batch_mode=True)
    names = [record.kernel.removeprefix("decode_persistent_triton_") for record in null.records]
    assert names == ["schedule", *["decode_persistent_asm"] * 2]
    lists = {work[name].data_ptr() for name in ("work_indptr", "work_info_set", "reduce_final_map")}
    assert lists | {work["reduce_partial_map"].data_ptr()} <= set(null.records[0].pointers)
    assert call.kwargs["kv_indptr"].data_ptr() in null.records[0].pointers
    assert lists <= set(null.records[1].pointers)
    assert null.records[1].grid == (work["work_indptr"].shape[0] - 1, 1, 1)
    assert mla_jit.last_dispatch().variant == "decode_persistent_asm"


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("changes", [{}, {"block_n": 32, "tma": False}, {"waves": 2}, {"fold": True, "overhead": 10}])
def test_aiter_schedule_suits_any_config(heads: int, changes: dict[str, Any]) -> None:
    """What the call may be tuned to changes nothing that the schedule was made with."""
    where, fields = target.by_name("sm_90"), {"num_heads": heads, "batch": 7, "scheduler": "persistent"}
    p = mla_jit.DecodeProblem(**fields, planned=True, groups=50)
    config = persistent.default(p, where)
    changed = config.replace(**changes)
    assert persistent.rejects(p, where, changed) is None
    assert persistent.lists(p, where, changed) == persistent.lists(p, where, config)
    blocks = -(-heads // config.int("block_m"))
    walk = next(one for one in persistent.launches(p, where, changed) if one.kernel == 0)
    assert walk.grid == (50 * blocks, 1, 1)


def test_aiter_schedule_of_another_call_is_refused(null: NullRuntime) -> None:
    call = scheduled_call()
    work = work_buffers(call)
    get_mla_metadata_v1(**metadata_arguments(call, work))
    other = scheduled_call(batch=2)
    with pytest.raises(InvalidInput, match="made for 3 sequences and page size 64, the call has 2 and 64"):
        mla_decode_fwd(**aiter_arguments(other), **work)
    with pytest.raises(InvalidInput, match="made for 3 sequences and page size 64, the call has 3 and 128"):
        mla_decode_fwd(**aiter_arguments(scheduled_call(page=128)), **work)
    with pytest.raises(InvalidInput, match="made for fewer heads or query tokens than the call's 16 and 2"):
        mla_decode_fwd(**aiter_arguments(scheduled_call(q_len=2)), **work)
    elsewhere = {name: t.clone() for name, t in work.items()}
    with pytest.raises(InvalidInput, match=r"was not filled by mla_jit\.compat\.aiter\.get_mla_metadata_v1"):
        mla_decode_fwd(**aiter_arguments(call), **elsewhere)
    for name in ("work_indptr", "reduce_final_map", "reduce_partial_map"):
        with pytest.raises(InvalidInput, match=f"{name} is not what get_mla_metadata_v1 filled together"):
            mla_decode_fwd(**aiter_arguments(call), **{**work, name: elsewhere[name]})
    assert len(null.records) == 1
    mla_decode_fwd(**aiter_arguments(scheduled_call()), **work)  # other tensors of the same sizes
    assert len(null.records) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"topk": 2048}, "topk 2048: sparse attention"),
        ({"max_seqlen_qo": -1, "uni_seqlen_qo": -1}, "max_seqlen_qo and uni_seqlen_qo are unknown"),
        ({"dtype_q_nope": torch.float8_e4m3fn}, "dtype_q_nope torch.float8_e4m3fn and dtype_q_rope torch.bfloat16"),
        ({"dtype_kv": torch.int8}, "the dtype of kv, torch.int8, is not supported"),
        ({"kv_last_page_lens": None}, "page_size 64 needs kv_last_page_lens"),
        ({"seqlens_kv_indptr": torch.zeros(3, dtype=torch.int32)}, r"seqlens_kv_indptr is torch.int32 \(3,\)"),
        ({"work_info_set": torch.zeros(9, 4, dtype=torch.int32)}, r"work_info_set is torch.int32 \(9, 4\)"),
        ({"work_info_set": torch.zeros(400, 8, dtype=torch.int32)}, r"work_info_set is torch.int32 \(400, 8\)"),
        ({"reduce_final_map": torch.zeros(3, 3)}, "reduce_final_map is torch.float32"),
        ({"reduce_partial_map": torch.zeros(2, dtype=torch.int32)}, "reduce_partial_map is torch.int32"),
        ({"max_seqlen_qo": 40}, "reduce_partial_map is torch.int32"),
    ],
)
def test_aiter_schedule_refuses_with_the_reason(null: NullRuntime, changes: dict[str, Any], reason: str) -> None:
    call = scheduled_call()
    with pytest.raises(InvalidInput, match=reason):
        get_mla_metadata_v1(**{**metadata_arguments(call, work_buffers(call)), **changes})
    assert null.records == []
    with pytest.raises(InvalidInput, match="sparse"):
        get_mla_metadata_info_v1(3, 1, 16, torch.bfloat16, torch.bfloat16, True)


@pytest.mark.parametrize("case", AITER_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("modes", [{}, {"intra_batch_mode": True, "max_split_per_batch": 2}])
def test_aiter_decode_by_a_schedule(case: Case, modes: dict[str, Any]) -> None:
    call = cases.build(case)
    work = work_buffers(call)
    get_mla_metadata_v1(**metadata_arguments(call, work, **modes))
    arguments = aiter_arguments(call)
    _, lse = mla_decode_fwd(**arguments, **work, return_lse=True)
    cases.check(call, arguments["o"], lse)


@pytest.mark.parametrize("case", AITER_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("return_lse", [False, True])
def test_aiter_decode(case: Case, return_lse: bool) -> None:
    call = cases.build(case)
    arguments = aiter_arguments(call)
    logits, lse = mla_decode_fwd(**arguments, return_lse=return_lse)
    assert logits is arguments["o"]
    assert (lse is not None) == return_lse
    cases.check(call, arguments["o"], lse)


def test_aiter_called_as_vllm_calls_it() -> None:
    """Eight positional arguments, a cache viewed at page size 1, scales even where nothing is quantised."""
    call = cases.build(Case(csr=True, page=1, q_lens=(1, 1), lens=(45, 33), q_dtype="bf16", kv_dtype="bf16"))
    out = torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    lens = torch.tensor([45, 33], dtype=torch.int32)
    one = torch.tensor(1.0)
    mla_decode_fwd(
        call.q, call.kv_cache.view(-1, 1, 1, 80), out, call.kwargs["qo_indptr"], call.kwargs["kv_indptr"],
        call.kwargs["kv_indices"], lens, 1, sm_scale=call.kwargs["sm_scale"], logit_cap=0.0, q_scale=one, kv_scale=one,
        causal=True,
    )  # fmt: skip
    cases.check(call, out)


def test_aiter_default_scale_is_theirs() -> None:
    call = cases.build(AITER_CASES[0])  # cases scale by (C + R)^-½
    arguments = aiter_arguments(call)
    mla_decode_fwd(**{**arguments, "sm_scale": None})
    cases.check(call, arguments["o"])


def test_aiter_ignores_what_only_schedules() -> None:
    call = cases.build(AITER_CASES[1])
    arguments = aiter_arguments(call)
    indptr = torch.tensor([0, 5, 6], dtype=torch.int32)
    mla_decode_fwd(**{**arguments, "num_kv_splits": 4}, num_kv_splits_indptr=indptr, intra_batch_mode=True)
    assert mla_jit.last_dispatch().problem.num_kv_splits == 4
    cases.check(call, arguments["o"])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_aiter_context_parallel(rank: int) -> None:
    case = Case(csr=True, csr_lens=True, page=1, q_lens=(3, 1, 2), lens=(50, 1, 31), cp=(rank, 3))
    call = cases.build(case)
    arguments = aiter_arguments(call)
    g_kv_indptr = torch.tensor([0, 50, 51, 82], dtype=torch.int32)
    _, lse = mla_decode_fwd(**arguments, return_lse=True, g_kv_indptr=g_kv_indptr, cp_world_size=3, cp_rank=rank)
    cases.check(call, arguments["o"], lse)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"work_meta_data": torch.zeros(4)},
            "work_indptr, work_info_set, .* missing beside work_meta_data: pass all six",
        ),
        ({name: torch.zeros(4) for name in WORK}, "was not filled by mla_jit.compat.aiter.get_mla_metadata_v1"),
        ({"return_logits": True}, "return_logits"),
        ({"page_size": 2}, "page_size 2"),
        ({"nhead_kv": 4}, "nhead_kv 4"),
        ({"cp_world_size": 2}, "needs g_kv_indptr"),
    ],
)
def test_aiter_refuses_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        mla_decode_fwd(**{**aiter_arguments(cases.build(AITER_CASES[0])), **changes})


def test_flash_mla_signature() -> None:
    assert " ".join(inspect.signature(flash_mla.flash_mla_with_kvcache).parameters) == FLASH_MLA_ORDER
    given = {name: value for name, value in defaults(flash_mla.flash_mla_with_kvcache).items() if value is not None}
    assert given == {"causal": False, "is_fp8_kvcache": False}


@pytest.mark.parametrize("arguments", [(), (torch.zeros(2), 128, 1), (torch.zeros(2), 128, 1, 128, True, 2048)])
def test_flash_mla_metadata_takes_anything(arguments: tuple[Any, ...]) -> None:
    metadata, splits = flash_mla.get_mla_metadata(*arguments, anything=1)
    assert isinstance(metadata, flash_mla.FlashMLASchedMeta)
    assert splits is None


@pytest.mark.parametrize("case", FLASH_MLA_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_flash_mla_decode(case: Case, how: str) -> None:
    call = cases.build(case)
    function = flash_mla.flash_mla_with_kvcache
    if how == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    arguments = flash_mla_arguments(call)
    out, lse = function(**arguments)
    batch, q_len, heads = call.q.shape[:3]
    assert lse.shape == (batch, heads, q_len)
    assert lse.is_contiguous()
    empty = call.expected()[1].transpose(1, 2) == -torch.inf
    assert torch.equal(lse == torch.inf, empty)
    cases.check(call, out, torch.where(empty, -torch.inf, lse).transpose(1, 2))


def test_flash_mla_defaults() -> None:
    """D^-½ and no mask, and the two values of 2025's get_mla_metadata, whatever they are."""
    call = cases.build(Case(q_len=2, lens=(90, 20), causal=False))
    assert math.isclose(call.kwargs["sm_scale"], 80**-0.5)
    table, lens = call.kwargs["block_table"], call.kwargs["seq_lens"]
    stale = torch.zeros(3, 8, dtype=torch.int32)
    out, lse = flash_mla.flash_mla_with_kvcache(call.q, call.kv_cache, table, lens, 64, stale, stale[0])
    cases.check(call, out, lse.transpose(1, 2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"indices": torch.zeros(2, 1, 8, dtype=torch.int32)}, "indices: sparse attention"),
        ({"topk_length": torch.zeros(2), "extra_k_cache": torch.zeros(2)}, "extra_k_cache, topk_length"),
        ({"is_fp8_kvcache": True}, "656-byte"),
        ({"q": torch.zeros(3, 4, 80)}, r"\[B, q_len, H, D\]"),
    ],
)
def test_flash_mla_refuses_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    arguments = {**flash_mla_arguments(cases.build(FLASH_MLA_CASES[0])), **changes}
    with pytest.raises(InvalidInput, match=reason):
        flash_mla.flash_mla_with_kvcache(**arguments)


def test_compat_is_reached_by_attribute() -> None:
    assert mla_jit.compat.aiter.mla_decode_fwd is mla_decode_fwd
    assert mla_jit.compat.flash_mla.flash_mla_with_kvcache is flash_mla.flash_mla_with_kvcache
    with pytest.raises(AttributeError, match="it has aiter, flash_mla"):
        mla_jit.compat.flashinfer  # noqa: B018
