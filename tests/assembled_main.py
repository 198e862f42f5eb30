"""Runs decode cases through the PTX templates in the emulator ptx_machine; a process of its own (TRITON_INTERPRET=1).

    TRITON_INTERPRET=1 python tests/assembled_main.py [--variant NAME] [--sms 3] [--dtype fp16] [--only TEXT]
        [--part I/N] [--page 64] [--splits N] [--heads N] [--seed N] [--cases small|large|mistakes] [--stop]
        [name=value …]

The kernels are the rendered texts, run with the variant's own launches; what makes a work list runs in Triton's
interpreter. Pages hold whole tiles by default. A case that the variant refuses is said with the reason, and
is no failure. --cases mistakes: cases.HARD with each mistake of asm_mistakes.py in the templates, and which none
noticed; in as many pieces as its file needs.
The exit status is the number of failures (at most 100).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

import cases
import ptx_machine
import torch
from asm_mistakes import CHANGES, MISTAKES, ORDERS, PAGES, PIECES, Stale, planted
from interpreted_main import RED, interpretable, of_variant, outputs, run_each, say

from mla_jit import ops
from mla_jit.compile import render
from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.launch import interpreter
from mla_jit.launch.base import Binding, Launch
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.ops.variant import Variant
from mla_jit.target import Target, by_name


def fitting(case: cases.Case, page: int, splits: int, heads: int) -> cases.Case:
    """The case with pages of so many tokens (that hold whole tiles: perhaps of more), so many splits if it may have
    any, and at least so many heads, if they belong to one KV head or `heads` are whole pairs of blocks.

    With 0 of any as it is.
    """
    if case.kv_heads == 1 or heads % 128 == 0:
        case = dataclasses.replace(case, heads=max(case.heads, heads * case.kv_heads))
    if splits and case.num_kv_splits is None and not case.batch_invariant:
        case = dataclasses.replace(case, num_kv_splits=splits)
    return dataclasses.replace(case, page=page if page % 64 else max(page, -(-case.page // 64) * 64)) if page else case


def buffers(call: cases.Call, tensors: dict[str, Any]) -> ptx_machine.Memory:
    """The tensors of a call as device memory: their whole storages, since strides and views reach all of them."""
    memory = ptx_machine.Memory()
    known: set[int] = set()
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            memory.add(name, storage.data_ptr(), storage.nbytes(), writable=name in ("out", "lse", "workspace"))
    return memory


def run_kernel(
    source: Source, launch: Launch, binding: Binding, places: dict[str, int], floats: dict[str, float],
    memory: ptx_machine.Memory, seed: int, first: bool, truthful: bool = False,
) -> ptx_machine.Statistics:  # fmt: skip
    """The kernel of a PTX source on host memory.

    If it may overlap the launch before it, it waits before it touches what that writes: the first launch of a call
    anything, the second the partials.
    """
    made = render.render(source)
    arguments: list[Any] = []
    for arg in launch.args:
        if arg.kind == "tma":
            view = binding.views[arg.name]
            element = DTYPES[view.dtype].bytes
            arguments.append(
                ptx_machine.TensorMap(
                    places[arg.name], view.rows, view.columns, view.row_bytes, element, *arg.block, whole=True
                )
            )
        elif arg.kind == "ptr":
            arguments.append(places[arg.name] + arg.offset)
        else:
            arguments.append(floats[arg.name] if arg.kind == "f32" else int(binding.numbers[arg.name]))
    size = int(dict(source.constants)["ARENA"] or 0)
    program = ptx_machine.parse(made.text)
    dependent = (None if first else frozenset({"workspace"})) if launch.pdl else frozenset()
    return ptx_machine.run(
        program,
        launch.grid,
        arguments,
        memory,
        size,
        seed=seed,
        cluster=launch.cluster,
        dependent=dependent,
        truthful=truthful,
    )


def interpret(source: Source, launch: Launch, binding: Binding, places: dict[str, int]) -> None:
    """A Triton kernel that takes no floats."""
    bound = interpreter.bind((source,), (dataclasses.replace(launch, kernel=0),), binding, {})
    bound.run([places[name] + offset for name, offset in bound.operands], [])


def decode(
    call: cases.Call, inputs: DecodeInputs, variant: Variant, target: Target, config: Config, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, ptx_machine.Statistics]:
    """The call's (out, lse), and what ran. AssertionError if a kernel writes beside the workspace."""
    problem = inputs.problem
    out, lse = outputs(inputs)
    size = variant.workspace_bytes(problem, target, config)
    workspace = torch.full((size + 2 * RED,), 0xFF, dtype=torch.uint8)
    tensors = {**inputs.tensors, "out": out, "lse": lse, "workspace": workspace}
    places = {name: t.data_ptr() for name, t in tensors.items() if t is not None}
    offsets = variant.offsets(problem, target, config)
    places |= {name: workspace.data_ptr() + RED + offset for name, offset in offsets.items()}
    binding = Binding({**inputs.binding.numbers, **variant.numbers(problem, target, config)}, inputs.binding.views)
    sources, launches = variant.sources(problem, target, config), variant.launches(problem, target, config)
    ran = []
    for launch in launches:
        source = sources[launch.kernel]
        if source.toolchain == "ptx":
            memory = buffers(call, tensors)
            truthful = zlib.crc32(call.case.id.encode()) % 2 == 0  # of what is read before it is there
            ran.append(run_kernel(source, launch, binding, places, inputs.floats, memory, seed, not ran, truthful))
        else:
            interpret(source, launch, binding, places)
    said, *_ = ran
    beside = torch.cat([workspace[:RED], workspace[RED + size :]])
    assert (beside == 0xFF).all(), f"{call.case.id}: written beside the workspace"
    return out, lse, said


