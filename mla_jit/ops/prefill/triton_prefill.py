"""Prefill in Triton, FlashAttention-2's way: a program owns BLOCK_M query tokens of one head. Imports triton only.

With q [BLOCK_M, D] kept, it walks the keys in tiles of BLOCK_N with an online softmax in base 2:

    S = q·Kᵀ     P = exp2(S·scale - m)     O = O·alpha + P·V

D is multiplied as MAIN + REST columns, each a power of two (192 = 128 + 64): 256 would be a fourth of padding. FLOPs of
a tile: 2·BLOCK_M·BLOCK_N·(D + DV); bytes from L2: BLOCK_N·(D + DV)·sizeof, so BLOCK_M FLOPs a byte in 16 bits.
Registers: O and S, BLOCK_M·(DV + BLOCK_N) fp32; shared memory: q, and num_stages tiles of K and V.

Query i of a sequence with q_len queries and kv_len keys sees keys j <= kv_len - q_len + i. Tiles are of three kinds,
and only the first, the main loop, is long: those that all rows see whole; those that the causal diagonal crosses, of
which scores are masked; and the partly filled last one, of which also what is loaded is masked, as the memory behind a
sequence is another's, or NaN. The masked ones come last: an O that reaches a loop of wgmmas through moves makes ptxas
serialise them.

Order: the longest blocks of a group of heads first, for all heads of the group, then the next group. A group is as many
heads as have their K and V in the L2 together, so that these are read from memory once.
"""

import triton
import triton.language as tl

from mla_jit.ops.decode.triton_pieces import _tokens
from mla_jit.ops.decode.triton_splitk import _convert


