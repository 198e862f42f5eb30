"""The truth: un-absorbed prefill as plain PyTorch, one sequence at a time, in float64 unless told otherwise.

It reads lengths on the host and shares no code with the kernels or with the checks of `inputs.py`, so that it cannot
share their mistakes. It touches only rows that belong to a sequence.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, qo_indptr: Tensor, kv_indptr: Tensor, sm_scale: float,
    max_q_len: int | None = None, max_kv_len: int | None = None, causal: bool = True, logit_cap: float = 0.0,
    q_scale: Any = None, k_scale: Any = None, v_scale: Any = None, out_dtype: Any = None, return_lse: bool = False,
    lse_base: str = "e", scheduler: str = "auto", dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, H, v_dim], lse [T, H]) of a prefill call, both in `dtype`; see `mla_jit.prefill` for the arguments.

    Hints and wishes (max_q_len, max_kv_len, out_dtype, return_lse, scheduler) change nothing. Query tokens that belong
    to no sequence give 0 and -inf, as rows with nothing to attend do.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device)
    factor = [1.0 if scale is None else float(scale) for scale in (q_scale, k_scale, v_scale)]
    firsts = list(zip(qo_indptr.tolist(), kv_indptr.tolist(), strict=True))
    for (q0, k0), (q1, k1) in itertools.pairwise(firsts):
        if q1 == q0 or k1 == k0:
            continue
        rows = torch.arange(q1 - q0, device=q.device)[:, None]
        columns = torch.arange(k1 - k0, device=q.device)[None, :]
        hidden = columns > rows + (k1 - k0) - (q1 - q0) if causal else torch.zeros_like(columns > rows)
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            query, key = q[q0:q1, head].to(dtype), k[k0:k1, kv_head].to(dtype)
            logits = query @ key.T * (sm_scale * factor[0] * factor[1])
            if logit_cap > 0:
                logits = logit_cap * torch.tanh(logits / logit_cap)
            logits = logits.masked_fill(hidden, -torch.inf)
            total = torch.logsumexp(logits, -1)  # -inf where all is hidden
            weights = torch.exp(logits - total.masked_fill(total == -torch.inf, 0.0)[:, None])
            out[q0:q1, head] = weights @ v[k0:k1, kv_head].to(dtype) * factor[2]
            lse[q0:q1, head] = total
    return out, lse / math.log(2.0) if lse_base == "2" else lse
