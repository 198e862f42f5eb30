"""Persistent prefill for Hopper in Gluon: a resident program walks the list of triton_prefill_persistent.py.

Roles, tiles, registers and shared memory are those of gluon_prefill.py, 128 queries of one head at a time; but the
three roles go on to the next item together: while the consumers write the results of one, the producer has the next
one's first tiles on their way, and the next queries are asked for before the results are written. Nobody waits for a
program to start, for barriers, or for the first tile.

The producer takes the next place of the list by a counter and tells the consumers, by way of a ring of two. Tiles are
numbered through all items of a program; tile n is in buffer n % STAGES. An item without keys (its queries see none)
takes one tile, of which nothing is seen. fp8 queries are widened as they are loaded, fp8 K and V by `widen` before.
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

from mla_jit.ops.prefill.gluon_prefill import _mbarriers, _ordered, _release, _scores, _weights

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@gluon.jit
def _item(items_ptr, i, items, heads_together, H: gl.constexpr):
    """(head, q_first, q_len, kv_first, kv_len, q0, first tile, the one after the last, part) of place i; past the end
    one without queries."""
    there = i < items * H
    place, head = _ordered(gl.where(there, i, 0), gl.maximum(items, 1), heads_together, H)
    at = items_ptr + 8 * place
    q_first = gl.load(at)
    q_len = gl.where(there, gl.load(at + 1), 0)
    kv_first = gl.load(at + 2)
    kv_len = gl.load(at + 3)
    q0 = gl.load(at + 4)
    first = gl.load(at + 5)
    last = gl.maximum(gl.load(at + 6), first + 1)
    part = gl.load(at + 7)
    return head, q_first, q_len, kv_first, kv_len, q0, first, last, part


@gluon.jit
def _tell(ring, ring_full, ring_empty, r, i):
    """The consumers get the place of round r."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    b = r % 2
    mbarrier.wait(ring_empty.index(b), (r // 2 & 1) ^ 1)
    ring.index(b).store(gl.full([1], 0, gl.int32, ONE) + i)
    _barrier()
    mbarrier.arrive(ring_full.index(b), count=1)


@gluon.jit
def _told(ring, ring_full, ring_empty, r):
    """What the producer tells of round r."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    b = r % 2
    mbarrier.wait(ring_full.index(b), r // 2 & 1)
    i = gl.max(ring.index(b).load(ONE), 0)
    _release(ring_empty, b)
    return i


@gluon.jit
def _produce(head_ptr, items_ptr, items, heads_together, ring, ring_full, ring_empty, k_desc, v_desc, k_stride_h,
             v_stride_h, k_smem, v_smem, k_full, v_full, k_empty, v_empty, H: gl.constexpr, G: gl.constexpr,
             D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Feeds the buffers in turn; one is free when both consumers are done with what it had."""
    K_BOXES: gl.constexpr = D // 64
    V_BOXES: gl.constexpr = DV // 64
    n = gl.to_tensor(0)
    r = gl.to_tensor(0)
    i = gl.atomic_add(head_ptr + 2, 1, sem="relaxed")
    while i < items * H:
        _tell(ring, ring_full, ring_empty, r, i)
        head, _q, _n, kv_first, _len, _q0, first, last, _part = _item(items_ptr, i, items, heads_together, H)
        k_col = (head // G * k_stride_h).to(gl.int32)
        v_col = (head // G * v_stride_h).to(gl.int32)
        for j in range(first, last):
            b = n % STAGES
            free = (n // STAGES & 1) ^ 1
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
            n += 1
        r += 1
        i = gl.atomic_add(head_ptr + 2, 1, sem="relaxed")
    _tell(ring, ring_full, ring_empty, r, i)


@gluon.jit
def _queries(q_ptr, head, q_first, q_len, q0, q_stride_t, q_stride_h, BOXES: gl.constexpr, WIDE: gl.constexpr):
    """64 queries from q0 on in WIDE, as columns of 64; rows past the sequence are 0 and not read."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = q0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    at = q_ptr + q_first.to(gl.int64) * q_stride_t + head * q_stride_h
    offs = gl.expand_dims(rows.to(gl.int64) * q_stride_t, 1) + gl.expand_dims(
        gl.arange(0, 64, gl.SliceLayout(0, ROWS)), 0
    )
    ok = gl.expand_dims(rows < q_len, 1)
    q = ()
    for c in gl.static_range(BOXES):
        q = q + (gl.load(at + offs + c * 64, mask=ok, other=0.0).to(WIDE),)  # noqa: RUF005
    return q


@gluon.jit
def _consume(cid: gl.constexpr, items_ptr, items, heads_together, ring, ring_full, ring_empty, q_ptr, out_ptr, lse_ptr,
             part_ptr, part_lse_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
             qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
             H: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             CAUSAL: gl.constexpr, CAP: gl.constexpr, HAS_LSE: gl.constexpr):  # fmt: skip
    """The queries 64·cid to 64·cid + 63 of each item."""
    LOG2E: gl.constexpr = 1.4426950408889634
    BOXES: gl.constexpr = D // 64
    V_BOXES: gl.constexpr = DV // 64
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    SMEM: gl.constexpr = k_smem.layout
    dtype: gl.constexpr = k_smem.dtype
    scale = qk_scale * LOG2E
    if CAP:
        scale = gl.to_tensor(1.0)
    l_smem = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    n = gl.to_tensor(0)
    r = gl.to_tensor(0)
    i = _told(ring, ring_full, ring_empty, r)
    head, q_first, q_len, _kv, kv_len, q0, first, last, part = _item(items_ptr, i, items, heads_together, H)
    q0 += cid * 64
    q = _queries(q_ptr, head, q_first, q_len, q0, q_stride_t, q_stride_h, BOXES, dtype)
    while i < items * H:
        _barrier()  # the results of the item before have left the shared memory of the queries
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
        acc = gl.zeros([64, DV], gl.float32, O_LAYOUT)
        m = gl.full([64], -1.0e30, gl.float32, S_ROW)  # finite: a row that has seen nothing yet has P = 0 and l = 0
        l = gl.zeros([64], gl.float32, S_ROW)

        s = _scores(cid, n, q_smem, k_smem, k_full, D, BLOCK_N, STAGES, S_LAYOUT)
        s = warpgroup_mma_wait(0, deps=(s,))
        _release(k_empty, n % STAGES)
        p, alpha, m, l = _weights(s, first * BLOCK_N, m, l, scale, qk_scale, logit_cap, clear_end, row_end, BLOCK_N,
                                  CAP, S_LAYOUT)  # fmt: skip
        p16 = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
        for j in range(first + 1, last):
            n += 1
            s = _scores(cid, n, q_smem, k_smem, k_full, D, BLOCK_N, STAGES, S_LAYOUT)
            b = (n - 1) % STAGES
            mbarrier.wait(v_full.index(b), (n - 1) // STAGES & 1)
            v = v_smem.index(b * V_BOXES)._reinterpret(dtype, [BLOCK_N, DV], SMEM)
            acc = warpgroup_mma(p16, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            _release(k_empty, n % STAGES)
            p, alpha, m, l = _weights(s, j * BLOCK_N, m, l, scale, qk_scale, logit_cap, clear_end, row_end, BLOCK_N,
                                      CAP, S_LAYOUT)  # fmt: skip
            new = gl.convert_layout(p.to(dtype), P_LAYOUT, assert_trivial=True)
            l_smem.store(l)  # read by nobody: the assembler moves the wait before what memory does not order
            acc, p16, new = warpgroup_mma_wait(0, deps=(acc, p16, new))
            _release(v_empty, b)
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, O_ROW, assert_trivial=True), 1)
            p16 = new
        b = n % STAGES
        mbarrier.wait(v_full.index(b), n // STAGES & 1)
        if last * BLOCK_N > kv_len:  # two 16-bit zeros a word
            filled = (last - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, WORDS)) < kv_len
            for c in gl.static_range(V_BOXES):
                box = v_smem.index(b * V_BOXES + c)._reinterpret(
                    gl.int32, [BLOCK_N, 32], gl.NVMMASharedLayout(128, 32, 2)
                )
                box.store(gl.where(gl.expand_dims(filled, 1), box.load(WORDS), 0))
            fence_async_shared()
            _barrier()
        v = v_smem.index(b * V_BOXES)._reinterpret(dtype, [BLOCK_N, DV], SMEM)
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
        _release(v_empty, b)
        n += 1

        of_head, of_first, of_len, of_part, row0 = head, q_first, q_len, part, q0
        r += 1
        i = _told(ring, ring_full, ring_empty, r)
        head, q_first, q_len, _kv, kv_len, q0, first, last, part = _item(items_ptr, i, items, heads_together, H)
        q0 += cid * 64
        q = _queries(q_ptr, head, q_first, q_len, q0, q_stride_t, q_stride_h, BOXES, dtype)

        norm = gl.where(l > 0, v_scale / l, 0.0)
        acc = acc * gl.expand_dims(gl.convert_layout(norm, O_ROW, assert_trivial=True), 1)
        lse = m + gl.log2(l)  # base 2; -inf for a row that saw nothing
        if of_part < 0:
            token = of_first.to(gl.int64)
            if HAS_LSE:
                lses = lse_ptr + token * lse_stride_t + of_head * lse_stride_h
                gl.store(lses + offs.to(gl.int64) * lse_stride_t, lse * lse_mul, mask=offs < of_len)
            # by way of the shared memory of its queries, whole lines a warp
            _barrier()
            of_out: gl.constexpr = out_ptr.dtype.element_ty
            tile = q_smem.index(cid * BOXES)._reinterpret(of_out, [64, DV], SMEM)
            tile.store(acc.to(of_out))
            _barrier()
            rows = row0 + gl.arange(0, 64, gl.SliceLayout(1, LINES))
            outs = gl.expand_dims(rows.to(gl.int64) * out_stride_t, 1) + gl.expand_dims(
                gl.arange(0, DV, gl.SliceLayout(0, LINES)), 0
            )
            outs += token * out_stride_t + of_head * out_stride_h
            gl.store(out_ptr + outs, tile.load(LINES), mask=gl.expand_dims(rows < of_len, 1))
        else:
            if part_ptr is not None:
                line = (of_part.to(gl.int64) * H + of_head) * 128 + cid * 64
                gl.store(part_lse_ptr + line + gl.arange(0, 64, S_ROW), lse)
                parts = gl.expand_dims((line + gl.arange(0, 64, O_ROW)) * DV, 1) + gl.expand_dims(
                    gl.arange(0, DV, gl.SliceLayout(0, O_LAYOUT)), 0
                )
                gl.store(part_ptr + parts, acc)


@gluon.jit
def prefill_persistent_gluon(
    q_ptr, k_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, lse_ptr, part_ptr, part_lse_ptr, head_ptr,
    items_ptr,
    q_stride_t, q_stride_h, k_stride_h, v_stride_h, out_stride_t, out_stride_h, lse_stride_t, lse_stride_h,
    heads_together, qk_scale, v_scale, logit_cap, lse_mul,
    H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, CAP: gl.constexpr, HAS_LSE: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """A resident program: takes (item, head) after (item, head) off the list."""
    items = gl.load(head_ptr)
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
    ring = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ring_full = _mbarriers(2, 1)
    ring_empty = _mbarriers(2, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (0, items_ptr, items, heads_together, ring, ring_full, ring_empty, q_ptr, out_ptr, lse_ptr,
                        part_ptr, part_lse_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t,
                        lse_stride_h, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full,
                        k_empty, v_empty, H, D, DV, BLOCK_N, STAGES, CAUSAL, CAP, HAS_LSE)),
            (_consume, (1, items_ptr, items, heads_together, ring, ring_full, ring_empty, q_ptr, out_ptr, lse_ptr,
                        part_ptr, part_lse_ptr, q_stride_t, q_stride_h, out_stride_t, out_stride_h, lse_stride_t,
                        lse_stride_h, qk_scale, v_scale, logit_cap, lse_mul, q_smem, k_smem, v_smem, k_full, v_full,
                        k_empty, v_empty, H, D, DV, BLOCK_N, STAGES, CAUSAL, CAP, HAS_LSE)),
            (_produce, (head_ptr, items_ptr, items, heads_together, ring, ring_full, ring_empty, k_desc, v_desc,
                        k_stride_h, v_stride_h, k_smem, v_smem, k_full, v_full, k_empty, v_empty, H, G, D, DV, BLOCK_N,
                        STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
