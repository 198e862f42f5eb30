"""The row of `decode_splitk_triton`: legality, default config, sources, launches, workspace and cost.

The kernels are in triton_splitk.py and triton_combine.py; nothing here imports triton.
"""

from __future__ import annotations

import functools
from pathlib import Path

from mla_jit import settings
from mla_jit.compile import triton as toolchain
from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

NAME = "decode_splitk_triton"
_MODULE = "mla_jit.ops.decode.triton_splitk"
_PATH = str(Path(__file__).with_name("triton_splitk.py"))
_COMBINE_MODULE = "mla_jit.ops.decode.triton_combine"
_COMBINE_PATH = str(Path(__file__).with_name("triton_combine.py"))
_COMPUTE = {"bf16": "tl:bfloat16", "fp16": "tl:float16", "fp32": "tl:float32"}
_INVARIANT_TOKENS = 2048  # tokens a split under batch_invariant, whatever the batch
_MOST_BALANCED = 1024  # sequences whose lengths one program holds
_COMBINE_TILE = 16384  # partials that a program of the combine holds: 128 registers a thread
_SPILL_BYTES = 1792  # the peeled, masked tile may spill; the main loop's budget is checked by its speed

# Arguments of the kernels by parameter: the operand behind a pointer, or how a number is passed.
_FLOATS = ("qk_scale", "v_scale", "logit_cap", "lse_mul")
_INTS = ("batch", "max_q_len", "num_splits", "min_tiles", "wave", "slots", "cp_rank", "cp_world")
_STAGE1_POINTERS = (
    "q", "q_pe", "kv", "kpe", "table", "lens", "kv_indptr", "last", "qo_indptr", "sinks", "q_scale", "kv_scale",
    "scales", "out", "lse",
    "part", "part_lse",
)  # fmt: skip
_STAGE1_STRIDES = (
    "q_stride_t", "q_stride_h", "q_pe_stride_t", "q_pe_stride_h", "kv_stride_page", "kv_stride_tok", "kv_stride_head",
    "kpe_stride_page", "kpe_stride_tok", "kpe_stride_head", "table_stride",
)  # fmt: skip
_SCALES_STRIDES = ("scales_stride_page", "scales_stride_tok", "scales_stride_head")  # constants where there are none
_OUT_STRIDES = ("out_stride_t", "out_stride_h", "lse_stride_t", "lse_stride_h")
_COMBINE_POINTERS = ("lens", "kv_indptr", "last", "qo_indptr", "sinks", "out", "lse", "part", "part_lse")


