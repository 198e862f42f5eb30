"""`autotune`: the block of code in which the first call of an untuned shape measures it. Outside it nothing benchmarks.

It is the hook `plan.on_miss`. What has no measured row of its own is tuned by a sweep, in a worker process beside this
one; its trials are stored, and the choice is what the database then says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mla_jit import api, plan, settings
from mla_jit import target as targets
from mla_jit.errors import CacheMiss, InvalidInput, MlaJitError
from mla_jit.plan import MEASURED, Choice, Executable
from mla_jit.problem import DecodeProblem, PrefillProblem, Problem
from mla_jit.target import Target
from mla_jit.tuning import sweep
from mla_jit.tuning.builds import Builds
from mla_jit.tuning.pool import Pool
from mla_jit.tuning.search import SEARCHES
from mla_jit.tuning.store import Store, user_path

LENGTHS = (1024, 8192)  # tokens, beside the capacity, at which a problem without hints is tuned
_HOST_BYTES = 1 << 31  # of a cache in the host's memory

_log = logging.getLogger("mla_jit.tuning")
_entering = threading.Lock()


@contextlib.contextmanager
def autotune(budget_s: float = 60.0, search: str = "auto", db: Path | str | None = None) -> Iterator[None]:
    """In the block, the first call of an untuned shape measures it, stores every trial, and is served with the best.

    So do `decode_plan`, `warmup` and `export_plan`, in strict mode too. Untuned is what has no row in the tuning
    database that was measured for this very shape with today's templates and compiler. Entering drops what the process
    has resolved without such a row, so that it resolves again; what `load_plan` installed stays. Choices outlast the
    block. A DecodePlan made before it may be too small by then: make it again.

    A call with hints is tuned at these. One without is tuned at 1024 and 8192 tokens and at its capacity, as far as it
    reaches and memory allows, and served with what is steady over them (lookup.py). One thread tunes at a time;
    the others wait. Of several ranks let one tune, and give its choices to the others (`export_plan`, `load_plan`).

    budget_s: seconds of tuning in the whole block, compiling and the start of workers among them; looked at before each
        measurement. When they are spent, calls are served as outside the block, after one warning; so they are after
        an error of the tuner: no worker can be started, the database cannot be written.
    search: "auto", or "exhaustive" for every candidate.
    db: the tuning database in the block; the user's if absent.

    Raises InvalidInput for an unknown search, and inside another block. A call raises CacheMiss under graph capture,
    before anything is measured, and KeyboardInterrupt at Ctrl-C, after what was measured is stored.
    """
    if search not in SEARCHES:
        raise InvalidInput(f"search {search!r} is unknown; use {' or '.join(SEARCHES)}")
    if not budget_s >= 0:
        raise InvalidInput(f"budget_s is {budget_s}; give the seconds that tuning may take in the block")
    tuner, before = _Tuner(budget_s, search), settings.current().tuning_db
    with _entering:
        if plan.on_miss is not None:
            raise InvalidInput("autotune is on in this process already; leave that block before entering another")
        plan.on_miss = tuner
    try:
        if db is not None:
            settings.configure(tuning_db=Path(db))
        _forget_unmeasured()
        yield
    finally:
        plan.on_miss = None
        tuner.close()
        if db is not None:
            settings.configure(tuning_db=before)


def _forget_unmeasured() -> None:
    """Drops the resolved problems and the bound calls whose choice was not measured."""

    def stays(executable: Executable) -> bool:
        given = (executable.problem, executable.target.name) in plan._installed
        return given or executable.dispatch.provenance in MEASURED

    with plan._lock:
        for key, executable in list(plan._memo.items()):
            if not stays(executable):
                del plan._memo[key]
    for signature, call in list(api._calls.items()):
        if not stays(call.executable):
            api._calls.pop(signature, None)
    api._recent.clear()


class _Tuner:
    """What `plan` asks in a block: one shape at a time, with a worker process a device that is kept for the block."""

    def __init__(self, budget_s: float, how: str):
        self.budget_s = self.left_s = budget_s
        self.how = how
        self.over = threading.Event()  # for the rest of the block nothing is tuned
        self.closed = threading.Event()  # the block has ended
        self._lock = threading.Lock()  # held by the thread that tunes
        self._pools: dict[str, Pool] = {}
        self._builds: dict[Target, Builds] = {}
        self._store: Store | None = None
        self._stop = threading.Event()  # of the sweep that runs
        self._said: set[str] = set()
        self._process = os.getpid()

    def __call__(self, problem: Problem, target: Target, choice: Choice) -> Choice | None:
        if (
            self.over.is_set()
            or os.getpid() != self._process
            or not isinstance(problem, (DecodeProblem, PrefillProblem))
        ):
            return None  # a forked child has neither the workers nor the lock's owner
        if not (problem.batch and problem.q_len and problem.max_kv_len):
            return None
        if self.left_s > 0 and _capturing(target):
            raise CacheMiss(
                f"{problem} is not tuned, and cannot be measured under graph capture; call it once in the autotune "
                "block before the capture, or mla_jit.warmup([...]) there"
            )
        with self._lock:
            if self.over.is_set():
                return None
            if (found := plan.known(problem, target)).provenance in MEASURED:  # another thread has tuned it meanwhile
                return found
            if self.left_s <= 0:
                self._end(f"the {self.budget_s:g} s of this autotune block are spent; give it a larger budget_s")
                return None
            started = time.monotonic()
            try:
                self._tune(problem, target)
            except (MlaJitError, OSError) as error:
                self._end(f"autotune cannot go on: {error}")
            finally:
                self.left_s -= time.monotonic() - started
            return plan.known(problem, target)

    def _tune(self, problem: Any, target: Target) -> None:
        device = _device_of(target)
        wanted = shapes(problem, _room_bytes(device))
        if not wanted:
            what = problem.DATA
            self._say("memory", f"{problem} is not tuned: its {what} does not fit {device} beside what is there")
            return
        if self._store is None:
            self._store = Store(user_path())
        if device not in self._pools:
            self._pools[device] = Pool([device], quarantine=self._store.path.with_suffix(".quarantine"))
        if target not in self._builds:
            self._builds[target] = Builds(target)
        self._stop = threading.Event()
        if self.closed.is_set():
            return
        if device.startswith("cuda"):  # what the caller has queued would be timed along
            torch.cuda.current_stream(device).synchronize()
        for done in sweep.run(
            wanted, target, [device], self._pools[device], self._store, budget_s=self.left_s, how=self.how,
            command="mla_jit.autotune", builds=self._builds[target], stop=self._stop,
        ):  # fmt: skip
            found = done.outcome
            if found is not None and found.median_us is None and found.faults:
                config, status, note = found.faults[0]
                self._say("faults", f"nothing could be measured of {done.problem}; {config}: {status}, {note}")
            elif found is not None:
                _log.info("tuned %s: %s", done.problem, found.why)

    def _end(self, reason: str) -> None:
        self.over.set()
        self._say("end", reason)

    def _say(self, topic: str, message: str) -> None:
        """A log record, once a topic: under `-W error` a warning would fail the call."""
        if not self.closed.is_set() and topic not in self._said:
            self._said.add(topic)
            _log.warning("%s. Untuned calls are served as without autotune.", message)

    def close(self) -> None:
        """Ends the workers, and the sweep of another thread; its call is served with what was measured by then."""
        self.over.set()
        self.closed.set()
        self._stop.set()
        for pool in list(self._pools.values()):
            pool.close()
        with self._lock:
            for pool in self._pools.values():  # one that was just being made
                pool.close()
            for builds in self._builds.values():
                builds.close()
            if self._store is not None:
                self._store.close()


def shapes(problem: Any, room_bytes: int) -> list[Any]:
    """The shapes to tune for a problem, shortest first: its hints, or else the lengths that its capacity may stand for.

    Without hints the longest is halved until its cache fits into `room_bytes`. Empty where nothing fits. A prompt
    has one shape: that with the longest keys that a lookup takes it to have.
    """

    def fits(shape: Any) -> bool:
        return bool(shape.data_bytes <= room_bytes)

    if isinstance(problem, PrefillProblem):
        problem = dataclasses.replace(problem, hinted=True, max_kv_len=problem.shape[3])  # as a lookup takes it
    if problem.hinted:
        return [problem] if fits(problem) else []
    longest = dataclasses.replace(problem, hinted=True)
    while not fits(longest) and longest.max_kv_len > 1:
        longest = dataclasses.replace(longest, max_kv_len=longest.max_kv_len // 2)
    lengths = sorted({min(length, longest.max_kv_len) for length in (*LENGTHS, longest.max_kv_len)})
    found = [dataclasses.replace(longest, max_kv_len=length) for length in lengths]
    return [shape for shape in found if fits(shape)]


def _device_of(target: Target) -> str:
    """The device to measure on: the current GPU if it is what the target says, else the first that is."""
    if target.runtime == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        for index in (torch.cuda.current_device(), *range(torch.cuda.device_count())):
            if targets.of_device("cuda", index) == target:
                return f"cuda:{index}"
    raise MlaJitError(f"no device here is {target.device} ({target.name}); run mla-tune where there is one")


def _room_bytes(device: str) -> int:
    """How large a cache may be: a third of what is free, as copies of it and the rotation of inputs lie beside it."""
    if not device.startswith("cuda"):
        return _HOST_BYTES
    return int(torch.cuda.mem_get_info(device)[0] // 3)


def _capturing(target: Target) -> bool:
    return target.runtime != "cpu" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
