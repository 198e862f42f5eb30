"""The row of `prefill_persistent_gluon`: the list of persistent.py walked by gluon_prefill_persistent.py.

List, workspace and combine are those of persistent.py; what can be served is what gluon.py serves. Imports no triton.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.prefill import gluon, persistent
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target

NAME = "prefill_persistent_gluon"
_MODULE = "mla_jit.ops.prefill.gluon_prefill_persistent"
_PATH = str(Path(__file__).with_name("gluon_prefill_persistent.py"))


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := persistent.unlisted(p, target, _like(config))) is not None:
        return reason
    return gluon.refuses(p, target, config)


def _like(config: Config) -> Config:
    """The config of prefill_persistent_triton that makes the same list and the same combine."""
    return Config.of(persistent.NAME, **config, tma=True, per_sm=1)


def default(p: PrefillProblem, target: Target) -> Config:
    """The tiles of prefill_gluon; pieces of no fewer keys than 512, as their partials are fp32 and read again."""
    like = gluon.default(p, target)
    return Config.of(NAME, **like, min_tiles=512 // like.int("block_n"))


def _arguments(p: PrefillProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel."""
    return gluon.boxed(p, config, persistent._walk(p, target, _like(config))[1])


def sources(p: PrefillProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list; then what makes it, and the combine if keys are cut."""
    like, *rest = persistent.sources(p, target, _like(config))
    constants: dict[str, Scalar] = {k: v for k, v in like.constants if k in gluon.CONSTANTS or v is None}
    constants = {k: v for k, v in constants.items() if k not in gluon.WITHOUT} | {"REGISTERS": gluon.REGISTERS}
    options: dict[str, Scalar] = {k: v for k, v in like.options if k != "num_stages"}
    options["num_warps"] = 4  # of a consumer; the kernel starts twelve
    walk = dataclasses.replace(
        like,
        name=NAME,
        content=toolchain.closure(_PATH, NAME),
        constants=tuple(sorted(constants.items())),
        signature=tuple((parameter, kind) for parameter, kind, _ in _arguments(p, target, config)),
        options=tuple(options.items()),
        locator=f"{_MODULE}:{NAME}",
        limits=Limits(
            smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=gluon.SPILL_BYTES,
            require=target.mma,
        ),
    )  # fmt: skip
    return (walk, *rest)


def launches(p: PrefillProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The list by one program; the wave; the combine if keys are cut."""
    arguments = tuple(arg for *_, arg in _arguments(p, target, config))
    return tuple(
        dataclasses.replace(launch, args=arguments) if launch.kernel == 0 else launch
        for launch in persistent.launches(p, target, _like(config))
    )


def numbers(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return persistent.numbers(p, target, _like(config))


def workspace_offsets(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes."""
    return persistent.workspace_offsets(p, target, _like(config))


def workspace_bytes(p: PrefillProblem, target: Target, config: Config) -> int:
    """Of all buffers."""
    return persistent.workspace_bytes(p, target, _like(config))


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """As for prefill_persistent_triton; softmax and products overlap here. Few queries are padded to 128."""
    found = persistent.cost(p, target, _like(config))
    return dataclasses.replace(found, time_us=found.time_us * (0.75 if p.q_len > 64 else 1.5))


SPACE: dict[str, tuple[int | str | bool, ...]] = {**gluon.SPACE, "min_tiles": (2, 4, 8)}

PREFILL_PERSISTENT_GLUON = Variant(
    name=NAME, op="prefill", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets, space=SPACE,
)  # fmt: skip
