"""The rows in PTX: `decode_splitk_asm` (blocks of 64 rows), `decode_narrow_asm`, `decode_narrow_pair_asm` (8 to 32),
`decode_mixed_asm` (64, but fewer for a sequence that turns out short).

Their blocks of rows are in asm_blocks.py. How sequences are cut, and the arguments, are those of splitk.py. Partials
have the result's type (Triton's kernels have fp32 ones); `combine.ptx` sums them. Imports neither triton nor jinja2.
"""

from __future__ import annotations

import dataclasses
import json

from mla_jit import settings
from mla_jit.compile import ptx, render
from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode import gluon, splitk
from mla_jit.ops.decode.asm_blocks import (
    BOX,
    LISTED,
    LONG,
    MIXED,
    NARROW,
    NARROW_PAIR,
    NARROW_ROWS,
    WIDE,
    WORD,
    Template,
    boxes_of,
    classes,
    copied_tokens,
    gathers,
    most_tokens,
    short_splits,
    walks,
)
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

_COMBINE = "combine.ptx"
_HEADS, _COLUMNS = (1, 2, 4, 8), (64, 128, 256, 512)  # of a program of it
_COMBINED = 2048  # heads × columns of a program of it, 8 a thread
# Pieces on a thread's way, of 16-bit results (of fp32 ones half as many): programs of it that an SM holds then.
_AHEAD = {8: 3, 16: 2, 32: 1}
_FEW = 16  # sequences
_LITTLE = 12288  # tokens × blocks of 64 rows below which narrow blocks, being more programs, are faster (one H200)
_CLUSTER = 2  # programs. Greater ones leave SMs idle: 32 of four took two rounds on an H200 (70 us, 41 without)
_PTX = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
# Parameters of decode_splitk by what a template does not read: bulk copies need maps, gathered tiles pointers.
_GATHERED = ("kv_ptr", "kpe_ptr", "kv_stride_page", "kv_stride_tok", "kpe_stride_page", "kpe_stride_tok")
_COPIED = ("kv_desc", "kpe_desc")


