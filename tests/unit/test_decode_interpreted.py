"""The Triton kernels, run in Triton's interpreter with the variant's own launches, and the mistakes that this sees.

The interpreter must be chosen before Triton is imported, so each run is a process of its own (interpreted_main.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import covering
import mutations
import pytest
from helpers import interpreted

from mla_jit.errors import LaunchError
from mla_jit.launch import interpreter
from mla_jit.launch.base import Arg, Binding, Launch
from mla_jit.ops.decode.splitk import DECODE_SPLITK_TRITON as VARIANT
from mla_jit.problem import DecodeProblem
from mla_jit.target import by_name

TESTS = Path(__file__).resolve().parent.parent


def python(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)


# The main loop by pointers and by bulk copies, masked tiles before and after it, native and decoded fp8, wide rows.
RUNS = {
    "sm_80": ("--target=sm_80", "--part=1/8"),
    "a device that lacks room": ("--target=sm_80", "--sms=1", "--part=0/3", "masked_first=false"),
    "tma": ("--target=sm_90", "--part=1/3", "--rope-dim=64", "block_n=16", "tma=true", "masked_first=false"),
    "bf16, wide rows, tma": (
        "--target=sm_90",
        "--part=2/3",
        "--rope-dim=64",
        "--dtype=bf16",
        "block_n=16",
        "block_m=64",
        "tma=true",
    ),
    "gfx942": ("--target=gfx942", "--part=4/8", "block_n=64"),
    "persistent": ("--variant=decode_persistent_triton", "--target=sm_80", "--part=1/2", "waves=2"),
    "persistent, sequences summed in turn": (  # narrow tiles of the combine: a device holds few of its programs
        "--variant=decode_persistent_triton",
        "--target=sm_80",
        "--part=7/8",
        "waves=2",
        "combine_h=1",
        "combine_d=16",
    ),
    "persistent, few groups": ("--variant=decode_persistent_triton", "--target=sm_80", "--sms=1", "--part=0/3"),
    "persistent, tma": (
        "--variant=decode_persistent_triton",
        "--target=sm_90",
        "--part=1/3",
        "--rope-dim=64",
        "block_n=16",
        "tma=true",
        "overhead=2",
    ),
    "persistent, folded": ("--variant=decode_persistent_triton", "--target=sm_80", "fold=true"),
    "persistent, folded, wide rows": (
        "--variant=decode_persistent_triton",
        "--target=sm_90",
        "--part=2/3",
        "--rope-dim=64",
        "block_n=16",
        "block_m=64",
        "tma=true",
        "fold=true",
    ),
}


def _expected(arguments: tuple[str, ...]) -> int:
    first, step = next(
        (map(int, a.removeprefix("--part=").split("/")) for a in arguments if a.startswith("--part=")), (0, 1)
    )
    return len(cases.SMALL[first::step])


@pytest.mark.parametrize("run", RUNS)
def test_every_case_is_right(run: str) -> None:
    done = interpreted("interpreted_main", *RUNS[run])
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()][1:]
    for line in lines:
        sys.stdout.write(json.dumps(line) + "\n")
    assert [line["error"] for line in lines if "error" in line] == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == _expected(RUNS[run])
    assert all(line["rel_l2"] <= 8e-3 and line["lse_error"] <= 1e-3 for line in lines)
    for change in (a for a in RUNS[run] if not a.startswith("--")):  # the tunable was indeed changed
        assert any(change.lower() in line["config"].lower() for line in lines), change


def test_the_cases_kill_every_mutation(request: pytest.FixtureRequest) -> None:
    """Put in by tests/mutations.py: tokens, pages, splits, heads lost or swapped, causal boundary, LSE's base.

    Every second one, on one day these, on the next the others; with --full all of them."""
    first, step = covering.share_of_today(request.config.getoption("--full"))
    names = [mutation.name for mutation in mutations.MUTATIONS][first::step]
    done = python(str(TESTS / "mutations.py"), *names)
    sys.stdout.write(done.stdout)
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("killed")] == []
    assert len(lines) == len(names) >= 10
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_mutation_has_one_place_in_the_kernels() -> None:
    for mutation in mutations.MUTATIONS:
        assert (TESTS.parent / mutation.path).read_text(encoding="utf-8").count(mutation.old) == 1, mutation.name


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx950"])
@pytest.mark.parametrize("heads", [16, 128])
def test_batch_invariant_kernels_depend_on_neither_batch_nor_capacity(heads: int, name: str) -> None:
    """The same machine code and the same tokens a split, so the same order of every sum, alone and in any batch."""
    target = by_name(name)
    alone = DecodeProblem(num_heads=heads, batch_invariant=True, batch=1, max_kv_len=4096)

    def fixed(problem: DecodeProblem) -> tuple[Any, ...]:
        config = VARIANT.default(problem, target)
        tokens = VARIANT.numbers(problem, target, config)["min_tiles"] * config.int("block_n")
        return VARIANT.sources(problem, target, config), tokens

    for batch, capacity in itertools.product((1, 6, 64, 512), (4096, 65536, 1 << 20)):
        assert fixed(dataclasses.replace(alone, batch=batch, max_kv_len=capacity)) == fixed(alone)


def test_the_interpreter_must_be_chosen_before_triton_is_imported() -> None:
    with pytest.raises(LaunchError, match="TRITON_INTERPRET=1"):
        interpreter.bind((), (), Binding({}))


DISAGREE = {
    "a kind": ("*fp32", Arg("i64", "x"), "parameter x_ptr is \\*fp32 in the source, its argument x is i64"),
    "an alignment": ("i64:16", Arg("i64", "n"), "parameter x_ptr was compiled as a multiple of 16; it is 24"),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_a_launch_must_agree_with_the_signature(what: str) -> None:
    """What a driver would take silently: another kind of argument, a stride that is less aligned than was promised."""
    kind, arg, message = DISAGREE[what]
    program = f"""
import dataclasses
from mla_jit.compile.artifact import Source
from mla_jit.errors import LaunchError
from mla_jit.launch import interpreter
from mla_jit.launch.base import Arg, Binding, Launch
from mla_jit.ops.decode.splitk import DECODE_SPLITK_TRITON as VARIANT
from mla_jit.problem import DecodeProblem
from mla_jit.target import by_name
kernel = "mla_jit.ops.decode.triton_combine:combine"
source = Source("k", "triton", "", "", "", signature=(("x_ptr", {kind!r}),), locator=kernel)
bound = interpreter.bind((source,), ({Launch(0, (1, 1, 1), (arg,))!r},), Binding({{"n": 24, "x": 1}}))
try:
    bound.run([], [])
except LaunchError as error:
    print(error)
"""
    done = python("-c", program)
    assert done.stderr == ""
    assert done.stdout.strip() == message.replace("\\", "")
