"""A call with random tensors for a problem, and the judgement of its result against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_jit import dtypes
from mla_jit.dtypes import DTYPES
from mla_jit.layouts import GROUP
from mla_jit.ops.decode import reference
from mla_jit.ops.prefill import reference as prompts
from mla_jit.problem import DecodeProblem, PrefillProblem

_MADE_AT_ONCE = 1 << 28  # random numbers of a prompt, fp32


@dataclass(frozen=True)
class Call:
    """Arguments of `mla_jit.decode`: positional operands and keywords."""

    q: Tensor
    kv_cache: Any  # a tensor; (ckv, kv_scales, kpe) for a cache with scales
    keywords: dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """Of the worst (token, head) row: relative L2 error, absolute LSE error, and their limits."""

    rel_l2: float
    rel_l2_limit: float
    lse_error: float
    lse_limit: float

    @property
    def ok(self) -> bool:
        return self.rel_l2 <= self.rel_l2_limit and self.lse_error <= self.lse_limit


def make_call(problem: DecodeProblem, device: str, *, seed: int = 0, sm_scale: float | None = None) -> Call:
    """Random operands for a problem whose cache is one buffer, or three: lengths up to max_kv_len, random pages.

    Slots without a token are NaN, their scales too, table entries without a page are page -1, and outputs start as NaN.
    """
    p, generator = problem, torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lens = torch.randint(max(1, p.max_kv_len // 2), p.max_kv_len + 1, (p.batch,), generator=generator)
    lens[0] = p.max_kv_len
    used = (lens + p.page_size - 1) // p.page_size
    pages = int(used.sum())
    order = torch.randperm(pages, generator=generator).to(torch.int32)
    indptr = torch.zeros(p.batch + 1, dtype=torch.int32)
    indptr[1:] = used.cumsum(0)

    cache = randn(pages, p.page_size, p.num_kv_heads, p.head_dim)
    table = torch.full((p.batch, int(used.max())), -1, dtype=torch.int32)
    for b, n in enumerate(lens.tolist()):
        ids = order[indptr[b] : indptr[b + 1]]
        table[b, : len(ids)] = ids
        cache[ids[-1].long(), n - (len(ids) - 1) * p.page_size :] = float("nan")
    q = randn(p.batch * p.q_len, p.num_heads, p.head_dim)

    def placed(x: Tensor, dtype: str) -> Tensor:
        return x.to(getattr(torch, DTYPES[dtype].torch)).to(device)

    keywords: dict[str, Any] = {
        "kv_lora_rank": p.kv_lora_rank,
        "sm_scale": sm_scale if sm_scale is not None else p.head_dim**-0.5,
        "causal": p.causal,
        "return_lse": True,
        "out": torch.full((p.batch * p.q_len, p.num_heads, p.kv_lora_rank), float("nan")),
    }
    keywords["out"] = placed(keywords["out"], p.out_dtype)
    if not p.ragged:
        q, keywords["out"] = (x.view(p.batch, p.q_len, p.num_heads, -1) for x in (q, keywords["out"]))
    else:
        keywords |= {"qo_indptr": _int32(range(0, p.batch * p.q_len + 1, p.q_len), device), "max_q_len": p.q_len}
    if p.paging == "table":
        keywords |= {"block_table": table.to(device), "seq_lens": lens.to(device, torch.int32)}
    else:
        last = lens - (used - 1) * p.page_size
        keywords |= {
            "kv_indptr": indptr.to(device),
            "kv_indices": order.to(device),
            "kv_last_page_lens": last.to(device, torch.int32),
        }
        if p.has_lens:
            keywords["seq_lens"] = lens.to(device, torch.int32)
    if p.sinks:
        keywords["sinks"] = randn(p.num_heads).to(device)
    if p.soft_cap:
        keywords["logit_cap"] = 30.0
    for name, given in (("q_scale", p.q_scale), ("kv_scale", p.kv_scale)):
        if given:
            keywords[name] = torch.tensor([0.5], device=device)
    if p.scaled:
        return Call(placed(q, p.q_dtype), tuple(x.to(device) for x in scaled_cache(p, cache)), keywords)
    return Call(placed(q, p.q_dtype), placed(cache, p.kv_dtype), keywords)


def scaled_cache(p: DecodeProblem, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(ckv, kv_scales, kpe) for fp32 tokens [..., C + R]: the greatest of each 128 columns is fp8's greatest number."""
    fp8, row = DTYPES[p.kv_dtype], DTYPES[p.rope_dtype]
    latent = tokens[..., : p.kv_lora_rank].unflatten(-1, (-1, GROUP))
    scales = latent.abs().amax(-1).clamp_min(1e-12) / fp8.max_finite
    values = (latent / scales[..., None]).clamp(-fp8.max_finite, fp8.max_finite).flatten(-2)
    rope = tokens[..., p.kv_lora_rank :].to(getattr(torch, row.torch))
    return values.to(getattr(torch, fp8.torch)), scales, rope.contiguous()


