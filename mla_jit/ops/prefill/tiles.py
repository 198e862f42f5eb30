"""The row of `prefill_triton`: legality, default config, sources, launches and cost.

The kernel is in triton_prefill.py; nothing here imports triton.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode.splitk import _COMPUTE, _compute, _decode, _pow2, _qk_native, _source
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target

NAME = "prefill_triton"
_MODULE = "mla_jit.ops.prefill.triton_prefill"
_PATH = str(Path(__file__).with_name("triton_prefill.py"))
_SPILL_BYTES = 640  # of the peeled, masked tiles
_SLACK_BYTES = 2048  # of shared memory, for what is exchanged and barriers
_SHARE = 0.6  # of the matrix rate, for the model
_L2_RATE = 1.5  # of the bandwidth: at which tiles come from the L2
_TILE_KEYS = 8  # keys whose work takes as long as what a tile costs beside
_START_US = 1.1  # of a block
_L2_SHARE = 0.5  # of the L2, for the K and V of the heads that are worked on together

Parts = tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]

_POINTERS = ("qo_indptr", "kv_indptr", "q_scale", "k_scale", "v_scale", "out", "lse")
_STRIDES = tuple(f"{name}_stride_{axis}" for name in ("q", "k", "v", "out", "lse") for axis in "th")
_FLOATS = ("qk_scale", "v_scale", "logit_cap", "lse_mul")


def parts_of(dim: int) -> tuple[int, int]:
    """(MAIN, BLOCK_REST) of qk_dim: columns multiplied first, and the width of the block of the others, 0 for none.

    192 = 128 + 64, not 256; where the parts would fill a power of two as well (224), they are one.
    """
    main = 1 << (dim.bit_length() - 1)
    rest = _pow2(dim - main, 16) if dim > main else 0
    return (main, rest) if main >= 16 and rest < main else (dim, 0)


def rejects(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if p.batch * blocks(p, config) * p.num_heads >= 2**31:
        return "batch × blocks of queries × heads exceeds the largest grid (2^31)"
    return refuses(p, target, config)


def refuses(p: PrefillProblem, target: Target, config: Config) -> str | None:
    """The same, but for who schedules and for the size of the grid."""
    if not target.triton:
        return f"Triton has no backend for {target.name}"
    if "fp32" in (p.q_dtype, p.kv_dtype):
        return "fp32 q, k or v: GPUs are served in bf16, fp16 and fp8 (fp32 on the cpu target)"
    q, kv = DTYPES[p.q_dtype], DTYPES[p.kv_dtype]
    if q.bits == 16 and kv.bits == 16 and q is not kv:
        return f"q is {q.name}, k and v are {kv.name}: two 16-bit dtypes do not mix; cast q"
    if q.bits == 8 and q is not kv:
        return f"q is {q.name}, k and v are {kv.name}: fp8 q needs k and v of the same dtype"
    if p.v_dim > 256:
        return f"v_dim {p.v_dim} > 256: the output tile does not fit the register file"
    if p.qk_dim > 512:
        return f"qk_dim {p.qk_dim} > 512: the query tile does not fit shared memory"
    if config["tma"]:
        if not target.has("tma"):
            return f"{target.name} has no bulk tensor copies"
        if (reason := no_tma(p)) is not None:
            return reason
    if (smem := _smem(p, target, config)) > target.smem_bytes:
        return f"the tiles take {smem} bytes of shared memory, {target.name} has {target.smem_bytes}"
    return None


def no_tma(p: PrefillProblem) -> str | None:
    """Why tiles of these tensors cannot be bulk tensor copies, or None."""
    if {"k", "v"} & set(p.misaligned):
        return "the base or strides of k or v are not multiples of 16: no bulk tensor copies"
    if not p.token_major:
        return "the heads of k or v do not lie within a token's row: no bulk tensor copies"
    if DTYPES[p.kv_dtype].bits != 16:
        return "fp8 tiles are decoded in registers: no bulk tensor copies"
    main, rest = parts_of(p.qk_dim)
    if main != _pow2(main, 16) or p.qk_dim != main + rest or p.v_dim != _pow2(p.v_dim, 16):
        return "qk_dim or v_dim is not made of powers of two: no bulk tensor copies"
    return None


def _width(p: PrefillProblem) -> tuple[int, int]:
    """Padded columns of q and K, and of V."""
    main, rest = parts_of(p.qk_dim)
    return _pow2(main, 16) + rest, _pow2(p.v_dim, 16)


def _smem(p: PrefillProblem, target: Target, config: Config) -> int:
    """Bytes of shared memory that the tiles take, about: q, and the stages that are in flight."""
    d, dv = _width(p)
    queries = config.int("block_m") * d * 2
    tiles = config.int("block_n") * (d + dv) * 2 * max(0, config.int("num_stages") - (0 if config["tma"] else 1))
    if target.triton[:1] == ("hip",):  # q passes through it on its way to the registers
        return max(config.int("block_m") * parts_of(p.qk_dim)[0] * 2, tiles)
    return queries + tiles


# block_m, block_n, num_warps, num_stages by the kind of matrix instruction: for usual heads, and where O or q alone
# would fill the registers. As they compile without spills, or nearly; what does not fit is made smaller.
_TILES = {
    ("m64", False): (128, 128, 8, 2), ("m64", True): (64, 64, 8, 2),
    ("bulk", False): (128, 64, 8, 2), ("bulk", True): (64, 32, 8, 2),
    ("mma", False): (128, 32, 8, 2), ("mma", True): (32, 32, 8, 2),
    ("mfma", False): (128, 64, 4, 1), ("mfma", True): (64, 32, 4, 1),
}  # fmt: skip


def default(p: PrefillProblem, target: Target) -> Config:
    """A sound config from shapes alone: tall tiles that fit registers and shared memory."""
    d, dv = _width(p)
    tma = target.has("tma") and no_tma(p) is None
    kind = "mfma" if target.triton[:1] == ("hip",) else "m64" if target.has("mma_m64") else "bulk" if tma else "mma"
    wide, narrow = dv > 128 or d > 256, DTYPES[p.kv_dtype].bits == 8
    block_m, block_n, warps, stages = _TILES[kind, wide]
    if kind == "m64" and not tma:
        block_n = 32 if wide and narrow else min(block_n, 64)  # addresses take registers
    if kind == "mfma" and narrow:
        block_n = 32  # so does decoding
    if kind == "mma" and d + dv <= 256 and not narrow:
        block_n *= 2
    if p.q_len <= 64:
        block_m = min(block_m, 64)
    config = Config.of(NAME, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, tma=tma)
    for name, least in (("block_n", 32), ("num_stages", 1), ("block_n", 16), ("block_m", 16)):
        while _smem(p, target, config) + _SLACK_BYTES > target.smem_bytes and config.int(name) > least:
            config = config.replace(**{name: config.int(name) // 2})
    return config


def blocks(p: PrefillProblem, config: Config) -> int:
    """Blocks of queries of the longest sequence."""
    return -(-p.q_len // config.int("block_m"))


def heads_together(p: PrefillProblem, target: Target) -> int:
    """Heads whose K and V fit the L2 together; those that share a KV head are not parted."""
    size = max(1, p.max_kv_len) * (p.qk_dim + p.v_dim) * DTYPES[p.kv_dtype].bytes
    together = max(1, int(target.l2_bytes * _L2_SHARE) // size)
    return min(p.num_heads, together * p.gqa_ratio)


def _alignment(p: PrefillProblem, name: str) -> str:
    return "" if name in p.misaligned else ":16"


def _pointer(p: PrefillProblem, target: Target, name: str) -> str:
    """The signature entry of a pointer parameter."""
    element = {"q": p.q_dtype, "k": p.kv_dtype, "v": p.kv_dtype, "out": p.out_dtype}.get(name)
    if element is not None:
        text = "u8" if _decode(element, target) else DTYPES[element].triton
        return f"*{text}{_alignment(p, name)}"
    if name in ("qo_indptr", "kv_indptr"):
        return "*i64" if name in p.index64 else "*i32"
    return "*fp32"


def scalars(names: tuple[str, ...]) -> list[tuple[str, str, Arg]]:
    return [(n, "fp32", Arg("f32", n)) if n in _FLOATS else (n, "i32", Arg("i32", n)) for n in names]


def parts(p: PrefillProblem, target: Target, config: Config) -> Parts:
    """(constants, [(parameter, signature entry, launch argument)]) of the kernel, in the order of its parameters."""
    main, rest = parts_of(p.qk_dim)
    block_n, element = config.int("block_n"), DTYPES[p.kv_dtype].triton
    absent = {name for name in ("q_scale", "k_scale", "v_scale", "lse") if not getattr(p, name)}
    constants: dict[str, Scalar] = {f"{name}_ptr": None for name in absent}
    constants |= {
        "H": p.num_heads, "G": p.gqa_ratio, "D": p.qk_dim, "DV": p.v_dim, "MAIN": main,
        "BLOCK_M": config.int("block_m"), "BLOCK_N": block_n, "BLOCK_D": _pow2(main, 16), "BLOCK_REST": max(rest, 16),
        "BLOCK_DV": _pow2(p.v_dim, 16), "STAGES": config.int("num_stages"), "TMA": bool(config["tma"]),
        "CAUSAL": p.causal, "CAP": p.soft_cap, "HAS_LSE": p.lse, "COMPUTE": _COMPUTE[_compute(p)],  # type: ignore[arg-type]
        "DECODE": _decode(p.kv_dtype, target), "Q_DECODE": _decode(p.q_dtype, target), "QK_NATIVE": _qk_native(p),  # type: ignore[arg-type]
    }  # fmt: skip
    arguments = [(f"{n}_ptr", _pointer(p, target, n), Arg("ptr", n)) for n in ("q", "k", "v")]
    for parameter, name, box in (("k_desc", "k", main), ("k_rest_desc", "k", rest), ("v_desc", "v", p.v_dim)):
        if config["tma"] and box:
            kind = f"tma<{element}[{block_n},{box}]>"
            arguments.append((parameter, kind, Arg("tma", name, block=(block_n, box))))
        else:
            constants[parameter] = None
    arguments += [(f"{n}_ptr", _pointer(p, target, n), Arg("ptr", n)) for n in _POINTERS if n not in absent]
    for name in _STRIDES:
        operand = name.partition("_")[0]
        aligned = "" if operand == "lse" else _alignment(p, operand)
        arguments.append((name, f"i64{aligned}", Arg("i64", name)))
    return constants, arguments + scalars(("max_q_len", "heads_together", *_FLOATS))


def limits(target: Target) -> Limits:
    """Of a kernel that multiplies tiles."""
    return Limits(
        smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=_SPILL_BYTES, require=target.mma
    )


def options(config: Config) -> dict[str, Scalar]:
    return {"num_warps": config.int("num_warps"), "num_stages": config.int("num_stages")}


def sources(p: PrefillProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The one kernel."""
    found = parts(p, target, config)
    return (_source(target, "prefill_tiles", NAME, found, options(config), limits(target), _MODULE, _PATH),)


