"""The cpu target through the public `decode`: every small case, every tunable, and the promises about bits."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import cases
import pytest
import torch

import mla_jit
from mla_jit import trial
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.ops.decode import blocked_cpu
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.problem import DecodeProblem
from mla_jit.target import by_name

Result = tuple[torch.Tensor, torch.Tensor | None]


def decode(call: cases.Call) -> Result:
    """The public function's (out, lse); lse is None where the case does not want it."""
    result = mla_jit.decode(call.q, call.kv_cache, **call.kwargs)
    return result if call.case.lse else (result, None)


def with_config(call: cases.Call, config: Config) -> Result:
    """The variant under one config, as the plan would call it."""
    call.poison()
    inputs = decode_inputs(call.q, call.kv_cache, **call.kwargs)
    assert blocked_cpu.rejects(inputs.problem, by_name("cpu"), config) is None
    for name, shape, dtype in (
        ("out", inputs.out_shape, cases.out_dtype(call.case)),
        ("lse", inputs.out_shape[:-1], "fp32"),
    ):
        if inputs.tensors[name] is None:
            inputs.tensors[name] = torch.full(
                shape, float("nan"), dtype=getattr(torch, cases.dtypes.DTYPES[dtype].torch)
            )
    blocked_cpu.run(inputs.problem, config, inputs)
    return inputs.tensors["out"], inputs.tensors["lse"]


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_case(case: cases.Case) -> None:
    call = cases.build(case)
    out, lse = decode(call)
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == "decode_blocked_cpu"
    for name, result in (("out", out), ("lse", lse)):
        assert name not in call.kwargs or call.kwargs[name] is result


SWEPT = (
    cases.Case(lens=(200, 64, 1, 0), heads=6),
    cases.Case(lens=(130, 7), q_len=5, heads=40, page=7, csr=True, sinks=True),
    cases.Case(lens=(150, 20, 3), q_len=8, cp=(1, 2), kv_split=True, kv_heads=2),
)


@pytest.mark.parametrize("case", SWEPT, ids=lambda c: c.id)
@pytest.mark.parametrize(("block_m", "gather"), [*itertools.product((16, 128), ("tile", "sequence"))])
def test_every_tunable_gives_the_same_mathematics(case: cases.Case, block_m: int, gather: str) -> None:
    call = cases.build(case)
    for block_n, splits in itertools.product((32, 64, 256), (1, 2, 4, 8)):
        config = Config.of(blocked_cpu.NAME, block_m=block_m, block_n=block_n, num_kv_splits=splits, gather=gather)
        cases.check(call, *with_config(call, config))


def test_the_space_holds_the_defaults_and_nothing_illegal() -> None:
    problem = _problem(cases.Case())
    target = by_name("cpu")
    for values in itertools.product(*blocked_cpu.SPACE.values()):
        config = Config.of(blocked_cpu.NAME, **dict(zip(blocked_cpu.SPACE, values, strict=True)))
        assert blocked_cpu.rejects(problem, target, config) is None
    default = blocked_cpu.default(problem, target)
    assert set(default) == set(blocked_cpu.SPACE)
    assert blocked_cpu.rejects(problem, by_name("sm_90"), default) is not None
    for name, bad in (("block_n", 0), ("num_kv_splits", 0), ("gather", "all")):
        assert name in str(blocked_cpu.rejects(problem, target, default.replace(**{name: bad})))


def _problem(case: cases.Case) -> Any:
    call = cases.build(case)
    return decode_inputs(call.q, call.kv_cache, **call.kwargs).problem


@pytest.mark.parametrize(
    "case",
    [
        cases.Case(lens=(190, 33, 0), q_len=3),
        cases.Case(lens=(150, 64), num_kv_splits=5, q_dtype="bf16", kv_dtype="fp8_e4m3"),
    ],
    ids=lambda c: c.id,
)
def test_the_same_inputs_give_the_same_bits(case: cases.Case) -> None:
    call = cases.build(case)
    first_out, first_lse = decode(call)
    for _ in range(4):
        out, lse = decode(call)
        assert torch.equal(out, first_out)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("q_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", [3, 16, 130])
