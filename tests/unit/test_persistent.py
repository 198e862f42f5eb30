"""Calls of the persistent scheduler, kernels compiled: what is launched on which buffers, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mla_jit
from mla_jit import errors, launch, settings, target
from mla_jit.compile import cache, triton
from mla_jit.launch.null import NullRuntime
from mla_jit.ops.decode import asm_persistent, persistent
from mla_jit.problem import DecodeProblem

HOPPER = target.targets()["sm_90"]
WALK = "decode_persistent_triton_decode_persistent"
SCHEDULE, COMBINE = "decode_persistent_triton_schedule", "decode_persistent_triton_combine_listed"


def arguments(batch: int = 2, pages: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    lens = torch.full((batch,), 100, dtype=torch.int32)
    more = {"kv_lora_rank": 512, "sm_scale": 0.1, "block_table": table, "seq_lens": lens}
    return torch.randn(batch, 16, 576).bfloat16(), torch.randn(batch * pages, 64, 576).bfloat16(), more


@pytest.fixture
def null() -> Iterator[NullRuntime]:
    """Calls on CPU tensors planned for sm_90 and sent to the null runtime; Triton's kernels serve."""
    runtime = NullRuntime()
    with settings.scope(target="sm_90", shipped_db=False, backends=("triton",)):
        launch.override(runtime)
        mla_jit.reload()
        yield runtime
    launch.override(None)
    mla_jit.reload()


def test_a_call_makes_its_list_and_runs_it_in_one_wave(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    mla_jit.decode(q, kv, **more, scheduler="persistent")
    schedule, walk, combine = null.records
    assert [schedule.kernel, walk.kernel, combine.kernel] == [SCHEDULE, WALK, COMBINE]
    assert schedule.grid == (1, 1, 1)
    assert walk.grid == (HOPPER.sms, 1, 1)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == "decode_persistent_triton"
    assert "the persistent scheduler is asked for" in dispatch.rejected["decode_splitk_triton"]


def test_kernels_in_ptx_serve_by_the_same_list_and_sum_it_themselves(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    with settings.scope(backends=()):
        mla_jit.reload()
        mla_jit.decode(q, kv, **more, scheduler="persistent")
        metadata = mla_jit.decode_metadata(q, kv, **more)
        mla_jit.decode(q, kv, **more, metadata=metadata)
    assert [record.kernel for record in null.records] == [SCHEDULE, asm_persistent.NAME, SCHEDULE, asm_persistent.NAME]
    assert null.records[1].grid == (HOPPER.sms, 1, 1)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("heads", [16, 40, 128])
def test_lists_are_those_of_the_kernels_in_triton(heads: int, planned: bool) -> None:
    """Whoever makes a list, either walks it; partials in the result's type are half as large."""
    more = {"planned": True, "groups": 33} if planned else {}
    p = DecodeProblem(num_heads=heads, batch=64, lse=True, q_len=2, scheduler="persistent", **more)
    mine, other = asm_persistent.default(p, HOPPER), persistent.default(p, HOPPER).replace(block_m=64, num_warps=8)
    assert asm_persistent.lists(p, HOPPER, mine) == persistent.lists(p, HOPPER, other)
    rows = (64 + asm_persistent.numbers(p, HOPPER, mine)["groups"]) * 2 * heads
    saved = persistent.workspace_bytes(p, HOPPER, other) - asm_persistent.workspace_bytes(p, HOPPER, mine)
    assert saved == rows * 512 * 2
    walk, *rest = asm_persistent.sources(p, HOPPER, mine)
    assert tuple(rest) == persistent.sources(p, HOPPER, other.replace(fold=True))[1:]
    launches = asm_persistent.launches(p, HOPPER, mine)
    assert [launch.kernel for launch in launches] == ([0] if planned else [1, 0])
    assert len(launches[-1].args) == len(walk.signature)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q_dtype": "fp16"}, "must both be"),
        ({"scheduler": "split"}, "split slots are asked for"),
        ({"num_kv_splits": 4}, "num_kv_splits asks for split slots"),
        ({"batch_invariant": True}, "depends on the whole batch"),
        ({"misaligned": ("kv",)}, "kv: the base or a stride"),
    ],
)
def test_kernels_in_ptx_say_why_not(changes: dict[str, Any], reason: str) -> None:
    problem = DecodeProblem(**{"num_heads": 128, **changes})
    assert reason in (asm_persistent.rejects(problem, HOPPER, asm_persistent.default(problem, HOPPER)) or "")


