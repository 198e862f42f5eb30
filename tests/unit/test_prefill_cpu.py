"""The cpu target through the public `prefill`, the reference against torch's own attention, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import prefill_cases as cases
import pytest
import torch

import mla_jit
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.ops.prefill import blocked_cpu
from mla_jit.ops.prefill.inputs import prefill_inputs
from mla_jit.target import by_name


def prefill(call: cases.Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The public function's (out, lse); lse is None where the case does not want it."""
    result = mla_jit.prefill(call.q, call.k, call.v, **call.kwargs)
    return result if call.case.lse else (result, None)


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_case(case: cases.Case) -> None:
    call = cases.build(case)
    out, lse = prefill(call)
    cases.check(call, out, lse)
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.variant == "prefill_blocked_cpu"
    for name, result in (("out", out), ("lse", lse)):
        assert name not in call.kwargs or call.kwargs[name] is result


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
def test_the_reference_is_torchs_attention(causal: bool, heads: int, kv_heads: int) -> None:
    """Where both are defined: torch's is_causal is aligned to the top left, so lengths are equal there."""
    q_lens, kv_lens = (17, 30), (17, 30) if causal else (40, 5)
    case = cases.Case(heads=heads, kv_heads=kv_heads, q_lens=q_lens, kv_lens=kv_lens, causal=causal)
    call = cases.build(case)
    out, _ = call.expected()
    q0 = k0 = case.lead
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        q, k, v = (
            x.double().transpose(0, 1)[None]
            for x in (call.q[q0 : q0 + q_len], call.k[k0 : k0 + kv_len], call.v[k0 : k0 + kv_len])
        )
        want = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=call.kwargs["sm_scale"], enable_gqa=True
        )
        assert torch.allclose(out[q0 : q0 + q_len], want[0].transpose(0, 1), rtol=1e-9, atol=1e-12)
        q0, k0 = q0 + q_len, k0 + kv_len


def test_a_prompt_in_chunks_is_the_prompt() -> None:
    """Each chunk of queries over all keys before its end gives those rows of the whole: the mask ends bottom right."""
    call = cases.build(cases.Case(q_lens=(90,), tail=0))
    whole, whole_lse = call.expected()
    for start, end in ((0, 31), (31, 32), (32, 90)):
        out, lse = mla_jit.prefill(
            call.q[start:end], call.k[:end], call.v[:end], qo_indptr=torch.tensor([0, end - start]),
            kv_indptr=torch.tensor([0, end]), max_q_len=end - start, sm_scale=call.kwargs["sm_scale"], return_lse=True,
        )  # fmt: skip
        assert torch.allclose(out.double(), whole[start:end], atol=1e-5)
        assert torch.allclose(lse.double(), whole_lse[start:end], atol=1e-5)


SWEPT = (
    cases.Case(q_lens=(90, 1, 0), kv_lens=(120, 33, 7), heads=6, kv_heads=3),
    cases.Case(q_lens=(70,), kv_lens=(20,), causal=False),
)


@pytest.mark.parametrize("case", SWEPT, ids=lambda c: c.id)
def test_every_tunable_gives_the_same_mathematics(case: cases.Case) -> None:
    call = cases.build(case)
    for values in itertools.product(*blocked_cpu.SPACE.values()):
        config = Config.of(blocked_cpu.NAME, **dict(zip(blocked_cpu.SPACE, values, strict=True)))
        out = torch.full((*call.q.shape[:2], case.DV), float("nan"))
        lse = torch.full(call.q.shape[:2], float("nan"))
        inputs = prefill_inputs(call.q, call.k, call.v, **call.kwargs, out=out, lse=lse)
        assert blocked_cpu.rejects(inputs.problem, by_name("cpu"), config) is None
        blocked_cpu.run(inputs.problem, config, inputs)
        cases.check(call, out, lse)
        assert bool(out[~call.owned].isnan().all())  # rows of nobody are not written


def test_the_same_inputs_give_the_same_bits() -> None:
    call = cases.build(cases.Case(q_lens=(90, 33), kv_lens=(120, 33)))
    first, first_lse = prefill(call)
    for _ in range(3):
        out, lse = prefill(call)
        assert torch.equal(out[call.owned], first[call.owned])
        assert torch.equal(lse[call.owned], first_lse[call.owned])  # type: ignore[index]


@pytest.mark.parametrize("q_lens", [(), (0, 0)])
def test_an_empty_call_gives_an_empty_result(q_lens: tuple[int, ...]) -> None:
    call = cases.build(cases.Case(q_lens=q_lens, kv_lens=tuple(5 for _ in q_lens), tail=0))
    out, lse = prefill(call)
    assert out.shape == (0, 2, 32)
    assert lse is not None
    assert lse.shape == (0, 2)


def _arguments() -> dict[str, Any]:
    call = cases.build(cases.Case())
    return {"q": call.q, "k": call.k, "v": call.v, **call.kwargs}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "q of two dimensions": ({"q": torch.zeros(5, 48)}, r"q has shape \(5, 48\); it must be \[T, H, qk_dim\]"),
    "qk_dim": ({"k": torch.zeros(60, 2, 40)}, "q has 48 elements a head, k 40"),
    "tokens": ({"v": torch.zeros(61, 2, 32)}, "their tokens and heads must be the same"),
    "k and v": ({"v": torch.zeros(60, 2, 32, dtype=torch.float16)}, "k is torch.float32, v is torch.float16"),
    "heads": ({"q": torch.zeros(60, 3, 48)}, "3 query heads cannot be shared by 2 KV heads"),
    "stride": ({"q": torch.zeros(48, 2, 60).transpose(0, 2)}, "stride .* in its last dimension"),
    "scale": ({"sm_scale": 0.0}, "sm_scale is 0.0; it must be a positive float"),
    "cap": ({"logit_cap": -1.0}, "logit_cap is -1.0"),
    "base": ({"lse_base": "10"}, "lse_base is '10'"),
    "indptr's dtype": ({"qo_indptr": torch.zeros(3)}, "qo_indptr has dtype torch.float32"),
    "batches": ({"kv_indptr": torch.zeros(5, dtype=torch.int32)}, "kv_indptr has 5 entries, qo_indptr 3"),
    "no batch": ({"qo_indptr": torch.zeros(0, dtype=torch.int32)}, "qo_indptr is empty"),
    "max_q_len": ({"max_q_len": -1}, "max_q_len is -1"),
    "max_kv_len": ({"max_kv_len": -1}, "max_kv_len is -1"),
    "out": ({"out": torch.zeros(60, 2, 31)}, r"out has shape \(60, 2, 31\)"),
    "out_dtype": ({"out": torch.zeros(60, 2, 32), "out_dtype": torch.float16}, "out_dtype asks for torch.float16"),
    "lse": ({"lse": torch.zeros(60, 2, dtype=torch.float64)}, "lse is torch.float64"),
    "k_scale": ({"k_scale": torch.ones(2)}, "k_scale"),
    "scheduler": ({"scheduler": "split"}, "use auto, tiles, persistent"),
    "dtype": ({"q": torch.zeros(60, 2, 48, dtype=torch.int8)}, "q has dtype torch.int8"),
    "no tensor": ({"q": None}, "must be tensors"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str) -> None:
    change, message = WRONG[what]
    with pytest.raises(InvalidInput, match=message):
        mla_jit.prefill(**{**_arguments(), **change})
