"""The row of `prefill_persistent_gluon`: the list of persistent.py walked by gluon_prefill_persistent.py.

List, workspace and combine are those of persistent.py; what can be served is what gluon.py serves, and fp8: K and V are
made 16 bits wide first, in the workspace (triton_widen.py), q as it is loaded. Imports no triton.

Widening by warps of the kernel itself was 14 % faster for prompts of 1024 tokens and 13 to 24 % slower for long ones
(H200, 2026-11-29): these warps take longer for a tile than its products do. If widening to bf16 cost nothing, fp8 would
be 1.01 to 1.07 times as fast as bf16. fp8 q, K and V are made fp16, which is 1.6 % faster than bf16 in the mean.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch, TensorView
from mla_jit.ops import specialised
from mla_jit.ops.decode.splitk import _source
from mla_jit.ops.prefill import gluon, persistent, tiles
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target

NAME = "prefill_persistent_gluon"
_MODULE = "mla_jit.ops.prefill.gluon_prefill_persistent"
_PATH = str(Path(__file__).with_name("gluon_prefill_persistent.py"))
_WIDENING = "mla_jit.ops.prefill.triton_widen"
_WIDENING_PATH = str(Path(__file__).with_name("triton_widen.py"))
_WALK = 1.03  # of prefill_gluon's time for the same tiles
_ROWS, _COLS = 16, 1024  # tokens, and elements of each, that a program makes wide


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if (reason := persistent.unlisted(p, target, _like(config))) is not None:
        return reason
    fp8 = [name for name in (p.q_dtype, p.kv_dtype) if DTYPES[name].bits == 8]
    if not set(fp8) <= {"fp8_e4m3"}:
        return f"q is {p.q_dtype}, k and v are {p.kv_dtype}: of fp8 types e4m3 is made wide"
    if DTYPES[p.q_dtype].bits == 8 and not _narrow(p):
        return f"q is {p.q_dtype}, k and v are {p.kv_dtype}: fp8 q needs k and v of the same dtype"
    if _narrow(p) and _widening_programs(p) >= 2**31:
        return "tokens × elements exceed the largest grid (2^31) of the kernel that widens K and V; split the batch"
    if _narrow(p) and DTYPES[p.out_dtype].bits != 16:
        return f"out is {p.out_dtype}: beside k and v in {p.kv_dtype} it must be bf16 or fp16"
    wide = _wide(p)
    return gluon.refuses(dataclasses.replace(wide, out_dtype=wide.q_dtype) if _narrow(p) else wide, target, config)


def _narrow(p: PrefillProblem) -> bool:
    """Whether K and V are made wide."""
    return DTYPES[p.kv_dtype].bits == 8


def _wide(p: PrefillProblem) -> PrefillProblem:
    """The problem of the kernel that walks the list: of 16 bits, K and V without gaps."""
    if not _narrow(p):
        return p
    wide = "fp16" if DTYPES[p.q_dtype].bits == 8 else p.q_dtype
    misaligned = tuple(name for name in p.misaligned if name not in ("k", "v"))
    return dataclasses.replace(p, q_dtype=wide, kv_dtype=wide, misaligned=misaligned, token_major=True)


def _like(config: Config) -> Config:
    """The config of prefill_persistent_triton that makes the same list and the same combine."""
    return Config.of(persistent.NAME, **config, tma=True, per_sm=1)


def default(p: PrefillProblem, target: Target) -> Config:
    """The tiles of prefill_gluon; pieces of no fewer keys than 512, as their partials are fp32 and read again."""
    like = gluon.default(p, target)
    return Config.of(NAME, **like, min_tiles=512 // like.int("block_n"))


def _arguments(p: PrefillProblem, target: Target, config: Config) -> gluon.Parts:
    """[(parameter, signature entry, launch argument)] of the kernel."""
    wide = _wide(p)
    found = []
    for name, kind, arg in gluon.boxed(wide, config, persistent._walk(wide, target, _like(config))[1]):
        if name == "q_ptr":
            kind = tiles._pointer(p, target, "q")
        elif _narrow(p) and name in ("k_desc", "v_desc"):
            arg = dataclasses.replace(arg, name=f"{arg.name}_wide")
        elif _narrow(p) and name in ("k_stride_h", "v_stride_h"):
            arg = dataclasses.replace(arg, name=name.replace("_", "_wide_", 1))
        found.append((name, kind, arg))
    return found


def _widening(p: PrefillProblem, target: Target) -> tiles.Parts:
    """(constants, [(parameter, signature entry, launch argument)]) of the kernel that makes K and V wide."""
    constants: dict[str, Scalar] = {"HK": p.num_kv_heads, "D": p.qk_dim, "DV": p.v_dim, "ROWS": _ROWS, "COLS": _COLS}
    constants |= {f"{name.upper()}_TOGETHER": 1 if name in p.misaligned else 8 for name in ("k", "v")}
    arguments = [(f"{n}_ptr", tiles._pointer(p, target, n), Arg("ptr", n)) for n in ("k", "v", "kv_indptr")]
    wide = DTYPES[_wide(p).kv_dtype].triton
    arguments += [(f"{n}_ptr", f"*{wide}:16", Arg("ptr", n)) for n in ("k_wide", "v_wide")]
    arguments += tiles.scalars(("batch",))
    for name in ("k_stride_t", "k_stride_h", "v_stride_t", "v_stride_h"):
        arguments.append((name, f"i64{tiles._alignment(p, name[0])}", Arg("i64", name)))
    return constants, arguments


def sources(p: PrefillProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """What walks the list; then what makes it, the combine if keys are cut, and what makes fp8 wide."""
    like, *rest = persistent.sources(_wide(p), target, _like(config))
    constants: dict[str, Scalar] = {k: v for k, v in like.constants if k in gluon.CONSTANTS or v is None}
    constants = {k: v for k, v in constants.items() if k not in gluon.WITHOUT} | {"REGISTERS": gluon.REGISTERS}
    signature = [(parameter, kind) for parameter, kind, _ in _arguments(p, target, config)]
    walk = specialised.source(
        like, target, NAME, _MODULE, _PATH, constants=constants, signature=signature, spill_bytes=gluon.SPILL_BYTES
    )
    if _narrow(p):
        limits = Limits(smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=0)
        few: dict[str, Scalar] = {"num_warps": 8, "num_stages": 1}
        rest.append(
            _source(target, "widen", f"{NAME}_widen", _widening(p, target), few, limits, _WIDENING, _WIDENING_PATH)
        )
    return (walk, *rest)


def launches(p: PrefillProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """fp8 made wide, a program a (run of tokens, run of elements); the list by one program; the wave; the combine."""
    arguments = tuple(arg for *_, arg in _arguments(p, target, config))
    found = [
        dataclasses.replace(launch, args=arguments) if launch.kernel == 0 else launch
        for launch in persistent.launches(_wide(p), target, _like(config))
    ]
    if _narrow(p):
        grid = (_widening_programs(p), 1, 1)
        found.insert(0, Launch(len(found), grid, tuple(arg for *_, arg in _widening(p, target)[1])))
    return tuple(found)


def _widening_programs(p: PrefillProblem) -> int:
    blocks = sum(-(-p.num_kv_heads * dim // _COLS) for dim in (p.qk_dim, p.v_dim))
    return -(-_tokens(p) // _ROWS) * blocks


def _tokens(p: PrefillProblem) -> int:
    return max(1, p.keys)


def numbers(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    found = persistent.numbers(_wide(p), target, _like(config))
    return {**found, "k_wide_stride_h": p.qk_dim, "v_wide_stride_h": p.v_dim} if _narrow(p) else found


def views(p: PrefillProblem, target: Target, config: Config) -> dict[str, TensorView]:
    """Of K and V in the workspace."""
    if not _narrow(p):
        return {}
    found = {}
    for name, dim in (("k_wide", p.qk_dim), ("v_wide", p.v_dim)):
        columns = p.num_kv_heads * dim
        found[name] = TensorView(_tokens(p), columns, columns, columns * 2, _wide(p).kv_dtype)
    return found


def _layout(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    found, at = persistent._layout(_wide(p), target, _like(config)), 0
    for name, view in views(p, target, config).items():
        at = -(-found.pop("end") // 256) * 256
        found |= {name: at, "end": at + view.rows * view.row_bytes}
    return found


def workspace_offsets(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes: those of persistent.py, then wide K and V."""
    return {name: at for name, at in _layout(p, target, config).items() if name != "end"}


def workspace_bytes(p: PrefillProblem, target: Target, config: Config) -> int:
    """Of all buffers; wide K and V take tokens · KV heads · (qk_dim + v_dim) · 2 bytes, tokens rounded up."""
    return _layout(p, target, config)["end"]


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """As for prefill_persistent_triton and prefill_gluon: long sequences take a little longer than in the latter's
    order (H200, 2026-11-29), blocks cost nothing beside their tiles; fp8 is read once more, and written wide."""
    wide, like = _wide(p), _like(config)
    found = persistent.listed(wide, target, like, tiles.products(wide, target, persistent._like(like)))
    time_us = gluon.products_us(p, found) * _WALK
    if _narrow(p):
        time_us += 3 * p.keys * p.num_kv_heads * (p.qk_dim + p.v_dim) / target.bandwidth_gbps * 1e-3 + target.launch_us
    return dataclasses.replace(found, time_us=time_us)


SPACE: dict[str, tuple[int | str | bool, ...]] = {**gluon.SPACE, "min_tiles": (2, 4, 8)}

PREFILL_PERSISTENT_GLUON = Variant(
    name=NAME, op="prefill", backend="triton", revision=2, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets,
    views=views, space=SPACE,
)  # fmt: skip
