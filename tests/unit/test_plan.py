"""Planning and launching on the null runtime, with kernels really compiled: devices, streams, what raises."""

from __future__ import annotations

import pytest
import torch

import mla_jit
from mla_jit import api, plan, settings, target
from mla_jit.compile import cache
from mla_jit.errors import CacheMiss
from mla_jit.launch.base import Binding
from mla_jit.launch.null import NullRuntime
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.problem import DecodeProblem


def arguments(heads: int = 16, batch: int = 2, pages: int = 4) -> tuple[torch.Tensor, torch.Tensor, dict]:
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    lens = torch.full((batch,), 100, dtype=torch.int32)
    more = {"kv_lora_rank": 512, "sm_scale": 0.1, "block_table": table, "seq_lens": lens}
    return torch.randn(batch, heads, 576).bfloat16(), torch.randn(batch * pages, 64, 576).bfloat16(), more


def test_a_call_packs_pointers_in_the_order_of_its_operands(null: NullRuntime) -> None:
    q, kv, more = arguments()
    out, lse = mla_jit.decode(q, kv, **more, return_lse=True)
    first, second = null.records
    assert [first.kernel, second.kernel] == ["decode_narrow_asm", "decode_combine_asm"]
    assert first.pointers[:2] == (q.data_ptr(), q.data_ptr() + 1024)  # q_nope, q_pe
    assert {kv.data_ptr(), kv.data_ptr() + 1024, out.data_ptr(), lse.data_ptr()} <= set(first.pointers)
    assert {more["block_table"].data_ptr(), more["seq_lens"].data_ptr()} <= set(first.pointers)
    assert first.pdl
    assert second.pdl
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.workspace_bytes > 0
    assert first.smem_bytes == dispatch.kernels[0].smem_bytes


def test_a_second_call_plans_nothing(null: NullRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv, more = arguments()
    mla_jit.decode(q, kv, **more)
    monkeypatch.setattr(api, "decode_inputs", None)
    monkeypatch.setattr(plan, "executable_for", None)
    out = torch.empty(2, 16, 512, dtype=torch.bfloat16)
    mla_jit.decode(q.clone(), kv.clone(), **more)
    assert len(null.records) == 4
    with pytest.raises(TypeError):  # another signature (out given) has to plan
        mla_jit.decode(q, kv, **more, out=out)


def test_modules_are_per_device(null: NullRuntime) -> None:
    q, kv, more = arguments()
    inputs = decode_inputs(q, kv, **more)
    executable = plan.executable_for(inputs.problem, target.by_name("sm_90"))
    for device in (0, 1, 1):
        bound = executable.bind(inputs.binding, device)
        bound.run([0] * len(bound.operands), [0.0] * len(bound.float_names), 7)
    assert [r.device for r in null.records] == [0, 0, 1, 1, 1, 1]
    assert {r.stream for r in null.records} == {7}
    assert null.loaded == [(a.key, d) for d in (0, 1) for a in executable.artifacts]


def test_under_capture_nothing_is_compiled_and_nothing_is_loaded(null: NullRuntime) -> None:
    q, kv, more = arguments()
    inputs = decode_inputs(q, kv, **more)
    there = target.by_name("sm_90")
    executable = plan.executable_for(inputs.problem, there)
    with pytest.raises(CacheMiss, match=r"decode_narrow_asm .* not loaded on device 3, .* under graph capture"):
        executable.bind(inputs.binding, 3, forbid_load="under graph capture")
    assert null.loaded == []
    executable.load(3)
    executable.bind(inputs.binding, 3, forbid_load="under graph capture")


def test_strict_mode_names_what_is_missing_and_the_remedy(null: NullRuntime, cache_dir: str) -> None:
    q, kv, more = arguments()
    with settings.scope(mode="strict"), pytest.raises(CacheMiss, match="mla-tune compile") as raised:
        mla_jit.decode(q, kv, **more)
    assert "decode_narrow_asm" in str(raised.value)
    mla_jit.decode(q, kv, **more)
    mla_jit.reload()
    cache.forget()
    with settings.scope(mode="strict"):
        mla_jit.decode(q, kv, **more)
    assert mla_jit.last_dispatch().origins == ("disk", "disk")  # type: ignore[union-attr]


def test_sizes_do_not_multiply_plans(null: NullRuntime) -> None:
    """Hints that grow from step to step share a plan until the next power of two."""
    q, kv, more = arguments()
    for hint in range(129, 250, 7):
        mla_jit.decode(q, kv, **more, max_kv_len=hint)
    assert len(plan._memo) == 1
    assert {r.grid for r in null.records if r.kernel == "decode_narrow_asm"} == {null.records[0].grid}


def test_every_choice_is_legal_on_every_target() -> None:
    for there in target.targets().values():
        for heads in (1, 12, 20, 64, 128, 256):
            for batch, q_len in ((1, 1), (64, 2), (2000, 1)):
                problem = DecodeProblem(num_heads=heads, batch=batch, q_len=q_len, max_kv_len=131072)
                choice = plan.choose(problem, there)
                assert choice.variant.rejects(problem, there, choice.config) is None
                assert choice.variant.workspace_bytes(problem, there, choice.config) >= 0


def test_a_binding_without_a_number_says_which(null: NullRuntime) -> None:
    q, kv, more = arguments()
    inputs = decode_inputs(q, kv, **more)
    executable = plan.executable_for(inputs.problem, target.by_name("sm_90"))
    numbers = {k: v for k, v in inputs.numbers.items() if k != "q_stride_t"}
    with pytest.raises(KeyError, match="q_stride_t"):
        executable.bind(Binding(numbers, inputs.views), 0)


@pytest.mark.parametrize("heads", [8, 16, 40, 128])
@pytest.mark.parametrize("name", ["sm_90", "sm_100", "cpu"])
def test_batch_invariant_has_one_choice_for_every_batch_and_length(name: str, heads: int) -> None:
    """What a sequence gives must not depend on what it is batched with, so neither may the kernel."""
    where = target.by_name(name)
    asked = [
        DecodeProblem(num_heads=heads, batch_invariant=True, batch=batch, max_kv_len=kv, hinted=hinted, q_len=2)
        for batch, kv, hinted in ((1, 1, True), (1, 65536, False), (7, 3000, True), (256, 131072, False))
    ]
    assert len({(choice.variant.name, choice.config) for choice in (plan.choose(p, where) for p in asked)}) == 1
