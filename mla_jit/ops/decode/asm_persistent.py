"""The row of `decode_persistent_asm`: the work list of persistent.py walked in PTX by blocks of 64 rows, summed, too.

The list is that of persistent.py; what can be served, and the kernel's arguments, are those of asm_splitk.py. Partials
have the result's type, and the last program of a sequence sums them (fold.ptx). Imports neither triton nor jinja2.
"""

from __future__ import annotations

import dataclasses

from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode import asm_blocks, asm_splitk, gluon, persistent
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_persistent_asm"
TEMPLATE = dataclasses.replace(asm_blocks.WIDE, name=NAME, file="decode_persistent.ptx", tiles=(persistent.UNIT,))
_OVERHEAD = 3  # of a piece, in tiles


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := persistent._unlisted(p, target, _like(p, target, config))) is not None:
        return reason
    return asm_splitk._refuses(TEMPLATE, p, target, config)


def _like(p: DecodeProblem, target: Target, config: Config) -> Config:
    """The config of decode_persistent_triton that makes the same list."""
    return persistent.default(p, target).replace(
        block_m=64, block_n=64, num_warps=8, tma=True, overhead=config.int("overhead"), waves=config.int("waves"),
        fold=True,
    )  # fmt: skip


def default(p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone."""
    return Config.of(
        NAME, block_m=64, block_n=64, num_warps=8, lazy=True, policy="evict_first", multicast=asm_splitk._long(p),
        overhead=_OVERHEAD, waves=1,
    )  # fmt: skip


def _arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel: those of decode_persistent that it reads."""
    return asm_splitk._read(p, config, persistent._walk(p, target, _like(p, target, config))[1])


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list, as the kernel that counts; then what makes it."""
    constants = asm_splitk._shared_constants(TEMPLATE, p, target, config) | {"PDL": target.has("pdl")}
    arguments = _arguments(p, target, config)
    walk = asm_splitk._source(target, NAME, TEMPLATE.file, constants, arguments, ("wgmma",))
    return walk, persistent.sources(p, target, _like(p, target, config))[1]


def prepare(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The work list, by one program."""
    return persistent.prepare(p, target, _like(p, target, config))


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The list, unless the caller brings it; a program a (block of rows, KV head, group)."""
    arguments = tuple(arg for *_, arg in _arguments(p, target, config))
    cluster = asm_splitk._CLUSTER if asm_splitk._shares_tiles(p, config) else 1
    return tuple(
        dataclasses.replace(launch, args=arguments, pdl=target.has("pdl"), cluster=cluster)
        if launch.kernel == 0
        else launch
        for launch in persistent.launches(p, target, _like(p, target, config))
    )


def numbers(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return persistent.numbers(p, target, _like(p, target, config))


def workspace_offsets(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes: partials [pieces, q_len, heads, C], LSE, the list."""
    return dict(list(persistent._layout(p, target, _like(p, target, config), p.out_dtype).items())[:-1])


def workspace_bytes(p: DecodeProblem, target: Target, config: Config) -> int:
    """Of all buffers."""
    return persistent._layout(p, target, _like(p, target, config), p.out_dtype)["end"]


def lists(p: DecodeProblem, target: Target, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the work list's buffers, as triton_persistent.py describes them."""
    return persistent.lists(p, target, _like(p, target, config))


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """decode_persistent_triton's or decode_persistent_gluon's, whichever is less, and less than it."""
    found = persistent.cost(p, target, persistent.default(p, target))
    return dataclasses.replace(found, time_us=0.95 * min(1.0, gluon._beside_triton(p)) * found.time_us)


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (64,), "block_n": (64,), "num_warps": (8,), "lazy": (False, True),
    "policy": ("evict_first", "evict_normal"), "multicast": (False, True), "overhead": (1, 2, 3, 5, 8, 12),
    "waves": (1,),
}  # fmt: skip

DECODE_PERSISTENT_ASM = Variant(
    name=NAME, op="decode", backend="asm", revision=5, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets,
    prepare=prepare, lists=lists, space=SPACE,
)  # fmt: skip
