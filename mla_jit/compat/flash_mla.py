"""FlashMLA's spelling: `from flash_mla import …` becomes `from mla_jit.compat.flash_mla import …`.

Follows FlashMLA since January 2026 (082094b), where `get_mla_metadata` takes anything and returns an opaque object with
None. Callers of 2025 work too as long as they only hand on the two values that it returned then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_jit import decode
from mla_jit.errors import InvalidInput


class FlashMLASchedMeta:
    """Stands where FlashMLA's schedule does; empty, since nothing is scheduled on the host here."""


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """(an empty FlashMLASchedMeta, None), whatever the arguments. It never goes stale."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor, k_cache: Tensor, block_table: Tensor | None, cache_seqlens: Tensor | None, head_dim_v: int,
    tile_scheduler_metadata: Any = None, num_splits: Any = None, softmax_scale: float | None = None,
    causal: bool = False, is_fp8_kvcache: bool = False, indices: Tensor | None = None, attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None, extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None, extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Dense decode as FlashMLA's `flash_mla_with_kvcache`. Reads nothing back from the device; graphs may capture it.

    Args:
        q, k_cache: [B, q_len, H, D] and [pages, page_size, H_kv, D]; any head count and page size, D ≥ head_dim_v.
        block_table, cache_seqlens: int32 [B, pages] and [B].
        head_dim_v: V is the first head_dim_v elements of K.
        tile_scheduler_metadata, num_splits: ignored.
        softmax_scale: D^-½ if absent, as theirs; no DeepSeek model wants that default.
        causal: among the last q_len tokens; False by default, as theirs.
        attn_sink: fp32 [H] sinks: in the softmax's denominator, not in the LSE (theirs: sparse attention only).

    Returns:
        out [B, q_len, H, head_dim_v] in q's dtype, and the natural LSE, fp32 [B, H, q_len]. A row with nothing to
        attend has output 0 and LSE **+inf**, as theirs; `mla_jit.decode` says -inf.

    Raises:
        InvalidInput for what is not served: sparse attention (`indices`, `topk_length`, the extra_* arguments) and the
        656-byte FP8 cache (`is_fp8_kvcache`).
    """
    sparse = {
        "indices": indices, "extra_k_cache": extra_k_cache, "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "topk_length": topk_length, "extra_topk_length": extra_topk_length,
    }  # fmt: skip
    if given := [name for name, value in sparse.items() if value is not None]:
        raise InvalidInput(f"{', '.join(given)}: sparse attention is not served by this version; dense decode is")
    if is_fp8_kvcache:
        raise InvalidInput(
            "is_fp8_kvcache=True: FlashMLA's 656-byte token layout is not served by this version; a plain fp8 cache "
            "is, by mla_jit.decode(…, kv_scale=…)"
        )
    if q.dim() != 4:
        raise InvalidInput(f"q has shape {tuple(q.shape)}; it must be [B, q_len, H, D]")
    out, lse = decode(
        q, k_cache, kv_lora_rank=head_dim_v, sm_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        block_table=block_table, seq_lens=cache_seqlens, causal=causal, sinks=attn_sink, return_lse=True,
    )  # fmt: skip
    return out, torch.nan_to_num(lse.transpose(1, 2), nan=torch.nan, posinf=torch.inf, neginf=torch.inf).contiguous()
