"""The public functions. A warm call is: one dict lookup, the output's allocation, one launch a kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mla_jit import api_guards, api_metadata, plan, target
from mla_jit.api_metadata import DecodeMetadata, check_metadata, loading_forbidden
from mla_jit.dtypes import DTYPES
from mla_jit.errors import InvalidInput
from mla_jit.launch.base import Bound
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.plan import Dispatch, Executable, Support
from mla_jit.problem import DecodeProblem, PrefillProblem, Problem
from mla_jit.target import Target
from mla_jit.tuning.rows import PROBLEMS

_OPERANDS = (
    "q", "q_pe", "kv", "kpe", "scales", "table", "lens", "kv_indptr", "last", "qo_indptr", "sinks", "q_scale",
    "kv_scale", "out", "lse", "groups", "info", "sums", "arrivals",
)  # fmt: skip
_TABLE, _OUT, _LSE = (_OPERANDS.index(name) for name in ("table", "out", "lse"))
_WORKSPACE = -1  # behind the operands of a call, however many it has
_MOST = 16384  # call signatures kept
_RECENT = 4  # calls with the same flags that are recognised without hashing their signature
_SIZE_OF = {  # of the workspace: what says it, by op
    "decode": "decode_plan(...).workspace_bytes", "prefill": "last_dispatch().workspace_bytes of a like call",
}  # fmt: skip


class _Call(NamedTuple):
    """A call signature, bound: what the warm path needs and nothing else."""

    bound: Bound | None  # None: nothing to compute, or a host variant
    pointers: Callable[[Any], tuple[int, ...]]  # of its operands, as `bound` takes them
    floats: tuple[float, ...]
    out_shape: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_strides: tuple[int, ...]
    out_dtype: torch.dtype
    lse: bool
    workspace_bytes: int
    device: int
    allocate: Callable[[Any, Any, torch.dtype], Tensor]
    stream_of: Callable[[int], int]  # device index -> the raw handle of its current stream
    capturing: Callable[[], bool]
    dispatch: Dispatch
    executable: Executable


Cache: TypeAlias = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
_calls: dict[tuple[Any, ...], _Call] = {}
# By flags the latest calls: (whether tensors are like that call's, which of the operands are tensors, the call).
_recent: dict[tuple[Any, ...], tuple[tuple[Callable[..., bool], Callable[[Any], Any], _Call], ...]] = {}
_workspaces: dict[tuple[int, int], Tensor] = {}
_last: Dispatch | None = None
_passing = threading.local()


def decode(
    q: Tensor | tuple[Tensor, Tensor], kv_cache: Cache, *, kv_lora_rank: int, sm_scale: float,
    block_table: Tensor | None = None, seq_lens: Tensor | None = None, kv_indptr: Tensor | None = None,
    kv_indices: Tensor | None = None, kv_last_page_lens: Tensor | None = None, qo_indptr: Tensor | None = None,
    max_q_len: int | None = None, max_kv_len: int | None = None, total_kv: int | None = None, causal: bool = True,
    logit_cap: float = 0.0, sinks: Tensor | None = None, q_scale: Tensor | float | None = None,
    kv_scale: Tensor | float | None = None, cp_rank: int = 0, cp_world: int = 1, metadata: DecodeMetadata | None = None,
    workspace: Tensor | None = None, out: Tensor | None = None, lse: Tensor | None = None,
    out_dtype: torch.dtype | None = None, return_lse: bool = False, lse_base: str = "e",
    num_kv_splits: int | None = None, batch_invariant: bool = False, scheduler: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Multi-head latent attention of a few query tokens a sequence over a paged latent cache (absorbed form).

    For query token t and head h of a sequence of `len` tokens, with k_j the cached row and v_j its first kv_lora_rank
    elements: out = Σ_j softmax_j(sm_scale · q·k_j) v_j over j ≤ len - q_len + t (causal) or all j (DeepSeek-V2,
    arXiv 2405.04434, section 2.1, with the up-projections absorbed into q and the output).

    Args:
        q: [B, q_len, H, C + R], [B, H, C + R] (one token each), or ragged [T, H, C + R] with `qo_indptr`; or a pair
            (q_nope [..., H, C], q_pe [..., H, R]), each with free strides. bf16, fp16, fp8 (fp32 on the cpu).
        kv_cache: [pages, page_size, num_kv_heads, C + R], or without the head dimension; or a pair (ckv [..., C],
            kpe [..., R]). Same dtype as q, or fp8 e4m3. Or a triple (ckv [..., C], kv_scales [..., C / 128],
            kpe [..., R] or None where R is 0): ckv in fp8 e4m3, with an fp32 scale for every 128 columns of each token;
            kpe in q's dtype, bf16 or fp16, as it is. C is a multiple of 128. Each has strides of its own, so they may
            be views of one buffer.
        kv_lora_rank: C, the width of the latent, which is also V.
        sm_scale: the softmax scale, positive. DeepSeek's is (128 + 64)^-½ · mscale², never (C + R)^-½.
        block_table, seq_lens: int32 [B, max_pages] and [B]. Entries past a sequence's last page are never read through.
        kv_indptr, kv_indices, kv_last_page_lens: the CSR form instead, int32 [B + 1], [pages in use], [B]; the last
            page's length is ignored at page_size 1.
        qo_indptr, max_q_len: int32 [B + 1] and the host's bound for a ragged q. Rows of `out` and `lse` past
            qo_indptr[-1] are not written.
        max_kv_len, total_kv: host hints, never read back from the device; without them the table's capacity counts.
        causal: mask among the last q_len tokens of each sequence.
        logit_cap: cap · tanh(x / cap) on scaled logits, before the mask; 0 for none.
        sinks: fp32 [H], logits after scaling that join the denominator but not the LSE.
        q_scale, kv_scale: per-tensor dequantisation scales, float or 1-element fp32 tensors on the device, positive.
            No kv_scale beside kv_scales.
        cp_rank, cp_world: context parallelism: the cache holds tokens cp_rank, cp_rank + cp_world, …; `seq_lens` are
            global; the result is this rank's partial output and LSE.
        metadata: of `decode_metadata` for the same arguments and today's lengths: the call runs that work list with the
            persistent scheduler, and makes none itself.
        workspace: uint8 on the device, at least `decode_plan(...).workspace_bytes`; else one is kept a stream.
        out, lse: where to write [..., H, C] and fp32 [..., H]; allocated if absent.
        out_dtype: of an allocated `out`; q's, or bf16 for fp8 q.
        return_lse: also return log Σ exp(logit), fp32 [..., H]; -inf for a row with nothing to attend (output 0).
        lse_base: "e" or "2".
        num_kv_splits: split slots a sequence; the tuner's choice if absent.
        batch_invariant: cut sequences independently of the batch, so that a result is bit-equal alone or in a batch,
            for one q_len (max_q_len, if ragged). Its workspace grows with the capacity; max_kv_len bounds it.
        scheduler: "split", every sequence has split slots; "persistent", one resident wave of programs runs a work list
            that a kernel makes of the lengths, for ragged batches on GPUs; "auto", the tuner's choice. The CPU has no
            schedulers and serves all alike.

    Returns:
        out, or (out, lse) with return_lse. The same inputs always give the same bits.

    Raises:
        InvalidInput before any launch; NoVariant with every variant's reason; CompileError; CacheMiss in strict mode or
        under graph capture (call `warmup` first).
    """
    if torch.compiler.is_compiling():
        from mla_jit import torch_ops

        return torch_ops.traced_decode(  # spelled out: dynamo does not trace locals() in every version
            q, kv_cache, kv_lora_rank=kv_lora_rank, sm_scale=sm_scale, block_table=block_table, seq_lens=seq_lens,
            kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_lens=kv_last_page_lens, qo_indptr=qo_indptr,
            max_q_len=max_q_len, max_kv_len=max_kv_len, total_kv=total_kv, causal=causal, logit_cap=logit_cap,
            sinks=sinks,
            q_scale=q_scale, kv_scale=kv_scale, cp_rank=cp_rank, cp_world=cp_world, metadata=metadata,
            workspace=workspace,
            out=out, lse=lse, out_dtype=out_dtype, return_lse=return_lse, lse_base=lse_base,
            num_kv_splits=num_kv_splits,
            batch_invariant=batch_invariant, scheduler=scheduler,
        )  # fmt: skip
    if metadata is not None and type(metadata) is not DecodeMetadata:
        raise InvalidInput(
            f"metadata is for the persistent scheduler: pass what decode_metadata returns, or None, not {metadata!r}"
        )
    # `flags` and the signatures of `operands` are all that the binding below depends on: shapes, strides, dtypes,
    # devices, alignment, flags.
    try:
        q0, q1 = q if isinstance(q, (tuple, list)) else (q, None)
        kv0: Any = kv_cache
        scales, kv1 = None, None
        if isinstance(kv_cache, (tuple, list)):
            kv0, scales, kv1 = kv_cache if len(kv_cache) == 3 else (kv_cache[0], None, kv_cache[1])
        operands: list[Any] = [
            q0, q1, kv0, kv1, scales, block_table if kv_indices is None else kv_indices, seq_lens, kv_indptr,
            kv_last_page_lens, qo_indptr, sinks, q_scale, kv_scale, out, lse,
        ]  # fmt: skip
        if metadata is not None:
            operands += metadata
        flags = (
            type(q), type(kv_cache), q0.data_ptr() & 15, kv0.data_ptr() & 15,
            None if q1 is None else q1.data_ptr() & 15, None if kv1 is None else kv1.data_ptr() & 15, scales is None,
            block_table is None, seq_lens is None,
            kv_indices is kv_indptr is qo_indptr is sinks is q_scale is kv_scale is kv_last_page_lens is None or (
                kv_indices is None, kv_indptr is None, kv_last_page_lens is None, qo_indptr is None, sinks is None,
                _scale_kind(q_scale), _scale_kind(kv_scale),
            ),
            None if max_kv_len is None else (max_kv_len > 0, (max_kv_len - 1).bit_length()),
            None if total_kv is None else (total_kv - 1).bit_length(), None if out is None else out.data_ptr() & 15,
            None if lse is None else lse.data_ptr() & 15, kv_lora_rank, sm_scale, max_q_len, causal, logit_cap, cp_rank,
            cp_world, out_dtype, return_lse, lse_base, num_kv_splits, batch_invariant, scheduler, metadata is None,
        )  # fmt: skip
        call = None
        for same, pick, alike in _recent.get(flags, ()):
            if same(*pick(operands)):
                call = alike
                break
        else:
            key = flags, *_signatures(operands, kv_indices is not None)
            if (call := _calls.get(key)) is not None:
                _remember(flags, operands, kv_indices is not None, call)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"q, kv_cache and the index arguments must be tensors, or pairs of tensors (a triple with scales): {error}"
        ) from error
    if call is None:
        if metadata is not None:
            if scheduler == "split":
                raise InvalidInput("metadata is a work list of the persistent scheduler; leave scheduler to auto")
            scheduler = "persistent"
        call = _resolve(key, decode_inputs(
            q, kv_cache, kv_lora_rank=kv_lora_rank, sm_scale=sm_scale, block_table=block_table, seq_lens=seq_lens,
            kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_lens=kv_last_page_lens, qo_indptr=qo_indptr,
            max_q_len=max_q_len, max_kv_len=max_kv_len, total_kv=total_kv, causal=causal, logit_cap=logit_cap,
            sinks=sinks,
            q_scale=q_scale, kv_scale=kv_scale, cp_rank=cp_rank, cp_world=cp_world, out=out, lse=lse,
            out_dtype=out_dtype,
            return_lse=return_lse, lse_base=lse_base, num_kv_splits=num_kv_splits, batch_invariant=batch_invariant,
            scheduler=scheduler, planned=metadata is not None,
            groups=None if metadata is None else metadata.cut_for,
        ), metadata)  # fmt: skip
        _remember(flags, operands, kv_indices is not None, call)
    if out is None:
        operands[_OUT] = out = call.allocate(call.out_shape, call.out_strides, call.out_dtype)
    if lse is None and call.lse:
        operands[_LSE] = lse = call.allocate(call.out_shape[:-1], call.lse_strides, torch.float32)
    global _last
    _last = call.dispatch
    if call.bound is None:
        return _on_host(call, locals())
    stream = call.stream_of(call.device)
    if workspace is not None:
        _check_workspace(workspace, call, q0)
    else:  # with one split the kernel takes the pointer and does not use it
        workspace = _workspace(call, stream) if call.workspace_bytes else out
    operands.append(workspace)
    call.bound.run(call.pointers(operands), call.floats, stream)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _scale_kind(value: Any) -> Any:
    return Tensor if isinstance(value, Tensor) else value


