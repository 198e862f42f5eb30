"""Calls of the persistent scheduler, kernels compiled: what is launched on which buffers, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import mla_jit
from mla_jit import errors, launch, settings, target
from mla_jit.launch.null import NullRuntime
from mla_jit.ops.decode import persistent
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
    """Calls on CPU tensors planned for sm_90 and sent to the null runtime."""
    runtime = NullRuntime()
    with settings.scope(target="sm_90", shipped_db=False):
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


def test_one_list_serves_all_layers_of_a_step(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    info = mla_jit.decode_metadata_info(q, kv, **more)
    assert info == {
        "groups": ((HOPPER.sms + 1,), torch.int32), "info": ((3 + HOPPER.sms, 4), torch.int32),
        "sums": ((3, 3), torch.int32),
    }  # fmt: skip
    metadata = mla_jit.decode_metadata(q, kv, **more)
    lists = tuple(t.data_ptr() for t in metadata)
    (made,) = null.records
    assert made.kernel == SCHEDULE
    assert made.pointers == (more["seq_lens"].data_ptr(), *lists)
    for _ in range(2):
        mla_jit.decode(q, kv, **more, metadata=metadata)
    assert [r.kernel for r in null.records[1:]] == [WALK, COMBINE, WALK, COMBINE]
    assert set(lists) <= set(null.records[1].pointers)
    again = mla_jit.decode_metadata(q, kv, **more, metadata=metadata)
    assert again is metadata
    assert null.records[-1].pointers == made.pointers
    planned = mla_jit.decode_plan(q, kv, **more, metadata=metadata)
    planned.run(q, kv)
    assert [r.kernel for r in null.records[-2:]] == [WALK, COMBINE]
    assert set(lists) <= set(null.records[-1].pointers) | set(null.records[-2].pointers)


def test_a_list_of_another_call_is_refused(null: NullRuntime) -> None:
    q, kv, more = arguments(batch=3)
    metadata = mla_jit.decode_metadata(q, kv, **more)
    before = len(null.records)
    wrong = [
        metadata._replace(info=metadata.info[:-1]),
        metadata._replace(sums=metadata.sums.long()),
        mla_jit.DecodeMetadata(*(torch.empty(0, dtype=torch.int32) for _ in range(3))),
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
            assert list(offsets) == ["part", "part_lse", "groups", "info", "sums"]
            assert all(at % 16 == 0 for at in offsets.values())
