"""The kernel cache when things go wrong: races, kills at every step, broken entries, full and read-only disks, forks.

All with real processes and real files. Only a full disk is played by a failpoint, a network mount by a mounts table.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cache_child import artifact_of, binary_of, environment, finish, run, source_of, start, wait_for

from mla_jit import settings
from mla_jit.compile import cache, layers, locks, store
from mla_jit.errors import CompileError

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache root, in force, with the fake toolchain and its log."""
    path = tmp_path / "root"
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(layers, "_warned", set())
    cache.register_toolchain("fake", "cache_child")
    plain = settings.Settings(cache_dir=path)
    with settings.scope(**{name: getattr(plain, name) for name in plain.__dataclass_fields__}):
        cache.forget()
        yield path
    cache.forget()


@pytest.fixture
def env(root: Path, tmp_path: Path) -> dict[str, str]:
    """For child processes, with the same root and log."""
    return environment(tmp_path, MLA_JIT_CACHE_DIR=str(root), FAKE_LOG=str(tmp_path / "log"))


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user can reach (pytest's own cannot be), with a world-writable, sticky `tmp` in it."""
    path = Path(tempfile.mkdtemp(prefix="mla_jit-test-"))
    path.chmod(0o755)
    (path / "tmp").mkdir()
    (path / "tmp").chmod(0o1777)
    yield path
    subprocess.run(["chmod", "-R", "u+rwX", path], check=True)
    shutil.rmtree(path)


def compiles(root: Path) -> int:
    log = root.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def entry_of(content: str) -> Path:
    path = cache.path_of(source_of(content).key)
    assert path is not None
    return path


def expect(outcome: dict[str, object], content: str, origin: str, within_s: float = 10.0) -> None:
    """That a child's outcome is the right binary, from there, soon enough."""
    assert outcome.get("origin") == origin, outcome
    assert outcome["sha256"] == artifact_of(source_of(content)).sha256
    assert float(str(outcome["seconds"])) < within_s, outcome


def assert_clean(root: Path) -> None:
    """Every entry is whole; what is left in staging and of locks can be collected, and nothing else is there."""
    assert cache.verify() == []
    cache.gc(staging_age_s=0.0)
    litter = [
        p for name in ("staging", "locks") if (root / "v1" / name).exists() for p in (root / "v1" / name).iterdir()
    ]
    assert litter == []
    assert {p.name for p in (root / "v1").rglob("*") if p.is_file()} <= {"kernel.bin", "manifest.json"}


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize("point", cache.FAILPOINTS)
def test_a_kill_at_any_point_leaves_nothing_to_trip_over(root: Path, env: dict[str, str], point: str) -> None:
    run(env, "build", contents=["a", "other"])
    (entry_of("a") / "kernel.bin").write_bytes(b"broken")  # so that the eviction's points are passed as well
    killed = start(env | {"MLA_JIT_FAILPOINT": f"{point}=kill"}, "build", contents=["a"])
    killed.communicate(timeout=30)
    assert killed.returncode == -signal.SIGKILL
    (again,) = run(env, "build", contents=["a"])["result"]
    published = point in ("after_rename", "before_unlock")
    expect(again, "a", "disk" if published else "compiled", within_s=2.0)
    report = run(env, "build", contents=["a", "other"])
    expect(report["result"][0], "a", "disk")
    expect(report["result"][1], "other", "disk")
    assert report["warnings"] == []
    assert_clean(root)


def test_kills_at_random_times(root: Path, env: dict[str, str]) -> None:
    """50 processes that build, clear and collect without pause are killed in the middle of it, two at a time."""
    contents = [f"content {i}" for i in range(5)]
    generator = random.Random(20_261_123)
    for turn in range(25):
        pair = [start(env, "churn", contents=contents, seed=generator.randrange(1000)) for _ in range(2)]
        for process in pair:
            assert process.stdout is not None
            assert process.stdout.readline() == b'"started"\n'
        for process in pair:
            time.sleep(generator.uniform(0.0, 0.04))
            assert process.poll() is None, process.communicate()
            process.kill()
            process.communicate(timeout=30)
        cache.forget()
        content, begin = contents[turn % 5], time.monotonic()
        assert cache.build(source_of(content)) == artifact_of(source_of(content))
        assert time.monotonic() - begin < 2.0
    report = run(env, "build", contents=contents)
    for content, outcome in zip(contents, report["result"], strict=True):
        expect(outcome, content, outcome["origin"], within_s=2.0)
    assert report["warnings"] == []
    assert compiles(root) > 50
    assert_clean(root)


# --------------------------------------------------------------------------------------------------------- bad entries


def _truncate(entry: Path) -> None:
    os.truncate(entry / "kernel.bin", 19_999)


def _extend(entry: Path) -> None:
    with open(entry / "kernel.bin", "ab") as file:
        file.write(b"x")


def _flip(name: str, position: float) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        content = bytearray((entry / name).read_bytes())
        content[int(position * len(content))] ^= 4
        (entry / name).write_bytes(content)

    return damage


def _manifest(**changes: object) -> Callable[[Path], None]:
    """A manifest that is consistent in itself (`check` fits), but says something else."""

    def damage(entry: Path) -> None:
        manifest = json.loads((entry / "manifest.json").read_text()) | changes
        manifest = {name: value for name, value in manifest.items() if name != "check" and value is not ...}
        (entry / "manifest.json").write_text(json.dumps(manifest | {"check": store._check(manifest)}))

    return damage


def _edited(entry: Path) -> None:
    text = (entry / "manifest.json").read_text()
    assert '"smem_bytes": 4096' in text
    (entry / "manifest.json").write_text(text.replace('"smem_bytes": 4096', '"smem_bytes": 4098'))


def _text(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / name).write_bytes(content)

    return damage


def _empty(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def _file_for_entry(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("a file")


def _file_for_shard(entry: Path) -> None:
    shutil.rmtree(entry.parent)
    entry.parent.write_text("a file")


def _dangling_link(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to("/nowhere")


def _replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        (entry / name).unlink()
        make(entry / name)

    return damage


def _foreign(entry: Path) -> None:
    """A whole, good entry, but another key's."""
    shutil.rmtree(entry)
    shutil.copytree(entry_of("another"), entry)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "extended": _extend,
    "empty_binary": _text("kernel.bin", b""),
    "zeroed_binary": _text("kernel.bin", bytes(20_000)),
    **{f"bit_flipped_binary_{p}": _flip("kernel.bin", p) for p in (0.0, 0.5, 0.999)},
    "manifest_edited": _edited,
    "manifest_empty": _text("manifest.json", b""),
    "manifest_garbage": _text("manifest.json", random.Random(1).randbytes(500)),
    "manifest_cut": lambda entry: os.truncate(entry / "manifest.json", 200),
    "manifest_list": _text("manifest.json", b"[1, 2]"),
    "manifest_deep": _text("manifest.json", b"[" * 200_000),
    "manifest_huge": lambda entry: os.truncate(entry / "manifest.json", 1 << 40),
    "other_abi": _manifest(abi=0),
    "other_key": _manifest(key="0" * 64),
    "other_size": _manifest(size="20000"),
    "other_hash": _manifest(sha256="0" * 64),
    "field_missing": _manifest(entry=...),
    "foreign": _foreign,
    "empty_directory": _empty,
    "file_for_entry": _file_for_entry,
    "file_for_shard": _file_for_shard,
    "dangling_link": _dangling_link,
    "binary_missing": lambda entry: (entry / "kernel.bin").unlink(),
    "manifest_missing": lambda entry: (entry / "manifest.json").unlink(),
    "directory_for_binary": _replace("kernel.bin", Path.mkdir),
    "directory_for_manifest": _replace("manifest.json", Path.mkdir),
    "pipe_for_binary": _replace("kernel.bin", os.mkfifo),
    "pipe_for_manifest": _replace("manifest.json", os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_bad_entry_is_rebuilt(root: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    source = source_of("a")
    for content in ("a", "another"):
        cache.build(source_of(content))
    damage(entry_of("a"))
    cache.forget()
    assert cache.lookup(source) is None  # evicts
    assert cache.build_traced(source) == (artifact_of(source), "compiled")
    cache.forget()
    assert cache.build_traced(source) == (artifact_of(source), "disk")
    assert entry_of("a").is_dir()
    assert (entry_of("a") / "kernel.bin").read_bytes() == binary_of(source)
    cache.forget()
    assert cache.build_traced(source_of("another"))[1] == "disk"
    assert compiles(root) == 3
    assert caplog.messages == []
    assert_clean(root)


def test_any_flipped_bit_is_noticed_or_harmless(root: Path) -> None:
    """In the manifest some bits are mere white space."""
    source = source_of("a")
    whole = cache.build(source)
    manifest = entry_of("a") / "manifest.json"
    content, generator = manifest.read_bytes(), random.Random(7)
    rebuilt = 0
    for _ in range(80):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        manifest.write_bytes(damaged)
        cache.forget()
        artifact, origin = cache.build_traced(source)
        assert artifact.manifest() == whole.manifest()
        assert artifact.binary == whole.binary
        rebuilt += origin == "compiled"
    assert rebuilt > 50


def test_an_eviction_puts_back_what_has_become_good(root: Path) -> None:
    """Another process may publish between the look at a bad entry and its eviction."""
    source = source_of("a")
    cache.build(source)
    entry, mine = entry_of("a"), store.Store(root, writable=True)
    assert mine.remove(entry, unless_good=source.key) is False
    assert mine.load(entry, source.key) == artifact_of(source)
    assert mine.remove(entry, unless_good=source_of("b").key) is True
    assert not entry.exists()
    assert mine.remove(entry) is False
    assert_clean(root)


def test_a_bad_entry_appears_while_we_compile(root: Path, env: dict[str, str]) -> None:
    """Between the look and the publication; and one that is good is used instead of ours."""
    process = start(env | {"MLA_JIT_FAILPOINT": "before_rename=sleep:0.5"}, "build", contents=["a"])
    wait_for(lambda: any((root / "v1" / "staging").glob("*/manifest.json")))
    entry = root / "v1" / source_of("a").key[:2] / f"fake_kernel-sm_90a-{source_of('a').key[:16]}"
    wait_for(entry.parent.exists)
    entry.mkdir()
    (entry / "junk").write_text("junk")
    expect(finish(process)["result"][0], "a", "compiled")
    assert sorted(p.name for p in entry.iterdir()) == ["kernel.bin", "manifest.json"]
    assert_clean(root)


def test_the_loser_of_a_race_uses_the_winner(root: Path, env: dict[str, str], tmp_path: Path) -> None:
    """Three that do not wait for each other: lock_timeout_s is nothing."""
    impatient = env | {"MLA_JIT_LOCK_TIMEOUT_S": "0.01", "MLA_JIT_FAILPOINT": "before_rename=sleep:0.5"}
    processes = [start(impatient, "build", contents=["sleep 0.7"], barrier=str(tmp_path)) for _ in range(3)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    (tmp_path / "go").touch()
    for process in processes:
        expect(finish(process)["result"][0], "sleep 0.7", "compiled")
    assert compiles(root) == 3
    assert len(cache.entries()) == 1
    assert_clean(root)


# --------------------------------------------------------------------------------------------------------------- locks


def test_a_dead_holder_delays_nobody(root: Path, env: dict[str, str]) -> None:
    holder = start(env, "build", contents=["sleep 30"])
    wait_for(lambda: compiles(root) == 1)
    (lock,) = (root / "v1" / "locks").iterdir()
    waiter = start(env, "build", contents=["sleep 30"], lock_timeout_s=60, mode="serve")
    time.sleep(0.3)
    holder.kill()
    holder.communicate()
    died = time.monotonic()
    wait_for(lambda: compiles(root) == 2)  # the waiter has the lock and compiles
    assert time.monotonic() - died < 2.0
    assert lock.exists()
    waiter.kill()
    waiter.communicate()
    begin = time.monotonic()
    taken = locks.FileLock(lock.parent, lock.name.removesuffix(".lock"))
    taken.acquire(begin + 60, lambda: False)
    assert taken.held
    assert time.monotonic() - begin < 2.0
    taken.release()
    assert_clean(root)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock; that its file is there says less."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("how", ["sleeping", "stopped"])
def test_a_stuck_holder_delays_for_the_lock_timeout_only(root: Path, env: dict[str, str], how: str) -> None:
    holder = start(env | {"MLA_JIT_FAILPOINT": "locked=sleep:60"}, "build", contents=["a"])
    wait_for(lambda: any(map(is_held, (root / "v1" / "locks").glob("*"))))
    if how == "stopped":
        holder.send_signal(signal.SIGSTOP)
    report = run(env | {"MLA_JIT_LOCK_TIMEOUT_S": "1.2"}, "build", contents=["a", "b"])
    expect(report["result"][0], "a", "compiled", within_s=5.0)
    assert report["result"][0]["seconds"] >= 1.15
    expect(report["result"][1], "b", "compiled", within_s=1.1)  # another key has another lock
    assert len(report["warnings"]) == 1
    assert "compiles beside it" in report["warnings"][0]
    holder.kill()
    holder.communicate()
    assert_clean(root)


def test_a_holder_stuck_after_publication_delays_nobody(root: Path, env: dict[str, str]) -> None:
    holder = start(env | {"MLA_JIT_FAILPOINT": "after_rename=sleep:60"}, "build", contents=["sleep 0.5"])
    wait_for(lambda: compiles(root) == 1)
    expect(run(env, "build", contents=["sleep 0.5"])["result"][0], "sleep 0.5", "disk", within_s=3.0)
    assert holder.poll() is None
    assert compiles(root) == 1
    holder.kill()
    holder.communicate()


def test_threads_do_not_wait_for_a_stuck_thread(root: Path) -> None:
    with settings.scope(lock_timeout_s=0.2):
        deadline = time.monotonic() + 60
        held = locks.thread_lock(source_of("a").key, deadline)  # as a thread within a compiler that hangs
        with held, ThreadPoolExecutor() as pool:
            begin = time.monotonic()
            result = pool.submit(cache.build_traced, source_of("a")).result(timeout=10)
    assert result == (artifact_of(source_of("a")), "compiled")
    assert 0.15 < time.monotonic() - begin < 3.0


def test_a_lock_directory_that_cannot_be_used_is_done_without(root: Path) -> None:
    (root / "v1").mkdir(parents=True, mode=0o700)
    (root / "v1" / "locks").write_text("a file")
    assert cache.build_traced(source_of("a")) == (artifact_of(source_of("a")), "compiled")
    (root / "v1" / "locks").unlink()
    (root / "v1" / "locks").mkdir()
    (root / "v1" / "locks" / f"{source_of('b').key}.lock").mkdir()
    assert cache.build_traced(source_of("b")) == (artifact_of(source_of("b")), "compiled")
    assert {entry.key for entry in cache.entries()} == {source_of("a").key, source_of("b").key}


def test_a_network_root_without_local_locks_is_filled_by_many(
    root: Path, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stuck process on another node (its lock file is in the root) is not even noticed."""
    (root / "v1" / "locks").mkdir(parents=True, mode=0o700)
    root.chmod(0o700)
    stuck = locks.FileLock(root / "v1" / "locks", source_of("a").key)
    assert stuck.try_acquire()
    (tmp_path / "mounts").write_text("server:/x / nfs4 rw 0 0\n")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(locks, "MOUNTS", tmp_path / "mounts")
    begin = time.monotonic()
    assert cache.build_traced(source_of("a")) == (artifact_of(source_of("a")), "compiled")
    assert time.monotonic() - begin < 2.0
    stuck.release()


# --------------------------------------------------------------------------------------------- disks full or read-only


STAGING = ("compiled", "staged_binary", "staged_manifest", "before_rename", "after_rename")


@pytest.mark.parametrize("point", cache.FAILPOINTS)
def test_a_full_disk_costs_a_warning_at_most(root: Path, env: dict[str, str], point: str) -> None:
    run(env, "build", contents=["a"])
    (entry_of("a") / "kernel.bin").write_bytes(b"broken")
    report = run(env | {"MLA_JIT_FAILPOINT": f"{point}=enospc"}, "build", contents=["a", "b", "a"])
    expect(report["result"][0], "a", "compiled")
    expect(report["result"][1], "b", "compiled")
    expect(report["result"][2], "a", "memory")
    assert len(report["warnings"]) == (point in STAGING)
    assert all("No space left on device" in warning and str(root) in warning for warning in report["warnings"])
    assert list((root / "v1" / "staging").iterdir()) == [] or point == "evicted"
    (again,) = run(env, "build", contents=["a"])["result"]
    expect(again, "a", "compiled" if point in STAGING[:4] else "disk")
    assert_clean(root)


def _root_for_reading_only(public: Path, contents: list[str]) -> Path:
    """A filled root that the child (nobody when we are root, else ourselves) may read and not write."""
    path = public / "image"
    with settings.scope(cache_dir=path):
        cache.forget()
        for content in contents:
            cache.build(source_of(content))
    cache.forget()
    for file in [*path.rglob("*"), path]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    return path


def test_a_read_only_root_is_read_and_the_rest_goes_to_a_temporary_one(root: Path, public: Path) -> None:
    image = _root_for_reading_only(public, ["a"])
    content = {p: p.read_bytes() for p in image.rglob("*") if p.is_file()}
    env = environment(public / "tmp", MLA_JIT_CACHE_DIR=str(image), TMPDIR=str(public / "tmp"))
    first = run(env, "build_as_nobody", contents=["a", "b"], uid=NOBODY)
    expect(first["result"][0], "a", "layer")
    expect(first["result"][1], "b", "compiled")
    uid = NOBODY if os.geteuid() == 0 else os.geteuid()
    assert first["root"] == str(public / "tmp" / f"mla_jit-{uid}")
    assert len(first["warnings"]) == 1
    assert str(image) in first["warnings"][0]
    assert first["root"] in first["warnings"][0]
    second = run(env, "build_as_nobody", contents=["a", "b"], uid=NOBODY)  # the temporary one is shared
    expect(second["result"][1], "b", "disk")
    seen = os.stat(first["root"])
    assert (stat.S_IMODE(seen.st_mode), seen.st_uid) == (0o700, uid)
    assert {p: p.read_bytes() for p in image.rglob("*") if p.is_file()} == content


def test_an_unwritable_home(root: Path, public: Path) -> None:
    """As in a container that runs with a foreign user id."""
    (public / "home").mkdir(mode=0o555)
    env = environment(public / "home", TMPDIR=str(public / "tmp"))
    report = run(env, "build_as_nobody", contents=["a"], uid=NOBODY)
    expect(report["result"][0], "a", "compiled")
    assert report["root"].startswith(str(public / "tmp"))
    assert len(report["warnings"]) == 1
    expect(run(env, "build_as_nobody", contents=["a"], uid=NOBODY)["result"][0], "a", "disk")


@pytest.mark.parametrize("bad", ["below_a_file", "proc"])
def test_nothing_writable_at_all(root: Path, tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").write_text("x")
    where = {"below_a_file": tmp_path / "file" / "cache", "proc": Path("/proc/mla_jit")}[bad]
    env = environment(tmp_path, MLA_JIT_CACHE_DIR=str(where), MLA_JIT_FAILPOINT="locked=kill")
    report = run(env, "build", contents=["a", "b", "a"], tempdir=str(tmp_path / "file" / "tmp"), failpoint=None)
    for content, origin, outcome in zip("aba", ["compiled", "compiled", "memory"], report["result"], strict=True):
        expect(outcome, content, origin)
    assert report["root"] == "None"
    assert len(report["warnings"]) == 1
    assert "in memory only" in report["warnings"][0]


def test_a_temporary_directory_that_is_not_ours(root: Path, tmp_path: Path) -> None:
    """Somebody else sits on the name in /tmp: one of our own, which goes with the process."""
    (tmp_path / "tmp").mkdir()
    squatted = tmp_path / "tmp" / f"mla_jit-{os.geteuid()}"
    squatted.mkdir()
    squatted.chmod(0o777)
    (tmp_path / "file").touch()
    env = environment(tmp_path, MLA_JIT_CACHE_DIR=str(tmp_path / "file" / "x"), TMPDIR=str(tmp_path / "tmp"))
    report = run(env, "build", contents=["a"])
    expect(report["result"][0], "a", "compiled")
    assert Path(report["root"]).parent == tmp_path / "tmp"
    assert report["root"] != str(squatted)
    assert list(squatted.iterdir()) == []
    assert not Path(report["root"]).exists()


def test_the_root_vanishes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.build(source_of("a"))
    shutil.rmtree(root)
    assert cache.build_traced(source_of("b")) == (artifact_of(source_of("b")), "compiled")
    assert [entry.key for entry in cache.entries()] == [source_of("b").key]
    assert caplog.messages == []
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


# --------------------------------------------------------------------------------------------------------------- trust


@pytest.mark.parametrize(
    ("which", "mode"),
    [("itself", 0o777), ("itself", 0o770), ("itself", 0o1777), ("inside", 0o777), ("parent", 0o777)],
)
def test_directories_that_others_may_write_are_refused(
    root: Path, tmp_path: Path, which: str, mode: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_one = tmp_path / "parent" / "open"
    with settings.scope(cache_dir=open_one):
        cache.forget()
        cache.build(source_of("a"))
    cache.forget()
    {"itself": open_one, "inside": open_one / "v1", "parent": open_one.parent}[which].chmod(mode)
    before = sorted(tmp_path.glob("parent/**/*"))
    with settings.scope(cache_layers=(open_one,)):
        assert cache.build_traced(source_of("a"))[1] == "compiled"
        assert cache.build_traced(source_of("b"))[1] == "compiled"
    assert len(caplog.messages) == 1
    assert f"does not read the cache layer {open_one}" in caplog.text
    cache.forget()
    with settings.scope(cache_dir=open_one):  # nor is it written
        assert cache.build_traced(source_of("a"))[1] == "compiled"
        assert cache.root() == tmp_path / f"mla_jit-{os.geteuid()}"
    assert len(caplog.messages) == 2
    assert "can be written by" in caplog.messages[1]
    assert sorted(tmp_path.glob("parent/**/*")) == before


@pytest.mark.parametrize("mode", [0o1777, 0o775, 0o755])
def test_directories_below_sticky_or_group_writable_ones_are_used(root: Path, tmp_path: Path, mode: int) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(mode)
    with settings.scope(cache_dir=tmp_path / "parent" / "cache"):
        cache.build(source_of("a"))
        cache.forget()
        assert cache.build_traced(source_of("a"))[1] == "disk"


def test_directories_of_other_users_are_refused(root: Path, public: Path) -> None:
    """As root: one that nobody owns. As an ordinary user there is /proc/1, which is root's: trusted, but unwritable."""
    foreign = public / "foreign"
    foreign.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(foreign, NOBODY, NOBODY)
        assert f"belongs to another user (uid {NOBODY})" in (layers.refusal(foreign) or "")
        with settings.scope(cache_layers=(foreign,)):
            assert cache.build_traced(source_of("a"))[1] == "compiled"
            assert layers.current().readonly == ()
    assert layers.refusal(Path("/usr/share")) is None


# --------------------------------------------------------------------------------------------------------------- forks


def test_fork_while_a_thread_compiles(root: Path, env: dict[str, str]) -> None:
    report = run(env, "fork_while_compiling", content="sleep 0.6")["result"]
    assert report["status"] == 0
    expect(report["child"][0], "sleep 0.6", "disk", within_s=6.0)  # waited for its parent's thread
    expect(report["child"][1], "built in the child", "compiled", within_s=2.0)
    expect(report["parent"], "sleep 0.6", "memory")
    assert compiles(root) == 2
    assert_clean(root)


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(root: Path, env: dict[str, str]) -> None:
    process = start(env, "fork_and_die_compiling", content="sleep 1")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    try:
        os.kill(child, 0)  # it lives
        expect(run(env, "build", contents=["sleep 1"])["result"][0], "sleep 1", "compiled", within_s=6.0)
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_fork_after_use(root: Path, env: dict[str, str]) -> None:
    report = run(env, "fork_after_use", content="a")["result"]
    expect(report["before"], "a", "compiled")
    (first, second) = report["descendants"]
    expect(first[0], "a", "memory")
    expect(first[1], "in the child", "compiled")
    expect(second[0], "in the child", "memory")
    expect(second[1], "in the grandchild", "compiled")
    assert_clean(root)


# ------------------------------------------------------------------------------------------------- compilers that fail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("abort", "was ended by SIGABRT: python: WarpSpecialize.cpp:42: Assertion `one consumer' failed."),
        ("exit", "ended with status 3: it printed nothing"),
        ("hang", "did not end and was killed: error: the register allocator thinks; the limit is MLA_JIT_COMPILE_TIM"),
    ],
)
def test_a_compiler_that_dies_or_hangs_in_a_child(
    root: Path, tmp_path: Path, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    begin = time.monotonic()
    timeout_s = 2.0 if content == "hang" else 60.0
    with settings.scope(safe_compile=True, compile_timeout_s=timeout_s), pytest.raises(CompileError) as caught:
        cache.build(source_of(content))
    assert message in str(caught.value)
    assert source_of(content).key in str(caught.value)
    assert "Choose another config" in str(caught.value)
    assert caught.value.key == source_of(content).key
    assert time.monotonic() - begin < 10.0
    assert compiles(root) == 1
    pid = int((root.parent / "log").read_text().split()[1])
    assert not Path(f"/proc/{pid}").exists()
    assert [p for p in _sessions() if p[1] == pid] == []  # nor does what the compiler had started
    assert list((tmp_path / "tmp").iterdir()) == []
    assert cache.build_traced(source_of("a")) == (artifact_of(source_of("a")), "compiled")  # we live
    assert list((root / "v1" / "locks").iterdir()) == []
    assert_clean(root)


def _sessions() -> list[tuple[int, int]]:
    """(process, session) of all living processes; a killed one may be a zombie for a while."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found.append((int(path.parent.name), int(fields[3])))
    return found


def test_safe_compile_with_a_full_disk(root: Path) -> None:
    with settings.scope(safe_compile=True, failpoint="staged_binary=enospc"):
        assert cache.build_traced(source_of("a")) == (artifact_of(source_of("a")), "compiled")
    assert cache.entries() == []


# --------------------------------------------------------------------------------------------------------------- races


KERNEL = """
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < length
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) * 2.0, mask=mask)
"""

# Counts from outside the library: every run of ptxas that assembles something appends a line.
PTXAS = """#!/bin/sh
case "$*" in *--version*) ;; *) echo "$$" >> "{log}" ;; esac
exec "{ptxas}" "$@"
"""


@pytest.fixture
def real(env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment to build the file `tiny.py` with Triton and a counting ptxas; who imports torch is found out."""
    import triton

    (tmp_path / "tiny.py").write_text(KERNEL)
    (tmp_path / "ptxas").write_text(PTXAS.format(log=tmp_path / "runs", ptxas=triton.knobs.nvidia.ptxas.path))
    (tmp_path / "ptxas").chmod(0o755)
    (tmp_path / "poison" / "torch").mkdir(parents=True)
    (tmp_path / "poison" / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    paths = os.pathsep.join([str(tmp_path / "poison"), env["PYTHONPATH"]])
    return env | {"TRITON_PTXAS_PATH": str(tmp_path / "ptxas"), "PYTHONPATH": paths}


def test_32_processes_compile_a_triton_kernel_once(root: Path, real: dict[str, str], tmp_path: Path) -> None:
    arguments = {"contents": [], "kernel": str(tmp_path / "tiny.py")}
    processes = [start(real, "build", **arguments, barrier=str(tmp_path)) for _ in range(32)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 32)
    (tmp_path / "go").touch()
    results = [finish(process)["result"][0] for process in processes]
    assert sorted(result["origin"] for result in results) == ["compiled"] + ["disk"] * 31, results
    assert len((tmp_path / "runs").read_text().splitlines()) == 1
    (entry,) = cache.entries()
    binary = (entry.path / "kernel.bin").read_bytes()
    assert binary[:4] == b"\x7fELF"
    assert {result["sha256"] for result in results} == {hashlib.sha256(binary).hexdigest()}
    # Without the cache they compile each for itself: so the wrapper does count. In a child it gives the same bytes.
    apart = real | {"MLA_JIT_CACHE_DIR": str(tmp_path / "other"), "MLA_JIT_SAFE_COMPILE": "1"}
    report = run(apart, "build", **arguments)
    assert report["result"][0]["origin"] == "compiled"
    assert report["result"][0]["sha256"] == entry_sha256(entry.path)
    assert len((tmp_path / "runs").read_text().splitlines()) == 2
    assert_clean(root)


def entry_sha256(path: Path) -> str:
    return str(json.loads((path / "manifest.json").read_text())["sha256"])


def test_gc_and_clear_race_with_build(root: Path, env: dict[str, str], tmp_path: Path) -> None:
    remover = start(env, "clear_until", stop=str(tmp_path / "stop"))
    builders = [start(env, "build", contents=[f"k{i % 7}" for i in range(60)]) for _ in range(2)]
    turns, begin = 0, time.monotonic()

    def going() -> bool:
        """Until the builders are done and enough was removed in between, which takes a busy machine longer."""
        seconds = time.monotonic() - begin
        return (
            turns < 150
            or seconds < 1.0
            or any(b.poll() is None for b in builders)
            or (seconds < 60.0 and compiles(root) <= 20)
        )

    while going():
        cache.forget()
        content = f"k{turns % 7}"
        assert cache.build(source_of(content)) == artifact_of(source_of(content))
        turns += 1
    for builder in builders:
        report = finish(builder)
        assert report["warnings"] == []
        for i, outcome in enumerate(report["result"]):
            expect(outcome, f"k{i % 7}", outcome["origin"])
    (tmp_path / "stop").touch()
    removed = finish(remover)["result"]
    assert min(removed.values()) > 0
    assert sum(removed.values()) > 10
    assert compiles(root) > 20
    assert_clean(root)
