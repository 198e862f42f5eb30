"""`prefill_blocked_cpu`: FlashAttention-2's loops in PyTorch ops, the host variant of the `cpu` target.

One sequence at a time, in fp32 whatever the dtypes: `heads` KV heads side by side as one batched product, their
queries (token × heads that share the KV head) in blocks of `block_m` tokens, the keys in tiles of `block_n`, each
widened once a group of heads. A block walks the tiles that one of its queries sees, with an online softmax; only tiles
that the causal diagonal crosses are masked. torch is imported by the first call, not with the row.
"""

from __future__ import annotations

import itertools
from typing import Any

from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.ops.decode.inputs import LN2
from mla_jit.ops.prefill.inputs import PrefillInputs
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem, bucket
from mla_jit.target import Target

NAME = "prefill_blocked_cpu"
Tensor = Any

SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (16, 32, 64, 128, 256), "block_n": (32, 64, 128, 256, 512), "heads": (1, 2, 4, 8, 16),
}  # fmt: skip


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if target.runtime != "cpu":
        return f"PyTorch ops on the CPU; {target.name} is not served by them"
    for name in SPACE:
        if config.int(name) < 1:
            return f"{name} is {config[name]}; it must be at least 1"
    return None


def default(p: PrefillProblem, target: Target) -> Config:
    """Tiles whose fp32 copies fill half of the L2 cache, with 64 queries; few heads side by side, as they share it."""
    heads = min(4, bucket(p.num_kv_heads))
    width = heads * (p.qk_dim + p.v_dim) * 4
    most = max(32, bucket(target.l2_bytes // 2 // width + 1) // 2)
    return Config.of(
        NAME, block_m=min(64, max(16, bucket(p.q_len))), block_n=max(32, min(most, 512, bucket(p.max_kv_len))),
        heads=heads,
    )  # fmt: skip


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """The roofline of a call whose sequences have mean lengths, and one `launch_us` for each batched tile."""
    flops = int(2 * p.pairs * p.num_heads * (p.qk_dim + p.v_dim))
    size = (p.total_q * p.num_heads + p.keys * p.num_kv_heads) * (p.qk_dim + p.v_dim) * DTYPES[p.kv_dtype].bytes
    groups = -(-p.num_kv_heads // config.int("heads"))
    steps = groups * (1 + int(p.pairs / (config.int("block_m") * config.int("block_n"))))
    time_us = max(size / target.bandwidth_gbps * 1e-3, flops / target.bf16_tflops * 1e-6) + steps * target.launch_us
    return Cost(size, flops, groups, float(steps), time_us)


def run(p: PrefillProblem, config: Config, inputs: PrefillInputs) -> None:
    """Computes a checked call; writes tensors["out"] and, where given, tensors["lse"]."""
    import torch

    with torch.no_grad():
        _run(p, config, inputs)


def _run(p: PrefillProblem, config: Config, inputs: PrefillInputs) -> None:
    import torch

    t, floats = inputs.tensors, inputs.floats
    scales = [1.0 if t[name] is None else t[name].item() for name in ("q_scale", "k_scale", "v_scale")]
    qk_scale, v_scale = floats["qk_scale"] * scales[0] * scales[1], floats["v_scale"] * scales[2]
    firsts = list(zip(t["qo_indptr"].tolist(), t["kv_indptr"].tolist(), strict=True))
    block_m, ratio = config.int("block_m"), p.gqa_ratio
    for (q0, k0), (q1, k1) in itertools.pairwise(firsts):
        kv_len = k1 - k0
        own = torch.arange(1, q1 - q0 + 1, device=inputs.device) + kv_len - (q1 - q0)  # the first key past each query
        ends = own.clamp(0, kv_len) if p.causal else torch.full_like(own, kv_len)
        for h0 in range(0, p.num_kv_heads, config.int("heads")):
            h1 = min(h0 + config.int("heads"), p.num_kv_heads)
            heads = slice(h0 * ratio, h1 * ratio)
            k, v = (x[k0:k1, h0:h1].transpose(0, 1).to(torch.float32) for x in (t["k"], t["v"]))  # [heads, n, width]
            for m0 in range(q0, q1, block_m):
                m1 = min(m0 + block_m, q1)
                q = t["q"][m0:m1, heads].to(torch.float32) * qk_scale  # [tokens, heads, D]
                q = q.view(m1 - m0, h1 - h0, ratio, -1).transpose(0, 1).reshape(h1 - h0, (m1 - m0) * ratio, -1)
                end = ends[m0 - q0 : m1 - q0].repeat_interleave(ratio)
                out, lse = _attend(q, k, v, end, config.int("block_n"), floats["logit_cap"])
                out, lse = (x.view(h1 - h0, m1 - m0, ratio, -1).transpose(0, 1).flatten(1, 2) for x in (out, lse))
                t["out"][m0:m1, heads] = (out * v_scale).to(t["out"].dtype)
                if t["lse"] is not None:
                    t["lse"][m0:m1, heads] = lse[..., 0] * (floats["lse_mul"] / LN2)


def _attend(q: Tensor, k: Tensor, v: Tensor, end: Tensor, block_n: int, cap: float) -> tuple[Tensor, Tensor]:
    """(out [heads, rows, DV], natural LSE [heads, rows]) of rows that see the keys before their `end` [rows]."""
    import torch

    m = q.new_full(q.shape[:2], -torch.inf)
    l, o = torch.zeros_like(m), q.new_zeros(*q.shape[:2], v.shape[-1])
    last, clear = int(end.max()), int(end.min())
    for n0 in range(0, last, block_n):
        n1 = min(n0 + block_n, last)
        s = torch.matmul(q, k[:, n0:n1].transpose(1, 2))
        if cap > 0:
            s = cap * torch.tanh(s / cap)
        if n1 > clear:
            s = s.masked_fill(torch.arange(n0, n1, device=q.device)[None, :] >= end[:, None], -torch.inf)
        higher = torch.maximum(m, s.amax(-1))
        shift = higher.masked_fill(higher == -torch.inf, 0.0)  # a row that has seen nothing yet
        alpha, w = torch.exp(m - shift), torch.exp(s - shift[..., None])
        m, l = higher, l * alpha + w.sum(-1)
        o = torch.baddbmm(o * alpha[..., None], w, v[:, n0:n1])
    return torch.where((l > 0)[..., None], o / l[..., None], 0.0), m + torch.log(l)


PREFILL_BLOCKED_CPU = Variant(
    name=NAME, op="prefill", backend="cpu", rejects=rejects, default=default,
    sources=lambda p, target, config: (), launches=lambda p, target, config: (),
    workspace_bytes=lambda p, target, config: 0, cost=cost, space=SPACE, host=run,
)  # fmt: skip
