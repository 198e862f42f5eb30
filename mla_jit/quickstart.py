"""`mla-tune quickstart`: one decode call here, judged, with where its time went; and its kernels for other machines.

Kernels go to a cache directory of their own, so that the first call always compiles.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mla_jit import ahead, models, plan, settings, target
from mla_jit.compile import cache
from mla_jit.plan import Dispatch
from mla_jit.problem import DecodeProblem

MODEL, TP, BATCH, KV_LEN, PAGE_SIZE, DTYPE = "deepseek-v3", 8, 4, 2048, 64, "bf16"


@dataclass
class Kernel:
    """A cross-compiled kernel. Times in seconds; `cached_s` is a second look-up, verified from disk."""

    target: str
    name: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    size_bytes: int
    compile_s: float
    cached_s: float


@dataclass
class Report:
    """What quickstart found. Times in seconds."""

    target: str
    device: str
    problem: str
    variant: str = ""
    config: str = ""
    times_s: dict[str, float] = field(default_factory=dict)
    again_s: dict[str, float] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    again_origins: tuple[str, ...] = ()
    accuracy: dict[str, float] = field(default_factory=dict)
    kernels: list[Kernel] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    total_s: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def run(*, cross: bool = True, say: Callable[[str], None] = lambda text: None) -> Report:
    """Runs it all; `say` hears what comes next. Errors of the decode call itself are raised."""
    started = time.perf_counter()
    say("importing torch")
    where = target.here()
    imported = time.perf_counter() - started
    with (
        tempfile.TemporaryDirectory(prefix="mla_jit-quickstart-") as directory,
        settings.scope(cache_dir=Path(directory)),
    ):
        cache.forget()
        try:
            report = _decode(where, say)
            report.times_s = {"import": imported, **report.times_s}
            if cross:
                _cross(report, say)
        finally:
            plan.forget()
            cache.forget()
    report.total_s = time.perf_counter() - started
    return report


def _problem(where: target.Target) -> DecodeProblem:
    """A rank's share of a real model, as it is decoded on a target."""
    model = models.by_name(MODEL)
    q, kv = models.dtypes_on(DTYPE, where)
    return DecodeProblem(
        num_heads=model.local_heads(TP), kv_lora_rank=model.kv_lora_rank, rope_dim=model.rope_dim, q_dtype=q,
        kv_dtype=kv, page_size=PAGE_SIZE, lse=True, batch=BATCH, max_kv_len=KV_LEN,
    )  # fmt: skip


def _decode(where: target.Target, say: Callable[[str], None]) -> Report:
    """The same call three times: cold, from the disk cache as a new process would, and warm."""
    import torch

    import mla_jit
    from mla_jit import trial
    from mla_jit.ops.decode.inputs import decode_inputs

    sizes = _problem(where)
    device = "cpu" if where.runtime == "cpu" else "cuda"
    call = trial.make_call(sizes, device, sm_scale=models.by_name(MODEL).sm_scale)
    names = {k: v for k, v in call.keywords.items() if k != "return_lse"}
    problem = decode_inputs(call.q, call.kv_cache, **names, return_lse=True).problem
    report = Report(where.name, where.device, str(problem))

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def once() -> tuple[Any, dict[str, float], Dispatch]:
        clock = [time.perf_counter()]
        executable = plan.executable_for(problem, where)
        clock.append(time.perf_counter())
        if device == "cuda":
            executable.load(torch.cuda.current_device())
        clock.append(time.perf_counter())
        result = mla_jit.decode(call.q, call.kv_cache, **call.keywords)
        finish()
        clock.append(time.perf_counter())
        resolve, load, launch = (b - a for a, b in itertools.pairwise(clock))
        compiling = executable.dispatch.compile_s
        times = {"plan": max(0.0, resolve - compiling), "compile": compiling, "load": load, "launch": launch}
        return result, times, executable.dispatch

    say(f"first call on {where.device} ({where.name})")
    (out, lse), report.times_s, dispatch = once()
    report.variant, report.config, report.origins = dispatch.variant, str(dispatch.config), dispatch.origins
    judged = trial.judge(call, out, lse)
    report.accuracy = asdict(judged)
    if not judged.ok:
        report.faults.append(f"the result is off: relative L2 {judged.rel_l2:.2e} (limit {judged.rel_l2_limit:.0e}), "
                             f"LSE {judged.lse_error:.2e} (limit {judged.lse_limit:.0e})")  # fmt: skip
    say("second call, from the cache")
    mla_jit.reload()
    cache.forget()
    _, report.again_s, dispatch = once()
    report.again_origins = dispatch.origins
    if any(origin == "compiled" for origin in dispatch.origins):
        report.faults.append("the second call compiled again instead of finding the kernels in the cache")
    warm = []
    for _ in range(5):
        begun = time.perf_counter()
        mla_jit.decode(call.q, call.kv_cache, **call.keywords)
        finish()
        warm.append(time.perf_counter() - begun)
    report.again_s["warm call"] = sorted(warm)[len(warm) // 2]
    return report


def _cross(report: Report, say: Callable[[str], None]) -> None:
    """The call's kernels for other architectures, each in a compiling child; then once more, from the cache."""
    jobs: list[ahead.Job] = []
    for name in target.SHOWCASE:
        there = target.by_name(name)
        found = ahead.jobs_of([_problem(there)], there)
        jobs += found.jobs
        report.faults += [f"{what}: {why}" for what, why in found.refused.items()]
    say(f"cross-compiling {len(jobs)} kernels for {', '.join(target.SHOWCASE)}")
    built = {done.job.source.key: done for done in ahead.build_all(jobs)}
    cache.forget()
    for job in jobs:
        done = built[job.source.key]
        if done.artifact is None:
            report.faults.append(done.error)
            continue
        begun = time.perf_counter()
        again = cache.lookup(job.source)
        cached_s = time.perf_counter() - begun
        if again is None:
            report.faults.append(f"{job.source.name} for {job.target} was compiled but is not in the cache")
        a = done.artifact
        report.kernels.append(Kernel(job.target, a.name, a.registers, a.spill_bytes, a.smem_bytes, len(a.binary),
                                     a.compile_seconds, cached_s))  # fmt: skip
