"""Persistent prefill in Triton: `schedule` makes a work list, `prefill_persistent` runs it, `combine_pieces` sums.

A unit is a block of BLOCK_M queries of a sequence, for all heads. Sequence b has the units from qo_indptr[b] // BLOCK_M
+ b on: these ranges do not overlap, some units are of nobody, and no prefix sum is needed. An item is a unit's piece of
keys: all of them, or, where units × heads are fewer than programs, `cut` tiles, so that programs share alike.

Items are ordered by their units' tiles, the longest first (in 32 classes), by counting. A program takes the next (item,
head) off the list by a counter until none is left, so who is done early takes more. What it computes does not depend on
who computes it, and pieces are summed in their order: the same inputs give the same bits. All sizes are fixed by the
host's bounds and the counter is zeroed with the list: a graph that was captured serves other lengths.

head [4]: items, tiles a piece, the counter. units [slots, 4]: sequence, block, tiles (-1: of nobody), the first of its
partial blocks. items [slots + programs / heads, 8]: all that who runs one must know, to be read at once: the first
query token and how many of its sequence, the same of keys, the block's first query, the first tile and that after the
last, the partial block that it writes, or -1 for a unit in one piece.
"""

import triton
import triton.language as tl

from mla_jit.ops.decode.triton_pieces import _tokens
from mla_jit.ops.prefill.triton_prefill import _block, _ordered, _visible_tiles


@triton.jit
def _pieces(tiles, cut):
    """Pieces of units of so many tiles: at least one, as outputs are written where there are no keys; of nobody: 0."""
    return tl.where(tiles >= 0, tl.maximum(tl.cdiv(tiles, cut), 1), 0)


