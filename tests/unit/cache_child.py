"""What the cache's tests share: a toolchain without a compiler, scenarios that run in processes of their own, helpers.

As a toolchain it makes predictable bytes and does what the source's content says ("sleep 0.5", "abort", …); each
compile appends a line to $FAKE_LOG, so that they are counted from outside the library. As a program it runs a scenario
(`python cache_child.py SCENARIO JSON`) and prints a line of JSON. It imports neither torch nor triton nor pytest.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from mla_jit import settings
from mla_jit.compile import cache, triton
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.errors import IllegalArtifact, MlaJitError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# ------------------------------------------------------------------------------------------------------- the toolchain


def source_of(content: str, **changes: Any) -> Source:
    fields = {"name": "fake_kernel", "toolchain": "fake", "toolchain_version": "1", "isa": "sm_90a", "content": content}
    return Source(**(fields | changes))


def binary_of(source: Source) -> bytes:
    """20,000 bytes that only this source has."""
    return b"".join(hashlib.sha256(f"{source.key} {i}".encode()).digest() for i in range(625))


def artifact_of(source: Source) -> Artifact:
    return Artifact(
        key=source.key, name=source.name, isa=source.isa, entry=f"entry_{source.content.split()[0]}",
        binary=binary_of(source), threads=128, smem_bytes=4096, registers=64, spill_bytes=0,
        extra={"boxes": [[64, 512], [64, 64]]}, provenance={"compiler": "fake 1"}, compile_seconds=0.125,
    )  # fmt: skip


def compile_source(source: Source) -> Artifact:
    if log := os.environ.get("FAKE_LOG"):
        with open(log, "a") as file:  # O_APPEND: whole lines from many processes
            file.write(f"{source.key} {os.getpid()}\n")
    verb, _, rest = source.content.partition(" ")
    artifact = artifact_of(source)
    if verb == "sleep":
        time.sleep(float(rest))
    elif verb == "raise":
        raise ValueError(f"note: nothing\nerror: {rest}")
    elif verb == "illegal":
        raise IllegalArtifact(f"spills {rest}", key=source.key, log="ptxas info: spilled")
    elif verb == "abort":
        os.write(2, b"loading passes\npython: WarpSpecialize.cpp:42: Assertion `one consumer' failed.\n")
        os.abort()
    elif verb == "hang":  # with a child of its own that holds the pipes, as ptxas would
        subprocess.Popen(["sleep", "600"])
        tempfile.mkdtemp()
        os.write(2, b"error: the register allocator thinks\n")
        time.sleep(600)
    elif verb == "exit":
        os._exit(3)
    elif verb == "chatter":
        os.write(1, b'{"manifest": 1}\n' * 20_000)
        sys.stdout.write("compiler says hello\n")
    elif verb == "torch":
        import torch  # noqa: F401
    elif verb == "where":
        artifact.provenance.update(
            pid=os.getpid(), modules=sorted(sys.modules), cwd=os.getcwd(), tempdir=tempfile.gettempdir()
        )
    elif verb == "otherkey":
        return artifact_of(source_of("something else"))
    elif verb == "tuples":
        artifact.extra.update(box=(64, 512))
    return artifact


def triton_source(path: Path) -> Source:
    """For the real Triton: the function `kernel` of a file, which need not be importable before it is compiled."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    knobs = tuple((f"env:{name}", value) for name, value in settings.compiler_knobs())
    return Source(
        name=path.stem, toolchain="triton", toolchain_version=triton.version(), isa="sm_90a",
        content=triton.closure(str(path), "kernel"), constants=(("BLOCK", 64),),
        signature=(("x_ptr", "*fp32:16"), ("length", "i32")),
        options=(("arch", 90), ("backend", "cuda"), ("num_warps", 4), ("warp_size", 32), *knobs),
        locator=f"{path.stem}:kernel",
    )  # fmt: skip


# ------------------------------------------------------------------------------------- helpers of the tests themselves


