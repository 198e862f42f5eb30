"""The public functions of the prompt phase: `prefill`, `prefill_paged`, `merge_state`. Their warm path is api.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mla_jit import api, target
from mla_jit.errors import InvalidInput
from mla_jit.ops.merge.inputs import merge_inputs
from mla_jit.ops.merge.reduce import reduce_inputs
from mla_jit.ops.prefill.inputs import PrefillInputs, prefill_inputs
from mla_jit.plan import Executable

_OPERANDS = (
    "q", "k", "v", "qo_indptr", "kv_indptr", "q_scale", "k_scale", "v_scale", "out", "lse", "workspace",
)  # fmt: skip
_WORKSPACE = _OPERANDS.index("workspace")


def prefill(
    q: Tensor, k: Tensor, v: Tensor, *, qo_indptr: Tensor, kv_indptr: Tensor, max_q_len: int, sm_scale: float,
    max_kv_len: int | None = None, causal: bool = True, logit_cap: float = 0.0,
    q_scale: Tensor | float | None = None, k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None, workspace: Tensor | None = None, out: Tensor | None = None,
    lse: Tensor | None = None, out_dtype: torch.dtype | None = None, return_lse: bool = False, lse_base: str = "e",
    scheduler: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of many query tokens a sequence over K and V in full: MLA's un-absorbed form, or any MHA and GQA.

    For query i and head h of a sequence with q_len queries and kv_len keys: out = Σ_j softmax_j(sm_scale · q·k_j) v_j
    over j ≤ kv_len - q_len + i (causal: the last query sees all keys, as a chunk of a prompt does that follows a
    prefix) or all j (DeepSeek-V2, arXiv 2405.04434, section 2.1, with K and V projected up).

    Args:
        q: [T, H, qk_dim], the sequences one after the other, free strides but for the last dimension. DeepSeek's qk_dim
            is 192 (128 + 64), its v_dim 128; any others are served. bf16, fp16, fp8 (fp32 on the cpu).
        k, v: [Tk, Hk, qk_dim] and [Tk, Hk, v_dim]; H is a multiple of Hk. Both of q's dtype, or both fp8 e4m3.
        qo_indptr, kv_indptr: int32 [B + 1] on the device, never read back: the first token of each sequence, and the
            end of the last. Rows of `out` and `lse` that belong to no sequence are not written; rows of k and v that
            belong to none are not read.
        max_q_len: the host's bound of the longest q of a sequence; what a longer one has beyond it is not computed.
        sm_scale: the softmax scale, positive. DeepSeek's is 192^-½ · mscale².
        max_kv_len: a host hint for the choice of a config; without it all rows of k count.
        causal: see above; with kv_len < q_len the first q_len - kv_len queries see nothing.
        logit_cap: cap · tanh(x / cap) on scaled logits, before the mask; 0 for none.
        q_scale, k_scale, v_scale: per-tensor dequantisation scales, float or 1-element fp32 tensors on the device.
        workspace: uint8 on the device, 16-byte aligned, at least `last_dispatch().workspace_bytes` of a call of these
            shapes; else one is kept a stream.
        out, lse: where to write [T, H, v_dim] and fp32 [T, H]; allocated if absent.
        out_dtype: of an allocated `out`; q's, or bf16 for fp8 q.
        return_lse: also return log Σ exp(logit), fp32 [T, H]; -inf for a row with nothing to attend (output 0).
        lse_base: "e" or "2".
        scheduler: "tiles", a program a block of queries and head; "persistent", one resident wave of programs takes
            blocks off a list that a kernel makes of the lengths, the longest first, and cuts their keys where there are
            fewer blocks than programs; "auto", the tuner's choice. The CPU has no schedulers and serves all alike.

    Returns:
        out, or (out, lse) with return_lse. The same inputs always give the same bits.

    Raises:
        InvalidInput before any launch; NoVariant with every variant's reason; CompileError; CacheMiss in strict mode or
        under graph capture (call `warmup` first).
    """
    if torch.compiler.is_compiling():
        from mla_jit import torch_ops

        return torch_ops.traced_prefill(
            q, k, v, qo_indptr=qo_indptr, kv_indptr=kv_indptr, max_q_len=max_q_len, sm_scale=sm_scale,
            max_kv_len=max_kv_len, causal=causal, logit_cap=logit_cap, q_scale=q_scale, k_scale=k_scale,
            v_scale=v_scale, workspace=workspace, out=out, lse=lse, out_dtype=out_dtype, return_lse=return_lse,
            lse_base=lse_base, scheduler=scheduler,
        )  # fmt: skip
    # The key holds all that the binding below depends on: shapes, strides, dtypes, devices, alignment, flags.
    try:
        key = (
            "prefill", *map(api._out_key, (q, k, v)), api._tensor_key(qo_indptr), api._tensor_key(kv_indptr),
            max_q_len, None if max_kv_len is None else (max_kv_len > 0, (max_kv_len - 1).bit_length()), sm_scale,
            causal, logit_cap, api._scale_key(q_scale), api._scale_key(k_scale), api._scale_key(v_scale),
            None if out is None else api._out_key(out), None if lse is None else api._out_key(lse), out_dtype,
            return_lse, lse_base, scheduler,
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"q, k, v and the index arguments must be tensors: {error}") from error
    call = api._calls.get(key)
    if call is None:
        call = api._resolve(key, prefill_inputs(
            q, k, v, qo_indptr=qo_indptr, kv_indptr=kv_indptr, max_q_len=max_q_len, sm_scale=sm_scale,
            max_kv_len=max_kv_len, causal=causal, logit_cap=logit_cap, q_scale=q_scale, k_scale=k_scale,
            v_scale=v_scale, out=out, lse=lse, out_dtype=out_dtype, return_lse=return_lse, lse_base=lse_base,
            scheduler=scheduler,
        ), place=_place)  # fmt: skip
    if out is None:
        out = call.allocate(call.out_shape, call.out_strides, call.out_dtype)
    if lse is None and call.lse:
        lse = call.allocate(call.out_shape[:-1], call.lse_strides, torch.float32)
    api._last = call.dispatch
    if call.bound is not None:
        stream = call.stream_of(call.device)
        if workspace is not None:
            api._check_workspace(workspace, call, q)
        else:
            workspace = api._workspace(call, stream) if call.workspace_bytes else out
        operands: tuple[Any, ...] = (
            q, k, v, qo_indptr, kv_indptr, q_scale, k_scale, v_scale, out, lse, workspace,
        )  # fmt: skip
        call.bound.run(call.pointers(operands), call.floats, stream)
    elif (host := call.executable.variant.host) is not None and out.numel():
        host(call.executable.problem, call.executable.config, prefill_inputs(
            q, k, v, qo_indptr=qo_indptr, kv_indptr=kv_indptr, max_q_len=max_q_len, sm_scale=sm_scale,
            max_kv_len=max_kv_len, causal=causal, logit_cap=logit_cap, q_scale=q_scale, k_scale=k_scale,
            v_scale=v_scale, out=out, lse=lse, out_dtype=out_dtype, return_lse=return_lse, lse_base=lse_base,
            scheduler=scheduler,
        ))  # fmt: skip
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _place(name: str, offset: int, inputs: PrefillInputs, executable: Executable) -> tuple[int, int]:
    """Where a kernel's operand is found among the call's: its index, and bytes to add."""
    if name in executable.offsets:
        return _WORKSPACE, executable.offsets[name] + offset
    return _OPERANDS.index(name), offset


