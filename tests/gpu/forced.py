"""The variants of the asm backend, each forced onto calls that are its own."""

from __future__ import annotations

import json
from typing import Any

import cases
import torch

import mla_jit
from mla_jit import ops, plan, target
from mla_jit.config import Config
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

DEVICE = "cuda"
VARIANTS = {v.name: v for v in ops.variants("decode") if v.backend == "asm"}
WALK = "walk"  # decode_splitk_asm with programs that walk a batch of uneven lengths
VARIANTS[WALK] = VARIANTS["decode_splitk_asm"]
AHEAD = "decode_splitk_asm, combine_ahead"  # for many pieces
VARIANTS[AHEAD] = VARIANTS["decode_splitk_asm"]
SHARED = {f"{name}, multicast": name for name in ("decode_splitk_asm", WALK, "decode_persistent_asm")}
VARIANTS |= {name: VARIANTS[like] for name, like in SHARED.items()}
CHANGES: dict[str, dict[str, Any]] = {
    WALK: {"walk": True, "together": False, "block_n": 64},
    AHEAD: {"combine_ahead": 32, "combine_h": 4, "combine_d": 512, "walk": False, "together": False, "min_tiles": 1},
}
CHANGES["decode_splitk_asm, multicast"] = {"multicast": True, "walk": False, "together": False, "block_n": 64}
CHANGES[f"{WALK}, multicast"] = CHANGES[WALK] | {"multicast": True}
CHANGES["decode_persistent_asm, multicast"] = {"multicast": True}
BF16 = cases.PLAIN
MIXED = "decode_mixed_asm"


def heads_of(name: str) -> int:
    """Heads of a call that a variant is for."""
    return 64 if name == MIXED else 128 if name in SHARED else 16


def install(problem: DecodeProblem, name: str, **changes: Any) -> Config | None:
    """From now on calls like this one have this variant's default with the changes; None where it refuses."""
    here, variant = target.of_device("cuda", 0), VARIANTS[name]
    config = configured(problem, here, name).replace(**changes)
    only = problem.batch_invariant and config != plan.analytic(problem, here).config
    if only or variant.rejects(problem, here, config) is not None:
        return None
    exported = json.loads(plan.export([problem], here))
    exported["choices"][0]["config"] = config.to_json()
    mla_jit.reload()
    assert plan.load(json.dumps(exported).encode(), here) == 1
    return config


def configured(problem: DecodeProblem, here: Target, name: str) -> Config:
    default = VARIANTS[name].default(problem, here)
    return default.replace(**{tunable: value for tunable, value in CHANGES.get(name, {}).items() if tunable in default})


def decode(call: cases.Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    result = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    return result if call.case.lse else (result, None)
