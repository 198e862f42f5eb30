"""Persistent MLA decode in Triton: `schedule` makes a work list, `decode_persistent` runs it, `combine_listed` sums.

The tokens of a batch are laid end to end in tiles, each sequence preceded by `overhead` tiles, what a piece costs
beside its tiles, and the line is cut into `groups` equal lengths: a group of programs (one a block of rows and KV head)
walks one of them. So the slowest group has at most `overhead` more than the mean, whatever the lengths.

A piece begins where a sequence or a group does; there are batch + groups of them, in the order of the line, of equal
places the group's first. info [pieces, 4]: sequence, first tile, last tile, and how many pieces with tiles its sequence
has: 0 where the piece has none and nothing to do. `groups_ptr` [groups + 1]: where each group's pieces begin.
`sums_ptr` [batch, 3]: the first piece with tiles of a sequence, how many follow one another, where it begins.

A piece is computed as in triton_splitk.py. A sequence in one piece goes to `out` at once; the others leave partials,
summed in the order of the pieces: the same inputs give the same bits. All is integers and fixed sizes: a graph that was
captured serves other lengths.
"""

import triton
import triton.language as tl

from mla_jit.ops.decode.triton_splitk import _lengths, _piece, _sum_pieces, _tokens, _visible


@triton.jit
def _costs(b, batch, lens_ptr, indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
           HAS_LENS: tl.constexpr, PAGE: tl.constexpr, CP: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(tiles, length on the line) of sequences b; an empty one is 1 long, as its output is written too."""
    ok = b < batch
    lengths = _visible(_lengths(b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS, PAGE), cp_rank, cp_world, CP)
    tiles = tl.where(ok, tl.cdiv(lengths, BLOCK_N), 0)
    return tiles, tl.where(ok, tl.where(tiles > 0, tiles + overhead, 1), 0)


@triton.jit
def schedule(
    lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, batch, groups, overhead, most_pieces,
    cp_rank, cp_world,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program. most_pieces: no sequence is cut into more than so many (at least 2). 2^STEPS >= batch."""
    offs = tl.arange(0, CHUNK)
    total = tl.zeros((), tl.int32)
    longest = tl.zeros((), tl.int32)
    for b0 in tl.range(0, batch, CHUNK, num_stages=1):
        tiles, costs = _costs(b0 + offs, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, BLOCK_N)  # fmt: skip
        total += tl.sum(costs, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
    # of a sequence no longer than (n - 1) lengths of a group n pieces have tiles at most
    length = tl.maximum(tl.maximum(tl.cdiv(total, groups), tl.cdiv(longest, most_pieces - 1)), 1)

    start = tl.zeros((), tl.int32)
    for b0 in tl.range(0, batch, CHUNK, num_stages=1):
        b = b0 + offs
        ok = b < batch
        tiles, costs = _costs(b, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, BLOCK_N)  # fmt: skip
        starts = start + tl.cumsum(costs, 0) - costs
        start += tl.sum(costs, 0)
        group = starts // length
        piece = b + group + 1
        kept = starts + tl.where(tiles > 0, overhead, 0)  # where its tiles begin
        first = kept // length
        parts = tl.where(tiles > 0, (kept + tiles - 1) // length - first + 1, 1)
        last = tl.maximum(tl.minimum((group + 1) * length - kept, tiles), 0)
        tl.store(info_ptr + 4 * piece, b, mask=ok)
        tl.store(info_ptr + 4 * piece + 1, tl.zeros_like(b), mask=ok)
        tl.store(info_ptr + 4 * piece + 2, last, mask=ok)
        tl.store(info_ptr + 4 * piece + 3, tl.where((tiles == 0) | (last > 0), parts, 0), mask=ok)
        tl.store(sums_ptr + 3 * b, piece + first - group, mask=ok)
        tl.store(sums_ptr + 3 * b + 1, parts, mask=ok)
        tl.store(sums_ptr + 3 * b + 2, starts, mask=ok)
    tl.debug_barrier()  # the starts are read below

    for g0 in tl.range(0, groups, CHUNK, num_stages=1):
        g = g0 + offs
        begin = g * length  # of a group, on the line
        b = tl.zeros((CHUNK,), tl.int32)  # the last sequence that begins no later; the first begins at 0
        begun = tl.zeros((CHUNK,), tl.int32)
        for k in tl.static_range(STEPS):
            probe = b + (1 << (STEPS - 1 - k))
            at = tl.load(sums_ptr + 3 * probe + 2, mask=probe < batch, other=2147483647)
            b = tl.where(at <= begin, probe, b)
            begun = tl.where(at <= begin, at, begun)
        tiles, costs = _costs(b, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, BLOCK_N)  # fmt: skip
        piece = g + b + (begun < begin).to(tl.int32)
        kept = begun + tl.where(tiles > 0, overhead, 0)
        first = tl.maximum(tl.minimum(begin - kept, tiles), 0)
        last = tl.maximum(tl.minimum(begin + length - kept, tiles), 0)
        # a sequence that begins where the group does has a piece of its own
        some = (last > first) & (begun < begin)
        parts = (kept + tiles - 1) // length - kept // length + 1
        ok = g < groups
        tl.store(groups_ptr + g, piece, mask=ok)
        tl.store(info_ptr + 4 * piece, b, mask=ok)
        tl.store(info_ptr + 4 * piece + 1, first, mask=ok)
        tl.store(info_ptr + 4 * piece + 2, last, mask=ok)
        tl.store(info_ptr + 4 * piece + 3, tl.where(some, parts, 0), mask=ok)
    tl.store(groups_ptr + groups, batch + groups)


@triton.jit
def decode_persistent(
    q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h,
    kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page, kpe_stride_tok, kpe_stride_head, table_stride,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
    G: tl.constexpr, NUM_KV_HEADS: tl.constexpr, MULTI: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, MASKED_FIRST: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr, HAS_LSE: tl.constexpr,
    COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr, QK_NATIVE: tl.constexpr,
):  # fmt: skip
    """A program of a group: one block of rows of one KV head over all pieces of the group."""
    row_blocks = tl.cdiv(max_q_len * G, BLOCK_M)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    kvh = (pid // row_blocks) % NUM_KV_HEADS
    group = pid // (row_blocks * NUM_KV_HEADS)
    for i in tl.range(tl.load(groups_ptr + group), tl.load(groups_ptr + group + 1), num_stages=1):
        piece = tl.zeros((), tl.int32) + i  # a tensor in the interpreter too
        b = tl.load(info_ptr + 4 * piece)
        first_tile = tl.load(info_ptr + 4 * piece + 1)
        last_tile = tl.load(info_ptr + 4 * piece + 2)
        parts = tl.load(info_ptr + 4 * piece + 3)
        if parts > 0:
            if kv_indptr_ptr is None:
                pages_ptr = table_ptr + b.to(tl.int64) * table_stride
            else:
                pages_ptr = table_ptr + tl.load(kv_indptr_ptr + b).to(tl.int64)
            q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
            length = _lengths(b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
            if row_block * BLOCK_M < q_len * G:
                _piece(piece, row_block, kvh, pages_ptr, length, _visible(length, cp_rank, cp_world, CP), q_first,
                       q_len, first_tile, last_tile, parts == 1, q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc,
                       sinks_ptr, q_scale_ptr, kv_scale_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_t,
                       q_stride_h, q_pe_stride_t, q_pe_stride_h, kv_stride_page, kv_stride_tok, kv_stride_head,
                       kpe_stride_page, kpe_stride_tok, kpe_stride_head, out_stride_t, out_stride_h, lse_stride_t,
                       lse_stride_h, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, G,
                       NUM_KV_HEADS, MULTI, C, R, PAGE, BLOCK_M, BLOCK_N, BLOCK_C, BLOCK_R, STAGES, TMA, MASKED_FIRST,
                       CAUSAL, CAP, CP, HAS_LSE, COMPUTE, DECODE, Q_DECODE, QK_NATIVE)  # fmt: skip


@triton.jit
def combine_listed(
    qo_indptr_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, sums_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul,
    H: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums the partials of a sequence's token, as `combine` does; which they are, `sums_ptr` says."""
    COLUMNS: tl.constexpr = (C + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    column = pid % COLUMNS
    group = (pid // COLUMNS) % GROUPS
    tok = (pid // (COLUMNS * GROUPS)) % max_q_len
    b = pid // (COLUMNS * GROUPS * max_q_len)
    first = tl.load(sums_ptr + 3 * b)
    used = tl.load(sums_ptr + 3 * b + 1)
    q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
    q_tok = q_first + tok
    if (used > 1) and (tok < q_len):
        _sum_pieces(first, used, q_tok, tok, group, column, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
                    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul, H, C, BLOCK_S, BLOCK_H,
                    BLOCK_D, HAS_LSE)  # fmt: skip
