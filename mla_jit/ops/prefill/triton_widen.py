"""fp8 K and V made 16 bits wide, for kernels whose tiles reach the matrix units as they lie in memory. Triton only.

Each element is 1 byte read and 2 written, once a call: little beside products that need it once for 128 queries. The
values are the same: bf16 and fp16 hold every e4m3.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(x_ptr, wide_ptr, rows, ok, head, stride_t, stride_h, H: tl.constexpr, D: tl.constexpr):
    """The rows' elements of one head, 64 columns at a time."""
    cols = tl.arange(0, 64)
    p_x = x_ptr + rows[:, None].to(tl.int64) * stride_t + head * stride_h + cols[None, :]
    p_wide = wide_ptr + (rows[:, None].to(tl.int64) * H + head) * D + cols[None, :]
    for c in tl.static_range(D // 64):
        x = tl.load(p_x + c * 64, mask=ok[:, None], other=0.0)
        tl.store(p_wide + c * 64, x.to(wide_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit
def widen(
    k_ptr, v_ptr, kv_indptr_ptr, k_wide_ptr, v_wide_ptr, batch, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS tokens of one head. The results lie [tokens, HK, D] and [tokens, HK, DV], without gaps."""
    pid = tl.program_id(0)
    head = pid % HK
    rows = pid // HK * ROWS + tl.arange(0, ROWS)
    ok = rows < tl.load(kv_indptr_ptr + batch)
    _columns(k_ptr, k_wide_ptr, rows, ok, head, k_stride_t, k_stride_h, HK, D)
    _columns(v_ptr, v_wide_ptr, rows, ok, head, v_stride_t, v_stride_h, HK, DV)