def prefill_paged(
    q: Tensor | tuple[Tensor, Tensor], kv_cache: api.Cache, *, kv_lora_rank: int, sm_scale: float,
    **arguments: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A chunk of a prompt over the paged latent cache, in absorbed form: `decode` for a q of any length.

    Takes the arguments of `mla_jit.decode`, mostly `qo_indptr` and `max_q_len`, and returns and raises as it does; the
    chunk's own tokens are in the cache already, and the last query sees all of it. It is `decode`'s kernels that run:
    they serve any q_len. But where the queries alone fill the device no sequence is cut (num_kv_splits 1, unless it is
    given), for cutting would need fp32 partials of all rows: q_len · H · kv_lora_rank · 4 bytes a piece.

    A key costs (2 · 512 + 64) · 2 FLOPs here and (192 + 128) · 2 in `prefill`; so long prompts are better projected up,
    and merged with what this gives for a prefix (`merge_state`) where that is not worth it.
    """
    first = q[0] if isinstance(q, (tuple, list)) else q
    wishes = ("num_kv_splits", "batch_invariant", "metadata")
    plain = not any(arguments.get(name) for name in wishes) and arguments.get("scheduler", "auto") == "auto"
    if plain and not torch.compiler.is_compiling():
        where = target.of_device(first.device.type, first.device.index or 0)
        if first.shape[:-1].numel() >= _ROWS * where.sms:
            arguments["num_kv_splits"] = 1
    return api.decode(q, kv_cache, kv_lora_rank=kv_lora_rank, sm_scale=sm_scale, **arguments)


_ROWS = 64  # of decode's tallest block
_STATES = ("a", "lse_a", "b", "lse_b", "out", "lse")  # the operands of a merge


def _place_state(name: str, offset: int, inputs: Any, executable: Executable) -> tuple[int, int]:
    return _STATES.index(name), offset


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None,
    lse_base: str = "e",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention over the keys of two states together: of a prompt's chunk and its prefix, or of two ranks.

    out = (e^lse_a · out_a + e^lse_b · out_b) / (e^lse_a + e^lse_b), lse = log(e^lse_a + e^lse_b), computed in fp32.

    Args:
        out_a, out_b: [T, H, D], bf16, fp16 or fp32, each its own, free strides but for the last dimension.
        lse_a, lse_b: fp32 [T, H]. -inf says that a row saw no key: then its output does not count, whatever it holds
            (+inf, as FlashMLA says it, is taken for -inf). Where both are, the result is 0 and -inf.
        out, lse: where to write; out_a, lse_a, out_b and lse_b are allowed. Allocated if absent, `out` in out_a's
            dtype.
        lse_base: "e" or "2", of all three LSEs.

    Returns:
        (out, lse).

    Raises:
        InvalidInput before any launch; NoVariant; CompileError; CacheMiss in strict mode or under graph capture.
    """
    if torch.compiler.is_compiling():
        from mla_jit import torch_ops

        return torch_ops.traced_merge_state(out_a, lse_a, out_b, lse_b, out=out, lse=lse, lse_base=lse_base)
    try:
        states = (out_a, lse_a, out_b, lse_b)
        given = None if out is None else api._out_key(out), None if lse is None else api._out_key(lse)
        key = "merge", *map(api._out_key, states), *given, lse_base
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"outputs and LSEs must be tensors: {error}") from error
    call = api._calls.get(key)
    if call is None:
        inputs = merge_inputs(out_a, lse_a, out_b, lse_b, out=out, lse=lse, lse_base=lse_base)
        call = api._resolve(key, inputs, place=_place_state)
    if out is None:
        out = call.allocate(call.out_shape, call.out_strides, call.out_dtype)
    if lse is None:
        lse = call.allocate(call.out_shape[:-1], call.lse_strides, torch.float32)
    api._last = call.dispatch
    if call.bound is not None:
        operands = (*states, out, lse)
        call.bound.run(call.pointers(operands), call.floats, call.stream_of(call.device))
    elif (host := call.executable.variant.host) is not None and out.numel():
        inputs = merge_inputs(out_a, lse_a, out_b, lse_b, out=out, lse=lse, lse_base=lse_base)
        host(call.executable.problem, call.executable.config, inputs)
    return out, lse


