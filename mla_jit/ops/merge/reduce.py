"""The rows of the sum of listed partial states: `reduce_triton` and `reduce_cpu`; and the check of such a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch, Number
from mla_jit.ops.decode.inputs import _aligned, _check, _dtype, _index, _last_stride
from mla_jit.ops.decode.splitk import _pow2, _source
from mla_jit.ops.merge.inputs import MergeInputs
from mla_jit.ops.merge.rows import _DTYPES
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import ReduceProblem
from mla_jit.target import Target

Tensor = Any
NAME, HOST = "reduce_triton", "reduce_cpu"
_MODULE = "mla_jit.ops.merge.triton_reduce"
_PATH = str(Path(__file__).with_name("triton_reduce.py"))
_LISTS = ("indptr", "final_map", "partial_map")


def reduce_inputs(
    part: Tensor, part_lse: Tensor, indptr: Tensor, final_map: Tensor, partial_map: Tensor, out: Tensor, tile_q: int
) -> MergeInputs:
    """Checks a call and describes it. Raises InvalidInput."""
    device = part.device
    _check(part.dim() == 3, f"partial_output has shape {tuple(part.shape)}; it must be [rows, H, D]")
    _check(out.dim() == 3, f"output has shape {tuple(out.shape)}; it must be [T, H, D]")
    rows, heads, dim = part.shape
    _check(tuple(out.shape[1:]) == (heads, dim), f"output has shape {tuple(out.shape)}; it must be [T, {heads}, {dim}]")
    _check(
        tuple(part_lse.shape) == (rows, heads) and str(part_lse.dtype) == "torch.float32",
        f"partial_lse is {part_lse.dtype} {tuple(part_lse.shape)}; it must be float32 {(rows, heads)}",
    )
    _check(tile_q >= 1, f"tile_q is {tile_q}; it must be at least 1")
    for name, t, ndim in (("reduce_indptr", indptr, 1), ("reduce_final_map", final_map, 2),
                          ("reduce_partial_map", partial_map, 1)):  # fmt: skip
        _index(name, t, ndim, device)
    groups = max(0, indptr.shape[0] - 1)
    _check(
        final_map.shape[0] >= groups and final_map.shape[1] == 2 and final_map.is_contiguous(),
        f"reduce_final_map has shape {tuple(final_map.shape)}; it must be a contiguous [{groups}, 2]",
    )
    _last_stride("partial_output", part)
    _last_stride("output", out)
    lists = {"indptr": indptr, "final_map": final_map, "partial_map": partial_map}
    problem = ReduceProblem(
        num_heads=heads, dim=dim, part_dtype=_dtype("partial_output", part), out_dtype=_dtype("output", out),
        misaligned=tuple(name for name, t in (("part", part), ("out", out)) if not _aligned(t)),
        index64=tuple(name for name, t in lists.items() if str(t.dtype) == "torch.int64"), groups=groups,
        tile_q=tile_q,
    )  # fmt: skip
    numbers: dict[str, Number] = {}
    for name, t in (("part", part), ("part_lse", part_lse), ("out", out)):
        numbers |= {f"{name}_stride_t": t.stride(0), f"{name}_stride_h": t.stride(1)}
    tensors = {"part": part, "part_lse": part_lse, **lists, "out": out}
    return MergeInputs(problem, tensors, numbers, {}, device, tuple(out.shape))


def _refuses(p: ReduceProblem) -> str | None:
    if wrong := [name for name in (p.part_dtype, p.out_dtype) if name not in _DTYPES]:
        return f"a state in {', '.join(wrong)}: outputs are summed in {', '.join(_DTYPES)}"
    return None


def rejects(p: ReduceProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if not target.triton:
        return f"Triton has no backend for {target.name}"
    if p.dim > 4096:
        return f"a head of {p.dim} elements > 4096: a row does not fit a program's registers"
    return _refuses(p)


def default(p: ReduceProblem, target: Target) -> Config:
    """About 2048 elements a program."""
    return Config.of(NAME, block_r=max(1, min(32, 2048 // _pow2(p.dim, 16))), num_warps=4)


def _runs(p: ReduceProblem, config: Config) -> int:
    return -(-p.tile_q // config.int("block_r"))


def _parts(p: ReduceProblem, config: Config) -> tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]:
    """(constants, [(parameter, signature entry, launch argument)])."""
    constants: dict[str, Scalar] = {
        "H": p.num_heads, "D": p.dim, "RUNS": _runs(p, config), "BLOCK_R": config.int("block_r"),
        "BLOCK_D": _pow2(p.dim, 16),
    }  # fmt: skip
    aligned = {name: "" if name in p.misaligned else ":16" for name in ("part", "out")}
    kinds = {"part": f"*{DTYPES[p.part_dtype].triton}{aligned['part']}", "part_lse": "*fp32"}
    kinds |= {name: "*i64" if name in p.index64 else "*i32" for name in _LISTS}
    kinds["out"] = f"*{DTYPES[p.out_dtype].triton}{aligned['out']}"
    arguments = [(f"{name}_ptr", kind, Arg("ptr", name)) for name, kind in kinds.items()]
    for name in (f"{name}_stride_{axis}" for name in ("part", "part_lse", "out") for axis in "th"):
        arguments.append((name, f"i64{aligned.get(name.partition('_stride')[0], '')}", Arg("i64", name)))
    return constants, arguments


def sources(p: ReduceProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The one kernel."""
    limits = Limits(smem_bytes=target.smem_bytes, registers=target.registers)
    options: dict[str, Scalar] = {"num_warps": config.int("num_warps"), "num_stages": 1}
    return (_source(target, "reduce_groups", NAME, _parts(p, config), options, limits, _MODULE, _PATH),)


