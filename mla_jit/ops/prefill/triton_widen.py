"""fp8 K and V made 16 bits wide, for kernels whose tiles reach the matrix units as they lie in memory. Triton only.

Each element is 1 byte read and 2 written, once a call: little beside products that need it once for 128 queries. The
values are the same: bf16 and fp16 hold every e4m3.
"""

import triton
import triton.language as tl


@triton.jit
def _block(
    x_ptr, wide_ptr, rows, last, block, stride_t, stride_h, HK: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """COLS elements of tokens, whose heads' elements are one row in the result. TOGETHER: so many lie in a row in x."""
    cols = block * COLS + tl.arange(0, COLS)
    ok = (rows < last)[:, None] & (cols < HK * D)[None, :]
    place = cols // D * stride_h + cols % D
    place = tl.max_contiguous(tl.multiple_of(place, TOGETHER), TOGETHER)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_t + place[None, :], mask=ok, other=0.0)
    wide = x.to(wide_ptr.dtype.element_ty)
    tl.store(wide_ptr + rows[:, None].to(tl.int64) * (HK * D) + cols[None, :], wide, mask=ok)


@triton.jit
def widen(
    k_ptr, v_ptr, kv_indptr_ptr, k_wide_ptr, v_wide_ptr, batch, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    K_TOGETHER: tl.constexpr, V_TOGETHER: tl.constexpr,
):  # fmt: skip
    """A program: COLS elements of ROWS tokens, of K or V. The results lie [tokens, HK, D] and [tokens, HK, DV]."""
    of_k: tl.constexpr = (HK * D + COLS - 1) // COLS
    blocks: tl.constexpr = of_k + (HK * DV + COLS - 1) // COLS
    pid = tl.program_id(0)
    block = pid % blocks
    rows = pid // blocks * ROWS + tl.arange(0, ROWS)
    last = tl.load(kv_indptr_ptr + batch)
    if block < of_k:
        _block(k_ptr, k_wide_ptr, rows, last, block, k_stride_t, k_stride_h, HK, D, COLS, K_TOGETHER)
    else:
        _block(v_ptr, v_wide_ptr, rows, last, block - of_k, v_stride_t, v_stride_h, HK, DV, COLS, V_TOGETHER)
