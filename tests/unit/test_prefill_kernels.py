"""The prefill and merge kernels: run in Triton's interpreter, planned on the null runtime, compiled for each target."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import prefill_cases as cases
import pytest
import torch
from helpers import interpreted

import mla_jit
from mla_jit import errors, launch, ops, settings, target
from mla_jit.compile.triton import compile_source
from mla_jit.config import Config
from mla_jit.launch.null import NullRuntime
from mla_jit.ops.prefill import gluon, persistent, tiles
from mla_jit.ops.prefill.inputs import prefill_inputs
from mla_jit.problem import MergeProblem, PrefillProblem, ReduceProblem

GPU_TARGETS = [name for name, row in target.targets().items() if row.triton]
HOPPER = target.by_name("sm_90")


def lines_of(program: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines that a program prints with Triton imported as an interpreter."""
    done = interpreted(program, *arguments)
    sys.stdout.write(done.stdout)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# By pointers and by bulk copies, blocks above and below the lengths, keys cut and not, native and decoded fp8.
RUNS = {
    "sm_80": ("--target=sm_80", "block_m=32", "block_n=32"),
    "tma": ("--target=sm_90", "tma=true", "block_m=16", "block_n=16"),
    "bf16, tall": ("--target=sm_90", "--dtype=bf16", "--part=1/3", "block_m=128", "block_n=64"),
    "gfx942": ("--target=gfx942", "--part=0/3", "block_m=64", "block_n=32"),
    "persistent": ("--variant=prefill_persistent_triton", "--sms=3", "block_m=16", "block_n=32"),
    "persistent, keys cut": (
        "--variant=prefill_persistent_triton", "--sms=40", "block_m=16", "block_n=16", "min_tiles=1",
    ),
    "persistent, tma": (
        "--variant=prefill_persistent_triton", "--target=sm_90", "--sms=20", "--part=2/3", "tma=true", "block_m=32",
        "block_n=16", "min_tiles=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_every_case_is_right(run: str) -> None:
    lines = lines_of("interpreted_prefill", *RUNS[run])
    part = next((a.removeprefix("--part=") for a in RUNS[run] if a.startswith("--part=")), "0/1")
    first, step = map(int, part.split("/"))
    assert len(lines) == len(cases.SMALL[first::step])
    assert all("error" not in line for line in lines)
    assert all(line["rel_l2"] <= 8e-3 and line["lse_error"] <= 1e-3 for line in lines)
    for change in (a for a in RUNS[run] if not a.startswith("--")):  # the tunable was indeed changed
        assert any(change.lower() in line["config"].lower() for line in lines), change


def test_merge_is_right() -> None:
    lines = lines_of("interpreted_merge")
    assert len(lines) == 9
    assert all(line["error"] <= line["limit"] for line in lines)


# --------------------------------------------------------------------------------------------------------- planning


@pytest.fixture
def null() -> Iterator[NullRuntime]:
    """Calls on CPU tensors planned for sm_90 and sent to the null runtime."""
    runtime = NullRuntime()
    with settings.scope(target="sm_90", shipped_db=False):
        launch.override(runtime)
        mla_jit.reload()
        yield runtime
    launch.override(None)
    mla_jit.reload()


def _call(**fields: Any) -> cases.Call:
    plain = {"heads": 16, "kv_heads": 16, "D": 192, "DV": 128, "q_lens": (300, 40), "q_dtype": "bf16"}
    return cases.build(cases.Case(**{**plain, "kv_dtype": "bf16", **fields}))


def test_a_call_is_one_launch_of_as_many_blocks_as_the_bound_allows(null: NullRuntime) -> None:
    call = _call()
    mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    (record,) = null.records
    assert record.kernel == "prefill_gluon"
    assert record.grid == (2 * 16 * 3, 1, 1)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.workspace_bytes == 0
    assert dispatch.config["block_m"] == 128
    again = _call(q_lens=(200, 140))
    mla_jit.prefill(call.q, call.k, call.v, **call.kwargs | {"qo_indptr": again.kwargs["qo_indptr"]})
    assert null.records[1].grid == record.grid


def test_the_persistent_scheduler_makes_its_list_and_runs_one_wave(null: NullRuntime) -> None:
    call = _call()
    mla_jit.prefill(call.q, call.k, call.v, **{**call.kwargs, "scheduler": "persistent"})
    listed, walk, combine = null.records
    assert [r.kernel for r in null.records] == [
        "prefill_persistent_triton_schedule", "prefill_persistent_gluon", "prefill_persistent_triton_combine_pieces",
    ]  # fmt: skip
    assert listed.grid == (1, 1, 1)
    assert walk.grid == (HOPPER.sms, 1, 1)
    assert combine.grid[0] % 16 == 0
    assert mla_jit.last_dispatch().workspace_bytes > 0  # type: ignore[union-attr]
    many = _call(heads=144, kv_heads=144, q_lens=(40,), D=32, DV=32)
    mla_jit.prefill(many.q, many.k, many.v, **{**many.kwargs, "scheduler": "persistent"})
    assert len(null.records) == 5  # one block has more heads than the wave has programs: no combine


def test_the_schedulers_refuse_each_others_calls(null: NullRuntime) -> None:
    call = _call()
    mla_jit.prefill(call.q, call.k, call.v, **{**call.kwargs, "scheduler": "tiles"})
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == gluon.NAME
    assert "a program a block of queries is asked for" in dispatch.rejected[persistent.NAME]
    with pytest.raises(errors.NoVariant, match="fp32 q, k or v"):
        mla_jit.prefill(*(x.float() for x in (call.q, call.k, call.v)), **call.kwargs)
    with pytest.raises(errors.NoVariant, match="two 16-bit dtypes do not mix"):
        mla_jit.prefill(call.q.half(), call.k, call.v, **call.kwargs)
    wide = _call(DV=272)
    with pytest.raises(errors.NoVariant, match="v_dim 272 > 256"):
        mla_jit.prefill(wide.q, wide.k, wide.v, **wide.kwargs)


def test_nothing_to_compute_launches_nothing(null: NullRuntime) -> None:
    for q_lens in ((), (0, 0)):
        call = _call(q_lens=q_lens, kv_lens=tuple(7 for _ in q_lens))  # rows of nobody alone
        out = mla_jit.prefill(call.q, call.k, call.v, **{**call.kwargs, "return_lse": False})
        assert out.shape == (3, 16, 128)  # type: ignore[union-attr]
    assert null.records == []


def test_a_workspace_too_small_is_refused(null: NullRuntime) -> None:
    call = _call()
    kwargs = {**call.kwargs, "scheduler": "persistent"}
    with pytest.raises(errors.InvalidInput, match=r"this call needs \d+ .*last_dispatch"):
        mla_jit.prefill(call.q, call.k, call.v, **kwargs, workspace=torch.empty(64, dtype=torch.uint8))
    assert null.records == []


def test_long_queries_over_the_paged_cache_are_not_cut(null: NullRuntime) -> None:
    """Else the partials of all rows would be kept, gigabytes for a long prompt."""
    batch, q_len, heads = 2, 800, 16
    arguments: dict[str, Any] = {
        "kv_lora_rank": 512, "sm_scale": 0.1, "block_table": torch.zeros(batch, 64, dtype=torch.int32),
        "seq_lens": torch.full((batch,), 4096, dtype=torch.int32),
        "qo_indptr": torch.tensor([0, q_len, 2 * q_len], dtype=torch.int32), "max_q_len": q_len,
    }  # fmt: skip
    q, cache = torch.zeros(batch * q_len, heads, 576).bfloat16(), torch.zeros(4, 64, 576).bfloat16()
    mla_jit.prefill_paged(q, cache, **arguments)
    assert mla_jit.last_dispatch().workspace_bytes == 0  # type: ignore[union-attr]
    assert len(null.records) == 1
    mla_jit.decode(q, cache, **arguments)
    assert mla_jit.last_dispatch().workspace_bytes > 1 << 25  # type: ignore[union-attr]
    mla_jit.prefill_paged(q[:40], cache, **{**arguments, "qo_indptr": torch.tensor([0, 20, 40]), "max_q_len": 20})
    assert mla_jit.last_dispatch().problem.num_kv_splits is None  # type: ignore[union-attr]


def test_merging_in_place_is_one_launch(null: NullRuntime) -> None:
    a, b = torch.zeros(5, 3, 128).bfloat16(), torch.zeros(5, 3, 128)
    lse = torch.zeros(5, 3)
    out, got = mla_jit.merge_state(a, lse, b, lse.clone(), out=a, lse=lse)
    assert out is a
    assert got is lse
    (record,) = null.records
    assert record.kernel == "merge_triton"
    assert record.pointers[0] == record.pointers[4] == a.data_ptr()
    made, _ = mla_jit.merge_state(a, lse, b, lse.clone())
    assert made.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- legality, compiled


def test_what_bulk_copies_want() -> None:
    def why(**fields: Any) -> str | None:
        call = _call(**fields)
        return tiles.no_tma(prefill_inputs(call.q, call.k, call.v, **call.kwargs).problem)

    assert why() is None
    assert "not multiples of 16" in str(why(kv_view="odd"))
    assert "do not lie within a token's row" in str(why(kv_view="heads"))
    assert "decoded in registers" in str(why(kv_dtype="fp8_e4m3"))
    assert "powers of two" in str(why(D=80, DV=80))
    assert why(D=96, DV=64) is None


@pytest.mark.parametrize(
    ("dim", "parts"),
    [(192, (128, 64)), (96, (64, 32)), (128, (128, 0)), (80, (64, 16)), (224, (224, 0)), (20, (20, 0))],
)
def test_heads_are_multiplied_in_two_parts_where_that_saves_padding(dim: int, parts: tuple[int, int]) -> None:
    assert tiles.parts_of(dim) == parts


def test_heads_together_fill_the_l2_and_keep_groups_whole() -> None:
    problem = PrefillProblem(num_heads=128, num_kv_heads=128, max_kv_len=8192)
    together = tiles.heads_together(problem, HOPPER)
    assert together * 8192 * 320 * 2 <= HOPPER.l2_bytes // 2 < (together + 1) * 8192 * 320 * 2
    grouped = dataclasses.replace(problem, num_kv_heads=16)
    assert tiles.heads_together(grouped, HOPPER) % 8 == 0
    assert tiles.heads_together(dataclasses.replace(problem, max_kv_len=1 << 20), HOPPER) == 1
    assert tiles.heads_together(dataclasses.replace(problem, max_kv_len=64), HOPPER) == 128


@pytest.mark.parametrize("heads", [1, 3, 16, 131, 132, 200])
def test_the_list_has_room_for_every_item(heads: int) -> None:
    """Against the rule by which `schedule` cuts, for units of any tiles."""
    problem = PrefillProblem(num_heads=heads, num_kv_heads=heads, batch=3, total_q=2000)
    config = persistent.default(problem, HOPPER).replace(min_tiles=1)
    programs = persistent.programs(HOPPER, config)
    parts, items = persistent._parts(problem, HOPPER, config), persistent._buffers(problem, HOPPER, config)["items"][0]
    generator = torch.Generator().manual_seed(heads)
    for count in range(1, persistent.slots(problem, config) + 1):
        for longest in (1, 7, 1000):
            units = torch.randint(0, longest + 1, (count,), generator=generator)
            cut = max(1, int(units.max()))
            if count * heads < programs:
                cut = min(cut, max(1, -(-int(units.sum()) * heads // programs)))
            pieces = (-(-units // cut)).clamp_min(1)
            assert int(pieces.sum()) <= items
            assert int(pieces[pieces > 1].sum()) <= parts


DIMS = [(192, 128), (96, 64), (128, 128), (256, 256), (80, 80)]


def test_the_main_loop_on_hopper_is_of_warpgroup_products_and_bulk_copies() -> None:
    problem = PrefillProblem(num_heads=128, num_kv_heads=128, lse=True)
    config = tiles.default(problem, HOPPER)
    assert dict(config) == {"block_m": 128, "block_n": 128, "num_warps": 8, "num_stages": 2, "tma": True}
    (source,) = tiles.sources(problem, HOPPER, config)
    assert [name for name, kind in source.signature if kind.startswith("tma")] == ["k_desc", "k_rest_desc", "v_desc"]
    artifact = compile_source(source)
    assert artifact.spill_bytes <= 64  # of the peeled tiles
    assert set(artifact.extra["tma"]) == {"k_desc", "k_rest_desc", "v_desc"}


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_merge_compiles_without_spills(name: str) -> None:
    there, (variant, _) = target.by_name(name), ops.variants("merge")
    for dtypes, dim in ((("bf16", "bf16", "bf16"), 128), (("fp32", "fp16", "fp16"), 512)):
        problem = MergeProblem(num_heads=16, dim=dim, a_dtype=dtypes[0], b_dtype=dtypes[1], out_dtype=dtypes[2])
        for source in variant.sources(problem, there, variant.default(problem, there)):
            assert compile_source(source).spill_bytes == 0
    summing, _ = ops.variants("reduce")
    for groups in (ReduceProblem(num_heads=16, dim=128), ReduceProblem(num_heads=3, dim=512, index64=("indptr",))):
        for source in summing.sources(groups, there, summing.default(groups, there)):
            assert compile_source(source).spill_bytes == 0


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_every_default_is_accepted_on_every_target(name: str) -> None:
    there = target.by_name(name)
    for qk_dim, v_dim in (*DIMS, (64, 64), (192, 256), (24, 40), (512, 256)):
        for kv, q_len, heads in (("bf16", 4096, (16, 16)), ("fp8_e4m3", 8, (8, 1)), ("bf16", 100_000, (128, 128))):
            problem = PrefillProblem(
                num_heads=heads[0], num_kv_heads=heads[1], qk_dim=qk_dim, v_dim=v_dim, kv_dtype=kv, q_len=q_len,
                total_q=2 * q_len, batch=2,
            )  # fmt: skip
            for variant in (tiles.PREFILL_TRITON, persistent.PREFILL_PERSISTENT_TRITON):
                config = variant.default(problem, there)
                assert set(config) == set(variant.space)
                assert variant.rejects(problem, there, config) is None
                offsets = variant.offsets(problem, there, config)
                assert all(at % 16 == 0 for at in offsets.values())


def test_configs_that_do_not_fit_are_refused_before_they_are_compiled() -> None:
    problem = PrefillProblem(num_heads=16, num_kv_heads=16)
    large = tiles.default(problem, HOPPER).replace(num_stages=4)
    assert "bytes of shared memory" in str(tiles.rejects(problem, HOPPER, large))
    ampere = target.by_name("sm_80")
    bulk: Config = tiles.default(problem, ampere).replace(tma=True)
    assert "no bulk tensor copies" in str(tiles.rejects(problem, ampere, bulk))
