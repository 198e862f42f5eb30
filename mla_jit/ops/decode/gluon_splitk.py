"""Split-K MLA decode for Hopper in Gluon: stage 1 (`decode_splitk_gluon`). Imports triton only.

A program owns 64 packed rows (query token × head) of one sequence and KV head, and one split of its tokens, as in
triton_splitk.py; partials, LSE and the combine are the same. Inside it three roles run at once:

* a producer warp copies tiles of 64 tokens ([64, C + R], boxes of 64 × 64) into two buffers, a barrier a box;
* consumers 0 and 1, a warpgroup each, hold columns [0, C/2) and [C/2, C) of O. Consumer b computes the whole S of tile
  2j + b, its softmax and P. P goes over the rope box of the tile, which is no longer needed then, and the row maxima to
  shared memory; so each adds both tiles' P·V to its half:

    consumer 0:  S0  m0 P0 ─publish─ O·a += P0·V0 ─────────────────── wait ─ O·a += P1·V1
    consumer 1:  S1 ─────── wait m0 ─ O·a += P0·V0  (m1 P1 ─publish─) O·a += P1·V1

The two run in lockstep half a pair apart, so that one's exponentials hide behind the other's matrix products. All tiles go
through one loop: a tile that some row may not see whole is masked there; rows of V past the end are zeroed in shared
memory, since unused slots may hold NaN; an odd last tile is followed by an empty one that is not copied.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in triton 3.7


@gluon.jit
def _seq_bounds(b, lens_ptr, indptr_ptr, last_ptr, HAS_LENS: gl.constexpr, PAGE: gl.constexpr):
    """(length of sequence b in tokens, its first slot in kv_indices)."""
    first = gl.to_tensor(0).to(gl.int64)
    if indptr_ptr is not None:
        start = gl.load(indptr_ptr + b)
        first = start.to(gl.int64)
    if HAS_LENS:
        length = gl.load(lens_ptr + b).to(gl.int32)
    else:
        pages = (gl.load(indptr_ptr + b + 1) - start).to(gl.int32)
        length = pages * 0
        if pages > 0:
            length = (pages - 1) * PAGE + gl.load(last_ptr + b).to(gl.int32)
    return gl.maximum(length, 0), first


@gluon.jit
def _visible(limit, cp_rank, cp_world, CP: gl.constexpr):
    """How many tokens of this rank's share of the sequence lie below the global position `limit`."""
    if CP:
        limit = (limit - cp_rank + cp_world - 1) // cp_world
    return gl.maximum(limit, 0)


