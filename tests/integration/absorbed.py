"""A Hugging Face DeepSeek-V3 whose attention is `mla_jit.decode` over a paged latent cache, in absorbed form.

DeepSeek-V2 (arXiv 2405.04434, section 2.1): a head's key is W_UK c and its value W_UV c, where c is the token's latent.
So q·(W_UK c) = (W_UK^T q)·c and Σ p W_UV c = W_UV Σ p c: with W_UK folded into q and W_UV applied to the result, all
heads attend to the one latent, and the cache holds [c, rotated k_pe] a token, C + R elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

import mla_jit


@dataclass
class Pages:
    """The latent caches of all layers, and the page table that they share. Free slots hold NaN."""

    caches: list[Tensor]  # of each layer: [pages, page_size, C + R]
    block_table: Tensor  # int32 [B, pages a sequence]
    seq_lens: Tensor  # int32 [B]: tokens in the cache, those of the running step included
    running: Tensor  # int64: the sequences of the running step

    @classmethod
    def empty(cls, model: Any, batch: int, most_tokens: int, page_size: int = 16) -> Pages:
        config, weight = model.config, model.lm_head.weight
        each = -(-most_tokens // page_size)
        shape = (batch * each, page_size, config.kv_lora_rank + config.qk_rope_head_dim)
        caches = [torch.full(shape, torch.nan, dtype=weight.dtype, device=weight.device) for _ in model.model.layers]
        table = torch.randperm(batch * each, device=weight.device).to(torch.int32).view(batch, each)
        ids = torch.arange(batch, device=weight.device)
        return cls(caches, table, torch.zeros_like(ids, dtype=torch.int32), ids)

    def write(self, layer: int, rows: Tensor) -> None:
        """Stores the step's rows [running, q_len, C + R] behind what each sequence holds already."""
        cache, q_len = self.caches[layer], rows.shape[1]
        at = self.seq_lens[self.running, None] - q_len + torch.arange(q_len, device=rows.device)
        page = self.block_table[self.running].gather(1, at // cache.shape[1]).long()
        cache[page, at % cache.shape[1]] = rows


def project(attn: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The queries [B, q_len, H, N] and [B, q_len, H, R], and the cache's rows [B, q_len, C + R], from hidden states."""
    q = attn.q_proj(hidden) if attn.q_lora_rank is None else attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(hidden)))
    q_nope, q_pe = q.unflatten(-1, (attn.num_heads, -1)).split([attn.qk_nope_head_dim, attn.qk_rope_head_dim], -1)
    latent, k_pe = attn.kv_a_proj_with_mqa(hidden).split([attn.kv_lora_rank, attn.qk_rope_head_dim], -1)
    rotate = hf.apply_rotary_pos_emb_interleave if attn.config.rope_interleave else hf.apply_rotary_pos_emb
    q_pe, k_pe = rotate(q_pe, k_pe[:, :, None], cos, sin, unsqueeze_dim=2)
    return q_nope, q_pe, torch.cat([attn.kv_a_layernorm(latent), k_pe[:, :, 0]], -1)


def attend(attn: Any, q_nope: Tensor, q_pe: Tensor, cache: Tensor, **paging: Tensor) -> Tensor:
    """The heads' outputs [..., H, V] for queries [..., H, N] and [..., H, R] over the paged latent cache."""
    w = attn.kv_b_proj.weight.unflatten(0, (attn.num_heads, -1))
    w_uk, w_uv = w.split([attn.qk_nope_head_dim, attn.v_head_dim], 1)
    q = torch.einsum("...hn,hnc->...hc", q_nope, w_uk)
    out = mla_jit.decode((q, q_pe), cache, kv_lora_rank=attn.kv_lora_rank, sm_scale=attn.scaling, **paging)
    return torch.einsum("...hc,hvc->...hv", out, w_uv)


@contextmanager
def absorbed(model: Any, pages: Pages, most_q_len: int = 8) -> Iterator[None]:
    """Replaces the attention of steps up to most_q_len tokens a sequence; longer ones, prompts, only fill the cache."""

    def replaced(attn: Any) -> Any:
        own = attn.forward

        def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any) -> Any:
            q_nope, q_pe, rows = project(attn, hidden_states, *position_embeddings)
            pages.write(attn.layer_idx, rows)
            if rows.shape[1] > most_q_len:  # un-absorbed attention does less work for a prompt
                return own(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
            table, lens = pages.block_table[pages.running], pages.seq_lens[pages.running]
            heads = attend(attn, q_nope, q_pe, pages.caches[attn.layer_idx], block_table=table, seq_lens=lens)
            return attn.o_proj(heads.flatten(-2)), None

        return forward

    layers = [layer.self_attn for layer in model.model.layers]
    for attn in layers:
        attn.forward = replaced(attn)
    try:
        yield
    finally:
        for attn in layers:
            del attn.forward  # the class's own again


def step(model: Any, pages: Pages, running: Sequence[int], tokens: Tensor) -> Tensor:
    """Runs tokens [running, q_len] of these sequences through the model; their logits [running, q_len, vocabulary]."""
    pages.running = torch.tensor(running, device=tokens.device)
    first = pages.seq_lens[pages.running].long()
    pages.seq_lens[pages.running] += tokens.shape[1]
    positions = first[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    logits: Tensor = model(tokens, position_ids=positions, use_cache=False).logits
    return logits


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tensor],
    steps: int,
    *,
    forced: Tensor | None = None,
    q_len: int = 1,
    page_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """(tokens [B, steps], logits [B, steps, vocabulary]): greedy, or along `forced` tokens, q_len of them a step."""
    batch = range(len(prompts))
    pages = Pages.empty(model, len(prompts), max(map(len, prompts)) + steps, page_size)
    with absorbed(model, pages):
        logits = [torch.cat([step(model, pages, [b], prompts[b][None])[:, -1:] for b in batch])]
        tokens = [] if forced is None else [forced]
        for i in range(0, steps - 1, q_len):
            if forced is None:
                tokens.append(logits[-1].argmax(-1))
            logits.append(step(model, pages, batch, tokens[-1] if forced is None else forced[:, i : i + q_len]))
    chosen = torch.cat(logits, 1)[:, :steps]
    return chosen.argmax(-1) if forced is None else forced, chosen