def test_batch_invariant_bits_do_not_depend_on_neighbours(heads: int, q_dtype: str) -> None:
    """Each sequence alone, with its own narrow table, gives the bits that it gave among the others; ragged q too."""
    lens, q_lens = (200, 0, 65, 300, 1), (3, 1, 2, 4, 2)
    case = cases.Case(
        lens=lens, q_lens=q_lens, heads=heads, q_dtype=q_dtype, kv_dtype=q_dtype, batch_invariant=True, extra_pages=50
    )
    call = cases.build(case)
    out, lse = decode(call)
    cases.check(call, out, lse)
    first = 0
    for b, (n, q_len) in enumerate(zip(lens, q_lens, strict=True)):
        alone = call.changed(
            qo_indptr=torch.tensor([0, q_len], dtype=torch.int32),
            max_q_len=q_len,
            seq_lens=call.kwargs["seq_lens"][b : b + 1],
            block_table=call.kwargs["block_table"][b : b + 1, : -(-n // case.page) + 1],
        )
        own = slice(first, first + q_len)
        own_out, own_lse = mla_jit.decode(call.q[own], call.kv_cache, **alone.kwargs)
        assert torch.equal(own_out, out[own])
        assert torch.equal(own_lse, lse[own])
        first += q_len


def test_batch_invariant_refuses_other_blocks() -> None:
    problem = _problem(cases.Case(batch_invariant=True))
    default = blocked_cpu.default(problem, by_name("cpu"))
    reason = blocked_cpu.rejects(problem, by_name("cpu"), default.replace(block_n=32))
    assert reason is not None
    assert "batch_invariant" in reason
    other = dataclasses.replace(problem, batch=64, max_kv_len=1 << 17, q_len=9)
    assert blocked_cpu.default(other, by_name("cpu")) == default


@pytest.mark.parametrize("shape", ["batch", "q_len", "ragged"])
def test_an_empty_call_gives_empty_results(shape: str) -> None:
    if shape == "batch":
        call = cases.build(cases.Case(lens=()))
    elif shape == "q_len":
        call = cases.build(cases.Case(q_len=0, q_3d=False))
    else:
        call = cases.build(cases.Case(q_lens=(0, 0)))
    out, lse = decode(call)
    assert out.shape[-2:] == (4, 64)
    assert out.numel() == 0
    assert lse is not None
    assert lse.numel() == 0


@pytest.mark.parametrize("q_len", [1, 3])
def test_a_random_call_with_scales_is_right_by_every_way(q_len: int) -> None:
    """What the tuner and the reports time: one call, planned, by a shared list, and as a chunk of a prompt."""
    problem = DecodeProblem(
        num_heads=4, kv_lora_rank=256, rope_dim=32, kv_dtype="fp8_e4m3", layout="three", page_size=7, batch=3,
        q_len=q_len, max_kv_len=64,
    )  # fmt: skip
    call = trial.make_call(problem, "cpu")
    assert call.kv_cache[1].isnan().any()
    given = decode_inputs(call.q, call.kv_cache, **call.keywords).problem
    assert (given.layout, given.kv_dtype, given.rope_dtype) == ("three", "fp8_e4m3", "bf16")
    for run in (mla_jit.decode, mla_jit.prefill_paged):
        assert trial.judge(call, *run(call.q, call.kv_cache, **call.keywords)).ok
    plan = mla_jit.decode_plan(call.q, call.kv_cache, **call.keywords)
    assert trial.judge(call, *plan.run(call.q, call.kv_cache)).ok
    with pytest.raises(InvalidInput, match="differ from the plan's"):
        plan.run(call.q, (*call.kv_cache[:2], call.kv_cache[2].float()))
    metadata = mla_jit.decode_metadata(call.q, call.kv_cache, **call.keywords)
    assert trial.judge(call, *mla_jit.decode(call.q, call.kv_cache, metadata=metadata, **call.keywords)).ok


def test_a_cache_without_kpe_is_not_taken_for_its_latent() -> None:
    """Calls are remembered by what they pass: a latent alone, and the same one beside scales or beside nothing."""
    call = cases.build(cases.Case(**{**cases.SCALED, "R": 0}))
    latent, scales, _ = call.kv_cache
    out, lse = decode(call)
    cases.check(call, out, lse)
    plain, _ = mla_jit.decode(call.q, latent, **call.kwargs)
    assert not torch.equal(plain, out)
    with pytest.raises(InvalidInput, match="kv_scales is None"):
        mla_jit.decode(call.q, (latent, None, None), **call.kwargs)
    empty = latent.new_empty((*latent.shape[:-1], 0), dtype=torch.bfloat16)
    same, _ = mla_jit.decode(call.q, (latent, scales, empty), **call.kwargs)
    assert torch.equal(same, out)


def test_a_long_sequence_of_a_real_model() -> None:
    """128 heads over 576 elements and 5,000 tokens: fp32 keeps to 1e-5 through every tile."""
    case = cases.Case(heads=128, C=512, R=64, page=64, lens=(5000, 130), q_len=2)
    call = cases.build(case)
    figures = cases.check(call, *decode(call))
    assert figures.rel_l2 < 1e-5


def test_gradients_and_default_devices_are_left_alone() -> None:
    """q that asks for gradients is read as data; an ambient default dtype or device changes nothing."""
    call = cases.build(cases.Case())
    call.q.requires_grad_()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out, lse = decode(call)
    finally:
        torch.set_default_dtype(before)
    call.q.requires_grad_(False)
    assert not out.requires_grad
    cases.check(call, out, lse)
