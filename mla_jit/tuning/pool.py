"""Measuring candidates in worker processes, one a device, that a candidate may kill, hang or exhaust at no other cost.

`Pool.measure` gives a `Measurement`, whatever the candidate does: its status says how it ended, in the words of
rows.FAULTS. After a fault that leaves a device or a process in doubt the worker is ended, and the next request starts a
fresh one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import settings
from mla_jit.compile import layers
from mla_jit.config import Config
from mla_jit.errors import InvalidInput, MlaJitError
from mla_jit.problem import Tunable
from mla_jit.tuning.candidate import quarantine_keys
from mla_jit.tuning.rows import FAULTS, Measurement
from mla_jit.tuning.worker import PREPARE_S, Reply, Worker

_DEVICE = re.compile(r"(cuda|cpu|null)(?::(\d+))?")


class _Quarantine:
    """Faults on record, (status, note) by key; in a file of JSON lines too, if there is one, that processes share."""

    def __init__(self, path: Path | None):
        self._path, self._size, self._faults = path, -1, dict[str, tuple[str, str]]()
        self._lock = threading.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                reason = error.strerror or error
                raise MlaJitError(f"the quarantine {path} cannot be written: {reason}; name another file") from error

    def faults(self) -> dict[str, tuple[str, str]]:
        """What is on record now, by this process and by others."""
        with self._lock:
            with contextlib.suppress(OSError):
                if self._path is not None and (size := self._path.stat().st_size) != self._size:
                    lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
                    self._faults |= dict(_records(lines))
                    self._size = size
            return dict(self._faults)

    def add(self, key: str, problem: Tunable, config: Config, device: str, measurement: Measurement) -> None:
        fault = {"key": key, "status": measurement.status, "note": measurement.note, "device": device}
        fault |= {"problem": str(problem), "config": str(config)}
        with self._lock:
            self._faults[key] = measurement.status, measurement.note
            if self._path is None:
                return
            try:
                with self._path.open("a+b") as file:  # O_APPEND: a line at once, whoever else writes
                    end = file.seek(0, os.SEEK_END)
                    file.seek(max(0, end - 1))
                    torn = file.read(1) not in (b"", b"\n")  # by a process that was killed
                    file.write((b"\n" if torn else b"") + json.dumps(fault, sort_keys=True).encode() + b"\n")
            except OSError as error:
                layers.warn_once(
                    f"quarantine {self._path}",
                    f"mla_jit could not write to {self._path}: {error.strerror or error}. This process alone remembers "
                    "the candidates that ended a worker.",
                )


def _records(lines: Sequence[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["status"] in FAULTS:
                yield str(row["key"]), (row["status"], str(row["note"]))


@dataclass
class _Slot:
    """A device's place: one candidate at a time."""

    device: str
    worker: Worker | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def retire(self) -> None:
        """Ends the worker; the next request gets a fresh one."""
        if self.worker is not None:
            self.worker.end()
            self.worker.release()
            self.worker = None


def _end_all(slots: Sequence[_Slot]) -> None:
    """Ends all workers; the threads that wait for one see it."""
    for slot in slots:
        if (worker := slot.worker) is not None:
            worker.end()
    for slot in slots:
        if slot.lock.acquire(timeout=5.0):
            slot.retire()
            slot.lock.release()