def _signatures(operands: Sequence[Any], listed: bool) -> list[Any]:
    """Of each tensor what a key holds; how long a `listed` table is changes from step to step and does not matter."""
    found: list[Any] = [None if isinstance(t, (int, float)) else _tensor_key(t) for t in operands]
    if listed:
        found[_TABLE] = found[_TABLE][1:]
    return found


def _remember(flags: tuple[Any, ...], operands: Sequence[Any], listed: bool, call: _Call) -> None:
    """Puts a call first among the recent ones with its flags."""
    here = [i for i, t in enumerate(operands) if isinstance(t, Tensor)]
    same = api_guards.alike([operands[i] for i in here], free=here.index(_TABLE) if listed else None)
    if same is not None:
        if len(_recent) >= _MOST:
            _recent.clear()
        _recent[flags] = ((same, operator.itemgetter(*here), call), *_recent.get(flags, ())[: _RECENT - 1])


def _tensor_key(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.get_device())


def _scale_key(value: Any) -> Any:
    return _tensor_key(value) if isinstance(value, Tensor) else value


def _out_key(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & 15)


def _resolve(
    key: tuple[Any, ...],
    inputs: Any,
    metadata: DecodeMetadata | None = None,
    place: Callable[[str, int, Any, Executable], tuple[int, int]] | None = None,
) -> _Call:
    """The cold path: problem, target, executable, binding; remembered under the call's signature.

    inputs: the checked call of an op, as its inputs.py describes it.
    place: where an operand of this op is found among the call's; `_place` if absent.
    """
    problem, device = inputs.problem, inputs.device
    index = device.index if device.index is not None else 0
    where = target.of_device(device.type, index)
    forbidden = loading_forbidden(device)
    executable = plan.executable_for(problem, where, forbid_compile=forbidden)
    if metadata is not None:
        check_metadata(metadata, executable, device)
    out_dtype = getattr(torch, DTYPES[problem.out_dtype].torch)
    empty = 0 in (*inputs.out_shape, *(getattr(problem, name, 1) for name in ("batch", "q_len", "groups")))
    bound: Bound | None = None
    spec: tuple[tuple[int, int], ...] = ()
    floats: tuple[float, ...] = ()
    if executable.variant.host is None and not empty:
        bound = executable.bind(inputs.binding, index, forbid_load=forbidden)
        where_of = _place if place is None else place
        spec = tuple(where_of(name, offset, inputs, executable) for name, offset in bound.operands)
        floats = tuple(inputs.floats[name] for name in bound.float_names)
    on_gpu = device.type == "cuda"
    call = _Call(
        bound, api_guards.pointers(spec), floats, inputs.out_shape, _contiguous(inputs.out_shape),
        _contiguous(inputs.out_shape[:-1]), out_dtype,
        getattr(problem, "lse", True), 0 if empty else executable.workspace_bytes, index, _allocator(device),
        torch._C._cuda_getCurrentRawStream if on_gpu else lambda _: 0,
        torch._C._cuda_isCurrentStreamCapturing if on_gpu else lambda: False, executable.dispatch, executable,
    )  # fmt: skip
    if len(_calls) >= _MOST:
        _calls.clear()
    _calls[key] = call
    return call