def _pow2(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def _compute(p: DecodeProblem) -> str:
    """The dtype in which tiles are multiplied: q's if it has 16 bits; fp16 holds every e4m3 value exactly."""
    return p.q_dtype if DTYPES[p.q_dtype].bits == 16 else "fp16"


def _decode(dtype: str, target: Target) -> str:
    """How bytes of an fp8 dtype become numbers: "" natively, else by integer instructions."""
    if DTYPES[dtype].bits != 8 or dtype in target.dtypes:
        return ""
    return dtype.removeprefix("fp8_")


def _qk_native(p: DecodeProblem) -> bool:
    """Whether q·k is one matrix instruction on the operands as they lie in memory.

    Not for fp8: Hopper's fp8 instructions add up in about 14 bits, which moved the LSE by 0.04 (measured), and the tile
    is converted for P·V anyway; e4m3 is exact in fp16.
    """
    return p.q_dtype == p.kv_dtype and DTYPES[p.q_dtype].bits == 16


def num_splits(p: DecodeProblem, config: Config) -> int:
    """Split slots of a sequence: the caller's wish, else the config's; fixed by capacity under batch_invariant."""
    if p.num_kv_splits is not None:
        return p.num_kv_splits
    if p.batch_invariant:
        return max(1, -(-p.max_kv_len // _INVARIANT_TOKENS))
    return config.int("num_kv_splits")


def _splits(p: DecodeProblem, config: Config) -> bool:
    """Whether any sequence may be cut, so that partials and the combine are needed."""
    return num_splits(p, config) > 1 or _balances(p)


def _min_tiles(p: DecodeProblem, config: Config) -> int:
    if p.batch_invariant:
        return _INVARIANT_TOKENS // config.int("block_n")
    return 1 if p.num_kv_splits is not None else config.int("min_tiles")


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if p.batch * max(p.rows, 1) * p.num_kv_heads * num_splits(p, config) >= 2**31:
        return "batch × rows × splits exceeds the largest grid (2^31); pass a smaller num_kv_splits"
    return _refuses(p, target, config)


def _refuses(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """The same, but for who schedules and for the size of the grid."""
    if not target.triton:
        return f"Triton has no backend for {target.name}"
    if "fp32" in (p.q_dtype, p.kv_dtype):
        return "fp32 q or cache: GPUs are served in bf16, fp16 and fp8 (fp32 on the cpu target)"
    q, kv = DTYPES[p.q_dtype], DTYPES[p.kv_dtype]
    if q.bits == 16 and kv.bits == 16 and q is not kv:
        return f"q is {q.name} and the cache is {kv.name}: two 16-bit dtypes do not mix; cast q"
    if q.bits == 8 and q is not kv:
        return f"q is {q.name} and the cache is {kv.name}: fp8 q needs a cache of the same dtype"
    if p.kv_lora_rank > 512:
        return f"kv_lora_rank {p.kv_lora_rank} > 512: the output tile does not fit the register file"
    if p.rope_dim > 128:
        return f"rope_dim {p.rope_dim} > 128"
    tile = config.int("combine_s") * config.int("combine_h") * config.int("combine_d")
    if tile > _COMBINE_TILE:
        return f"a tile of {tile} partials in the combine exceeds {_COMBINE_TILE}: it would not stay in registers"
    if config["pdl"] and not target.has("pdl"):
        return f"{target.name} has no programmatic dependent launch"
    if config["tma"]:
        if not target.has("tma"):
            return f"{target.name} has no bulk tensor copies"
        if (reason := _no_tma(p, config)) is not None:
            return reason
    columns = _pow2(p.kv_lora_rank, 16)
    results = config.int("block_m") * columns
    a_thread = results // (config.int("num_warps") * int(target.triton[2]))
    if a_thread >= target.registers and not target.has("tmem"):
        return f"a block's results take {a_thread} registers of a thread, which has {target.registers}; use more warps"
    tile, stages = config.int("block_n") * columns * kv.bytes, config.int("num_stages")
    if tile * max(1, stages - 1) > target.smem_bytes:
        return f"{stages} stages of {tile} bytes exceed {target.smem_bytes} bytes of shared memory"
    return None


def _no_tma(p: DecodeProblem, config: Config) -> str | None:
    """Why tiles of this cache cannot be bulk tensor copies, or None."""
    if p.page_size % config.int("block_n"):
        return (
            f"page size {p.page_size} is no multiple of a tile of {config.int('block_n')} tokens: no bulk tensor copies"
        )
    if "kv" in p.misaligned:
        return "the cache's base or strides are not multiples of 16: no bulk tensor copies"
    if not p.flat_pages:
        return "the cache's page stride is not page_size × token stride: no bulk tensor copies"
    if DTYPES[p.kv_dtype].bits != 16:
        return "fp8 tiles are decoded in registers: no bulk tensor copies"
    if p.kv_lora_rank != _pow2(p.kv_lora_rank, 16) or (p.rope_dim and p.rope_dim != _pow2(p.rope_dim, 16)):
        return "kv_lora_rank or rope_dim is not a power of two: no bulk tensor copies"
    if 0 < p.rope_dim < 64:
        return f"rope_dim {p.rope_dim} < 64: a call with bulk copies of such rows did not end on one H200"
    return None


# block_m, block_n, num_warps, num_stages by the kind of matrix instruction and the packed rows: the best of a sweep on
# one H200 for "m64" with bulk copies; the others scaled by shared memory, spills and what compiles.
_TILES = {
    ("m64", 16): (16, 64, 8, 3), ("m64", 32): (16, 64, 8, 3), ("m64", 64): (64, 64, 8, 2),
    ("mma", 16): (16, 32, 4, 3), ("mma", 32): (32, 32, 8, 2),
    ("mfma", 16): (16, 32, 4, 1), ("mfma", 32): (32, 32, 4, 1),
}  # fmt: skip


@functools.lru_cache(maxsize=512)  # other variants ask for it too, each time that one is chosen
def default(p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone: rows packed to a power of two, tiles that fit, splits that fill the device."""
    rows = max(p.rows, 1)
    narrow = DTYPES[p.kv_dtype].bits == 8
    kind = "mfma" if target.triton[:1] == ("hip",) else "m64" if target.has("mma_m64") else "mma"
    bulk = target.has("tma") and _no_tma(p, Config.of(NAME, block_n=64)) is None
    if kind == "m64" and not bulk and rows <= 32:
        kind = "mma"  # gathered tiles of few rows: smaller tiles, more programs
    block_m, block_n, warps, stages = _TILES[kind, 16 if rows <= 16 else 32 if rows <= 32 or kind != "m64" else 64]
    if narrow and (block_m < 64 or DTYPES[p.q_dtype].bits == 8 or p.scaled or p.batch * p.max_kv_len < 4096):
        block_n = 32
    width = _pow2(p.kv_lora_rank, 16) * DTYPES[p.kv_dtype].bytes
    width += _pow2(p.rope_dim, 16) * DTYPES[p.rope_dtype].bytes if p.rope_dim else 0
    queries = block_m * (_pow2(p.kv_lora_rank, 16) + _pow2(p.rope_dim, 16)) * 2 if block_m >= 32 else 0
    slack = 2048
    if block_m == 32 and target.smem_bytes < 104448:  # with q, a gathered tile of 32 tokens takes 102400 bytes
        block_m = 16
    while stages > 1 and queries + stages * block_n * width + slack > target.smem_bytes:
        stages -= 1
    while block_n > 16 and queries + stages * block_n * width + slack > target.smem_bytes:
        block_n //= 2
    if queries + stages * block_n * width + slack > target.smem_bytes:
        block_m = 16
    pieces, heads, columns = _combine_default(p)
    config = Config.of(
        NAME, block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, tma=False, min_tiles=1,
        num_kv_splits=1, combine_s=pieces, combine_h=heads, combine_d=columns, masked_first=block_m < 64,
        pdl=target.has("pdl"),
    )  # fmt: skip
    if bulk and _no_tma(p, config) is None:
        config = config.replace(tma=True)
    config = config.replace(num_kv_splits=_default_splits(p, target, config))
    return config.replace(combine_s=16) if pieces == 8 and config.int("num_kv_splits") > 8 else config


def _combine_default(p: DecodeProblem) -> tuple[int, int, int]:
    """(pieces, heads, columns) of a program of the combine, by the rows of the output: few want many small programs."""
    rows = p.batch * p.q_len * p.num_heads
    if p.batch == 1 and rows <= 128:
        return (128 if rows <= 64 else 32), 1, 64
    if rows <= 32:
        return 32, 1, 128
    return (8, 1, 512) if rows <= 2112 else (4, 4, 512)


def _row_blocks(p: DecodeProblem, config: Config) -> int:
    """Programs a piece: blocks of rows × KV heads."""
    return -(-max(p.rows, 1) // config.int("block_m")) * p.num_kv_heads


def _programs(p: DecodeProblem, config: Config) -> int:
    """Programs of stage 1 without splits."""
    return max(1, p.batch * _row_blocks(p, config))


def _resident(target: Target, config: Config) -> int:
    """Programs that the device holds at once."""
    return target.sms * (1 if config.int("num_warps") >= 8 else 2)


def _wave(p: DecodeProblem, target: Target, config: Config) -> int:
    """Pieces that the device works on at once."""
    return max(1, _resident(target, config) // _row_blocks(p, config))


def _balances(p: DecodeProblem) -> bool:
    """Whether the kernels cut a ragged batch by its lengths; otherwise every sequence has the same slots."""
    return 1 < p.batch <= _MOST_BALANCED and p.num_kv_splits is None and not p.batch_invariant


def slots(p: DecodeProblem, target: Target, config: Config) -> int:
    """Pieces that the grid and the workspace hold."""
    even = max(1, p.batch) * num_splits(p, config)
    return max(even, p.batch + 2 * _wave(p, target, config)) if _balances(p) else even


def _default_splits(p: DecodeProblem, target: Target, config: Config) -> int:
    """The count i that maximises the share of the device's slots in use, less what a split costs.

    With `programs` without splits and `slots` resident at once, i splits take ceil(programs·i / slots) waves; a split
    costs about 64 tokens of work (start, partial). With few rows more than one wave, if the length is known and that is
    clearly better: each wave starts anew (about 110 tokens), and all partials are written and read (2.5 times their
    bytes; both fitted to times on one H200).
    """
    programs, slots = _programs(p, config), _resident(target, config)
    tiles = -(-p.max_kv_len // config.int("block_n"))
    most = max(1, min(tiles, -(-slots // programs), 256))

    def score(i: int) -> float:
        waves = -(-programs * i // slots)
        return programs * i / (waves * slots) * p.max_kv_len / (p.max_kv_len + 64.0 * i)

    found = max(range(1, most + 1), key=lambda i: (round(score(i), 3), -i))
    if not p.hinted or p.rows > 16 or not slots // 4 <= programs < slots:
        return found
    token = p.token_bytes * slots
    partials = 2.5 * 2 * p.batch * p.q_len * p.num_heads * p.kv_lora_rank * 4 / token  # of a split, in tokens of a slot

    def time(i: int) -> float:
        return -(-programs * i // slots) * (p.max_kv_len / i + 110.0) + (partials * i if i > 1 else 0.0)

    better = min(range(1, min(tiles, 4 * slots // programs) + 1), key=lambda i: (time(i), i), default=found)
    return better if time(better) < 0.92 * time(found) else found


def resize(measured: DecodeProblem, asked: DecodeProblem, target: Target, config: Config) -> Config:
    """As many splits for the sizes asked for, beside those of `_default_splits`, as the config has where measured."""
    there, here = (_default_splits(p, target, config) for p in (measured, asked))
    return config.replace(num_kv_splits=max(1, round(config.int("num_kv_splits") * here / there)))


def _alignment(p: DecodeProblem, name: str) -> str:
    group = {"q": "q", "q_pe": "q", "kv": "kv", "kpe": "kv", "out": "out"}.get(name)
    return "" if group in p.misaligned else ":16"


def _pointer(p: DecodeProblem, target: Target, name: str) -> str:
    """The signature entry of a pointer parameter."""
    element = {"q": p.q_dtype, "q_pe": p.q_dtype, "kv": p.kv_dtype, "kpe": p.rope_dtype, "out": p.out_dtype}.get(name)
    if element is not None:
        text = "u8" if _decode(element, target) else DTYPES[element].triton
        return f"*{text}{_alignment(p, name)}"
    if name in ("table", "lens", "kv_indptr", "last", "qo_indptr"):
        return "*i64" if name in p.index64 else "*i32"
    return "*fp32:16" if name in ("part", "part_lse") else "*fp32"


def _absent(p: DecodeProblem) -> set[str]:
    """Pointer operands that this problem does not have."""
    has = {
        "lens": p.has_lens, "kv_indptr": p.paging == "csr",
        "last": p.paging == "csr" and not p.has_lens and p.page_size > 1,
        "qo_indptr": p.ragged, "sinks": p.sinks, "q_scale": p.q_scale, "kv_scale": p.kv_scale, "lse": p.lse,
        "scales": p.scaled,
    }  # fmt: skip
    return {name for name, present in has.items() if not present}


def _stage1(p: DecodeProblem, target: Target, config: Config) -> tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]:
    """(constants, [(parameter, signature entry, launch argument)]) of the first kernel."""
    latent, rope, block_n = _pow2(p.kv_lora_rank, 16), _pow2(p.rope_dim, 16), config.int("block_n")
    absent = _absent(p)
    constants: dict[str, Scalar] = {f"{name}_ptr": None for name in absent}
    constants |= {} if p.scaled else dict.fromkeys(_SCALES_STRIDES)
    constants |= {
        "G": p.gqa_ratio, "NUM_KV_HEADS": p.num_kv_heads, "MULTI": p.q_len > 1, "C": p.kv_lora_rank, "R": p.rope_dim,
        "PAGE": p.page_size, "BLOCK_M": config.int("block_m"), "BLOCK_N": block_n, "BLOCK_C": latent, "BLOCK_R": rope,
        "BATCH_POW2": _batch_pow2(p), "STAGES": config.int("num_stages"), "TMA": bool(config["tma"]),
        "MASKED_FIRST": bool(config["masked_first"]),
        "PDL": bool(config["pdl"]), "CAUSAL": p.causal and p.q_len > 1, "CAP": p.soft_cap, "CP": p.context_parallel,
        "HAS_LENS": p.has_lens,
        "HAS_LSE": p.lse, "COMPUTE": _COMPUTE[_compute(p)], "DECODE": _decode(p.kv_dtype, target),
        "Q_DECODE": _decode(p.q_dtype, target), "QK_NATIVE": _qk_native(p),
    }  # fmt: skip
    arguments: list[tuple[str, str, Arg]] = []
    for name in _STAGE1_POINTERS[:4]:
        arguments.append((f"{name}_ptr", _pointer(p, target, name), Arg("ptr", name)))
    for name, box in (("kv", latent), ("kpe", rope)):
        if config["tma"] and (name == "kv" or p.rope_dim):
            element = DTYPES[p.kv_dtype].triton
            arguments.append(
                (f"{name}_desc", f"tma<{element}[{block_n},{box}]>", Arg("tma", name, block=(block_n, box)))
            )
        else:
            constants[f"{name}_desc"] = None
    for name in _STAGE1_POINTERS[4:]:
        if name not in absent:
            arguments.append((f"{name}_ptr", _pointer(p, target, name), Arg("ptr", name)))
    for name in (*_STAGE1_STRIDES, *(_SCALES_STRIDES if p.scaled else ()), *_OUT_STRIDES):
        operand = name.split("_stride")[0]
        aligned = _alignment(p, operand) if operand in ("q", "q_pe", "kv", "kpe", "out") else ""
        arguments.append((name, f"i64{aligned}", Arg("i64", name)))
    return constants, arguments + _scalars((*_INTS, *_FLOATS))


def _batch_pow2(p: DecodeProblem) -> int:
    """Lanes that hold the batch's lengths; three sizes, so that few kernels are compiled. 32 need no exchange."""
    return next(n for n in (32, 256, _MOST_BALANCED) if p.batch <= n or not _balances(p))


def _combine_tile(p: DecodeProblem, config: Config) -> tuple[int, int, int]:
    """(pieces, heads, columns) that a program of the combine holds."""
    heads = min(config.int("combine_h"), _pow2(p.num_heads))
    if p.batch_invariant:  # the order of the sum must not depend on the batch
        return 8, 1, min(512, _pow2(p.kv_lora_rank, 16))
    return config.int("combine_s"), heads, min(config.int("combine_d"), _pow2(p.kv_lora_rank, 16))


def _combine(p: DecodeProblem, target: Target, config: Config) -> tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]:
    """The same for the second kernel."""
    block_s, block_h, block_d = _combine_tile(p, config)
    absent = _absent(p)
    constants: dict[str, Scalar] = {f"{name}_ptr": None for name in absent if name in _COMBINE_POINTERS}
    constants |= {
        "H": p.num_heads, "C": p.kv_lora_rank, "PAGE": p.page_size, "BLOCK_N": config.int("block_n"),
        "BLOCK_S": block_s, "BLOCK_H": block_h, "BLOCK_D": block_d,
        "BATCH_POW2": _batch_pow2(p), "PDL": bool(config["pdl"]), "CP": p.context_parallel, "HAS_LENS": p.has_lens,
        "HAS_LSE": p.lse,
    }  # fmt: skip
    arguments = [(f"{n}_ptr", _pointer(p, target, n), Arg("ptr", n)) for n in _COMBINE_POINTERS if n not in absent]
    for name in _OUT_STRIDES:
        arguments.append((name, f"i64{_alignment(p, 'out') if name.startswith('out') else ''}", Arg("i64", name)))
    return constants, arguments + _scalars((*_INTS, "lse_mul"))


def _scalars(names: tuple[str, ...]) -> list[tuple[str, str, Arg]]:
    return [(n, "fp32", Arg("f32", n)) if n in _FLOATS else (n, "i32", Arg("i32", n)) for n in names]


def _source(target: Target, function: str, name: str, parts: tuple[dict[str, Scalar], list[tuple[str, str, Arg]]],
            options: dict[str, Scalar], limits: Limits, module: str = _MODULE,
            path: str = _PATH) -> Source:  # fmt: skip
    constants, arguments = parts
    backend, arch, warp_size = target.triton
    options = options | {"backend": backend, "arch": arch, "warp_size": warp_size}
    knobs = tuple((f"env:{k}", v) for k, v in settings.compiler_knobs())
    return Source(
        name=name,
        toolchain="triton",
        toolchain_version=toolchain.version(),
        isa=target.isa,
        content=toolchain.closure(path, function),
        constants=tuple(sorted(constants.items())),
        signature=tuple((parameter, kind) for parameter, kind, _ in arguments),
        options=(*sorted(options.items()), *knobs),
        locator=f"{module}:{function}",
        limits=limits,
    )


def sources(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """Stage 1, and the combine where there is more than one split slot."""
    limits = Limits(
        smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=_SPILL_BYTES, require=target.mma
    )
    options: dict[str, Scalar] = {"num_warps": config.int("num_warps"), "num_stages": config.int("num_stages")}
    stage1 = _source(target, "decode_splitk", NAME, _stage1(p, target, config), options, limits)
    return stage1, *combines(p, target, config)


def combines(p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The combine, for other stages 1 too; () where nothing is cut."""
    if not _splits(p, config):
        return ()
    small = Limits(smem_bytes=target.smem_bytes, registers=target.registers, spill_bytes=64)
    options: dict[str, Scalar] = {"num_warps": 4, "num_stages": 2}
    parts = _combine(p, target, config)
    return (_source(target, "combine", f"{NAME}_combine", parts, options, small, _COMBINE_MODULE, _COMBINE_PATH),)


def launches(p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """One program a (row block, KV head, split, sequence); the combine one a (column block, head, token, sequence)."""
    grid = (max(1, slots(p, target, config) * _row_blocks(p, config)), 1, 1)
    stage1 = Launch(0, grid, tuple(a for *_, a in _stage1(p, target, config)[1]))
    if not _splits(p, config):
        return (stage1,)
    _, heads, columns = _combine_tile(p, config)
    grid = (-(-p.kv_lora_rank // columns) * -(-p.num_heads // heads) * p.q_len * p.batch, 1, 1)
    two = Launch(1, grid, tuple(a for *_, a in _combine(p, target, config)[1]), pdl=bool(config["pdl"]))
    return stage1, two


def numbers(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """The numbers that problem, target and config fix and the kernels take at run time."""
    return {
        "batch": p.batch, "max_q_len": p.q_len, "num_splits": num_splits(p, config), "min_tiles": _min_tiles(p, config),
        "wave": _wave(p, target, config) if _balances(p) else 0, "slots": slots(p, target, config),
    }  # fmt: skip


def workspace_bytes(p: DecodeProblem, target: Target, config: Config) -> int:
    """fp32 partials [pieces, q_len, heads, C] and their LSE [pieces, q_len, heads]; 0 without splits."""
    if not _splits(p, config):
        return 0
    return partials(p, slots(p, target, config))[1]


def partials(p: DecodeProblem, pieces: int, dtype: str = "fp32") -> tuple[int, int]:
    """Of the partials of so many pieces: where their LSE begin, and the size of all, in bytes."""
    rows = pieces * p.q_len * p.num_heads
    size = -(-rows * p.kv_lora_rank * DTYPES[dtype].bytes // 16) * 16
    return size, size + rows * 4


def workspace_offsets(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    """Where each buffer starts in the workspace, in bytes."""
    return {"part": 0, "part_lse": partials(p, slots(p, target, config))[0]}


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """The roofline of one call at its length bound, with waves and the second launch."""
    splits = num_splits(p, config)
    tokens = p.total_kv if p.total_kv is not None else p.batch * p.max_kv_len
    blocks = -(-max(p.rows, 1) // config.int("block_m"))
    padded = blocks * config.int("block_m") * p.num_kv_heads
    size = tokens * p.token_bytes + workspace_bytes(p, target, config) * 2
    flops = 2 * tokens * padded * (p.head_dim + p.kv_lora_rank)
    programs = _programs(p, config) * splits
    waves = programs / _resident(target, config)
    busy = waves / max(1, -(-programs // _resident(target, config)))
    ideal = max(size / target.bandwidth_gbps * 1e-3, flops / target.bf16_tflops * 1e-6)
    launch = target.launch_us * (2 if splits > 1 else 1)
    return Cost(size, flops, programs, waves, ideal / max(busy, 1e-6) + launch)


SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (16, 32, 64), "block_n": (16, 32, 64), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4),
    "tma": (False, True), "masked_first": (False, True), "min_tiles": (1, 2, 4), "pdl": (False, True),
    "combine_s": (2, 4, 8, 16, 32, 64, 128), "combine_h": (1, 2, 4, 8), "combine_d": (64, 128, 256, 512),
}  # fmt: skip

DECODE_SPLITK_TRITON = Variant(
    name=NAME, op="decode", backend="triton", revision=2, rejects=rejects, default=default, sources=sources,
    launches=launches, workspace_bytes=workspace_bytes, cost=cost, numbers=numbers, offsets=workspace_offsets,
    resize=resize, space=SPACE,
)  # fmt: skip