@gluon.jit
def _mbarrier(count: gl.constexpr):
    """A barrier of its own allocation: the compiler then sees that waits on two of them do not conflict."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=count)
    return bar


@gluon.jit
def _row():
    return gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _produce(kv_desc, kpe_desc, pages_ptr, first_tile, last_tile, kv_col, pe_col, k_smem, full, empty,
             C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Feeds both buffers: first the half of the latent that the tile's owner multiplies as V, then the rest and the rope."""
    BOXES: gl.constexpr = C // 64
    STAGE: gl.constexpr = BOXES + 1
    HALF: gl.constexpr = BOXES // 2
    TILES: gl.constexpr = PAGE // 64
    BYTES: gl.constexpr = HALF * 8192
    pairs = (last_tile - first_tile + 1) // 2
    for j in range(pairs):
        for b in gl.static_range(2):
            tile = first_tile + 2 * j + b
            real = tile < last_tile
            page = gl.load(pages_ptr + gl.minimum(tile, last_tile - 1) // TILES).to(gl.int32)
            row = page * PAGE + (tile % TILES) * 64
            for g in gl.static_range(2):
                bar = full[2 * b + g]
                mbarrier.wait(empty[2 * b + (b + g) % 2], (j & 1) ^ 1)
                if g == 1 and R > 0:
                    mbarrier.expect(bar, BYTES + 8192, pred=real)
                else:
                    mbarrier.expect(bar, BYTES, pred=real)
                for i in gl.static_range(HALF):
                    c = (b + g) % 2 * HALF + i
                    tma.async_copy_global_to_shared(kv_desc, [row, kv_col + c * 64], bar, k_smem.index(b * STAGE + c), pred=real)
                if g == 1 and R > 0:
                    tma.async_copy_global_to_shared(kpe_desc, [row, pe_col], bar, k_smem.index(b * STAGE + BOXES), pred=real)
                mbarrier.arrive(bar, count=1, pred=not real)


@gluon.jit
def _consume(HALF_ID: gl.constexpr, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
             q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
             row_block, kvh, q_first, q_len, length, kv_len, first_tile, last_tile, clear_end, whole, piece_row,
             cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
             q_smem, k_smem, m_smem, full, empty, ready, sync,
             G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
             MASKED: gl.constexpr, CAP: gl.constexpr, CP: gl.constexpr, HAS_LSE: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    LOG2E: gl.constexpr = 1.4426950408889634
    b: gl.constexpr = HALF_ID
    o: gl.constexpr = 1 - b
    BOXES: gl.constexpr = C // 64
    STAGE: gl.constexpr = BOXES + 1
    HALF: gl.constexpr = BOXES // 2
    WIDTH: gl.constexpr = C // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SMEM: gl.constexpr = k_smem.layout
    dtype: gl.constexpr = k_smem.dtype

    # q: each consumer brings its half of the boxes
    rows = row_block * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    cols = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    q_ok = gl.expand_dims(rows < q_len * G, 1)
    q_tok = (q_first + rows // G).to(gl.int64)
    q_head = kvh * G + rows % G
    q_at = gl.expand_dims(q_tok * q_stride_t + q_head * q_stride_h, 1) + gl.expand_dims(cols, 0)
    for i in gl.static_range(HALF):
        q_smem.index(b * HALF + i).store(gl.load(q_ptr + q_at + (b * HALF + i) * 64, mask=q_ok, other=0.0))
    if R > 0 and b == 0:
        pe_at = gl.expand_dims(q_tok * q_pe_stride_t + q_head * q_pe_stride_h, 1) + gl.expand_dims(cols, 0)
        q_smem.index(BOXES).store(gl.load(q_pe_ptr + pe_at, mask=q_ok, other=0.0))
    fence_async_shared()
    _barrier()
    mbarrier.arrive(sync[0], count=1)

    offs = row_block * 64 + gl.arange(0, 64, S_ROW)
    row_end = gl.full([64], 0, gl.int32, S_ROW) + kv_len
    if MASKED:
        row_end = gl.minimum(_visible(length - q_len + 1 + offs // G, cp_rank, cp_world, CP), row_end)
    keys = gl.arange(0, 64, gl.SliceLayout(0, S_LAYOUT))
    scale = qk_scale * LOG2E
    if CAP:
        scale = gl.to_tensor(1.0)
    acc = gl.zeros([64, WIDTH], gl.float32, O_LAYOUT)
    m = gl.full([64], -1.0e30, gl.float32, S_ROW)
    l = gl.zeros([64], gl.float32, S_ROW)
    mbarrier.wait(sync[0], 0)

    pairs = (last_tile - first_tile + 1) // 2
    for j in range(pairs):
        phase = j & 1
        n0 = (first_tile + 2 * j + b) * 64
        z = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
        v_own = k_smem.index(z + b * STAGE + b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        v_other = k_smem.index(z + o * STAGE + b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        k_rest = k_smem.index(z + b * STAGE + o * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        q_own = q_smem.index(z + b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        q_rest = q_smem.index(z + o * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        p_own = k_smem.index(z + b * STAGE + BOXES)
        p_other = k_smem.index(z + o * STAGE + BOXES)
        s = gl.zeros([64, 64], gl.float32, S_LAYOUT)
        mbarrier.wait(full[2 * b], phase)
        s = warpgroup_mma(q_own, v_own.permute((1, 0)), s, use_acc=False, is_async=True)
        mbarrier.wait(full[2 * b + 1], phase)
        s = warpgroup_mma(q_rest, k_rest.permute((1, 0)), s, is_async=True)
        if R > 0:
            s = warpgroup_mma(q_smem.index(z + BOXES), p_own.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if CAP:
            # cap·tanh(x/cap), as 2·sigmoid(2x) - 1
            s = logit_cap * (2.0 / (1.0 + gl.exp2(s * (-2.0 * LOG2E * qk_scale / logit_cap))) - 1.0) * LOG2E
        if n0 + 64 > clear_end:
            s = gl.where(gl.expand_dims(n0 + keys, 0) < gl.expand_dims(row_end, 1), s, float("-inf"))
        if n0 + 64 > kv_len:
            tail = n0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS)) < kv_len
            for i in gl.static_range(BOXES):
                box = k_smem.index(b * STAGE + i)
                box.store(gl.where(gl.expand_dims(tail, 1), box.load(ROWS), 0.0))
        top = gl.max(s, 1) * scale
        if b == 1:
            mbarrier.wait(ready[0], phase)
            m_new = m_smem[0].load(S_ROW)
            alpha = gl.exp2(m - m_new)
            l = l * alpha
            m = m_new
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
            acc = warpgroup_mma(p_other, v_other, acc, is_async=True)
        m_new = gl.maximum(m, top)
        p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
        alpha = gl.exp2(m - m_new)
        l = l * alpha + gl.sum(p, 1)
        m = m_new
        p16 = p.to(dtype)
        p_own.store(p16)
        m_smem[b].store(m)
        fence_async_shared()
        _barrier()
        mbarrier.arrive(ready[b], count=1)
        p16 = gl.convert_layout(p16, P_LAYOUT, assert_trivial=True)
        alpha = gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
        if b == 1:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _barrier()
            mbarrier.arrive(empty[2 * o + b], count=1)
            acc = acc * alpha
            acc = warpgroup_mma(p16, v_own, acc, is_async=True)
            acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
            _barrier()
            mbarrier.arrive(empty[2 * b + b], count=1)
        else:
            acc = acc * alpha
            acc = warpgroup_mma(p16, v_own, acc, is_async=True)
            acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
            _barrier()
            mbarrier.arrive(empty[2 * b + b], count=1)
            mbarrier.wait(ready[1], phase)
            m_new = m_smem[1].load(S_ROW)
            alpha = gl.exp2(m - m_new)
            l = l * alpha
            m = m_new
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
            acc = warpgroup_mma(p_other, v_other, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _barrier()
            mbarrier.arrive(empty[2 * o + b], count=1)

    # l of the even tiles and of the odd ones
    if PDL:
        gdc_launch_dependents()
    m_smem[2 + b].store(l)
    _barrier()
    mbarrier.arrive(sync[1 + b], count=1)
    mbarrier.wait(sync[1 + o], 0)
    l += m_smem[2 + o].load(S_ROW)
    row_ok = offs < q_len * G
    tok = offs // G
    head = kvh * G + offs % G
    denominator = l
    if sinks_ptr is not None:
        sink = gl.load(sinks_ptr + head, mask=row_ok, other=0.0) * LOG2E
        if whole:
            denominator += gl.exp2(gl.minimum(sink - m, 126.0))
    factor = gl.where(l > 0, v_scale / denominator, 0.0)
    lse = m + gl.log2(l)  # base 2; -inf for a row that saw nothing
    acc = acc * gl.expand_dims(gl.convert_layout(factor, O_ROW, assert_trivial=True), 1)
    o_rows = row_block * 64 + gl.arange(0, 64, O_ROW)
    o_ok = gl.expand_dims(o_rows < q_len * G, 1)
    o_tok = o_rows // G
    o_head = kvh * G + o_rows % G
    o_cols = gl.expand_dims(b * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, O_LAYOUT)), 0)
    if whole:
        at = (q_first + o_tok).to(gl.int64) * out_stride_t + o_head * out_stride_h
        gl.store(out_ptr + (gl.expand_dims(at, 1) + o_cols), acc.to(out_ptr.dtype.element_ty), mask=o_ok)
        if HAS_LSE and b == 0:
            gl.store(lse_ptr + (q_first + tok).to(gl.int64) * lse_stride_t + head * lse_stride_h, lse * lse_mul, mask=row_ok)
    else:
        at = piece_row + o_tok * (G * NUM_KV_HEADS) + o_head
        gl.store(part_ptr + (gl.expand_dims(at * C, 1) + o_cols), acc, mask=o_ok)
        if b == 0:
            gl.store(part_lse_ptr + piece_row + tok * (G * NUM_KV_HEADS) + head, lse, mask=row_ok)


@gluon.jit
def decode_splitk_gluon(
    q_ptr, q_pe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, kv_stride_head, kpe_stride_head, table_stride,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    max_q_len, num_splits, min_tiles, cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
    G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, MULTI: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    PAGE: gl.constexpr, PDL: gl.constexpr, CAUSAL: gl.constexpr, CAP: gl.constexpr, CP: gl.constexpr,
    HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, CONSUMER_REGS: gl.constexpr,
):  # fmt: skip
    row_blocks = (max_q_len * G + 63) // 64
    pid = gl.program_id(0)
    row_block = pid % row_blocks
    kvh = (pid // row_blocks) % NUM_KV_HEADS
    split = (pid // (row_blocks * NUM_KV_HEADS)) % num_splits
    b = pid // (row_blocks * NUM_KV_HEADS * num_splits)

    length, first = _seq_bounds(b, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
    if kv_indptr_ptr is None:
        pages_ptr = table_ptr + b.to(gl.int64) * table_stride
    else:
        pages_ptr = table_ptr + first
    if qo_indptr_ptr is None:
        q_len = max_q_len
        q_first = b * max_q_len
    else:
        q_first = gl.load(qo_indptr_ptr + b).to(gl.int32)
        q_len = gl.load(qo_indptr_ptr + b + 1).to(gl.int32) - q_first
    kv_len = _visible(length, cp_rank, cp_world, CP)
    tiles = (kv_len + 63) // 64
    per_split = gl.maximum((tiles + num_splits - 1) // num_splits, min_tiles)
    first_tile = split * per_split
    if (row_block * 64 >= q_len * G) or ((first_tile >= tiles) and (split > 0)):
        return
    last_tile = gl.minimum(first_tile + per_split, tiles)
    clear_end = kv_len  # keys below it are seen by every row
    if CAUSAL and MULTI:
        clear_end = gl.minimum(_visible(length - q_len + 1 + row_block * 64 // G, cp_rank, cp_world, CP), kv_len)
    if q_scale_ptr is not None:
        qk_scale *= gl.load(q_scale_ptr)
    if kv_scale_ptr is not None:
        kv_scale = gl.load(kv_scale_ptr)
        qk_scale *= kv_scale
        v_scale *= kv_scale
    piece_row = (b * num_splits + split).to(gl.int64) * (max_q_len * (G * NUM_KV_HEADS))
    whole = tiles <= per_split

    STAGE: gl.constexpr = C // 64 + 1
    SMEM: gl.constexpr = kv_desc.layout
    q_smem = gl.allocate_shared_memory(kv_desc.dtype, [STAGE, 64, 64], SMEM)
    k_smem = gl.allocate_shared_memory(kv_desc.dtype, [2 * STAGE, 64, 64], SMEM)
    m_smem = (_row(), _row(), _row(), _row())
    full = (_mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1))
    empty = (_mbarrier(1), _mbarrier(1), _mbarrier(1), _mbarrier(1))
    ready = (_mbarrier(1), _mbarrier(1))
    sync = (_mbarrier(2), _mbarrier(1), _mbarrier(1))
    fence_async_shared()

    kv_col = (kvh * kv_stride_head).to(gl.int32)
    pe_col = (kvh * kpe_stride_head).to(gl.int32)
    MASKED: gl.constexpr = CAUSAL and MULTI
    gl.warp_specialize(
        [
            (_produce, (kv_desc, kpe_desc, pages_ptr, first_tile, last_tile, kv_col, pe_col, k_smem, full, empty, C, R, PAGE)),
            (_consume, (0, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
                        q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
                        row_block, kvh, q_first, q_len, length, kv_len, first_tile, last_tile, clear_end, whole, piece_row,
                        cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
                        q_smem, k_smem, m_smem, full, empty, ready, sync,
                        G, NUM_KV_HEADS, C, R, MASKED, CAP, CP, HAS_LSE, PDL)),
            (_consume, (1, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
                        q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
                        row_block, kvh, q_first, q_len, length, kv_len, first_tile, last_tile, clear_end, whole, piece_row,
                        cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
                        q_smem, k_smem, m_smem, full, empty, ready, sync,
                        G, NUM_KV_HEADS, C, R, MASKED, CAP, CP, HAS_LSE, PDL)),
        ],
        [4, 4],
        [CONSUMER_REGS, CONSUMER_REGS],
    )  # fmt: skip
