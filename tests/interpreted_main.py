"""Runs decode cases through the Triton kernels in Triton's interpreter; a process of its own (TRITON_INTERPRET=1).

    TRITON_INTERPRET=1 python tests/interpreted_main.py [--target sm_80] [--sms 3] [--dtype fp16] [--rope-dim 64]
        [--only TEXT] [--part I/N] [--stop] [--variant NAME] [name=value …]

What is launched is what the variant's row says: sources, launches, workspace and offsets of its own default config,
with the tunables given as name=value changed. The first line of JSON names the package that was tested; each case
prints one more. The exit status is the number of failures (at most 100). Outputs and workspace start as NaN, and the
workspace lies between red zones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cases
import torch

import mla_jit
from mla_jit import ops
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch import interpreter
from mla_jit.launch.base import Binding
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target, by_name

RED = 1 << 20  # bytes on each side of the workspace


def outputs(inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of a call: the caller's, else new ones of NaN."""
    out, lse = inputs.tensors["out"], inputs.tensors["lse"]
    if out is None:
        out = torch.full(inputs.out_shape, float("nan"), dtype=getattr(torch, DTYPES[inputs.problem.out_dtype].torch))
    if lse is None and inputs.problem.lse:
        lse = torch.full(inputs.out_shape[:-1], float("nan"))
    return out, lse


def decode(
    call: cases.Call, variant: Variant, target: Target, changes: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None, Config]:
    """The call's (out, lse) from interpreted kernels. AssertionError if they write beside the workspace."""
    inputs = decode_inputs(call.q, call.kv_cache, **call.kwargs)
    problem = inputs.problem
    config = variant.default(problem, target)
    if "pdl" in config:
        config = config.replace(pdl=False)
    for name, value in changes.items():  # those that this case can have
        if variant.rejects(problem, target, config.replace(**{name: value})) is None:
            config = config.replace(**{name: value})
    if (reason := variant.rejects(problem, target, config)) is not None:
        raise AssertionError(f"{call.case.id} is refused: {reason}")
    out, lse = outputs(inputs)
    size = variant.workspace_bytes(problem, target, config)
    memory = torch.full((size + 2 * RED,), 0xFF, dtype=torch.uint8)
    tensors = {**inputs.tensors, "out": out, "lse": lse}
    places = {
        name: memory.data_ptr() + RED + offset for name, offset in variant.offsets(problem, target, config).items()
    }

    binding = Binding({**inputs.binding.numbers, **variant.numbers(problem, target, config)}, inputs.binding.views)
    bf16 = problem.scaled or "bf16" in (problem.q_dtype, problem.kv_dtype)  # weights times scales are bf16
    constants = {"COMPUTE": "tl:float32", "QK_NATIVE": False} if bf16 else {}
    bound = interpreter.bind(
        variant.sources(problem, target, config), variant.launches(problem, target, config), binding, constants
    )
    pointers = [
        (places[name] if name in places else tensors[name].data_ptr()) + offset for name, offset in bound.operands
    ]
    bound.run(pointers, [inputs.floats[name] for name in bound.float_names])
    beside = torch.cat([memory[:RED], memory[RED + size :]])
    assert (beside == 0xFF).all(), f"{call.case.id}: written beside the workspace"
    return out, lse, config


def interpretable(case: cases.Case, dtype: str) -> cases.Case:
    """The case in a dtype that the kernels take, where it is in fp32. No bf16 results: the interpreter truncates."""
    if case.q_dtype == "fp32":
        case = dataclasses.replace(case, q_dtype=dtype, kv_dtype=dtype)
    return dataclasses.replace(case, out_dtype="fp32") if cases.out_dtype(case) == "bf16" else case


def of_variant(case: cases.Case, variant: Variant) -> cases.Case:
    """The case without wishes that only split slots can serve, where the variant has none."""
    if "num_kv_splits" in variant.default(DecodeProblem(num_heads=1), by_name("sm_80")):
        return case
    return dataclasses.replace(case, num_kv_splits=None, batch_invariant=False)


def say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def run_each(chosen: Iterable[cases.Case], judged: Callable[[cases.Case], dict[str, Any]], stop: bool) -> int:
    """Says a line for each case, what `judged` gives or why it failed; the number of failures, at most 100."""
    failures = 0
    for case in chosen:
        line: dict[str, Any] = {"case": case.id}
        started = time.perf_counter()
        try:
            line |= judged(case)
        except Exception as error:  # one bad case must not hide the others
            line["error"] = f"{type(error).__name__}: {error}"
            failures += 1
        say(line | {"seconds": round(time.perf_counter() - started, 3)})
        if failures and stop:
            break
    return min(failures, 100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_80")
    parser.add_argument("--sms", type=int, default=3, help="of the target; each of its programs is walked in Python")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--rope-dim", type=int, default=0, help="instead of narrower ones, other than none")
    parser.add_argument("--only", default="", help="cases whose id contains this")
    parser.add_argument("--part", default="0/1", help="I/N: only every Nth case, from case I on")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("--variant", default="decode_splitk_triton")
    parser.add_argument("changes", nargs="*", help="tunables, name=value")
    options = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (change.split("=") for change in options.changes)}
    say({"package": str(Path(mla_jit.__file__).parent)})
    variant = next(v for v in ops.variants("decode") if v.name == options.variant)
    target = dataclasses.replace(by_name(options.target), sms=options.sms)
    first, step = map(int, options.part.split("/"))
    chosen = []
    for case in cases.SMALL[first::step]:
        case = of_variant(interpretable(case, options.dtype), variant)
        if 0 < case.R < options.rope_dim:
            case = dataclasses.replace(case, R=options.rope_dim)
        chosen += [case] if options.only in case.id else []

    def judged(case: cases.Case) -> dict[str, Any]:
        call = cases.build(case)
        out, lse, config = decode(call, variant, target, changes)
        figures = cases.check(call, out, lse)
        return {"config": str(config), "rel_l2": figures.rel_l2, "lse_error": figures.lse_error}

    return run_each(chosen, judged, options.stop)


if __name__ == "__main__":
    sys.exit(main())
