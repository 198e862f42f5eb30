"""One candidate: built through the cache, checked against the reference, and only then timed.

Runs in a worker process (worker.py), which a candidate may kill. A device "null:0" is a fake one: its candidates are
compiled for a target, not run, and timed by `timer`.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mla_jit import ops, plan, target
from mla_jit.config import Config
from mla_jit.errors import CompileError, CompilerAborted, IllegalArtifact, InvalidInput
from mla_jit.ops.variant import Variant
from mla_jit.problem import Tunable
from mla_jit.target import Target
from mla_jit.tuning.prompts import PrefillStand
from mla_jit.tuning.rows import OK, Measurement
from mla_jit.tuning.stand import DecodeStand, Fault, Run, Stand

POLICY = (
    "v1: µs a call, median and max - min over rounds. A round replays, for the window, one CUDA graph of a call on "
    "each of the input sets, whose KV together exceeds 240 MiB (host variants: calls timed by perf_counter, sets "
    "beyond 4 × L2). Every sequence has max_kv_len tokens, or, with total_kv, lengths of its mix with that sum; the "
    "table has the capacity's width; prompts are as even as their totals allow. Timed only after a check against the "
    "float64 reference"
)
Timer = Callable[[Tunable, Config, int], Sequence[float]]  # (problem, config, rounds) -> µs a call, by round

ILLEGAL = re.compile(
    r"illegal (memory access|address|instruction)|misaligned address|invalid (address space|program counter)|"
    r"unspecified launch failure|ERROR_(ILLEGAL|MISALIGNED|LAUNCH_FAILED)|IllegalAddress|Memory access fault",
    re.IGNORECASE,
)
MEMORY = re.compile(r"out of memory|ERROR_OUT_OF_MEMORY|bad_alloc|cannot allocate memory", re.IGNORECASE)
_TIMEOUT = re.compile(r"LAUNCH_TIMEOUT|launch timed out", re.IGNORECASE)
_RESOURCES = re.compile(
    r"of shared memory|^shared memory of|shared data|registers a thread|bytes of stack|threads, the target|"
    r"too many resources|out of ?resources",
    re.IGNORECASE,
)


def _quiet(phase: str, **found: Any) -> None:
    """Says nothing."""


def run_candidate(
    problem: Tunable, config: Config, device: str, rounds: int, window_ms: float, *, timer: Timer | None = None,
    known: Mapping[str, Sequence[str]] | None = None, say: Callable[..., None] = _quiet,
) -> Measurement:  # fmt: skip
    """Builds, checks and times a candidate in this process, on "cpu", "cuda:0" or, to be timed by `timer`, "null:0".

    rounds, window_ms: how many times, and for how long each, it is timed. timer: gives the times instead.
    known: faults on record, (status, note) by quarantine key; such a candidate is not run. say: hears the phases
    ("compiling", "preparing", "checking", "timing") with what is known of the candidate by then.
    Raises nothing for a candidate that a process survives.
    """
    return attempt(problem, config, device, rounds, window_ms, timer, known or {}, say)[0]


def attempt(
    problem: Tunable, config: Config, device: str, rounds: int, window_ms: float, timer: Timer | None,
    known: Mapping[str, Sequence[str]], say: Callable[..., None],
) -> tuple[Measurement, bool]:  # fmt: skip
    """(measurement, whether the process is in doubt after it)."""
    found: dict[str, Any] = {}

    def enter(phase: str, **more: Any) -> None:
        found.update(more)
        say(phase, **more)

    try:
        times = _figures(problem, config, device, rounds, window_ms, timer, known, enter, found)
        median = statistics.median(times)
        return Measurement(OK, median_us=median, spread_us=max(times) - min(times), **found), False
    except (Exception, SystemExit) as error:  # whatever a candidate raises is its result, with the reason
        fault = error if isinstance(error, Fault) else fault_of(error)
        error.__traceback__ = error.__context__ = None  # whose frames hold this one, and a graph: else garbage
        doubtful = fault.doubtful or not _sound(device)
        return Measurement(fault.status, note=" ".join(fault.note.split())[:500], **found), doubtful


def _figures(
    problem: Tunable, config: Config, device: str, rounds: int, window_ms: float, timer: Timer | None,
    known: Mapping[str, Sequence[str]], enter: Callable[..., None], found: dict[str, Any],
) -> Sequence[float]:  # fmt: skip
    """µs a call, by round. Raises Fault, or whatever the candidate raises."""
    variant = next((v for v in ops.variants(problem.op) if v.name == config.variant), None)
    if variant is None:
        raise Fault("illegal", f"no variant of {problem.op} is called {config.variant!r}")
    if not (problem.batch and problem.q_len and problem.max_kv_len):
        raise Fault("illegal", f"nothing to compute: {problem}")
    where = place_of(device)
    if (reason := variant.rejects(problem, where, config)) is not None:
        raise Fault("illegal", reason)
    source_hash = _source_hash(variant, problem, where, config)
    found["source_hash"] = source_hash
    for key in quarantine_keys(source_hash, problem, config):
        if key in known:
            raise Fault(known[key][0], f"quarantined: {known[key][1]}")

    enter("compiling", source_hash=source_hash)
    executable = plan.make(problem, where, plan.Choice(variant, config, "measured", {}))
    for artifact in executable.artifacts[:1]:
        enter(
            "compiled", registers=artifact.registers, spill_bytes=artifact.spill_bytes, smem_bytes=artifact.smem_bytes
        )
    if device.startswith("null"):
        if timer is None:
            raise InvalidInput(f"{device} is a fake device, which runs nothing; give a timer")
        executable.load(0)
    else:
        enter("preparing")
        stand = _stand(problem, where, device)
        run = Run(executable, stand)
        enter("checking")
        if (config, source_hash) not in _right:
            _right[config, source_hash] = stand.check(run)
        found["rel_l2"] = _right[config, source_hash]
    enter("timing")
    if timer is not None:
        return timer(problem, config, rounds)
    return stand.time(run, rounds, window_ms)


def place_of(device: str) -> Target:
    kind, _, index = device.partition(":")
    return target.here() if kind == "null" else target.of_device(kind, int(index or 0))


def _source_hash(variant: Variant, problem: Tunable, where: Target, config: Config) -> str:
    if variant.host is not None:
        text = f"{variant.name} {variant.revision} {config.to_json()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return variant.sources(problem, where, config)[0].key[:16]


def quarantine_keys(source_hash: str, problem: Tunable, config: Config) -> tuple[str, str]:
    """Under which a fault is remembered: of the code, whatever the sizes; and of these sizes with this config alone."""
    text = json.dumps(problem.fields(), sort_keys=True) + config.to_json()
    return source_hash, f"{source_hash} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def fault_of(error: BaseException) -> Fault:
    """The status of what a candidate has raised."""
    text = f"{error}\n{getattr(error, 'log', '')}"
    note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, CompilerAborted):
        return Fault("compiler_abort", note)
    if isinstance(error, CompileError):
        short = isinstance(error, IllegalArtifact) or "ptxas" in text or "OutOfResources" in text
        return Fault("too_many_resources" if short and _RESOURCES.search(text) else "compile_error", note)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or MEMORY.search(text):
        return Fault("out_of_memory", note, doubtful=True)
    if ILLEGAL.search(text):
        return Fault("illegal_access", note, doubtful=True)
    if _TIMEOUT.search(text):
        return Fault("hang", note, doubtful=True)
    return Fault("too_many_resources" if _RESOURCES.search(str(error)) else "error", note)


def _sound(device: str) -> bool:
    """Whether the device still answers: errors of a CUDA context stay until its process ends."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


_STANDS: dict[str, Callable[..., Stand]] = {"decode": DecodeStand, "prefill": PrefillStand}  # by op
_kept: dict[Any, Stand] = {}  # at most one: a problem's candidates come one after the other
_right: dict[tuple[Config, str], float] = {}  # the error of what this stand has checked, with the hash of its source


def _stand(problem: Tunable, where: Target, device: str) -> Stand:
    """The problem's stand. Raises Fault, without a doubt about the process, where its tensors do not fit."""
    key = problem, where, device
    if key in _kept:
        return _kept[key]
    _kept.clear()
    _right.clear()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    try:
        return _kept.setdefault(key, _STANDS[problem.op](problem, where, device))
    except Exception as error:
        fault = fault_of(error)
        if fault.status != "out_of_memory":
            raise
        note = f"inputs and reference do not fit the device, before any kernel: {fault.note}"
    raise Fault("out_of_memory", note)
