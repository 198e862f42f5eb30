"""AITER's spelling: `from aiter.mla import mla_decode_fwd` becomes `from mla_jit.compat.aiter import mla_decode_fwd`.

Follows AITER v0.1.20 (August 2026), whose decode signature ends in `causal`, of persistent prefill in `return_lse`; the
shorter ones of 2025 are prefixes of these.
Callers that ask for persistent scheduling (vLLM's and SGLang's default on some devices) must turn it off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mla_jit import decode, prefill, prefill_paged
from mla_jit.api_prefill import reduce_partials
from mla_jit.errors import InvalidInput


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
        num_kv_splits: split slots a sequence; absent (best), the tuner chooses. `num_kv_splits_indptr` only schedules
            and is ignored, and so is `intra_batch_mode` (whether a work item of the persistent scheduler stays within
            one sequence): neither changes the result.
        q_scale, kv_scale: 1-element fp32 tensors, applied whatever the dtypes.
        g_kv_indptr, cp_world_size, cp_rank: context parallelism: this rank holds tokens cp_rank, cp_rank +
            cp_world_size, …; g_kv_indptr counts the tokens over all ranks. Page size 1.

    Returns:
        Theirs returns the splits' fp32 partials first, or with one split a view of `o`; here it is always `o`. The LSE
        is fp32 [T, H], natural, -inf for a row with nothing to attend. Rows past qo_indptr[-1] are not written.

    Raises:
        InvalidInput for what is not served: work_meta_data and the other arrays of persistent scheduling (a schedule
        may also cut the keys, for sparse attention, so it is not ignored), and return_logits.
    """
    scheduling = {
        "work_meta_data": work_meta_data, "work_indptr": work_indptr, "work_info_set": work_info_set,
        "reduce_indptr": reduce_indptr, "reduce_final_map": reduce_final_map, "reduce_partial_map": reduce_partial_map,
    }  # fmt: skip
    if given := [name for name, value in scheduling.items() if value is not None]:
        raise InvalidInput(
            f"{', '.join(given)}: persistent scheduling is not served by this version; pass None for all of them "
            "(SGLang: SGLANG_AITER_MLA_PERSIST=0)"
        )
    if return_logits:
        raise InvalidInput("return_logits=True: the splits' partial results are not kept; use return_lse=True to merge")
    if kv_buffer.dim() != 4 or tuple(kv_buffer.shape[1:3]) != (page_size, nhead_kv):
        raise InvalidInput(
            f"kv_buffer has shape {tuple(kv_buffer.shape)}; page_size {page_size} and nhead_kv {nhead_kv} ask for "
            f"[pages, {page_size}, {nhead_kv}, C + R]"
        )
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
        return_lse=return_lse, num_kv_splits=num_kv_splits,
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
