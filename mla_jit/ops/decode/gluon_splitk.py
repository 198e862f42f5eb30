"""Split-K MLA decode for Hopper in Gluon: stage 1 for blocks of 64 rows (`decode_splitk_gluon`). Imports triton only.

A program owns 64 packed rows (query token × head) of one sequence and KV head, and one piece of its tokens. Pieces,
partials and LSE are those of triton_splitk.py and triton_pieces.py; triton_combine.py follows. In a program three roles
run at once:

* a producer warp copies tiles of 64 tokens, in boxes of 64 × 64 with a barrier each, into two buffers of [64, C + R];
* consumers 0 and 1, a warpgroup each, hold columns [0, C/2) and [C/2, C) of O. Consumer b computes the whole S of tile
  2j + b, its maxima and P. P goes over the rope box of the tile, which is no longer needed then, and the maxima to
  shared memory; so each adds both tiles' P·V to its half:

    consumer 0:  S0  m0 P0 ─publish─  O·a += P0·V0 ──────────── wait ──  O·a += P1·V1
    consumer 1:  S1 ──────── wait ──  O·a += P0·V0   m1 P1 ─publish─     O·a += P1·V1

One's exponentials hide behind the other's matrix products, and S is computed once. Two limits of the machine are
close: a pair of tiles takes 4352 cycles of the matrix unit and moves 568 KB through shared memory (4440 cycles).

All tiles go through one loop; a tile that some row may not see whole is masked, and rows of V past the end are zeroed
in shared memory, since unused slots may hold NaN. An odd last tile follows the loop. With LAZY, O is rescaled only
where a maximum has grown by 2^8: 2 % faster, and the largest weight of a row is then rounded like the others.
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
from triton.language.extra.cuda import gdc_launch_dependents

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


# The next four say what their namesakes in triton_pieces.py say: `combine`, which follows, must find the same pieces.


@gluon.jit
def _lengths(b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS: gl.constexpr, PAGE: gl.constexpr):
    if HAS_LENS:
        length = gl.load(lens_ptr + b, mask=ok, other=0).to(gl.int32)
    else:
        pages = (gl.load(indptr_ptr + b + 1, mask=ok, other=0) - gl.load(indptr_ptr + b, mask=ok, other=0)).to(gl.int32)
        length = pages
        if PAGE > 1:
            last = gl.load(last_ptr + b, mask=ok, other=0).to(gl.int32)
            length = gl.where(pages > 0, (pages - 1) * PAGE + last, 0)
    return gl.maximum(length, 0)


@gluon.jit
def _visible(limit, cp_rank, cp_world, CP: gl.constexpr):
    if CP:
        limit = (limit - cp_rank + cp_world - 1) // cp_world
    return gl.maximum(limit, 0)


@gluon.jit
def _even_pieces(tiles, num_splits, min_tiles):
    return gl.maximum(gl.cdiv(tiles, num_splits), min_tiles)


@gluon.jit
def _schedule(batch, wave, slots, lens_ptr, indptr_ptr, last_ptr, cp_rank, cp_world,
              HAS_LENS: gl.constexpr, PAGE: gl.constexpr, CP: gl.constexpr, BLOCK_N: gl.constexpr,
              BATCH_POW2: gl.constexpr):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([BATCH_POW2 // 32, 4], [32, 1], [1, 4], [1, 0])  # a warp has all lengths
    LINE: gl.constexpr = gl.BlockedLayout([BATCH_POW2 // 32], [32], [4], [0])
    offs_b = gl.arange(0, BATCH_POW2, gl.SliceLayout(1, LAYOUT))
    ok = offs_b < batch
    lengths = _visible(_lengths(offs_b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS, PAGE), cp_rank, cp_world, CP)
    tiles = gl.where(ok, gl.cdiv(lengths, BLOCK_N), 0)
    total = gl.sum(tiles, 0)
    even = gl.max(tiles, 0).to(gl.int64) * batch * 8 <= total.to(gl.int64) * 9
    pieces = tiles
    if not even:
        share = gl.cdiv(total, wave)
        k = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
        cuts = gl.maximum((share * ((8 + 2 * (k % 4)) << (k // 4)) + 15) // 16, 1)
        inverses = gl.expand_dims(_inverse(cuts), 0)
        count = gl.sum(gl.where(gl.expand_dims(ok, 1), _pieces(gl.expand_dims(tiles, 1), inverses), 0), 0)
        rounds = gl.cdiv(3 * count, wave)
        time = gl.where(count <= slots, 2 * gl.minimum(gl.cdiv(rounds, 3) * cuts, share + cuts) + rounds, 2147483647)
        best = gl.min(gl.where(time == gl.min(time, 0), k, 16), 0)  # the first of the least
        fits = gl.min(time, 0) < 2147483647
        pieces = _pieces(tiles, _inverse(gl.sum(gl.where(k == best, cuts, 0), 0)))
        pieces = gl.where(ok & fits, pieces, ok.to(gl.int32))
    return even, gl.convert_layout(pieces, LINE), gl.convert_layout(offs_b, LINE)


@gluon.jit
def _inverse(cut):
    return 0xFFFFFFFF // cut.to(gl.uint32) + (cut > 1).to(gl.uint32)


@gluon.jit
def _pieces(tiles, inverse):
    return gl.umulhi(gl.maximum(tiles - 1, 0).to(gl.uint32), inverse).to(gl.int32) + 1


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _zero():
    """A 0 that the compiler does not know: what depends on it is neither hoisted nor unrolled."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _mbarrier(count: gl.constexpr):
    """A barrier of its own allocation, so that the compiler sees no conflict between waits on two of them."""
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=count)
    return bar


