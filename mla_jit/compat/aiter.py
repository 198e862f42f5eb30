"""AITER's spelling: `from aiter.mla import mla_decode_fwd` becomes `from mla_jit.compat.aiter import mla_decode_fwd`.

Follows AITER v0.1.20 (August 2026), whose signature ends in `causal`; the shorter ones of 2025 are prefixes of it.
Callers that ask for persistent scheduling (vLLM's and SGLang's default on some devices) must turn it off.
"""

from __future__ import annotations

from torch import Tensor

from mla_jit import decode
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
