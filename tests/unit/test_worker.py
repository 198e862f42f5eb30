"""Workers and candidates of every kind: each comes back under its status, the pool goes on, nothing is left running."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import children

from mla_jit.config import Config
from mla_jit.errors import InvalidInput, MlaJitError
from mla_jit.ops.decode.blocked_cpu import DECODE_BLOCKED_CPU
from mla_jit.ops.decode.splitk import DECODE_SPLITK_TRITON
from mla_jit.problem import DecodeProblem
from mla_jit.target import by_name
from mla_jit.tuning import candidate, stand, worker
from mla_jit.tuning.candidate import run_candidate
from mla_jit.tuning.pool import Pool
from mla_jit.tuning.rows import FAULTS, Measurement

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SMALL = DecodeProblem(num_heads=4, kv_lora_rank=32, rope_dim=16, page_size=8, batch=3, max_kv_len=40, lse=True)
TIMER = "worker_faults:timer"

pytestmark = pytest.mark.usefixtures("cache_dir")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What candidates write when they run; workers find the planted ones."""
    path = tmp_path / "log"
    path.touch()
    monkeypatch.setenv("WORKER_LOG", str(path))
    monkeypatch.syspath_prepend(str(HERE))
    return path


@pytest.fixture
def fake(log: Path) -> Iterator[Callable[..., Pool]]:
    """Makes pools of fake devices; afterwards none of their workers may be there."""
    pools: list[Pool] = []

    def make(*devices: str, **more: object) -> Pool:
        pools.append(Pool(devices or ("null:0",), **{"target": "sm_90", "timer": TIMER, **more}))  # type: ignore[arg-type]
        return pools[-1]

    before = children()
    yield make
    for pool in pools:
        pool.close()
    assert children() <= before


def planted(does: str, tag: int = 0) -> Config:
    return Config.of("planted", does=does, tag=tag)


def patience(does: str) -> float:
    return 1.0 if "loop" in does else 30.0