@gluon.jit
def _row():
    return gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def _box(b, i, boxes):
    """The box of a tile in buffer b that is i-th copied and multiplied: its owner's half of V first, the rope last."""
    return (b * boxes // 2 + i) % boxes if i < boxes else boxes


@gluon.jit
def _produce(kv_desc, kpe_desc, pages_ptr, first_tile, last_tile, kv_col, pe_col, k_smem, full, empty,
             C: gl.constexpr, R: gl.constexpr, PAGE: gl.constexpr):  # fmt: skip
    """Feeds the buffers in turn; half a buffer is free when the consumer that multiplies it as V is done with it."""
    BOXES: gl.constexpr = C // 64
    HALF: gl.constexpr = BOXES // 2
    STAGE: gl.constexpr = BOXES + (1 if R > 0 else 0)
    TILES: gl.constexpr = PAGE // 64
    for j in range((last_tile - first_tile + 1) // 2):
        for b in gl.static_range(2):
            tile = first_tile + 2 * j + b
            real = tile < last_tile
            page = gl.load(pages_ptr + gl.minimum(tile, last_tile - 1) // TILES).to(gl.int32)
            row = page * PAGE + (tile % TILES) * 64
            for i in gl.static_range(STAGE):
                c = _box(b, i, BOXES)
                if i % HALF == 0 and i < BOXES:
                    mbarrier.wait(empty[2 * b + (b + i // HALF) % 2], (j & 1) ^ 1, pred=real)
                bar = full[b * 9 + i]
                mbarrier.expect(bar, 8192, pred=real)
                if i < BOXES:
                    tma.async_copy_global_to_shared(
                        kv_desc, [row, kv_col + c * 64], bar, k_smem.index(b * (BOXES + 1) + c), pred=real
                    )
                else:
                    tma.async_copy_global_to_shared(
                        kpe_desc, [row, pe_col], bar, k_smem.index(b * (BOXES + 1) + c), pred=real
                    )


@gluon.jit
def _store(o, smem, ptr, q_first, stride_t, stride_h, row_block, kvh, q_len, G: gl.constexpr):
    """Writes a [64, n] tile to its rows of a [token, head, …] buffer, by way of shared memory, whole lines a warp."""
    WIDTH: gl.constexpr = o.shape[1]
    BITS: gl.constexpr = o.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 128 // BITS], [1, 32], [4, 1], [1, 0])
    tile = smem._reinterpret(o.dtype, [64, WIDTH], gl.NVMMASharedLayout(128, BITS, 2))
    tile.store(o)
    rows = row_block * 64 + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    at = (q_first + rows // G).to(gl.int64) * stride_t + (kvh * G + rows % G) * stride_h
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    gl.store(
        ptr + (gl.expand_dims(at, 1) + gl.expand_dims(columns, 0)),
        tile.load(LAYOUT),
        mask=gl.expand_dims(rows < q_len * G, 1),
    )


@gluon.jit
def _grown(row, old, LAZY: gl.constexpr):
    """(whether any of the 64 maxima that a consumer published is new, all of them); every warp holds all."""
    if LAZY:
        new = row.load(old.type.layout)
        return gl.max((new != old).to(gl.int32), 0) != 0, new
    else:
        return True, old


@gluon.jit
def _rescale(acc, l, m, m_new, grown, LAZY: gl.constexpr):
    """O and l from maxima m to m_new, when these come from the other consumer."""
    O_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    if not LAZY or grown:
        alpha = gl.exp2(m - m_new)
        l = l * alpha
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
    return acc, l


@gluon.jit
def _scores(b: gl.constexpr, phase, n0, z, q_smem, k_smem, full, kv_end, clear_end, row_end, qk_scale,
            logit_cap, BOXES: gl.constexpr, STAGE: gl.constexpr, LAYOUT: gl.constexpr,
            CAP: gl.constexpr):  # fmt: skip
    """S of the tile in buffer b, each box multiplied as it arrives; masked, and the tile made fit to serve as V."""
    LOG2E: gl.constexpr = 1.4426950408889634
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    s = gl.zeros([64, 64], gl.float32, LAYOUT)
    for i in gl.static_range(STAGE):
        c = _box(b, i, BOXES)
        mbarrier.wait(full[b * 9 + i], phase)
        s = warpgroup_mma(
            q_smem.index(z + c), k_smem.index(z + b * (BOXES + 1) + c).permute((1, 0)), s, use_acc=i > 0, is_async=True
        )
    s = warpgroup_mma_wait(0, deps=(s,))
    if CAP:
        # cap·tanh(x/cap), as 2·sigmoid(2x) - 1
        s = logit_cap * (2.0 / (1.0 + gl.exp2(s * (-2.0 * LOG2E * qk_scale / logit_cap))) - 1.0) * LOG2E
    if n0 + 64 > clear_end:
        keys = n0 + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
        s = gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(row_end, 1), s, float("-inf"))
    if n0 + 64 > kv_end:  # two 16-bit zeros a word
        filled = n0 + gl.arange(0, 64, gl.SliceLayout(1, WORDS)) < kv_end
        for c in range(BOXES):
            box = k_smem.index(b * (BOXES + 1) + c)._reinterpret(gl.int32, [64, 32], gl.NVMMASharedLayout(128, 32, 2))
            box.store(gl.where(gl.expand_dims(filled, 1), box.load(WORDS), 0))
    return s


@gluon.jit
def _weights(s, scale, m, l, p_smem, m_smem, ready, LAZY: gl.constexpr):
    """(P, what O must be multiplied by, new maxima and sums) of a tile's scores; publishes P and the maxima."""
    top = gl.max(s, 1) * scale
    if LAZY:
        m_new = gl.where(top > m + 8.0, top, m)
    else:
        m_new = gl.maximum(m, top)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    alpha = gl.exp2(m - m_new)
    l = l * alpha + gl.sum(p, 1)
    p16 = p.to(p_smem.dtype)
    p_smem.store(p16)
    m_smem.store(m_new)
    fence_async_shared()
    _barrier()
    mbarrier.arrive(ready, count=1)
    return p16, alpha, m_new, l


@gluon.jit
def _release(bar):
    """Every warp of this consumer is done with half a buffer."""
    _barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _consume(HALF_ID: gl.constexpr, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr,
             q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t,
             lse_stride_h,
             row_block, kvh, q_first, q_len, length, kv_end, first_tile, last_tile, clear_end, whole, piece_row,
             cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul,
             q_smem, k_smem, m_smem, full, empty, ready, sync,
             G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, C: gl.constexpr, R: gl.constexpr, MASKED: gl.constexpr,
             CAP: gl.constexpr, CP: gl.constexpr, HAS_LSE: gl.constexpr,
             LAZY: gl.constexpr):  # fmt: skip
    LOG2E: gl.constexpr = 1.4426950408889634
    b: gl.constexpr = HALF_ID
    o: gl.constexpr = 1 - b
    BOXES: gl.constexpr = C // 64
    HALF: gl.constexpr = BOXES // 2
    STAGE: gl.constexpr = BOXES + (1 if R > 0 else 0)
    WIDTH: gl.constexpr = C // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    SMEM: gl.constexpr = k_smem.layout
    dtype: gl.constexpr = k_smem.dtype

    # q: each consumer brings its half of the boxes; all loads are on their way before the first store
    rows = row_block * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    cols = gl.arange(0, 64, gl.SliceLayout(0, ROWS))
    q_ok = gl.expand_dims(rows < q_len * G, 1)
    q_tok = (q_first + rows // G).to(gl.int64)
    q_head = kvh * G + rows % G
    q_at = gl.expand_dims(q_tok * q_stride_t + q_head * q_stride_h, 1) + gl.expand_dims(cols, 0)
    q = ()
    for i in gl.static_range(HALF):
        q = q + (gl.load(q_ptr + q_at + (b * HALF + i) * 64, mask=q_ok, other=0.0),)  # noqa: RUF005
    if R > 0 and b == 0:
        pe_at = gl.expand_dims(q_tok * q_pe_stride_t + q_head * q_pe_stride_h, 1) + gl.expand_dims(cols, 0)
        q = q + (gl.load(q_pe_ptr + pe_at, mask=q_ok, other=0.0),)  # noqa: RUF005
    for i in gl.static_range(HALF):
        q_smem.index(b * HALF + i).store(q[i])
    if R > 0 and b == 0:
        q_smem.index(BOXES).store(q[HALF])
    fence_async_shared()
    _barrier()
    mbarrier.arrive(sync[0], count=1)

    offs = row_block * 64 + gl.arange(0, 64, S_ROW)
    row_end = gl.full([64], 0, gl.int32, S_ROW) + kv_end
    if MASKED:
        row_end = gl.minimum(_visible(length - q_len + 1 + offs // G, cp_rank, cp_world, CP), row_end)
    scale = qk_scale * LOG2E
    if CAP:
        scale = gl.to_tensor(1.0)
    acc = gl.zeros([64, WIDTH], gl.float32, O_LAYOUT)
    m = gl.full([64], -1.0e30, gl.float32, S_ROW)  # finite: a row that has seen nothing yet has P = 0 and l = 0
    l = gl.zeros([64], gl.float32, S_ROW)
    m_all = gl.full([64], -1.0e30, gl.float32, gl.BlockedLayout([2], [32], [4], [0]))
    mbarrier.wait(sync[0], 0)

    pairs = (last_tile - first_tile) // 2
    for j in range(pairs):
        phase = j & 1
        n0 = (first_tile + 2 * j + b) * 64
        # so descriptors are computed here, not kept in registers that the loop has not
        z = _zero()
        v_own = k_smem.index(z + b * (BOXES + 1) + b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        v_other = k_smem.index(z + o * (BOXES + 1) + b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        p_own = k_smem.index(z + b * (BOXES + 1) + BOXES)
        p_other = k_smem.index(z + o * (BOXES + 1) + BOXES)
        s = _scores(b, phase, n0, z, q_smem, k_smem, full, kv_end, clear_end, row_end, qk_scale, logit_cap,
                    BOXES, STAGE, S_LAYOUT, CAP)  # fmt: skip
        if b == 0:
            p, alpha, m, l = _weights(s, scale, m, l, p_own, m_smem[0], ready[0], LAZY)
            grown, m_all = _grown(m_smem[0], m_all, LAZY)
            if not LAZY or grown:
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
            p = gl.convert_layout(p, P_LAYOUT, assert_trivial=True)
            acc = warpgroup_mma(p, v_own, acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            _release(empty[0])
            mbarrier.wait(ready[1], phase)
            m_new = m_smem[1].load(S_ROW)
            grown, m_all = _grown(m_smem[1], m_all, LAZY)
            acc, l = _rescale(acc, l, m, m_new, grown, LAZY)
            m = m_new
            acc = warpgroup_mma(p_other, v_other, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(empty[2])
        else:
            mbarrier.wait(ready[0], phase)
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

    if first_tile + 2 * pairs < last_tile:  # an odd tile, in buffer 0
        phase = pairs & 1
        v_last = k_smem.index(b * HALF)._reinterpret(dtype, [64, WIDTH], SMEM)
        if b == 0:
            s = _scores(0, phase, (first_tile + 2 * pairs) * 64, 0, q_smem, k_smem, full, kv_end, clear_end, row_end,
                        qk_scale, logit_cap, BOXES, STAGE, S_LAYOUT, CAP)  # fmt: skip
            p, alpha, m, l = _weights(s, scale, m, l, k_smem.index(BOXES), m_smem[0], ready[0], LAZY)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
        else:
            mbarrier.wait(ready[0], phase)
            m_new = m_smem[0].load(S_ROW)
            acc, l = _rescale(acc, l, m, m_new, True, LAZY)
            m = m_new
        acc = warpgroup_mma(k_smem.index(BOXES), v_last, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))

    # each has summed the weights of its own tiles
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
    norm = gl.where(l > 0, v_scale / denominator, 0.0)
    lse = m + gl.log2(l)  # base 2; -inf for a row that saw nothing
    acc = acc * gl.expand_dims(gl.convert_layout(norm, O_ROW, assert_trivial=True), 1)
    stage = k_smem.index(b * (BOXES + 1))  # both consumers are done with the buffers; each takes one
    if whole:
        _store(acc.to(out_ptr.dtype.element_ty), stage, out_ptr + b * WIDTH, q_first, out_stride_t, out_stride_h,
               row_block, kvh, q_len, G)  # fmt: skip
        if HAS_LSE and b == 0:
            gl.store(
                lse_ptr + (q_first + tok).to(gl.int64) * lse_stride_t + head * lse_stride_h, lse * lse_mul, mask=row_ok
            )
    else:
        _store(acc, stage, part_ptr + piece_row * C + b * WIDTH, 0, G * NUM_KV_HEADS * C, C, row_block, kvh, q_len, G)
        if b == 0:
            gl.store(part_lse_ptr + piece_row + tok * (G * NUM_KV_HEADS) + head, lse, mask=row_ok)


@gluon.jit
def decode_splitk_gluon(
    q_ptr, q_pe_ptr, kv_desc, kpe_desc,
    table_ptr, lens_ptr, kv_indptr_ptr, last_ptr, qo_indptr_ptr, sinks_ptr, q_scale_ptr, kv_scale_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    q_stride_t, q_stride_h, q_pe_stride_t, q_pe_stride_h, kv_stride_head, kpe_stride_head, table_stride,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    batch, max_q_len, num_splits, min_tiles, wave, slots, cp_rank, cp_world, qk_scale, v_scale, logit_cap,
    lse_mul,
    G: gl.constexpr, NUM_KV_HEADS: gl.constexpr, MULTI: gl.constexpr, C: gl.constexpr, R: gl.constexpr,
    PAGE: gl.constexpr, BATCH_POW2: gl.constexpr, LAZY: gl.constexpr, PDL: gl.constexpr, CAUSAL: gl.constexpr,
    CAP: gl.constexpr, CP: gl.constexpr, HAS_LENS: gl.constexpr, HAS_LSE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row_blocks = gl.cdiv(max_q_len * G, 64)
    pid = gl.program_id(0)
    row_block = pid % row_blocks
    kvh = (pid // row_blocks) % NUM_KV_HEADS
    piece = pid // (row_blocks * NUM_KV_HEADS)
    b = gl.minimum(piece // num_splits, batch - 1)
    split = piece - b * num_splits
    length = _lengths(b, True, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
    pieces = 0
    even = True
    if wave > 0:
        even, every, offs_b = _schedule(batch, wave, slots, lens_ptr, kv_indptr_ptr, last_ptr,
                                        cp_rank, cp_world, HAS_LENS, PAGE, CP, 64, BATCH_POW2)  # fmt: skip
        if not even:
            ends = gl.associative_scan(every, 0, _add)
            b = gl.sum(((ends <= piece) & (offs_b < batch)).to(gl.int32), 0)
            split = piece - gl.sum(gl.where(offs_b < b, every, 0), 0)
            pieces = gl.sum(gl.where(offs_b == b, every, 0), 0)
            length = _lengths(b, b < batch, lens_ptr, kv_indptr_ptr, last_ptr, HAS_LENS, PAGE)
    if (b >= batch) or (even and split >= num_splits):
        return

    if kv_indptr_ptr is None:
        pages_ptr = table_ptr + b.to(gl.int64) * table_stride
    else:
        pages_ptr = table_ptr + gl.load(kv_indptr_ptr + b).to(gl.int64)
    if qo_indptr_ptr is None:
        q_len = max_q_len
        q_first = b * max_q_len
    else:
        q_first = gl.load(qo_indptr_ptr + b).to(gl.int32)
        q_len = gl.load(qo_indptr_ptr + b + 1).to(gl.int32) - q_first
    kv_len = _visible(length, cp_rank, cp_world, CP)
    tiles = gl.cdiv(kv_len, 64)
    per_split = _even_pieces(tiles, num_splits, min_tiles)
    if pieces > 0:
        per_split = gl.maximum(gl.cdiv(tiles, pieces), 1)
    first_tile = split * per_split
    if (row_block * 64 >= q_len * G) or ((first_tile >= tiles) and (split > 0)):
        return
    last_tile = gl.minimum(first_tile + per_split, tiles)
    kv_end = gl.minimum(kv_len, last_tile * 64)
    clear_end = kv_end  # every row sees the tokens below it
    if CAUSAL and MULTI:
        clear_end = gl.minimum(_visible(length - q_len + 1 + row_block * 64 // G, cp_rank, cp_world, CP), kv_end)
    if q_scale_ptr is not None:
        qk_scale *= gl.load(q_scale_ptr)
    if kv_scale_ptr is not None:
        kv_scale = gl.load(kv_scale_ptr)
        qk_scale *= kv_scale
        v_scale *= kv_scale
    piece_row = piece.to(gl.int64) * (max_q_len * (G * NUM_KV_HEADS))
    whole = tiles <= per_split

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
    sync = (_mbarrier(2), _mbarrier(1), _mbarrier(1))
    fence_async_shared()
    kv_col = (kvh * kv_stride_head).to(gl.int32)
    pe_col = (kvh * kpe_stride_head).to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (0, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_t, q_stride_h,
                        q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, row_block,
                        kvh, q_first, q_len, length, kv_end, first_tile, last_tile, clear_end, whole, piece_row,
                        cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, m_smem, full, empty,
                        ready, sync, G, NUM_KV_HEADS, C, R, MASKED, CAP, CP, HAS_LSE, LAZY)),
            (_consume, (1, q_ptr, q_pe_ptr, sinks_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, q_stride_t, q_stride_h,
                        q_pe_stride_t, q_pe_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, row_block,
                        kvh, q_first, q_len, length, kv_end, first_tile, last_tile, clear_end, whole, piece_row,
                        cp_rank, cp_world, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, m_smem, full, empty,
                        ready, sync, G, NUM_KV_HEADS, C, R, MASKED, CAP, CP, HAS_LSE, LAZY)),
            (_produce, (kv_desc, kpe_desc, pages_ptr, first_tile, last_tile, kv_col, pe_col, k_smem, full, empty,
                        C, R, PAGE)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
