"""The row of `decode_persistent_triton`: one resident wave of programs that runs a work list made on the device.

The kernels are in triton_persistent.py; tiles, arguments and combine are those of splitk.py. Imports no triton.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode import splitk
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_persistent_triton"
_MODULE = "mla_jit.ops.decode.triton_persistent"
_PATH = str(Path(__file__).with_name("triton_persistent.py"))
UNIT = 64  # tokens of a list's tile: a multiple of every block_n, so that a list does not depend on the config
_LEAST_M = 16  # the least block_m: a list has counts for as many blocks of rows
_CHUNK, _WIDE = 256, 1024  # groups, or sequences, that `schedule` looks at together; sequences of large batches
_SUMMING = 16  # programs of the combine that an SM holds
MOST_PIECES = 1 << 20  # of a sequence: no bound
_POINTERS = ("q", "q_pe", "kv", "kpe")
_MORE_POINTERS = (
    "table", "lens", "kv_indptr", "last", "qo_indptr", "sinks", "q_scale", "kv_scale", "scales", "out", "lse",
    "part", "part_lse",
)  # fmt: skip
_LISTS = ("groups", "info", "sums", "arrivals")  # the work list, int32 buffers in the workspace
_OWN = ("overhead", "waves", "fold")  # tunables that decode_splitk_triton does not have
_COMBINE_POINTERS = ("qo_indptr", "sinks", "out", "lse", "part", "part_lse")
_INTS = ("batch", "max_q_len", "cp_rank", "cp_world")
_CONSTANTS = (
    "G", "NUM_KV_HEADS", "MULTI", "C", "R", "PAGE", "BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_R", "STAGES", "TMA",
    "MASKED_FIRST", "CAUSAL", "CAP", "CP", "HAS_LENS", "HAS_LSE", "COMPUTE", "DECODE", "Q_DECODE", "QK_NATIVE",
)  # fmt: skip

Parts = tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := _unlisted(p, target, config)) is not None:
        return reason
    if UNIT % config.int("block_n"):
        return f"a tile of {config.int('block_n')} tokens does not divide the {UNIT} of a work list's tile"
    if p.scaled and config["block_m"] == 64 and _odd(p):
        return "blocks of 64 rows: with scales in the cache, several query tokens and such heads they read stray memory"
    if config["fold"] and target.triton[:1] == ("hip",):
        return (
            "fold: this backend's barrier does not wait for the stores of a program's other waves, the count needs it"
        )
    return splitk._refuses(p, target, _like(config))


def _unlisted(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why no work list can serve the problem, or None."""
    if p.scheduler == "split":
        return "split slots are asked for"
    if p.num_kv_splits is not None:
        return "num_kv_splits asks for split slots"
    if p.batch_invariant:
        return "batch_invariant: a work list depends on the whole batch"
    if (p.batch + groups(p, target, config)) * max(p.rows, 1) * p.num_kv_heads >= 2**31:
        return "batch × rows exceeds the largest grid (2^31)"
    return None


def _odd(p: DecodeProblem) -> bool:
    """Several query tokens, and heads by which dividing takes a multiplication."""
    return p.q_len > 1 and bool(p.gqa_ratio & (p.gqa_ratio - 1))


def _like(config: Config) -> Config:
    """The config of decode_splitk_triton with the same tiles."""
    values = {k: v for k, v in config.items() if k not in _OWN}
    return Config.of(splitk.NAME, **values, min_tiles=1, num_kv_splits=2, pdl=False)


def default(p: DecodeProblem, target: Target) -> Config:
    """The tiles of decode_splitk_triton, or smaller ones; beside its tiles a piece costs about five of a list's.

    Smaller where the loop over pieces would make blocks of 64 rows spill more than is legal (2700 bytes with fp8 q,
    2050 with several query tokens of such heads that dividing by their number takes a multiplication); with scales in
    the cache also blocks of 32 (1832 bytes). There 64 rows of such heads end in an illegal access on an H200 with
    triton 3.6, whatever the stages, while Triton's interpreter sees none; why is not known.
    """
    like = splitk.default(p, target)
    if like.int("block_m") == 64:
        if DTYPES[p.q_dtype].bits == 8:
            like = like.replace(block_m=32, block_n=32, masked_first=True)
        elif _odd(p):
            like = like.replace(block_m=16, masked_first=True) if p.scaled else like.replace(block_n=32)
    elif p.scaled and p.q_len > 1:
        like = like.replace(block_m=16)
    kept = {k: v for k, v in like.items() if k not in ("min_tiles", "num_kv_splits", "pdl")}
    return Config.of(NAME, **kept, overhead=5, waves=1, fold=False)


