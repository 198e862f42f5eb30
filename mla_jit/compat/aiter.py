"""AITER's spelling: `from aiter.mla import mla_decode_fwd` becomes `from mla_jit.compat.aiter import mla_decode_fwd`.

So for `mla_prefill_fwd` and its kin, and for `get_mla_metadata_info_v1` and `get_mla_metadata_v1`, the schedule of
persistent decode. All follow AITER v0.1.20 (August 2026): `mla_decode_fwd` ends in `causal`, `mla_prefill_ps_fwd` in
`return_lse`, `get_mla_metadata_v1` takes `kv_last_page_lens` third and ends in the dtypes of the nope and rope parts
and their older names; what is called by keyword in 2026 fits.

A schedule is ours in the caller's six buffers (see ops/decode/triton_persistent.py for what stands in them):

    work_indptr         int32 [groups + 1]           where the pieces of each group of programs begin
    work_info_set       int32 [batch + groups, 4]    the pieces
    reduce_final_map    int32 [batch, 3]             the pieces of each sequence
    reduce_partial_map  int32 [batch · counts]       how many of its programs are done, while a call runs
    work_meta_data      uint64 [2]                   neither written nor read
    reduce_indptr       int32 [1]                    neither written nor read

Buffers for a larger batch serve a smaller one. The schedule depends on the lengths alone, not on what is tuned, so both
functions agree on it whatever serves the call. Which batch and page size it was made for is kept on the host, by the
address of work_info_set: a call with another, or with buffers that nothing here has filled, is an error before any
launch. Nothing is read back from the device, and both functions can be captured.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_jit import DecodeMetadata, DecodeProblem, api_metadata, decode, dtypes, prefill, prefill_paged
from mla_jit.api_prefill import reduce_partials
from mla_jit.errors import InvalidInput

Info = tuple[tuple[tuple[int, ...], torch.dtype], ...]
_MOST = 256  # schedules whose sizes are kept


class _Made(NamedTuple):
    """For what the schedule in these buffers was made. They are held, so that no other buffer has their addresses."""

    info: Tensor
    others: dict[str, Tensor]  # with which it belongs together, by name
    batch: int
    page_size: int
    counts: int  # of a sequence


_made: collections.OrderedDict[tuple[torch.device, int], _Made] = collections.OrderedDict()


def get_mla_metadata_info_v1(
    batch_size: int, max_seqlen_qo: int, num_head_qo: int, q_dtype: torch.dtype, kv_dtype: torch.dtype, is_sparse: bool,
    fast_mode: bool = True, num_kv_splits: int = 32, intra_batch_mode: bool = False, max_split_per_batch: int = -1,
) -> Info:  # fmt: skip
    """(shape, dtype) of the six buffers of `get_mla_metadata_v1`, in AITER's order: see this module.

    Args:
        batch_size, max_seqlen_qo: the most sequences, and the most query tokens of one, that will be scheduled.
        num_head_qo: query heads over all KV heads; any number.
        q_dtype, kv_dtype: as the call's; they decide how many programs the device holds.
        fast_mode, num_kv_splits, intra_batch_mode, max_split_per_batch: the sizes do not depend on them.

    Raises InvalidInput for is_sparse, and NoVariant where nothing has a persistent scheduler for the dtypes.
    """
    if is_sparse:
        raise InvalidInput("is_sparse=True: sparse attention is not served by this version")
    problem = _problem(batch_size, max_seqlen_qo, num_head_qo, 1, q_dtype, kv_dtype)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    shapes = api_metadata.work_lists(problem, device)
    none = {"groups": (1,), "info": (1, 4), "sums": (1, 3), "arrivals": (1, 1)}  # the CPU needs no list
    groups, info, sums, arrivals = (shapes.get(name, none[name]) for name in DecodeMetadata._fields)
    return (
        ((2,), torch.uint64), (groups, torch.int32), (info, torch.int32), ((1,), torch.int32), (sums, torch.int32),
        ((max(1, arrivals[0] * arrivals[1]),), torch.int32),
    )  # fmt: skip


def get_mla_metadata_v1(
    seqlens_qo_indptr: Tensor, seqlens_kv_indptr: Tensor, kv_last_page_lens: Tensor | None, num_heads_per_head_k: int,
    num_heads_k: int, is_causal: bool, work_metadata_ptrs: Tensor, work_info_set: Tensor, work_indptr: Tensor,
    reduce_indptr: Tensor, reduce_final_map: Tensor, reduce_partial_map: Tensor, page_size: int = 1,
    kv_granularity: int = 16, max_seqlen_qo: int = -1, uni_seqlen_qo: int = -1, fast_mode: bool = True, topk: int = -1,
    max_split_per_batch: int = -1, intra_batch_mode: bool = False, is_cp_round_robin: bool = False,
    mla_version: int = 0, dtype_q_nope: torch.dtype | None = None, dtype_q_rope: torch.dtype | None = None,
    dtype_kv_nope: torch.dtype | None = None, dtype_kv_rope: torch.dtype | None = None,
    dtype_q: torch.dtype | None = None, dtype_kv: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Makes the schedule of a step for `mla_decode_fwd(work_meta_data=…, …)`, on the device, in the caller's buffers.

    Args:
        seqlens_qo_indptr, seqlens_kv_indptr, kv_last_page_lens: int32 [B + 1], [B + 1] (in pages) and [B], as the
            call's; the last is ignored at page_size 1.
        num_heads_per_head_k, num_heads_k: the GQA ratio and the KV heads.
        work_metadata_ptrs … reduce_partial_map: of the shapes that `get_mla_metadata_info_v1` gives, or for a larger
            batch. Calls that read them run one after the other.
        page_size: as the call's.
        max_seqlen_qo, uni_seqlen_qo: the most query tokens of a sequence; the second if the first is unknown (< 1).
        max_split_per_batch: at most so many pieces a sequence; no bound if < 1.
        intra_batch_mode: as many pieces of each sequence (see `mla_jit.decode_metadata`).
        is_causal, kv_granularity, fast_mode, is_cp_round_robin, mla_version: the schedule does not depend on them; with
            context parallelism seqlens_kv_indptr counts the tokens of this rank, as the call's kv_indptr does.
        dtype_q_nope, dtype_kv_nope, dtype_q, dtype_kv: bf16 if absent; they only weigh how pieces are balanced.

    Raises InvalidInput, before any launch, for topk (the keys of sparse attention), nope and rope parts of different
    dtypes, and buffers that are too small or of another kind.
    """
    if topk > 0:
        raise InvalidInput(f"topk {topk}: sparse attention is not served by this version")
    q_len = max_seqlen_qo if max_seqlen_qo >= 1 else uni_seqlen_qo
    if q_len < 1:
        raise InvalidInput(
            "max_seqlen_qo and uni_seqlen_qo are unknown (< 1); pass one: the most query tokens of a sequence"
        )
    q_dtype = _one_dtype("q", dtype_q_nope, dtype_q_rope, dtype_q)
    kv_dtype = _one_dtype("kv", dtype_kv_nope, dtype_kv_rope, dtype_kv)
    batch, device = seqlens_qo_indptr.shape[0] - 1, seqlens_kv_indptr.device
    lengths = {"kv_indptr": seqlens_kv_indptr} | (
        {"last": kv_last_page_lens} if page_size > 1 and kv_last_page_lens is not None else {}
    )  # fmt: skip
    if page_size > 1 and kv_last_page_lens is None:
        raise InvalidInput(f"page_size {page_size} needs kv_last_page_lens")
    for name, t in lengths.items():
        what, n = ("seqlens_kv_indptr", batch + 1) if name == "kv_indptr" else ("kv_last_page_lens", batch)
        kind = t.dtype in (torch.int32, torch.int64) and t.is_contiguous()
        if not kind or tuple(t.shape) != (n,) or t.device != device:
            raise InvalidInput(
                f"{what} is {t.dtype} {tuple(t.shape)} on {t.device}; it must be a contiguous int32 [{n}] on {device}"
            )
    wide = tuple(name for name, t in lengths.items() if t.dtype == torch.int64)
    problem = _problem(
        batch, q_len, num_heads_per_head_k * num_heads_k, num_heads_k, q_dtype, kv_dtype, page_size=page_size,
        index64=wide, causal=is_causal, planned=True, groups=_groups(work_indptr),
    )  # fmt: skip
    metadata = _metadata(batch, q_len, num_heads_per_head_k, num_heads_k, work_indptr, work_info_set, reduce_final_map,
                         reduce_partial_map, device)  # fmt: skip
    api_metadata.fill_lists(
        problem, {**lengths, **metadata._asdict()}, device, intra_batch_mode=intra_batch_mode,
        max_split_per_batch=max_split_per_batch if max_split_per_batch >= 1 else None,
    )  # fmt: skip
    key = device, work_info_set.data_ptr()
    others = {
        "work_indptr": work_indptr, "reduce_final_map": reduce_final_map, "reduce_partial_map": reduce_partial_map,
    }  # fmt: skip
    _made[key] = _Made(work_info_set, others, batch, page_size, _counts(num_heads_per_head_k, num_heads_k, q_len))
    _made.move_to_end(key)
    if len(_made) > _MOST:
        _made.popitem(last=False)


