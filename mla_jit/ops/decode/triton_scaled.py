"""Caches with scales, in Triton: tiles in groups of 128 columns, a tuple of tensors each. For triton_splitk.py."""

import triton
import triton.language as tl


@triton.jit
def _load_groups(kv_ptr, kpe_ptr, scales_ptr, pages_ptr, n0, kv_len, kv_stride_page, kv_stride_tok, kpe_stride_page,
                 kpe_stride_tok, scales_stride_page, scales_stride_tok, C: tl.constexpr, R: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr,
                 MASK: tl.constexpr):  # fmt: skip
    """As `_load_tile`, of a cache with scales: (the latents of each group of columns, their scales, rotary parts)."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    filled = offs_n < kv_len
    if PAGE % BLOCK_N == 0:
        page = tl.load(pages_ptr + n0 // PAGE).to(tl.int64)
        row = n0 % PAGE + tl.arange(0, BLOCK_N)
    else:
        page = tl.load(pages_ptr + offs_n // PAGE, mask=filled, other=0).to(tl.int64)
        row = offs_n % PAGE
    p_kv = kv_ptr + (page * kv_stride_page + row * kv_stride_tok)[:, None] + tl.arange(0, GROUP)[None, :]
    p_scale = scales_ptr + page * scales_stride_page + row * scales_stride_tok
    k = ()
    scales = ()
    for g in tl.static_range(C // GROUP):
        if MASK:  # both: 0 times a NaN would be one
            k = k + (tl.load(p_kv + g * GROUP, mask=filled[:, None], other=0.0),)
            scales = scales + (tl.load(p_scale + g, mask=filled, other=0.0),)
        else:
            k = k + (tl.load(p_kv + g * GROUP),)
            scales = scales + (tl.load(p_scale + g),)
    k_pe = k[0]
    if R > 0:
        offs_r = tl.arange(0, BLOCK_R)
        p_pe = kpe_ptr + (page * kpe_stride_page + row * kpe_stride_tok)[:, None] + offs_r[None, :]
        if MASK and BLOCK_R != R:
            k_pe = tl.load(p_pe, mask=filled[:, None] & (offs_r < R)[None, :], other=0.0)
        elif MASK:
            k_pe = tl.load(p_pe, mask=filled[:, None], other=0.0)
        elif BLOCK_R != R:
            k_pe = tl.load(p_pe, mask=(offs_r < R)[None, :], other=0.0)
        else:
            k_pe = tl.load(p_pe)
    return k, scales, k_pe


@triton.jit
def _store_groups(p_row, acc, scale, row_ok, GROUP: tl.constexpr):
    """Rows whose columns lie in a tuple of groups, times `scale`, to where each row begins."""
    for g in tl.static_range(len(acc)):
        p_group = p_row[:, None] + (g * GROUP + tl.arange(0, GROUP))[None, :]
        tl.store(p_group, (acc[g] * scale[:, None]).to(p_row.dtype.element_ty), mask=row_ok[:, None])
