"""The row of `decode_splitk_asm`: the PTX template decode_splitk.ptx, blocks of 64 rows with warpgroup matrix products.

Pieces, arguments, workspace and combine are those of splitk.py, its shape that of decode_splitk_gluon.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mla_jit import settings
from mla_jit.compile import ptx, render
from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode import gluon, splitk
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_splitk_asm"
TEMPLATE = "decode_splitk.ptx"
_BOX = 64  # tokens and columns of a copy: 128 bytes a row, the widest swizzle
_BOX_BYTES = _BOX * _BOX * 2
_PTX = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
_UNPROVEN = 1e6  # a predicted time that no other variant has: not run on a GPU yet, so taken by measured rows alone
# Parameters of decode_splitk by what makes the kernel read them; others than these are always read.
_WITHOUT = ("kv_ptr", "kpe_ptr", "kv_stride_page", "kv_stride_tok", "kpe_stride_page", "kpe_stride_tok")


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if not render.has(target.isa, TEMPLATE):
        return f"there is no template {TEMPLATE} for {target.isa}"
    if p.q_dtype != p.kv_dtype or p.q_dtype not in ("bf16", "fp16"):
        return f"q is {p.q_dtype} and the cache is {p.kv_dtype}: both must be bf16 or both fp16"
    if p.kv_lora_rank > 512 or p.kv_lora_rank % 8 or p.rope_dim > _BOX or p.rope_dim % 8:
        return f"kv_lora_rank {p.kv_lora_rank}, rope_dim {p.rope_dim}: multiples of 8 up to 512 and 64 are served"
    if p.misaligned:
        return f"{', '.join(p.misaligned)}: the base or a stride is no multiple of 16 bytes"
    if p.page_size % _BOX:
        return f"page size {p.page_size} is no multiple of a tile of {_BOX} tokens"
    if not p.flat_pages:
        return "the cache's page stride is not page_size × token stride: no bulk tensor copies"
    if config["pdl"] and not target.has("pdl"):
        return f"{target.name} has no programmatic dependent launch"
    if (size := _layout(p)["ARENA"]) > target.smem_bytes:
        return f"{size} bytes of shared memory, {target.name} has {target.smem_bytes}"
    if splitk.slots(p, target, config) * splitk._row_blocks(p, config) >= 2**31:
        return "batch × rows × splits exceeds the largest grid (2^31); pass a smaller num_kv_splits"
    return None


def default(p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone: that of decode_splitk_gluon."""
    return Config.of(NAME, **gluon.default(p, target), policy="evict_first")


def _like(config: Config) -> Config:
    """The config of decode_splitk_triton that cuts sequences and combines partials in the same way."""
    return gluon._like(Config.of(gluon.NAME, **{k: v for k, v in config.items() if k != "policy"}))


def _layout(p: DecodeProblem) -> dict[str, Any]:
    """Where things lie in shared memory, in bytes: q, two tiles, maxima and sums of 64 rows, barriers."""
    boxes = -(-p.kv_lora_rank // (2 * _BOX)) * 2 + 1
    tile = boxes * _BOX_BYTES
    rows = 3 * tile
    barriers = rows + 4 * 64 * 4
    return {"Q": 0, "K": [tile, 2 * tile], "ROWS": rows, "BARRIERS": barriers, "ARENA": barriers + 8 * (2 * boxes + 4)}


def _constants(p: DecodeProblem, config: Config) -> dict[str, Scalar]:
    layout = {k: json.dumps(v) if isinstance(v, list) else v for k, v in _layout(p).items()}
    return layout | {
        "G": p.gqa_ratio, "NUM_KV_HEADS": p.num_kv_heads, "MULTI": p.q_len > 1, "C": p.kv_lora_rank, "R": p.rope_dim,
        "PAGE": p.page_size, "ROW_BLOCKS": 1 if p.rows <= 64 else 0, "BATCH_POW2": splitk._batch_pow2(p),
        "LAZY": bool(config["lazy"]), "PDL": bool(config["pdl"]), "POLICY": config.text("policy"),
        "CAUSAL": p.causal and p.q_len > 1, "CAP": p.soft_cap, "CP": p.context_parallel, "HAS_LENS": p.has_lens,
        "DTYPE": _PTX[p.q_dtype], "OUT": _PTX[p.out_dtype], "DEBUG": settings.current().bounded_waits,
    }  # fmt: skip


def _arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel: those of decode_splitk that it reads."""
    unread = set(_WITHOUT)
    unread |= {"q_pe_ptr", "q_pe_stride_t", "q_pe_stride_h"} if p.rope_dim == 0 else set()
    unread |= {"kv_stride_head", "kpe_stride_head"} if p.num_kv_heads == 1 else set()
    unread |= {"kpe_stride_head"} if p.rope_dim == 0 else set()
    unread |= {"table_stride"} if p.paging == "csr" else set()
    unread |= {"cp_rank", "cp_world"} if not p.context_parallel else set()
    unread |= {"logit_cap"} if not p.soft_cap else set()
    unread |= {"lse_stride_t", "lse_stride_h", "lse_mul"} if not p.lse else set()
    found = []
    for name, kind, arg in splitk._stage1(p, target, _like(config))[1]:
        if arg.kind == "tma":
            kind, arg = f"tma<{p.kv_dtype}[{_BOX},{_BOX}]>", dataclasses.replace(arg, block=(_BOX, _BOX))
        if name not in unread:
            found.append((name, kind, arg))
    return found


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The kernel, and the combine of splitk.py where a sequence may be cut."""
    _, *rest = splitk.sources(p, target, _like(config))
    head = render.header(target.isa, TEMPLATE)
    stage1 = Source(
        name=NAME,
        toolchain="ptx",
        toolchain_version=ptx.version(),
        isa=target.isa,
        content=render.closure(target.isa, TEMPLATE),
        constants=tuple(sorted(_constants(p, config).items())),
        signature=tuple((name, kind) for name, kind, _ in _arguments(p, target, config)),
        locator=f"{target.isa}/{TEMPLATE}",
        limits=Limits(
            smem_bytes=target.smem_bytes, registers=head.registers["start"], threads=head.threads, require=("wgmma",)
        ),
    )
    return (stage1, *rest)


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """One program a (row block, KV head, piece); then the combine."""
    like, *rest = splitk.launches(p, target, _like(config))
    return (dataclasses.replace(like, args=tuple(arg for *_, arg in _arguments(p, target, config))), *rest)


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """As decode_splitk_gluon's, but taken by nobody: the kernel has not run on a GPU."""
    found = gluon.cost(p, target, Config.of(gluon.NAME, **{k: v for k, v in config.items() if k != "policy"}))
    return dataclasses.replace(found, time_us=found.time_us + _UNPROVEN)


SPACE: dict[str, tuple[int | str | bool, ...]] = {**gluon.SPACE, "policy": ("evict_first", "evict_normal")}

DECODE_SPLITK_ASM = Variant(
    name=NAME, op="decode", backend="asm", revision=1, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=splitk.workspace_bytes, cost=cost, numbers=splitk.numbers,
    offsets=splitk.workspace_offsets, resize=splitk.resize, space=SPACE,
)  # fmt: skip