def launches(p: ReduceProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """A program a (run of a group's queries, head, group)."""
    grid = (max(1, p.groups * p.num_heads * _runs(p, config)), 1, 1)
    return (Launch(0, grid, tuple(arg for *_, arg in _parts(p, config)[1])),)


def cost(p: ReduceProblem, target: Target, config: Config) -> Cost:
    """The bytes of two partials a group."""
    rows = p.groups * p.tile_q * p.num_heads
    size = rows * p.dim * (2 * DTYPES[p.part_dtype].bytes + DTYPES[p.out_dtype].bytes)
    programs = max(1, rows // config.int("block_r"))
    time_us = size / target.bandwidth_gbps * 1e-3 + target.launch_us
    return Cost(size, 4 * rows * p.dim, programs, programs / target.sms, time_us)


def run(p: ReduceProblem, config: Config, inputs: MergeInputs) -> None:
    """Sums on the host, in fp32; writes the groups' rows of tensors["out"]."""
    import torch

    t = inputs.tensors
    indptr, final_map, partial_map = (t[name].tolist() for name in _LISTS)
    with torch.no_grad():
        for group, (first, end) in enumerate(final_map[: p.groups]):
            starts = partial_map[indptr[group] : indptr[group + 1]]
            if not starts:
                continue
            lses = torch.stack([t["part_lse"][s : s + end - first] for s in starts])
            lses = torch.where(lses.isfinite(), lses, -torch.inf)
            outs = torch.stack([t["part"][s : s + end - first].float() for s in starts])
            top = lses.amax(0)
            weights = torch.exp(lses - top.masked_fill(top == -torch.inf, 0.0))
            total = weights.sum(0)
            outs = outs.masked_fill((lses == -torch.inf)[..., None], 0.0)
            summed = (outs * weights[..., None]).sum(0) / total.masked_fill(total == 0, 1.0)[..., None]
            t["out"][first:end] = summed.to(t["out"].dtype)


REDUCE_TRITON = Variant(
    name=NAME, op="reduce", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=lambda p, target, config: 0, cost=cost,
    space={"block_r": (1, 2, 4, 8, 16, 32), "num_warps": (2, 4, 8)},
)  # fmt: skip
REDUCE_CPU = Variant(
    name=HOST, op="reduce", backend="cpu",
    rejects=lambda p, target, config: _refuses(p) if target.runtime == "cpu" else (
        f"PyTorch ops on the CPU; {target.name} is not served by them"
    ),
    default=lambda p, target: Config.of(HOST), sources=lambda p, target, config: (),
    launches=lambda p, target, config: (), workspace_bytes=lambda p, target, config: 0,
    cost=lambda p, target, config: cost(p, target, Config.of(NAME, block_r=1)), host=run,
)  # fmt: skip
