"""The row of `prefill_gluon`: blocks of 128 queries where there are bulk tensor copies and warpgroup matrix products.

The kernel is in gluon_prefill.py; order, arguments and cost are those of tiles.py. Imports no triton.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mla_jit.compile.artifact import Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops import specialised
from mla_jit.ops.prefill import tiles
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target

NAME = "prefill_gluon"
_MODULE = "mla_jit.ops.prefill.gluon_prefill"
_PATH = str(Path(__file__).with_name("gluon_prefill.py"))
_BOX = 64  # columns of a copy: 128 bytes a row, the widest swizzle
REGISTERS = 240  # of a consumer's thread; the kernel starts with 168 and its producer keeps 24
SPILL_BYTES = 64  # of scalars before the loop; none in it
Parts = list[tuple[str, str, Arg]]
_SLACK_BYTES = 1024  # of shared memory, for barriers
# Parameters of prefill_tiles that this kernel does not take: it copies tiles only through tensor maps.
WITHOUT = ("k_ptr", "v_ptr", "k_rest_desc", "k_stride_t", "v_stride_t")
CONSTANTS = ("H", "G", "D", "DV", "BLOCK_N", "STAGES", "CAUSAL", "CAP", "HAS_LSE")


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if p.batch * tiles.blocks(p, config) * p.num_heads >= 2**31:
        return "batch × blocks of queries × heads exceeds the largest grid (2^31)"
    return refuses(p, target, config)


def refuses(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """The same, but for who schedules and for the size of the grid."""
    if not target.triton or not (target.has("tma") and target.has("mma_m64")):
        return f"{target.name} has no bulk tensor copies or no warpgroup matrix instructions"
    if p.q_dtype != p.kv_dtype or DTYPES[p.kv_dtype].bits != 16:
        return f"q is {p.q_dtype}, k and v are {p.kv_dtype}: all must be bf16 or all fp16"
    if p.out_dtype != p.q_dtype:
        return f"out is {p.out_dtype}, q is {p.q_dtype}: one type is written"
    if p.qk_dim not in (64, 128, 192) or p.v_dim not in (64, 128) or p.v_dim > p.qk_dim:
        return f"qk_dim {p.qk_dim} is not 64, 128 or 192, or v_dim {p.v_dim} not 64 or 128, or more than qk_dim"
    if (reason := tiles.no_tma(p)) is not None:
        return reason
    smem = 2 * (128 * p.qk_dim + config.int("num_stages") * config.int("block_n") * (p.qk_dim + p.v_dim)) + _SLACK_BYTES
    if smem > target.smem_bytes:
        return f"the tiles take {smem} bytes of shared memory, {target.name} has {target.smem_bytes}"
    return None


def default(p: PrefillProblem, target: Target) -> Config:
    """Two stages of 128 keys: what 192 + 128 columns leave room for."""
    return Config.of(NAME, block_m=128, block_n=128, num_warps=8, num_stages=2)


def _like(config: Config) -> Config:
    """The config of prefill_triton with the same tiles."""
    return Config.of(tiles.NAME, **config, tma=True)


def boxed(p: PrefillProblem, config: Config, arguments: Parts) -> Parts:
    """Arguments of a kernel of prefill_triton, as one takes them that copies boxes of 64 columns, all through maps."""
    found = []
    box = (config.int("block_n"), _BOX)
    for name, kind, arg in arguments:
        if name in WITHOUT:
            continue
        if arg.kind == "tma":
            found.append(
                (name, f"tma<{DTYPES[p.kv_dtype].triton}[{box[0]},{box[1]}]>", dataclasses.replace(arg, block=box))
            )
        else:
            found.append((name, kind, arg))
    return found


def _arguments(p: PrefillProblem, target: Target, config: Config) -> Parts:
    """[(parameter, signature entry, launch argument)] of the kernel."""
    return boxed(p, config, tiles.parts(p, target, _like(config))[1])


def sources(p: PrefillProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The one kernel."""
    (like,) = tiles.sources(p, target, _like(config))
    constants: dict[str, Scalar] = {k: v for k, v in like.constants if k in CONSTANTS or v is None}
    constants = {k: v for k, v in constants.items() if k not in WITHOUT} | {"REGISTERS": REGISTERS}
    signature = [(parameter, kind) for parameter, kind, _ in _arguments(p, target, config)]
    made = specialised.source(
        like, target, NAME, _MODULE, _PATH, constants=constants, signature=signature, spill_bytes=SPILL_BYTES
    )
    return (made,)


def launches(p: PrefillProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """A program a (block of queries, head, sequence)."""
    (like,) = tiles.launches(p, target, _like(config))
    return (dataclasses.replace(like, args=tuple(arg for *_, arg in _arguments(p, target, config))),)


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """As for prefill_triton; softmax and products overlap here. Few queries are padded to 128."""
    found = tiles.products(p, target, _like(config))
    return dataclasses.replace(found, time_us=products_us(p, found) + tiles.starts_us(p, target, _like(config)))


def products_us(p: PrefillProblem, found: Cost) -> float:
    """What prefill_triton takes, as these kernels do: less where products hide the softmax, more for few queries."""
    return found.time_us * (0.75 if p.q_len > 64 else 1.5)


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (128,), "block_n": (64, 128), "num_warps": (8,), "num_stages": (2, 3, 4),
}  # fmt: skip

PREFILL_GLUON = Variant(
    name=NAME, op="prefill", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=lambda p, target, config: 0, cost=cost, numbers=tiles.numbers, space=SPACE,
)  # fmt: skip