class Pool:
    """A worker process a device, started by the first `measure` on it. A context manager; `close` ends them all.

    devices: "cuda:0" … (as this process numbers them), "cpu", or fake ones, "null:0" …; each once.
    target: a row of configs/targets.yaml, instead of what the device is; a fake device needs one.
    environment: variables for the workers beside this process's own. They have its settings, but that they compile on a
    miss, and in their own process, whatever those say.
    timer: "module:function" that gives the times instead of a clock (see Timer); a fake device needs one.
    setup: "module:function" that each worker calls before it is ready: there variants and toolchains of one's own are
    registered, as they are in this process.
    quarantine: a file of JSON lines in which candidates that ended a worker are remembered across processes. Delete
    a line, or the file, to try one again.

    A fault of the code (an illegal access, a compiler that aborts or does not end, a check that does not end) is
    remembered by source hash; one that may be due to the sizes (memory, a slow call, an unexplained end) for this
    problem and config alone.
    """

    def __init__(
        self, devices: Sequence[str], *, target: str | None = None, environment: Mapping[str, str] | None = None,
        timer: str | None = None, setup: str | None = None, quarantine: Path | None = None,
    ):  # fmt: skip
        for device in devices:
            if _DEVICE.fullmatch(device) is None or list(devices).count(device) > 1:
                raise InvalidInput(f"devices are {list(devices)}; name each once, as cuda:0, cpu or null:0")
            if device.startswith("null") and (target is None or timer is None):
                raise InvalidInput(f"{device} is a fake device; give a target to compile for and a timer")
        self._target, self._environment = target, dict(environment or {})
        self._hooks = {"timer": timer} | ({"setup": setup} if setup is not None else {})
        self._slots = {device: _Slot(device) for device in devices}
        self._quarantine = _Quarantine(quarantine)
        self._closed, self._lock = False, threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, list(self._slots.values()))  # at exit, too

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def measure(self, device: str, problem: Tunable, config: Config, *, rounds: int = 7, window_ms: float = 3.0,
                timeout_s: float = 60.0, prepare_s: float = PREPARE_S) -> Measurement:  # fmt: skip
        """Measures a candidate on a device of the pool and blocks until it is; threads may ask at once.

        rounds, window_ms: how many times, and for how long each, it is timed. timeout_s: after this it is killed and
        has the status "hang"; a worker's start and a problem's inputs and reference, which may take `prepare_s`, do not
        count.
        Raises nothing for a bad candidate: InvalidInput for no device of the pool, MlaJitError if the pool is closed or
        the device's worker cannot be started, TimeoutError after a `prepare_s` of the caller's.
        """
        if (slot := self._slots.get(device)) is None:
            raise InvalidInput(f"{device!r} is no device of this pool; it has {', '.join(self._slots)}")
        request = {
            "problem": problem.fields(), "config": config.to_json(), "rounds": rounds, "window_ms": window_ms,
            "timeout_s": timeout_s, "prepare_s": prepare_s,
        }  # fmt: skip
        with slot.lock:
            reply = self._reply(slot, request | {"known": self._quarantine.faults()})
            if reply.doubtful:
                self._remember(problem, config, device, reply)
            return reply.measurement

    def start(self, device: str) -> None:
        """Starts the device's worker, if there is none, and does not wait until it is ready."""
        slot = self._slots[device]
        with slot.lock:
            self._worker(slot)

    def versions(self, device: str) -> dict[str, str]:
        """ "torch" and "driver" of a device, as far as there are any; {} before its first `measure`."""
        worker = self._slots[device].worker
        return {} if worker is None else dict(worker.versions)

    def _reply(self, slot: _Slot, request: dict[str, Any]) -> Reply:
        while True:
            worker = self._worker(slot)
            try:
                worker.wait_ready()
                reply = worker.ask(request)
            except BaseException:
                slot.retire()
                self._check_open()  # `close` ended it
                raise
            if reply is not None and not reply.doubtful:
                return reply
            slot.retire()
            self._check_open()
            if reply is not None:
                return reply

    def _worker(self, slot: _Slot) -> Worker:
        """The slot's worker, a fresh one where it has ended."""
        with self._lock:
            self._check_open()
            if slot.worker is not None and not slot.worker.alive():
                slot.retire()
            if slot.worker is None:
                slot.worker = Worker(*self._start(slot.device))
            return slot.worker

    def _start(self, device: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What a worker is told, and its environment: one GPU, which it knows as the first, or none."""
        kind, _, index = device.partition(":")
        changed = {"mode": "serve", "safe_compile": False} | ({"target": self._target} if self._target else {})
        current = _as_environment(dataclasses.replace(settings.current(), **changed))  # type: ignore[arg-type]
        environment = settings.child_environment() | current | self._environment
        visible = _visible(int(index or 0)) if kind == "cuda" else ""
        environment |= {"CUDA_VISIBLE_DEVICES": visible, "HIP_VISIBLE_DEVICES": visible}
        return {"device": "cuda:0" if kind == "cuda" else device, **self._hooks}, environment

    def _remember(self, problem: Tunable, config: Config, device: str, reply: Reply) -> None:
        found = reply.measurement
        if found.source_hash and reply.phase != "preparing":
            of_code, of_sizes = quarantine_keys(found.source_hash, problem, config)
            code = found.status in ("illegal_access", "compiler_abort")
            code |= found.status == "hang" and reply.phase != "timing"
            self._quarantine.add(of_code if code else of_sizes, problem, config, device, found)

    def _check_open(self) -> None:
        if self._closed:
            raise MlaJitError("the pool of workers is closed; make another")

    def close(self) -> None:
        """Ends all workers; a `measure` in another thread raises MlaJitError. May be called again."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Pool:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_environment(current: settings.Settings) -> dict[str, str]:
    """The variables from which a process gets these settings, whatever else its environment has."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return os.pathsep.join(map(str, value))
        return "" if value is None else str(value)

    return {f"MLA_JIT_{f.name.upper()}": text(getattr(current, f.name)) for f in dataclasses.fields(current)}


def _visible(index: int) -> str:
    """What a worker must have in CUDA_VISIBLE_DEVICES to see the GPU that is number `index` here, alone."""
    import torch

    devices = torch.cuda._parse_visible_devices()
    if index >= len(devices):
        raise InvalidInput(f"cuda:{index} is not among the {len(devices)} devices that this process may see")
    return str(devices[index])