def environment(home: Path, **more: str) -> dict[str, str]:
    """Without settings and caches of the user, with this checkout."""
    drop = ("MLA_JIT_", "XDG_", "TRITON_", "FAKE_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    return env | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)} | more


def start(env: dict[str, str], scenario: str, **arguments: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE / "cache_child.py"), scenario, json.dumps(arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> dict[str, Any]:
    """What the scenario printed; AssertionError with its stderr when it did not end well."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"hangs: {process.communicate()}") from None
    assert process.returncode == 0, (process.returncode, err.decode())
    return json.loads(out)


def run(env: dict[str, str], scenario: str, **arguments: Any) -> dict[str, Any]:
    return finish(start(env, scenario, **arguments))


def say(value: Any) -> None:
    """A line of JSON on stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


# ------------------------------------------------------------------------------------------------------- the scenarios


def build(contents: list[str], *, barrier: str = "", kernel: str = "", tempdir: str = "", **changes: Any) -> list[Any]:
    """Builds each content, or the Triton kernel in a file; what came, from where, in which time. First the barrier."""
    if changes:
        settings.configure(**changes)
    if tempdir:
        tempfile.tempdir = tempdir
    sources = [source_of(content) for content in contents]
    if kernel:
        sources.append(triton_source(Path(kernel)))
    if barrier:
        Path(barrier, f"ready-{os.getpid()}").touch()
        wait_for(Path(barrier, "go").exists)
    return [_outcome(source) for source in sources]


def _outcome(source: Source) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        artifact, origin = cache.build_traced(source)
    except MlaJitError as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - begin}
    seconds = time.monotonic() - begin
    return {"origin": origin, "sha256": artifact.sha256, "entry": artifact.entry, "seconds": seconds}


def build_as_nobody(contents: list[str], uid: int, **changes: Any) -> list[Any]:
    """As `build`, without root's power over permission bits."""
    if os.geteuid() == 0:
        importlib.import_module("cache_child")  # nobody may have no way to the checkout
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    return build(contents, **changes)


def churn(contents: list[str], seed: int) -> None:
    """Builds, forgets, clears and collects until it is killed."""
    say("started")
    for turn in range(seed, 1 << 30):
        cache.build(source_of(contents[turn * 7 % len(contents)]))
        cache.forget()
        if turn % 5 == 0:
            cache.clear()
        if turn % 11 == 0:
            cache.gc(max_bytes=50_000)


def clear_until(stop: str) -> dict[str, int]:
    """Removes entries as others build them, until the file `stop` is there."""
    removed = {"clear": 0, "gc": 0}
    while not Path(stop).exists():
        removed["clear"] += cache.clear()
        time.sleep(0.001)
        removed["gc"] += len(cache.gc(max_bytes=0, staging_age_s=0.5).entries)
    return removed


def fork_while_compiling(content: str) -> dict[str, Any]:
    """A thread compiles (and so holds both of its locks); meanwhile fork; the child wants the same key."""
    thread = threading.Thread(target=cache.build, args=(source_of(content),))
    thread.start()
    wait_for(lambda: os.path.exists(os.environ["FAKE_LOG"]))
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        both = [_outcome(source_of(content)), _outcome(source_of("built in the child"))]
        os.write(write, json.dumps(both).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        outcomes = json.loads(file.read())
    status = os.waitpid(pid, 0)[1]
    thread.join()
    return {"child": outcomes, "status": status, "parent": _outcome(source_of(content))}


def fork_and_die_compiling(content: str) -> None:
    """As above, but the child only sleeps, and the parent is killed while it holds the lock."""
    threading.Thread(target=cache.build, args=(source_of(content),)).start()
    wait_for(lambda: os.path.exists(os.environ["FAKE_LOG"]))
    if (pid := os.fork()) == 0:
        os.close(1)  # whoever reads our stdout waits for the parent only
        os.close(2)
        time.sleep(20)
        os._exit(0)
    say(pid)
    os.kill(os.getpid(), signal.SIGKILL)


def fork_after_use(content: str) -> dict[str, Any]:
    """The child of a process that has used the cache uses it, and has a child that does."""
    before = _outcome(source_of(content))
    read, write = os.pipe()
    if os.fork() == 0:
        first = [_outcome(source_of(content)), _outcome(source_of("in the child"))]
        if os.fork() == 0:
            second = [_outcome(source_of("in the child")), _outcome(source_of("in the grandchild"))]
            os.write(write, json.dumps([first, second]).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        return {"before": before, "descendants": json.loads(file.read())}


def main() -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mla_jit").addHandler(handler)
    cache.register_toolchain("fake", "cache_child")
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    say({"result": result, "warnings": records, "root": str(cache.root()), "torch": "torch" in sys.modules})


if __name__ == "__main__":
    main()
