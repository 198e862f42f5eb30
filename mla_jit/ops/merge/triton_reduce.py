"""The sum of listed partial states in Triton, BLOCK_R query tokens of a group and head a program. Imports triton only.

Group g's queries are final_map[g] = (first, end) of the output; its partials begin at the rows partial_map[i] of the
partial buffers, for i in indptr[g] … indptr[g + 1], and are summed in this order.
"""

import triton
import triton.language as tl


@triton.jit
def reduce_groups(
    part_ptr, part_lse_ptr, indptr_ptr, final_map_ptr, partial_map_ptr, out_ptr,
    part_stride_t, part_stride_h, part_lse_stride_t, part_lse_stride_h, out_stride_t, out_stride_h,
    H: tl.constexpr, D: tl.constexpr, RUNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A partial row whose LSE is NaN or infinite saw no key and counts as nothing, whatever it holds."""
    LOG2E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    head = (pid // RUNS) % H
    group = pid // (RUNS * H)
    begin = tl.load(indptr_ptr + group)
    end = tl.load(indptr_ptr + group + 1)
    if begin < end:
        q_first = tl.load(final_map_ptr + 2 * group)
        q_end = tl.load(final_map_ptr + 2 * group + 1)
        rows = (pid % RUNS) * BLOCK_R + tl.arange(0, BLOCK_R)
        ok = rows < q_end - q_first
        cols = tl.arange(0, BLOCK_D)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for i in tl.range(begin, end, num_stages=1):
            row = tl.load(partial_map_ptr + i).to(tl.int64) + rows
            p_lse = part_lse_ptr + row * part_lse_stride_t + head * part_lse_stride_h
            lse = tl.load(p_lse, mask=ok, other=float("-inf")) * LOG2E
            lse = tl.where((lse == lse) & (lse < float("inf")), lse, float("-inf"))
            some = ok & (lse != float("-inf"))
            p_part = part_ptr + row * part_stride_t + head * part_stride_h
            part = tl.load(p_part[:, None] + cols[None, :], mask=some[:, None] & (cols < D)[None, :], other=0.0)
            higher = tl.maximum(top, lse)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(lse - shift)
            alpha = tl.exp2(top - shift)
            acc = acc * alpha[:, None] + part.to(tl.float32) * weight[:, None]
            total = total * alpha + weight
            top = higher
        out = tl.where((total > 0)[:, None], acc / total[:, None], 0.0)
        p_out = out_ptr + (q_first.to(tl.int64) + rows) * out_stride_t + head * out_stride_h
        tl.store(
            p_out[:, None] + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None] & (cols < D)[None, :]
        )