def _problem(
    batch: int, q_len: int, heads: int, kv_heads: int, q_dtype: torch.dtype, kv_dtype: torch.dtype, **more: Any
) -> DecodeProblem:
    """A call as far as it is known when its schedule is made."""
    q, kv = _row("q", q_dtype), _row("kv", kv_dtype)
    return DecodeProblem(
        num_heads=heads, num_kv_heads=kv_heads, batch=batch, q_len=q_len, paging="csr", has_lens=False, ragged=True,
        scheduler="persistent", q_dtype=q.name, kv_dtype=kv.name, out_dtype="bf16" if q.bits == 8 else q.name, **more,
    )  # fmt: skip


def _row(what: str, dtype: torch.dtype) -> dtypes.DType:
    row = dtypes.of_torch(dtype)
    if row is None:
        known = ", ".join(d.torch for d in dtypes.DTYPES.values())
        raise InvalidInput(f"the dtype of {what}, {dtype}, is not supported; known: {known}")
    return row


def _one_dtype(
    what: str, nope: torch.dtype | None, rope: torch.dtype | None, both: torch.dtype | None
) -> torch.dtype:  # fmt: skip
    nope, rope = nope or both, rope or both
    if nope is not None and rope is not None and nope != rope:
        raise InvalidInput(f"dtype_{what}_nope {nope} and dtype_{what}_rope {rope} differ: such a cache is not served")
    return nope or rope or torch.bfloat16


