"""The PTX templates by their blocks of rows: where things lie in shared memory, how tiles are copied, which sequences
`decode_mixed_asm` takes for short. The rows of the variants that fill them in: asm_splitk.py, asm_persistent.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mla_jit.config import Config
from mla_jit.ops.decode import splitk
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target

BOX = 64  # tokens and columns of a copy: 128 bytes a row, the widest swizzle
BOX_BYTES = BOX * BOX * 2
_LEAST_COPIED = 8  # tokens of a copy, the rows over which a swizzle repeats; copies of four are slower than gathering
NARROW_ROWS = 32  # rows for which Oᵀ stays in registers
_TILES = 5  # that the ring holds at most; of copied ones, with one consumer, _COPIED_TILES
_COPIED_TILES = 2
WORD = 16  # bytes of shared memory for one that ahead.ptx has
LISTED, LONG = 512, 128  # pieces of a program that walks, at most; of a part's length, what a piece adds (line.ptx)


@dataclass(frozen=True)
class Template:
    """What tells one template's row from another's.

    blocks: why it has no block of rows for this problem and config, or None. block: the default's. layout: where things
    lie in shared memory, in bytes, by the names of constants; ARENA is the size of all.
    """

    name: str
    file: str
    blocks: Callable[[DecodeProblem, Config], str | None]
    block: Callable[[DecodeProblem, Target], int]
    layout: Callable[[DecodeProblem, Target, Config], dict[str, Any]]
    space: tuple[int, ...]  # of block_m
    tiles: tuple[int, ...]  # of block_n


def copied_tokens(p: DecodeProblem, config: Config) -> int:
    """Tokens of a bulk copy: as many as lie in one page wherever a tile begins."""
    return math.gcd(p.page_size, config.int("block_n"))


def gathers(p: DecodeProblem, config: Config) -> bool:
    """Whether tiles are gathered token by token: pages hold few of a tile's together, or do not lie in a row."""
    return copied_tokens(p, config) < _LEAST_COPIED or not p.flat_pages