_PARTIALS = ("part", "part_lse", "indptr", "final_map", "partial_map", "out")  # the operands of a reduction


def _place_partial(name: str, offset: int, inputs: Any, executable: Executable) -> tuple[int, int]:
    return _PARTIALS.index(name), offset


def reduce_partials(
    part: Tensor, part_lse: Tensor, indptr: Tensor, final_map: Tensor, partial_map: Tensor, out: Tensor, tile_q: int
) -> Tensor:
    """Sums listed partial states into `out`, which is returned: what `compat.aiter.mla_prefill_reduce` describes."""
    operands = (part, part_lse, indptr, final_map, partial_map, out)
    try:
        key = "reduce", *map(api._out_key, operands), tile_q
    except (AttributeError, TypeError) as error:
        raise InvalidInput(f"partials and lists must be tensors: {error}") from error
    call = api._calls.get(key)
    if call is None:
        call = api._resolve(key, reduce_inputs(*operands, tile_q), place=_place_partial)
    api._last = call.dispatch
    if call.bound is not None:
        call.bound.run(call.pointers(operands), call.floats, call.stream_of(call.device))
    elif (host := call.executable.variant.host) is not None and out.numel():
        host(call.executable.problem, call.executable.config, reduce_inputs(*operands, tile_q))
    return out