def lines(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------- the data


def test_a_measurement_survives_json() -> None:
    ok = Measurement("ok", 12.5, 0.25, 2e-3, 128, 0, 65536, "0123456789abcdef")
    for m in (ok, Measurement("nan", note="NaN in the output", source_hash="0")):
        assert Measurement.from_json(m.to_json()) == m
    assert "\n" not in ok.to_json()
    for status in FAULTS:
        assert Measurement(status).median_us is None


@pytest.mark.parametrize("text", [
    "", "[1]", '{"status": "fine"}', '{"status": "ok"}', '{"status": "nan", "median_us": 1}',
    '{"status": "nan", "hue": 1}',
])  # fmt: skip
def test_what_is_no_measurement_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        Measurement.from_json(text)


def test_lengths_meet_the_edges_of_pages_and_the_bound() -> None:
    for batch, longest, page in ((1, 4096, 64), (3, 4096, 64), (64, 131072, 64), (4, 100, 1), (2, 5, 64)):
        problem = dataclasses.replace(SMALL, batch=batch, max_kv_len=longest, page_size=page)
        cases = stand.lengths(problem, 1 << 18)
        every = [n for case in cases for n in case]
        assert {min(n, longest) for n in (1, page, page + 1, longest)} <= set(every)
        assert max(every) <= longest
        assert (min(every) == 0) == (batch > 1)
        assert all(len(case) == batch for case in cases)
        assert len({tuple(case) for case in cases}) == len(cases) or longest == 5
        assert all(sum(case) <= longest + 2 * (1 << 18) for case in cases)
        assert cases == stand.lengths(problem, 1 << 18)


def test_timed_lengths_are_mixed_as_the_problem_says() -> None:
    many = dataclasses.replace(SMALL, batch=64, max_kv_len=4096, total_kv=64 * 2048, mix="uniform")
    found = sorted(stand.timed_lengths(many))
    assert (found[0], found[-1], sum(found)) == (32, 4064, 64 * 2048)  # the middles of 64 parts
    assert {b - a for a, b in itertools.pairwise(found)} == {64}
    short, long = (sorted(stand.timed_lengths(dataclasses.replace(many, total_kv=64 * n))) for n in (512, 3072))
    assert (short[0], short[-1], long[0], long[-1]) == (8, 1016, 2064, 4080)
    assert stand.timed_lengths(many) != found  # in a random order, the same each time
    assert stand.timed_lengths(many) == stand.timed_lengths(many)
    one = dataclasses.replace(many, total_kv=4096 + 63 * 128, mix="one-long")
    assert sorted(stand.timed_lengths(one)) == [128] * 63 + [4096]
    assert sorted(stand.timed_lengths(dataclasses.replace(one, total_kv=80))) == [1] * 63 + [17]
    for mix in ("uniform", "one-long"):
        assert stand.timed_lengths(dataclasses.replace(SMALL, mix=mix)) == [40, 40, 40]
        assert stand.timed_lengths(dataclasses.replace(SMALL, mix=mix, batch=1, total_kv=20)) == [20]


def test_timed_lengths_are_the_bound_or_spread_up_to_it() -> None:
    assert stand.timed_lengths(SMALL) == [40, 40, 40]
    assert stand.timed_lengths(dataclasses.replace(SMALL, total_kv=64)) == [17, 7, 40]
    assert stand.timed_lengths(dataclasses.replace(SMALL, total_kv=20)) == [7, 7, 6]
    many = dataclasses.replace(SMALL, batch=64, max_kv_len=32768, total_kv=524288)
    found = stand.timed_lengths(many)
    assert max(found) == 32768
    assert sum(found) == pytest.approx(524288, rel=0.001)
    ordered = sorted(found)
    ratios = [b / a for a, b in itertools.pairwise(ordered)]
    assert max(ratios) / min(ratios) < 1.01  # log-uniform
    assert found != ordered
    assert stand.timed_lengths(dataclasses.replace(SMALL, total_kv=1024)) == [40, 40, 40]
    assert stand.timed_lengths(dataclasses.replace(SMALL, total_kv=0)) == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------ in this process

FORMS: dict[str, dict[str, object]] = {
    "plain": {}, "no LSE": {"lse": False}, "one sequence": {"batch": 1}, "short": {"batch": 1, "max_kv_len": 3},
    "csr": {"paging": "csr", "has_lens": False}, "csr, lengths": {"paging": "csr"},
    "csr, page 1": {"paging": "csr", "has_lens": False, "page_size": 1}, "ragged": {"ragged": True, "q_len": 2},
    "three tokens": {"q_len": 3}, "two KV heads": {"num_kv_heads": 2}, "split cache": {"layout": "split"},
    "split q": {"q_split": True}, "sinks, cap": {"sinks": True, "soft_cap": True}, "no rope": {"rope_dim": 0},
    "fp8 cache, scales": {"kv_dtype": "fp8_e4m3", "q_scale": True, "kv_scale": True},
    "fp8": {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3"}, "fnuz": {"kv_dtype": "fp8_e4m3fnuz"},
    "scales in the cache": {"layout": "three", "kv_dtype": "fp8_e4m3", "kv_lora_rank": 256, "num_kv_heads": 2},
    "fnuz, scales in the cache": {"layout": "three", "kv_dtype": "fp8_e4m3fnuz", "kv_lora_rank": 128, "rope_dim": 0},
    "fp32": {"q_dtype": "fp32", "kv_dtype": "fp32", "out_dtype": "fp32"},
    "context parallel": {"context_parallel": True, "q_len": 2},
    "int64": {"paging": "csr", "ragged": True, "index64": ("table", "lens", "kv_indptr", "qo_indptr")},
    "hints": {"total_kv": 64, "num_kv_splits": 3}, "misaligned": {"misaligned": ("kv",), "flat_pages": False},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_call_of_every_form_is_checked_and_timed(form: str) -> None:
    problem = dataclasses.replace(SMALL, **FORMS[form])  # type: ignore[arg-type]
    config = DECODE_BLOCKED_CPU.default(problem, by_name("cpu"))
    phases: list[str] = []
    found = run_candidate(problem, config, "cpu", 2, 0.1, say=lambda phase, **known: phases.append(phase))
    assert found.status == "ok", found.note
    assert phases == ["compiling", "preparing", "checking", "timing"]
    assert found.rel_l2 is not None
    assert 0 < found.rel_l2 < 2.5e-2


def test_what_was_right_is_not_checked_again_for_a_longer_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what was wrong taken for right; another config of the problem is checked, and so are other sizes."""
    checked: list[object] = []
    check = candidate.DecodeStand.check
    answers = {"wrong": candidate.Fault("wrong", "planted")}

    def spy(stand: candidate.DecodeStand, run: Any) -> float:
        checked.append(run.executable.config)
        if answers:
            raise answers.popitem()[1]
        return check(stand, run)

    monkeypatch.setattr(candidate.DecodeStand, "check", spy)
    problem = dataclasses.replace(SMALL, batch=3)
    config = DECODE_BLOCKED_CPU.default(problem, by_name("cpu"))
    other = config.replace(num_kv_splits=config.int("num_kv_splits") + 1)
    found = [run_candidate(problem, c, "cpu", 2, 0.1) for c in (config, config, config, other, other)]
    assert [m.status for m in found] == ["wrong", "ok", "ok", "ok", "ok"]
    assert checked == [config, config, other]
    assert found[1].rel_l2 == found[2].rel_l2 is not None
    run_candidate(dataclasses.replace(problem, batch=2), config, "cpu", 2, 0.1)
    assert checked == [config, config, other, config]


@pytest.mark.parametrize(("changes", "config", "reason"), [
    ({}, Config.of("decode_blocked_cpu", block_m=16, block_n=0, num_kv_splits=1, gather="tile"), "block_n is 0"),
    ({}, Config.of("no_such", block_m=16), "no variant of decode"),
    ({}, DECODE_SPLITK_TRITON.default(SMALL, by_name("sm_90")), "Triton has no backend for cpu"),
    ({"batch": 0}, DECODE_BLOCKED_CPU.default(SMALL, by_name("cpu")), "nothing to compute"),
])  # fmt: skip
def test_an_illegal_candidate_is_not_built(changes: dict[str, object], config: Config, reason: str) -> None:
    problem = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    phases: list[str] = []
    found = run_candidate(problem, config, "cpu", 2, 0.1, say=lambda phase, **known: phases.append(phase))
    assert (found.status, found.median_us, phases) == ("illegal", None, [])
    assert reason in found.note


@pytest.mark.parametrize("status", ["wrong", ""])
def test_what_a_faulty_candidate_held_is_gone_with_it(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at some later collection: a graph that is destroyed while the next one is captured ends that one's."""

    class Graph:
        pass

    held: list[weakref.ref[Graph]] = []

    def figures(*_: Any) -> None:
        graph = Graph()
        held.append(weakref.ref(graph))
        try:
            raise ValueError("first")
        except ValueError:
            raise (stand.Fault(status, "off") if status else RuntimeError("off"))  # noqa: B904

    monkeypatch.setattr(candidate, "_figures", figures)
    gc.disable()
    try:
        found = run_candidate(SMALL, DECODE_BLOCKED_CPU.default(SMALL, by_name("cpu")), "cpu", 2, 0.1)
        gone = held[0]() is None
    finally:
        gc.enable()
    assert found.status == (status or "error")
    assert gone


def test_a_stop_by_the_user_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(candidate.plan, "make", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_candidate(SMALL, DECODE_BLOCKED_CPU.default(SMALL, by_name("cpu")), "cpu", 2, 0.1)


# -------------------------------------------------------------------------------------------------------------- the cpu


def test_the_cpu_is_really_timed() -> None:
    problem = dataclasses.replace(SMALL, max_kv_len=256, num_heads=8)
    config = DECODE_BLOCKED_CPU.default(problem, by_name("cpu"))
    with Pool(["cpu"], environment={"OMP_NUM_THREADS": "1"}) as pool:
        few, many = (
            pool.measure("cpu", p, config.replace(block_n=n), rounds=5, window_ms=4.0, timeout_s=60.0)
            for p, n in ((problem, 256), (dataclasses.replace(problem, max_kv_len=2048), 32))
        )
    assert few.status == many.status == "ok", (few, many)
    assert few.median_us is not None
    assert many.median_us is not None
    assert 0 < few.median_us < many.median_us  # 8 times the tokens, in smaller tiles
    assert few.spread_us is not None
    assert few.spread_us >= 0
    assert few.registers is None
    assert len(few.source_hash) == 16
    assert few.source_hash != many.source_hash


def test_inputs_that_take_longer_than_the_caller_has_are_given_up() -> None:
    config = DECODE_BLOCKED_CPU.default(SMALL, by_name("cpu"))
    with Pool(["cpu"], environment={"OMP_NUM_THREADS": "1"}) as pool:
        with pytest.raises(TimeoutError, match=r"inputs and reference take more than 0\.001 s"):
            pool.measure("cpu", SMALL, config, rounds=1, prepare_s=0.001)
        assert pool.measure("cpu", SMALL, config, rounds=1).status == "ok"


def test_results_that_are_off_are_told_from_each_other(log: Path) -> None:
    """Lengths of an earlier call that are kept, and NaN read past a sequence's end, are seen too."""
    wants = {
        "ok": ("ok", ""), "wrong": ("wrong", "relative L2 error"), "wrong_lse": ("wrong", "LSE off by"),
        "untouched": ("nan", "NaN in the output"), "reads_past_end": ("nan", "NaN in the "),
        "frozen_lengths": ("wrong", "relative L2 error"), "torch_oom": ("out_of_memory", "Tried to allocate"),
        "segfault": ("illegal_access", "ended by SIGSEGV while checking"),
    }  # fmt: skip
    with Pool(["cpu"], timer=TIMER) as pool:
        for does, (status, note) in wants.items():
            found = pool.measure("cpu", SMALL, Config.of("planted_cpu", does=does), rounds=3)
            assert found.status == status, (does, found)
            assert note in found.note
            assert (found.median_us is not None) == (does == "ok")
    assert [line[0] for line in lines(log)] == ["ok"]  # the others were never timed


def test_kernels_run_as_a_device_would_run_them(log: Path) -> None:
    """Operands, workspace and numbers of the Triton row, in Triton's interpreter."""
    problem = DecodeProblem(
        num_heads=2, kv_lora_rank=16, rope_dim=16, page_size=16, q_dtype="fp16", kv_dtype="fp16", out_dtype="fp32",
        batch=2, max_kv_len=40, num_kv_splits=2, lse=True,
    )  # fmt: skip
    config = DECODE_SPLITK_TRITON.default(problem, by_name("sm_80"))
    with Pool(["cpu"], target="sm_80", timer=TIMER, environment={"TRITON_INTERPRET": "1"}) as pool:
        found = pool.measure("cpu", problem, config, rounds=3)
    assert found.status == "ok", found.note
    assert found.rel_l2 is not None
    assert found.rel_l2 < 2e-3
    assert (found.median_us, found.spread_us, found.registers) == (10.5, 1.0, 64)


# ---------------------------------------------------------------------------------------------------------- every fault

FATAL = {  # these cost the worker
    "segfault": ("illegal_access", "ended by SIGSEGV while timing"),
    "print_illegal": ("illegal_access", "ended by SIGABRT while timing: what():  CUDA error: an illegal memory access"),
    "raise_illegal": ("illegal_access", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    "raise_misaligned": ("illegal_access", "LaunchError: launch of planted: misaligned address"),
    "loop": ("hang", "killed after 1 s, while timing"),
    "loop_in_c": ("hang", "killed after 1 s, while timing"),
    "memory_error": ("out_of_memory", "MemoryError"),
    "torch_oom": ("out_of_memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate"),
    "print_oom": ("out_of_memory", "std::bad_alloc"),
    "exit": ("error", "ended with status 7 while timing: it printed nothing"),
    "killed": ("error", "ended by SIGKILL while timing"),
    "compile_abort": ("compiler_abort", "ended by SIGABRT while compiling: LLVM ERROR: Cannot select"),
    "compile_segfault": ("compiler_abort", "ended by SIGSEGV while compiling"),
    "compile_exit": ("compiler_abort", "ended with status 3 while compiling"),
    "compile_loop": ("hang", "killed after 1 s, while compiling"),
}
HARMLESS = {
    "illegal": ("illegal", "planted as illegal"),
    "compile_error": ("compile_error", "'tt.dot' op expected another encoding"),
    "no_mma": ("compile_error", "none of the matrix instructions"),
    "smem": ("too_many_resources", "426000 bytes of shared memory"),
    "registers": ("too_many_resources", "300 registers a thread"),
    "ptxas": ("too_many_resources", "ptxas failed"),
    "launch_resources": ("too_many_resources", "shared memory of planted"),
    "raise": ("error", "ValueError: planted"),
    "sys_exit": ("error", "SystemExit: 5"),
    "chatty": ("ok", ""),
}


def test_every_fault_has_its_status_and_the_next_candidate_is_measured(fake: Callable[..., Pool], log: Path) -> None:
    pool = fake("null:0", "null:1")
    assert {status for status, _ in (FATAL | HARMLESS).values()} | {"wrong", "nan"} == {*FAULTS, "ok"}

    def both(item: tuple[int, tuple[str, tuple[str, str]]]) -> tuple[str, Measurement, Measurement]:
        number, (does, _) = item
        device = pool.devices[number % 2]
        bad = pool.measure(device, SMALL, planted(does), rounds=3, timeout_s=patience(does))
        return does, bad, pool.measure(device, SMALL, planted("ok", number), rounds=3, timeout_s=20.0)

    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(both, enumerate((FATAL | HARMLESS).items())))
    for number, (does, bad, good) in enumerate(done):
        status, note = (FATAL | HARMLESS)[does]
        assert bad.status == status, (does, bad)
        assert note in bad.note
        assert "\n" not in bad.note
        assert (good.status, good.median_us, good.spread_us) == ("ok", 10.5 + number, 1.0), (does, good)
        assert (good.registers, good.spill_bytes, good.smem_bytes) == (64, 8, 4096)
        if does != "illegal":
            assert len(bad.source_hash) == 16
        if status in ("illegal_access", "out_of_memory"):  # compiled before
            assert bad.registers == 64


def test_a_worker_outlives_harmless_faults_only(fake: Callable[..., Pool], log: Path) -> None:
    pool = fake()
    for does in ("ok", "raise", "sys_exit", "launch_resources", "ok", "raise_illegal", "ok", "torch_oom", "ok"):
        pool.measure("null:0", SMALL, planted(does, len(lines(log))), rounds=1)
    pids = [line[-1] for line in lines(log)]
    assert len(pids) == 9
    assert len(set(pids)) == 3
    assert pids[:6] == pids[:1] * 6
    assert pids[6:8] == pids[6:7] * 2


def test_a_kill_reaches_what_the_worker_has_started(fake: Callable[..., Pool], log: Path) -> None:
    assert fake().measure("null:0", SMALL, planted("loop_with_child"), timeout_s=1.0).status == "hang"
    pids = [int(pid) for line in lines(log) if line[0] == "child" for pid in line[1:]]
    assert len(pids) == 2
    wait_for(lambda: not any(map(running, pids)))


def test_a_worker_that_was_killed_while_idle_is_no_candidates_fault(fake: Callable[..., Pool], log: Path) -> None:
    pool = fake()
    for tag in range(3):
        assert pool.measure("null:0", SMALL, planted("ok", tag), rounds=1).status == "ok"
        os.kill(int(lines(log)[-1][-1]), signal.SIGKILL)  # perhaps not dead yet at the next request


def test_devices_work_at_the_same_time_for_many_threads(fake: Callable[..., Pool], log: Path) -> None:
    pool = fake(*(f"null:{i}" for i in range(4)))
    kinds = ["sleep", "sleep", "segfault", "sleep", "compile_abort", "raise"]

    def one(number: int) -> tuple[str, str]:
        does = kinds[number % len(kinds)]
        return does, pool.measure(f"null:{number % 4}", SMALL, planted(does, number), rounds=3).status

    assert pool.measure("null:0", SMALL, planted("ok"), rounds=3).status == "ok"
    assert len(children_of(pool)) == 1  # the others start when they are asked
    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(one, range(24)))
    wants = {"sleep": "ok", "segfault": "illegal_access", "compile_abort": "compiler_abort", "raise": "error"}
    assert [status for _, status in done] == [wants[does] for does, _ in done]
    for does in ("ok", "sleep"):  # the first makes the workers
        started = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda i: pool.measure(f"null:{i}", SMALL, planted(does), rounds=3), range(4)))  # noqa: B023
    assert time.monotonic() - started < 4 * 0.3


def children_of(pool: Pool) -> list[int]:
    return [slot.worker.process.pid for slot in pool._slots.values() if slot.worker is not None]


# ----------------------------------------------------------------------------------------------------------- quarantine


def test_what_killed_a_worker_is_not_run_again(fake: Callable[..., Pool], log: Path, tmp_path: Path) -> None:
    path = tmp_path / "state" / "quarantine.jsonl"
    larger = dataclasses.replace(SMALL, max_kv_len=80)
    first = fake(quarantine=path)
    whole, sized = ("segfault", "compile_abort", "compile_loop"), ("torch_oom", "loop", "exit")
    before = {
        does: first.measure("null:0", SMALL, planted(does), timeout_s=patience(does))
        for does in (*whole, *sized, "raise")
    }
    ran = len(lines(log))
    for pool in (first, fake(quarantine=path)):  # this process, and as another one would
        for does in (*whole, *sized):
            again = pool.measure("null:0", SMALL, planted(does), timeout_s=patience(does))
            assert (again.status, again.source_hash) == (before[does].status, before[does].source_hash)
            assert again.note == f"quarantined: {before[does].note}"
        for does in whole:  # the code is at fault: at other sizes too
            assert pool.measure("null:0", larger, planted(does), timeout_s=patience(does)).note.startswith(
                "quarantined: "
            )
        assert len(lines(log)) == ran
    assert pool.measure("null:0", SMALL, planted("raise")).note == "ValueError: planted second line"[:19]
    assert pool.measure("null:0", larger, planted("exit")).note == before["exit"].note  # it may be due to the sizes
    assert pool.measure("null:0", SMALL, planted("segfault", 1)).note == before["segfault"].note  # another source
    assert len(lines(log)) == ran + 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"illegal_access", "compiler_abort", "hang", "out_of_memory", "error"}
    assert all(row["device"] == "null:0" and row["config"].startswith("planted(") for row in rows)


