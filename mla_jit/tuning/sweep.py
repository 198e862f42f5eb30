"""A sweep: shapes to tune, each searched on one device, every trial stored as it is made. `mla-tune plan` and `run`.

Several devices share a queue of shapes; a shape stays on one. A sweep that was stopped, however, goes on where it was:
finished shapes are recognised by their playoff's trials, half-finished ones repeat no measurement.
"""

from __future__ import annotations

import datetime as dt
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mla_jit import models, ops
from mla_jit.compile import triton
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.errors import CompileError
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target
from mla_jit.tuning import candidate, search, space
from mla_jit.tuning.rows import OK, Measurement, Trial
from mla_jit.tuning.store import Store

# (rounds, milliseconds a window) by effort.
EFFORTS = ((3, 1.0), (5, 3.0), (9, 10.0))
Event = Callable[[str, dict[str, Any]], None]


class Measurer(Protocol):
    """What a sweep needs of pool.Pool."""

    def measure(
        self, device: str, problem: DecodeProblem, config: Config, *, rounds: int, window_ms: float, timeout_s: float
    ) -> Measurement: ...


def shapes(
    wanted: Iterable[tuple[models.Model, int]], target: Target, *, dtypes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 4, 16, 64, 128), kv_lens: Sequence[int] = (1024, 4096, 16384, 65536),
    q_lens: Sequence[int] = (1,), page_size: int = 64, memory_bytes: int | None = None,
) -> list[DecodeProblem]:  # fmt: skip
    """The problems of (model, tensor-parallel ranks) pairs, each once: models with the same heads and dims share them.

    Left out: lengths beyond a model's context, and caches larger than memory_bytes.
    """
    found: dict[DecodeProblem, None] = {}
    for model, tp in wanted:
        for dtype in dtypes if dtypes is not None else model.dtypes:
            q, cache = models.dtypes_on(dtype, target)
            for q_len in q_lens:
                for kv_len in kv_lens:
                    for batch in batches:
                        problem = DecodeProblem(
                            num_heads=model.local_heads(tp), kv_lora_rank=model.kv_lora_rank, rope_dim=model.rope_dim,
                            q_dtype=q, kv_dtype=cache, out_dtype="bf16" if DTYPES[q].bits == 8 else q,
                            page_size=page_size, batch=batch, q_len=q_len, max_kv_len=bucket(kv_len), hinted=True,
                        )  # fmt: skip
                        if kv_len <= model.max_kv_len and cache_bytes(problem) <= (memory_bytes or 1 << 62):
                            found[problem] = None
    return list(found)


def cache_bytes(problem: DecodeProblem) -> int:
    """Of the latent cache at the length bound."""
    return problem.batch * problem.max_kv_len * problem.head_dim * DTYPES[problem.kv_dtype].bytes


@dataclass(frozen=True)
class Finished:
    """A shape of a sweep. `outcome` is None where it was finished before."""

    problem: DecodeProblem
    device: str
    outcome: search.Outcome | None
    seconds: float


def candidates(problem: DecodeProblem, target: Target) -> list[Config]:
    """The legal configs of every variant that accepts the problem, the default of `plan` first."""
    return space.candidates(problem, target, ops.variants(problem.op))


def run(
    problems: Sequence[DecodeProblem], target: Target, devices: Sequence[str], pool: Measurer, store: Store, *,
    budget_s: float, how: str = "auto", resume: bool = True, timeout_s: float = 60.0, command: str = "mla-tune run",
    on_event: Event | None = None, stop: threading.Event | None = None,
) -> Iterator[Finished]:  # fmt: skip
    """Tunes each problem on one of the devices; yields as they finish. The budget is shared by the shapes still to do.

    KeyboardInterrupt (or `stop`) ends it after the running measurements; what was measured is stored.
    """
    todo: queue.SimpleQueue[DecodeProblem] = queue.SimpleQueue()
    for problem in problems:
        todo.put(problem)
    done: queue.SimpleQueue[Finished | BaseException] = queue.SimpleQueue()
    stop = stop or threading.Event()
    started = time.monotonic()
    left, lock = [len(problems)], threading.Lock()

    def share_s() -> float:
        with lock:
            return max(0.0, budget_s - (time.monotonic() - started)) * len(devices) / max(left[0], len(devices))

    def serve(device: str) -> None:
        try:
            while not stop.is_set():
                try:
                    problem = todo.get_nowait()
                except queue.Empty:
                    return
                finished = _one(
                    problem, target, device, pool, store, share_s(), how, resume, timeout_s, command, on_event, stop
                )
                with lock:
                    left[0] -= 1
                done.put(finished)
        except BaseException as error:  # handed to the caller's thread
            done.put(error)

    threads = [threading.Thread(target=serve, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) or not done.empty():
            try:
                item = done.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout_s + 10)