def _groups(work_indptr: Tensor) -> int | None:
    """For how many groups a schedule with this work_indptr is made; None on the CPU, which has none."""
    return work_indptr.shape[0] - 1 if work_indptr.dim() == 1 and work_indptr.shape[0] > 1 else None


def _counts(ratio: int, kv_heads: int, q_len: int) -> int:
    """How many counts a sequence has in reduce_partial_map."""
    return kv_heads * -(-ratio * q_len // 16)


def _metadata(
    batch: int, q_len: int, ratio: int, kv_heads: int, work_indptr: Tensor, work_info_set: Tensor,
    reduce_final_map: Tensor, reduce_partial_map: Tensor, device: torch.device,
) -> DecodeMetadata:  # fmt: skip
    """What of the buffers a batch uses. InvalidInput for those that are too small or of another kind."""
    groups = _groups(work_indptr)
    if groups is None:
        return DecodeMetadata(*(torch.empty(0, dtype=torch.int32, device=device) for _ in DecodeMetadata._fields))
    counts = _counts(ratio, kv_heads, q_len)
    wanted = {
        "work_indptr": (work_indptr, (groups + 1,)), "work_info_set": (work_info_set, (batch + groups, 4)),
        "reduce_final_map": (reduce_final_map, (batch, 3)),
        "reduce_partial_map": (reduce_partial_map, (batch * counts,)),
    }  # fmt: skip
    for name, (t, shape) in wanted.items():
        fits = t.dim() == len(shape) and t.shape[0] >= shape[0] and tuple(t.shape[1:]) == shape[1:]
        if not fits or t.dtype != torch.int32 or t.device != device or not t.is_contiguous():
            raise InvalidInput(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}; {batch} sequences, {groups} groups, {q_len} "
                f"query tokens and {kv_heads} KV heads need a contiguous int32 {list(shape)} on {device}: allocate "
                "what mla_jit.compat.aiter.get_mla_metadata_info_v1 gives for the largest batch and query length"
            )
    groups_, info, sums, arrivals = (t[: shape[0]] for t, shape in wanted.values())
    return DecodeMetadata(groups_, info, sums, arrivals.view(batch, counts))


