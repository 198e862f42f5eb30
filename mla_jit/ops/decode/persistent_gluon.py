"""The row of `decode_persistent_gluon`: the work list of persistent.py walked by the kernel of gluon_persistent.py.

List, workspace and combine are those of persistent.py; what can be served is what gluon.py serves. Imports no triton.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mla_jit.compile.artifact import Scalar, Source
from mla_jit.config import Config
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops import specialised
from mla_jit.ops.decode import gluon, persistent
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_persistent_gluon"
_MODULE = "mla_jit.ops.decode.gluon_persistent"
_PATH = str(Path(__file__).with_name("gluon_persistent.py"))
_SPILL_BYTES = 128  # of scalars between sequences; most with several KV heads and triton 3.6
_CONSTANTS = (
    "G", "NUM_KV_HEADS", "MULTI", "C", "R", "PAGE", "CAUSAL", "CAP", "CP", "HAS_LENS", "HAS_LSE",
)  # fmt: skip
_WITHOUT = (*gluon._WITHOUT, "arrivals_ptr")  # parameters of decode_persistent that this kernel does not take


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := persistent._unlisted(p, target, _like(config))) is not None:
        return reason
    return gluon._refuses(p, target, config)


def _like(config: Config) -> Config:
    """The config of decode_persistent_triton that makes the same list and the same combine."""
    kept = {k: v for k, v in config.items() if k != "lazy"}
    return Config.of(persistent.NAME, **kept, num_stages=2, tma=True, masked_first=False, fold=False)


def default(p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone: its list and its combine are cut as for decode_persistent_triton."""
    like = persistent.default(p, target)
    return Config.of(
        NAME, block_m=64, block_n=64, num_warps=8, lazy=True, overhead=like.int("overhead"), waves=1,
        combine_s=like.int("combine_s"), combine_h=like.int("combine_h"), combine_d=like.int("combine_d"),
    )  # fmt: skip


def _arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel."""
    found = []
    for name, kind, arg in persistent._walk(p, target, _like(config))[1]:
        if arg.kind == "tma":
            kind, arg = gluon._boxed(p, arg)
        if name not in _WITHOUT:
            found.append((name, kind, arg))
    return found


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list; then what makes it, and the combine."""
    like, *rest = persistent.sources(p, target, _like(config))
    constants: dict[str, Scalar] = {
        k: v for k, v in like.constants if k in _CONSTANTS or (v is None and k not in _WITHOUT)
    }
    constants |= {"LAZY": bool(config["lazy"]), "REGISTERS": gluon._REGISTERS}
    signature = [(parameter, kind) for parameter, kind, _ in _arguments(p, target, config)]
    walk = specialised.source(
        like, target, NAME, _MODULE, _PATH, constants=constants, signature=signature, spill_bytes=_SPILL_BYTES
    )
    return (walk, *rest)


def prepare(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The work list, by one program."""
    return persistent.prepare(p, target, _like(config))


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The list, unless the caller brings it; a program a (block of rows, KV head, group); the combine."""
    arguments = tuple(arg for *_, arg in _arguments(p, target, config))
    return tuple(
        dataclasses.replace(launch, args=arguments) if launch.kernel == 0 else launch
        for launch in persistent.launches(p, target, _like(config))
    )


def numbers(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return persistent.numbers(p, target, _like(config))


def workspace_offsets(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes."""
    return persistent.workspace_offsets(p, target, _like(config))


def workspace_bytes(p: DecodeProblem, target: Target, config: Config) -> int:
    """Of all buffers."""
    return persistent.workspace_bytes(p, target, _like(config))


def lists(p: DecodeProblem, target: Target, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the work list's buffers, as triton_persistent.py describes them."""
    return persistent.lists(p, target, _like(config))


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """As for decode_persistent_triton, but for what the kernel gains or loses, as without a list."""
    found = persistent.cost(p, target, _like(config))
    return dataclasses.replace(found, time_us=found.time_us * gluon._beside_triton(p))


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (64,), "block_n": (64,), "num_warps": (8,), "lazy": (False, True),
    "overhead": (5, 10, 20, 40), "waves": (1,),
    "combine_s": (2, 4, 8, 16, 32, 64), "combine_h": (1, 2, 4, 8), "combine_d": (64, 128, 256, 512),
}  # fmt: skip

DECODE_PERSISTENT_GLUON = Variant(
    name=NAME, op="decode", backend="triton", revision=3, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets,
    prepare=prepare, lists=lists, space=SPACE,
)  # fmt: skip
