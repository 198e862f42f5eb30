"""The row of `decode_splitk_gluon`: blocks of 64 rows where there are bulk tensor copies and warpgroup matrix products.

The kernel is in gluon_splitk.py. Pieces, arguments, workspace and combine are those of splitk.py. Imports no triton.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from mla_jit.compile.artifact import Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops import specialised
from mla_jit.ops.decode import splitk
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_splitk_gluon"
_MODULE = "mla_jit.ops.decode.gluon_splitk"
_PATH = str(Path(__file__).with_name("gluon_splitk.py"))
_BOX = 64  # tokens and columns of a copy: 128 bytes a row, the widest swizzle
_REGISTERS = 240  # of a consumer's thread; the kernel starts with 168 and its producer keeps 24
_MUCH = 16384  # tokens from which this kernel is faster at 17 … 32 rows (32 heads × 16 × 4096, H200: 33 and 44 us)
_SPILL_BYTES = 64  # of scalars before the loop; none in it
# Parameters of decode_splitk that this kernel does not take: it copies tiles only through tensor maps, unscaled.
_WITHOUT = (
    "kv_ptr", "kpe_ptr", "kv_stride_page", "kv_stride_tok", "kpe_stride_page", "kpe_stride_tok", "scales_ptr",
    *splitk._SCALES_STRIDES,
)  # fmt: skip
_CONSTANTS = (
    "G", "NUM_KV_HEADS", "MULTI", "C", "R", "PAGE", "BATCH_POW2", "PDL", "CAUSAL", "CAP", "CP", "HAS_LENS", "HAS_LSE",
)  # fmt: skip


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if (reason := _refuses(p, target, config)) is not None:
        return reason
    if config["pdl"] and not target.has("pdl"):
        return f"{target.name} has no programmatic dependent launch"
    if splitk.slots(p, target, config) * splitk._row_blocks(p, config) >= 2**31:
        return "batch × rows × splits exceeds the largest grid (2^31); pass a smaller num_kv_splits"
    return None


def _refuses(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """The same, but for who schedules, and what this leads to."""
    if not target.triton or not (target.has("tma") and target.has("mma_m64")):
        return f"{target.name} has no bulk tensor copies or no warpgroup matrix instructions"
    if p.scaled:
        return "a cache with scales is multiplied group by group; this kernel multiplies tiles as they were copied"
    if p.q_dtype != p.kv_dtype or DTYPES[p.kv_dtype].bits != 16 or "fp32" in (p.q_dtype, p.kv_dtype):
        return f"q is {p.q_dtype} and the cache is {p.kv_dtype}: both must be bf16 or both fp16"
    if p.kv_lora_rank not in (256, 512):
        return f"kv_lora_rank {p.kv_lora_rank} is not 256 or 512"
    if p.rope_dim not in (0, 64):
        return f"rope_dim {p.rope_dim} is not 0 or 64"
    return splitk._no_tma(p, config)


@functools.lru_cache(maxsize=512)  # other variants ask for it too, each time that one is chosen
def default(p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone; how the combine is cut is as for decode_splitk_triton."""
    like = splitk.default(p, target)
    config = Config.of(
        NAME, block_m=64, block_n=64, num_warps=8, lazy=True, min_tiles=1 if p.batch == 1 else 2,
        num_kv_splits=1,
        combine_s=like.int("combine_s"), combine_h=like.int("combine_h"), combine_d=like.int("combine_d"),
        pdl=target.has("pdl"),
    )  # fmt: skip
    return config.replace(num_kv_splits=splitk._default_splits(p, target, config))


def _like(config: Config) -> Config:
    """The config of decode_splitk_triton that cuts sequences and combines partials in the same way."""
    return Config.of(splitk.NAME, **config, num_stages=2, tma=True, masked_first=False)


def _arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel."""
    found = []
    for name, kind, arg in splitk._stage1(p, target, _like(config))[1]:
        if arg.kind == "tma":
            kind, arg = _boxed(p, arg)
        if name not in _WITHOUT:
            found.append((name, kind, arg))
    return found


def _boxed(p: DecodeProblem, arg: Arg) -> tuple[str, Arg]:
    """(signature entry, launch argument) of a tensor map whose copies are boxes."""
    return f"tma<{DTYPES[p.kv_dtype].triton}[{_BOX},{_BOX}]>", dataclasses.replace(arg, block=(_BOX, _BOX))


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The kernel, and the combine of splitk.py where a sequence may be cut."""
    like, *rest = splitk.sources(p, target, _like(config))
    constants: dict[str, Scalar] = {
        k: v for k, v in like.constants if k in _CONSTANTS or (v is None and k not in _WITHOUT)
    }
    constants |= {"LAZY": bool(config["lazy"]), "REGISTERS": _REGISTERS}
    signature = [(parameter, kind) for parameter, kind, _ in _arguments(p, target, config)]
    stage1 = specialised.source(
        like, target, NAME, _MODULE, _PATH, constants=constants, signature=signature, spill_bytes=_SPILL_BYTES
    )
    return (stage1, *rest)


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """One program a (row block, KV head, piece); then the combine."""
    like, *rest = splitk.launches(p, target, _like(config))
    return (dataclasses.replace(like, args=tuple(arg for *_, arg in _arguments(p, target, config))), *rest)


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """As for decode_splitk_triton, but for what the kernel gains or loses."""
    found = splitk.cost(p, target, config)
    return dataclasses.replace(found, time_us=found.time_us * _beside_triton(p))


def _beside_triton(p: DecodeProblem) -> float:
    """Its time over that of Triton's kernel, which reads the cache for each 16 rows, and computes S twice.

    Where one block of 16 rows is enough, or little is read, what 64 rows cost more than 16 is not won back.
    """
    much = p.rows > 32 or (p.rows > 16 and p.batch * p.max_kv_len >= _MUCH)
    return 0.75 if much else 1.5


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (64,), "block_n": (64,), "num_warps": (8,), "lazy": (False, True), "min_tiles": (1, 2, 4),
    "combine_s": (2, 4, 8, 16, 32, 64), "combine_h": (1, 2, 4, 8), "combine_d": (64, 128, 256, 512),
    "pdl": (False, True),
}  # fmt: skip

DECODE_SPLITK_GLUON = Variant(
    name=NAME, op="decode", backend="triton", revision=2, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=splitk.workspace_bytes, cost=cost, numbers=splitk.numbers,
    offsets=splitk.workspace_offsets, resize=splitk.resize, space=SPACE,
)  # fmt: skip
