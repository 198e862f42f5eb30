"""What several test files share: verbs of mla-tune as a user calls them, programs under Triton's interpreter, and the
processes that are ours."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mla_jit.cli import main


def invoke(*arguments: object, code: int = 0) -> str:
    """What `mla-tune` prints, to both streams; it must end with this exit code."""
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


def invoke_json(*arguments: object, code: int = 0) -> Any:
    """The document that it prints with --json."""
    done = CliRunner().invoke(main, [*(str(a) for a in arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def children() -> set[int]:
    """Processes whose parent we are, zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


@functools.cache
def _forking() -> subprocess.Popen[str]:
    """forked.py, one for this process."""
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, "-W", "ignore", str(tests / "forked.py")]
    server = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)  # with what it runs: the group has no other members
        server.wait()


def parameters(session: pytest.Session, file: str) -> list[dict[str, Any]]:
    """Of the tests of one file that this session runs: another file may call something else so."""
    return [item.callspec.params for item in session.items if hasattr(item, "callspec") and item.path == Path(file)]


def interpreted(program: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """One of tests/*.py that have a `main`, in a process of its own in which Triton is imported as an interpreter."""
    server = _forking()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory(prefix="mla_jit-interpreted-") as root:
        files = {name: str(Path(root, name)) for name in ("stdout", "stderr")}
        server.stdin.write(json.dumps({"program": program, "arguments": arguments, **files}) + "\n")
        server.stdin.flush()
        ready, *_ = select.select([server.stdout], [], [], timeout)
        status = server.stdout.readline() if ready else ""
        if not status:
            _end(server)
            _forking.cache_clear()
        out, err = (Path(file).read_text() if Path(file).exists() else "" for file in files.values())
        if not ready:
            raise subprocess.TimeoutExpired([program, *arguments], timeout, out, err)
        assert status, f"the process that runs {program} has ended: {err[-2000:]}"
        return subprocess.CompletedProcess([program, *arguments], int(status), out, err)
