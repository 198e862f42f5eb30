"""From the arguments of a prefill call to a checked `PrefillProblem`, tensors by name, and the numbers of a launch.

Nothing here reads a tensor's content. Every refusal is an InvalidInput that names the argument, what it is and what it
must be. What can be said of any attention call is checked by the functions of ops/decode/inputs.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mla_jit import dtypes
from mla_jit.launch.base import Binding, Number, TensorView
from mla_jit.ops.decode.inputs import (
    LN2,
    _aligned,
    _check,
    _check_outputs,
    _dtype,
    _index,
    _last_stride,
    _scale,
)  # fmt: skip
from mla_jit.problem import ALIGNMENT, PrefillProblem, bucket, rounded

Tensor = Any


@dataclass
class PrefillInputs:
    """A checked call: the problem, tensors by argument name, and the numbers that a launch needs."""

    problem: PrefillProblem
    tensors: dict[str, Tensor]
    numbers: dict[str, Number]
    floats: dict[str, float]
    device: Any
    out_shape: tuple[int, ...]
    views: dict[str, TensorView] = field(default_factory=dict)

    @property
    def binding(self) -> Binding:
        return Binding(self.numbers, self.views)


def prefill_inputs(
    q: Tensor, k: Tensor, v: Tensor, *, qo_indptr: Tensor, kv_indptr: Tensor, max_q_len: int, sm_scale: float,
    max_kv_len: int | None = None, causal: bool = True, logit_cap: float = 0.0, q_scale: Any = None,
    k_scale: Any = None, v_scale: Any = None, out: Tensor | None = None, lse: Tensor | None = None,
    out_dtype: Any = None, return_lse: bool = False, lse_base: str = "e", scheduler: str = "auto",
) -> PrefillInputs:  # fmt: skip
    """Checks a prefill call (see `mla_jit.prefill` for the arguments) and describes it. Raises InvalidInput."""
    every = (q, k, v, qo_indptr, kv_indptr)
    _check(all(hasattr(t, "stride") for t in every), "q, k, v, qo_indptr and kv_indptr must be tensors")
    device = q.device
    for name, t, shape in (("q", q, "[T, H, qk_dim]"), ("k", k, "[Tk, Hk, qk_dim]"), ("v", v, "[Tk, Hk, v_dim]")):
        _check(t.dim() == 3, f"{name} has shape {tuple(t.shape)}; it must be {shape}")
        _check(t.device == device, f"{name} is on {t.device}, q is on {device}; move them to one device")
        _last_stride(name, t)
    (total_q, heads, qk_dim), (total_kv, kv_heads, v_dim) = q.shape, v.shape
    _check(k.shape[-1] == qk_dim, f"q has {qk_dim} elements a head, k {k.shape[-1]}; they must be the same")
    _check(
        tuple(k.shape[:2]) == (total_kv, kv_heads),
        f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; their tokens and heads must be the same",
    )
    _check(k.dtype == v.dtype, f"k is {k.dtype}, v is {v.dtype}; they must be the same")
    _check(
        isinstance(sm_scale, (int, float)) and 0 < sm_scale < float("inf"),
        f"sm_scale is {sm_scale!r}; it must be a positive float",
    )
    _check(logit_cap >= 0, f"logit_cap is {logit_cap}; use 0 for none, or a positive cap")
    _check(lse_base in ("e", "2"), f"lse_base is {lse_base!r}; use 'e' (natural logarithm) or '2'")
    for name, t in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)):
        _index(name, t, 1, device)
        _check(t.shape[0] >= 1, f"{name} is empty; it must have batch + 1 entries")
    batch = qo_indptr.shape[0] - 1
    _check(
        kv_indptr.shape[0] == batch + 1,
        f"kv_indptr has {kv_indptr.shape[0]} entries, qo_indptr {batch + 1}; both need batch + 1",
    )
    _check(max_q_len >= 0, f"max_q_len is {max_q_len}; it must be >= 0 (a host integer: the longest q of a sequence)")
    _check(max_kv_len is None or max_kv_len >= 0, f"max_kv_len is {max_kv_len}; it must be >= 0")

    q_dtype, kv_dtype = _dtype("q", q), _dtype("k", k)
    out_shape = (total_q, heads, v_dim)
    factors = {n: _scale(n, s, device) for n, s in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale))}
    _check_outputs(out, lse, out_shape, device)
    operands = {"q": q, "k": k, "v": v} | ({"out": out} if out is not None else {})
    misaligned = [name for name, t in operands.items() if not _aligned(t)]
    if out is None and v_dim % ALIGNMENT:  # what is allocated
        misaligned.append("out")
    problem = PrefillProblem(
        num_heads=heads, num_kv_heads=kv_heads, qk_dim=qk_dim, v_dim=v_dim, q_dtype=q_dtype, kv_dtype=kv_dtype,
        out_dtype=_out_dtype(q_dtype, out, out_dtype), causal=causal, soft_cap=logit_cap > 0,
        lse=return_lse or lse is not None, q_scale=factors["q_scale"][1] is not None,
        k_scale=factors["k_scale"][1] is not None, v_scale=factors["v_scale"][1] is not None,
        misaligned=tuple(misaligned), token_major=_token_major(k, v),
        index64=tuple(
            n for n, t in (("qo_indptr", qo_indptr), ("kv_indptr", kv_indptr)) if str(t.dtype) == "torch.int64"
        ),
        batch=batch, q_len=rounded(min(max_q_len, total_q)), total_q=rounded(total_q),
        max_kv_len=bucket(total_kv if max_kv_len is None else min(max_kv_len, total_kv)), total_kv=bucket(total_kv),
        hinted=max_kv_len is not None or batch == 1, scheduler=scheduler,
    )  # fmt: skip

    numbers: dict[str, Number] = {}
    for name, t in operands.items():
        numbers |= {f"{name}_stride_t": t.stride(0), f"{name}_stride_h": t.stride(1)}
    if out is None:
        numbers |= {"out_stride_t": heads * v_dim, "out_stride_h": v_dim}
    strides = (heads, 1) if lse is None else lse.stride()
    numbers |= {"lse_stride_t": strides[0], "lse_stride_h": strides[1]}
    floats = {
        "qk_scale": float(sm_scale) * factors["q_scale"][0] * factors["k_scale"][0], "v_scale": factors["v_scale"][0],
        "logit_cap": float(logit_cap), "lse_mul": 1.0 if lse_base == "2" else LN2,
    }  # fmt: skip
    tensors = {
        "q": q, "k": k, "v": v, "qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "out": out, "lse": lse,
        **{name: tensor for name, (_, tensor) in factors.items()},
    }  # fmt: skip
    views = {
        name: TensorView(
            rows=t.shape[0], columns=(t.shape[1] - 1) * t.stride(1) + t.shape[2], row_elements=t.stride(0),
            row_bytes=t.stride(0) * t.element_size(), dtype=kv_dtype,
        )
        for name, t in (("k", k), ("v", v))
    }  # fmt: skip
    return PrefillInputs(problem, tensors, numbers, floats, device, out_shape, views)


def _out_dtype(q_dtype: str, out: Tensor | None, out_dtype: Any) -> str:
    """Of the result: that of `out`, else the wish, else q's, or bf16 for fp8 q."""
    if out is not None:
        _check(
            out_dtype is None or str(out_dtype) == str(out.dtype), f"out is {out.dtype}, out_dtype asks for {out_dtype}"
        )
        return _dtype("out", out)
    if out_dtype is not None:
        row = dtypes.of_torch(out_dtype)
        _check(row is not None, f"out_dtype {out_dtype} is not supported")
        assert row is not None
        return row.name
    return "bf16" if dtypes.DTYPES[q_dtype].bits == 8 else q_dtype


def _token_major(*tensors: Tensor) -> bool:
    """Whether all heads of a token lie within its row, as a two-dimensional tensor map needs."""
    return all((t.shape[1] - 1) * t.stride(1) + t.shape[2] <= t.stride(0) for t in tensors if t.shape[0] and t.shape[1])