def _place(name: str, offset: int, inputs: DecodeInputs, executable: Executable) -> tuple[int, int]:
    """Where a kernel's operand is found among the call's: its index, and bytes to add."""
    if name in executable.offsets:
        return _WORKSPACE, executable.offsets[name] + offset
    problem = inputs.problem
    if name == "q_pe" and not problem.q_split:
        return _OPERANDS.index("q"), problem.kv_lora_rank * DTYPES[problem.q_dtype].bytes + offset
    if name == "kpe" and not problem.rope_dim and problem.layout != "joint":
        return _OPERANDS.index("kv"), offset  # not read
    if name == "kpe" and problem.layout == "joint":
        return _OPERANDS.index("kv"), problem.kv_lora_rank * DTYPES[problem.kv_dtype].bytes + offset
    return _OPERANDS.index(name), offset


def _on_host(call: _Call, arguments: dict[str, Any]) -> Any:
    """A host variant, or nothing to do."""
    out, lse = arguments["out"], arguments["lse"]
    host = call.executable.variant.host
    if host is not None and out.numel():
        names = decode_inputs.__kwdefaults__ or {}
        keywords = {
            name: arguments[name]
            for name in ("kv_lora_rank", "sm_scale", *names) if name not in ("out", "lse", "planned", "groups")
        }  # fmt: skip
        if arguments["metadata"] is not None:
            keywords |= {"scheduler": "persistent", "planned": True}
        inputs = decode_inputs(arguments["q"], arguments["kv_cache"], **keywords, out=out, lse=lse)
        host(call.executable.problem, call.executable.config, inputs)
    return (out, lse) if arguments["return_lse"] else out