def _rejects(template: Template, p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if p.scheduler == "persistent":
        return "the persistent scheduler is asked for"
    if (reason := _refuses(template, p, target, config)) is not None:
        return reason
    if config["pdl"] and not target.has("pdl"):
        return f"{target.name} has no programmatic dependent launch"
    if config["combine_h"] not in _HEADS or config["combine_d"] not in _COLUMNS:
        return f"combine_h {config['combine_h']}, combine_d {config['combine_d']}: one of {_HEADS}, one of {_COLUMNS}"
    if config.int("combine_h") * config.int("combine_d") > _COMBINED:
        return f"{config['combine_h']} heads × {config['combine_d']} columns: a program of the combine has {_COMBINED}"
    if config["combine_ahead"] not in _AHEAD:
        return f"combine_ahead {config['combine_ahead']}: one of {', '.join(map(str, _AHEAD))}"
    if slots(p, target, config) * splitk._row_blocks(p, config) >= 2**31:
        return "batch × rows × splits exceeds the largest grid (2^31); pass a smaller num_kv_splits"
    if config.get("walk"):
        if config["together"] or config["block_n"] != BOX:
            return f"walk: for tiles of {BOX} tokens, whose pieces are not put together"
        if walks(p, config) and LONG + p.batch // splitk._wave(p, target, config) + 4 > LISTED:
            return f"walk: a program may have more than {LISTED} pieces of so many sequences"
    return None


def _refuses(template: Template, p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why the template's kernel cannot serve the problem, whoever cuts the sequences, or None."""
    if not render.has(target.isa, template.file):
        return f"there is no template {template.file} for {target.name}"
    if p.scaled:
        return "a cache with scales is multiplied group by group; this kernel multiplies tiles as they were copied"
    if p.q_dtype != p.kv_dtype or p.q_dtype not in ("bf16", "fp16"):
        return "q and the cache must both be bf16, or both fp16"
    if p.kv_lora_rank > 512 or p.kv_lora_rank % 8 or p.rope_dim > BOX or p.rope_dim % 8:
        return f"kv_lora_rank {p.kv_lora_rank}, rope_dim {p.rope_dim}: multiples of 8 up to 512 and 64 are served"
    if p.misaligned:
        return f"{', '.join(p.misaligned)}: the base or a stride is no multiple of 16 bytes"
    if (reason := template.blocks(p, config)) is not None:
        return reason
    if config["block_n"] != BOX and gathers(p, config):
        return f"page size {p.page_size}: tiles of {config['block_n']} tokens are not gathered"
    if (size := template.layout(p, target, config)["ARENA"] + WORD) > target.smem_bytes:
        return f"{size} bytes of shared memory, {target.name} has {target.smem_bytes}"
    if p.out_dtype == "fp16" and (p.kv_dtype != "fp16" or p.kv_scale):
        return "a piece's result may exceed fp16 where the whole does not, and partials have the result's type"
    return None


def _default(template: Template, p: DecodeProblem, target: Target) -> Config:
    """A sound config from shapes alone; pieces and combine as decode_splitk_gluon has them.

    `walk` where lengths may be uneven and a sequence has not many programs: on an H200 1 to 2.5 % slower where they are
    even, up to 30 % faster where not.
    """
    heads, columns, ahead = _combine_default(p, target)
    like = {name: value for name, value in gluon.default(p, target).items() if name != "combine_s"}
    like |= {"block_m": template.block(p, target), "combine_h": heads, "combine_d": columns, "combine_ahead": ahead}
    if template is WIDE:
        like |= {"walk": False, "multicast": _long(p)}
    if template is MIXED:
        like |= {"short": 2048, "short_m": 16, "middle": 8192 if p.rows > NARROW_ROWS else 0}
    config = Config.of(template.name, **like, policy="evict_first", together=template is not MIXED)
    config = config.replace(num_kv_splits=splitk._default_splits(p, target, config))
    if template is MIXED and p.rows > NARROW_ROWS and min(short_splits(p, config).values()) < 1:
        return config.replace(short_m=NARROW_ROWS, middle=0)
    if template is WIDE and p.batch > _FEW and config["num_kv_splits"] != _CLUSTER:
        walking = config.replace(walk=True, together=False)
        if walks(p, walking) and _rejects(template, p, target, walking) is None:
            return walking
    return config


def _long(p: DecodeProblem) -> bool:
    """Where `multicast` is 1 to 9 % faster on an H200 (128 heads: 64 and 128 sequences of 4096 tokens, 16 to 128 of
    16384 and 65536); with fewer tokens it makes no difference, or costs 1 or 2 %."""
    return most_tokens(p) > 1 << 17


def _like(config: Config) -> Config:
    """The config of decode_splitk_triton that cuts sequences and combines partials in the same way."""
    own = ("policy", "together", "walk", "multicast", "short", "short_m", "middle", "combine_ahead")
    items = {name: value for name, value in config.items() if name not in own}
    return gluon._like(Config.of(gluon.NAME, **items, combine_s=8))


def _constants(template: Template, p: DecodeProblem, target: Target, config: Config) -> dict[str, Scalar]:
    own: dict[str, Scalar] = {"WALK": walks(p, config)} if "walk" in config else {}
    own |= {} if "short" in config else {"SPLITS": _CLUSTER if _together(p, config) else 0}
    if _asks(p, config):  # with a word more, behind all else
        arena = template.layout(p, target, config)["ARENA"]
        own |= {"ASKS": arena, "ARENA": arena + WORD}
    else:
        own |= {"ASKS": 0}
    return _shared_constants(template, p, target, config) | own | {
        "BATCH_POW2": _lanes(p), "PDL": bool(config["pdl"]),
    }  # fmt: skip


def _lanes(p: DecodeProblem) -> int:
    """Lanes that hold the batch's lengths; 0 where all sequences are cut alike."""
    return splitk._batch_pow2(p) if splitk._balances(p) else 0


def _shared_constants(template: Template, p: DecodeProblem, target: Target, config: Config) -> dict[str, Scalar]:
    """Those of every kernel of stage 1."""
    layout = template.layout(p, target, config)
    shares: dict[str, Scalar] = {"MULTICAST": _shares_tiles(p, config)} if "multicast" in config else {}
    return shares | {k: json.dumps(v) if isinstance(v, list) else v for k, v in layout.items()} | {
        "G": p.gqa_ratio, "NUM_KV_HEADS": p.num_kv_heads, "MULTI": p.q_len > 1, "C": p.kv_lora_rank, "R": p.rope_dim,
        "PAGE": p.page_size, "ROW_BLOCKS": 1 if p.rows <= config.int("block_m") else 0,
        "LAZY": bool(config["lazy"]), "POLICY": config.text("policy"),
        "TOKENS": config.int("block_n"), "COPIED": copied_tokens(p, config), "GATHER": gathers(p, config),
        "CAUSAL": p.causal and p.q_len > 1, "CAP": p.soft_cap, "CP": p.context_parallel, "HAS_LENS": p.has_lens,
        "DTYPE": _PTX[p.q_dtype], "OUT": _PTX[p.out_dtype], "DEBUG": settings.current().bounded_waits,
    }  # fmt: skip


def _arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    """[(parameter, signature entry, launch argument)] of the kernel: those of decode_splitk that it reads."""
    found = _read(p, config, splitk._stage1(p, target, _like(config))[1]) + _short_arguments(p, config)
    return found + (splitk._scalars(("table_width",)) if _asks(p, config) else [])


def _short_arguments(p: DecodeProblem, config: Config) -> list[tuple[str, str, Arg]]:
    return splitk._scalars(tuple(short_splits(p, config))) if "short" in config else []


def _read(p: DecodeProblem, config: Config, arguments: list[tuple[str, str, Arg]]) -> list[tuple[str, str, Arg]]:
    """Those of a Triton kernel's arguments that a template reads, with the boxes that it copies."""
    unread = set(_COPIED if gathers(p, config) else _GATHERED)
    unread |= {"q_pe_ptr", "q_pe_stride_t", "q_pe_stride_h"} if p.rope_dim == 0 else set()
    unread |= {"kpe_ptr", "kpe_stride_page", "kpe_stride_tok"} if p.rope_dim == 0 else set()
    unread |= {"kv_stride_head", "kpe_stride_head"} if p.num_kv_heads == 1 else set()
    unread |= {"kpe_stride_head"} if p.rope_dim == 0 else set()
    unread |= {"table_stride"} if p.paging == "csr" else set()
    unread |= {"cp_rank", "cp_world"} if not p.context_parallel else set()
    unread |= {"logit_cap"} if not p.soft_cap else set()
    unread |= {"lse_stride_t", "lse_stride_h", "lse_mul"} if not p.lse else set()
    found = []
    for name, kind, arg in arguments:
        if arg.kind == "tma":
            box = (copied_tokens(p, config), BOX)
            kind, arg = f"tma<{p.kv_dtype}[{box[0]},{box[1]}]>", dataclasses.replace(arg, block=box)
        if name not in unread:
            found.append((name, kind, arg))
    return found


def _sources(template: Template, p: DecodeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The kernel, and combine.ptx where a sequence may be cut and its pieces may not be put together."""
    constants, arguments = _constants(template, p, target, config), _arguments(p, target, config)
    stage1 = _source(target, template.name, template.file, constants, arguments, ("wgmma",))
    if _always_together(p, config) or not splitk._splits(p, config):
        return (stage1,)
    return (stage1, _combine(p, target, config))


def _combine(p: DecodeProblem, target: Target, config: Config) -> Source:
    """The second kernel: combine.ptx, which sums partials of the result's type."""
    heads, columns = _combine_tile(p, config)
    groups, lanes = _COMBINED // columns, _lanes(p)
    constants: dict[str, Scalar] = {
        "H": p.num_heads, "C": p.kv_lora_rank, "HEADS": heads, "COLUMNS": columns, "OUT": _PTX[p.out_dtype],
        "ARENA": max(groups * columns * 4, 4096) + 8 * groups + 4 * lanes, "MULTI": p.q_len > 1, "PAGE": p.page_size,
        "BATCH_POW2": lanes, "TOKENS": config.int("block_n"), "CP": p.context_parallel,
        "HAS_LENS": p.has_lens, "PDL": bool(config["pdl"]), "WALK": walks(p, config),
        "SHORT": json.dumps([tokens for tokens, _ in classes(config)] if "short" in config else []),
        "AT_ONCE": _ahead(p, config) * 2 // DTYPES[p.out_dtype].bytes, "PER_SM": _AHEAD[_ahead(p, config)],
    }  # fmt: skip
    return _source(target, "decode_combine_asm", _COMBINE, constants, _combine_arguments(p, target, config))


def _source(
    target: Target, name: str, file: str, constants: dict[str, Scalar], arguments: list[tuple[str, str, Arg]],
    require: tuple[str, ...] = (),
) -> Source:  # fmt: skip
    """A kernel of a template; its header says how many registers and threads it may have, and what stack if it walks
    and gathers."""
    head = render.header(target.isa, file)
    stack = head.registers.get("stack", 0) if constants.get("GATHER") and constants.get("WALK", True) else 0
    return Source(
        name=name,
        toolchain="ptx",
        toolchain_version=ptx.version(),
        isa=target.isa,
        content=render.closure(target.isa, file),
        constants=tuple(sorted(constants.items())),
        signature=tuple((parameter, kind) for parameter, kind, _ in arguments),
        locator=f"{target.isa}/{file}",
        limits=Limits(
            smem_bytes=target.smem_bytes,
            registers=head.registers["start"],
            threads=head.threads,
            require=require,
            spill_bytes=stack,
        ),
    )


def _combine_tile(p: DecodeProblem, config: Config) -> tuple[int, int]:
    """(heads, columns) of a program of the combine; where the order of the sum must not depend on the batch, fixed."""
    heads, columns = (1, 512) if p.batch_invariant else (config.int("combine_h"), config.int("combine_d"))
    return heads, min(columns, max(64, splitk._pow2(p.kv_lora_rank, 64)))


def _ahead(p: DecodeProblem, config: Config) -> int:
    return min(_AHEAD) if p.batch_invariant else config.int("combine_ahead")


def _combine_default(p: DecodeProblem, target: Target) -> tuple[int, int, int]:
    """(heads, columns, combine_ahead): about a program an SM.

    On an H200 one more costs 5.5 ns, a further round over pieces 0.8 us; 16 pieces on their way are up to 0.6 us faster
    than 8 while all programs find room, however few pieces there are, but with 128 columns up to 0.1 slower.
    """
    rows = p.batch * p.q_len * p.num_heads
    columns = 128 if rows <= 32 else 256 if rows <= 64 else 512
    heads = 4 if rows > 256 else 1
    programs = -(-rows // heads) * -(-p.kv_lora_rank // columns)
    return heads, columns, 16 if columns > 128 and programs <= 2 * target.sms else 8


def _combine_arguments(p: DecodeProblem, target: Target, config: Config) -> list[tuple[str, str, Arg]]:
    unread = {"cp_rank", "cp_world"} if not p.context_parallel else set()
    unread |= {"lse_stride_t", "lse_stride_h", "lse_mul"} if not p.lse else set()
    found = [entry for entry in splitk._combine(p, target, _like(config))[1] if entry[0] not in unread]
    return found + _short_arguments(p, config)


def _asks(p: DecodeProblem, config: Config) -> bool:
    """Whether the first tiles are asked for in the L2 before the grid before has ended (ahead.ptx)."""
    known = p.has_lens and p.paging == "table"
    return bool(config["pdl"]) and known and not gathers(p, config) and not walks(p, config)


def _together(p: DecodeProblem, config: Config) -> bool:
    """Whether the tunable `together` has an effect: two pieces, which a cluster of two programs can put together."""
    return bool(config["together"]) and not p.batch_invariant and splitk.num_splits(p, config) == _CLUSTER


def _shares_tiles(p: DecodeProblem, config: Config) -> bool:
    """Whether the tunable `multicast` has an effect: programs of two blocks of rows are a cluster, and each copies half
    of each tile to both. In each sequence both have rows, or neither.

    Nor in parts of so few boxes that a lane has none after it has waited for the second half of a buffer: nothing would
    keep that from being filled and freed again meanwhile, with the parity that the lane waits to see the end of."""
    pairs = -(-max(p.rows, 1) // BOX) % 2 == 0 and (not p.ragged or p.gqa_ratio % (2 * BOX) == 0)
    pairs &= copied_tokens(p, config) == config.int("block_n") or boxes_of(p) > 2 or p.rope_dim > 0
    free = not gathers(p, config) and not ("together" in config and _together(p, config))
    return bool(config.get("multicast")) and pairs and free


def _always_together(p: DecodeProblem, config: Config) -> bool:
    """Whether all pieces are put together by clusters: where lengths may be uneven, the kernel decides (pieces.ptx)."""
    return _together(p, config) and not splitk._balances(p)


def _launches(template: Template, p: DecodeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """One program a (row block, KV head, piece); then the combine.

    With `together` the pieces of a sequence are a cluster, if all sequences are cut alike; the combine, for which they
    are not cut then, has something to do only if not.
    """
    args = tuple(arg for *_, arg in _arguments(p, target, config))
    count = slots(p, target, config)
    if walks(p, config):  # as many as the device holds have the work, those of a lower place if lengths are even
        count = max(p.batch * splitk.num_splits(p, config), splitk._wave(p, target, config))
    grid = (max(1, count * splitk._row_blocks(p, config)), 1, 1)
    together = _together(p, config)
    cluster = _CLUSTER if together or _shares_tiles(p, config) else 1
    stage1 = Launch(0, grid, args, pdl=bool(config["pdl"]), cluster=cluster)
    if _always_together(p, config) or not splitk._splits(p, config):
        return (stage1,)
    heads, columns = _combine_tile(p, config)
    parts = -(-p.kv_lora_rank // columns) * -(-p.num_heads // heads) * p.q_len * p.batch
    grid = (min(parts, target.sms * (_AHEAD[_ahead(p, config)] + 1)), 1, 1)  # 5.5 ns each; the next call is after all
    combine = tuple(arg for *_, arg in _combine_arguments(p, target, config))
    if together:
        combine = tuple(Arg("i32", "uncut") if arg.name == "num_splits" else arg for arg in combine)
    return stage1, Launch(1, grid, combine, pdl=bool(config["pdl"]))


def slots(p: DecodeProblem, target: Target, config: Config) -> int:
    """Pieces that the grid and the workspace hold: whole clusters.

    For uneven lengths as in splitk.py, but for few sequences no more than the device works on at once beside one for
    each: a program here fills an SM, so one that has nothing to do waits until another ends, and the combine for it.
    """
    if walks(p, config):
        return p.batch * splitk.num_splits(p, config) + splitk._wave(p, target, config)
    found = splitk.slots(p, target, config)
    if splitk._balances(p) and p.batch <= _FEW:
        found = max(p.batch * splitk.num_splits(p, config), p.batch + splitk._wave(p, target, config))
    each = _CLUSTER if _together(p, config) else 1
    return -(-found // each) * each


def _numbers(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    short = short_splits(p, config) if "short" in config else {}
    return splitk.numbers(p, target, config) | {"slots": slots(p, target, config), "uncut": 1} | short


def _workspace_bytes(p: DecodeProblem, target: Target, config: Config) -> int:
    """As splitk.workspace_bytes, for as many pieces as the grid has; 0 where no partial is ever written."""
    if _always_together(p, config) or not splitk._splits(p, config):
        return 0
    return splitk.partials(p, slots(p, target, config), p.out_dtype)[1]


def _offsets(p: DecodeProblem, target: Target, config: Config) -> dict[str, int]:
    return {"part": 0, "part_lse": splitk.partials(p, slots(p, target, config), p.out_dtype)[0]}


def _cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """decode_splitk_triton's for blocks of so many rows, times how much faster these are (fitted to one H200).

    The bytes of partials and the second launch are in it, `together` or not.
    """
    if "short" in config:
        for (tokens, rows), pieces in zip(classes(config), short_splits(p, config).values(), strict=True):
            if p.max_kv_len <= tokens:
                config = config.replace(block_m=rows, num_kv_splits=max(1, pieces))
                break
    found = splitk.cost(p, target, _like(config))
    wide = gluon._beside_triton(p)
    if config["block_m"] == BOX:
        return dataclasses.replace(found, time_us=0.95 * wide * found.time_us)
    if p.rows <= NARROW_ROWS:  # never slower than Triton's own
        plain = splitk.cost(p, target, splitk.default(p, target)).time_us
        return dataclasses.replace(found, time_us=(0.9 if p.rows <= 16 else 0.7) * min(found.time_us, plain))
    little = most_tokens(p) * -(-p.rows // BOX) * p.num_kv_heads <= _LITTLE
    return dataclasses.replace(found, time_us=(0.85 * min(1.0, wide) if little else 2.0) * found.time_us)


def _variant(template: Template, revision: int, measured_only: bool = False) -> Variant:
    space: dict[str, tuple[int | str | bool, ...]] = {
        "block_m": template.space, "block_n": template.tiles, "num_warps": (8,), "lazy": (False, True),
        "min_tiles": (1, 2, 4), "pdl": (False, True), "policy": ("evict_first", "evict_normal"),
        "together": (False, True), "combine_h": _HEADS, "combine_d": _COLUMNS, "combine_ahead": tuple(_AHEAD),
    }  # fmt: skip
    if template is WIDE:
        space |= {"walk": (False, True), "multicast": (False, True)}
    if template is MIXED:
        space |= {"short": (512, 1024, 2048, 4096, 8192, 16384), "short_m": (16, 24, 32), "together": (False,)}
        space |= {"middle": (0, 1024, 4096, 8192, 16384, 32768)}
    return Variant(
        name=template.name, op="decode", backend="asm", revision=revision,
        rejects=lambda p, target, config: _rejects(template, p, target, config),
        default=lambda p, target: _default(template, p, target),
        sources=lambda p, target, config: _sources(template, p, target, config),
        launches=lambda p, target, config: _launches(template, p, target, config),
        cost=_cost,
        workspace_bytes=_workspace_bytes, numbers=_numbers, offsets=_offsets,
        resize=splitk.resize, space=space,
        measured_only=measured_only, any_length=template is MIXED,
    )  # fmt: skip


DECODE_SPLITK_ASM = _variant(WIDE, 9)
DECODE_NARROW_ASM = _variant(NARROW, 8)
DECODE_NARROW_PAIR_ASM = _variant(NARROW_PAIR, 7, measured_only=True)
DECODE_MIXED_ASM = _variant(MIXED, 7, measured_only=True)
