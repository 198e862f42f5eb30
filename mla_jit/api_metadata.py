"""The persistent scheduler's work lists: `decode_metadata`, and what makes a list before there is a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_jit import plan, target
from mla_jit.errors import InvalidInput
from mla_jit.launch.base import Binding, Bound
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.plan import Executable
from mla_jit.problem import DecodeProblem

_MOST = 16384  # bound kernels kept
_prepared: dict[Any, Bound] = {}


class DecodeMetadata(NamedTuple):
    """A work list of the persistent scheduler: int32 tensors on the device, of fixed shapes and addresses.

    Made and filled by `decode_metadata`; read by every `decode(metadata=…)` of the step. groups [groups + 1], info
    [batch + groups, 4], sums [batch, 3], arrivals [batch, counts]: see ops/decode/triton_persistent.py. It depends on
    the lengths, not on which kernel or config runs it. Calls that share one run one after the other (on one stream, or
    ordered by events): `arrivals` counts within a call. Empty on the CPU, which needs none.
    """

    groups: Tensor
    info: Tensor
    sums: Tensor
    arrivals: Tensor

    @property
    def cut_for(self) -> int | None:
        """How many groups of programs it is made for; None where it is empty."""
        return self.groups.shape[0] - 1 if self.groups.dim() == 1 and self.groups.shape[0] > 1 else None


def check_metadata(metadata: DecodeMetadata, executable: Executable, device: torch.device) -> None:
    """InvalidInput for a work list that is not one of this call."""
    for name, shape in executable.lists.items():
        t = getattr(metadata, name, None)
        if t is None or tuple(t.shape) != shape or t.dtype != torch.int32 or t.device != device or t.data_ptr() % 16:
            what = "missing" if t is None else f"{t.dtype} {tuple(t.shape)} on {t.device}"
            raise InvalidInput(
                f"metadata.{name} is {what}; this call needs int32 {shape} on {device}, 16-byte aligned: make it by "
                "decode_metadata with the arguments of the call"
            )


def decode_metadata_info(q: Any, kv_cache: Any, **arguments: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each buffer of `DecodeMetadata` for a `decode` call with these arguments; {} on the CPU."""
    executable, *_ = _planned(q, kv_cache, arguments)
    return {name: (shape, torch.int32) for name, shape in executable.lists.items()}


def decode_metadata(
    q: Any, kv_cache: Any, *, metadata: DecodeMetadata | None = None, max_split_per_batch: int | None = None,
    intra_batch_mode: bool = False, **arguments: Any,
) -> DecodeMetadata:  # fmt: skip
    """The work list of the persistent scheduler for a `decode` call with these arguments, made on the device.

    Once a step: all layers whose calls have the same shapes, flags and lengths read it (`decode(…, metadata=…)`). The
    lengths are read by a kernel, never by the host, and nothing has a size that depends on them: under graph capture
    the kernel is captured, and the graph serves other lengths.

    Args:
        metadata: buffers to fill instead of new ones, so that their addresses stay (`decode_metadata_info` has the
            shapes; they may be made for another number of groups).
        max_split_per_batch: at most so many pieces a sequence, at least 1; as balance wants if absent.
        intra_batch_mode: every sequence is cut into the same number of pieces (fewer, where it has not as many tiles of
            64 tokens): as many as the device works on at once, by the batch, and max_split_per_batch at most. Uneven
            lengths are not balanced then.

    Raises what `decode` raises; NoVariant where nothing has a persistent scheduler for the problem.
    """
    wishes = _cut_wishes(max_split_per_batch, intra_batch_mode)
    executable, inputs, forbidden = _planned(q, kv_cache, arguments, None if metadata is None else metadata.cut_for)
    if metadata is None:
        shapes = executable.lists
        metadata = DecodeMetadata(*(
            torch.empty(shapes.get(name, (0,)), dtype=torch.int32, device=inputs.device)
            for name in DecodeMetadata._fields
        ))  # fmt: skip
    check_metadata(metadata, executable, inputs.device)
    if executable.lists and inputs.problem.batch:
        ranks = {"cp_rank": arguments.get("cp_rank", 0), "cp_world": arguments.get("cp_world", 1)}
        _fill(executable, {**inputs.tensors, **metadata._asdict()}, ranks, wishes, inputs.device, forbidden)
    return metadata


