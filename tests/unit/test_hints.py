"""Rows found by the host hints of a call: its longest length, its tokens, both, or neither; then `plan.choose`.

All rows are of one family, 16 heads and one query token, timed at even lengths and at ragged ones (total_kv set). The
times are made up; the configs are real ones of decode_splitk_triton that differ in their splits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import mla_jit
from mla_jit import plan, resources, settings, target
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.ops.decode import splitk
from mla_jit.ops.decode.inputs import decode_inputs
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import lookup, shipped, store
from mla_jit.tuning.rows import Trial

HERE = dataclasses.replace(target.targets()["sm_90"], device="Device 1")  # of which nothing is shipped
FAMILY = DecodeProblem(num_heads=16, batch=8, hinted=True)
BASE = splitk.default(FAMILY, HERE)

Case = tuple[int, int | None]  # the longest length, and the mean one of a ragged batch
Times = Mapping[Case, Mapping[int, float]]  # µs by case and splits

# Each case has a best config of its own. Without the ragged cases 4 splits have the best worst case, with them 8.
TIMES: Times = {
    (1024, None): {2: 10.0, 4: 11.0, 8: 12.0, 16: 20.0},
    (4096, None): {2: 25.0, 4: 20.0, 8: 23.0, 16: 24.0},
    (4096, 512): {2: 16.0, 4: 16.0, 8: 11.0, 16: 10.0},
    (16384, None): {2: 90.0, 4: 33.0, 8: 30.0, 16: 34.0, 32: 29.0},  # of 32 splits nothing else is known
    (16384, 2048): {2: 60.0, 4: 29.0, 8: 22.0, 16: 20.0},
}


def config(splits: int, **tunables: Any) -> Config:
    return BASE.replace(num_kv_splits=splits, **tunables)


def asked(kv: int, tokens: int | None = None, **fields: Any) -> DecodeProblem:
    """A call with hints: its longest length and, perhaps, its tokens."""
    return dataclasses.replace(FAMILY, max_kv_len=kv, total_kv=tokens, **fields)


def unhinted(capacity: int, **fields: Any) -> DecodeProblem:
    return dataclasses.replace(FAMILY, max_kv_len=capacity, hinted=False, **fields)


def rows(times: Times, *, row: Mapping[str, Any] | None = None, tunables: Mapping[str, Any] | None = None,
         **fields: Any) -> list[Trial]:  # fmt: skip
    """Trials of all cases; `row`: fields of the trials, `tunables` of the configs, the others of the problem."""
    batch = fields.get("batch", FAMILY.batch)
    usual = {"target": HERE.name, "device": HERE.device, "toolchain": triton.version(),
             "revision": splitk.DECODE_SPLITK_TRITON.revision}  # fmt: skip
    return [
        Trial(problem=asked(kv, mean and mean * batch, **fields), config=config(splits, **(tunables or {})),
              median_us=us, **{**usual, **(row or {})})
        for (kv, mean), column in times.items() for splits, us in column.items()
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's database, not made yet; nothing is shipped."""
    (tmp_path / "data" / "tuning_db").mkdir(parents=True)
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "data" / "package")
    with settings.scope(tuning_db=tmp_path / "tuning.db"):
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()


def fill(path: Path, trials: list[Trial]) -> None:
    with store.Store(path) as opened:
        opened.add(trials)


def ship(trials: list[Trial]) -> None:
    shipped.export(trials, resources.PACKAGE.parent / "tuning_db" / "device_1" / "decode.jsonl")
    lookup.forget()


def chosen(problem: DecodeProblem) -> tuple[int, str]:
    """(splits of the row, provenance) of the choice; 0 splits for the default. A neighbour's are then made to fit."""
    choice = plan.choose(problem, HERE)
    return 0 if choice.trial is None else choice.trial.config.int("num_kv_splits"), choice.provenance


def taken(choice: plan.Choice) -> Config:
    """The config of the row that a choice rests on."""
    assert choice.trial is not None
    return choice.trial.config


def worst(splits: int, capacity: int = 1 << 30) -> float:
    """The worst ratio of a config to the fastest, over the cases up to a capacity."""
    return max(column[splits] / min(column.values()) for (kv, _), column in TIMES.items() if kv <= capacity)


# ----------------------------------------------------------------------------------------------------------- the hints


def test_the_longest_length_is_known(database: Path) -> None:
    fill(database, rows(TIMES))
    assert [chosen(asked(kv)) for kv in (1024, 4096, 16384)] == [(2, "measured"), (4, "measured"), (32, "measured")]
    assert chosen(asked(3000)) == (4, "measured")  # the same bucket
    assert chosen(asked(2048))[1] == "neighbour"
    assert [chosen(asked(kv)) for kv in (512, 32768)] == [(0, "default")] * 2  # beyond what was measured