def _scheduled(
    scheduling: dict[str, Tensor | None], q: Tensor, qo_indptr: Tensor, max_seqlen_q: int, page_size: int, kv_heads: int
) -> DecodeMetadata | None:
    """The schedule that a call brings, or None. InvalidInput for one that is of another call, as far as can be told."""
    given = {name: t for name, t in scheduling.items() if t is not None}
    if not given:
        return None
    if missing := [name for name in scheduling if name not in given]:
        raise InvalidInput(
            f"{', '.join(missing)} is missing beside {', '.join(given)}: pass all six buffers of get_mla_metadata_v1, "
            "or none of them"
        )
    info, batch = given["work_info_set"], qo_indptr.shape[0] - 1
    made = _made.get((info.device, info.data_ptr()))
    if made is None:
        raise InvalidInput(
            "work_info_set was not filled by mla_jit.compat.aiter.get_mla_metadata_v1 in this process; call it on "
            "these buffers first (AITER's own function fills them with something else)"
        )
    if foreign := [name for name, t in made.others.items() if t.data_ptr() != given[name].data_ptr()]:
        raise InvalidInput(
            f"{', '.join(foreign)} is not what get_mla_metadata_v1 filled together with this work_info_set; pass the "
            "six buffers of one call of it"
        )
    if (made.batch, made.page_size) != (batch, page_size):
        raise InvalidInput(
            f"the schedule in work_info_set was made for {made.batch} sequences and page size {made.page_size}, the "
            f"call has {batch} and {page_size}; call get_mla_metadata_v1 with the arguments of the call"
        )
    ratio, q_len = q.shape[1] // kv_heads, min(max_seqlen_q, q.shape[0])
    if _counts(ratio, kv_heads, q_len) > made.counts:
        raise InvalidInput(
            f"the schedule in work_info_set was made for fewer heads or query tokens than the call's {q.shape[1]} and "
            f"{max_seqlen_q}; call get_mla_metadata_v1 with the arguments of the call"
        )
    return _metadata(
        batch, q_len, ratio, kv_heads, given["work_indptr"], info,
        given["reduce_final_map"], given["reduce_partial_map"], info.device,
    )  # fmt: skip