def _check_workspace(workspace: Tensor, call: _Call, q: Tensor) -> None:
    size = workspace.numel() * workspace.element_size()
    if (
        size < call.workspace_bytes
        or workspace.device != q.device
        or workspace.data_ptr() % 16
        or not workspace.is_contiguous()
    ):
        raise InvalidInput(
            f"workspace has {size} bytes on {workspace.device}; this call needs {call.workspace_bytes} contiguous, "
            f"16-byte aligned, on {q.device} ({_SIZE_OF[call.executable.problem.op]})"
        )


def _workspace(call: _Call, stream: int) -> Tensor:
    """Scratch memory of a stream, grown and never shrunk. Under capture it is the graph's own and is not remembered."""
    shape, strides = (call.workspace_bytes,), (1,)
    if call.capturing():
        return call.allocate(shape, strides, torch.uint8)
    kept = _workspaces.get((call.device, stream))
    if kept is None or kept.numel() < call.workspace_bytes:
        kept = call.allocate(shape, strides, torch.uint8)
        if not getattr(_passing, "on", False):
            _workspaces[call.device, stream] = kept
    return kept


@contextlib.contextmanager
def keeping_nothing() -> Iterator[None]:
    """Within it a new workspace lives for its call only: torch.compile's graph trees own the warm-up's pool."""
    _passing.on = True
    try:
        yield
    finally:
        _passing.on = False