@triton.jit
def _classes(tiles, longest, pieces, KEYS: tl.constexpr):
    """[units, KEYS]: the pieces of each unit in the column of its class; the first class has the most tiles."""
    key = KEYS - 1 - tl.minimum(tl.maximum(tiles, 0) * KEYS // (longest + 1), KEYS - 1)
    return tl.where(key[:, None] == tl.arange(0, KEYS)[None, :], pieces[:, None], 0)


@triton.jit
def schedule(
    qo_indptr_ptr, kv_indptr_ptr, head_ptr, units_ptr, items_ptr, batch, slots, programs, min_tiles,
    H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program. 2^STEPS >= batch. SPLITS: whether units × heads may be fewer than programs."""
    KEYS: tl.constexpr = 32
    offs = tl.arange(0, CHUNK)
    total = tl.zeros((), tl.int64)
    longest = tl.zeros((), tl.int32)
    count = tl.zeros((), tl.int32)
    for u0 in tl.range(0, slots, CHUNK, num_stages=1):
        u = u0 + offs
        b = tl.zeros((CHUNK,), tl.int32)
        for k in tl.static_range(STEPS):
            probe = b + (1 << (STEPS - 1 - k))
            at = tl.load(qo_indptr_ptr + probe, mask=probe < batch, other=0).to(tl.int32) // BLOCK_M + probe
            b = tl.where((probe < batch) & (at <= u), probe, b)
        q_first, q_len = _tokens(b, qo_indptr_ptr, 0)
        _kv_first, kv_len = _tokens(b, kv_indptr_ptr, 0)
        block = u - q_first // BLOCK_M - b
        ok = (u < slots) & (block >= 0) & (block * BLOCK_M < q_len)
        tiles = _visible_tiles(block * BLOCK_M, q_len, kv_len, BLOCK_M, BLOCK_N, CAUSAL)
        tl.store(units_ptr + 4 * u, b, mask=u < slots)
        tl.store(units_ptr + 4 * u + 1, block, mask=u < slots)
        tl.store(units_ptr + 4 * u + 2, tl.where(ok, tiles, -1), mask=u < slots)
        tiles = tl.where(ok, tiles, 0)
        total += tl.sum(tiles.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
        count += tl.sum(ok.to(tl.int32), 0)
    cut = tl.maximum(longest, 1)
    if SPLITS:
        share = tl.maximum(tl.cdiv(total * H, programs).to(tl.int32), min_tiles)
        cut = tl.where(count * H < programs, tl.minimum(share, cut), cut)
    tl.debug_barrier()  # the units are read below

    sizes = tl.zeros((KEYS,), tl.int32)
    for u0 in tl.range(0, slots, CHUNK, num_stages=1):
        u = u0 + offs
        tiles = tl.load(units_ptr + 4 * u + 2, mask=u < slots, other=-1)
        sizes += tl.sum(_classes(tiles, longest, _pieces(tiles, cut), KEYS), 0)
    begins = tl.cumsum(sizes, 0) - sizes
    parts = tl.zeros((), tl.int32)
    for u0 in tl.range(0, slots, CHUNK, num_stages=1):
        u = u0 + offs
        tiles = tl.load(units_ptr + 4 * u + 2, mask=u < slots, other=-1)
        pieces = _pieces(tiles, cut)
        mine = _classes(tiles, longest, pieces, KEYS)
        before = tl.cumsum(mine, 0) - mine + begins[None, :]
        place = tl.sum(tl.where(mine > 0, before, 0), 1)
        begins += tl.sum(mine, 0)
        split = tl.where(pieces > 1, pieces, 0)
        part = parts + tl.cumsum(split, 0) - split
        parts += tl.sum(split, 0)
        tl.store(units_ptr + 4 * u + 3, part, mask=u < slots)
        b = tl.load(units_ptr + 4 * u, mask=u < slots, other=0)
        block = tl.load(units_ptr + 4 * u + 1, mask=u < slots, other=0)
        q_first, q_len = _tokens(b, qo_indptr_ptr, 0)
        kv_first, kv_len = _tokens(b, kv_indptr_ptr, 0)
        for k in tl.range(0, tl.max(pieces, 0), num_stages=1):
            item = items_ptr + 8 * (place + k)
            tl.store(item, q_first, mask=k < pieces)
            tl.store(item + 1, q_len, mask=k < pieces)
            tl.store(item + 2, kv_first, mask=k < pieces)
            tl.store(item + 3, kv_len, mask=k < pieces)
            tl.store(item + 4, block * BLOCK_M, mask=k < pieces)
            tl.store(item + 5, k * cut, mask=k < pieces)
            tl.store(item + 6, tl.minimum((k + 1) * cut, tiles), mask=k < pieces)
            tl.store(item + 7, tl.where(pieces > 1, part + k, -1), mask=k < pieces)
    tl.store(head_ptr, tl.sum(sizes, 0))
    tl.store(head_ptr + 1, cut)
    tl.store(head_ptr + 2, 0)


@triton.jit
def prefill_persistent(
    q_ptr, k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, head_ptr, items_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t, out_stride_h,
    lse_stride_t, lse_stride_h, heads_together, qk_scale, v_scale, logit_cap, lse_mul,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    HAS_LSE: tl.constexpr, COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr,
    QK_NATIVE: tl.constexpr,
):  # fmt: skip
    """A resident program: takes (item, head) after (item, head) off the list."""
    items = tl.load(head_ptr)
    i = tl.atomic_add(head_ptr + 2, 1, sem="relaxed")
    while i < items * H:
        place, head = _ordered(i, items, heads_together, H)
        item = items_ptr + 8 * place
        q_first = tl.load(item)
        q_len = tl.load(item + 1)
        kv_first = tl.load(item + 2)
        kv_len = tl.load(item + 3)
        q0 = tl.load(item + 4)
        first_tile = tl.load(item + 5)
        last_tile = tl.load(item + 6)
        part = tl.load(item + 7)
        _block(q0, head, q_first, q_len, kv_first, kv_len, first_tile, last_tile, part < 0, part,
               q_ptr, k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr,
               lse_ptr, part_ptr, part_lse_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
               out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, qk_scale, v_scale, logit_cap, lse_mul, H, G, D,
               DV, MAIN, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV, STAGES, TMA, CAUSAL, CAP, HAS_LSE, COMPUTE,
               DECODE, Q_DECODE, QK_NATIVE)  # fmt: skip
        i = tl.atomic_add(head_ptr + 2, 1, sem="relaxed")


@triton.jit
def combine_pieces(
    qo_indptr_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, head_ptr, units_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, lse_mul,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums the pieces of BLOCK_R queries of a unit and head in order: O = Σ 2^(lse_i - M)·O_i / Σ 2^(lse_i - M)."""
    RUNS: tl.constexpr = BLOCK_M // BLOCK_R
    pid = tl.program_id(0)
    head = (pid // RUNS) % H
    u = pid // (RUNS * H)
    pieces = _pieces(tl.load(units_ptr + 4 * u + 2), tl.load(head_ptr + 1))
    if pieces > 1:
        b = tl.load(units_ptr + 4 * u)
        rows = (pid % RUNS) * BLOCK_R + tl.arange(0, BLOCK_R)
        part = tl.load(units_ptr + 4 * u + 3).to(tl.int64)
        q_first, q_len = _tokens(b, qo_indptr_ptr, 0)
        offs_m = tl.load(units_ptr + 4 * u + 1) * BLOCK_M + rows
        row_ok = offs_m < q_len
        cols = tl.arange(0, BLOCK_DV)
        ok = row_ok[:, None] & (cols < DV)[None, :]
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_DV), tl.float32)
        for k in tl.range(0, pieces, num_stages=2):
            row = ((part + k) * H + head) * BLOCK_M + rows
            lse = tl.load(part_lse_ptr + row, mask=row_ok, other=float("-inf"))
            o = tl.load(part_ptr + row[:, None] * DV + cols[None, :], mask=ok, other=0.0)
            higher = tl.maximum(top, lse)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(lse - shift)
            alpha = tl.exp2(top - shift)
            acc = acc * alpha[:, None] + o * weight[:, None]
            total = total * alpha + weight
            top = higher
        o = tl.where((total > 0)[:, None], acc / total[:, None], 0.0)
        q_tok = (q_first + offs_m).to(tl.int64)
        p_out = out_ptr + q_tok * out_stride_t + head * out_stride_h
        tl.store(p_out[:, None] + cols[None, :], o.to(out_ptr.dtype.element_ty), mask=ok)
        if HAS_LSE:
            lse = tl.where(top == float("-inf"), top, top + tl.log2(total))
            tl.store(lse_ptr + q_tok * lse_stride_t + head * lse_stride_h, lse * lse_mul, mask=row_ok)
