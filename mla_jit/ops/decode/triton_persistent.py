"""Persistent MLA decode in Triton: `schedule` makes a work list, `decode_persistent` runs it, `combine_listed` sums.

The tokens of a batch are laid end to end in tiles of UNIT tokens, each sequence preceded by `overhead` tiles, what a
piece costs beside its tiles, and the line is cut into `groups` equal lengths: a group of programs (one a block of rows
and KV head) walks one of them. So the slowest group has at most `overhead` more than the mean, whatever the lengths.
Or (`even`) every sequence is cut into the same number of pieces, and each group has as many of them as any other.
A sequence without tokens, the padding of a captured graph, is not on the line and in no piece: before it walks, group g
looks at sequences g, g + groups, … and writes zeros and -inf for these, so all take part and stores are not waited for.

A piece begins where a sequence with tokens or a group does; there are at most batch + groups of them, in the order of
the line, of equal places the group's first. info [batch + groups, 4]: sequence, first tile, last tile, and how many
pieces with tiles its sequence has: 0 where the piece has none and nothing to do. `groups_ptr` [groups + 1]: where each
group's pieces begin. `sums_ptr` [batch, 3]: the first piece with tiles of a sequence, how many follow one another (0:
it is empty), where it begins.
`arrivals_ptr` [batch, KV heads, cdiv(max_q_len · G, 16)]: 0. The list depends on the lengths and on nothing that is
tuned but `groups` and `overhead`: UNIT is a multiple of every BLOCK_N, so any config of the walk runs it.

A piece is computed as in triton_splitk.py. A sequence in one piece goes to `out` at once; the others leave partials,
summed in the order of the pieces: the same inputs give the same bits. All is integers and fixed sizes: a graph that was
captured serves other lengths.

With FOLD there is no third kernel: a program that has left partials counts itself in `arrivals`, and the last one of a
sequence's block of rows sums it and sets the count to 0 again, for the next call that reads the list. Its partials are
visible before its count (a barrier of the program, then a release at the device's scope), and the others' before it
reads them (the acquire of the same operation); the order of the sum is that of the pieces, whoever is last.
"""

import triton
import triton.language as tl

from mla_jit.ops.decode.triton_combine import _sum_pieces
from mla_jit.ops.decode.triton_pieces import _lengths, _tokens, _visible
from mla_jit.ops.decode.triton_splitk import _piece


