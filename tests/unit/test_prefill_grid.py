"""`mla-tune bench --grid prefill` without a GPU: its shapes, what it checks, and what it makes of the times."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from helpers import invoke, invoke_json

import mla_jit
from mla_jit.errors import MlaJitError
from mla_jit.tuning import prefill_grid
from mla_jit.tuning.prefill_grid import EQUAL, GRID, UNEVEN, Measured, Prompt

SMALL = Prompt((40, 7, 70), 2, True)


def test_the_shapes() -> None:
    assert len(GRID) == 10
    assert str(GRID[0]) == "1 × 8192 × 128 heads, causal"
    assert GRID[1].flops == 2 * GRID[0].flops == 2 * 320 * 128 * 8192**2
    assert all(shape.even for shape in (*GRID, EQUAL))
    assert not UNEVEN.even
    assert min(UNEVEN.lens) >= 64
    assert max(UNEVEN.lens) <= 16384
    assert EQUAL.flops == pytest.approx(UNEVEN.flops, rel=1e-3)


def small(causal: bool = True) -> tuple[Prompt, list[torch.Tensor]]:
    shape = dataclasses.replace(SMALL, causal=causal)
    made = torch.Generator().manual_seed(0)
    tokens = sum(shape.lens)
    q, k = (torch.randn(tokens, 2, 192, generator=made, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(tokens, 2, 128, generator=made, dtype=torch.bfloat16)
    starts = torch.tensor([0, 40, 47, 117], dtype=torch.int32)
    out = mla_jit.prefill(
        q, k, v, qo_indptr=starts, kv_indptr=starts, max_q_len=70, sm_scale=0.07, causal=causal
    )  # fmt: skip
    return shape, [q, k, v, out]


@pytest.mark.parametrize("causal", [True, False])
def test_sampled_rows_are_held_against_float64(causal: bool) -> None:
    shape, tensors = small(causal)
    assert prefill_grid.worst_error(shape, *tensors, 0.07, random.Random(0)) < 6e-3
    other = dataclasses.replace(shape, causal=not causal)
    assert prefill_grid.worst_error(other, *tensors, 0.07, random.Random(0)) > 0.1
    tensors[3][-1, 0, 0] = float("nan")
    assert prefill_grid.worst_error(shape, *tensors, 0.07, random.Random(0)) == float("inf")


def test_one_run_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(prefill_grid, "_alternated", lambda calls, rounds: asked.append(set(calls)) or {"mla_jit": 5.0})
    found = prefill_grid.measured(SMALL, 0, "cpu")
    assert (found.times_us, found.variant) == ({"mla_jit": 5.0}, "prefill_blocked_cpu")
    assert found.provenance == "default"
    assert 0 < found.error < 6e-3
    assert asked == [{"mla_jit", "tiles", "persistent", "fp8"}]  # no peer takes uneven lengths
    monkeypatch.setattr(prefill_grid, "worst_error", lambda *a: 0.5)
    with pytest.raises(MlaJitError, match=r"wrong on 3 × 40 × 2 heads, causal, fp8_e4m3: relative L2 error 5\.00e-01"):
        prefill_grid.measured(SMALL, 0, "cpu")


def test_what_it_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(shape: Prompt, seed: int, device: str) -> Measured:
        us = {EQUAL: 4000.0, UNEVEN: 5000.0}.get(shape, 1000.0) + seed
        peer = {"cudnn": 900.0 + seed} if shape.even and shape is not EQUAL else {}
        ours = {"mla_jit": us, "tiles": us, "persistent": 0.8 * us, "fp8": us / 1.1}
        return Measured({**ours, **peer}, 1e-3 * (seed + 1), "prefill_x", "measured")

    monkeypatch.setattr(prefill_grid, "measured", fake)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    data = invoke_json("bench", "--grid", "prefill", code=1)
    assert len(data["rows"]) == 12
    row = data["rows"][0]
    assert (row["ours_us"], row["low_us"], row["high_us"], row["cudnn_us"]) == (1001.0, 1000.0, 1002.0, 901.0)
    assert (row["score"], row["error"], row["variant"]) == (901 / 1001, 3e-3, "prefill_x")
    assert row["provenance"] == "measured"
    assert row["tflops"] == pytest.approx(GRID[0].flops / 1001 * 1e-6)
    assert data["rows"][-1]["cudnn_us"] is None
    assert data["least"] == pytest.approx(901 / 1001)
    assert data["uneven"] == pytest.approx(4001 / 5001, rel=1e-3)
    assert data["missed"] == ["uneven", "fp8"]
    assert (row["tiles_us"], row["persistent_us"]) == (1001.0, 0.8 * 1001.0)
    assert (data["listed"], data["fp8"]) == (pytest.approx(1.25), pytest.approx(1.1))
    text = invoke("bench", "--grid", "prefill", "--runs", "1", code=1)
    assert "least cuDNN / ours: 0.900 (aim: at least 0.8)" in text
    assert "rate on uneven prompts / on equal ones of the same work: 0.800 (aim: at least 0.9), MISSED" in text