def boxes_of(p: DecodeProblem) -> int:
    return -(-p.kv_lora_rank // BOX)


def _wide_layout(p: DecodeProblem, target: Target, config: Config) -> dict[str, Any]:
    """q, buffers for 128 tokens, maxima and sums of rows, barriers. A tile: an even number of boxes, and the rope's."""
    boxes = -(-boxes_of(p) // 2) * 2 + 1
    tokens = config.int("block_n")
    buffers = 128 // tokens
    q, tile = boxes * BOX_BYTES, boxes * tokens * 128
    rows = q + buffers * tile
    barriers = rows + 4 * 64 * 4
    arena = barriers + buffers * 8 * (boxes + 2)
    return {
        "Q": 0, "K": [q + i * tile for i in range(buffers)], "ROWS": rows, "BARRIERS": barriers,
        "ARENA": -(-arena // 16) * 16 + 16 * LISTED if walks(p, config) else arena,
    }  # fmt: skip


def _narrow_layout(p: DecodeProblem, target: Target, config: Config, consumers: int = 1) -> dict[str, Any]:
    """The ring, q; of each consumer P, and maxima of its four warps; barriers.

    Two tiles in the ring; as many boxes as there is room for where tiles are gathered, or two consumers have one each.
    At the end two consumers have their sums and maxima where maxima were, and what they exchange of O in the ring.
    Of whole tiles narrow.ptx knows where each box is without counting (WHOLE there).

    On an H200 exactly two tiles are as fast as 25 boxes (2.8 tiles) or up to 5 % faster, 22 boxes and 14 are not; and
    the second kernel's programs find room beside these (1024 tokens, 128 heads: 7.65 us, then 7.16).
    """
    n, boxes = config.int("block_m"), boxes_of(p)
    copied = boxes + (1 if p.rope_dim else 0)
    q, weights, maxima = (boxes + 1) * n * 128, consumers * n * 128, (16 if consumers == 1 else 40) * n
    slots = (target.smem_bytes - q - weights - maxima - WORD) // (BOX_BYTES + 16)
    exchanged = boxes * (1 + boxes % 2) * n * 256 if consumers == 2 else 0
    ends = n * (4 * p.kv_lora_rank + 16) + 1024 + exchanged  # and a piece's rows, to be put together
    # with fewer than two tiles the gatherer would wait for itself
    tiles = _COPIED_TILES if consumers == 1 and not gathers(p, config) else _TILES
    slots = max(2 * copied, -(-ends // BOX_BYTES), min(slots, tiles * copied))
    ring = slots * BOX_BYTES
    at = {"RING": 0, "Q": ring, "P": ring + q, "MAXIMA": ring + q + weights, "BARRIERS": ring + q + weights + maxima}
    return {**at, "SLOTS": slots, "BLOCK_M": n, "ARENA": at["BARRIERS"] + 16 * slots}


def classes(config: Config) -> list[tuple[int, int]]:
    """(tokens at most, rows of a block) of sequences that decode_mixed_asm takes for short, the shorter ones first."""
    short, rows, middle = config.int("short"), config.int("short_m"), config.int("middle")
    return [(short, rows)] + ([(middle, 2 * rows)] if middle else [])


def _mixed_layout(p: DecodeProblem, target: Target, config: Config) -> dict[str, Any]:
    """Wide's; for short sequences narrow's in the same place, but for its barriers, which lie behind."""
    wide = _wide_layout(p, target, config)
    room = dataclasses.replace(target, smem_bytes=wide["BARRIERS"])
    found = [(tokens, rows, _narrow_layout(p, room, config.replace(block_m=rows))) for tokens, rows in classes(config)]
    slots = min(layout["SLOTS"] for *_, layout in found)
    barriers = max(wide["ARENA"], *(layout["BARRIERS"] for *_, layout in found))
    return wide | {
        "SHORT": [
            [tokens, rows, slots, [layout[name] for name in ("RING", "Q", "P", "MAXIMA")]]
            for tokens, rows, layout in found
        ],
        "SHORT_BARRIERS": barriers, "ARENA": barriers + 16 * slots,
    }  # fmt: skip


def _mixed_blocks(p: DecodeProblem, config: Config) -> str | None:
    if config["together"] or (config["block_m"], config["block_n"]) != (BOX, BOX):
        return (
            "long sequences are served in blocks of 64 rows and tiles of 64 tokens, whose pieces are not put together"
        )
    most = max(rows for _, rows in classes(config))
    if config["middle"] and (config.int("middle") <= config.int("short") or most > NARROW_ROWS):
        return f"middle {config['middle']}: more than short, with blocks of at most {NARROW_ROWS} rows, twice short_m's"
    if p.rows <= most:
        return f"{p.rows} rows are one block of {most} for longer sequences too: decode_narrow_asm"
    if p.batch_invariant:
        return "batch_invariant: pieces have a fixed length"
    if min(short_splits(p, config).values()) < 1:
        return f"{splitk.num_splits(p, config)} pieces are too few programs for blocks of {config['short_m']} rows"
    return None


def short_splits(p: DecodeProblem, config: Config) -> dict[str, int]:
    """By argument, pieces of a short sequence of each class, for as many programs as a long one has."""
    programs = splitk.num_splits(p, config) * -(-p.rows // BOX)
    rows_of = dict(zip(("short_splits", "middle_splits"), (rows for _, rows in classes(config)), strict=False))
    return {name: programs // max(1, -(-p.rows // rows)) for name, rows in rows_of.items()}


WIDE = Template(
    name="decode_splitk_asm", file="decode_splitk.ptx", blocks=lambda p, config: None, block=lambda p, target: 64,
    layout=_wide_layout, space=(64,), tiles=(32, 64),
)  # fmt: skip
NARROW = Template(
    name="decode_narrow_asm", file="decode_narrow.ptx",
    blocks=lambda p, config: (
        f"{p.rows} rows fit a block of fewer than {config['block_m']}"
        if config.int("block_m") >= max(p.rows, 1) + 8 else None
    ),
    block=lambda p, target: (
        max(8, -(-p.rows // 8) * 8) if p.rows <= NARROW_ROWS
        else 16 if -(-p.rows // 16) * p.num_kv_heads * most_tokens(p) <= target.sms * BOX else NARROW_ROWS
    ),
    layout=_narrow_layout, space=(8, 16, 24, 32), tiles=(64,),
)  # fmt: skip
MIXED = dataclasses.replace(
    WIDE, name="decode_mixed_asm", file="decode_mixed.ptx", blocks=_mixed_blocks, layout=_mixed_layout, tiles=(64,),
)  # fmt: skip
NARROW_PAIR = dataclasses.replace(
    NARROW, name="decode_narrow_pair_asm", file="decode_narrow_pair.ptx",
    layout=lambda p, target, config: _narrow_layout(p, target, config, consumers=2),
)  # fmt: skip


def walks(p: DecodeProblem, config: Config) -> bool:
    """Whether the tunable `walk` has an effect: lengths may be uneven."""
    return bool(config.get("walk")) and splitk._balances(p)


def most_tokens(p: DecodeProblem) -> int:
    """At most so many: what is compiled ahead is looked for by bounds (ahead.py)."""
    return p.batch * p.max_kv_len