def _one(
    problem: DecodeProblem, target: Target, device: str, pool: Measurer, store: Store, budget_s: float, how: str,
    resume: bool, timeout_s: float, command: str, on_event: Event | None, stop: threading.Event,
) -> Finished:  # fmt: skip
    started = time.monotonic()
    revisions = {variant.name: variant.revision for variant in ops.variants(problem.op)}
    same = [
        trial
        for trial in store.trials(problem=problem, target=target.name, device=target.device)
        if trial.revision == revisions.get(trial.variant) and trial.toolchain == toolchain()
    ]
    known = {(trial.config, trial.effort): _measurement(trial) for trial in same} if resume else {}
    last = len(EFFORTS) - 1
    if resume and any(trial.effort == last and trial.status == OK for trial in same):
        return Finished(problem, device, None, time.monotonic() - started)

    def measure(config: Config, effort: int) -> Measurement:
        if stop.is_set():
            raise KeyboardInterrupt
        rounds, window_ms = EFFORTS[effort]
        return pool.measure(device, problem, config, rounds=rounds, window_ms=window_ms, timeout_s=timeout_s)

    def keep(name: str, data: dict[str, Any]) -> None:
        if name == "trial":
            config, effort = data["config"], data["effort"]
            store.add(
                [_trial(problem, target, config, effort, data["measurement"], revisions[config.variant], command)]
            )
        if on_event is not None:
            on_event(name, {"problem": problem, "device": device, **data})

    found = candidates(problem, target)
    outcome = search.tune(
        problem, target, found, measure, budget_s=budget_s, search=how, incumbent=_incumbent(same), done=known,
        on_event=keep,
    )  # fmt: skip
    return Finished(problem, device, outcome, time.monotonic() - started)


def _incumbent(trials: Sequence[Trial]) -> Config | None:
    timed = [t for t in trials if t.status == OK and t.median_us is not None]
    best = min(timed, key=lambda t: (-t.effort, t.median_us or 0.0, t.config.to_json()), default=None)
    return None if best is None else best.config


def toolchain() -> str:
    """As trials record it; "" without Triton."""
    try:
        return triton.version()
    except CompileError:
        return ""


def _trial(problem: DecodeProblem, target: Target, config: Config, effort: int, found: Measurement,
           revision: int, command: str) -> Trial:  # fmt: skip
    rounds, window_ms = EFFORTS[effort]
    return Trial(
        problem=problem, config=config, target=target.name, device=target.device, revision=revision,
        status=found.status, median_us=found.median_us, spread_us=found.spread_us, rel_l2=found.rel_l2,
        registers=found.registers, spill_bytes=found.spill_bytes, smem_bytes=found.smem_bytes,
        source_hash=found.source_hash, toolchain=toolchain(), effort=effort,
        policy=f"{candidate.POLICY.partition(':')[0]}, {rounds} rounds of {window_ms:g} ms", command=command,
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"), note=found.note,
    )  # fmt: skip


def _measurement(trial: Trial) -> Measurement:
    return Measurement(
        status=trial.status, median_us=trial.median_us, spread_us=trial.spread_us, rel_l2=trial.rel_l2,
        registers=trial.registers, spill_bytes=trial.spill_bytes, smem_bytes=trial.smem_bytes,
        source_hash=trial.source_hash, note=trial.note,
    )  # fmt: skip
