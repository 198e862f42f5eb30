"""Persistent MLA decode for Hopper in Gluon: walks a work list in blocks of 64 rows. Imports triton only.

The list, partials and what follows are those of triton_persistent.py, a piece is computed as in gluon_splitk.py. A
program is a group of the list for one block of 64 packed rows (query token × head) and KV head; its three roles each
walk the group's pieces, and what they have counted carries on from piece to piece:

    producer:    tiles of a piece, of the next one …         as soon as a buffer is free, whatever piece it served
    consumers:   q │ tiles │ sums exchanged │ output │ q …   the next piece's first tiles arrive during output and q

A piece begins in buffer 0. One with an odd number of tiles leaves buffer 1 unused once more than buffer 0, so the
phases of a buffer's barriers are counted in uses of that buffer. Who has the other's sums knows that it has multiplied
its last tile: q may be overwritten then. O goes to memory from registers, whole sectors of fp32 or halves of them, so
that no buffer has to wait for it: 64 · C · 4 bytes of a piece that is part of a sequence.

Registers: a consumer's thread has 128 of O, 32 of S or 16 of P, maxima and sums, of 240; the producer has 24. Shared
memory: q and two tiles, 3·64·(C + R)·2 bytes, 216 KB at 512 + 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_jit.ops.decode.gluon_splitk import (
    _barrier,
    _box,
    _grown,
    _lengths,
    _mbarrier,
    _release,
    _rescale,
    _row,
    _scores,
    _visible,
    _weights,
    _zero,
)


@gluon.jit
def _tokens(b, qo_indptr_ptr, max_q_len):
    """(first query token of sequence b, how many it has)."""
    if qo_indptr_ptr is None:
        q_len = max_q_len
        q_first = b * max_q_len
    else:
        q_first = gl.load(qo_indptr_ptr + b).to(gl.int32)
        q_len = gl.load(qo_indptr_ptr + b + 1).to(gl.int32) - q_first
    return q_first, q_len


@gluon.jit
def _place(max_q_len, G: gl.constexpr, NUM_KV_HEADS: gl.constexpr):
    """(block of rows, KV head, group) of this program, each time anew: no register is kept for them."""
    row_blocks = gl.cdiv((max_q_len + _zero()) * G, 64)
    pid = gl.program_id(0) + _zero()
    return pid % row_blocks, (pid // row_blocks) % NUM_KV_HEADS, pid // (row_blocks * NUM_KV_HEADS)


@gluon.jit
def _write_empty(own: gl.constexpr, batch, qo_indptr_ptr, out_ptr, lse_ptr, sums_ptr, out_stride_t, out_stride_h,
                 lse_stride_t, lse_stride_h, max_q_len,
                 G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, C: gl.constexpr, HAS_LSE: gl.constexpr):  # fmt: skip
    """A consumer's half of what _write_empty of triton_persistent.py writes, for the same sequences."""
    FLAGS: gl.constexpr = 32
    WIDTH: gl.constexpr = C // 2
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row_block, kvh, group = _place(max_q_len, G, NUM_KV_HEADS)
    groups = gl.num_programs(0) // (gl.cdiv((max_q_len + _zero()) * G, 64) * NUM_KV_HEADS)
    offs = _zero() + gl.arange(0, FLAGS, gl.BlockedLayout([1], [32], [4], [0]))  # every warp has all
    rows = row_block * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    # a multiple of 64, which the compiler can tell: stores are of 16 bytes
    columns = gl.expand_dims(own * WIDTH + 64 * _zero() + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)), 0)
    nothing = gl.zeros([64, WIDTH], out_ptr.dtype.element_ty, LAYOUT)
    for b0 in range(group, batch, groups * FLAGS):
        b = b0 + groups * offs
        parts = gl.load(sums_ptr + 3 * b + 1, mask=b < batch, other=1)
        empty = parts == 0
        if qo_indptr_ptr is not None:  # and has query tokens, which the padding of a graph has not
            begin = gl.load(qo_indptr_ptr + b, mask=b < batch, other=0)
            empty &= gl.load(qo_indptr_ptr + b + 1, mask=b < batch, other=0) > begin
        found = gl.sum(gl.where(empty, 1, 0) << offs, 0)  # a bit a sequence
        if found != 0:
            for k in range(FLAGS):
                if ((found >> k) & 1) != 0:
                    q_first, q_len = _tokens(b0 + groups * k, qo_indptr_ptr, max_q_len)
                    ok = rows < q_len * G
                    tok = (q_first + rows // G).to(gl.int64)
                    head = kvh * G + rows % G
                    at = gl.expand_dims(tok * out_stride_t + head * out_stride_h, 1)
                    gl.store(out_ptr + (at + columns), nothing, mask=gl.expand_dims(ok, 1))
                    if HAS_LSE and own == 0:
                        lse = gl.full([64], float("-inf"), gl.float32, rows.type.layout)
                        gl.store(lse_ptr + (tok * lse_stride_t + head * lse_stride_h), lse, mask=ok)


@gluon.jit
def _produce_listed(kv_desc, kpe_desc, table_ptr, kv_indptr_ptr, qo_indptr_ptr, groups_ptr, info_ptr, table_stride,
                    max_q_len, group, row_block, kv_col, pe_col, k_smem, full, empty,
                    G: gl.constexpr, C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Feeds the buffers with the tiles of all pieces; half a buffer is free when its consumer is done with it."""
    BOXES: gl.constexpr = C // 64
    HALF: gl.constexpr = BOXES // 2
    STAGE: gl.constexpr = BOXES + (1 if R > 0 else 0)
    TILES: gl.constexpr = PAGE // 64
    used0 = gl.to_tensor(0)  # of buffer 0, and 1
    used1 = gl.to_tensor(0)
    for piece in range(gl.load(groups_ptr + group), gl.load(groups_ptr + group + 1)):
        b = gl.load(info_ptr + 4 * piece)
        first_tile = gl.load(info_ptr + 4 * piece + 1)
        last_tile = gl.load(info_ptr + 4 * piece + 2)
        parts = gl.load(info_ptr + 4 * piece + 3)
        _, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
        if (parts > 0) & (row_block * 64 < q_len * G):
            if kv_indptr_ptr is None:
                pages_ptr = table_ptr + b.to(gl.int64) * table_stride
            else:
                pages_ptr = table_ptr + gl.load(kv_indptr_ptr + b).to(gl.int64)
            for tile0 in range(first_tile, last_tile, 2):
                for buffer in gl.static_range(2):
                    tile = tile0 + buffer
                    real = tile < last_tile
                    page = gl.load(pages_ptr + gl.minimum(tile, last_tile - 1) // TILES).to(gl.int32)
                    row = page * PAGE + (tile % TILES) * 64
                    used = used0 if buffer == 0 else used1
                    for i in gl.static_range(STAGE):
                        c = _box(buffer, i, BOXES)
                        if i % HALF == 0 and i < BOXES:
                            mbarrier.wait(empty[2 * buffer + (buffer + i // HALF) % 2], (used & 1) ^ 1, pred=real)
                        bar = full[buffer * 9 + i]
                        mbarrier.expect(bar, 8192, pred=real)
                        if i < BOXES:
                            tma.async_copy_global_to_shared(
                                kv_desc, [row, kv_col + c * 64], bar, k_smem.index(buffer * (BOXES + 1) + c), pred=real
                            )
                        else:
                            tma.async_copy_global_to_shared(
                                kpe_desc, [row, pe_col], bar, k_smem.index(buffer * (BOXES + 1) + c), pred=real
                            )
                used0 += 1
                used1 += (tile0 + 1 < last_tile).to(gl.int32)


@gluon.jit
def _consume_listed(HALF_ID: gl.constexpr, q_ptr, q_pe_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr,
                    out_ptr, lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr, sums_ptr, q_stride_t, q_stride_h,
                    q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, batch,
                    max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
                    q_smem, k_smem, m_smem, full, empty, ready, sync,
                    G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr,
                    MASKED: gl.constexpr, CAP: gl.constexpr, CP: gl.constexpr, HAS_LENS: gl.constexpr,
                    HAS_LSE: gl.constexpr, LAZY: gl.constexpr):  # fmt: skip
    """Half of the columns of O of all pieces, one after the other."""
    LOG2E: gl.constexpr = 1.4426950408889634
    own: gl.constexpr = HALF_ID
    o: gl.constexpr = 1 - own
    BOXES: gl.constexpr = C // 64
    HALF: gl.constexpr = BOXES // 2
    STAGE: gl.constexpr = BOXES + (1 if R > 0 else 0)
    WIDTH: gl.constexpr = C // 2
    H: gl.constexpr = G * NUM_KV_HEADS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SMEM: gl.constexpr = k_smem.layout
    dtype: gl.constexpr = k_smem.dtype

    _write_empty(own, batch, qo_indptr_ptr, out_ptr, lse_ptr, sums_ptr, out_stride_t, out_stride_h, lse_stride_t,
                 lse_stride_h, max_q_len, G, NUM_KV_HEADS, C, HAS_LSE)  # fmt: skip
    _, _, group = _place(max_q_len, G, NUM_KV_HEADS)
    phases = gl.to_tensor(0)  # bits: of the barriers of buffer 0, of buffer 1, of those of a piece
    for piece in range(gl.load(groups_ptr + group), gl.load(groups_ptr + group + 1)):
        row_block, kvh, _ = _place(max_q_len, G, NUM_KV_HEADS)
        b = gl.load(info_ptr + 4 * piece)
        first_tile = gl.load(info_ptr + 4 * piece + 1)
        last_tile = gl.load(info_ptr + 4 * piece + 2)
        parts = gl.load(info_ptr + 4 * piece + 3)
        q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
        if (parts > 0) & (row_block * 64 < q_len * G):
            # q: each consumer brings its half of the boxes; all loads are on their way before the first store
            first_row = row_block * 64 + _zero()  # so that nothing of it is kept in registers from piece to piece
            rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
            cols = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
            q_ok = gl.expand_dims(rows < q_len * G, 1)
            q_tok = (q_first + rows // G).to(gl.int64)
            q_head = kvh * G + rows % G
            q_at = gl.expand_dims(q_tok * q_stride_t + q_head * q_stride_h, 1) + gl.expand_dims(cols, 0)
            q = ()
            for i in gl.static_range(HALF):
                q = q + (gl.load(q_ptr + q_at + (own * HALF + i) * 64, mask=q_ok, other=0.0),)  # noqa: RUF005
            if R > 0 and own == 0:
                pe_at = gl.expand_dims(q_tok * q_pe_stride_t + q_head * q_pe_stride_h, 1) + gl.expand_dims(cols, 0)
                q = q + (gl.load(q_pe_ptr + pe_at, mask=q_ok, other=0.0),)  # noqa: RUF005
            for i in gl.static_range(HALF):
                q_smem.index(_zero() + own * HALF + i).store(q[i])
            if R > 0 and own == 0:
                q_smem.index(_zero() + BOXES).store(q[HALF])
            fence_async_shared()
            _barrier()
            mbarrier.arrive(sync[0], count=1)

            length = _lengths(b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
            kv_end = gl.minimum(_visible(length, cp_rank, cp_world, CP), last_tile * 64)
            clear_end = kv_end  # every row sees the tokens below it
            offs = first_row + gl.arange(0, 64, S_ROW)
            row_end = gl.full([64], 0, gl.int32, S_ROW) + kv_end
            if MASKED:
                clear = _visible(length - q_len + 1 + row_block * 64 // G, cp_rank, cp_world, CP)
                clear_end = gl.minimum(clear, kv_end)
                row_end = gl.minimum(_visible(length - q_len + 1 + offs // G, cp_rank, cp_world, CP), row_end)
            scale = qk_scale * LOG2E
            if CAP:
                scale = gl.to_tensor(1.0)
            acc = gl.zeros([64, WIDTH], gl.float32, O_LAYOUT)
            m = gl.full([64], -1.0e30, gl.float32, S_ROW)  # finite: a row that has seen nothing yet has P = 0 and l = 0
            l = gl.zeros([64], gl.float32, S_ROW)
            m_all = gl.full([64], -1.0e30, gl.float32, gl.BlockedLayout([2], [32], [4], [0]))
            mbarrier.wait(sync[0], (phases >> 2) & 1)

            for first_token in range(first_tile * 64, (last_tile - 1) * 64, 128):  # of a pair of tiles
                phase0 = phases & 1
                phase1 = (phases >> 1) & 1
                n0 = first_token + own * 64
                # so descriptors are computed here, not kept in registers that the loop has not
                z = _zero()
                v_own = k_smem.index(z + own * (BOXES + 1) + own * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
                v_other = k_smem.index(z + o * (BOXES + 1) + own * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
                p_own = k_smem.index(z + own * (BOXES + 1) + BOXES)
                p_other = k_smem.index(z + o * (BOXES + 1) + BOXES)
                s = _scores(own, phase0 if own == 0 else phase1, n0, z, q_smem, k_smem, full, kv_end, clear_end,
                            row_end, qk_scale, logit_cap, BOXES, STAGE, S_LAYOUT, CAP)  # fmt: skip
                if own == 0:
                    p, alpha, m, l = _weights(s, scale, m, l, p_own, m_smem[0], ready[0], LAZY)
                    grown, m_all = _grown(m_smem[0], m_all, LAZY)
                    if not LAZY or grown:
                        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
                    p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
                    acc = warpgroup_mma(p, v_own, acc, is_async=True)
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    _release(empty[0])
                    mbarrier.wait(ready[1], phase1)
                    m_new = m_smem[1].load(S_ROW)
                    grown, m_all = _grown(m_smem[1], m_all, LAZY)
                    acc, l = _rescale(acc, l, m, m_new, grown, LAZY)
                    m = m_new
                    acc = warpgroup_mma(p_other, v_other, acc, is_async=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    _release(empty[2])
                else:
                    mbarrier.wait(ready[0], phase0)
                    m_new = m_smem[0].load(S_ROW)
                    grown, m_all = _grown(m_smem[0], m_all, LAZY)
                    acc, l = _rescale(acc, l, m, m_new, grown, LAZY)
                    m = m_new
                    acc = warpgroup_mma(p_other, v_other, acc, is_async=True)
                    p, alpha, m, l = _weights(s, scale, m, l, p_own, m_smem[1], ready[1], LAZY)
                    grown, m_all = _grown(m_smem[1], m_all, LAZY)
                    p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                    _release(empty[1])
                    if not LAZY or grown:
                        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
                    acc = warpgroup_mma(p, v_own, acc, is_async=True)
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    _release(empty[3])
                phases ^= 3

            # read again, here and below, so that they need not be kept while tiles are multiplied
            z = _zero()
            first_tile = gl.load(info_ptr + 4 * (piece + z) + 1)
            last_tile = gl.load(info_ptr + 4 * (piece + z) + 2)
            if (last_tile - first_tile) % 2 == 1:  # an odd tile, in buffer 0
                phase = phases & 1
                v_last = k_smem.index(z + own * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
                if own == 0:
                    s = _scores(0, phase, (last_tile - 1) * 64, z, q_smem, k_smem, full, kv_end, clear_end,
                                row_end, qk_scale, logit_cap, BOXES, STAGE, S_LAYOUT, CAP)  # fmt: skip
                    p, alpha, m, l = _weights(s, scale, m, l, k_smem.index(z + BOXES), m_smem[0], ready[0], LAZY)
                    acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
                else:
                    mbarrier.wait(ready[0], phase)
                    m_new = m_smem[0].load(S_ROW)
                    acc, l = _rescale(acc, l, m, m_new, True, LAZY)
                    m = m_new
                acc = warpgroup_mma(k_smem.index(z + BOXES), v_last, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                _release(empty[own])
                phases ^= 1

            # each has summed the weights of its own tiles
            m_smem[2 + own].store(l)
            _barrier()
            mbarrier.arrive(sync[1 + own], count=1)
            mbarrier.wait(sync[1 + o], (phases >> 2) & 1)
            phases ^= 4
            l += m_smem[2 + o].load(S_ROW)
            z = _zero()
            row_block, kvh, _ = _place(max_q_len, G, NUM_KV_HEADS)
            b = gl.load(info_ptr + 4 * (piece + z))
            whole = gl.load(info_ptr + 4 * (piece + z) + 3) == 1
            q_first, q_len = _tokens(b, qo_indptr_ptr, max_q_len)
            offs = row_block * 64 + z + gl.arange(0, 64, S_ROW)
            row_ok = offs < q_len * G
            tok = offs // G
            head = kvh * G + offs % G
            denominator = l
            if sinks_ptr is not None:
                sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0) * LOG2E
                if whole:
                    denominator += gl.exp2(gl.minimum(sink - m, 126.0))
            norm = gl.where(l > 0, v_scale / denominator, 0.0)
            lse = m + gl.log2(l)  # base 2; -inf for a row that saw nothing
            acc = acc * gl.expand_dims(gl.convert_layout(norm, O_ROW, assert_trivial=True), 1)
            o_rows = row_block * 64 + z + gl.arange(0, 64, O_ROW)
            o_ok = gl.expand_dims(o_rows < q_len * G, 1)
            # a multiple of 64, which the compiler can tell: stores are of two columns, not of one
            o_cols = gl.expand_dims(own * WIDTH + 64 * z + gl.arange(0, WIDTH, gl.SliceLayout(0, O_LAYOUT)), 0)
            o_tok = o_rows // G
            o_head = kvh * G + o_rows % G
            if whole:
                at = (q_first + o_tok).to(gl.int64) * out_stride_t + o_head * out_stride_h
                gl.store(out_ptr + (gl.expand_dims(at, 1) + o_cols), acc.to(out_ptr.dtype.element_ty), mask=o_ok)
                if HAS_LSE and own == 0:
                    gl.store(
                        lse_ptr + (q_first + tok).to(gl.int64) * lse_stride_t + head * lse_stride_h,
                        lse * lse_mul,
                        mask=row_ok,
                    )
            else:
                slot = piece.to(gl.int64) * (max_q_len * H)
                gl.store(
                    part_ptr + (gl.expand_dims((slot + (o_tok * H + o_head)) * C, 1) + o_cols), acc, mask=o_ok
                )  # fmt: skip
                if own == 0:
                    gl.store(part_lse_ptr + (slot + tok * H + head), lse, mask=row_ok)


@gluon.jit
def decode_persistent_gluon(
    q_ptr, q_pe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr, sums_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, kv_stride_head, kpe_stride_head, table_stride,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
    G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, MULTI: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    PAGE: gl.constexpr, LAZY: gl.constexpr, CAUSAL: gl.constexpr, CAP: gl.constexpr, CP: gl.constexpr,
    HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A program of a group: one block of rows of one KV head over all pieces of the group."""
    row_block, kvh, group = _place(max_q_len, G, NUM_KV_HEADS)
    if q_scale_ptr is not None:
        qk_scale *= gl.load(q_scale_ptr)
    if kv_scale_ptr is not None:
        kv_scale = gl.load(kv_scale_ptr)
        qk_scale *= kv_scale
        v_scale *= kv_scale

    STAGE: gl.constexpr = C // 64 + 1
    MASKED: gl.constexpr = CAUSAL and MULTI
    q_smem = gl.allocate_shared_memory(kv_desc.dtype, [STAGE, 64, 64], kv_desc.layout)
    k_smem = gl.allocate_shared_memory(kv_desc.dtype, [2 * STAGE, 64, 64], kv_desc.layout)
    m_smem = (_row(), _row(), _row(), _row())  # maxima of consumers 0 and 1, then their sums
    full = (
        _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1),
        _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1),
        _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1),
    )  # fmt: skip
    empty = (_mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1))  # (buffer, half of V)
    ready = (_mbarrier(1), _mbarrier(1))
    sync = (_mbarrier(2), _mbarrier(1), _mbarrier(1))  # q is there; the sums of consumers 0 and 1
    fence_async_shared()
    kv_col = (kvh * kv_stride_head).to(gl.int32)
    pe_col = (kvh * kpe_stride_head).to(gl.int32)
    gl.warp_specialize(
        [
            (_consume_listed, (0, q_ptr, q_pe_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, out_ptr,
                               lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr, sums_ptr, q_stride_t, q_stride_h,
                               q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
                               batch, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, q_smem,
                               k_smem, m_smem, full, empty, ready, sync, G, NUM_KV_HEADS, C, R, PAGE, MASKED, CAP, CP,
                               HAS_LENS, HAS_LSE, LAZY)),
            (_consume_listed, (1, q_ptr, q_pe_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, out_ptr,
                               lse_ptr, part_ptr, part_lse_ptr, groups_ptr, info_ptr, sums_ptr, q_stride_t, q_stride_h,
                               q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
                               batch, max_q_len, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, q_smem,
                               k_smem, m_smem, full, empty, ready, sync, G, NUM_KV_HEADS, C, R, PAGE, MASKED, CAP, CP,
                               HAS_LENS, HAS_LSE, LAZY)),
            (_produce_listed, (kv_desc, kpe_desc, table_ptr, kv_indptr_ptr, qo_indptr_ptr, groups_ptr, info_ptr,
                               table_stride, max_q_len, group, row_block, kv_col, pe_col, k_smem, full, empty, G, C, R,
                               PAGE)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