def _allocator(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """(shape, strides, dtype) -> an uninitialised tensor on the device."""

    def anywhere(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    fast = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)
    if device.type != "cuda" or fast is None:
        return anywhere
    if torch.cuda.device_count() == 1:
        return fast  # 1.2 us where torch.empty takes 3.4 (H200 host)
    current, index = torch._C._cuda_getDevice, device.index

    def here(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        return fast(shape, strides, dtype) if current() == index else anywhere(shape, strides, dtype)

    return here


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides))


class DecodePlan:
    """A decode call validated once and run many times: once a step for 61 layers, with other q, cache and outputs.

    `workspace_bytes` is what `run(workspace=…)` needs; `dispatch` says what serves it. Index tensors are those given
    to `decode_plan`, read at each run.
    """

    def __init__(self, q: Any, kv_cache: Any, arguments: dict[str, Any]):
        self._arguments = arguments
        metadata = arguments.get("metadata")
        given = {name: value for name, value in arguments.items() if name != "metadata"}
        if metadata is not None:
            given |= {"scheduler": "persistent", "planned": True, "groups": metadata.cut_for}
        self._inputs = inputs = decode_inputs(q, kv_cache, **given)
        self.problem = inputs.problem
        self._call = _resolve((object(),), inputs, metadata)
        self.dispatch = self._call.dispatch
        self.workspace_bytes = self._call.workspace_bytes
        self._expect = (_operand_keys(q), _operand_keys(kv_cache))

    def run(
        self,
        q: Any,
        kv_cache: Any,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        workspace: Tensor | None = None,
    ) -> Any:
        """Runs on tensors of the planned shapes, strides and alignment. Returns as `decode` does."""
        if (_operand_keys(q), _operand_keys(kv_cache)) != self._expect:
            raise InvalidInput(
                "q or kv_cache differ from the plan's in shape, stride, dtype or alignment; make another plan"
            )
        given = {name: value for name, value in (("out", out), ("lse", lse)) if value is not None}
        return decode(q, kv_cache, **{**self._arguments, **given}, workspace=workspace)


