"""`Child`: a process that is talked to in JSON lines, and may abort, be killed or hang at no cost but its own.

It is spawned in a session of its own, so that a kill reaches what it has started; what it prints to stderr is kept, the
end of it. Knows nothing of what is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Any

_LOG_BYTES = 1 << 16  # of its stderr that are kept


class Child:
    """A child process, seen from its parent. For one thread at a time, but for `end`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], cwd: str | None = None):
        """OSError if it cannot be started."""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._lock = threading.Lock()
        self._out, self._log = b"", b""
        self._selector = selectors.DefaultSelector()
        self._stdout, self._stderr = self.process.stdout.fileno(), self.process.stderr.fileno()
        for fd in (self._stdout, self._stderr):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)

    def alive(self) -> bool:
        """Whether it runs; the status of one that has ended is left for `end`."""
        with self._lock:
            return self.process.returncode is None and not self._ended()

    def say(self, message: dict[str, Any]) -> None:
        """Sends a line; nothing is raised if it has ended: the answer tells."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any] | None:
        """Its next line; None when it has ended, or says what is no JSON. Raises TimeoutError."""
        while b"\n" not in self._out:
            if not self._more(deadline):
                return None
        line, _, self._out = self._out.partition(b"\n")
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            return None
        return message

    def hear_bytes(self, count: int, deadline: float) -> bytes:
        """What follows a line; less if it has ended. Raises TimeoutError."""
        while len(self._out) < count and self._more(deadline):
            pass
        data, self._out = self._out[:count], self._out[count:]
        return data

    def printed(self) -> str:
        """The end of what it has printed to stderr since `forget_printed`."""
        with contextlib.suppress(OSError):  # BlockingIOError: that was all
            while self._take():
                pass
        return self._log.decode(errors="replace")

    def forget_printed(self) -> None:
        self.printed()
        self._log = b""

    def end(self, patience_s: float = 0.0) -> int:
        """Kills it and all of its session, unless it ends by itself within `patience_s`; the return code."""
        with self._lock:
            if self.process.returncode is None:
                deadline = time.monotonic() + patience_s
                while not self._ended() and time.monotonic() < deadline:
                    time.sleep(0.005)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver; it goes when that lets it
                    self.process.wait(30.0)
            return -signal.SIGKILL if self.process.returncode is None else self.process.returncode

    def release(self) -> None:
        """Closes the pipes of one that was ended."""
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _ended(self) -> bool:
        """Whether it has, its status left to be read: until then nobody else can have its process id."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _more(self, deadline: float) -> bool:
        """Waits for output; False when there will be no more."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        ready = [key.fd for key, _ in self._selector.select(left)]
        if self._stderr in ready and not self._take():
            self._selector.unregister(self._stderr)
        if self._stdout in ready:
            data = os.read(self._stdout, 1 << 20)
            self._out += data
            return bool(data)
        return True

    def _take(self) -> bytes:
        data = os.read(self._stderr, 1 << 16)
        self._log = (self._log + data)[-_LOG_BYTES:]
        return data
