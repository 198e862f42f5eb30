"""The operators `torch.ops.mla_jit.*`, through which a compiled graph calls `decode`, `prefill` and `merge_state`.

`decode` is functional and always returns (out, lse); `decode_out` writes into the caller's tensors. Their arguments are
those of `mla_jit.decode` in the form that an operator's schema knows: a pair (q_nope, q_pe) is `q` and `q_pe`, a pair
(ckv, kpe) is `kv_cache` and `kpe`, a triple also has `kv_scales`, and a scale is a tensor (`q_scale`) or else a float
(`q_scale_value`). Eager calls never come here: they bypass the dispatcher. `prefill` and `prefill_out` are the same of
`mla_jit.prefill`, and `merge_state` of that. Registered once a process, when this module is first imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mla_jit import api, api_prefill
from mla_jit.errors import InvalidInput

_INPUTS = (
    "Tensor q, Tensor? q_pe, Tensor kv_cache, Tensor? kpe, *, int kv_lora_rank, float sm_scale, "
    "Tensor? block_table=None, Tensor? seq_lens=None, Tensor? kv_indptr=None, Tensor? kv_indices=None, "
    "Tensor? kv_last_page_lens=None, Tensor? qo_indptr=None, SymInt? max_q_len=None, SymInt? max_kv_len=None, "
    "SymInt? total_kv=None, bool causal=True, float logit_cap=0.0, Tensor? sinks=None, Tensor? q_scale=None, "
    "float? q_scale_value=None, Tensor? kv_scale=None, float? kv_scale_value=None, int cp_rank=0, int cp_world=1, "
    'str lse_base="e", SymInt? num_kv_splits=None, bool batch_invariant=False, str scheduler="auto", '
    "Tensor? kv_scales=None"
)
_PREFILL = (
    "Tensor q, Tensor k, Tensor v, *, Tensor qo_indptr, Tensor kv_indptr, SymInt max_q_len, float sm_scale, "
    "SymInt? max_kv_len=None, bool causal=True, float logit_cap=0.0, Tensor? q_scale=None, "
    "float? q_scale_value=None, Tensor? k_scale=None, float? k_scale_value=None, Tensor? v_scale=None, "
    'float? v_scale_value=None, str lse_base="e", str scheduler="auto"'
)
_STATES = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
SCHEMAS = {
    "decode": f"decode({_INPUTS}, ScalarType? out_dtype=None) -> (Tensor out, Tensor lse)",
    "decode_out": f"decode_out({_INPUTS}, Tensor(c!)? workspace=None, Tensor(a!) out, Tensor(b!)? lse=None) -> ()",
    "prefill": f"prefill({_PREFILL}, ScalarType? out_dtype=None) -> (Tensor out, Tensor lse)",
    "prefill_out": f"prefill_out({_PREFILL}, Tensor(c!)? workspace=None, Tensor(a!) out, Tensor(b!)? lse=None) -> ()",
    "merge_state": f'merge_state({_STATES}, *, str lse_base="e") -> (Tensor out, Tensor lse)',
}


def _with_scales(names: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments with each scale as one: the tensor, else the float."""
    for name in names:
        value = arguments.pop(f"{name}_value", None)
        if arguments.get(name) is None:
            arguments[name] = value
    return arguments


def _parted_scales(names: tuple[str, ...], arguments: dict[str, Any]) -> dict[str, Any]:
    """The reverse."""
    for name in names:
        if not isinstance(arguments[name], Tensor):
            arguments[f"{name}_value"] = arguments.pop(name)
    return arguments


def _call(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, kpe: Tensor | None, arguments: dict[str, Any]) -> Any:
    """`api.decode` from an operator's arguments."""
    arguments = _with_scales(("q_scale", "kv_scale"), arguments)
    scales = arguments.pop("kv_scales", None)
    cache: Any = kv_cache if kpe is None else (kv_cache, kpe)
    if scales is not None:
        cache = (kv_cache, scales, kpe)
    with api.keeping_nothing():
        return api.decode(q if q_pe is None else (q, q_pe), cache, **arguments)


def _decode(
    q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, kpe: Tensor | None, **arguments: Any
) -> tuple[Tensor, Tensor]:
    out, lse = _call(q, q_pe, kv_cache, kpe, arguments | {"return_lse": True})
    return out, lse


def _decode_out(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, kpe: Tensor | None, **arguments: Any) -> None:
    _call(q, q_pe, kv_cache, kpe, arguments)


