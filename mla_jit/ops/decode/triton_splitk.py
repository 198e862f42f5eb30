"""Split-K MLA decode in Triton, stage 1: `decode_splitk`. Imports triton only.

A program of stage 1 owns BLOCK_M packed rows (query token × head) of one sequence and KV head, and one split of its
tokens. With q [BLOCK_M, C + R] kept, it walks the split in tiles of BLOCK_N tokens with an online softmax:

    S = q_nope·Kᵀ + q_pe·K_ropeᵀ     P = exp2(S·scale - m)     O = O·alpha + P·K[:, :C]

A tile is read once from device memory and serves as K and as V. Of a cache with scales it is as many tiles as there are
groups of 128 columns: S = Σ_g (q_g·K_gᵀ)·scale_g, O_g += (P·scale_g)·K_g, so values are multiplied as they are. Bytes a
sequence: kv_len·(C + R)·sizeof for each block of rows; FLOPs: 2·rows·kv_len·(2C + R). Registers: O is BLOCK_M·C fp32;
shared memory: num_stages tiles and q.

The number of programs is fixed by the grid; each derives its piece of a sequence from the lengths on the device, so a
graph captured at capacity serves any length (triton_pieces.py). The main
loop is free of masks. The tiles that need one (those that the causal diagonal crosses, and the partly filled last one)
come before it with MASKED_FIRST, while O is still empty: no spills with mma.sync. With wgmma they come after it, since
an O that reaches the loop through moves makes ptxas serialise every wgmma (C7515: 618 us at 128 heads × 128 × 4096,
497 in the next run without it). A sequence that needs one split is written straight to `out`; the others leave fp32
partials and their base-2 LSE, which `combine` (triton_combine.py) sums in the order of the splits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from mla_jit.ops.decode.triton_pieces import _even_pieces, _lengths, _schedule, _tokens, _visible
from mla_jit.ops.decode.triton_scaled import _load_groups, _store_groups


@triton.jit
def _fp8_to_fp16(x, FNUZ: tl.constexpr):
    """Decodes e4m3 bytes with integer instructions: exponent and mantissa shifted into fp16's place, then rescaled."""
    u = x.to(tl.uint16)
    half = (((u & 0x80) << 8) | ((u & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if FNUZ:
        return tl.where(u == 0x80, float("nan"), half * 128.0)
    return tl.where((u & 0x7F) == 0x7F, float("nan"), half * 256.0)


@triton.jit
def _convert(x, DECODE: tl.constexpr, COMPUTE: tl.constexpr):
    """A loaded tile in the dtype in which it is multiplied. DECODE: "" (native), "e4m3" or "e4m3fnuz" (bytes)."""
    if DECODE != "":
        x = _fp8_to_fp16(x, DECODE == "e4m3fnuz")
    return x.to(COMPUTE)


@triton.jit
def _load_tile(kv_ptr, kpe_ptr, pages_ptr, n0, kv_len, kv_stride_page, kv_stride_tok, kpe_stride_page, kpe_stride_tok,
               C: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
               PAGE: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """Gathers tokens n0 … n0 + BLOCK_N through the page table; with MASK, rows from kv_len on are zero and not read."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    if PAGE % BLOCK_N == 0:
        page = tl.load(pages_ptr + n0 // PAGE).to(tl.int64)
        row = n0 % PAGE + tl.arange(0, BLOCK_N)
        p_kv = kv_ptr + page * kv_stride_page + row[:, None] * kv_stride_tok
    else:
        page = tl.load(pages_ptr + offs_n // PAGE, mask=offs_n < kv_len, other=0).to(tl.int64)
        row = offs_n % PAGE
        p_kv = kv_ptr + (page * kv_stride_page + row * kv_stride_tok)[:, None]
    p_kv += offs_c[None, :]
    if MASK and BLOCK_C != C:
        k = tl.load(p_kv, mask=(offs_n < kv_len)[:, None] & (offs_c < C)[None, :], other=0.0)
    elif MASK:
        k = tl.load(p_kv, mask=(offs_n < kv_len)[:, None], other=0.0)
    elif BLOCK_C != C:
        k = tl.load(p_kv, mask=(offs_c < C)[None, :], other=0.0)
    else:
        k = tl.load(p_kv)
    k_pe = k
    if R > 0:
        offs_r = tl.arange(0, BLOCK_R)
        if PAGE % BLOCK_N == 0:
            p_pe = kpe_ptr + page * kpe_stride_page + row[:, None] * kpe_stride_tok + offs_r[None, :]
        else:
            p_pe = kpe_ptr + (page * kpe_stride_page + row * kpe_stride_tok)[:, None] + offs_r[None, :]
        if MASK and BLOCK_R != R:
            k_pe = tl.load(p_pe, mask=(offs_n < kv_len)[:, None] & (offs_r < R)[None, :], other=0.0)
        elif MASK:
            k_pe = tl.load(p_pe, mask=(offs_n < kv_len)[:, None], other=0.0)
        elif BLOCK_R != R:
            k_pe = tl.load(p_pe, mask=(offs_r < R)[None, :], other=0.0)
        else:
            k_pe = tl.load(p_pe)
    return k, k_pe


@triton.jit
def _attend(q, q_pe, k, k_pe, scales, acc, m, l, row_end, n0, qk_scale, logit_cap,
            R: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
            COMPUTE: tl.constexpr, DECODE: tl.constexpr, QK_NATIVE: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """One tile of the online softmax. row_end: first token that each row may not see. Scores are in base 2.

    SCALED: q, k, scales and acc are tuples, an element a group of columns, and k_pe has q's dtype. A group's scores
    and its weights are multiplied by its scales in fp32; no product of value and scale is rounded. (Rounded to bf16 in
    K they would move the LSE by up to 1e-2.)
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if SCALED:
        v = k
        s = tl.dot(q[0], tl.trans(_convert(k[0], DECODE, COMPUTE))) * scales[0][None, :]
        for g in tl.static_range(1, len(k)):
            s += tl.dot(q[g], tl.trans(_convert(k[g], DECODE, COMPUTE))) * scales[g][None, :]
        k_pe = k_pe.to(COMPUTE)
    else:
        v = _convert(k, DECODE, COMPUTE)
        if not QK_NATIVE:
            k = v
            k_pe = _convert(k_pe, DECODE, COMPUTE)
        s = tl.dot(q, tl.trans(k))
    if R > 0:
        s = tl.dot(q_pe, tl.trans(k_pe), s)
    if CAP:
        # cap·tanh(x/cap), as 2·sigmoid(2x) - 1; qk_scale and logit_cap are in natural units here
        s = logit_cap * (2.0 / (1.0 + tl.exp2(s * (-2.0 * LOG2E * qk_scale / logit_cap))) - 1.0) * LOG2E
        scale = 1.0
    else:
        scale = qk_scale * LOG2E
    if MASK:
        offs_n = n0 + tl.arange(0, BLOCK_N)
        s = tl.where(offs_n[None, :] < row_end[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    if MASK:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    else:
        shift = m_new
    alpha = tl.exp2(m - shift)
    p = tl.exp2(s * scale - shift[:, None])
    l = l * alpha + tl.sum(p, 1)
    if SCALED:
        # a scale may be beyond fp16's range
        WEIGHTS: tl.constexpr = tl.bfloat16 if COMPUTE == tl.float16 else COMPUTE  # noqa: SIM300
        summed = ()
        for g in tl.static_range(len(v)):
            weights = (p * scales[g][None, :]).to(WEIGHTS)
            summed = summed + (tl.dot(weights, _convert(v[g], DECODE, WEIGHTS), acc[g] * alpha[:, None]),)
        acc = summed
    else:
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(COMPUTE), v, acc)
    return acc, m_new, l


@triton.jit
def _masked_tiles(q, q_pe, acc, m, l, kv_ptr, kpe_ptr, scales_ptr, kv_desc, kpe_desc, pages_ptr, clear_tile, full_tile,
                  last_tile, kv_len, row_end, kv_col, pe_col, kv_stride_page, kv_stride_tok, kpe_stride_page,
                  kpe_stride_tok, scales_stride_page, scales_stride_tok, qk_scale, logit_cap, DIAGONAL: tl.constexpr,
                  C: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
                  BLOCK_R: tl.constexpr, PAGE: tl.constexpr, TMA: tl.constexpr, CAP: tl.constexpr,
                  COMPUTE: tl.constexpr, DECODE: tl.constexpr, QK_NATIVE: tl.constexpr):  # fmt: skip
    """The tiles that need a mask: [clear_tile, full_tile) cross the causal diagonal, full_tile is partly filled."""
    SCALED: tl.constexpr = scales_ptr is not None
    GROUP: tl.constexpr = 128
    TILES: tl.constexpr = (PAGE + BLOCK_N - 1) // BLOCK_N  # a page
    if DIAGONAL:
        for tile in tl.range(clear_tile, full_tile, num_stages=1):
            if TMA:
                row = tl.load(pages_ptr + tile // TILES).to(tl.int32) * PAGE + (tile % TILES) * BLOCK_N
                k = kv_desc.load([row, kv_col])
                scales = k
                k_pe = k
                if R > 0:
                    k_pe = kpe_desc.load([row, pe_col])
            elif SCALED:
                k, scales, k_pe = _load_groups(kv_ptr, kpe_ptr, scales_ptr, pages_ptr, tile * BLOCK_N, kv_len,
                                               kv_stride_page, kv_stride_tok, kpe_stride_page, kpe_stride_tok,
                                               scales_stride_page, scales_stride_tok, C, R, BLOCK_N, BLOCK_R, PAGE,
                                               GROUP, False)  # fmt: skip
            else:
                k, k_pe = _load_tile(kv_ptr, kpe_ptr, pages_ptr, tile * BLOCK_N, kv_len, kv_stride_page, kv_stride_tok,
                                     kpe_stride_page, kpe_stride_tok, C, R, BLOCK_N, BLOCK_C, BLOCK_R, PAGE,
                                     False)  # fmt: skip
                scales = k
            acc, m, l = _attend(q, q_pe, k, k_pe, scales, acc, m, l, row_end, tile * BLOCK_N, qk_scale, logit_cap,
                                R, BLOCK_N, True, CAP, COMPUTE, DECODE, QK_NATIVE, SCALED)  # fmt: skip

    if full_tile < last_tile:
        if SCALED:
            k, scales, k_pe = _load_groups(kv_ptr, kpe_ptr, scales_ptr, pages_ptr, full_tile * BLOCK_N, kv_len,
                                           kv_stride_page, kv_stride_tok, kpe_stride_page, kpe_stride_tok,
                                           scales_stride_page, scales_stride_tok, C, R, BLOCK_N, BLOCK_R, PAGE, GROUP,
                                           True)  # fmt: skip
        else:
            k, k_pe = _load_tile(kv_ptr, kpe_ptr, pages_ptr, full_tile * BLOCK_N, kv_len, kv_stride_page, kv_stride_tok,
                                 kpe_stride_page, kpe_stride_tok, C, R, BLOCK_N, BLOCK_C, BLOCK_R, PAGE,
                                 True)  # fmt: skip
            scales = k
        acc, m, l = _attend(q, q_pe, k, k_pe, scales, acc, m, l, row_end, full_tile * BLOCK_N, qk_scale, logit_cap,
                            R, BLOCK_N, True, CAP, COMPUTE, DECODE, QK_NATIVE, SCALED)  # fmt: skip
    return acc, m, l


@triton.jit
def _piece(
    slot, row_block, kvh, pages_ptr, length, kv_len, q_first, q_len, first_tile, last_tile, whole,
    q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc, sinks_ptr, q_scale_ptr, kv_scale_ptr, scales_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h,
    kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page, kpe_stride_tok, kpe_stride_head,
    scales_stride_page, scales_stride_tok, scales_stride_head, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
    G: tl.constexpr, NUM_KV_HEADS: tl.constexpr, MULTI: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, MASKED_FIRST: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, CP: tl.constexpr, HAS_LSE: tl.constexpr,
    COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr, QK_NATIVE: tl.constexpr,
):  # fmt: skip
    """Block row_block of a sequence's rows (query token, head; head fastest) over its tiles [first_tile, last_tile).

    `whole`: these are all its tiles, and the result goes to `out`; else to the partials of `slot`.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    SCALED: tl.constexpr = scales_ptr is not None
    GROUP: tl.constexpr = 128
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = offs_m < q_len * G
    tok = offs_m // G
    head = kvh * G + offs_m % G
    q_tok = (q_first + tok).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    p_q = q_ptr + q_tok * q_stride_t + head * q_stride_h
    if SCALED:
        q = ()
        for g in tl.static_range(C // GROUP):
            p_group = p_q[:, None] + (g * GROUP + tl.arange(0, GROUP))[None, :]
            q = q + (tl.load(p_group, mask=row_ok[:, None], other=0.0).to(COMPUTE),)
    else:
        q = tl.load(p_q[:, None] + offs_c[None, :], mask=row_ok[:, None] & (offs_c < C)[None, :], other=0.0)
        q = _convert(q, Q_DECODE, q.dtype if QK_NATIVE else COMPUTE)
    q_pe = q
    if R > 0:
        p_pe = q_pe_ptr + q_tok * q_pe_stride_t + head * q_pe_stride_h
        q_pe = tl.load(p_pe[:, None] + offs_r[None, :], mask=row_ok[:, None] & (offs_r < R)[None, :], other=0.0)
        q_pe = _convert(q_pe, Q_DECODE, q_pe.dtype if QK_NATIVE else COMPUTE)
    if q_scale_ptr is not None:
        qk_scale *= tl.load(q_scale_ptr)
    if kv_scale_ptr is not None:
        kv_scale = tl.load(kv_scale_ptr)
        qk_scale *= kv_scale
        v_scale *= kv_scale

    # tiles [first_tile, clear_tile) are seen whole by every row, [clear_tile, full_tile) cross the causal diagonal,
    # and the one after full_tile, if any, is partly filled
    full_tile = tl.maximum(tl.minimum(kv_len // BLOCK_N, last_tile), first_tile)
    clear_tile = full_tile
    row_end = tl.full((BLOCK_M,), 0, tl.int32) + kv_len
    if CAUSAL and MULTI:
        row_end = _visible(length - q_len + 1 + tok, cp_rank, cp_world, CP)
        clear = _visible(length - q_len + 1 + row_block * BLOCK_M // G, cp_rank, cp_world, CP)
        clear_tile = tl.maximum(tl.minimum(clear // BLOCK_N, full_tile), first_tile)
        row_end = tl.minimum(row_end, kv_len)

    if SCALED:
        acc = ()
        for _ in tl.static_range(C // GROUP):
            acc = acc + (tl.zeros((BLOCK_M, GROUP), tl.float32),)
        scales_ptr += kvh.to(tl.int64) * scales_stride_head
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    kv_ptr += kvh.to(tl.int64) * kv_stride_head
    kpe_ptr += kvh.to(tl.int64) * kpe_stride_head

    TILES: tl.constexpr = (PAGE + BLOCK_N - 1) // BLOCK_N  # a page
    kv_col = (kvh * kv_stride_head).to(tl.int32)
    pe_col = (kvh * kpe_stride_head).to(tl.int32)
    if MASKED_FIRST:
        acc, m, l = _masked_tiles(q, q_pe, acc, m, l, kv_ptr, kpe_ptr, scales_ptr, kv_desc, kpe_desc, pages_ptr,
                                  clear_tile, full_tile, last_tile, kv_len, row_end, kv_col, pe_col, kv_stride_page,
                                  kv_stride_tok, kpe_stride_page, kpe_stride_tok, scales_stride_page,
                                  scales_stride_tok, qk_scale, logit_cap, CAUSAL and MULTI, C, R, BLOCK_N,
                                  BLOCK_C, BLOCK_R, PAGE, TMA, CAP, COMPUTE, DECODE, QK_NATIVE)  # fmt: skip
    if TMA:
        page = tl.load(pages_ptr + first_tile // TILES, mask=first_tile < clear_tile, other=0).to(tl.int32)
        for tile in tl.range(first_tile, clear_tile, num_stages=STAGES):
            # the next page id is on its way while this tile is multiplied
            ahead = tl.load(pages_ptr + tl.minimum(tile + 1, clear_tile - 1) // TILES).to(tl.int32)
            row = page * PAGE + (tile % TILES) * BLOCK_N
            k = kv_desc.load([row, kv_col])
            k_pe = k
            if R > 0:
                k_pe = kpe_desc.load([row, pe_col])
            acc, m, l = _attend(q, q_pe, k, k_pe, k, acc, m, l, row_end, 0, qk_scale, logit_cap,
                                R, BLOCK_N, False, CAP, COMPUTE, DECODE, QK_NATIVE, False)  # fmt: skip
            page = ahead
    else:
        for tile in tl.range(first_tile, clear_tile, num_stages=STAGES):
            if SCALED:
                k, scales, k_pe = _load_groups(kv_ptr, kpe_ptr, scales_ptr, pages_ptr, tile * BLOCK_N, kv_len,
                                               kv_stride_page, kv_stride_tok, kpe_stride_page, kpe_stride_tok,
                                               scales_stride_page, scales_stride_tok, C, R, BLOCK_N, BLOCK_R, PAGE,
                                               GROUP, False)  # fmt: skip
            else:
                k, k_pe = _load_tile(kv_ptr, kpe_ptr, pages_ptr, tile * BLOCK_N, kv_len, kv_stride_page, kv_stride_tok,
                                     kpe_stride_page, kpe_stride_tok, C, R, BLOCK_N, BLOCK_C, BLOCK_R, PAGE,
                                     False)  # fmt: skip
                scales = k
            acc, m, l = _attend(q, q_pe, k, k_pe, scales, acc, m, l, row_end, 0, qk_scale, logit_cap,
                                R, BLOCK_N, False, CAP, COMPUTE, DECODE, QK_NATIVE, SCALED)  # fmt: skip

    if not MASKED_FIRST:
        acc, m, l = _masked_tiles(q, q_pe, acc, m, l, kv_ptr, kpe_ptr, scales_ptr, kv_desc, kpe_desc, pages_ptr,
                                  clear_tile, full_tile, last_tile, kv_len, row_end, kv_col, pe_col, kv_stride_page,
                                  kv_stride_tok, kpe_stride_page, kpe_stride_tok, scales_stride_page,
                                  scales_stride_tok, qk_scale, logit_cap, CAUSAL and MULTI, C, R, BLOCK_N,
                                  BLOCK_C, BLOCK_R, PAGE, TMA, CAP, COMPUTE, DECODE, QK_NATIVE)  # fmt: skip

    lse = m + tl.log2(l)  # base 2; -inf for a row that saw nothing
    denominator = l
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0) * LOG2E
        if whole:
            denominator += tl.exp2(tl.minimum(sink - m, 126.0))
    scale = tl.where(l > 0, v_scale / denominator, 0.0)
    if not SCALED:
        o = acc * scale[:, None]
        ok = row_ok[:, None] & (offs_c < C)[None, :]
    if whole:
        p_out = out_ptr + q_tok * out_stride_t + head * out_stride_h
        if SCALED:
            _store_groups(p_out, acc, scale, row_ok, GROUP)
        else:
            tl.store(p_out[:, None] + offs_c[None, :], o.to(out_ptr.dtype.element_ty), mask=ok)
        if HAS_LSE:
            tl.store(lse_ptr + q_tok * lse_stride_t + head * lse_stride_h, lse * lse_mul, mask=row_ok)
    else:
        row = (slot.to(tl.int64) * max_q_len + tok) * (G * NUM_KV_HEADS) + head
        if SCALED:
            _store_groups(part_ptr + row * C, acc, scale, row_ok, GROUP)
        else:
            tl.store(part_ptr + row[:, None] * C + offs_c[None, :], o, mask=ok)
        tl.store(part_lse_ptr + row, lse, mask=row_ok)


@triton.jit
def decode_splitk(
    q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr, scales_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h,
    kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page, kpe_stride_tok, kpe_stride_head, table_stride,
    scales_stride_page, scales_stride_tok, scales_stride_head, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, max_q_len, num_splits, min_tiles, wave, slots, cp_rank, cp_world, qk_scale, v_scale, logit_cap,
    lse_mul,
    G: tl.constexpr, NUM_KV_HEADS: tl.constexpr, MULTI: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BATCH_POW2: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, MASKED_FIRST: tl.constexpr, PDL: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr, HAS_LSE: tl.constexpr,
    COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr, QK_NATIVE: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row_blocks = tl.cdiv(max_q_len * G, BLOCK_M)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    kvh = (pid // row_blocks) % NUM_KV_HEADS
    piece = pid // (row_blocks * NUM_KV_HEADS)
    b = tl.minimum(piece // num_splits, batch - 1)
    split = piece - b * num_splits
    length = _lengths(
        b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE
    )  # on its way while the batch is looked at
    pieces = 0
    even = True
    if wave > 0:
        even, every, offs_b = _schedule(batch, wave, slots, lens_ptr, kv_indptr_ptr, last_ptr,
                                        cp_rank, cp_world, HAS_LENS, PAGE, CP, BLOCK_N, BATCH_POW2)  # fmt: skip
        if not even:
            ends = tl.cumsum(every, 0)
            b = tl.sum(((ends <= piece) & (offs_b < batch)).to(tl.int32), 0)
            split = piece - tl.sum(tl.where(offs_b < b, every, 0), 0)
            pieces = tl.sum(tl.where(offs_b == b, every, 0), 0)
            length = _lengths(b, b < batch, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
    if (b >= batch) or (even and split >= num_splits):
        return

    if kv_indptr_ptr is None:
        pages_ptr = table_ptr + b.to(tl.int64) * table_stride
    else:
        pages_ptr = table_ptr + tl.load(kv_indptr_ptr + b).to(tl.int64)
    q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
    kv_len = _visible(length, cp_rank, cp_world, CP)
    tiles = tl.cdiv(kv_len, BLOCK_N)
    per_split = _even_pieces(tiles, num_splits, min_tiles)
    if pieces > 0:
        per_split = tl.maximum(tl.cdiv(tiles, pieces), 1)
    first_tile = split * per_split
    if (row_block * BLOCK_M >= q_len * G) or ((first_tile >= tiles) and (split > 0)):
        return
    last_tile = tl.minimum(first_tile + per_split, tiles)
    _piece(piece, row_block, kvh, pages_ptr, length, kv_len, q_first, q_len, first_tile, last_tile, tiles <= per_split,
           q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc, sinks_ptr, q_scale_ptr, kv_scale_ptr, scales_ptr,
           out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h,
           kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page, kpe_stride_tok, kpe_stride_head,
           scales_stride_page, scales_stride_tok, scales_stride_head, out_stride_t, out_stride_h, lse_stride_t,
           lse_stride_h, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, G, NUM_KV_HEADS, MULTI,
           C, R, PAGE, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_R, STAGES, TMA, MASKED_FIRST, CAUSAL, CAP, CP, HAS_LSE,
           COMPUTE, DECODE, Q_DECODE, QK_NATIVE)  # fmt: skip
