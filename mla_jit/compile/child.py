"""Runs a compiler: in this process, or in a child that may abort, be killed or hang at no cost to the caller.

The child is spawned (`python -m mla_jit.compile.child`), never forked, and cannot import torch. It gets a request as
JSON on stdin and answers on stdout with a line of JSON and the binary. Nothing goes through files, so a full disk is no
reason to fail; what compilers print goes to stderr.
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
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mla_jit import errors, settings
from mla_jit.compile.artifact import Artifact, Source
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
    env = _environment()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # what a killed compiler leaves behind goes with this
            scratch = tempfile.TemporaryDirectory(prefix="mla_jit-child-", ignore_cleanup_errors=True)
            env["TMPDIR"] = stack.enter_context(scratch)
        return _run(source, module, env)


def _run(source: Source, module: str, env: dict[str, str]) -> Artifact:
    timeout_s = settings.current().compile_timeout_s
    cwd = _working_directory()
    paths = [os.path.join(cwd, path) for path in sys.path]
    request = {"source": source.to_json(), "module": module, "path": paths, "cwd": cwd, "timeout_s": timeout_s}
    try:
        process = subprocess.Popen(
            [sys.executable or "python3", "-m", "mla_jit.compile.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd="/",  # `-m` would import from ours; the child goes there afterwards
            start_new_session=True,  # so that a kill reaches the assembler it may have started
        )
    except OSError as error:
        raise _failure(source, f"no compiling child could be started: {error}") from error
    try:
        out, err = process.communicate(json.dumps(request).encode(), timeout_s)
    except subprocess.TimeoutExpired:
        log = _kill(process)
        hint = f"; the limit is MLA_JIT_COMPILE_TIMEOUT_S, now {timeout_s:g} s"
        what = f"the compiler did not end and was killed: {_first_useful(log)}{hint}"
        raise _failure(source, what, log, CompilerAborted) from None
    except BaseException:
        _kill(process)
        raise
    return _answer(source, process.returncode, out, err.decode(errors="replace"))


def _answer(source: Source, status: int, out: bytes, log: str) -> Artifact:
    """The artifact, or the error, that a child which ended with this status has sent."""
    head, _, binary = out.partition(b"\n")
    answer: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        answer = json.loads(head)
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


def _kill(process: subprocess.Popen[bytes]) -> str:
    """Kills the child and what it started; what it has printed."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.communicate(timeout=5.0)[1].decode(errors="replace")
    except (subprocess.TimeoutExpired, ValueError, OSError):  # something that left the session still has the pipes
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        return ""


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
    """The child's side: a request on stdin, the answer on what stdout was."""
    request = json.load(sys.stdin)
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    # Dies even when the parent, who would kill it, is gone and a C++ loop holds the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(min(math.ceil(request["timeout_s"]) + 5, 1 << 30))
    sys.path[:] = request["path"]
    with contextlib.suppress(OSError):
        os.chdir(request["cwd"])
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes its import fail: 1.7 s and a CUDA context for nothing
    binary = b""
    try:
        artifact = compile_here(Source.from_json(request["source"]), request["module"])
        answer: dict[str, Any] = {"manifest": artifact.manifest()}
        binary = artifact.binary
    except MlaJitError as error:
        answer = {"error": type(error).__name__, "message": str(error), "log": getattr(error, "log", "")}
    with open(answer_fd, "wb") as out:
        out.write(json.dumps(answer).encode() + b"\n" + binary)
    sys.stderr.flush()
    os._exit(0)  # a compiler's static destructors may abort, and have nothing to say


if __name__ == "__main__":
    main()