def _decode_fake(
    q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, kpe: Tensor | None, *, kv_lora_rank: int,
    out_dtype: torch.dtype | None = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_out(q, kv_lora_rank, out_dtype), _empty_lse(q)


def _decode_out_fake(q: Tensor, q_pe: Tensor | None, kv_cache: Tensor, kpe: Tensor | None, **_: Any) -> None:
    return None


def _empty_out(q: Tensor, kv_lora_rank: int, out_dtype: torch.dtype | None) -> Tensor:
    """The `out` that `decode` allocates."""
    if out_dtype is None:
        out_dtype = torch.bfloat16 if q.element_size() == 1 else q.dtype
    return q.new_empty((*q.shape[:-1], kv_lora_rank), dtype=out_dtype)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def traced_decode(
    q: Any, kv_cache: Any, *, metadata: Any = None, workspace: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, out_dtype: torch.dtype | None = None, return_lse: bool = False, **arguments: Any,
) -> Any:  # fmt: skip
    """What `mla_jit.decode` does while torch.compile traces it: the same call and result through the operators."""
    if metadata is not None:
        raise InvalidInput("metadata cannot be traced yet; call decode outside of torch.compile, or pass None")
    q_parts = tuple(q) if isinstance(q, (tuple, list)) else (q, None)
    kv_parts = tuple(kv_cache) if isinstance(kv_cache, (tuple, list)) else (kv_cache, None)
    if len(kv_parts) == 3:
        arguments["kv_scales"] = kv_parts[1]
        kv_parts = kv_parts[::2]
    if len(q_parts) != 2 or len(kv_parts) != 2:
        raise InvalidInput(
            "q and kv_cache are one tensor each, a pair, or a cache of three: (q_nope, q_pe), (ckv, kpe), "
            "(ckv, kv_scales, kpe)"
        )
    arguments = _parted_scales(("q_scale", "kv_scale"), arguments)
    if out is None and lse is None and workspace is None:
        made, made_lse = torch.ops.mla_jit.decode(*q_parts, *kv_parts, out_dtype=out_dtype, **arguments)
        return (made, made_lse) if return_lse else made
    if out is None:
        out = _empty_out(q_parts[0], arguments["kv_lora_rank"], out_dtype)
    elif out_dtype is not None and out_dtype != out.dtype:
        raise InvalidInput(f"out is {out.dtype}, out_dtype asks for {out_dtype}")
    if lse is None and return_lse:
        lse = _empty_lse(q_parts[0])
    torch.ops.mla_jit.decode_out(*q_parts, *kv_parts, workspace=workspace, out=out, lse=lse, **arguments)
    return (out, lse) if return_lse else out


_SCALES = ("q_scale", "k_scale", "v_scale")


def _prefill(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    with api.keeping_nothing():
        out, lse = api_prefill.prefill(q, k, v, return_lse=True, **_with_scales(_SCALES, arguments))
    return out, lse


def _prefill_out(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> None:
    with api.keeping_nothing():
        api_prefill.prefill(q, k, v, **_with_scales(_SCALES, arguments))


def _prefill_fake(
    q: Tensor, k: Tensor, v: Tensor, *, out_dtype: torch.dtype | None = None, **_: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_out(q, v.shape[-1], out_dtype), _empty_lse(q)


def _prefill_out_fake(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> None:
    return None


def traced_prefill(
    q: Tensor, k: Tensor, v: Tensor, *, workspace: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, out_dtype: torch.dtype | None = None, return_lse: bool = False, **arguments: Any,
) -> Any:  # fmt: skip
    """What `mla_jit.prefill` does while torch.compile traces it: the same call and result through the operators."""
    arguments = _parted_scales(_SCALES, arguments)
    if out is None and lse is None and workspace is None:
        made, made_lse = torch.ops.mla_jit.prefill(q, k, v, out_dtype=out_dtype, **arguments)
        return (made, made_lse) if return_lse else made
    if out is None:
        out = _empty_out(q, v.shape[-1], out_dtype)
    elif out_dtype is not None and out_dtype != out.dtype:
        raise InvalidInput(f"out is {out.dtype}, out_dtype asks for {out_dtype}")
    if lse is None and return_lse:
        lse = _empty_lse(q)
    torch.ops.mla_jit.prefill_out(q, k, v, workspace=workspace, out=out, lse=lse, **arguments)
    return (out, lse) if return_lse else out


def _merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: str = "e") -> Any:
    return api_prefill.merge_state(out_a, lse_a, out_b, lse_b, lse_base=lse_base)


def _merge_state_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: str = "e") -> Any:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


def traced_merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None,
    lse_base: str = "e",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `mla_jit.merge_state` does while torch.compile traces it; given outputs are copied to."""
    made, made_lse = torch.ops.mla_jit.merge_state(out_a, lse_a, out_b, lse_b, lse_base=lse_base)
    out = made if out is None else out.copy_(made)
    return out, made_lse if lse is None else lse.copy_(made_lse)


def _register() -> Any:
    """Defines the operators; they live as long as the returned library."""
    new: Any = Library  # which is not annotated
    library = new("mla_jit", "DEF")
    for name, kernel, fake in (
        ("decode", _decode, _decode_fake), ("decode_out", _decode_out, _decode_out_fake),
        ("prefill", _prefill, _prefill_fake), ("prefill_out", _prefill_out, _prefill_out_fake),
        ("merge_state", _merge_state, _merge_state_fake),
    ):  # fmt: skip
        library.define(SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mla_jit::{name}", fake, lib=library)
    return library


# importlib.reload runs this module again in the same namespace; a second DEF of the operators would be an error.
_library = globals().get("_library") or _register()
