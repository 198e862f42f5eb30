"""Split-K MLA decode in Triton, stage 2: `combine` sums the partials that stage 1 has left. Imports triton only."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_jit.ops.decode.triton_pieces import _even_pieces, _lengths, _schedule, _tokens, _visible


@triton.jit
def _sum_pieces(
    first, used, q_tok, tok, group, column, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul,
    H: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums slots first … first + used for BLOCK_H heads of a token and BLOCK_D columns, BLOCK_S slots at a time."""
    LOG2E: tl.constexpr = 1.4426950408889634
    heads = group * BLOCK_H + tl.arange(0, BLOCK_H)
    head_ok = heads < H
    row = (first.to(tl.int64) * max_q_len + tok) * H + heads
    step = max_q_len.to(tl.int64) * H  # rows a piece
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    offs_d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for s0 in tl.range(0, used, BLOCK_S):  # an online softmax over pieces: LSE and partials are on their way together
        offs_s = s0 + tl.arange(0, BLOCK_S)
        rows = row[None, :] + (offs_s * step)[:, None]
        ok = (offs_s < used)[:, None] & head_ok[None, :]
        lses = tl.load(part_lse_ptr + rows, mask=ok, other=float("-inf"))
        part_ok = ok[:, :, None] & (offs_d < C)[None, None, :]
        part = tl.load(part_ptr + (rows * C)[:, :, None] + offs_d[None, None, :], mask=part_ok, other=0.0)
        higher = tl.maximum(top, tl.max(lses, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(lses - shift[None, :])
        alpha = tl.exp2(top - shift)
        acc = acc * alpha[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * alpha + tl.sum(weight, 0)
        top = higher
    shift = tl.where(top == float("-inf"), 0.0, top)
    denominator = total
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads, mask=head_ok, other=0.0) * LOG2E
        denominator += tl.exp2(tl.minimum(sink - shift, 126.0))
    o = tl.where((total > 0)[:, None], acc / denominator[:, None], 0.0)
    p_out = out_ptr + q_tok.to(tl.int64) * out_stride_t + heads * out_stride_h
    tl.store(
        p_out[:, None] + offs_d[None, :], o.to(out_ptr.dtype.element_ty), mask=head_ok[:, None] & (offs_d < C)[None, :]
    )
    if HAS_LSE:  # noqa: SIM102  known to the compiler, `column` is not
        if column == 0:
            p_lse = lse_ptr + q_tok.to(tl.int64) * lse_stride_t + heads * lse_stride_h
            tl.store(p_lse, (shift + tl.log2(total)) * lse_mul, mask=head_ok)


@triton.jit
def combine(
    lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, batch, max_q_len, num_splits, min_tiles, wave, slots,
    cp_rank, cp_world, lse_mul,
    H: tl.constexpr, C: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BATCH_POW2: tl.constexpr,
    PDL: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums the partials of BLOCK_H heads of one token and BLOCK_D columns: O = Σ 2^(lse_i - M)·O_i / Σ 2^(lse_i - M).

    BLOCK_S pieces at a time, always in the same order. Reads the partials of the pieces that exist, writes `out` once.
    """
    COLUMNS: tl.constexpr = (C + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    column = pid % COLUMNS
    group = (pid // COLUMNS) % GROUPS
    tok = (pid // (COLUMNS * GROUPS)) % max_q_len
    b = pid // (COLUMNS * GROUPS * max_q_len)
    length = _lengths(b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
    tiles = tl.cdiv(_visible(length, cp_rank, cp_world, CP), BLOCK_N)
    used = tl.cdiv(tiles, _even_pieces(tiles, num_splits, min_tiles))
    first = b * num_splits
    if wave > 0:
        even, every, offs_b = _schedule(batch, wave, slots, lens_ptr, kv_indptr_ptr, last_ptr,
                                        cp_rank, cp_world, HAS_LENS, PAGE, CP, BLOCK_N, BATCH_POW2)  # fmt: skip
        if not even:
            first = tl.sum(tl.where(offs_b < b, every, 0), 0)
            pieces = tl.sum(tl.where(offs_b == b, every, 0), 0)
            used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, pieces), 1))
    q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
    q_tok = q_first + tok
    if PDL:  # noqa: SIM102  known to the compiler, `pid` is not
        if pid == 0:  # so that this grid does not end before stage 1 does: what comes next is ordered after this one
            gdc_wait()
    if (used <= 1) or (tok >= q_len):
        return
    if PDL:
        gdc_wait()
    _sum_pieces(first, used, q_tok, tok, group, column, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
                out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul, H, C, BLOCK_S, BLOCK_H,
                BLOCK_D, HAS_LSE)  # fmt: skip
