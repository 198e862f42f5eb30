"""Compilers in child processes: a child is used for many sources, a bad one costs one, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cache_child import HERE, ROOT, artifact_of, environment, source_of, wait_for

from mla_jit import settings
from mla_jit.compile import cache, farm
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.child import Compiler
from mla_jit.compile.farm import Farm
from mla_jit.compile.talk import Child
from mla_jit.errors import CompileError, CompilerAborted, IllegalArtifact

# A toolchain that can be held: "wait NAME …" compiles when the file $GATES/NAME is there; the rest as cache_child does.
GATED = """
import os, time
import cache_child

def note(*words):
    with open(os.path.join(os.environ["GATES"], "log"), "a") as file:
        file.write(" ".join(map(str, (*words, os.getpid()))) + "\\n")

def compile_source(source):
    words = source.content.split()
    note("begin", source.content.replace(" ", "_"))
    while words[0] == "wait" and not os.path.exists(os.path.join(os.environ["GATES"], words[1])):
        time.sleep(0.002)
    artifact = cache_child.compile_source(source)
    note("end", source.content.replace(" ", "_"))
    return artifact
"""


class Gates:
    """What the toolchain's children wait for, and what they have begun and ended."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, name: str) -> None:
        (self.path / name).touch()

    def _lines(self, what: str) -> list[list[str]]:
        log = self.path / "log"
        lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [line for line in lines if line[0] == what]

    @property
    def begun(self) -> list[str]:
        """Contents in the order in which they were begun."""
        return [content.replace("_", " ") for _, content, _ in self._lines("begin")]

    @property
    def ended(self) -> list[str]:
        return [content.replace("_", " ") for _, content, _ in self._lines("end")]

    @property
    def pids(self) -> list[int]:
        """Of the children, by what was begun."""
        return [int(pid) for *_, pid in self._lines("begin")]