def judged(
    case: cases.Case, variant: Variant, target: Target, changes: dict[str, Any], seed: int
) -> dict[str, Any]:  # fmt: skip
    """Runs a case: its config and figures, or why it is refused. Raises what the emulator or the judgement raises."""
    call = cases.build(case)
    inputs = decode_inputs(call.q, call.kv_cache, **call.kwargs)
    config = variant.default(inputs.problem, target).replace(**changes)
    if (reason := variant.rejects(inputs.problem, target, config)) is not None:
        return {"refused": reason}
    out, lse, said = decode(call, inputs, variant, target, config, seed)
    figures = cases.check(call, out, lse)
    far = sum(n for op, n in said.instructions.items() if op.startswith(("ld.shared::cluster", "st.shared::cluster")))
    shared = sum(n for op, n in said.instructions.items() if "multicast" in op)
    line = {"config": str(config), "rel_l2": figures.rel_l2, "lse_error": figures.lse_error}
    return {**line, "steps": said.steps, "far": far, "multicasts": shared, "asked": said.asked}


def alive(variant: Variant, target: Target, seed: int, mistakes: Sequence[str]) -> int:
    """How many of the mistakes no case notices, or no template has a place for."""
    found = 0
    hard_cases = cases.HARD_OF.get(variant.name, cases.HARD)
    for mistake in mistakes:
        started, killed, stale = time.perf_counter(), "", ""
        pieces = next((count for name, count in PIECES.items() if mistake.startswith(name)), 0)
        lens, order = ORDERS.get(mistake, (None, seed))
        changes = next((changed for name, changed in CHANGES.items() if mistake.startswith(name)), {})
        page = next((page for name, page in PAGES.items() if mistake.startswith(name)), None)
        chosen = [case for case in hard_cases if page in (None, case.page) and not (pieces and case.num_kv_splits == 1)]
        if lens is not None:
            splits = (pieces or 1) if len(lens) == 1 else None
            chosen = [dataclasses.replace(cases.HARD[0], lens=lens, num_kv_splits=splits)]
        for case in chosen:
            hard = dataclasses.replace(case, num_kv_splits=pieces) if pieces and case.num_kv_splits is None else case
            if changes.get("multicast"):
                hard = fitting(hard, 64, 0, 128)
            try:
                with planted(*MISTAKES[variant.name][mistake]):
                    judged(of_variant(interpretable(hard, "fp16"), variant), variant, target, changes, order)
            except (AssertionError, ptx_machine.MachineError) as error:
                killed = f"{type(error).__name__}: {error}"
                break
            except Stale as error:
                stale = str(error)
                break
        found += not killed
        seconds = round(time.perf_counter() - started, 3)
        say({"mistake": mistake, "killed": killed.partition("\n")[0], "stale": stale, "seconds": seconds})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="decode_splitk_asm")
    parser.add_argument("--sms", type=int, default=3, help="of the target; each of its programs is walked in Python")
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--only", default="", help="cases whose id contains this")
    parser.add_argument("--part", default="0/1", help="I/N: only every Nth case, or mistake, from the Ith on")
    parser.add_argument("--cases", choices=["small", "large", "mistakes"], default="small")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which warps run and copies end")
    parser.add_argument(
        "--page", type=int, default=64, help="so many tokens, of whole tiles at least; 0: as in the cases"
    )
    parser.add_argument("--splits", type=int, default=0, help="num_kv_splits of the cases that leave it open")
    parser.add_argument("--heads", type=int, default=0, help="at least so many, of the cases with one KV head")
    parser.add_argument("--stop", action="store_true", help="at the first failure")
    parser.add_argument("changes", nargs="*", help="tunables, name=value")
    options = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (change.split("=") for change in options.changes)}
    variant = next(v for v in ops.variants("decode") if v.name == options.variant)
    target = dataclasses.replace(by_name("sm_90"), sms=options.sms)
    first, step = map(int, options.part.split("/"))
    if options.cases == "mistakes":
        return alive(variant, target, options.seed, list(MISTAKES[variant.name])[first::step])
    cases_of = {"small": cases.SMALL, "large": cases.LARGE}[options.cases][first::step]
    fit = [
        of_variant(fitting(interpretable(case, options.dtype), options.page, options.splits, options.heads), variant)
        for case in cases_of
    ]
    chosen = [case for case in fit if options.only in case.id]
    return run_each(chosen, lambda case: judged(case, variant, target, changes, options.seed), options.stop)


if __name__ == "__main__":
    sys.exit(main())
