"""A worker: the process that measures candidates on one device, and its handle in the parent.

It is spawned (a new interpreter, in a session of its own), never forked; it gets requests as JSON lines on stdin and
says on stdout which phase it is in and how that ended; what compilers print goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import queue
import re
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import launch
from mla_jit.compile.talk import Child
from mla_jit.config import Config
from mla_jit.errors import MlaJitError
from mla_jit.tuning.candidate import ILLEGAL, MEMORY, Timer, attempt, place_of
from mla_jit.tuning.rows import PROBLEMS, Measurement

_START_S = 180.0  # that a worker may take to start: an import of torch, a context
PREPARE_S = 300.0  # that a problem's inputs and reference may take; no candidate's fault

# ------------------------------------------------------------------------------------------------------ in the worker


def main() -> None:
    """The worker: a line of JSON on stdin says what it is, each other line is a request; it ends when stdin does."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of a process with a CUDA context has gigabytes
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def say(phase: str, **found: Any) -> None:
        answer.write(json.dumps({"phase": phase, **found}) + "\n")
        answer.flush()

    start = json.loads(sys.stdin.readline())
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    device: str = start["device"]
    try:
        timer = _open(start)
    except Exception as error:
        say("failed", note=f"{type(error).__name__}: {error}")
        os._exit(1)
    say("ready", versions=_versions(device))
    while True:
        request = json.loads(requests.get())
        # Should the parent be stopped, and a C++ loop hold the interpreter.
        signal.alarm(min(math.ceil(request["timeout_s"] + PREPARE_S) + 60, 1 << 30))
        say("resolving")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["problem"].items()}
        problem, config = PROBLEMS[fields["op"]](**fields), Config.from_json(request["config"])
        measurement, doubtful = attempt(
            problem, config, device, request["rounds"], request["window_ms"], timer, request["known"], say
        )
        signal.alarm(0)
        say("done", measurement=measurement.to_json(), doubtful=doubtful)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Ends the process, and the assemblers it may have started, when its parent is gone or done with it."""
    for line in sys.stdin:
        requests.put(line)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _versions(device: str) -> dict[str, str]:
    """Of torch and of the driver, as far as the device has them."""
    if device.startswith("null"):
        return {}
    import torch

    found = {"torch": str(torch.__version__)}
    if device.startswith("cuda"):
        with contextlib.suppress(OSError, IndexError):  # "NVRM version: NVIDIA UNIX … Kernel Module  580.95.05  …"
            text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
            found["driver"] = re.findall(r"\b\d+\.\d[\d.]*\b", text)[0]
    return found


def _open(start: dict[str, Any]) -> Timer | None:
    """Makes this process the worker of a device. The timer, if there is one."""
    if start["device"].startswith("null"):
        launch.override(launch.runtime("null"))
    else:
        import torch

        if start["device"].startswith("cuda"):
            torch.zeros(1, device=start["device"])
    place_of(start["device"])
    if "setup" in start:
        _named(start["setup"])()
    if start["timer"] is None:
        return None
    timer: Timer = _named(start["timer"])
    return timer


def _named(what: str) -> Any:
    """The object behind "module:name"."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------------------------------- in the parent


@dataclass(frozen=True)
class Reply:
    """What a request came to. `doubtful`: the worker is gone or not to be used again. `phase`: the last it was in."""

    measurement: Measurement
    doubtful: bool
    phase: str


class Worker(Child):
    """A worker process, seen from its parent. For one thread at a time, but for `end`."""

    def __init__(self, start: dict[str, Any], environment: dict[str, str]):
        cwd = os.getcwd()
        command = "import sys; sys.path[:] = sys.argv[1:]; from mla_jit.tuning.worker import main; main()"
        super().__init__(
            [sys.executable, "-c", command, *(os.path.join(cwd, path) for path in sys.path)], environment
        )  # fmt: skip
        self._ready = False
        self.versions: dict[str, str] = {}  # of torch and the driver, once it is ready
        self.say(start)

    def wait_ready(self) -> None:
        """Raises MlaJitError if it does not start."""
        if self._ready:
            return
        try:
            message = self.hear(time.monotonic() + _START_S) or {}
            note = message.get("note", "it ended")
        except TimeoutError:
            message, note = {}, f"it took more than {_START_S:g} s"
        if message.get("phase") != "ready":
            self.end(1.0)
            line = _telling(self.printed())
            raise MlaJitError(f"no worker could be started, {note}{f' ({line})' if line else ''}; see that the device "
                              "is there and free, and that torch imports with the same interpreter")  # fmt: skip
        self._ready, self.versions = True, message.get("versions", {})

    def ask(self, request: dict[str, Any]) -> Reply | None:
        """What a request comes to. None if the process had ended before it.

        TimeoutError if preparing takes longer than a "prepare_s" of the request.
        """
        self.forget_printed()
        self.say(request)
        timeout_s = left = request["timeout_s"]
        prepare_s = min(PREPARE_S, request.get("prepare_s", PREPARE_S))
        deadline, phase = time.monotonic() + timeout_s, ""
        found: dict[str, Any] = {}
        while True:
            try:
                message = self.hear(deadline)
            except TimeoutError:
                self.end()
                status, note = "hang", f"killed after {timeout_s:g} s, while {phase or 'resolving'}"
                if phase == "preparing" and prepare_s < PREPARE_S:
                    raise TimeoutError(f"inputs and reference take more than {prepare_s:g} s") from None
                if phase == "preparing":
                    status, note = (
                        "error",
                        f"inputs and reference took more than {PREPARE_S:g} s; take a smaller shape",
                    )
                return Reply(Measurement(status, note=note, **found), True, phase)
            if message is None:
                code = self.end(patience_s=5.0)
                if not phase:
                    return None
                status, note = _verdict(phase, code, self.printed())
                return Reply(Measurement(status, note=note, **found), True, phase)
            if phase == "preparing":
                deadline = time.monotonic() + left
            if message["phase"] == "preparing":
                left = deadline - time.monotonic()
                deadline = time.monotonic() + prepare_s
            if message["phase"] == "done":
                return Reply(Measurement.from_json(message["measurement"]), message["doubtful"], phase)
            phase = message.pop("phase")
            found |= message


def _verdict(phase: str, code: int, log: str) -> tuple[str, str]:
    """(status, note) of a candidate whose process ended with this return code in this phase."""
    how = f"with status {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(-code).name}"
    note = f"the process was ended {how} while {phase}: {_telling(log) or 'it printed nothing'}"
    if phase == "compiling":
        return "compiler_abort", note
    if ILLEGAL.search(log) or -code in (signal.SIGSEGV, signal.SIGBUS):
        return "illegal_access", note
    return "out_of_memory" if MEMORY.search(log) else "error", note


def _telling(log: str) -> str:
    """The line of a log that tells most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [n for n in lines if ILLEGAL.search(n) or MEMORY.search(n)]
    telling = telling or [n for n in lines if re.search(r"error|assert|fatal|abort", n, re.IGNORECASE)]
    return (telling or lines[-1:] or [""])[-1][:300]