def _int32(values: Any, device: str) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Prompt:
    """Arguments of `mla_jit.prefill`: positional operands and keywords."""

    q: Tensor
    k: Tensor
    v: Tensor
    keywords: dict[str, Any]


def make_prompt(problem: PrefillProblem, device: str, *, seed: int = 0) -> Prompt:
    """Random operands for a problem, contiguous: lengths that add up to its totals, none beyond its bounds.

    Rows of k and v that belong to no sequence are NaN, and outputs start as NaN.
    """
    p, generator = problem, torch.Generator(device).manual_seed(seed)
    q_lens, kv_lens = (
        shares(total, bound, p.batch) for total, bound in ((p.total_q, p.q_len), (p.keys, p.max_kv_len))
    )  # fmt: skip

    def randn(rows: int, heads: int, width: int, used: int, dtype: str) -> Tensor:
        x = torch.empty(rows, heads, width, dtype=getattr(torch, DTYPES[dtype].torch), device=device)
        for part in x[:used].split(max(1, _MADE_AT_ONCE // (heads * width))):
            part.copy_(torch.randn(part.shape, device=device, generator=generator))
        x[used:].copy_(torch.full((), float("nan"), device=device))
        return x

    q = randn(p.total_q, p.num_heads, p.qk_dim, sum(q_lens), p.q_dtype)
    k = randn(p.keys, p.num_kv_heads, p.qk_dim, sum(kv_lens), p.kv_dtype)
    v = randn(p.keys, p.num_kv_heads, p.v_dim, sum(kv_lens), p.kv_dtype)
    keywords: dict[str, Any] = {"sm_scale": p.qk_dim**-0.5, "causal": p.causal, "return_lse": p.lse}
    for name, lens in (("qo_indptr", q_lens), ("kv_indptr", kv_lens)):
        starts = _int32([sum(lens[:b]) for b in range(p.batch + 1)], device)
        keywords[name] = starts.long() if name in p.index64 else starts
    keywords |= {"max_q_len": p.q_len, "max_kv_len": p.max_kv_len if p.hinted else None, "scheduler": p.scheduler}
    keywords["out"] = torch.full(
        (p.total_q, p.num_heads, p.v_dim), float("nan"), dtype=getattr(torch, DTYPES[p.out_dtype].torch), device=device
    )
    if p.lse:
        keywords["lse"] = torch.full((p.total_q, p.num_heads), float("nan"), device=device)
    if p.soft_cap:
        keywords["logit_cap"] = 30.0
    for name, given in (("q_scale", p.q_scale), ("k_scale", p.k_scale), ("v_scale", p.v_scale)):
        if given:
            keywords[name] = torch.tensor([0.5], device=device)
    return Prompt(q, k, v, keywords)


def shares(total: int, bound: int, batch: int) -> list[int]:
    """Lengths of a batch that add up to `total`, as far as none may exceed `bound`; the first is the longest."""
    lens = []
    for b in range(batch):
        others = batch - b - 1
        most = min(bound, total)
        lens.append(most if b == 0 or not others else min(most, -(-total // (others + 1))))
        total -= lens[-1]
    return lens


def judge_prompt(prompt: Prompt, out: Tensor, lse: Tensor | None) -> Judgement:
    """The result of a prefill call against the float64 reference, on the same device."""
    names = {k: v for k, v in prompt.keywords.items() if k not in ("out", "lse")}
    want, want_lse = prompts.prefill(prompt.q, prompt.k, prompt.v, **names)
    used = int(prompt.keywords["qo_indptr"][-1])
    lses = want_lse if lse is None else lse
    return _judged(prompt.q, prompt.k, out[:used], lses[:used], want[:used], want_lse[:used])


def judge(call: Call, out: Tensor, lse: Tensor) -> Judgement:
    """The result of a call against the float64 reference, on the same device."""
    names = {k: v for k, v in call.keywords.items() if k not in ("out", "lse")}
    want, want_lse = reference.decode(call.q, call.kv_cache, **names)
    keys = call.kv_cache[0] if isinstance(call.kv_cache, tuple) else call.kv_cache
    return _judged(call.q, keys, out, lse, want, want_lse)


def _judged(queries: Tensor, keys: Tensor, out: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor) -> Judgement:
    error = (out.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)
    lse_error = torch.where(lse == want_lse, 0.0, (lse - want_lse).abs())
    q, kv = dtypes.of_torch(queries.dtype), dtypes.of_torch(keys.dtype)
    assert q is not None
    assert kv is not None
    worst = [float(torch.nan_to_num(x, nan=float("inf")).max()) if x.numel() else 0.0 for x in (error, lse_error)]
    limit = max(dtypes.tolerance(q.name, kv.name), DTYPES[dtypes.of_torch(out.dtype).name].rel_l2)  # type: ignore[union-attr]
    return Judgement(worst[0], limit, worst[1], dtypes.LSE_ATOL)