@pytest.fixture(autouse=True)
def gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    """The toolchain, an empty cache; afterwards no process, thread, descriptor or directory may be left."""
    for name in ("gates", "tmp", "modules"):
        (tmp_path / name).mkdir()
    (tmp_path / "modules" / "gated_toolchain.py").write_text(GATED)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("GATES", str(tmp_path / "gates"))
    monkeypatch.delenv("FAKE_LOG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    cache.register_toolchain("fake", "gated_toolchain")
    before = children(), descriptors()
    with settings.scope(cache_dir=tmp_path / "cache", compile_timeout_s=60.0):
        cache.forget()
        yield Gates(tmp_path / "gates")
    cache.forget()
    cache.register_toolchain("fake", "cache_child")  # as test_cache_faults.py has it
    wait_for(lambda: not compiling_threads(), 10.0)
    wait_for(lambda: children() <= before[0], 10.0)
    wait_for(lambda: descriptors() <= before[1], 10.0)
    assert list((tmp_path / "tmp").iterdir()) == []


def compiling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mla_jit-compile"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def stats() -> Iterator[tuple[int, list[str]]]:
    """(process, state and what follows it in /proc/PID/stat) of all processes."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), path.read_text().rpartition(")")[2].split()


def children() -> set[int]:
    """Processes whose parent we are, zombies too."""
    return {pid for pid, (_, parent, *_) in stats() if int(parent) == os.getpid()}


def living(session: int) -> list[int]:
    return [pid for pid, (state, _, _, found, *_) in stats() if int(found) == session and state not in "ZX"]


def ended(pid: int) -> bool:
    return all(found != pid or state in "ZX" for found, (state, *_) in stats())


def pids_of(futures: list[Future[farm.Result]]) -> list[int]:
    """Of the children that have compiled these "where" sources."""
    return [built(future).provenance["pid"] for future in futures]


def built(future: Future[farm.Result]) -> Artifact:
    result = future.result(30)
    assert not isinstance(result, Exception), result
    return result[0]


def failed(future: Future[farm.Result]) -> CompileError:
    result = future.result(30)
    assert isinstance(result, CompileError), result
    return result


# ------------------------------------------------------------------------------------------------------------- Compiler


def compile_by(compiler: Compiler, content: str) -> Artifact:
    return compiler(source_of(content), "gated_toolchain")


def test_a_child_compiles_one_source_after_the_other(tmp_path: Path) -> None:
    with Compiler() as compiler:
        found = [compile_by(compiler, f"where {i}") for i in range(4)]
        assert found == [artifact_of(source_of(f"where {i}")) for i in range(4)]
        (pid,) = {artifact.provenance["pid"] for artifact in found}
        assert pid in children()
        assert found[0].provenance["cwd"] == os.getcwd()
        assert Path(found[0].provenance["tempdir"]).parent == tmp_path / "tmp"
    assert ended(pid)


def test_a_child_has_no_torch() -> None:
    with Compiler() as compiler, pytest.raises(CompileError, match="torch"):
        compile_by(compiler, "torch")


def test_what_compilers_print_does_not_reach_the_answers() -> None:
    with Compiler() as compiler:
        for content in ("chatter", "where"):
            assert compile_by(compiler, content) == artifact_of(source_of(content))


@pytest.mark.parametrize(("content", "kind"), [("illegal 8 bytes", IllegalArtifact), ("raise no MMA", CompileError)])
def test_a_refusal_leaves_the_child_at_work(content: str, kind: type[CompileError]) -> None:
    with Compiler() as compiler:
        before = compile_by(compiler, "where 1")
        with pytest.raises(kind, match=content.partition(" ")[2]) as caught:
            compile_by(compiler, content)
        assert caught.value.key == source_of(content).key
        assert compile_by(compiler, "where 2").provenance["pid"] == before.provenance["pid"]


@pytest.mark.parametrize("content", ["abort", "exit", "hang"])
def test_a_child_that_ends_costs_its_source_and_the_next_gets_a_fresh_one(content: str, gates: Gates) -> None:
    with Compiler() as compiler:
        first = compile_by(compiler, "where 1").provenance["pid"]
        with settings.scope(compile_timeout_s=1.0), pytest.raises(CompilerAborted) as caught:
            compile_by(compiler, content)
        assert caught.value.key == source_of(content).key
        assert gates.pids == [first, first]
        assert living(first) == []  # nor what the compiler had started
        assert compile_by(compiler, "where 2").provenance["pid"] != first


def test_the_output_of_one_source_is_not_told_of_the_next() -> None:
    with Compiler() as compiler:
        with pytest.raises(CompilerAborted, match="one consumer"):
            compile_by(compiler, "abort")
        compile_by(compiler, "chatter")
        with pytest.raises(CompilerAborted, match="ended with status 3: it printed nothing"):
            compile_by(compiler, "exit")


def test_a_child_that_was_killed_between_two_sources_is_replaced() -> None:
    with Compiler() as compiler:
        first = compile_by(compiler, "where 1").provenance["pid"]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: ended(first))
        second = compile_by(compiler, "where 2").provenance["pid"]
        assert second != first


def test_a_compiler_is_killed_from_another_thread(gates: Gates) -> None:
    with Compiler() as compiler, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(compile_by, compiler, "wait never")
        wait_for(lambda: gates.begun)
        compiler.kill()
        with pytest.raises(CompilerAborted, match="SIGKILL"):
            waiting.result(10)
        assert compile_by(compiler, "where") == artifact_of(source_of("where"))


def test_a_compiler_that_was_not_used_has_no_child() -> None:
    before = children()
    with Compiler() as compiler:
        compiler.kill()
        assert children() == before


# ----------------------------------------------------------------------------------------------------------------- Farm


def test_a_child_is_used_for_many_sources() -> None:
    with Farm(1) as compilers:
        futures = [compilers.submit(source_of(f"where {i}")) for i in range(5)]
        assert len(set(pids_of(futures))) == 1
        assert [future.result()[1] for future in futures] == ["compiled"] * 5  # type: ignore[index]


def test_so_many_compile_at_a_time(gates: Gates) -> None:
    with Farm(3) as compilers:
        futures = [compilers.submit(source_of(f"wait go {i}")) for i in range(7)]
        wait_for(lambda: len(gates.begun) == 3)
        time.sleep(0.3)
        assert len(gates.begun) == 3
        assert sum(future.running() for future in futures) == 3
        gates.open("go")
        assert [built(future) for future in futures] == [artifact_of(source_of(f"wait go {i}")) for i in range(7)]
        assert len(set(gates.pids)) == 3


def test_no_more_children_than_there_is_to_do() -> None:
    before = children()
    with Farm(8) as compilers:
        assert children() == before
        for i in range(3):  # one after the other
            built(compilers.submit(source_of(f"where {i}")))
        assert len(children() - before) == 1


def test_what_is_asked_for_comes_before_what_is_only_expected(gates: Gates) -> None:
    with Farm(1) as compilers:
        held = compilers.submit(source_of("wait go"))
        wait_for(lambda: gates.begun)
        expected = [compilers.submit(source_of(f"idle {i}"), idle=True) for i in range(3)]
        wanted = [compilers.submit(source_of(f"urgent {i}")) for i in range(3)]
        gates.open("go")
        for future in (held, *expected, *wanted):
            built(future)
    assert gates.begun == ["wait go", *(f"urgent {i}" for i in range(3)), *(f"idle {i}" for i in range(3))]


def test_what_was_expected_is_moved_up_when_it_is_asked_for(gates: Gates) -> None:
    with Farm(1) as compilers:
        compilers.submit(source_of("wait go"))
        wait_for(lambda: gates.begun)
        expected = [compilers.submit(source_of(f"idle {i}"), idle=True) for i in range(3)]
        assert compilers.submit(source_of("idle 2")) is expected[2]
        assert compilers.submit(source_of("idle 2"), idle=True) is expected[2]  # it does not go back
        gates.open("go")
        for future in expected:
            built(future)
    assert gates.begun == ["wait go", "idle 2", "idle 0", "idle 1"]


@pytest.mark.parametrize(("jobs", "most"), [(1, 1), (2, 1), (4, 3), (5, 4), (10, 8)])
def test_what_is_only_expected_takes_seven_eighths_at_most(jobs: int, most: int, gates: Gates) -> None:
    with Farm(jobs) as compilers:
        expected = [compilers.submit(source_of(f"wait go {i}"), idle=True) for i in range(jobs + 2)]
        wait_for(lambda: len(gates.begun) == most)
        time.sleep(0.3)
        assert len(gates.begun) == most
        if jobs > most:  # the rest is there for what is asked for, at once
            assert built(compilers.submit(source_of("where"))).name == "fake_kernel"
            time.sleep(0.1)
            assert len(gates.begun) == most + 1
        gates.open("go")
        for future in expected:
            built(future)


def test_what_is_asked_for_twice_is_compiled_once(gates: Gates) -> None:
    with Farm(2) as compilers:
        one, two = compilers.submit(source_of("wait go")), compilers.submit(source_of("wait go"))
        assert one is two is compilers.get(source_of("wait go"))
        assert compilers.get(source_of("other")) is None
        gates.open("go")
        built(one)
        assert compilers.submit(source_of("wait go"), idle=True) is one
        built(compilers.submit(source_of("last")))
    assert gates.begun == ["wait go", "last"]


def test_threads_that_ask_for_the_same_get_the_same(gates: Gates) -> None:
    start = threading.Barrier(8)

    def ask(thread: int) -> list[Future[farm.Result]]:
        start.wait()
        order = [(i + thread) % 10 for i in range(10)]
        found = {i: compilers.submit(source_of(f"kernel {i}"), idle=bool((i + thread) % 2)) for i in order}
        return [found[i] for i in range(10)]

    with Farm(2) as compilers, ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(ask, range(8)))
        assert all(futures == asked[0] for futures in asked)
        assert [built(future) for future in asked[0]] == [artifact_of(source_of(f"kernel {i}")) for i in range(10)]
    assert sorted(gates.begun) == [f"kernel {i}" for i in range(10)]


def test_what_the_cache_has_needs_no_child(gates: Gates) -> None:
    with Farm(1) as compilers:
        built(compilers.submit(source_of("where")))
    before = children()
    for origin in ("memory", "disk"):
        with Farm(1) as compilers:
            assert compilers.submit(source_of("where")).result(30)[1] == origin  # type: ignore[index]
            assert children() == before
        cache.forget()
    assert gates.begun == ["where"]


@pytest.mark.parametrize(
    ("content", "kind", "fresh"),
    [
        ("abort", CompilerAborted, True), ("exit", CompilerAborted, True), ("hang", CompilerAborted, True),
        ("illegal 8 bytes", IllegalArtifact, False), ("raise no MMA", CompileError, False),
        ("otherkey", CompileError, False),
    ],
)  # fmt: skip
def test_a_bad_source_costs_itself(content: str, kind: type[CompileError], fresh: bool, gates: Gates) -> None:
    with settings.scope(compile_timeout_s=2.0), Farm(1) as compilers:
        futures = [compilers.submit(source_of(text)) for text in ("where 1", content, "where 2", "where 3")]
        error = failed(futures[1])
        assert (type(error), error.key) == (kind, source_of(content).key)
        first, second, third = pids_of([futures[i] for i in (0, 2, 3)])
        assert (first != second, second) == (fresh, third)
        assert failed(compilers.submit(source_of(content))) is error  # asked for again: nothing is done
    assert len(gates.begun) == 4
    assert all(living(pid) == [] for pid in gates.pids)


def test_a_child_that_somebody_kills_costs_one_source(gates: Gates) -> None:
    with Farm(2) as compilers:
        futures = [compilers.submit(source_of(f"wait go {i}")) for i in range(4)]
        wait_for(lambda: len(gates.begun) == 2)
        victim = gates.begun[0]
        os.kill(gates.pids[0], signal.SIGKILL)
        wait_for(lambda: len(gates.begun) == 3)  # its place is taken
        gates.open("go")
        for i, future in enumerate(futures):
            if victim == f"wait go {i}":
                assert "SIGKILL" in str(failed(future))
            else:
                assert built(future) == artifact_of(source_of(f"wait go {i}"))


def test_an_unexpected_error_reaches_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.build_traced

    def build(source: Source, **more: Any) -> Any:
        if source.content == "strange":
            raise OSError("no descriptor left")
        return real(source, **more)

    monkeypatch.setattr(farm.cache, "build_traced", build)
    with Farm(1) as compilers:
        with pytest.raises(OSError, match="no descriptor"):
            compilers.submit(source_of("strange")).result(30)
        assert built(compilers.submit(source_of("where"))) == artifact_of(source_of("where"))


def test_closing_ends_what_runs_and_cancels_what_waits(gates: Gates) -> None:
    with Farm(2) as compilers, ThreadPoolExecutor(1) as pool:
        done = compilers.submit(source_of("done"))
        built(done)
        futures = [compilers.submit(source_of(f"wait never {i}"), idle=i == 4) for i in range(5)]
        wait_for(lambda: len(gates.begun) == 3)
        waiting = pool.submit(futures[-1].result)
        began = time.monotonic()
        compilers.close()
        with pytest.raises(CancelledError):
            waiting.result(10)
        for future in futures[:2]:
            assert isinstance(failed(future), CompilerAborted)
        assert time.monotonic() - began < 5.0
        assert all(future.cancelled() for future in futures[2:])
        assert built(done) == artifact_of(source_of("done"))
        assert all(living(pid) == [] for pid in gates.pids)
        compilers.close()  # again
        assert compilers.submit(source_of("late")).cancelled()
    assert not {"late", "wait never 2", "wait never 3", "wait never 4"} & set(gates.begun)
    assert not any(content.startswith("wait") for content in gates.ended)


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.003, 0.01])
def test_closing_meets_children_that_are_just_being_started(after_s: float, gates: Gates) -> None:
    compilers = Farm(2)
    futures = [compilers.submit(source_of(f"wait never {i}")) for i in range(4)]
    time.sleep(after_s)
    compilers.close()
    wait_for(lambda: not compiling_threads(), 5.0)
    for future in futures:
        assert future.cancelled() or isinstance(failed(future), CompilerAborted)


def test_an_unused_farm_closes_and_leaves_no_trace() -> None:
    before = children(), threading.active_count()
    with Farm(4):
        pass
    assert (children(), threading.active_count()) == before


def test_farms_side_by_side_compile_a_source_once(gates: Gates) -> None:
    with Farm(2) as one, Farm(2) as two:
        first = one.submit(source_of("wait go"))
        wait_for(lambda: gates.begun)
        second = two.submit(source_of("wait go"))
        gates.open("go")
        assert built(first) == built(second)
    assert gates.begun == ["wait go"]


# ------------------------------------------------------------------------------------------------------ ends of parents

PARENT = """
import os, sys, time
from cache_child import source_of
from mla_jit import settings
from mla_jit.compile import cache
from mla_jit.compile.farm import Farm

cache.register_toolchain("fake", "gated_toolchain")
compilers = Farm(2)
compilers.submit(source_of("where")).result()
running = [compilers.submit(source_of(f"wait never {i}")) for i in range(3)] if "busy" in sys.argv else []
while len(open(os.path.join(os.environ["GATES"], "log")).readlines()) < (4 if running else 2):
    time.sleep(0.01)
print("up", flush=True)
if "stay" in sys.argv:
    time.sleep(600)
"""


@contextlib.contextmanager
def parent(tmp_path: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a farm that it never closes, once its children are up."""
    env = environment(
        tmp_path, GATES=str(tmp_path / "gates"), MLA_JIT_CACHE_DIR=str(tmp_path / "other"),
        MLA_JIT_COMPILE_TIMEOUT_S="1", TMPDIR=str(tmp_path),
    )  # fmt: skip
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "modules"), str(ROOT), str(HERE)])
    process = subprocess.Popen([sys.executable, "-c", PARENT, *words], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("words", [(), ("busy",)], ids=["idle", "busy"])
def test_a_process_that_ends_without_closing_leaves_nothing(
    words: tuple[str, ...], tmp_path: Path, gates: Gates
) -> None:
    with parent(tmp_path, *words) as process:
        assert process.wait(10) == 0
        wait_for(lambda: all(living(pid) == [] for pid in gates.pids), 5.0)


@pytest.mark.parametrize("words", [("stay",), ("stay", "busy")], ids=["idle", "busy"])
def test_children_of_a_killed_parent_end(words: tuple[str, ...], tmp_path: Path, gates: Gates) -> None:
    """An idle one at once; one at work five seconds after it would have been killed."""
    with parent(tmp_path, *words) as process:
        assert any(living(pid) for pid in gates.pids)
        process.kill()
        wait_for(lambda: all(living(pid) == [] for pid in gates.pids), 15.0 if "busy" in words else 5.0)


# ----------------------------------------------------------------------------------------------------------------- talk


@contextlib.contextmanager
def talking(code: str) -> Iterator[Child]:
    child = Child([sys.executable, "-c", f"import json, os, sys, time\n{code}"], dict(os.environ))
    try:
        yield child
    finally:
        child.end()
        child.release()


def soon(seconds: float = 10.0) -> float:
    return time.monotonic() + seconds


def test_lines_and_bytes_come_as_they_were_sent() -> None:
    echo = """
for line in sys.stdin:
    size = json.loads(line)["size"]
    sys.stdout.buffer.write(json.dumps({"size": size}).encode() + b"\\n" + bytes(range(256)) * (size // 256))
    sys.stdout.buffer.flush()
"""
    with talking(echo) as child:
        for size in (0, 256, 1 << 22, 512):  # beyond the pipe's buffer, too
            child.say({"size": size})
            assert child.hear(soon()) == {"size": size}
            assert child.hear_bytes(size, soon()) == bytes(range(256)) * (size // 256)
        assert child.alive()


def test_what_is_no_answer_is_none() -> None:
    with talking("print('no JSON', flush=True); time.sleep(60)") as child:
        assert child.hear(soon()) is None
    with talking("sys.exit(3)") as child:
        assert child.hear(soon()) is None
        assert child.end(patience_s=5.0) == 3
        assert not child.alive()
        child.say({"more": 1})  # nobody is there; nothing is raised
        assert child.hear(soon()) is None
        assert child.hear_bytes(4, soon()) == b""
    with talking("""print('{"half":', end="", flush=True)""") as child:
        assert child.hear(soon()) is None


def test_who_says_nothing_is_not_waited_for_longer_than_asked() -> None:
    with talking("time.sleep(60)") as child:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            child.hear(soon(0.2))
        with pytest.raises(TimeoutError):
            child.hear_bytes(1, soon(0.2))
        assert 0.4 <= time.monotonic() - began < 5.0
        assert child.end() == -signal.SIGKILL


def test_the_end_of_what_was_printed_is_kept() -> None:
    code = """
sys.stderr.write("early " * 100_000 + "late"); sys.stderr.flush()
print("{}", flush=True); sys.stdin.readline()
sys.stderr.write("\\xff more"); sys.stderr.flush()
print("{}", flush=True); time.sleep(60)
"""
    with talking(code) as child:
        assert child.hear(soon()) == {}  # a child that prints much is not held up
        assert child.printed().endswith("early late")
        assert len(child.printed()) <= 1 << 16
        child.forget_printed()
        assert child.printed() == ""
        child.say({})
        assert child.hear(soon()) == {}
        assert child.printed().endswith("more")


def test_an_end_reaches_what_the_child_has_started() -> None:
    code = """
import subprocess
one = subprocess.Popen(["sleep", "600"])
print(json.dumps({"pid": os.getpid(), "started": one.pid}), flush=True); time.sleep(600)
"""
    with talking(code) as child:
        told = child.hear(soon())
        assert told is not None
        assert set(living(told["pid"])) == {told["pid"], told["started"]}
        child.end()
        wait_for(lambda: living(told["pid"]) == [], 5.0)
        assert child.end() == -signal.SIGKILL  # again


def test_an_end_from_another_thread_wakes_who_listens() -> None:
    with talking("time.sleep(600)") as child, ThreadPoolExecutor(1) as pool:
        heard = pool.submit(child.hear, soon(60.0))
        time.sleep(0.1)
        ends: list[Callable[[], int]] = [child.end] * 4
        with ThreadPoolExecutor(4) as enders:
            assert [f.result(10) for f in [enders.submit(end) for end in ends]] == [-signal.SIGKILL] * 4
        assert heard.result(10) is None
        assert not child.alive()


def test_what_cannot_be_started_is_told() -> None:
    before = descriptors()
    with pytest.raises(OSError, match="no such program"):
        Child(["/no such program"], {})
    assert descriptors() == before
