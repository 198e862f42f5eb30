"""The merge of two attention states in Triton, BLOCK_R rows (token × head) a program. Imports triton only."""

import triton
import triton.language as tl


@triton.jit
def _state(out_ptr, lse_ptr, tok, head, stride_t, stride_h, lse_stride_t, lse_stride_h, to_base2, ok, cols,
           D: tl.constexpr):  # fmt: skip
    """(output fp32 [rows, BLOCK_D], LSE in base 2); a row without keys is 0 whatever it holds, its LSE -inf."""
    lse = tl.load(lse_ptr + tok * lse_stride_t + head * lse_stride_h, mask=ok, other=float("-inf")) * to_base2
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    some = ok & (lse != float("-inf"))
    p_out = out_ptr + tok * stride_t + head * stride_h
    out = tl.load(p_out[:, None] + cols[None, :], mask=some[:, None] & (cols < D)[None, :], other=0.0)
    return out.to(tl.float32), lse


@triton.jit
def merge(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr,
    a_stride_t, a_stride_h, lse_a_stride_t, lse_a_stride_h, b_stride_t, b_stride_h, lse_b_stride_t, lse_b_stride_h,
    out_stride_t, out_stride_h, lse_stride_t, lse_stride_h, rows, to_base2, from_base2,
    H: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out = (2^(lse_a - M)·a + 2^(lse_b - M)·b) / Σ, lse = M + log2 Σ. Rows are read before they are written."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = row < rows
    tok = (row // H).to(tl.int64)
    head = row % H
    cols = tl.arange(0, BLOCK_D)
    a, lse_a = _state(a_ptr, lse_a_ptr, tok, head, a_stride_t, a_stride_h, lse_a_stride_t, lse_a_stride_h, to_base2,
                      ok, cols, D)  # fmt: skip
    b, lse_b = _state(b_ptr, lse_b_ptr, tok, head, b_stride_t, b_stride_h, lse_b_stride_t, lse_b_stride_h, to_base2,
                      ok, cols, D)  # fmt: skip
    top = tl.maximum(lse_a, lse_b)
    empty = top == float("-inf")
    shift = tl.where(empty, 0.0, top)
    weight_a = tl.exp2(lse_a - shift)
    weight_b = tl.exp2(lse_b - shift)
    total = tl.where(empty, 1.0, weight_a + weight_b)
    out = a * (weight_a / total)[:, None] + b * (weight_b / total)[:, None]
    p_out = out_ptr + tok * out_stride_t + head * out_stride_h
    tl.store(p_out[:, None] + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (cols < D)[None, :])
    lse = tl.where(empty, top, shift + tl.log2(total)) * from_base2
    tl.store(lse_ptr + tok * lse_stride_t + head * lse_stride_h, lse, mask=ok)