def launches(p: PrefillProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """A program a (block of queries, head, sequence)."""
    grid = (max(1, p.batch * blocks(p, config) * p.num_heads), 1, 1)
    return (Launch(0, grid, tuple(arg for *_, arg in parts(p, target, config)[1])),)


def numbers(p: PrefillProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem and target fix and the kernel takes at run time."""
    return {"max_q_len": p.q_len, "heads_together": heads_together(p, target)}


def cost(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """The roofline of a call whose sequences have mean lengths, with waves and what starting a block takes."""
    found = products(p, target, config)
    return dataclasses.replace(found, time_us=found.time_us + starts_us(p, target, config))


def starts_us(p: PrefillProblem, target: Target, config: Config) -> float:
    """What blocks cost beside their tiles: a program starts, asks for q and the first tile, and writes the results.

    Of prefill_gluon, beside prefill_persistent_gluon, on an H200, 2026-11-29.
    """
    blocks = -(-p.total_q // config.int("block_m")) * p.num_heads
    return _START_US * blocks / max(1, target.sms)


def products(p: PrefillProblem, target: Target, config: Config) -> Cost:
    """The same without the starts."""
    d, dv = _width(p)
    flops = int(2 * p.pairs * p.num_heads * (d + dv))
    size = (p.total_q * p.num_heads + p.keys * p.num_kv_heads) * (p.qk_dim + p.v_dim) * DTYPES[p.kv_dtype].bytes
    programs = max(1, -(-p.total_q // config.int("block_m"))) * p.num_heads
    waves = programs / resident(target, config)
    busy = waves / max(1, -(-programs // resident(target, config)))
    again = p.pairs * p.num_heads / config.int("block_m") * (p.qk_dim + p.v_dim) * DTYPES[p.kv_dtype].bytes  # from L2
    ideal = max(
        size / target.bandwidth_gbps * 1e-3, again / (target.bandwidth_gbps * _L2_RATE) * 1e-3,
        flops / (target.bf16_tflops * _SHARE) * 1e-6,
    )  # fmt: skip
    ideal *= 1 + _TILE_KEYS / config.int("block_n") + (0.15 if target.has("tma") and not config["tma"] else 0.0)
    return Cost(size, flops, programs, waves, ideal / max(busy, 1e-6) + target.launch_us)


def resident(target: Target, config: Config) -> int:
    """Programs that the device holds at once."""
    return target.sms * (1 if config.int("num_warps") >= 8 or config.int("block_m") >= 128 else 2)


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (32, 64, 128, 256), "block_n": (32, 64, 128), "num_warps": (4, 8, 16), "num_stages": (1, 2, 3, 4),
    "tma": (False, True),
}  # fmt: skip

PREFILL_TRITON = Variant(
    name=NAME, op="prefill", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=lambda p, target, config: 0, cost=cost, numbers=numbers, space=SPACE,
)  # fmt: skip