def test_a_torn_or_foreign_quarantine_is_read_as_far_as_it_goes(
    fake: Callable[..., Pool], log: Path, tmp_path: Path
) -> None:
    path = tmp_path / "quarantine.jsonl"
    known = fake().measure("null:0", SMALL, planted("ok"), rounds=1).source_hash
    row = {"key": known, "status": "hang", "note": "by hand"}
    path.write_bytes(json.dumps(row).encode() + b'\n[]\n\xff\n{"key": "a", "status": "bad", "note": ""}\n{"key": "to')
    pool = fake(quarantine=path)
    assert pool.measure("null:0", SMALL, planted("ok"), rounds=1) == Measurement(
        "hang", source_hash=known, note="quarantined: by hand"
    )
    pool.measure("null:0", SMALL, planted("exit"))
    assert len(path.read_text(errors="replace").splitlines()) == 6  # the torn line does not swallow the new one
    assert fake(quarantine=path).measure("null:0", SMALL, planted("exit")).note.startswith("quarantined: ")
    path.unlink()  # it goes on, with what it knows
    assert pool.measure("null:0", SMALL, planted("exit")).note.startswith("quarantined: ")


def test_a_quarantine_that_cannot_be_written_is_refused_at_once(log: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MlaJitError, match="name another file"):
        Pool(["cpu"], quarantine=tmp_path / "file" / "quarantine")