@triton.jit
def _rows(ptr, offs, stride_t, MAIN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ok, MASK: tl.constexpr):
    """[rows, BLOCK]: columns MAIN … MAIN + WIDTH of a tensor's rows; with MASK, rows not ok are 0 and not read."""
    cols = tl.arange(0, BLOCK)
    p_x = ptr + (offs.to(tl.int64) * stride_t)[:, None] + (MAIN + cols)[None, :]
    if MASK and BLOCK != WIDTH:
        x = tl.load(p_x, mask=ok[:, None] & (cols < WIDTH)[None, :], other=0.0)
    elif MASK:
        x = tl.load(p_x, mask=ok[:, None], other=0.0)
    elif BLOCK != WIDTH:
        x = tl.load(p_x, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(p_x)
    return x


@triton.jit
def _keys(k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, row, k_col, v_col, offs, kv_end, k_stride_t, v_stride_t,
          D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
          BLOCK_DV: tl.constexpr, TMA: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """(K, the rest of K's columns, V) of the tile at `row`; with MASK, rows from kv_end on are zero and not read."""
    if TMA and not MASK:
        k = k_desc.load([row, k_col])
        k_rest = k
        if D > MAIN:
            k_rest = k_rest_desc.load([row, k_col + MAIN])
        v = v_desc.load([row, v_col])
    else:
        ok = offs < kv_end
        k = _rows(k_ptr, offs, k_stride_t, 0, MAIN, BLOCK_D, ok, MASK)
        k_rest = k
        if D > MAIN:
            k_rest = _rows(k_ptr, offs, k_stride_t, MAIN, D - MAIN, BLOCK_REST, ok, MASK)
        v = _rows(v_ptr, offs, v_stride_t, 0, DV, BLOCK_DV, ok, MASK)
    return k, k_rest, v


@triton.jit
def _attend(q, q_rest, k, k_rest, v, acc, m, l, row_end, offs_n, qk_scale, logit_cap,
            REST: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, COMPUTE: tl.constexpr, DECODE: tl.constexpr,
            QK_NATIVE: tl.constexpr):  # fmt: skip
    """One tile of the online softmax. row_end: the first key that each row may not see. Scores are in base 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if not QK_NATIVE:
        k = _convert(k, DECODE, COMPUTE)
    s = tl.dot(q, tl.trans(k))
    if REST:
        if not QK_NATIVE:
            k_rest = _convert(k_rest, DECODE, COMPUTE)
        s = tl.dot(q_rest, tl.trans(k_rest), s)
    if CAP:
        # cap·tanh(x/cap), as 2·sigmoid(2x) - 1; qk_scale and logit_cap are in natural units here
        s = logit_cap * (2.0 / (1.0 + tl.exp2(s * (-2.0 * LOG2E * qk_scale / logit_cap))) - 1.0) * LOG2E
        scale = 1.0
    else:
        scale = qk_scale * LOG2E
    if MASK:
        s = tl.where(offs_n[None, :] < row_end[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    if MASK:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    else:
        shift = m_new
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s * scale - shift[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(COMPUTE), _convert(v, DECODE, COMPUTE), acc)
    return acc, m_new, l


@triton.jit
def _visible_tiles(q0, q_len, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Tiles of keys that some query of the block at q0 sees."""
    end = kv_len
    if CAUSAL:
        end = tl.minimum(tl.minimum(q0 + BLOCK_M, q_len) + kv_len - q_len, kv_len)
    return tl.cdiv(tl.maximum(end, 0), BLOCK_N)


@triton.jit
def _block(
    q0, head, q_first, q_len, kv_first, kv_len, first_tile, last_tile, whole, part,
    q_ptr, k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t, out_stride_h,
    lse_stride_t, lse_stride_h, qk_scale, v_scale, logit_cap, lse_mul,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    HAS_LSE: tl.constexpr, COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr,
    QK_NATIVE: tl.constexpr,
):  # fmt: skip
    """Queries q0 … q0 + BLOCK_M of one head of a sequence over its tiles of keys [first_tile, last_tile).

    `whole`: these are all its tiles, and the result goes to `out`; else to partial block `part` (of all heads).
    """
    REST: tl.constexpr = D > MAIN
    offs_m = q0 + tl.arange(0, BLOCK_M)
    row_ok = offs_m < q_len
    kv_head = head // G
    q_ptr += q_first.to(tl.int64) * q_stride_t + head * q_stride_h
    q = _rows(q_ptr, offs_m, q_stride_t, 0, MAIN, BLOCK_D, row_ok, True)
    q = _convert(q, Q_DECODE, q.dtype if QK_NATIVE else COMPUTE)
    q_rest = q
    if REST:
        q_rest = _rows(q_ptr, offs_m, q_stride_t, MAIN, D - MAIN, BLOCK_REST, row_ok, True)
        q_rest = _convert(q_rest, Q_DECODE, q_rest.dtype if QK_NATIVE else COMPUTE)
    if q_scale_ptr is not None:
        qk_scale *= tl.load(q_scale_ptr)
    if k_scale_ptr is not None:
        qk_scale *= tl.load(k_scale_ptr)
    if v_scale_ptr is not None:
        v_scale *= tl.load(v_scale_ptr)

    # [first_tile, clear_tile) is seen whole by every row, [clear_tile, full_tile) crosses the causal diagonal, and the
    # tile after full_tile, if any, is partly filled
    full_tile = tl.maximum(tl.minimum(kv_len // BLOCK_N, last_tile), first_tile)
    clear_tile = full_tile
    row_end = tl.full((BLOCK_M,), 0, tl.int32) + kv_len
    if CAUSAL:
        row_end = tl.minimum(offs_m + 1 + kv_len - q_len, kv_len)
        clear = tl.maximum(tl.minimum(q0 + 1 + kv_len - q_len, kv_len), 0)
        clear_tile = tl.maximum(tl.minimum(clear // BLOCK_N, full_tile), first_tile)

    k_ptr += kv_first.to(tl.int64) * k_stride_t + kv_head * k_stride_h
    v_ptr += kv_first.to(tl.int64) * v_stride_t + kv_head * v_stride_h
    k_col = (kv_head * k_stride_h).to(tl.int32)
    v_col = (kv_head * v_stride_h).to(tl.int32)
    offs = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(first_tile, clear_tile, num_stages=STAGES):
        k, k_rest, v = _keys(k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, kv_first + tile * BLOCK_N, k_col, v_col,
                             tile * BLOCK_N + offs, kv_len, k_stride_t, v_stride_t, D, DV, MAIN, BLOCK_D, BLOCK_REST,
                             BLOCK_DV, TMA, False)  # fmt: skip
        acc, m, l = _attend(q, q_rest, k, k_rest, v, acc, m, l, row_end, offs, qk_scale, logit_cap,
                            REST, False, CAP, COMPUTE, DECODE, QK_NATIVE)  # fmt: skip
    if CAUSAL:
        for tile in tl.range(clear_tile, full_tile, num_stages=1):
            k, k_rest, v = _keys(k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, kv_first + tile * BLOCK_N, k_col, v_col,
                                 tile * BLOCK_N + offs, kv_len, k_stride_t, v_stride_t, D, DV, MAIN, BLOCK_D,
                                 BLOCK_REST, BLOCK_DV, TMA, False)  # fmt: skip
            acc, m, l = _attend(q, q_rest, k, k_rest, v, acc, m, l, row_end, tile * BLOCK_N + offs, qk_scale,
                                logit_cap, REST, True, CAP, COMPUTE, DECODE, QK_NATIVE)  # fmt: skip
    if full_tile < last_tile:
        k, k_rest, v = _keys(k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, 0, k_col, v_col, full_tile * BLOCK_N + offs,
                             kv_len, k_stride_t, v_stride_t, D, DV, MAIN, BLOCK_D, BLOCK_REST, BLOCK_DV, TMA,
                             True)  # fmt: skip
        acc, m, l = _attend(q, q_rest, k, k_rest, v, acc, m, l, row_end, full_tile * BLOCK_N + offs, qk_scale,
                            logit_cap, REST, True, CAP, COMPUTE, DECODE, QK_NATIVE)  # fmt: skip

    lse = m + tl.log2(l)  # base 2; -inf for a row that saw nothing
    scale = tl.where(l > 0, v_scale / l, 0.0)
    o = acc * scale[:, None]
    cols = tl.arange(0, BLOCK_DV)
    ok = row_ok[:, None] & (cols < DV)[None, :]
    if whole:
        q_tok = (q_first + offs_m).to(tl.int64)
        p_out = out_ptr + q_tok * out_stride_t + head * out_stride_h
        tl.store(p_out[:, None] + cols[None, :], o.to(out_ptr.dtype.element_ty), mask=ok)
        if HAS_LSE:
            tl.store(lse_ptr + q_tok * lse_stride_t + head * lse_stride_h, lse * lse_mul, mask=row_ok)
    else:
        if part_ptr is not None:
            row = (part.to(tl.int64) * H + head) * BLOCK_M + tl.arange(0, BLOCK_M)
            tl.store(part_ptr + row[:, None] * DV + cols[None, :], o, mask=(cols < DV)[None, :])
            tl.store(part_lse_ptr + row, lse)


@triton.jit
def _ordered(i, units, heads_together, H: tl.constexpr):
    """(unit, head) of place i: all units of a group of heads, one unit's heads side by side; then the next group."""
    group = i // (units * heads_together)
    first = group * heads_together
    size = tl.minimum(heads_together, H - first)
    i -= group * units * heads_together
    return i // size, first + i % size


@triton.jit
def prefill_tiles(
    q_ptr, k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, qo_indptr_ptr, kv_indptr_ptr, q_scale_ptr, k_scale_ptr,
    v_scale_ptr, out_ptr, lse_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t, out_stride_h,
    lse_stride_t, lse_stride_h, max_q_len, heads_together, qk_scale, v_scale, logit_cap, lse_mul,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    HAS_LSE: tl.constexpr, COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr,
    QK_NATIVE: tl.constexpr,
):  # fmt: skip
    """A program a block of queries, head and sequence; those beyond a sequence's own blocks have nothing to do."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(max_q_len, BLOCK_M)
    b = pid // (blocks * H)
    unit, head = _ordered(pid - b * blocks * H, blocks, heads_together, H)
    q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
    kv_first, kv_len = _tokens(b, kv_indptr_ptr, 0)
    block = unit
    if CAUSAL:
        block = tl.cdiv(q_len, BLOCK_M) - 1 - unit
    q0 = block * BLOCK_M
    if (block < 0) or (q0 >= q_len):
        return
    tiles = _visible_tiles(q0, q_len, kv_len, BLOCK_M, BLOCK_N, CAUSAL)
    _block(q0, head, q_first, q_len, kv_first, kv_len, 0, tiles, True, 0,
           q_ptr, k_ptr, v_ptr, k_desc, k_rest_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
           None, None, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, out_stride_t,
           out_stride_h, lse_stride_t, lse_stride_h, qk_scale, v_scale, logit_cap, lse_mul, H, G, D, DV, MAIN, BLOCK_M,
           BLOCK_N, BLOCK_D, BLOCK_REST, BLOCK_DV, STAGES, TMA, CAUSAL, CAP, HAS_LSE, COMPUTE, DECODE, Q_DECODE,
           QK_NATIVE)  # fmt: skip
