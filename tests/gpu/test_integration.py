"""The real models of tests/integration on a GPU, in bf16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from integration import tiny

import mla_jit

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", tiny.MODELS)
def test_bf16_is_as_exact_as_the_model_itself(name: str) -> None:
    """Along the fp32 model's tokens: the errors of our logits, beside those of the bf16 model's own attention."""
    ours, own = tiny.errors_in_bf16(name, "cuda")
    assert mla_jit.last_dispatch().problem.q_dtype == "bf16"
    assert ours.mean() <= 1.1 * own.mean()
    assert ours.max() <= 1.5 * own.max()
    assert ours.max() < 0.06  # 0.03 on the cpu
