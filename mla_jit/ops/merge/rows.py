"""The rows of the merge: `merge_triton`, whose kernel is in triton_merge.py, and `merge_cpu`. Imports no triton."""

from __future__ import annotations

from pathlib import Path

from mla_jit.compile.artifact import Limits, Scalar, Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch.base import Arg, Launch
from mla_jit.ops.decode.splitk import _pow2, _source
from mla_jit.ops.merge.inputs import MergeInputs
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import MergeProblem
from mla_jit.target import Target

NAME, HOST = "merge_triton", "merge_cpu"
_MODULE = "mla_jit.ops.merge.triton_merge"
_PATH = str(Path(__file__).with_name("triton_merge.py"))
_DTYPES = ("bf16", "fp16", "fp32")
_POINTERS = ("a", "lse_a", "b", "lse_b", "out", "lse")


def _refuses(p: MergeProblem) -> str | None:
    if wrong := [name for name in (p.a_dtype, p.b_dtype, p.out_dtype) if name not in _DTYPES]:
        return f"a state in {', '.join(wrong)}: outputs are merged in {', '.join(_DTYPES)}"
    return None


def rejects(p: MergeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if not target.triton:
        return f"Triton has no backend for {target.name}"
    if p.dim > 4096:
        return f"a head of {p.dim} elements > 4096: a row does not fit a program's registers"
    return _refuses(p)


def default(p: MergeProblem, target: Target) -> Config:
    """About 2048 elements a program: few registers, and many programs for what waits for memory only."""
    return Config.of(NAME, block_r=max(1, min(32, 2048 // _pow2(p.dim, 16))), num_warps=4)


def _parts(p: MergeProblem, config: Config) -> tuple[dict[str, Scalar], list[tuple[str, str, Arg]]]:
    """(constants, [(parameter, signature entry, launch argument)])."""
    constants: dict[str, Scalar] = {
        "H": p.num_heads, "D": p.dim, "BLOCK_R": config.int("block_r"), "BLOCK_D": _pow2(p.dim, 16),
    }  # fmt: skip
    types = {"a": p.a_dtype, "b": p.b_dtype, "out": p.out_dtype}
    aligned = {name: "" if name in p.misaligned else ":16" for name in types}
    arguments = []
    for name in _POINTERS:
        kind = f"*{DTYPES[types[name]].triton}{aligned[name]}" if name in types else "*fp32"
        arguments.append((f"{name}_ptr", kind, Arg("ptr", name)))
    for name in (f"{name}_stride_{axis}" for name in _POINTERS for axis in "th"):
        arguments.append((name, f"i64{aligned.get(name.partition('_stride')[0], '')}", Arg("i64", name)))
    arguments.append(("rows", "i32", Arg("i32", "rows")))
    return constants, arguments + [(name, "fp32", Arg("f32", name)) for name in ("to_base2", "from_base2")]


def sources(p: MergeProblem, target: Target, config: Config) -> tuple[Source, ...]:
    """The one kernel."""
    limits = Limits(smem_bytes=target.smem_bytes, registers=target.registers)
    options: dict[str, Scalar] = {"num_warps": config.int("num_warps"), "num_stages": 1}
    return (_source(target, "merge", NAME, _parts(p, config), options, limits, _MODULE, _PATH),)


def launches(p: MergeProblem, target: Target, config: Config) -> tuple[Launch, ...]:
    """A program a run of rows."""
    grid = (max(1, -(-p.tokens * p.num_heads // config.int("block_r"))), 1, 1)
    return (Launch(0, grid, tuple(arg for *_, arg in _parts(p, config)[1])),)


def cost(p: MergeProblem, target: Target, config: Config) -> Cost:
    """The bytes of the states, once."""
    rows = p.tokens * p.num_heads
    width = sum(DTYPES[name].bytes for name in (p.a_dtype, p.b_dtype, p.out_dtype))
    size = rows * (p.dim * width + 12)
    programs = max(1, -(-rows // config.int("block_r")))
    return Cost(
        size, 6 * rows * p.dim, programs, programs / target.sms, size / target.bandwidth_gbps * 1e-3 + target.launch_us
    )


def _rejects_host(p: MergeProblem, target: Target, config: Config) -> str | None:
    if target.runtime != "cpu":
        return f"PyTorch ops on the CPU; {target.name} is not served by them"
    return _refuses(p)


def run(p: MergeProblem, config: Config, inputs: MergeInputs) -> None:
    """Merges on the host, in fp32; writes tensors["out"] and tensors["lse"]."""
    import torch

    t = inputs.tensors
    with torch.no_grad():
        lses = [t[name].masked_fill(t[name] == torch.inf, -torch.inf) * inputs.floats["to_base2"] for name in
                ("lse_a", "lse_b")]  # fmt: skip
        outs = [
            t[name].float().masked_fill((lse == -torch.inf)[..., None], 0.0)
            for name, lse in zip("ab", lses, strict=True)
        ]
        top = torch.maximum(*lses)
        empty = top == -torch.inf
        shift = top.masked_fill(empty, 0.0)
        weights = [torch.exp2(lse - shift) for lse in lses]
        total = (weights[0] + weights[1]).masked_fill(empty, 1.0)
        out = sum(o * (w / total)[..., None] for o, w in zip(outs, weights, strict=True))
        t["out"].copy_(out)
        t["lse"].copy_(torch.where(empty, top, shift + torch.log2(total)) * inputs.floats["from_base2"])


MERGE_TRITON = Variant(
    name=NAME, op="merge", backend="triton", rejects=rejects, default=default, sources=sources, launches=launches,
    workspace_bytes=lambda p, target, config: 0, cost=cost,
    space={"block_r": (1, 2, 4, 8, 16, 32), "num_warps": (2, 4, 8)},
)  # fmt: skip
MERGE_CPU = Variant(
    name=HOST, op="merge", backend="cpu", rejects=_rejects_host, default=lambda p, target: Config.of(HOST),
    sources=lambda p, target, config: (), launches=lambda p, target, config: (),
    workspace_bytes=lambda p, target, config: 0,
    cost=lambda p, target, config: cost(p, target, Config.of(NAME, block_r=1)), host=run,
)  # fmt: skip