# ------------------------------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize(("devices", "more"), [
    (["gpu:0"], {}), (["cpu", "cpu"], {}), (["cuda:x"], {}), (["null:0"], {}), (["null:0"], {"target": "sm_90"}),
])  # fmt: skip
def test_devices_that_cannot_be_are_refused(devices: list[str], more: dict[str, str]) -> None:
    with pytest.raises(InvalidInput):
        Pool(devices, **more)  # type: ignore[arg-type]


def test_a_worker_that_cannot_start_is_the_callers_error(
    fake: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = fake(timer="worker_faults:no_such")
    for _ in range(2):
        with pytest.raises(MlaJitError, match="no worker could be started, AttributeError: module 'worker_faults'"):
            pool.measure("null:0", SMALL, planted("ok"))
    assert children_of(pool) == []
    with pytest.raises(MlaJitError, match="no_such_target"):
        fake(target="no_such_target").measure("null:0", SMALL, planted("ok"))
    monkeypatch.setattr(worker, "_START_S", 0.0)
    with pytest.raises(MlaJitError, match="took more than 0 s"):
        fake().measure("null:0", SMALL, planted("ok"))
    with pytest.raises(InvalidInput, match="no device of this pool"):
        pool.measure("null:7", SMALL, planted("ok"))


def test_a_worker_has_the_settings_of_its_parent_and_one_device(
    fake: Callable[..., Pool], cache_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mla_jit import settings

    monkeypatch.setenv("MLA_JIT_COMPILE_TIMEOUT_S", "1")
    with settings.scope(cache_layers=(Path("/a"), Path("/b")), mode="strict", safe_compile=True, lock_timeout_s=7.0):
        pool = fake("null:0", environment={"WORKER_MORE": "1"})
        start, environment = pool._start("null:0")
        parents = settings.current()
    assert start == {"device": "null:0", "timer": TIMER}
    assert settings.Settings.from_env(environment) == dataclasses.replace(
        parents, mode="serve", safe_compile=False, target="sm_90"
    )
    assert environment["WORKER_MORE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == environment["HIP_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus = Pool(["cuda:0", "cuda:1", "cuda:2"])
    assert [gpus._start(f"cuda:{i}")[1]["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["3", "5"]
    assert gpus._start("cuda:1")[0]["device"] == "cuda:0"
    with pytest.raises(InvalidInput, match="cuda:2 is not among the 2 devices"):
        gpus.measure("cuda:2", SMALL, planted("ok"))
    gpus.close()


def test_close_ends_what_runs_and_tells_the_thread_that_waits(
    fake: Callable[..., Pool], log: Path, tmp_path: Path
) -> None:
    pool = fake("null:0", "null:1", quarantine=tmp_path / "quarantine")
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            pool.measure("null:0", SMALL, planted("loop"), timeout_s=60.0)
        except MlaJitError as error:
            raised.append(error)

    pool.measure("null:1", SMALL, planted("ok"), rounds=1)
    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: any(line[0] == "loop" for line in lines(log)))
    pool.close()
    thread.join(10.0)
    assert not thread.is_alive()
    assert "closed" in str(raised[0])
    assert not any(running(int(line[-1])) for line in lines(log))
    assert (tmp_path / "quarantine").read_text() == ""  # nobody's fault
    pool.close()
    with pytest.raises(MlaJitError, match="closed"):
        pool.measure("null:0", SMALL, planted("ok"))


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = [{root!r}, {here!r}]
from mla_jit.config import Config
from mla_jit.problem import DecodeProblem
from mla_jit.tuning.pool import Pool
problem = DecodeProblem(num_heads=4, kv_lora_rank=32, rope_dim=16, page_size=8)
pool = Pool(["null:0", "null:1"], target="sm_90", timer="worker_faults:timer")
pool.measure("null:1", problem, Config.of("planted", does="ok", tag=0), rounds=1)
{then}
"""
LOOP = 'pool.measure("null:0", problem, Config.of("planted", does="loop", tag=0), timeout_s=60.0)'


@pytest.mark.parametrize(("then", "how"), [
    (LOOP, signal.SIGKILL), (LOOP, signal.SIGINT), (f"with pool: {LOOP}", signal.SIGINT), ("raise SystemExit(3)", None),
], ids=["killed", "interrupted", "interrupted in a with block", "not closed"])  # fmt: skip
def test_nothing_outlives_the_parent(then: str, how: signal.Signals | None, log: Path) -> None:
    script = SCRIPT.format(root=str(ROOT), here=str(HERE), then=then)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    try:
        if how is not None:
            wait_for(lambda: any(line[0] == "loop" for line in lines(log)))
            process.send_signal(how)
        _, printed = process.communicate(timeout=20.0)
    finally:
        process.kill()
    assert (b"KeyboardInterrupt" in printed) == (how == signal.SIGINT), printed.decode()
    pids = [int(line[-1]) for line in lines(log)]
    assert len(pids) == (2 if how is not None else 1)
    wait_for(lambda: not any(map(running, pids)))


def test_the_policy_is_one_line_with_its_figures() -> None:
    from mla_jit.tuning import bench

    assert "\n" not in candidate.POLICY
    assert f"{bench.ROTATE_BYTES / (1 << 20):g} MiB" in candidate.POLICY
    assert math.isclose(bench.ROTATE_BYTES, 240 << 20)
