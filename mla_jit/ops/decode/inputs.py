"""From the arguments of a decode call to a checked `DecodeProblem`, tensors by name, and the numbers of a launch.

Nothing here reads a tensor's content. Every refusal is an InvalidInput that names the argument, what it is and what it
must be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mla_jit import dtypes
from mla_jit.errors import InvalidInput
from mla_jit.launch.base import Binding, Number, TensorView
from mla_jit.layouts import GROUP, LAYOUTS, Layout
from mla_jit.problem import ALIGNMENT, NO_KV_SCALE, DecodeProblem, bucket

Tensor = Any
LN2 = 0.6931471805599453


@dataclass
class DecodeInputs:
    """A checked call: the problem, tensors by argument name, and the numbers that a launch needs."""

    problem: DecodeProblem
    tensors: dict[str, Tensor]
    numbers: dict[str, Number]
    floats: dict[str, float]
    device: Any
    out_shape: tuple[int, ...]
    views: dict[str, TensorView] = field(default_factory=dict)

    @property
    def binding(self) -> Binding:
        return Binding(self.numbers, self.views)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidInput(message)


def _dtype(name: str, tensor: Tensor) -> str:
    row = dtypes.of_torch(tensor.dtype)
    if row is None:
        raise InvalidInput(
            f"{name} has dtype {tensor.dtype}; supported: {', '.join(d.torch for d in dtypes.DTYPES.values())}"
        )
    return row.name


def _last_stride(name: str, t: Tensor) -> None:
    _check(
        t.shape[-1] <= 1 or t.stride(-1) == 1,
        f"{name} has stride {t.stride(-1)} in its last dimension; it must be 1 (call .contiguous(), or keep the head "
        "dimension innermost)",
    )


def _aligned(*tensors: Tensor) -> bool:
    """Base a multiple of 16 bytes, strides multiples of 16 elements: what a kernel compiled as `aligned` is told.

    A part without elements (of a rope_dim of 0) is not looked at: nothing is read there.
    """
    return all(
        t.data_ptr() % ALIGNMENT == 0
        and all(s % ALIGNMENT == 0 for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1)
        for t in tensors
        if t.numel()
    )


def _index(name: str, t: Tensor, ndim: int, device: Any) -> None:
    _check(str(t.dtype) in ("torch.int32", "torch.int64"), f"{name} has dtype {t.dtype}; it must be int32 (or int64)")
    _check(t.dim() == ndim, f"{name} has shape {tuple(t.shape)}; it must have {ndim} dimension{'s' * (ndim > 1)}")
    _check(t.device == device, f"{name} is on {t.device}, q is on {device}; move them to one device")
    _check(t.shape[-1] <= 1 or t.stride(-1) == 1, f"{name} must be contiguous in its last dimension")


def _queries(q: Any, ragged: bool, width: int, rank: int) -> tuple[list[Tensor], bool]:
    """q as [tokens-or-batch…, H, width] parts: one tensor, or (q_nope, q_pe)."""
    split = isinstance(q, (tuple, list))
    parts = list(q) if split else [q]
    _check(len(parts) in (1, 2), f"q is a tuple of {len(parts)}; pass one tensor or (q_nope, q_pe)")
    split = len(parts) == 2
    widths = [rank, width - rank] if split else [width]
    for name, part, want in zip(("q_nope", "q_pe") if split else ("q",), parts, widths, strict=True):
        _check(
            part.dim() == 3 or (part.dim() == 4 and not ragged),
            f"{name} has shape {tuple(part.shape)}; it must be [B, H, {want}]"
            + (" ([T, H, …] with qo_indptr)" if ragged else f" or [B, q_len, H, {want}]"),
        )
        _check(
            part.shape[-1] == want,
            f"{name} has {part.shape[-1]} elements a head; kv_lora_rank and the cache ask for {want}",
        )
        _last_stride(name, part)
    if split:
        _check(
            parts[0].shape[:-1] == parts[1].shape[:-1],
            f"q_nope {tuple(parts[0].shape)} and q_pe {tuple(parts[1].shape)} differ",
        )
        _check(
            parts[0].dtype == parts[1].dtype,
            f"q_nope is {parts[0].dtype}, q_pe is {parts[1].dtype}; they must be the same",
        )
    return parts, split


def _cache(kv_cache: Any, rank: int) -> tuple[Layout, dict[str, Tensor]]:
    """The cache's layout and its buffers by name, as [pages, page_size, num_kv_heads, width]; no kpe for a None."""
    parts = list(kv_cache) if isinstance(kv_cache, (tuple, list)) else [kv_cache]
    layout = next((row for row in LAYOUTS.values() if len(row.buffers) == len(parts)), None)
    if layout is None:
        raise InvalidInput(f"kv_cache is a tuple of {len(parts)}; pass one tensor, (ckv, kpe) or (ckv, kv_scales, kpe)")
    buffers = dict(zip(layout.buffers, parts, strict=True))
    if layout.scaled and buffers["kpe"] is None:
        del buffers["kpe"]
    for name, part in buffers.items():
        _check(part is not None, f"{name} is None; kv_cache must be tensors")
        _check(
            part.dim() in (3, 4),
            f"{name} has shape {tuple(part.shape)}; it must be [pages, page_size, num_kv_heads, width] or "
            "[pages, page_size, width]",
        )
        _last_stride(name, part)
        buffers[name] = part if part.dim() == 4 else part.unsqueeze(2)
    latent, *others = buffers
    first = buffers[latent]
    _check(
        first.shape[-1] >= rank and (len(parts) == 1 or first.shape[-1] == rank),
        f"{latent} is {first.shape[-1]} wide, kv_lora_rank is {rank}",
    )
    for name in others:
        _check(
            first.shape[:-1] == buffers[name].shape[:-1],
            f"{latent} {tuple(first.shape)} and {name} {tuple(buffers[name].shape)} differ",
        )
    if layout.scaled:
        groups = -(-rank // GROUP)
        _check(
            str(buffers["kv_scales"].dtype) == "torch.float32" and buffers["kv_scales"].shape[-1] == groups,
            f"kv_scales is {buffers['kv_scales'].dtype}, {buffers['kv_scales'].shape[-1]} wide; it must be float32 and "
            f"{groups} wide, a scale for {GROUP} columns",
        )
    elif "kpe" in buffers:
        _check(
            first.dtype == buffers["kpe"].dtype,
            f"ckv is {first.dtype}, kpe is {buffers['kpe'].dtype}; they must be the same",
        )
    return layout, buffers


def _scale(name: str, value: Any, device: Any) -> tuple[float, Tensor | None]:
    """A scale as (factor, None) or (1, device tensor)."""
    if value is None:
        return 1.0, None
    if isinstance(value, (int, float)):
        return float(value), None
    _check(
        str(value.dtype) == "torch.float32" and value.numel() == 1,
        f"{name} must be a float or a 1-element float32 tensor",
    )
    _check(value.device == device, f"{name} is on {value.device}, q is on {device}; move it, or pass a float")
    return 1.0, value


def decode_inputs(
    q: Any, kv_cache: Any, *, kv_lora_rank: int, sm_scale: float, block_table: Tensor | None = None,
    seq_lens: Tensor | None = None, kv_indptr: Tensor | None = None, kv_indices: Tensor | None = None,
    kv_last_page_lens: Tensor | None = None, qo_indptr: Tensor | None = None, max_q_len: int | None = None,
    max_kv_len: int | None = None, total_kv: int | None = None, causal: bool = True, logit_cap: float = 0.0,
    sinks: Tensor | None = None, q_scale: Any = None, kv_scale: Any = None, cp_rank: int = 0, cp_world: int = 1,
    out: Tensor | None = None, lse: Tensor | None = None, out_dtype: Any = None, return_lse: bool = False,
    lse_base: str = "e", num_kv_splits: int | None = None, batch_invariant: bool = False, scheduler: str = "auto",
    planned: bool = False, groups: int | None = None,
) -> DecodeInputs:  # fmt: skip
    """Checks a decode call (see `mla_jit.decode` for the arguments) and describes it. Raises InvalidInput."""
    rank = kv_lora_rank
    layout, every = _cache(kv_cache, rank)
    scales = every.get("kv_scales")
    buffers = [buffer for name, buffer in every.items() if name != "kv_scales"]
    width = sum(b.shape[-1] for b in buffers)
    rope = width - rank
    parts, q_split = _queries(q, qo_indptr is not None, width, rank)
    q0, kv0 = parts[0], buffers[0]
    device = q0.device
    for name, t in (("q_pe", parts[-1]), ("kv_cache", kv0), *list(every.items())[1:]):
        _check(t.device == device, f"{name} is on {t.device}, q is on {device}; move them to one device")
    if layout.scaled and "kpe" in every:
        _check(every["kpe"].dtype == q0.dtype, f"kpe is {every['kpe'].dtype}, q is {q0.dtype}; they must be the same")
    _check(
        isinstance(sm_scale, (int, float)) and 0 < sm_scale < float("inf"),
        f"sm_scale is {sm_scale!r}; it must be a positive float",
    )
    _check(logit_cap >= 0, f"logit_cap is {logit_cap}; use 0 for none, or a positive cap")
    _check(lse_base in ("e", "2"), f"lse_base is {lse_base!r}; use 'e' (natural logarithm) or '2'")
    _check(
        cp_world >= 1 and 0 <= cp_rank < cp_world,
        f"cp_rank {cp_rank} does not lie in 0 … cp_world - 1 (cp_world {cp_world})",
    )

    heads, kv_heads, page = q0.shape[-2], kv0.shape[2], kv0.shape[1]
    batch, q_len, ragged = _batch(q0, qo_indptr, max_q_len, batch_invariant, device)
    paging, table, capacity = _paging(
        block_table, seq_lens, kv_indptr, kv_indices, kv_last_page_lens, page, batch, cp_world, device
    )
    capacity = min(capacity, kv0.shape[0] * page) if paging == "table" else kv0.shape[0] * page
    if max_kv_len is not None:
        _check(max_kv_len >= 0, f"max_kv_len is {max_kv_len}; it must be >= 0")
        capacity = min(capacity, -(-max_kv_len // cp_world))
    capacity = bucket(capacity)  # hints and table widths change from step to step; kernels and plans must not

    q_dtype, kv_dtype = _dtype("q", q0), _dtype("kv_cache", kv0)
    if out is not None:
        result = _dtype("out", out)
        _check(
            out_dtype is None or str(out_dtype) == str(out.dtype), f"out is {out.dtype}, out_dtype asks for {out_dtype}"
        )
    elif out_dtype is not None:
        row = dtypes.of_torch(out_dtype)
        _check(row is not None, f"out_dtype {out_dtype} is not supported")
        assert row is not None
        result = row.name
    else:
        result = "bf16" if dtypes.DTYPES[q_dtype].bits == 8 else q_dtype
    q_factor, q_scale = _scale("q_scale", q_scale, device)
    _check(kv_scale is None or not layout.scaled, NO_KV_SCALE)
    kv_factor, kv_scale = _scale("kv_scale", kv_scale, device)
    if sinks is not None:
        _check(
            str(sinks.dtype) == "torch.float32"
            and tuple(sinks.shape) == (heads,)
            and sinks.device == device
            and sinks.stride(0) == 1,
            f"sinks must be a contiguous float32 [{heads}] on {device}; it is {sinks.dtype} {tuple(sinks.shape)} on "
            f"{sinks.device}",
        )

    out_shape = (*q0.shape[:-1], rank)
    _check_outputs(out, lse, out_shape, device)
    kinds = {"q": parts, "kv": buffers} | ({"out": [out]} if out is not None else {})
    misaligned = tuple(name for name, group in kinds.items() if not _aligned(*group))
    if out is None and rank % ALIGNMENT:  # what is allocated
        misaligned += ("out",)
    index64 = tuple(
        n for n, t in (*table.items(), ("qo_indptr", qo_indptr)) if t is not None and str(t.dtype) == "torch.int64"
    )
    problem = DecodeProblem(
        num_heads=heads, kv_lora_rank=rank, rope_dim=rope, num_kv_heads=kv_heads, q_dtype=q_dtype, kv_dtype=kv_dtype,
        out_dtype=result, page_size=page, layout=layout.name, q_split=q_split, paging=paging,
        has_lens=seq_lens is not None, ragged=ragged, causal=causal, soft_cap=logit_cap > 0, sinks=sinks is not None,
        lse=return_lse or lse is not None, q_scale=q_scale is not None, kv_scale=kv_scale is not None,
        context_parallel=cp_world > 1, misaligned=misaligned, flat_pages=_flat(buffers), index64=index64, batch=batch,
        q_len=q_len, max_kv_len=capacity, hinted=max_kv_len is not None or total_kv is not None,
        total_kv=None if total_kv is None else bucket(total_kv), num_kv_splits=num_kv_splits,
        batch_invariant=batch_invariant, scheduler=scheduler, planned=planned, groups=groups,
    )  # fmt: skip

    rope_q = parts[1] if q_split else q0[..., rank:]
    rope_kv = buffers[1] if len(buffers) == 2 else kv0[..., rank:]
    tensors = {
        "q": q0, "q_pe": rope_q, "kv": kv0, "kpe": rope_kv, "scales": scales, "sinks": sinks, "q_scale": q_scale,
        "kv_scale": kv_scale, "qo_indptr": qo_indptr, "out": out, "lse": lse, **table,
    }  # fmt: skip
    per_token = 0 if (ragged or q0.dim() == 3) else 1  # the dimension of q that counts tokens
    if per_token == 1:
        for name, t in (("q", q0), ("q_pe", rope_q), ("out", out), ("lse", lse)):
            _check(
                t is None or q_len <= 1 or batch <= 1 or t.stride(0) == q_len * t.stride(1),
                f"{name} has strides {tuple(t.stride()) if t is not None else ()}: batch and q_len must merge into one "
                "token dimension (stride(0) == q_len * stride(1)); call .contiguous()",
            )
    pages = table["table"]
    assert pages is not None
    numbers: dict[str, Number] = {"cp_rank": cp_rank, "cp_world": cp_world, "table_stride": pages.stride(0)}
    if paging == "table":  # how many page ids a list has is not part of a call's signature
        numbers["table_width"] = pages.shape[1]
    token_dim = 1 if (per_token == 1 and (q_len > 1)) else 0
    for name, t in (("q", q0), ("q_pe", rope_q)):
        numbers |= {f"{name}_stride_t": t.stride(token_dim), f"{name}_stride_h": t.stride(-2)}
    for name, t in (("kv", kv0), ("kpe", rope_kv), *(() if scales is None else (("scales", scales),))):
        numbers |= {
            f"{name}_stride_page": t.stride(0),
            f"{name}_stride_tok": t.stride(1),
            f"{name}_stride_head": t.stride(2),
        }
    if out is not None:
        numbers |= {"out_stride_t": out.stride(token_dim), "out_stride_h": out.stride(-2)}
    else:
        numbers |= {"out_stride_t": heads * rank, "out_stride_h": rank}
    if lse is not None:
        numbers |= {"lse_stride_t": lse.stride(token_dim), "lse_stride_h": lse.stride(-1)}
    else:
        numbers |= {"lse_stride_t": heads, "lse_stride_h": 1}
    floats = {
        "qk_scale": float(sm_scale) * q_factor * kv_factor, "v_scale": kv_factor, "logit_cap": float(logit_cap),
        "lse_mul": 1.0 if lse_base == "2" else LN2,
    }  # fmt: skip
    views = {
        name: TensorView(
            rows=t.shape[0] * page,
            columns=(t.shape[2] - 1) * t.stride(2) + w,
            row_elements=t.stride(1),
            row_bytes=t.stride(1) * t.element_size(),
            dtype=dtype,
        )
        for name, t, w, dtype in (("kv", kv0, rank, kv_dtype), ("kpe", rope_kv, rope, problem.rope_dtype))
    }
    return DecodeInputs(problem, tensors, numbers, floats, device, out_shape, views)


def _flat(buffers: list[Tensor]) -> bool:
    """Whether a token's row number is page · page_size + slot, as a two-dimensional tensor map needs."""
    return all(b.shape[0] <= 1 or b.stride(0) == b.shape[1] * b.stride(1) for b in buffers)


def _batch(
    q0: Tensor, qo_indptr: Tensor | None, max_q_len: int | None, invariant: bool, device: Any
) -> tuple[int, int, bool]:  # fmt: skip
    """(batch, q_len, ragged). `invariant`: q_len must not depend on how many tokens the batch has."""
    if qo_indptr is None:
        q_len = q0.shape[1] if q0.dim() == 4 else 1
        _check(max_q_len is None or max_q_len >= q_len, f"max_q_len is {max_q_len}, q holds {q_len} tokens a sequence")
        return q0.shape[0], q_len, False
    _index("qo_indptr", qo_indptr, 1, device)
    _check(qo_indptr.shape[0] >= 1, "qo_indptr is empty; it must have batch + 1 entries")
    _check(
        max_q_len is not None and max_q_len >= 0,
        "qo_indptr needs max_q_len (a host integer: the longest q of a sequence)",
    )
    assert max_q_len is not None
    return qo_indptr.shape[0] - 1, max_q_len if invariant else min(max_q_len, q0.shape[0]), True


def _paging(
    block_table: Tensor | None, seq_lens: Tensor | None, kv_indptr: Tensor | None, kv_indices: Tensor | None,
    last: Tensor | None, page: int, batch: int, cp_world: int, device: Any,
) -> tuple[str, dict[str, Tensor | None], int]:  # fmt: skip
    """(paging, index tensors by name, capacity in tokens a sequence or 0 where the host cannot know)."""
    if block_table is not None:
        _check(
            kv_indptr is None and kv_indices is None, "pass block_table + seq_lens, or kv_indptr + kv_indices, not both"
        )
        _check(seq_lens is not None, "block_table needs seq_lens (int32 [B], on the device)")
        assert seq_lens is not None
        _index("block_table", block_table, 2, device)
        _index("seq_lens", seq_lens, 1, device)
        _check(
            block_table.shape[0] == batch and seq_lens.shape[0] == batch,
            f"q has batch {batch}, block_table {block_table.shape[0]}, seq_lens {seq_lens.shape[0]}: not the same",
        )
        return (
            "table",
            {"table": block_table, "lens": seq_lens, "kv_indptr": None, "last": None},
            block_table.shape[1] * page,
        )
    _check(
        kv_indptr is not None and kv_indices is not None,
        "no page table: pass block_table + seq_lens, or kv_indptr + kv_indices (+ kv_last_page_lens)",
    )
    assert kv_indptr is not None
    assert kv_indices is not None
    _index("kv_indptr", kv_indptr, 1, device)
    _index("kv_indices", kv_indices, 1, device)
    _check(
        kv_indptr.shape[0] == batch + 1,
        f"kv_indptr has {kv_indptr.shape[0]} entries, batch is {batch}; it needs batch + 1",
    )
    if seq_lens is not None:
        _index("seq_lens", seq_lens, 1, device)
        _check(seq_lens.shape[0] == batch, f"seq_lens has {seq_lens.shape[0]} entries, batch is {batch}")
    else:
        _check(cp_world == 1, "cp_world > 1 needs seq_lens: the sequences' lengths over all ranks")
        _check(page == 1 or last is not None, f"page_size {page} needs kv_last_page_lens (or seq_lens)")
    if last is not None and page > 1 and seq_lens is None:
        _index("kv_last_page_lens", last, 1, device)
        _check(last.shape[0] == batch, f"kv_last_page_lens has {last.shape[0]} entries, batch is {batch}")
    else:
        last = None  # at page 1 callers pass anything here, e.g. the sequence lengths
    return "csr", {"table": kv_indices, "lens": seq_lens, "kv_indptr": kv_indptr, "last": last}, 0


def _check_outputs(out: Tensor | None, lse: Tensor | None, out_shape: tuple[int, ...], device: Any) -> None:
    if out is not None:
        _check(tuple(out.shape) == out_shape, f"out has shape {tuple(out.shape)}; it must be {out_shape}")
        _check(out.device == device, f"out is on {out.device}, q is on {device}")
        _last_stride("out", out)
    if lse is not None:
        _check(str(lse.dtype) == "torch.float32", f"lse is {lse.dtype}; it must be float32")
        _check(tuple(lse.shape) == out_shape[:-1], f"lse has shape {tuple(lse.shape)}; it must be {out_shape[:-1]}")
        _check(lse.device == device, f"lse is on {lse.device}, q is on {device}")
