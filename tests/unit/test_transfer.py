"""Which of the rows measured at other sizes serves a shape that nobody measured."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mla_jit import ops, plan, target
from mla_jit.config import Config
from mla_jit.ops.decode import gluon, splitk
from mla_jit.problem import DecodeProblem
from mla_jit.tuning.rows import Trial
from mla_jit.tuning.transfer import transfer

HOPPER = target.by_name("sm_90")
ROWS = {variant.name: variant for variant in ops.variants("decode")}
# An operand that the PTX kernels refuse: Triton's is the default, and Gluon's is legal.
ASKED = DecodeProblem(num_heads=32, batch=8, max_kv_len=1024, hinted=True, misaligned=("q",))
TRITON, GLUON = splitk.default(ASKED, HOPPER), gluon.default(ASKED, HOPPER)
NEAR = dataclasses.replace(ASKED, batch=4)


def default_of(problem: DecodeProblem) -> Config:
    return plan.analytic(problem, HOPPER).config


def trial(config: Config, us: float, problem: DecodeProblem = NEAR, **more: Any) -> Trial:
    return Trial(problem=problem, config=config, target=HOPPER.name, device=HOPPER.device, revision=2, median_us=us,
                 **more)  # fmt: skip


def chosen(*near: tuple[Trial, float], asked: DecodeProblem = ASKED, illegal: str = "") -> tuple[Config, Trial | None]:
    def legal(config: Config) -> str | None:
        if config.variant == illegal:
            return "no"
        return ROWS[config.variant].rejects(asked, HOPPER, config)

    return transfer(asked, HOPPER, ROWS, legal, default_of(asked), default_of, near)


def test_the_default_here_is_the_triton_kernel() -> None:
    assert default_of(ASKED) == TRITON


def test_a_kernel_that_was_much_faster_near_by_is_taken() -> None:
    row = trial(GLUON, 10.0, default_us=20.0)
    config, found = chosen((row, 1.0))
    assert (config.variant, found) == (gluon.NAME, row)
    assert config == gluon.DECODE_SPLITK_GLUON.resize(NEAR, ASKED, HOPPER, GLUON)


@pytest.mark.parametrize("us", [20.0, 40.0], ids=["as fast", "slower"])
def test_one_that_was_not_is_not(us: float) -> None:
    assert chosen((trial(GLUON, us, default_us=20.0), 1.0)) == (TRITON, None)


def test_what_is_nearer_counts_more() -> None:
    fast, slow = trial(GLUON, 10.0, default_us=20.0), trial(GLUON, 60.0, default_us=20.0)
    assert chosen((fast, 0.5), (slow, 6.0))[1] == fast
    assert chosen((slow, 0.5), (fast, 6.0)) == (TRITON, None)


def test_a_cut_that_leaves_half_of_the_device_idle_is_none_for_these_sizes() -> None:
    """With the default's kernel: how fast one split was of 256 sequences says nothing of one split of 8."""
    many = dataclasses.replace(ASKED, batch=256)
    one = splitk.default(many, HOPPER)
    assert one.int("num_kv_splits") == 1
    config, found = chosen((trial(one, 10.0, many, default_us=20.0), 5.0))
    assert (config, found) == (TRITON, None)


def test_what_is_illegal_for_the_problem_is_passed_over() -> None:
    row, other = trial(GLUON, 10.0, default_us=20.0), trial(TRITON.replace(block_n=32, num_warps=4), 18.0)
    config, found = chosen((row, 1.0), (other, 2.0), illegal=gluon.NAME)
    assert config.variant == splitk.NAME
    assert found in (None, other)


def test_of_a_capacity_the_measured_lengths_count() -> None:
    """The default's splits are for the capacity; the worst of the lengths measured decides."""
    capacity = dataclasses.replace(ASKED, max_kv_len=131072, hinted=False)
    assert default_of(capacity).variant == gluon.NAME
    lengths = [dataclasses.replace(NEAR, max_kv_len=kv) for kv in (256, 1024)]
    few = TRITON.replace(num_kv_splits=4)
    near = [(trial(few, 8.0, problem, default_us=16.0), 1.0) for problem in lengths]
    config, found = chosen(*near, asked=capacity)
    assert found is not None
    assert config.variant == splitk.NAME
    assert config.int("num_kv_splits") <= 4
