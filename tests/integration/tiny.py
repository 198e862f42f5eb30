"""Small DeepSeek-V3 models with random weights, made here and never downloaded, and what they say by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from integration import absorbed
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
# By name: DeepSeek-V3's latent, yarn's temperature in the scale, interleaved rope, experts; and a model that differs in
# all of them, with more heads than any power of two near it.
MODELS: dict[str, dict[str, Any]] = {
    "8_heads_512_64": {
        "num_attention_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 64,
        "rope_parameters": YARN, "rope_interleave": True, "first_k_dense_replace": 1,
    },
    "40_heads_256_32": {
        "num_attention_heads": 40, "kv_lora_rank": 256, "qk_rope_head_dim": 32, "q_lora_rank": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_interleave": False,
        "first_k_dense_replace": 3,
    },
}  # fmt: skip


def model(name: str, **changes: Any) -> DeepseekV3ForCausalLM:
    """The model of that name in fp32 on the cpu, its weights so large that what attention says decides the tokens."""
    config = DeepseekV3Config(
        vocab_size=499, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
        n_shared_experts=1, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, v_head_dim=32,
        qk_nope_head_dim=48, max_position_embeddings=256, initializer_range=0.1, eos_token_id=None,
        num_nextn_predict_layers=0, attn_implementation="eager",
        num_key_value_heads=MODELS[name]["num_attention_heads"], **{**MODELS[name], **changes},
    )  # fmt: skip
    torch.manual_seed(len(name))
    return DeepseekV3ForCausalLM(config).eval()


def prompts(lengths: tuple[int, ...], vocabulary: int = 499) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def own_generate(model: Any, prompts: Sequence[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """(tokens [B, steps], logits [B, steps, vocabulary]): greedy, with the model's own attention and cache."""
    made = [
        model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=steps, do_sample=False,
            pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        )
        for prompt in prompts
    ]  # fmt: skip
    return torch.stack([m.sequences[0, -steps:] for m in made]), torch.stack([torch.cat(m.logits) for m in made])


@torch.no_grad()
def own_logits(model: Any, prompts: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """The logits [B, steps, vocabulary] that the model's own attention gives along these tokens, in one pass."""
    rows = [
        model(torch.cat([prompt, forced])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        for prompt, forced in zip(prompts, tokens, strict=True)
    ]
    return torch.stack(rows).float()


def errors_in_bf16(name: str, device: str, steps: int = 64) -> tuple[Tensor, Tensor]:
    """Relative L2 errors [B, steps] of bf16 logits to fp32 ones along the fp32 model's tokens: ours, the model's own.

    Without experts: a rounded router may choose others, which says nothing of attention.
    """
    exact = model(name, first_k_dense_replace=3).to(device)
    starts = [p.to(device) for p in prompts((11, 30, 17))]
    tokens, _ = own_generate(exact, starts, steps)
    truth = own_logits(exact, starts, tokens)
    rounded = exact.to(torch.bfloat16)
    ours = absorbed.generate(rounded, starts, steps, forced=tokens)[1].float()
    own = own_logits(rounded, starts, tokens)
    return tuple((x - truth).norm(dim=-1) / truth.norm(dim=-1) for x in (ours, own))  # type: ignore[return-value]