def mla_decode_fwd(
    q: Tensor, kv_buffer: Tensor, o: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    kv_last_page_lens: Tensor | None, max_seqlen_q: int, page_size: int = 1, nhead_kv: int = 1,
    sm_scale: float | None = None, logit_cap: float = 0.0, num_kv_splits: int | None = None,
    num_kv_splits_indptr: Tensor | None = None, work_meta_data: Tensor | None = None, work_indptr: Tensor | None = None,
    work_info_set: Tensor | None = None, reduce_indptr: Tensor | None = None, reduce_final_map: Tensor | None = None,
    reduce_partial_map: Tensor | None = None, q_scale: Tensor | None = None, kv_scale: Tensor | None = None,
    intra_batch_mode: bool = False, return_logits: bool = False, return_lse: bool = False,
    g_kv_indptr: Tensor | None = None, cp_world_size: int = 1, cp_rank: int = 0, causal: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Decode into `o`, as AITER's `mla_decode_fwd` does; returns (o, lse), with lse None unless `return_lse`.

    Args:
        q, kv_buffer, o: [T, H, C + R], [pages, page_size, nhead_kv, C + R] and [T, H, C]; any H.
        qo_indptr, kv_indptr, kv_indices: int32 [B + 1], [B + 1] (in pages) and [pages in use].
        kv_last_page_lens: int32 [B]; ignored at page_size 1, whatever it holds.
        sm_scale: (C + R)^-½ if absent, as theirs; no DeepSeek model wants that default.
        logit_cap: theirs accepts none; a positive one is served here.
        num_kv_splits: split slots a sequence; absent (best), the tuner chooses. With a schedule it is ignored, and
            always are `num_kv_splits_indptr` and `intra_batch_mode`, which the schedule was given: none changes the
            result.
        work_meta_data, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map: all six or
            none: the schedule that `get_mla_metadata_v1` has made of the same lengths, for the persistent scheduler.
        q_scale, kv_scale: 1-element fp32 tensors, applied whatever the dtypes.
        g_kv_indptr, cp_world_size, cp_rank: context parallelism: this rank holds tokens cp_rank, cp_rank +
            cp_world_size, …; g_kv_indptr counts the tokens over all ranks. Page size 1.

    Returns:
        Theirs returns the splits' fp32 partials first, or with one split a view of `o`; here it is always `o`. The LSE
        is fp32 [T, H], natural, -inf for a row with nothing to attend. Rows past qo_indptr[-1] are not written.

    Raises:
        InvalidInput for return_logits, which is not served, and for a schedule that was made for another batch or page
        size, by another function, or for which buffers are missing.
    """
    scheduling = {
        "work_meta_data": work_meta_data, "work_indptr": work_indptr, "work_info_set": work_info_set,
        "reduce_indptr": reduce_indptr, "reduce_final_map": reduce_final_map, "reduce_partial_map": reduce_partial_map,
    }  # fmt: skip
    if return_logits:
        raise InvalidInput("return_logits=True: the splits' partial results are not kept; use return_lse=True to merge")
    if kv_buffer.dim() != 4 or tuple(kv_buffer.shape[1:3]) != (page_size, nhead_kv):
        raise InvalidInput(
            f"kv_buffer has shape {tuple(kv_buffer.shape)}; page_size {page_size} and nhead_kv {nhead_kv} ask for "
            f"[pages, {page_size}, {nhead_kv}, C + R]"
        )
    metadata = _scheduled(scheduling, q, qo_indptr, max_seqlen_q, page_size, nhead_kv)
    seq_lens = None
    if cp_world_size > 1:
        if g_kv_indptr is None or page_size != 1:
            raise InvalidInput(f"cp_world_size {cp_world_size} needs g_kv_indptr and page_size 1 (it is {page_size})")
        seq_lens = g_kv_indptr[1:] - g_kv_indptr[:-1]
    result = decode(
        q, kv_buffer, kv_lora_rank=o.shape[-1], sm_scale=kv_buffer.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        seq_lens=seq_lens, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_lens=kv_last_page_lens,
        qo_indptr=qo_indptr, max_q_len=max_seqlen_q, causal=causal, logit_cap=max(logit_cap, 0.0), q_scale=q_scale,
        kv_scale=kv_scale, cp_rank=cp_rank if cp_world_size > 1 else 0, cp_world=cp_world_size, out=o,
        return_lse=return_lse, num_kv_splits=num_kv_splits if metadata is None else None, metadata=metadata,
    )  # fmt: skip
    return result if isinstance(result, tuple) else (result, None)


def mla_prefill_fwd(
    q: Tensor, kv_buffer: Tensor, o: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor,
    kv_last_page_lens: Tensor | None, max_seqlen_q: int, sm_scale: float | None = None, logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prefill over the paged latent cache into `o`, causal, as AITER's `mla_prefill_fwd` does; returns (o, lse).

    Args:
        q, kv_buffer, o: [T, H, C + R], [pages, page_size, KV heads, C + R] and [T, H, C]; any H and page size.
        qo_indptr, kv_indptr, kv_indices, kv_last_page_lens: as for `mla_decode_fwd`.
        sm_scale: (C + R)^-½ if absent, as theirs; no DeepSeek model wants that default.
        logit_cap: theirs accepts none; a positive one is served here.
        num_kv_splits: theirs always takes 1; absent, the tuner chooses where the queries do not fill the device.

    Returns:
        Of theirs the LSE is [T, 1, H, 1]; so is this, fp32, natural, -inf for a row with nothing to attend.
    """
    if kv_buffer.dim() != 4:
        raise InvalidInput(f"kv_buffer has shape {tuple(kv_buffer.shape)}; it must be [pages, page_size, heads, C + R]")
    result = prefill_paged(
        q, kv_buffer, kv_lora_rank=o.shape[-1], sm_scale=kv_buffer.shape[-1] ** -0.5 if sm_scale is None else sm_scale,
        kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_lens=kv_last_page_lens, qo_indptr=qo_indptr,
        max_q_len=max_seqlen_q, logit_cap=max(logit_cap, 0.0), out=o, return_lse=True, num_kv_splits=num_kv_splits,
    )  # fmt: skip
    return o, result[1][:, None, :, None]


def mla_prefill_ps_fwd(
    Q: Tensor, K: Tensor, V: Tensor, output: Tensor, qo_indptr: Tensor, kv_indptr: Tensor,
    kv_page_indices: Tensor | None, work_indptr: Tensor | None, work_info_set: Tensor | None, max_seqlen_q: int,
    is_causal: bool, reduce_indptr: Tensor | None = None, reduce_final_map: Tensor | None = None,
    reduce_partial_map: Tensor | None = None, softmax_scale: float | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Un-absorbed prefill into `output`, as AITER's `mla_prefill_ps_fwd` does; returns (output, lse or None).

    Args:
        Q, K, V, output: [T, H, qk_dim], [tokens, Hk, qk_dim], [tokens, Hk, v_dim] and [T, H, v_dim]; theirs takes fp8
            of 192 and 128 alone.
        qo_indptr, kv_indptr: int32 [B + 1].
        kv_page_indices: int32, the row of K and V of each key, in the order of kv_indptr; K and V are gathered by it
            (theirs reads through it). None: they lie in that order, which saves the copy.
        work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map: ignored. They say which
            processor computes what, not what is computed; `mla_jit` makes its own list on the device.
        is_causal: aligned to the last query and the last key.
        softmax_scale: v_dim^-½ if absent, as theirs; no DeepSeek model wants that default.
        q_scale, k_scale, v_scale: 1-element fp32 tensors, applied whatever the dtypes.

    Returns:
        The LSE is fp32 [T, H], natural. A row with nothing to attend has output 0 and LSE **+inf**, as theirs;
        `mla_jit.prefill` says -inf.
    """
    if kv_page_indices is not None:  # what lies behind the last key may be anything
        rows = kv_page_indices.clamp(0, max(0, K.shape[0] - 1))
        K, V = _gathered(K, rows), _gathered(V, rows)
    result = prefill(
        Q, K, V, qo_indptr=qo_indptr, kv_indptr=kv_indptr, max_q_len=max_seqlen_q, causal=is_causal,
        sm_scale=output.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, q_scale=q_scale,
        k_scale=k_scale, v_scale=v_scale, out=output, return_lse=return_lse,
    )  # fmt: skip
    if not isinstance(result, tuple):
        return result, None
    lse = result[1]
    return output, torch.where(lse == -torch.inf, torch.inf, lse)


def mla_prefill_reduce(
    partial_output: Tensor, partial_lse: Tensor, reduce_indptr: Tensor, reduce_final_map: Tensor,
    reduce_partial_map: Tensor, output: Tensor, tile_q: int = 256, use_triton: bool = True,
) -> None:  # fmt: skip
    """Sums a split prefill's partial results into `output`, as AITER's `mla_prefill_reduce` does; no host sync.

    Args:
        partial_output, partial_lse: [rows, H, D] and fp32 [rows, H], natural. A row whose LSE is NaN or infinite does
            not count, whatever it holds.
        reduce_indptr: int32 [G + 1]: which entries of reduce_partial_map are group g's; of none, nothing is written.
        reduce_final_map: int32 [G, 2]: a group's first row of `output`, and the end; no more than tile_q rows.
        reduce_partial_map: int32 [entries]: the row of partial_output where a partial of the group begins.
        use_triton: ignored, as by theirs.
    """
    reduce_partials(
        partial_output, partial_lse, reduce_indptr, reduce_final_map, reduce_partial_map, output, tile_q
    )  # fmt: skip


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor; fp8 travels as bytes."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.element_size() == 1 else x[rows]
