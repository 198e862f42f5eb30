"""Prefill for Hopper in Gluon: a program owns 128 query tokens of one head (`prefill_gluon`). Imports triton only.

Three roles run at once: a producer warp copies tiles of BLOCK_N keys and values, in boxes of 64 columns, into STAGES
buffers each; two consumers, a warpgroup each, own 64 queries and go through all tiles:

    S(j) = q·K(j)ᵀ and O += P(j-1)·V(j-1) are on their way together; the softmax of S(j) runs beside the latter.

FLOPs of a tile: 2·128·BLOCK_N·(D + DV); a consumer's registers: O (DV / 2), S (BLOCK_N / 2), P and the next P
(BLOCK_N / 4 each) of 240; shared memory: 128·D·2 of q, STAGES·BLOCK_N·(D + DV)·2 of tiles: 208 KB at 192, 128, two
stages of 128.

Which queries see which keys, and in which order blocks are worked on, is as in triton_prefill.py. Scores that some row
may not see are masked; rows of V past the end of a sequence are zeroed in shared memory, since there may be NaN.
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

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def _ordered(i, units, heads_together, H: gl.constexpr):
    """As its namesake in triton_prefill.py."""
    group = i // (units * heads_together)
    first = group * heads_together
    size = gl.minimum(heads_together, H - first)
    i -= group * units * heads_together
    return i // size, first + i % size


@gluon.jit
def _mbarriers(n: gl.constexpr, count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _produce(k_desc, v_desc, kv_first, tiles, k_col, v_col, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
             D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Feeds the buffers in turn; one is free when both consumers are done with what it had."""
    K_BOXES: gl.constexpr = D // 64
    V_BOXES: gl.constexpr = DV // 64
    for j in range(tiles):
        b = j % STAGES
        free = (j // STAGES & 1) ^ 1
        row = kv_first + j * BLOCK_N
        mbarrier.wait(k_empty.index(b), free)
        mbarrier.expect(k_full.index(b), BLOCK_N * D * 2)
        for c in gl.static_range(K_BOXES):
            tma.async_copy_global_to_shared(
                k_desc, [row, k_col + c * 64], k_full.index(b), k_smem.index(b * K_BOXES + c)
            )
        mbarrier.wait(v_empty.index(b), free)
        mbarrier.expect(v_full.index(b), BLOCK_N * DV * 2)
        for c in gl.static_range(V_BOXES):
            tma.async_copy_global_to_shared(
                v_desc, [row, v_col + c * 64], v_full.index(b), v_smem.index(b * V_BOXES + c)
            )


@gluon.jit
def _scores(cid: gl.constexpr, j, q_smem, k_smem, k_full, D: gl.constexpr, BLOCK_N: gl.constexpr,
            STAGES: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Starts S of tile j."""
    BOXES: gl.constexpr = D // 64
    b = j % STAGES
    mbarrier.wait(k_full.index(b), j // STAGES & 1)
    s = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    for c in gl.static_range(BOXES):
        s = warpgroup_mma(
            q_smem.index(cid * BOXES + c), k_smem.index(b * BOXES + c).permute((1, 0)), s, use_acc=c > 0, is_async=True
        )
    return s


@gluon.jit
def _weights(s, n0, m, l, scale, qk_scale, logit_cap, clear_end, row_end, BLOCK_N: gl.constexpr, CAP: gl.constexpr,
             LAYOUT: gl.constexpr):  # fmt: skip
    """(P, what O must be multiplied by, new maxima and sums) of a tile's scores."""
    LOG2E: gl.constexpr = 1.4426950408889634
    if CAP:
        # cap·tanh(x/cap), as 2·sigmoid(2x) - 1
        s = logit_cap * (2.0 / (1.0 + gl.exp2(s * (-2.0 * LOG2E * qk_scale / logit_cap))) - 1.0) * LOG2E
    if n0 + BLOCK_N > clear_end:
        keys = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
        s = gl.where(gl.expand_dims(keys, 0) < gl.expand_dims(row_end, 1), s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    alpha = gl.exp2(m - m_new)
    return p, alpha, m_new, l * alpha + gl.sum(p, 1)


@gluon.jit
def _release(bars, b):
    """Every warp of this consumer is done with a buffer."""
    _barrier()
    mbarrier.arrive(bars.index(b), count=1)


@gluon.jit
def _consume(cid: gl.constexpr, q_ptr, out_ptr, lse_ptr, q_stride_t, out_stride_t, lse_stride_t, q0, q_len, kv_len,
             tiles, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
             D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
             CAP: gl.constexpr, HAS_LSE: gl.constexpr):  # fmt: skip
    """64 queries from q0 on. q_ptr, out_ptr and lse_ptr are of the head, at the sequence's first query."""
    LOG2E: gl.constexpr = 1.4426950408889634
    BOXES: gl.constexpr = D // 64
    V_BOXES: gl.constexpr = DV // 64
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SMEM: gl.constexpr = k_smem.layout
    dtype: gl.constexpr = k_smem.dtype

    # q: all loads are on their way before the first store
    rows = q0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    at = gl.expand_dims(rows.to(gl.int64) * q_stride_t, 1) + gl.expand_dims(
        gl.arange(0, 64, gl.SliceLayout(0, ROWS)), 0
    )
    ok = gl.expand_dims(rows < q_len, 1)
    q = ()
    for c in gl.static_range(BOXES):
        q = q + (gl.load(q_ptr + at + c * 64, mask=ok, other=0.0),)  # noqa: RUF005
    for c in gl.static_range(BOXES):
        q_smem.index(cid * BOXES + c).store(q[c])
    fence_async_shared()
    _barrier()

    offs = q0 + gl.arange(0, 64, S_ROW)
    row_end = gl.full([64], 0, gl.int32, S_ROW) + kv_len
    clear_end = kv_len  # every row sees the keys below it
    if CAUSAL:
        row_end = gl.minimum(offs + 1 + kv_len - q_len, kv_len)
        clear_end = gl.minimum(q0 + 1 + kv_len - q_len, kv_len)
    scale = qk_scale * LOG2E
    if CAP:
        scale = gl.to_tensor(1.0)
    acc = gl.zeros([64, DV], gl.float32, O_LAYOUT)
    m = gl.full([64], -1.0e30, gl.float32, S_ROW)  # finite: a row that has seen nothing yet has P = 0 and l = 0
    l = gl.zeros([64], gl.float32, S_ROW)

    l_smem = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s = _scores(cid, 0, q_smem, k_smem, k_full, D, BLOCK_N, STAGES, S_LAYOUT)
    s = warpgroup_mma_wait(0, deps=(s,))
    _release(k_empty, 0)
    p, alpha, m, l = _weights(s, 0, m, l, scale, qk_scale, logit_cap, clear_end, row_end, BLOCK_N, CAP, S_LAYOUT)
    p16 = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
    for j in range(1, tiles):
        s = _scores(cid, j, q_smem, k_smem, k_full, D, BLOCK_N, STAGES, S_LAYOUT)
        b = (j - 1) % STAGES
        mbarrier.wait(v_full.index(b), (j - 1) // STAGES & 1)
        v = v_smem.index(b * V_BOXES)._reinterpret(dtype, [BLOCK_N, DV], SMEM)
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        _release(k_empty, j % STAGES)
        p, alpha, m, l = _weights(s, j * BLOCK_N, m, l, scale, qk_scale, logit_cap, clear_end, row_end, BLOCK_N, CAP,
                                  S_LAYOUT)  # fmt: skip
        new = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
        l_smem.store(l)  # read by nobody: the assembler moves the wait before what memory does not order
        acc, p16, new = warpgroup_mma_wait(0, deps=(acc, p16, new))
        _release(v_empty, b)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
        p16 = new
    b = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(b), (tiles - 1) // STAGES & 1)
    if tiles * BLOCK_N > kv_len:  # two 16-bit zeros a word
        filled = (tiles - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, WORDS)) < kv_len
        for i in range(V_BOXES):
            box = v_smem.index(b * V_BOXES + i)._reinterpret(gl.int32, [BLOCK_N, 32], gl.NVMMASharedLayout(128, 32, 2))
            box.store(gl.where(gl.expand_dims(filled, 1), box.load(WORDS), 0))
        fence_async_shared()
        _barrier()
    v = v_smem.index(b * V_BOXES)._reinterpret(dtype, [BLOCK_N, DV], SMEM)
    acc = warpgroup_mma(p16, v, acc, is_async=True)
    acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))

    norm = gl.where(l > 0, v_scale / l, 0.0)
    acc = acc * gl.expand_dims(gl.convert_layout(norm, O_ROW, assert_trivial=True), 1)
    if HAS_LSE:
        gl.store(lse_ptr + offs.to(gl.int64) * lse_stride_t, (m + gl.log2(l)) * lse_mul, mask=offs < q_len)
    # by way of the shared memory of its queries, whole lines a warp
    _barrier()
    tile = q_smem.index(cid * BOXES)._reinterpret(dtype, [64, DV], SMEM)
    tile.store(acc.to(dtype))
    _barrier()
    rows = q0 + gl.arange(0, 64, gl.SliceLayout(1, LINES))
    at = gl.expand_dims(rows.to(gl.int64) * out_stride_t, 1) + gl.expand_dims(
        gl.arange(0, DV, gl.SliceLayout(0, LINES)), 0
    )
    gl.store(out_ptr + at, tile.load(LINES), mask=gl.expand_dims(rows < q_len, 1))


@gluon.jit
def prefill_gluon(
    q_ptr, k_desc, v_desc, qo_indptr_ptr, kv_indptr_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr,
    q_stride_t, q_stride_h, k_stride_h, v_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    max_q_len, heads_together, qk_scale, v_scale, logit_cap, lse_mul,
    H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, CAP: gl.constexpr, HAS_LSE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A program a block of 128 queries, head and sequence; those beyond a sequence's blocks have nothing to do."""
    pid = gl.program_id(0)
    blocks = gl.cdiv(max_q_len, 128)
    b = pid // (blocks * H)
    unit, head = _ordered(pid - b * blocks * H, blocks, heads_together, H)
    q_first = gl.load(qo_indptr_ptr + b).to(gl.int32)
    q_len = gl.load(qo_indptr_ptr + b + 1).to(gl.int32) - q_first
    kv_first = gl.load(kv_indptr_ptr + b).to(gl.int32)
    kv_len = gl.load(kv_indptr_ptr + b + 1).to(gl.int32) - kv_first
    block = unit
    if CAUSAL:
        block = gl.cdiv(q_len, 128) - 1 - unit
    q0 = block * 128
    if (block < 0) or (q0 >= q_len):
        return
    end = kv_len
    if CAUSAL:
        end = gl.minimum(gl.minimum(q0 + 128, q_len) + kv_len - q_len, kv_len)
    tiles = gl.cdiv(gl.maximum(end, 0), BLOCK_N)
    kv_head = head // G
    q_ptr += q_first.to(gl.int64) * q_stride_t + head * q_stride_h
    out_ptr += q_first.to(gl.int64) * out_stride_t + head * out_stride_h
    if HAS_LSE:
        lse_ptr += q_first.to(gl.int64) * lse_stride_t + head * lse_stride_h
    if tiles == 0:
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        rows = q0 + gl.arange(0, 128, gl.SliceLayout(1, LINES))
        at = gl.expand_dims(rows.to(gl.int64) * out_stride_t, 1) + gl.expand_dims(
            gl.arange(0, DV, gl.SliceLayout(0, LINES)), 0
        )
        zeros = gl.zeros([128, DV], out_ptr.dtype.element_ty, LINES)
        gl.store(out_ptr + at, zeros, mask=gl.expand_dims(rows < q_len, 1))
        if HAS_LSE:
            LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            offs = q0 + gl.arange(0, 128, LINE)
            nothing = gl.full([128], float("-inf"), gl.float32, LINE)
            gl.store(lse_ptr + offs.to(gl.int64) * lse_stride_t, nothing, mask=offs < q_len)
        return
    if q_scale_ptr is not None:
        qk_scale *= gl.load(q_scale_ptr)
    if k_scale_ptr is not None:
        qk_scale *= gl.load(k_scale_ptr)
    if v_scale_ptr is not None:
        v_scale *= gl.load(v_scale_ptr)

    q_smem = gl.allocate_shared_memory(k_desc.dtype, [2 * D // 64, 64, 64], k_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES * D // 64, BLOCK_N, 64], k_desc.layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES * DV // 64, BLOCK_N, 64], k_desc.layout)
    k_full = _mbarriers(STAGES, 1)
    v_full = _mbarriers(STAGES, 1)
    k_empty = _mbarriers(STAGES, 2)
    v_empty = _mbarriers(STAGES, 2)
    fence_async_shared()
    k_col = (kv_head * k_stride_h).to(gl.int32)
    v_col = (kv_head * v_stride_h).to(gl.int32)
    gl.warp_specialize(
        [
            (_consume, (0, q_ptr, out_ptr, lse_ptr, q_stride_t, out_stride_t, lse_stride_t, q0, q_len, kv_len, tiles,
                        qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full, k_empty,
                        v_empty, D, DV, BLOCK_N, STAGES, CAUSAL, CAP, HAS_LSE)),
            (_consume, (1, q_ptr, out_ptr, lse_ptr, q_stride_t, out_stride_t, lse_stride_t, q0 + 64, q_len, kv_len,
                        tiles, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full, k_empty,
                        v_empty, D, DV, BLOCK_N, STAGES, CAUSAL, CAP, HAS_LSE)),
            (_produce, (k_desc, v_desc, kv_first, tiles, k_col, v_col, k_smem, v_smem, k_full, v_full, k_empty,
                        v_empty, D, DV, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