def test_the_longest_length_and_the_tokens_are_known(database: Path) -> None:
    fill(database, rows(TIMES))
    assert chosen(asked(4096, 8 * 512)) == (16, "measured")
    assert chosen(asked(4096, 8 * 400)) == (16, "measured")  # the same bucket of the mean
    assert chosen(asked(16384, 8 * 2048)) == (16, "measured")
    assert chosen(asked(4096, 8 * 4096)) == (4, "measured")  # all as long as the bound
    assert chosen(asked(4096, 8 * 9999)) == (4, "measured")  # no more than that
    near, far = plan.choose(asked(4096, 8 * 128), HERE), plan.choose(asked(4096, 8 * 2048), HERE)
    assert (taken(near), near.provenance) == (config(16), "neighbour")
    assert "mean length 512 for 128" in near.why
    assert (taken(far), far.provenance) == (config(4), "neighbour")  # an even batch is nearer than one of mean 512
    assert "mean length 4096 for 2048" in far.why


def test_an_even_batch_is_no_measurement_of_a_ragged_one_nor_the_other_way_round(database: Path) -> None:
    fill(database, rows({(4096, None): {4: 20.0}}))
    assert chosen(asked(4096, 8 * 512)) == (4, "neighbour")
    ragged = dataclasses.replace(FAMILY, num_heads=32)
    fill(database, rows({(4096, 512): {8: 20.0}}, num_heads=32))
    assert chosen(dataclasses.replace(ragged, max_kv_len=4096)) == (8, "neighbour")


def test_nothing_is_known_but_the_capacity(database: Path) -> None:
    fill(database, rows(TIMES))
    everywhere = (2, 4, 8, 16)
    for capacity in (131072, 16384, 4096):
        best = min(everywhere, key=lambda splits: worst(splits, capacity))
        assert chosen(unhinted(capacity)) == (best, "measured"), capacity
    assert [worst(splits) for splits in (8, 4)] == [1.2, 1.6]
    even = {case: column for case, column in TIMES.items() if case[1] is None}
    fill(database, rows(even, num_heads=32))
    assert chosen(unhinted(131072, num_heads=32)) == (4, "measured")
    why = plan.choose(unhinted(131072), HERE).why
    assert why.startswith("steady over kv 1024, 4096 (mean 512), 4096, 16384 (mean 2048), 16384; the user's ")


def test_the_distributions_of_one_length_are_cases_too(database: Path) -> None:
    fill(database, rows({case: column for case, column in TIMES.items() if case[0] == 4096}))
    # 2: 1.6, 4: 1.6, 8: 1.15, 16: 1.2 times the best at worst; the last two are alike, 16 the better in the mean
    assert chosen(unhinted(4096)) == chosen(unhinted(131072)) == (16, "measured")


def test_a_capacity_below_all_lengths_gets_the_default_one_beyond_them_the_worst_case(database: Path) -> None:
    fill(database, rows(TIMES))
    assert chosen(unhinted(512)) == (0, "default")
    assert chosen(unhinted(1 << 20)) == (8, "measured")


def test_one_length_measured_is_all_that_is_known_of_a_capacity(database: Path) -> None:
    fill(database, rows({(4096, None): TIMES[4096, None]}))
    assert chosen(unhinted(4096)) == (4, "measured")
    found = plan.choose(unhinted(131072), HERE)
    assert (taken(found), found.provenance) == (config(4), "neighbour")
    assert "kv 4096 for 131072" in found.why
    assert chosen(unhinted(2048)) == (0, "default")
    assert chosen(asked(131072)) == (0, "default")  # a length that is known is beyond what was measured


@pytest.mark.parametrize("hints", ["longest", "both", "neither"])
@pytest.mark.parametrize(("batch", "nearest"), [(8, 8), (20, 8), (24, 64), (64, 64), (65, None), (7, None)])
def test_a_batch_between_measured_ones(database: Path, hints: str, batch: int, nearest: int | None) -> None:
    """The nearer one as a ratio; none beyond them."""
    fill(database, rows(TIMES))
    swapped = {2: 16, 4: 8, 8: 4, 16: 2}  # so that the answers for the two batches differ
    fill(database, rows({c: {swapped.get(n, n): us for n, us in t.items()} for c, t in TIMES.items()}, batch=64))
    problem, small, large = {
        "longest": (asked(4096, batch=batch), 4, 8), "both": (asked(4096, batch * 512, batch=batch), 16, 2),
        "neither": (unhinted(131072, batch=batch), 8, 4),
    }[hints]  # fmt: skip
    provenance = "default" if nearest is None else "measured" if nearest == batch else "neighbour"
    assert chosen(problem) == ({8: small, 64: large, None: 0}[nearest], provenance)


# ---------------------------------------------------------------------------------------------------- whose, and when