def test_one_list_serves_all_layers_of_a_step(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    info = mla_jit.decode_metadata_info(q, kv, **more)
    assert info == {
        "groups": ((HOPPER.sms + 1,), torch.int32), "info": ((3 + HOPPER.sms, 4), torch.int32),
        "sums": ((3, 3), torch.int32), "arrivals": ((3, 1), torch.int32),
    }  # fmt: skip
    metadata = mla_jit.decode_metadata(q, kv, **more)
    lists = tuple(t.data_ptr() for t in metadata)
    (made,) = null.records
    assert made.kernel == SCHEDULE
    assert made.pointers == (more["seq_lens"].data_ptr(), *lists)
    for _ in range(2):
        mla_jit.decode(q, kv, **more, metadata=metadata)
    assert [r.kernel for r in null.records[1:]] == [WALK, COMBINE, WALK, COMBINE]
    assert set(lists[:3]) <= set(null.records[1].pointers)  # no counts where a kernel combines
    again = mla_jit.decode_metadata(q, kv, **more, metadata=metadata)
    assert again is metadata
    assert null.records[-1].pointers == made.pointers
    planned = mla_jit.decode_plan(q, kv, **more, metadata=metadata)
    planned.run(q, kv)
    assert [r.kernel for r in null.records[-2:]] == [WALK, COMBINE]
    assert set(lists[:3]) <= set(null.records[-1].pointers) | set(null.records[-2].pointers)


def test_a_list_of_another_call_is_refused(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    metadata = mla_jit.decode_metadata(q, kv, **more)
    before = len(null.records)
    wrong = [
        metadata._replace(info=metadata.info[:-1]),
        metadata._replace(sums=metadata.sums.long()),
        metadata._replace(groups=metadata.groups[:-1]),
        metadata._replace(arrivals=metadata.arrivals[:2]),
        mla_jit.DecodeMetadata(*(torch.empty(0, dtype=torch.int32) for _ in range(4))),
    ]
    for each in wrong:
        with pytest.raises(errors.InvalidInput, match="make it by decode_metadata"):
            mla_jit.decode(q, kv, **more, metadata=each)
    with pytest.raises(errors.InvalidInput, match="leave scheduler to auto"):
        mla_jit.decode(q, kv, **more, metadata=metadata, scheduler="split")
    with pytest.raises(errors.InvalidInput, match="leave scheduler to auto"):
        mla_jit.decode_metadata(q, kv, **more, scheduler="split")
    with pytest.raises(errors.InvalidInput, match="auto, split, persistent"):
        mla_jit.decode(q, kv, **more, scheduler="fair")
    with pytest.raises(errors.NoVariant, match="batch_invariant: a work list depends on the whole batch"):
        mla_jit.decode(q, kv, **more, scheduler="persistent", batch_invariant=True)
    with pytest.raises(errors.NoVariant, match="num_kv_splits asks for split slots"):
        mla_jit.decode(q, kv, **more, metadata=metadata, num_kv_splits=4)
    assert len(null.records) == before


@pytest.mark.parametrize(
    ("wishes", "most", "even"),
    [({}, 2**20, 0), ({"max_split_per_batch": 3}, 3, 0), ({"intra_batch_mode": True, "max_split_per_batch": 2}, 2, 1)],
)
def test_wishes_reach_the_kernel_that_makes_the_list(
    null: NullRuntime, monkeypatch: pytest.MonkeyPatch, wishes: dict[str, Any], most: int, even: int
) -> None:
    seen: list[Any] = []
    bind = NullRuntime.bind

    def noting(self: NullRuntime, artifacts: Any, launches: Any, binding: Any, device: int) -> Any:
        seen.append(binding.numbers)
        return bind(self, artifacts, launches, binding, device)

    monkeypatch.setattr(NullRuntime, "bind", noting)
    q, kv, more = arguments(batch=3)
    mla_jit.decode_metadata(q, kv, **more, **wishes)
    assert [record.kernel for record in null.records] == [SCHEDULE]
    assert (seen[-1]["most_pieces"], seen[-1]["even"]) == (most, even)
    with pytest.raises(errors.InvalidInput, match="max_split_per_batch is 0; it must be at least 1"):
        mla_jit.decode_metadata(q, kv, **more, max_split_per_batch=0)


def test_a_list_for_any_number_of_groups_is_run(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    shapes = {"groups": (8,), "info": (3 + 7, 4), "sums": (3, 3), "arrivals": (3, 1)}
    made = mla_jit.DecodeMetadata(**{name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()})
    assert mla_jit.decode_metadata(q, kv, **more, metadata=made) is made
    mla_jit.decode(q, kv, **more, metadata=made)
    assert [record.kernel for record in null.records] == [SCHEDULE, WALK, COMBINE]
    assert null.records[1].grid == (7, 1, 1)


def problem_and_config(heads: int, name: str, **fields: Any) -> tuple[DecodeProblem, Any]:
    p = DecodeProblem(num_heads=heads, batch=64, max_kv_len=32768, scheduler="persistent", lse=True, **fields)
    return p, persistent.default(p, target.by_name(name))


@pytest.mark.parametrize("heads", [16, 40, 128])
def test_a_folded_sum_saves_a_launch(heads: int) -> None:
    for planned in (False, True):
        p, config = problem_and_config(heads, "sm_90", planned=planned)
        kernels = [launch.kernel for launch in persistent.launches(p, HOPPER, config)]
        folded = [launch.kernel for launch in persistent.launches(p, HOPPER, config.replace(fold=True))]
        assert (kernels, folded) == (([0, 2], [0]) if planned else ([1, 0, 2], [1, 0]))
        assert len(persistent.sources(p, HOPPER, config.replace(fold=True))) == 2
        # the list, and so its buffers, is the same
        assert persistent.lists(p, HOPPER, config) == persistent.lists(p, HOPPER, config.replace(fold=True))


def test_where_a_sum_cannot_be_folded_and_where_a_list_would_not_fit() -> None:
    for name, there in target.targets().items():
        if there.triton:
            p, config = problem_and_config(16, name)
            reason = persistent.rejects(p, there, config.replace(fold=True))
            assert (reason is not None) == (there.triton[0] == "hip")
            assert reason is None or "does not wait for the stores of a program's other waves" in reason
    p, config = problem_and_config(16, "sm_90")
    assert "a tile of 48 tokens does not divide the 64" in str(
        persistent.rejects(p, HOPPER, config.replace(block_n=48, tma=False))
    )


LAYERS = """
import dataclasses, sys
sys.path.insert(0, {tests!r})
import cases, torch
from triton.runtime.interpreter import interpreter_builder
from mla_jit.launch import interpreter
from mla_jit.launch.base import Binding
from mla_jit.ops.decode import persistent
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.ops.decode.worklist import work_list
from mla_jit.target import by_name

there = dataclasses.replace(by_name("sm_80"), sms=12)
case = cases.Case(heads=20, lens=(700, 64, 0, 1, 333), q_len=2, q_dtype="fp16", kv_dtype="fp16", C=64, R=16)
call = cases.build(case)
inputs = decode_inputs(call.q, call.kv_cache, **call.kwargs, scheduler="persistent", planned=True)
p = inputs.problem
forward = type(interpreter_builder).set_grid_idx
results = []
for fold, backward in ((False, False), (True, False), (True, True)):
    config = persistent.default(p, there).replace(fold=fold, overhead=1)
    lists = {{n: torch.full(s, -9, dtype=torch.int32) for n, s in persistent.lists(p, there, config).items()}}
    workspace = torch.full((persistent.workspace_bytes(p, there, config),), 255, dtype=torch.uint8)
    places = persistent.workspace_offsets(p, there, config)
    numbers = {{**inputs.numbers, **persistent.numbers(p, there, config)}}

    def run(launches):
        sources = persistent.sources(p, there, config)
        bound = interpreter.bind(sources, launches, Binding(numbers))
        tensors = {{**inputs.tensors, "out": out, "lse": lse, **lists}}
        pointers = [
            (workspace.data_ptr() + places[n] if n in places else tensors[n].data_ptr()) + o for n, o in bound.operands
        ]
        bound.run(pointers, [inputs.floats[n] for n in bound.float_names])

    out, lse = torch.empty(inputs.out_shape, dtype=torch.float16), torch.empty(inputs.out_shape[:-1])
    run(persistent.prepare(p, there, config))
    assert any(parts > 2 for _, parts, _ in lists["sums"].tolist())
    launches = persistent.launches(p, there, config)
    if backward:  # the programs in the other order
        last = launches[0].grid[0] - 1
        interpreter_builder.set_grid_idx = lambda x, y, z: forward(interpreter_builder, last - x, y, z)
    for layer in range(3):
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        run(launches)
        cases.check(call, out, lse)
        assert (lists["arrivals"] == 0).all()
        results.append((fold, out.clone(), lse.clone()))
folded = [(out, lse) for fold, out, lse in results if fold]
assert len(folded) == 6
assert all(torch.equal(out, folded[0][0]) and torch.equal(lse, folded[0][1]) for out, lse in folded)
error = (folded[0][0].float() - results[0][1].float()).abs().max()
assert error <= 2e-3, error
print("the same")
"""


def test_a_folded_sum_is_the_same_for_every_layer_and_whoever_is_last() -> None:
    """In the interpreter: its programs one after the other, forward and backward; the counts are zero after each."""
    code = LAYERS.format(tests=str(Path(__file__).parents[1]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "the same\n"


def test_the_order_of_memory_at_the_count() -> None:
    """In PTX: all partials, a barrier, the count with release and acquire at the device's scope, a barrier, the sum."""
    p, config = problem_and_config(16, "sm_90")
    source = persistent.sources(p, HOPPER, config.replace(fold=True))[0]
    lines = triton._run_pipeline(source)[0]["ptx"].splitlines()
    kinds = ("bar.sync", "st.global", "ld.global", "atom.global.gpu.acq_rel.add", "atom.")
    telling = [found for line in lines if (found := next((kind for kind in kinds if kind in line), None))]
    assert [kind for kind in telling if kind.startswith("atom")] == ["atom.global.gpu.acq_rel.add"]
    place = telling.index("atom.global.gpu.acq_rel.add")
    assert telling[place - 2 : place + 3] == ["st.global", "bar.sync", telling[place], "bar.sync", "st.global"]
    assert "ld.global" in telling[place:]


@pytest.mark.parametrize(("heads", "name"), [(16, "sm_90"), (128, "sm_80")])
def test_a_folded_walk_spills_no_more(heads: int, name: str, cache_dir: str) -> None:
    """Than 64 bytes more: the sum lies outside the loop over tiles."""
    there = target.by_name(name)
    p, config = problem_and_config(heads, name)
    plain, folded = (
        cache.build(persistent.sources(p, there, config.replace(fold=fold))[0]) for fold in (False, True)
    )  # fmt: skip
    assert folded.spill_bytes <= plain.spill_bytes + 64
    assert folded.smem_bytes <= there.smem_bytes


@pytest.mark.parametrize(
    ("heads", "fields"),
    [
        (20, {"q_len": 2, "sinks": True}),
        (20, {"q_len": 4, "sinks": True, "page_size": 1}),
        (64, {"q_len": 2, "soft_cap": True}),
        (128, {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3", "out_dtype": "bf16"}),
    ],
    ids=str,
)
def test_the_default_walk_of_many_rows_is_legal(heads: int, fields: dict[str, Any], cache_dir: str) -> None:
    """Those that spill most; the build refuses what is not within the limits of its Source."""
    p, config = problem_and_config(heads, "sm_90", **fields)
    source = persistent.sources(p, HOPPER, config)[0]
    assert source.limits is not None
    assert cache.build(source).spill_bytes <= (source.limits.spill_bytes or 0)


@pytest.mark.parametrize("name", ["gfx942", "gfx950"])
@pytest.mark.parametrize("heads", [16, 128])
def test_every_kernel_is_legal_on_amd_too(heads: int, name: str, cache_dir: str) -> None:
    there = target.by_name(name)
    p, config = problem_and_config(heads, name)
    walk, schedule, combine = (cache.build(source) for source in persistent.sources(p, there, config))
    assert walk.spill_bytes == schedule.spill_bytes == combine.spill_bytes == 0
    assert walk.registers * walk.threads <= 2 * there.registers_sm
    assert max(kernel.smem_bytes for kernel in (walk, schedule, combine)) <= there.smem_bytes


def test_the_cpu_needs_no_list() -> None:
    q, kv, more = arguments()
    want = mla_jit.decode(q, kv, **more)
    metadata = mla_jit.decode_metadata(q, kv, **more)
    assert mla_jit.decode_metadata_info(q, kv, **more) == {}
    for given in ({"scheduler": "persistent"}, {"metadata": metadata}, {"scheduler": "split"}):
        assert torch.equal(mla_jit.decode(q, kv, **more, **given), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, row in target.targets().items() if row.triton])
def test_every_head_count_has_a_wave_that_fits(name: str) -> None:
    where, variant = target.targets()[name], persistent.DECODE_PERSISTENT_TRITON
    for heads in (1, 3, 16, 40, 112, 128, 300):
        for batch in (1, 64, 2000):
            p = DecodeProblem(num_heads=heads, batch=batch, scheduler="persistent")
            config = variant.default(p, where)
            assert variant.rejects(p, where, config) is None
            _, walk, _ = variant.launches(p, where, config)
            blocks = -(-heads // config.int("block_m"))
            assert walk.grid[0] % blocks == 0
            assert walk.grid[0] <= max(blocks, 2 * where.sms)
            offsets = variant.offsets(p, where, config)
            assert list(offsets) == ["part", "part_lse", "groups", "info", "sums", "arrivals"]
            assert all(at % 16 == 0 for at in offsets.values())
