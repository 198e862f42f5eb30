"""The truth: MLA decode as plain PyTorch, one sequence at a time, in float64 unless told otherwise.

It reads lengths on the host and shares no code with the kernels or with the checks of `inputs.py`, so that it cannot
share their mistakes. It touches only the page-table entries and the cache slots that hold tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _numbers(index: Tensor | None) -> list[int]:
    return [] if index is None else index.tolist()


def _rows(buffer: Tensor, pages: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, num_kv_heads, width] of a paged buffer, exactly converted; fp8 travels as bytes."""
    if buffer.element_size() == 1:
        return buffer.view(torch.uint8)[pages, slots].view(buffer.dtype).to(dtype)
    return buffer[pages, slots].to(dtype)


def _keys(buffers: list[Tensor], pages: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, num_kv_heads, C + R]: the cached rows, each 128 columns of a latent with scales times their own."""
    if len(buffers) < 3:
        return torch.cat([_rows(buffer, pages, slots, dtype) for buffer in buffers], -1)
    latent, scales = (_rows(buffer, pages, slots, dtype) for buffer in buffers[:2])
    rope = [_rows(buffer, pages, slots, dtype) for buffer in buffers[2:] if buffer is not None]
    return torch.cat([latent * scales.repeat_interleave(128, -1), *rope], -1)


def decode(
    q: Any, kv_cache: Any, *, kv_lora_rank: int, sm_scale: float, block_table: Tensor | None = None,
    seq_lens: Tensor | None = None, kv_indptr: Tensor | None = None, kv_indices: Tensor | None = None,
    kv_last_page_lens: Tensor | None = None, qo_indptr: Tensor | None = None, max_q_len: int | None = None,
    max_kv_len: int | None = None, total_kv: int | None = None, causal: bool = True, logit_cap: float = 0.0,
    sinks: Tensor | None = None, q_scale: Any = None, kv_scale: Any = None, cp_rank: int = 0, cp_world: int = 1,
    out_dtype: Any = None, return_lse: bool = False, lse_base: str = "e", batch_invariant: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [..., H, C], lse [..., H]) of a decode call, both in `dtype`; see `mla_jit.decode` for the arguments.

    Hints (max_q_len, max_kv_len, total_kv) and the wishes for the result (out_dtype, return_lse, batch_invariant)
    change nothing. Query tokens that belong to no sequence give 0 and -inf, as rows with nothing to attend do.
    """
    q = torch.cat([part.to(dtype) for part in q], -1) if isinstance(q, (tuple, list)) else q.to(dtype)
    buffers = [
        b if b is None or b.dim() == 4 else b.unsqueeze(2)
        for b in (kv_cache if isinstance(kv_cache, (tuple, list)) else [kv_cache])
    ]
    page_size, kv_heads = buffers[0].shape[1:3]
    heads, width = q.shape[-2:]
    tokens = q.reshape(-1, heads, width)
    out = tokens.new_zeros(tokens.shape[0], heads, kv_lora_rank)
    lse = tokens.new_full((tokens.shape[0], heads), -torch.inf)

    starts, lengths, last = _numbers(kv_indptr), _numbers(seq_lens), _numbers(kv_last_page_lens)
    q_starts = _numbers(qo_indptr) or [b * (q.shape[1] if q.dim() == 4 else 1) for b in range(q.shape[0] + 1)]
    v_scale = 1.0 if kv_scale is None else float(kv_scale)
    scale = sm_scale * v_scale * (1.0 if q_scale is None else float(q_scale))
    for b in range(len(q_starts) - 1):
        q_first, q_end = q_starts[b], q_starts[b + 1]
        if seq_lens is not None:
            length = lengths[b]
        else:
            held = starts[b + 1] - starts[b]
            length = held if page_size == 1 else 0 if held == 0 else (held - 1) * page_size + last[b]
        position = torch.arange(cp_rank, max(length, cp_rank), cp_world, device=q.device)  # of the tokens on this rank
        slot = torch.arange(position.numel(), device=q.device)
        if position.numel() == 0 or q_first == q_end:
            continue
        used = -(-position.numel() // page_size)
        if block_table is not None:
            table = block_table[b, :used]
        else:
            assert kv_indices is not None
            table = kv_indices[starts[b] : starts[b] + used]
        pages = table.long()[slot // page_size]
        key = _keys(buffers, pages, slot % page_size, dtype)

        grouped = tokens[q_first:q_end].reshape(q_end - q_first, kv_heads, heads // kv_heads, width)
        logits = torch.einsum("tgrd,ngd->tgrn", grouped, key) * scale
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        if causal:
            own = length - (q_end - q_first) + torch.arange(q_end - q_first, device=q.device)  # each query's position
            hidden = position[None, :] > own[:, None]
            logits = logits.masked_fill(hidden[:, None, None, :], -torch.inf)
        row_lse = torch.logsumexp(logits, -1)  # [t, Hkv, G]; -inf where all is hidden
        total = row_lse
        if sinks is not None:
            total = torch.logaddexp(row_lse, sinks.to(dtype).reshape(1, kv_heads, -1))
        weights = torch.exp(logits - total.masked_fill(row_lse == -torch.inf, 0.0)[..., None])
        value = torch.einsum("tgrn,ngc->tgrc", weights, key[..., :kv_lora_rank]) * v_scale
        out[q_first:q_end] = value.reshape(q_end - q_first, heads, kv_lora_rank)
        lse[q_first:q_end] = row_lse.reshape(q_end - q_first, heads)
    if lse_base == "2":
        lse = lse / torch.log(torch.tensor(2.0, dtype=dtype)).item()
    return out.reshape(*q.shape[:-1], kv_lora_rank), lse.reshape(q.shape[:-1])