def groups(p: DecodeProblem, target: Target, config: Config) -> int:
    """Among how many groups of programs the work is cut: as many as the device holds, `waves` times over.

    A list that the caller brings says it itself: any number is right.
    """
    if p.groups is not None:
        return p.groups
    held = splitk._resident(target, _like(config)) * config.int("waves")
    return max(1, held // splitk._row_blocks(p, config))


def _pieces(p: DecodeProblem, target: Target, config: Config) -> int:
    return p.batch + groups(p, target, config)


def _lists(p: DecodeProblem, names: tuple[str, ...]) -> list[tuple[str, str, Arg]]:
    return [(f"{name}_ptr", "*i32:16", Arg("ptr", name)) for name in names]


def _steps(batch: int) -> int:
    """In how many a sequence is found among so many: by few sizes, so that few kernels are compiled."""
    return next((n for n in (8, 10, 12, 16) if batch <= 1 << n), 31)


def _schedule(p: DecodeProblem, target: Target, config: Config) -> Parts:
    """(constants, [(parameter, signature entry, launch argument)]) of the first kernel."""
    absent = splitk._absent(p)
    lengths = ("lens", "kv_indptr", "last")
    constants: dict[str, Scalar] = {f"{name}_ptr": None for name in lengths if name in absent}
    constants |= {
        "PAGE": p.page_size, "UNIT": UNIT, "CP": p.context_parallel, "HAS_LENS": p.has_lens,
        "WIDE": _CHUNK if p.batch <= _CHUNK else _WIDE, "CHUNK": _CHUNK, "STEPS": _steps(p.batch),
    }  # fmt: skip
    arguments = [(f"{n}_ptr", splitk._pointer(p, target, n), Arg("ptr", n)) for n in lengths if n not in absent]
    numbers = ("batch", "groups", "overhead", "most_pieces", "even", "arrivals", "cp_rank", "cp_world")
    return constants, arguments + _lists(p, _LISTS) + splitk._scalars(numbers)


def _walk(p: DecodeProblem, target: Target, config: Config) -> Parts:
    """The same for the second."""
    constants, every = splitk._stage1(p, target, _like(config))
    found = {name: (name, kind, arg) for name, kind, arg in every}
    names = [f"{name}_ptr" for name in _POINTERS] + ["kv_desc", "kpe_desc"]
    pointers = [found[n] for n in (*names, *(f"{name}_ptr" for name in _MORE_POINTERS)) if n in found]
    strides = (*splitk._STAGE1_STRIDES, *splitk._SCALES_STRIDES, *splitk._OUT_STRIDES)
    scalars = splitk._scalars((*_INTS, *splitk._FLOATS))
    kept = {k: v for k, v in constants.items() if k in _CONSTANTS or v is None}
    fold = bool(config["fold"])
    kept |= {"UNIT": UNIT, "LEAST_M": _LEAST_M, "FOLD": fold, "ROWS": _fold_rows(p, config) if fold else 0}
    kept |= {} if fold else {"arrivals_ptr": None}
    lists = _lists(p, _LISTS if fold else _LISTS[:3])
    return kept, pointers + lists + [found[n] for n in strides if n in found] + scalars


def _fold_rows(p: DecodeProblem, config: Config) -> int:
    """Rows that a program sums at a time: 32 elements a thread of 32, as many again on their way."""
    held = 1024 * config.int("num_warps") // splitk._pow2(p.kv_lora_rank, 16)
    return max(1, min(config.int("block_m"), held))


def _combine(p: DecodeProblem, target: Target, config: Config) -> Parts:
    """The same for the third."""
    constants, every = splitk._combine(p, target, _like(config))
    found = {name: (name, kind, arg) for name, kind, arg in every}
    kept: dict[str, Scalar] = {f"{n}_ptr": None for n in _COMBINE_POINTERS if f"{n}_ptr" not in found}
    kept |= {k: constants[k] for k in ("H", "C", "BLOCK_S", "BLOCK_H", "BLOCK_D", "HAS_LSE")}
    arguments = [found[f"{n}_ptr"] for n in _COMBINE_POINTERS if f"{n}_ptr" in found]
    arguments += _lists(p, ("sums",)) + [found[n] for n in splitk._OUT_STRIDES]
    return kept, arguments + splitk._scalars(("batch", "max_q_len", "lse_mul"))


def _source(target: Target, function: str, parts: Parts, options: dict[str, Scalar], limits: Limits) -> Source:
    return splitk._source(target, function, f"{NAME}_{function}", parts, options, limits, _MODULE, _PATH)


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list first, as the kernel that counts; then what makes the list, and the combine, if any."""
    limits = Limits(
        smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=splitk._SPILL_BYTES, require=target.mma
    )
    small = Limits(smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=64)
    options: dict[str, Scalar] = {"num_warps": config.int("num_warps"), "num_stages": config.int("num_stages")}
    few: dict[str, Scalar] = {"num_warps": 4, "num_stages": 2}
    many: dict[str, Scalar] = {"num_warps": 8, "num_stages": 1}
    walk = _source(target, "decode_persistent", _walk(p, target, config), options, limits)
    schedule = _source(target, "schedule", _schedule(p, target, config), many, small)
    if config["fold"]:
        return walk, schedule
    return walk, schedule, _source(target, "combine_listed", _combine(p, target, config), few, small)


def _args(parts: Parts) -> tuple[Arg, ...]:
    return tuple(arg for *_, arg in parts[1])


def prepare(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The work list, by one program."""
    return (Launch(1, (1, 1, 1), _args(_schedule(p, target, config))),)


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """The list, unless the caller brings it; a program a (block of rows, KV head, group); the combine as elsewhere.

    With `fold` the programs of the second sum what they can, and there is no third.
    """
    grid = (groups(p, target, config) * splitk._row_blocks(p, config), 1, 1)
    two = (*(() if p.planned else prepare(p, target, config)), Launch(0, grid, _args(_walk(p, target, config))))
    if config["fold"]:
        return two
    _, heads, columns = splitk._combine_tile(p, _like(config))
    each = max(1, -(-p.kv_lora_rank // columns) * -(-p.num_heads // heads) * p.q_len)  # programs a sequence
    sums = (each * max(1, min(p.batch, -(-_SUMMING * target.sms // each))), 1, 1)
    return *two, Launch(2, sums, _args(_combine(p, target, config)))


def numbers(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return {
        "batch": p.batch, "groups": groups(p, target, config), "overhead": config.int("overhead"),
        "most_pieces": MOST_PIECES, "even": 0, "arrivals": p.batch * arrivals(p), "max_q_len": p.q_len,
    }  # fmt: skip


def workspace_offsets(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes: partials fp32 [pieces, q_len, heads, C], LSE, the list."""
    return dict(list(_layout(p, target, config).items())[:-1])


def workspace_bytes(p: DecodeProblem, target: Target, config: Config) -> int:
    """Of all buffers."""
    return _layout(p, target, config)["end"]


def lists(p: DecodeProblem, target: Target, config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes of the work list's buffers, as triton_persistent.py describes them."""
    count = groups(p, target, config)
    return {
        "groups": (count + 1,), "info": (p.batch + count, 4), "sums": (p.batch, 3), "arrivals": (p.batch, arrivals(p)),
    }  # fmt: skip


def arrivals(p: DecodeProblem) -> int:
    """Counts of a sequence: one a KV head and block of rows, for the lowest blocks that a config may have."""
    return p.num_kv_heads * -(-p.rows // _LEAST_M)


def _layout(p: DecodeProblem, target: Target, config: Config, dtype: str = "fp32") -> dict[str, int]:
    """By buffer its first byte, and where all end; `dtype` is that of partials."""
    rows = _pieces(p, target, config) * p.q_len * p.num_heads
    sizes = {"part": rows * p.kv_lora_rank * DTYPES[dtype].bytes, "part_lse": rows * 4}
    if not p.planned:
        sizes |= {name: 4 * math.prod(shape) for name, shape in lists(p, target, config).items()}
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = at
        at += -(-size // 16) * 16
    return {**found, "end": at}


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """As for decode_splitk_triton, but one launch more; what it gains no length bound tells, so measurements must."""
    like = _like(config)
    found = splitk.cost(p, target, like.replace(num_kv_splits=max(2, splitk._default_splits(p, target, like))))
    least_us = splitk.cost(p, target, splitk.default(p, target)).time_us
    return dataclasses.replace(found, time_us=max(found.time_us, least_us) + target.launch_us)


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    **{k: v for k, v in splitk.SPACE.items() if k not in ("min_tiles", "pdl")}, "overhead": (2, 5, 10), "waves": (1, 2),
    "fold": (False, True),
}  # fmt: skip

DECODE_PERSISTENT_TRITON = Variant(
    name=NAME, op="decode", backend="triton", revision=4, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets,
    prepare=prepare, lists=lists, space=SPACE,
)  # fmt: skip
