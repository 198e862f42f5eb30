"""Runs a compiler: in this process, or in a child that may abort, be killed or hang at no cost to the caller.

The child is spawned (`python -m mla_jit.compile.child`), never forked, and cannot import torch. It gets requests as
lines of JSON on stdin and answers each on stdout with a line of JSON and the binary. Nothing goes through files, so a
full disk is no reason to fail; what compilers print goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import signal
import site
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mla_jit import errors, settings
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.talk import Child
from mla_jit.errors import CompileError, CompilerAborted, MlaJitError

_LOG_CHARS = 1 << 16  # of a compiler's output that an error carries
_USEFUL = re.compile(r"error|assert|fatal|abort|terminate|unsupported|exceed|failed", re.IGNORECASE)


def compile_here(source: Source, module: str) -> Artifact:
    """`module`'s compile_source(source), its result checked to be for this source and plain JSON data.

    Any failure is a CompileError with the key; errors of mla_jit pass as they are.
    """
    try:
        artifact = importlib.import_module(module).compile_source(source)
        if artifact.key != source.key:
            raise TypeError(f"{module} returned an artifact for the key {artifact.key!r}")
        # As a later process will read it (tuples are lists), whichever way it comes.
        return Artifact.from_manifest(json.loads(json.dumps(artifact.manifest())), artifact.binary)
    except MlaJitError:
        raise
    except Exception as error:
        raise _failure(source, f"{type(error).__name__}: {_first_useful(str(error))}", str(error)) from error


def compile_apart(source: Source, module: str) -> Artifact:
    """`compile_here` in a child process, killed after the setting compile_timeout_s. CompileError however it ends."""
    with Compiler() as compiler:
        return compiler(source, module)


class Compiler:
    """A child process that compiles one source after the other; a fresh one is started when it has ended.

    For one thread at a time. A context manager; `close` ends the child.
    """

    def __init__(self) -> None:
        self._child: Child | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, source: Source, module: str) -> Artifact:
        """As `compile_apart`."""
        timeout_s = settings.current().compile_timeout_s
        request = {"source": source.to_json(), "module": module, "timeout_s": timeout_s}
        child = self._started(source)
        child.forget_printed()
        child.say(request)
        deadline = time.monotonic() + timeout_s
        try:
            answer = child.hear(deadline)
            binary = child.hear_bytes(answer.get("size", 0), deadline) if answer else b""
        except TimeoutError:
            child.end()
            log = child.printed()
            self.close()
            hint = f"; the limit is MLA_JIT_COMPILE_TIMEOUT_S, now {timeout_s:g} s"
            what = f"the compiler did not end and was killed: {_first_useful(log)}{hint}"
            raise _failure(source, what, log, CompilerAborted) from None
        except BaseException:
            self.close()
            raise
        status = 0
        if answer is None:
            status = child.end(patience_s=5.0)
        log = child.printed()
        if answer is None:
            self.close()
        return _answer(source, status, answer or {}, binary, log)

    def _started(self, source: Source) -> Child:
        if self._child is not None and self._child.alive():
            return self._child
        self.close()
        env = _environment()
        with contextlib.suppress(OSError):  # what a killed compiler leaves behind goes with this
            self._scratch = tempfile.TemporaryDirectory(prefix="mla_jit-child-", ignore_cleanup_errors=True)
            env["TMPDIR"] = self._scratch.name
        cwd = _working_directory()
        command = [sys.executable or "python3", "-m", "mla_jit.compile.child"]
        try:  # `-m` would import from our directory; the child goes there afterwards
            self._child = Child(command, env, "/")
        except OSError as error:
            raise _failure(source, f"no compiling child could be started: {error}") from error
        self._child.say({"path": [os.path.join(cwd, path) for path in sys.path], "cwd": cwd})
        return self._child

    def kill(self) -> None:
        """Ends the child from another thread; a call that waits for it raises CompilerAborted."""
        if (child := self._child) is not None:
            child.end()

    def close(self) -> None:
        """Ends the child, and what it has started."""
        child, self._child = self._child, None
        scratch, self._scratch = self._scratch, None
        if child is not None:
            child.end()
            child.release()
        if scratch is not None:
            scratch.cleanup()

    def __enter__(self) -> Compiler:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(source: Source, status: int, answer: dict[str, Any], binary: bytes, log: str) -> Artifact:
    """The artifact, or the error, that a child has sent; the error of one that ended with this status without."""
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        kind = kind if issubclass(kind, CompileError) else CompileError
        raise kind(answer["message"], key=source.key, log=answer["log"] or log[-_LOG_CHARS:])
    if "manifest" in answer:
        artifact = Artifact.from_manifest(answer["manifest"], binary)
        if artifact.sha256 == answer["manifest"]["sha256"]:
            return artifact
    how = f"ended with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"
    raise _failure(source, f"the compiler {how}: {_first_useful(log)}", log, CompilerAborted)


def _failure(source: Source, what: str, log: str = "", kind: type[CompileError] = CompileError) -> CompileError:
    return kind(
        f"{source.name} for {source.isa} was not compiled, {what} (key {source.key}). "
        "Choose another config or variant for this problem.",
        key=source.key,
        log=log[-_LOG_CHARS:],
    )


def _first_useful(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if _USEFUL.search(line)), lines[0] if lines else "it printed nothing")[:500]


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _environment() -> dict[str, str]:
    """With which the child finds this very mla_jit, until it has our sys.path."""
    env = settings.child_environment()
    home = str(Path(__file__).resolve().parents[2])
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    if home not in map(os.path.realpath, installed):  # site-packages must not come before the standard library
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), home]))
    return env


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed under us
        return "/"


def main() -> None:
    """The child's side: our sys.path and directory on stdin, then requests; the answers go to what stdout was."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    start = json.loads(sys.stdin.readline())
    sys.path[:] = start["path"]
    with contextlib.suppress(OSError):
        os.chdir(start["cwd"])
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail: 1.7 s and a CUDA context for nothing
    with open(answer_fd, "wb") as out:
        while line := sys.stdin.readline():
            request = json.loads(line)
            # Dies even when the parent, who would kill it, is gone and a C++ loop holds the interpreter.
            signal.alarm(min(math.ceil(request["timeout_s"]) + 5, 1 << 30))
            answer, binary = _compiled(request)
            signal.alarm(0)
            sys.stderr.flush()
            out.write(json.dumps({**answer, "size": len(binary)}).encode() + b"\n" + binary)
            out.flush()
    os._exit(0)  # a compiler's static destructors may abort, and have nothing to say


def _compiled(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    try:
        artifact = compile_here(Source.from_json(request["source"]), request["module"])
        return {"manifest": artifact.manifest()}, artifact.binary
    except MlaJitError as error:
        return {"error": type(error).__name__, "message": str(error), "log": getattr(error, "log", "")}, b""


if __name__ == "__main__":
    main()