def _operand_keys(x: Any) -> tuple[Any, ...]:
    return tuple(_out_key(t) for t in (x if isinstance(x, (tuple, list)) else (x,)))


def decode_plan(q: Any, kv_cache: Any, **arguments: Any) -> DecodePlan:
    """Validates and resolves a `decode` call (same arguments) without running it. Raises what `decode` raises."""
    arguments.pop("workspace", None)
    return DecodePlan(q, kv_cache, arguments)


def warmup(problems: Iterable[Problem], device: int | torch.device | None = None) -> list[Dispatch]:
    """Compiles or finds, and loads, everything that the problems need, so that calls and graph captures only launch.

    device: a GPU's index; the current one if absent. On a machine without a GPU the cpu target is resolved.
    """
    index, where = _place_of(device)
    done = []
    for problem in problems:
        if isinstance(problem, (DecodeProblem, PrefillProblem)):  # a call may pass max_kv_len or leave it to capacity
            plan.executable_for(dataclasses.replace(problem, hinted=not problem.hinted), where).load(index)
        executable = plan.executable_for(problem, where)
        executable.load(index)
        done.append(executable.dispatch)
    return done


def _place_of(device: int | torch.device | None) -> tuple[int, Target]:
    if not torch.cuda.is_available():
        return 0, target.here()
    given = torch.device("cuda", device) if isinstance(device, int) else device
    index = given.index if given is not None and given.index is not None else torch.cuda.current_device()
    return index, target.of_device("cuda", index)


def export_plan(problems: Iterable[Problem], device: int | torch.device | None = None) -> bytes:
    """What this process would choose for the problems, for `load_plan` on other ranks: rank 0 resolves, all agree.

    device: a GPU's index; the current one if absent. Compiles nothing. Raises NoVariant.
    """
    return plan.export(problems, _place_of(device)[1])


def load_plan(data: bytes, device: int | torch.device | None = None) -> int:
    """Installs an exported plan's choices, whatever this machine's tuning database says; their number.

    Call it before the first decode. InvalidInput, with nothing installed, if the bytes are no plan, were made for
    another target, are illegal here, or contradict a choice that this process has made.
    """
    return plan.load(data, _place_of(device)[1])


def supports(problem: Problem | None = None, *, on: str | Target | None = None, **fields: Any) -> Support:
    """Whether a problem can be served, by which variant, and the reason of each variant that cannot. Compiles nothing.

    problem: a problem, or its fields as keywords: `supports(num_heads=12, page_size=7)` for decode, with op="prefill"
        those of a PrefillProblem.
    on: a target's name, as in configs/targets.yaml; this machine's if absent.
    """
    problem = problem if problem is not None else PROBLEMS[fields.get("op", "decode")](**fields)
    where = on if isinstance(on, Target) else target.by_name(on) if on is not None else target.here()
    return plan.supports(problem, where)


def last_dispatch() -> Dispatch | None:
    """What served the last call of this process: variant, config and whence, kernels, keys, rejected variants."""
    return _last


def reload() -> None:
    """Forgets all resolved choices: the next calls resolve again. Compiled kernels stay in the cache."""
    plan.forget()
    _calls.clear()
    _recent.clear()
    api_metadata.forget()