def test_the_users_rows_then_the_shipped_then_a_neighbour_then_the_default(database: Path) -> None:
    problems = [asked(4096), asked(4096, 8 * 512), unhinted(131072)]
    assert [chosen(problem)[1] for problem in problems] == ["default"] * 3
    more = {case: {3: 12.0, 5: 9.0} for case in TIMES}
    ship(rows(more, batch=4) + rows(more, batch=16))
    assert [chosen(problem) for problem in problems] == [(5, "neighbour")] * 3
    ship(rows(more, batch=4) + rows(more, batch=16) + rows(more))
    assert [chosen(problem) for problem in problems] == [(5, "measured")] * 3
    fill(database, rows(TIMES))  # slower, but the user's
    assert [chosen(problem) for problem in problems] == [(4, "measured"), (16, "measured"), (8, "measured")]


def test_one_length_of_the_users_does_not_hide_the_shipped_worst_case(database: Path) -> None:
    ship(rows(TIMES))
    fill(database, rows({(1024, None): {2: 10.0}}))
    assert chosen(asked(1024)) == (2, "measured")
    assert chosen(unhinted(131072)) == (8, "measured")


def test_a_length_measured_at_this_batch_counts_more_than_the_worst_case_at_another(database: Path) -> None:
    fill(database, rows({(4096, None): {4: 20.0}}) + rows(TIMES, batch=16))
    assert chosen(unhinted(4096)) == (4, "measured")


def test_a_worst_case_that_rests_on_a_stale_row_is_stale(database: Path) -> None:
    old = {case: column for case, column in TIMES.items() if case[0] < 16384}
    new = {(16384, None): TIMES[16384, None]}
    fill(database, rows(old, row={"revision": 1}) + rows(new))
    choice = plan.choose(unhinted(131072), HERE)
    assert (choice.config, choice.provenance) == (config(8), "stale")
    assert "stale: revision 1, now " in choice.why
    assert chosen(asked(16384)) == (32, "measured")
    fill(database, rows(old))  # measured again
    assert chosen(unhinted(131072)) == (8, "measured")


def test_what_is_predicted_stays_so_when_it_is_stale(database: Path) -> None:
    fill(database, rows(TIMES, row={"provenance": "predicted", "toolchain": "triton 0.0"}))
    assert [chosen(asked(4096)), chosen(unhinted(131072))] == [(4, "predicted"), (8, "predicted")]


def test_rows_that_are_illegal_here_give_way_to_the_next_batch_and_then_to_the_default(database: Path) -> None:
    """Of tiles that are copied whole pages of 64 tokens are wanted; a call with pages of 16 cannot have them."""
    here = {"page_size": 16}
    fill(database, rows(TIMES) + rows(TIMES, tunables={"tma": False, "block_n": 16}, batch=16))
    fill(database, rows(TIMES, tunables={"tma": False, "block_n": 16}, batch=4))
    assert BASE["tma"]
    assert splitk.rejects(asked(4096, **here), HERE, config(4)) is not None
    found = plan.choose(unhinted(131072, **here), HERE)
    assert (taken(found), found.provenance) == (config(8, tma=False, block_n=16), "neighbour")
    assert "page_size 64 for 16" in found.why
    assert taken(plan.choose(asked(4096, **here), HERE)) == config(4, tma=False, block_n=16)
    assert chosen(unhinted(131072, page_size=16, num_heads=32)) == (0, "default")


@pytest.mark.parametrize("other", [
    {"q_dtype": "fp16", "kv_dtype": "fp16"}, {"kv_dtype": "fp8_e4m3"}, {"out_dtype": "fp32"}, {"layout": "split"},
    {"kv_lora_rank": 256}, {"rope_dim": 0}, {"num_kv_heads": 2}, {"context_parallel": True}, {"batch_invariant": True},
], ids=lambda other: next(iter(other)))  # fmt: skip
def test_nothing_crosses_dtypes_or_layouts(database: Path, other: dict[str, Any]) -> None:
    fill(database, rows(TIMES))
    for problem in (asked(4096), asked(4096, 8 * 512), unhinted(131072)):
        assert chosen(problem)[1] == "measured"
        assert chosen(dataclasses.replace(problem, **other))[1] == "default"


# -------------------------------------------------------------------------------------------------- from a real call


@pytest.mark.parametrize(("hints", "splits"), [
    ({"max_kv_len": 4000}, 4), ({"max_kv_len": 4000, "total_kv": 8 * 500}, 16), ({}, 8),
], ids=["longest", "both", "neither"])  # fmt: skip
def test_a_calls_hints_are_the_problems(database: Path, hints: dict[str, int], splits: int) -> None:
    fill(database, rows(TIMES))
    pages = 32768 // 64
    inputs = decode_inputs(
        torch.empty(8, 16, 576, dtype=torch.bfloat16), torch.empty(pages, 64, 576, dtype=torch.bfloat16),
        kv_lora_rank=512, sm_scale=0.1, block_table=torch.zeros(8, pages, dtype=torch.int32),
        seq_lens=torch.ones(8, dtype=torch.int32), **hints,
    )  # fmt: skip
    choice = plan.choose(inputs.problem, HERE)
    assert (choice.config, choice.provenance) == (config(splits), "measured")