def _cut_wishes(most_pieces: int | None, even: bool) -> dict[str, int]:
    """How sequences are to be cut, as numbers of the kernel that makes a list. InvalidInput for fewer than a piece."""
    if most_pieces is not None and most_pieces < 1:
        raise InvalidInput(f"max_split_per_batch is {most_pieces}; it must be at least 1, or None for no bound")
    return {"even": int(even)} | ({} if most_pieces is None else {"most_pieces": min(most_pieces, 2**20)})


def _fill(
    executable: Executable, tensors: Mapping[str, Any], numbers: Mapping[str, int], wishes: dict[str, int],
    device: torch.device, forbidden: str | None,
) -> None:  # fmt: skip
    """Runs the kernel that makes a work list, on tensors by the names of its operands."""
    index = device.index or 0
    key = executable.problem, executable.target, executable.config, index, *numbers.values(), *wishes.items()
    if (bound := _prepared.get(key)) is None:
        if len(_prepared) >= _MOST:
            _prepared.clear()
        bound = executable.bind(Binding(numbers), index, forbid_load=forbidden, prepare=True, wishes=wishes)
        _prepared[key] = bound
    pointers = [tensors[name].data_ptr() + offset for name, offset in bound.operands]
    bound.run(pointers, (), torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0)


def loading_forbidden(device: torch.device) -> str | None:
    """Why nothing may be compiled or loaded now, or None."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return "under graph capture" if capturing else None


def work_lists(problem: DecodeProblem, device: torch.device) -> dict[str, tuple[int, ...]]:
    """The shapes of the work list of a problem with the persistent scheduler, int32, by name; {} on the CPU.

    For callers that know what a call will be before there are tensors; `fill_lists` fills them. Raises NoVariant.
    """
    where = target.of_device(device.type, device.index or 0)
    choice = plan.choose(problem, where)
    return choice.variant.lists(problem, where, choice.config)


def fill_lists(
    problem: DecodeProblem, tensors: Mapping[str, Tensor], device: torch.device, *,
    max_split_per_batch: int | None = None, intra_batch_mode: bool = False,
) -> None:  # fmt: skip
    """Fills the work list of a planned problem of one rank: `tensors` are the list's and those of the lengths, by name.

    Compiles no other kernel than the one that makes lists. Raises what `decode_metadata` raises.
    """
    wishes, forbidden = _cut_wishes(max_split_per_batch, intra_batch_mode), loading_forbidden(device)
    where = target.of_device(device.type, device.index or 0)
    executable = plan.preparation_for(problem, where, forbid_compile=forbidden)
    metadata = DecodeMetadata(*(tensors[name] for name in DecodeMetadata._fields))
    check_metadata(metadata, executable, device)
    if executable.lists and problem.batch:
        _fill(executable, tensors, {"cp_rank": 0, "cp_world": 1}, wishes, device, forbidden)


def _planned(
    q: Any, kv_cache: Any, arguments: dict[str, Any], groups: int | None = None
) -> tuple[Executable, DecodeInputs, str | None]:
    """(executable, checked call, why nothing may be loaded) of a call that brings a work list."""
    if arguments.get("scheduler", "auto") == "split":
        raise InvalidInput("a work list is for the persistent scheduler; leave scheduler to auto")
    given = {name: value for name, value in arguments.items() if name not in ("scheduler", "workspace", "metadata")}
    inputs = decode_inputs(q, kv_cache, **given, scheduler="persistent", planned=True, groups=groups)
    forbidden = loading_forbidden(inputs.device)
    where = target.of_device(inputs.device.type, inputs.device.index or 0)
    return plan.executable_for(inputs.problem, where, forbid_compile=forbidden), inputs, forbidden


def forget() -> None:
    """Drops the bound kernels that make lists."""
    _prepared.clear()