@triton.jit
def _costs(b, batch, lens_ptr, indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
           HAS_LENS: tl.constexpr, PAGE: tl.constexpr, CP: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """(tiles, length on the line in sixteenths of a tile) of sequences b; both are 0 of an empty one."""
    FINE: tl.constexpr = 16
    ok = b < batch
    lengths = _visible(_lengths(b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS, PAGE), cp_rank, cp_world, CP)
    tiles = tl.where(ok, tl.cdiv(lengths, UNIT), 0)
    return tiles, tl.where(tiles > 0, FINE * (tiles + overhead), 0)


@triton.jit
def _cut_line(
    lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, batch, groups, overhead, most_pieces,
    cp_rank, cp_world,
    PAGE: tl.constexpr, UNIT: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The line cut into equal lengths; into longer ones where a sequence would be in more than most_pieces.

    A tile belongs to the group where it begins.
    """
    FINE: tl.constexpr = 16
    offs = tl.arange(0, WIDE)
    total = tl.zeros((), tl.int32)
    longest = tl.zeros((), tl.int32)
    for b0 in tl.range(0, batch, WIDE, num_stages=1):
        tiles, costs = _costs(b0 + offs, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, UNIT)  # fmt: skip
        total += tl.sum(costs, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
    # of a sequence no longer than (n - 1) lengths of a group n pieces have tiles at most; for n = 1 none is cut
    uncut = most_pieces < 2
    least = tl.cdiv(tl.where(uncut, 0, FINE * longest), tl.maximum(most_pieces - 1, 1))
    length = tl.maximum(tl.maximum(tl.cdiv(total, groups), least), FINE)

    start = tl.zeros((), tl.int32)
    pieces = tl.zeros((), tl.int32)  # that begin where a sequence does
    for b0 in tl.range(0, batch, WIDE, num_stages=1):
        b = b0 + offs
        ok = b < batch
        tiles, costs = _costs(b, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, UNIT)  # fmt: skip
        starts = start + tl.cumsum(costs, 0) - costs
        start += tl.sum(costs, 0)
        some = tiles > 0
        ranks = pieces + tl.cumsum(some.to(tl.int32), 0) - some
        pieces += tl.sum(some.to(tl.int32), 0)
        group = starts // length
        piece = ranks + group + 1
        kept = starts + tl.where(tiles > 0, FINE * overhead, 0)  # where its tiles begin
        first = tl.where(uncut, group, kept // length)
        parts = tl.where(uncut, 1, (kept + FINE * (tiles - 1)) // length - first + 1)
        last = tl.maximum(tl.minimum(tl.cdiv((group + 1) * length - kept, FINE), tiles), 0)
        last = tl.where(uncut, tiles, last)
        tl.store(info_ptr + 4 * piece, b, mask=some)
        tl.store(info_ptr + 4 * piece + 1, tl.zeros_like(b), mask=some)
        tl.store(info_ptr + 4 * piece + 2, last, mask=some)
        tl.store(info_ptr + 4 * piece + 3, tl.where(last > 0, parts, 0), mask=some)
        tl.store(sums_ptr + 3 * b, ranks + first + 1, mask=ok)
        tl.store(sums_ptr + 3 * b + 1, tl.where(some, parts, 0), mask=ok)
        tl.store(sums_ptr + 3 * b + 2, starts, mask=ok)
    tl.debug_barrier()  # the starts are read below

    offs_g = tl.arange(0, CHUNK)
    for g0 in tl.range(0, groups, CHUNK, num_stages=1):
        g = g0 + offs_g
        begin = g * length  # of a group, on the line
        b = tl.zeros((CHUNK,), tl.int32)  # the last sequence that begins no later; empty only where no tile is left
        begun = tl.zeros((CHUNK,), tl.int32)
        for k in tl.static_range(STEPS):
            probe = b + (1 << (STEPS - 1 - k))
            at = tl.load(sums_ptr + 3 * probe + 2, mask=probe < batch, other=2147483647)
            b = tl.where(at <= begin, probe, b)
            begun = tl.where(at <= begin, at, begun)
        tiles, costs = _costs(b, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, overhead,
                              HAS_LENS, PAGE, CP, UNIT)  # fmt: skip
        kept = begun + tl.where(tiles > 0, FINE * overhead, 0)
        rank = tl.load(sums_ptr + 3 * b) - 1 - tl.where(uncut, begun, kept) // length
        piece = g + rank + ((tiles > 0) & (begun < begin)).to(tl.int32)
        first = tl.maximum(tl.minimum(tl.cdiv(begin - kept, FINE), tiles), 0)
        last = tl.maximum(tl.minimum(tl.cdiv(begin + length - kept, FINE), tiles), 0)
        # a sequence that begins where the group does has a piece of its own
        some = (last > first) & (begun < begin) & (most_pieces > 1)
        parts = (kept + FINE * (tiles - 1)) // length - kept // length + 1
        ok = g < groups
        tl.store(groups_ptr + g, piece, mask=ok)
        tl.store(info_ptr + 4 * piece, b, mask=ok)
        tl.store(info_ptr + 4 * piece + 1, first, mask=ok)
        tl.store(info_ptr + 4 * piece + 2, last, mask=ok)
        tl.store(info_ptr + 4 * piece + 3, tl.where(some, parts, 0), mask=ok)
    tl.store(groups_ptr + groups, pieces + groups)


@triton.jit
def _cut_evenly(
    lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, batch, groups, most_pieces, cp_rank, cp_world,
    PAGE: tl.constexpr, UNIT: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """As many pieces of each sequence as the groups hold once, most_pieces at most; those without a tile stay empty."""
    offs = tl.arange(0, WIDE)
    count = tl.zeros((), tl.int32)  # of sequences with tokens
    for b0 in tl.range(0, batch, WIDE, num_stages=1):
        tiles, _ = _costs(b0 + offs, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, 0, HAS_LENS, PAGE, CP,
                          UNIT)  # fmt: skip
        count += tl.sum((tiles > 0).to(tl.int32), 0)
    share = tl.maximum(tl.minimum(groups // tl.maximum(count, 1), most_pieces), 1)
    before = tl.zeros((), tl.int32)
    for b0 in tl.range(0, batch, WIDE, num_stages=1):
        b = b0 + offs
        ok = b < batch
        tiles, _ = _costs(b, batch, lens_ptr, kv_indptr_ptr, last_ptr, cp_rank, cp_world, 0, HAS_LENS, PAGE, CP,
                          UNIT)  # fmt: skip
        each = tl.maximum(tl.cdiv(tiles, share), 1)
        parts = tl.cdiv(tiles, each)
        some = tiles > 0
        piece = (before + tl.cumsum(some.to(tl.int32), 0) - some) * share
        before += tl.sum(some.to(tl.int32), 0)
        for k in tl.range(0, share, num_stages=1):
            p_info = info_ptr + 4 * (piece + k)
            tl.store(p_info, b, mask=some)
            tl.store(p_info + 1, tl.minimum(k * each, tiles), mask=some)
            tl.store(p_info + 2, tl.minimum((k + 1) * each, tiles), mask=some)
            tl.store(p_info + 3, tl.where(k < parts, parts, 0), mask=some)
        tl.store(sums_ptr + 3 * b, piece, mask=ok)
        tl.store(sums_ptr + 3 * b + 1, parts, mask=ok)
        tl.store(sums_ptr + 3 * b + 2, piece, mask=ok)
    pieces = count.to(tl.int64) * share
    offs_g = tl.arange(0, CHUNK)
    for g0 in tl.range(0, groups, CHUNK, num_stages=1):
        g = g0 + offs_g
        tl.store(groups_ptr + g, (g * pieces // groups).to(tl.int32), mask=g < groups)
    tl.store(groups_ptr + groups, pieces.to(tl.int32))


@triton.jit
def schedule(
    lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, arrivals_ptr, batch, groups, overhead,
    most_pieces, even, arrivals, cp_rank, cp_world,
    PAGE: tl.constexpr, UNIT: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program. most_pieces: no sequence is cut into more than so many (at least 1). WIDE sequences and CHUNK
    groups are looked at together; 2^STEPS >= batch.

    even: 0 to cut the line, 1 to cut all sequences alike. arrivals: how many counts there are.
    """
    many = tl.arange(0, 4 * CHUNK)
    for a0 in tl.range(0, arrivals, 4 * CHUNK, num_stages=1):
        tl.store(arrivals_ptr + a0 + many, tl.zeros_like(many), mask=a0 + many < arrivals)
    if even > 0:
        _cut_evenly(lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, batch, groups, most_pieces,
                    cp_rank, cp_world, PAGE, UNIT, CP, HAS_LENS, WIDE, CHUNK)  # fmt: skip
    else:
        _cut_line(lens_ptr, kv_indptr_ptr, last_ptr, groups_ptr, info_ptr, sums_ptr, batch, groups, overhead,
                  most_pieces, cp_rank, cp_world, PAGE, UNIT, CP, HAS_LENS, WIDE, CHUNK, STEPS)  # fmt: skip


@triton.jit
def _write_nothing(row_block, kvh, q_first, q_len, out_ptr, lse_ptr, out_stride_t, out_stride_h, lse_stride_t,
                   lse_stride_h, G: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
                   HAS_LSE: tl.constexpr):  # fmt: skip
    """What attention over no token is, for a block of rows: output 0, LSE -inf."""
    offs_m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    row_ok = offs_m < q_len * G
    q_tok = (q_first + offs_m // G).to(tl.int64)
    head = kvh * G + offs_m % G
    nothing = tl.zeros((BLOCK_M, BLOCK_C), out_ptr.dtype.element_ty)
    p_out = out_ptr + q_tok * out_stride_t + head * out_stride_h
    tl.store(p_out[:, None] + offs_c[None, :], nothing, mask=row_ok[:, None] & (offs_c < C)[None, :])
    if HAS_LSE:
        lse = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        tl.store(lse_ptr + q_tok * lse_stride_t + head * lse_stride_h, lse, mask=row_ok)


@triton.jit
def _write_empty(
    group, groups, batch, row_block, kvh, qo_indptr_ptr, out_ptr, lse_ptr, sums_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len,
    G: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """A group's share of the sequences without tokens: of every `groups`-th sequence, 32 of them looked at together."""
    FLAGS: tl.constexpr = 32
    offs = tl.arange(0, FLAGS)
    for b0 in tl.range(group, batch, groups * FLAGS, num_stages=1):
        b = b0 + groups * offs
        parts = tl.load(sums_ptr + 3 * b + 1, mask=b < batch, other=1)
        empty = parts == 0
        if qo_indptr_ptr is not None:  # and has query tokens, which the padding of a graph has not
            begin = tl.load(qo_indptr_ptr + b, mask=b < batch, other=0)
            empty &= tl.load(qo_indptr_ptr + b + 1, mask=b < batch, other=0) > begin
        found = tl.sum(tl.where(empty, 1, 0) << offs, 0)  # a bit a sequence
        if found != 0:
            for k in tl.range(0, FLAGS, num_stages=1):
                if ((found >> k) & 1) != 0:
                    q_first, q_len = _tokens(b0 + groups * k, qo_indptr_ptr, max_q_len)
                    _write_nothing(row_block, kvh, q_first, q_len, out_ptr, lse_ptr, out_stride_t, out_stride_h,
                                   lse_stride_t, lse_stride_h, G, C, BLOCK_M, BLOCK_C, HAS_LSE)  # fmt: skip


@triton.jit
def _sum_rows(
    first, used, row_block, kvh, q_first, q_len, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul,
    G: tl.constexpr, NUM_KV_HEADS: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums slots first … first + used of a block of rows, ROWS at a time, one slot after the other."""
    LOG2E: tl.constexpr = 1.4426950408889634
    H: tl.constexpr = G * NUM_KV_HEADS
    offs_c = tl.arange(0, BLOCK_C)
    step = max_q_len.to(tl.int64) * H  # rows a piece
    for r0 in tl.range(0, BLOCK_M, ROWS, num_stages=1):
        offs_m = row_block * BLOCK_M + r0 + tl.arange(0, ROWS)
        row_ok = offs_m < q_len * G
        tok = offs_m // G
        head = kvh * G + offs_m % G
        ok = row_ok[:, None] & (offs_c < C)[None, :]
        row = (first.to(tl.int64) * max_q_len + tok) * H + head
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
        for s in tl.range(0, used, num_stages=1):
            rows = row + s * step
            lse = tl.load(part_lse_ptr + rows, mask=row_ok, other=float("-inf"))
            part = tl.load(part_ptr + (rows * C)[:, None] + offs_c[None, :], mask=ok, other=0.0)
            higher = tl.maximum(top, lse)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(lse - shift)
            alpha = tl.exp2(top - shift)
            acc = acc * alpha[:, None] + part * weight[:, None]
            total = total * alpha + weight
            top = higher
        shift = tl.where(top == float("-inf"), 0.0, top)
        denominator = total
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row_ok, other=0.0) * LOG2E
            denominator += tl.exp2(tl.minimum(sink - shift, 126.0))
        o = tl.where((total > 0)[:, None], acc / denominator[:, None], 0.0)
        q_tok = (q_first + tok).to(tl.int64)
        p_out = out_ptr + q_tok * out_stride_t + head * out_stride_h
        tl.store(p_out[:, None] + offs_c[None, :], o.to(out_ptr.dtype.element_ty), mask=ok)
        if HAS_LSE:
            p_lse = lse_ptr + q_tok * lse_stride_t + head * lse_stride_h
            tl.store(p_lse, (shift + tl.log2(total)) * lse_mul, mask=row_ok)


@triton.jit
def decode_persistent(
    q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr, scales_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr, sums_ptr, arrivals_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h,
    kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page, kpe_stride_tok, kpe_stride_head, table_stride,
    scales_stride_page, scales_stride_tok, scales_stride_head, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
    G: tl.constexpr, NUM_KV_HEADS: tl.constexpr, MULTI: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, TMA: tl.constexpr, MASKED_FIRST: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, CP: tl.constexpr, HAS_LENS: tl.constexpr, HAS_LSE: tl.constexpr,
    COMPUTE: tl.constexpr, DECODE: tl.constexpr, Q_DECODE: tl.constexpr, QK_NATIVE: tl.constexpr,
    UNIT: tl.constexpr, LEAST_M: tl.constexpr, FOLD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program of a group: one block of rows of one KV head over all pieces of the group.

    FOLD: the last of a sequence's programs sums its partials, ROWS rows at a time. LEAST_M: least BLOCK_M of all.
    """
    row_blocks = tl.cdiv(max_q_len * G, BLOCK_M)
    pid = tl.program_id(0)
    row_block = pid % row_blocks
    kvh = (pid // row_blocks) % NUM_KV_HEADS
    group = pid // (row_blocks * NUM_KV_HEADS)
    groups = tl.num_programs(0) // (row_blocks * NUM_KV_HEADS)
    _write_empty(group, groups, batch, row_block, kvh, qo_indptr_ptr, out_ptr, lse_ptr, sums_ptr, out_stride_t,
                 out_stride_h, lse_stride_t, lse_stride_h, max_q_len, G, C, BLOCK_M, BLOCK_C, HAS_LSE)  # fmt: skip
    for i in tl.range(tl.load(groups_ptr + group), tl.load(groups_ptr + group + 1), num_stages=1):
        piece = tl.zeros((), tl.int32) + i  # a tensor in the interpreter too
        b = tl.load(info_ptr + 4 * piece)
        parts = tl.load(info_ptr + 4 * piece + 3)
        if parts > 0:
            if kv_indptr_ptr is None:
                pages_ptr = table_ptr + b.to(tl.int64) * table_stride
            else:
                pages_ptr = table_ptr + tl.load(kv_indptr_ptr + b).to(tl.int64)
            q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
            length = _lengths(b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
            kv_len = _visible(length, cp_rank, cp_world, CP)
            first_tile = tl.load(info_ptr + 4 * piece + 1) * (UNIT // BLOCK_N)
            last_tile = tl.load(info_ptr + 4 * piece + 2) * (UNIT // BLOCK_N)
            if UNIT != BLOCK_N:
                last_tile = tl.minimum(last_tile, tl.cdiv(kv_len, BLOCK_N))
            if row_block * BLOCK_M < q_len * G:
                _piece(piece, row_block, kvh, pages_ptr, length, kv_len, q_first, q_len, first_tile, last_tile,
                       parts == 1, q_ptr, q_pe_ptr, kv_ptr, kpe_ptr, kv_desc, kpe_desc, sinks_ptr, q_scale_ptr,
                       kv_scale_ptr, scales_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_t, q_stride_h,
                       q_pe_stride_t, q_pe_stride_h, kv_stride_page, kv_stride_tok, kv_stride_head, kpe_stride_page,
                       kpe_stride_tok, kpe_stride_head, scales_stride_page, scales_stride_tok, scales_stride_head,
                       out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, max_q_len, cp_rank, cp_world, qk_scale,
                       v_scale, logit_cap, lse_mul, G, NUM_KV_HEADS, MULTI, C, R, PAGE, BLOCK_M, BLOCK_N, BLOCK_C,
                       BLOCK_R, STAGES, TMA, MASKED_FIRST, CAUSAL, CAP, CP, HAS_LSE, COMPUTE, DECODE, Q_DECODE,
                       QK_NATIVE)  # fmt: skip
                if FOLD:  # noqa: SIM102  known to the compiler, `parts` is not
                    if parts > 1:
                        tl.debug_barrier()  # every thread's partials are stored before the one that counts says so
                        counts = tl.cdiv(max_q_len * G, LEAST_M)
                        p_count = arrivals_ptr + (b * NUM_KV_HEADS + kvh) * counts + row_block
                        before = tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
                        if before == parts - 1:
                            tl.store(p_count, 0)
                            _sum_rows(tl.load(sums_ptr + 3 * b), parts, row_block, kvh, q_first, q_len, sinks_ptr,
                                      out_ptr, lse_ptr, part_ptr, part_lse_ptr, out_stride_t, out_stride_h,
                                      lse_stride_t, lse_stride_h, max_q_len, lse_mul, G, NUM_KV_HEADS, C, BLOCK_M,
                                      BLOCK_C, ROWS, HAS_LSE)  # fmt: skip


@triton.jit
def combine_listed(
    qo_indptr_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, sums_ptr,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, batch, max_q_len, lse_mul,
    H: tl.constexpr, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Sums the partials of a token of each turns-th sequence, as `combine` does; which they are, `sums_ptr` says.

    There are no more turns than the device holds: what has nothing to sum, such as a graph's padding, costs a look.
    """
    FLAGS: tl.constexpr = 32
    COLUMNS: tl.constexpr = (C + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    column = pid % COLUMNS
    group = (pid // COLUMNS) % GROUPS
    tok = (pid // (COLUMNS * GROUPS)) % max_q_len
    turn = pid // (COLUMNS * GROUPS * max_q_len)
    turns = tl.num_programs(0) // (COLUMNS * GROUPS * max_q_len)
    offs = tl.arange(0, FLAGS)
    for b0 in tl.range(turn, batch, turns * FLAGS, num_stages=1):
        b = b0 + turns * offs
        cut = tl.load(sums_ptr + 3 * b + 1, mask=b < batch, other=0) > 1
        found = tl.sum(tl.where(cut, 1, 0) << offs, 0)  # a bit a sequence
        if found != 0:
            for k in tl.range(0, FLAGS, num_stages=1):
                if ((found >> k) & 1) != 0:
                    each = b0 + turns * k
                    q_first, q_len = _tokens(each, qo_indptr_ptr, max_q_len)
                    if tok < q_len:
                        _sum_pieces(tl.load(sums_ptr + 3 * each), tl.load(sums_ptr + 3 * each + 1), q_first + tok, tok,
                                    group, column, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, out_stride_t,
                                    out_stride_h, lse_stride_t, lse_stride_h, max_q_len, lse_mul, H, C, BLOCK_S,
                                    BLOCK_H, BLOCK_D, HAS_LSE)  # fmt: skip
