"""`mla_jit.autotune` on GPUs: a call, a capture and a device of any number, tuned by workers beside this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mla_jit
from mla_jit import plan, settings, target, trial
from mla_jit.errors import CacheMiss
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import auto, store

pytestmark = pytest.mark.gpu
# One piece a sequence: a small space, so that a search ends within its budget.
PROBLEM = DecodeProblem(num_heads=16, batch=2, max_kv_len=1024, lse=True, num_kv_splits=1, hinted=True)
BUDGET_S = 90.0


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> Iterator[Path]:
    with settings.scope(tuning_db=tmp_path / "tuning.db", shipped_db=False):
        mla_jit.reload()
        yield tmp_path / "tuning.db"
    mla_jit.reload()
    assert plan.on_miss is None


def made(problem: DecodeProblem, device: str = "cuda") -> tuple[trial.Call, dict[str, Any]]:
    call = trial.make_call(problem, device)
    hint = {"max_kv_len": problem.max_kv_len} if problem.hinted else {}
    return call, {**call.keywords, **hint, "num_kv_splits": problem.num_kv_splits}


def served(problem: DecodeProblem, device: str = "cuda") -> plan.Dispatch:
    """What served a call of the problem; its result is judged."""
    call, keywords = made(problem, device)
    out, lse = mla_jit.decode(call.q, call.kv_cache, **keywords)
    judged = trial.judge(call, out, lse)
    assert judged.ok, judged
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    assert dispatch.problem == problem
    return dispatch


def lengths(path: Path) -> set[int]:
    with store.Store(path, readonly=True) as opened:
        return {t.problem.max_kv_len for t in opened.trials(status="ok")}


def test_a_strict_process_is_tuned_at_its_first_call(database: Path) -> None:
    with settings.scope(mode="strict"), mla_jit.autotune(BUDGET_S):
        tuned = served(PROBLEM)
        assert set(tuned.origins) <= {"disk", "memory"}
        assert served(PROBLEM) is tuned
    assert tuned.provenance == "measured"
    assert lengths(database) == {1024}
    assert served(dataclasses.replace(PROBLEM, batch=3)).provenance == "default"


def test_without_hints_several_lengths_are_tuned(database: Path) -> None:
    with mla_jit.autotune(2 * BUDGET_S):
        dispatch = served(dataclasses.replace(PROBLEM, max_kv_len=16384, hinted=False))
    assert dispatch.provenance == "measured"
    assert dispatch.why.startswith("steady over kv 1024, 8192, 16384; ")
    assert lengths(database) == {1024, 8192, 16384}


def test_an_untuned_call_is_refused_under_capture_and_captured_once_tuned(database: Path) -> None:
    call, keywords = made(PROBLEM)
    count = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    refused, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with mla_jit.autotune(BUDGET_S):
        with torch.cuda.graph(refused):
            with pytest.raises(CacheMiss, match=r"is not tuned, .* under graph capture; call it once"):
                mla_jit.decode(call.q, call.kv_cache, **keywords)
            count += 1
        assert not database.exists()
        refused.replay()
        assert count.item() == 1  # the capture went on
        want, want_lse = (t.clone() for t in mla_jit.decode(call.q, call.kv_cache, **keywords))
        assert mla_jit.last_dispatch().provenance == "measured"  # type: ignore[union-attr]
        with torch.cuda.graph(graph):
            out, lse = mla_jit.decode(call.q, call.kv_cache, **keywords)
    out.fill_(torch.nan)
    graph.replay()
    assert trial.judge(call, out, lse).ok
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_every_device_is_measured_where_it_is(index: int, database: Path) -> None:
    with torch.cuda.device(index), mla_jit.autotune(BUDGET_S):
        assert auto._device_of(target.of_device("cuda", index)) == f"cuda:{index}"
        assert served(PROBLEM, f"cuda:{index}").provenance == "measured"
    assert lengths(database) == {1024}
