"""The row of `prefill_persistent_triton`: one resident wave of programs that runs a work list made on the device.

The kernels are in triton_prefill_persistent.py; tiles and arguments are those of tiles.py. Imports no triton.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode.persistent import _steps
from mla_jit.ops.decode.splitk import _pow2, _source
from mla_jit.ops.prefill import tiles
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target

NAME = "prefill_persistent_triton"
_MODULE = "mla_jit.ops.prefill.triton_prefill_persistent"
_PATH = str(Path(__file__).with_name("triton_prefill_persistent.py"))
_CHUNK = 256  # units that `schedule` looks at together
_RUN = 16  # queries that a program of the combine sums
_WALKED = ("part", "part_lse", "head", "items")  # buffers that who walks the list reads or writes
_TOLD = ("qo_indptr_ptr", "kv_indptr_ptr", "max_q_len")  # what items tell instead
_SCHEDULE_US = 5.0  # for a chunk of units, assumed
_COMBINE = (
    "qo_indptr_ptr", "out_ptr", "lse_ptr", "part_ptr", "part_lse_ptr", "head_ptr", "units_ptr", "out_stride_t",
    "out_stride_h", "lse_stride_t", "lse_stride_h", "lse_mul",
)  # fmt: skip


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := unlisted(p, target, config)) is not None:
        return reason
    if config.int("per_sm") * config.int("num_warps") * int(target.triton[2]) > 2048:
        return f"{config['per_sm']} programs of {config['num_warps']} warps do not fit an SM together"
    return tiles.refuses(p, target, _like(config))


def unlisted(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why there is no work list for the problem, whoever walks it, or None."""
    if p.scheduler == "tiles":
        return "a program a block of queries is asked for"
    if not target.triton:
        return f"Triton has no backend for {target.name}"
    if slots(p, config) * p.num_heads * max(1, config.int("block_m") // _RUN) >= 2**31:
        return "blocks of queries × heads exceed the largest grid (2^31)"
    return None


def _like(config: Config) -> Config:
    """The config of prefill_triton with the same tiles."""
    return Config.of(tiles.NAME, **{k: v for k, v in config.items() if k not in ("per_sm", "min_tiles")})


def default(p: PrefillProblem, target: Target) -> Config:
    """The tiles of prefill_triton; pieces of no fewer keys than 512, as their partials are fp32 and read again."""
    like = tiles.default(p, target)
    per_sm = max(1, tiles.resident(target, like) // max(1, target.sms))
    return Config.of(NAME, **like, per_sm=per_sm, min_tiles=max(1, 512 // like.int("block_n")))


def programs(target: Target, config: Config) -> int:
    """Of the resident wave."""
    return max(1, target.sms * config.int("per_sm"))


def slots(p: PrefillProblem, config: Config) -> int:
    """Units that the list holds: blocks of queries of all sequences, whatever their lengths."""
    return p.total_q // config.int("block_m") + p.batch


def _splits(p: PrefillProblem, target: Target, config: Config) -> bool:
    """Whether keys may be cut: one unit has fewer heads than there are programs."""
    return p.num_heads < programs(target, config)


def _parts(p: PrefillProblem, target: Target, config: Config) -> int:
    """Pieces of cut units: of n units, n more than programs / heads at most; n · heads is less than programs."""
    count = programs(target, config)
    return count // p.num_heads + (count - 1) // p.num_heads if _splits(p, target, config) else 0


def _buffers(p: PrefillProblem, target: Target, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the buffers in the workspace; of 4 bytes an element each."""
    rows = _parts(p, target, config) * p.num_heads * config.int("block_m")
    partials = {"part": (rows, p.v_dim), "part_lse": (rows,)} if rows else {}
    count = slots(p, config)
    listed = (count + programs(target, config) // p.num_heads, 8)
    return {**partials, "head": (4,), "units": (count, 4), "items": listed}


def _layout(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    found, at = {}, 0
    for name, shape in _buffers(p, target, config).items():
        found[name] = at
        at += -(-math.prod(shape) * 4 // 16) * 16
    return {**found, "end": at}


def workspace_offsets(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes: partials fp32 [pieces, H, BLOCK_M, DV], LSE, the list."""
    return dict(list(_layout(p, target, config).items())[:-1])


def workspace_bytes(p: PrefillProblem, target: Target, config: Config) -> int:
    """Of all buffers."""
    return _layout(p, target, config)["end"]


def _pointers(names: tuple[str, ...]) -> list[tuple[str, str, Arg]]:
    kind = {"part": "*fp32:16", "part_lse": "*fp32:16"}
    return [(f"{name}_ptr", kind.get(name, "*i32:16"), Arg("ptr", name)) for name in names]


def _schedule(p: PrefillProblem, target: Target, config: Config) -> tiles.Parts:
    """(constants, [(parameter, signature entry, launch argument)]) of the first kernel."""
    constants: dict[str, Scalar] = {
        "H": p.num_heads, "BLOCK_M": config.int("block_m"), "BLOCK_N": config.int("block_n"), "CAUSAL": p.causal,
        "SPLITS": _splits(p, target, config), "CHUNK": _CHUNK, "STEPS": 0 if p.batch == 1 else _steps(p.batch),
    }  # fmt: skip
    arguments = [(f"{n}_ptr", tiles._pointer(p, target, n), Arg("ptr", n)) for n in ("qo_indptr", "kv_indptr")]
    arguments += _pointers(("head", "units", "items"))
    return constants, arguments + tiles.scalars(("batch", "slots", "programs", "min_tiles"))


def _walk(p: PrefillProblem, target: Target, config: Config) -> tiles.Parts:
    """The same for the second."""
    constants, every = tiles.parts(p, target, _like(config))
    present = tuple(name for name in _WALKED if name in _buffers(p, target, config))
    constants |= {f"{name}_ptr": None for name in _WALKED if name not in present}
    strides = next(i for i, (name, *_) in enumerate(every) if name == tiles._STRIDES[0])
    arguments = [*every[:strides], *_pointers(present), *every[strides:]]
    return constants, [argument for argument in arguments if argument[0] not in _TOLD]


def _combine(p: PrefillProblem, target: Target, config: Config) -> tiles.Parts:
    """The same for the third."""
    every = (*_schedule(p, target, config)[1], *_walk(p, target, config)[1])
    found = {name: (name, kind, arg) for name, kind, arg in every}
    constants: dict[str, Scalar] = {f"{name}_ptr": None for name in ("lse",) if not p.lse}
    constants |= {
        "H": p.num_heads, "DV": p.v_dim, "BLOCK_M": config.int("block_m"), "HAS_LSE": p.lse,
        "BLOCK_R": min(_RUN, config.int("block_m")), "BLOCK_DV": _pow2(p.v_dim, 16),
    }  # fmt: skip
    return constants, [found[name] for name in _COMBINE if name in found]


def sources(p: PrefillProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list first, as the kernel that counts; then what makes the list; the combine if keys are cut."""
    small = Limits(smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=64)
    few: dict[str, Scalar] = {"num_warps": 4, "num_stages": 2}
    many: dict[str, Scalar] = {"num_warps": 8, "num_stages": 1}

    def source(function: str, parts: tiles.Parts, options: dict[str, Scalar], limits: Limits) -> Source:
        return _source(target, function, f"{NAME}_{function}", parts, options, limits, _MODULE, _PATH)

    walk = source("prefill_persistent", _walk(p, target, config), tiles.options(config), tiles.limits(target))
    listed = source("schedule", _schedule(p, target, config), many, small)
    if not _splits(p, target, config):
        return walk, listed
    return walk, listed, source("combine_pieces", _combine(p, target, config), few, small)


def launches(p: PrefillProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The list by one program; the wave; a program of the combine a (run of queries, head, unit)."""

    def args(parts: tiles.Parts) -> tuple[Arg, ...]:
        return tuple(arg for *_, arg in parts[1])

    found = (
        Launch(1, (1, 1, 1), args(_schedule(p, target, config))),
        Launch(0, (programs(target, config), 1, 1), args(_walk(p, target, config))),
    )
    if not _splits(p, target, config):
        return found
    runs = config.int("block_m") // min(_RUN, config.int("block_m"))
    return (*found, Launch(2, (slots(p, config) * p.num_heads * runs, 1, 1), args(_combine(p, target, config))))


def numbers(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return {
        "batch": p.batch, "slots": slots(p, config), "programs": programs(target, config),
        "min_tiles": config.int("min_tiles"),
        "heads_together": tiles.heads_together(dataclasses.replace(p, max_kv_len=p.keys), target),
    }  # fmt: skip


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """As for prefill_triton, but keys may be cut where programs are too few; with the list and two launches more.

    What it gains for uneven lengths no bound of them tells, so measurements must.
    """
    return listed(p, target, config, tiles.cost(p, target, _like(config)))


def listed(p: PrefillProblem, target: Target, config: Config, found: Cost) -> Cost:
    """The cost of the same tiles by a list, cut and summed."""
    time_us = found.time_us - target.launch_us
    if found.waves < 1 and _splits(p, target, config):
        keys = min(p.max_kv_len, p.keys / max(1, p.batch))
        time_us /= max(1.0, min(1 / found.waves, keys / (config.int("block_n") * config.int("min_tiles"))))
    list_us = _SCHEDULE_US * -(-slots(p, config) // _CHUNK)
    return dataclasses.replace(found, time_us=time_us + list_us + 3 * target.launch_us)


SPACE: dict[str, tuple[int | str | bool, ...]] = {**tiles.SPACE, "per_sm": (1, 2), "min_tiles": (2, 4, 8)}

PREFILL_PERSISTENT_TRITON = Variant(
    name=NAME, op="prefill", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets, space=SPACE,
)  # fmt: skip
