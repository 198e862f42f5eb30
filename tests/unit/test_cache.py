"""The kernel cache when all goes well: where artifacts come from, what lies on disk, the verbs of `mla-tune cache`."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cache_child
from cache_child import artifact_of, binary_of, environment, run, source_of, start

from mla_jit import settings
from mla_jit.compile import cache, layers, locks
from mla_jit.compile import failpoints as failpoints_module
from mla_jit.compile.artifact import ABI, Artifact
from mla_jit.errors import CacheMiss, CompileError, IllegalArtifact, SettingsError


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


def compiles(root: Path) -> int:
    log = root.parent / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def snapshot(path: Path) -> dict[str, object]:
    """Everything below a directory: modes, times, contents."""
    return {
        str(p.relative_to(path)): (p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [path, *path.rglob("*")]
    }


# ------------------------------------------------------------------------------------------------------------- origins


def test_import_is_light(tmp_path: Path) -> None:
    code = "import sys, mla_jit.compile.cache; print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, check=True)
    assert out.stdout == b"[]\n", out.stderr


def test_origins(root: Path) -> None:
    source = source_of("a")
    first, origin = cache.build_traced(source)
    assert (origin, first) == ("compiled", artifact_of(source))
    assert cache.build_traced(source) == (first, "memory")
    cache.forget()
    again, origin = cache.build_traced(source)
    assert (origin, again.binary) == ("disk", binary_of(source))
    assert again == first
    assert again.manifest() == first.manifest()  # also the fields that == leaves out
    assert cache.build(source) is again
    assert compiles(root) == 1


def test_sources_that_differ_have_their_own_entries(root: Path) -> None:
    sources = [
        source_of("a"), source_of("b"), source_of("a", isa="sm_80"), source_of("a", constants=(("BLOCK", 64),)),
        source_of("a", toolchain_version="2"), source_of("a", name="../we ird/$name"), source_of("a", name="n" * 300),
    ]  # fmt: skip
    for source in sources:
        assert cache.build(source).binary == binary_of(source)
    cache.forget()
    assert [cache.build_traced(source) for source in sources] == [(artifact_of(source), "disk") for source in sources]
    assert sorted(entry.key for entry in cache.entries()) == sorted(source.key for source in sources)
    assert all(entry.path.parent.parent == root / "v1" for entry in cache.entries())


def test_lookup_and_path_of(root: Path) -> None:
    source = source_of("a")
    assert cache.lookup(source) is None
    assert cache.lookup(source.key) is None
    assert cache.path_of(source.key) is None
    assert compiles(root) == 0
    cache.build(source)
    for wanted in (source, source.key):
        cache.forget()
        found = cache.lookup(wanted)
        assert found == artifact_of(source)
        assert cache.lookup(wanted) is found
    path = cache.path_of(source.key)
    assert path is not None
    assert (path / "kernel.bin").read_bytes() == binary_of(source)
    assert cache.lookup(source_of("b")) is None
    assert compiles(root) == 1


def test_what_a_tuple_becomes_is_the_same_from_the_compiler_and_from_disk(root: Path) -> None:
    first = cache.build(source_of("tuples"))
    cache.forget()
    assert cache.build(source_of("tuples")).extra == first.extra == {"boxes": [[64, 512], [64, 64]], "box": [64, 512]}


def test_threads_compile_once(root: Path) -> None:
    results: list[tuple[Artifact, str]] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.build_traced(source_of("sleep 0.2")))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(origin for _, origin in results) == ["compiled"] + ["memory"] * 15
    assert all(artifact is results[0][0] for artifact, _ in results)
    assert compiles(root) == 1


def test_threads_compile_once_without_a_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no file lock helps."""
    root.write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(root))
    origins: list[str] = []
    threads = [
        threading.Thread(target=lambda: origins.append(cache.build_traced(source_of("sleep 0.2"))[1])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.root() is None
    assert sorted(origins) == ["compiled"] + ["memory"] * 7
    assert compiles(root) == 1


def test_file_locks_exclude_although_their_files_come_and_go(tmp_path: Path) -> None:
    """Each holder unlinks the file; whoever had it open by then must not think that it holds the lock."""
    inside, clashes, descriptors = tmp_path / "inside", [], len(os.listdir("/proc/self/fd"))

    def work() -> None:
        for _ in range(150):
            with locks.file_lock(tmp_path, "key", time.monotonic() + 60, lambda: False) as lock:
                try:
                    assert lock.held
                    inside.touch(exist_ok=False)
                    os.stat(tmp_path)  # lets other threads run
                    inside.unlink()
                except (FileExistsError, FileNotFoundError, AssertionError) as clash:
                    clashes.append(clash)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_threads_with_other_keys_do_not_wait(root: Path) -> None:
    begin = time.monotonic()
    sources = [source_of("sleep 0.5" + "0" * i) for i in range(8)]
    threads = [threading.Thread(target=cache.build, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiles(root) == 8
    assert time.monotonic() - begin < 2.0  # in a row they would take 4 s


# ----------------------------------------------------------------------------------------------------- what is on disk


def test_layout_and_permissions(root: Path) -> None:
    source = source_of("a")
    old = os.umask(0)
    try:
        cache.build(source)
    finally:
        os.umask(old)
    entry = root / "v1" / source.key[:2] / f"fake_kernel-sm_90a-{source.key[:16]}"
    assert sorted(p.name for p in entry.iterdir()) == ["kernel.bin", "manifest.json"]
    manifest = json.loads((entry / "manifest.json").read_text())
    artifact = artifact_of(source)
    assert {k: v for k, v in manifest.items() if k != "check"} == artifact.manifest()
    assert (manifest["key"], manifest["size"], manifest["abi"]) == (source.key, 20_000, ABI)
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [root, *root.rglob("*")]}
    assert {p: mode for p, mode in modes.items() if mode != (0o700 if p.is_dir() else 0o600)} == {}
    assert list((root / "v1" / "staging").iterdir()) == []
    assert list((root / "v1" / "locks").iterdir()) == []


def test_a_root_can_be_moved(root: Path, tmp_path: Path) -> None:
    source = source_of("a")
    cache.build(source)
    assert str(tmp_path).encode() not in b"".join(p.read_bytes() for p in root.rglob("*") if p.is_file())
    shutil.move(root, tmp_path / "elsewhere")
    with settings.scope(cache_dir=tmp_path / "elsewhere"):
        cache.forget()
        assert cache.build_traced(source) == (artifact_of(source), "disk")
    assert compiles(root) == 1


def test_layers_are_read_in_order_and_never_written(root: Path, tmp_path: Path) -> None:
    shared, bad, other = source_of("a"), source_of("b"), source_of("c")
    for number, sources in enumerate([[shared, bad], [shared, other]]):
        with settings.scope(cache_dir=tmp_path / f"layer{number}"):
            cache.forget()
            for source in sources:
                cache.build(source)
    shutil.rmtree(tmp_path / "layer1" / "v1" / "staging")
    broken = tmp_path / "layer0" / "v1" / bad.key[:2] / f"fake_kernel-sm_90a-{bad.key[:16]}" / "kernel.bin"
    broken.write_bytes(b"x" * 20_000)
    for directory in [*tmp_path.rglob("*-*")]:
        os.utime(directory, (1, 1))  # long unused: in a writable root a use would be noted
    before = [snapshot(tmp_path / name) for name in ("layer0", "layer1")]
    with settings.scope(cache_layers=(tmp_path / "layer0", tmp_path / "missing", tmp_path / "layer1")):
        cache.forget()
        assert cache.build_traced(shared) == (artifact_of(shared), "layer")
        assert cache.build_traced(other) == (artifact_of(other), "layer")
        assert cache.build_traced(bad) == (artifact_of(bad), "compiled")
        assert [entry.layer.name for entry in cache.entries()] == ["root", "layer0", "layer0", "layer1", "layer1"]
        assert cache.path_of(shared.key).parents[2].name == "layer0"  # type: ignore[union-attr]
        assert [(fault.path, fault.fixed) for fault in cache.verify(fix=True)] == [(broken.parent, False)]
        assert cache.clear() == 1
        assert cache.gc(max_bytes=0).entries == ()
    assert [snapshot(tmp_path / name) for name in ("layer0", "layer1")] == before
    assert not (tmp_path / "missing").exists()


def test_strict_mode_and_forbidden_compiles(root: Path) -> None:
    source = source_of("a")
    with settings.scope(mode="strict"):
        with pytest.raises(CacheMiss, match=r"strict mode") as caught:
            cache.build(source)
        message = str(caught.value)
        assert source.key in message
        assert "fake_kernel" in message
        assert str(root) in message
        assert "mla-tune compile --target sm_90a --model" in message
    with settings.scope(mode="strict", target="gfx942"), pytest.raises(CacheMiss, match="--target gfx942"):
        cache.build(source)
    with pytest.raises(CacheMiss, match="not allowed under CUDA graph capture"):
        cache.build(source, forbid_compile="under CUDA graph capture")
    assert compiles(root) == 0
    assert cache.entries() == []
    cache.build(source)
    cache.forget()
    with settings.scope(mode="strict"):
        assert cache.build_traced(source, forbid_compile="now") == (artifact_of(source), "disk")


# ------------------------------------------------------------------------------------------------------ mla-tune cache


def test_entries(root: Path) -> None:
    begin = time.time()
    cache.build(source_of("a"))
    (entry,) = cache.entries()
    manifest_bytes = (entry.path / "manifest.json").stat().st_size
    assert (entry.key, entry.name, entry.isa, entry.layer) == (source_of("a").key, "fake_kernel", "sm_90a", root)
    assert entry.ok
    assert entry.size_bytes == 20_000 + manifest_bytes
    assert begin - 2 < entry.created <= time.time() + 2
    assert begin - 2 < entry.used <= time.time() + 2
    (entry.path / "manifest.json").write_text("{}")
    (broken,) = cache.entries()
    assert not broken.ok
    assert broken.key == entry.key[:16]
    assert "check sum" in (broken.problem or "")


def test_verify(root: Path) -> None:
    good, flipped, stray = source_of("a"), source_of("b"), root / "v1" / "ab" / "stray"
    cache.build(good)
    cache.build(flipped)
    assert cache.verify() == []
    path = cache.path_of(flipped.key)
    assert path is not None
    (path / "kernel.bin").write_bytes(b"\0" * 20_000)
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("x")
    moved = root / "v1" / "00" / "fake_kernel-sm_90a-0000000000000000"
    shutil.copytree(cache.path_of(good.key), moved)  # type: ignore[arg-type]
    expected = {
        (path, flipped.key, "the binary's hash is not the manifest's"),
        (stray, "stray", "manifest.json is missing"),
        (moved, good.key, "it is filed under the name of another key"),
    }
    faults = cache.verify()
    assert {(f.path, f.key, f.reason) for f in faults} == expected
    assert not any(f.fixed for f in faults)
    assert len(cache.entries()) == 4  # nothing was evicted
    assert all(f.fixed for f in cache.verify(fix=True))
    assert cache.verify() == []
    assert [entry.key for entry in cache.entries()] == [good.key]


def test_gc(root: Path) -> None:
    sources = [source_of(content) for content in "abcd"]
    for age_hours, source in zip((40, 30, 20, 10), sources, strict=True):
        cache.build(source)
        os.utime(cache.path_of(source.key), (time.time() - age_hours * 3600,) * 2)  # type: ignore[arg-type]
    cache.forget()
    cache.build(sources[1])  # this use makes b the youngest
    collected = cache.gc(max_age_s=35 * 3600)
    assert [entry.key for entry in collected.entries] == [sources[0].key]
    assert collected.size_bytes > 20_000
    assert [entry.key for entry in cache.gc(max_bytes=45_000).entries] == [sources[2].key]
    assert {entry.key for entry in cache.entries()} == {sources[1].key, sources[3].key}
    assert cache.gc() == cache.Collected((), 0, 0)
    assert cache.verify() == []
    cache.forget()
    assert [cache.build_traced(source)[1] for source in sources] == ["compiled", "disk", "compiled", "disk"]


def test_gc_collects_litter(root: Path) -> None:
    cache.build(source_of("a"))
    staging, lock_files = root / "v1" / "staging", root / "v1" / "locks"
    (staging / "old").mkdir()
    (staging / "old" / "kernel.bin").write_bytes(b"x")
    os.utime(staging / "old", (1, 1))
    (staging / "young").mkdir()
    (lock_files / "dead.lock").touch()
    held = locks.FileLock(lock_files, "held")
    assert held.try_acquire()
    assert cache.gc() == cache.Collected((), 1, 1)
    assert [p.name for p in staging.iterdir()] == ["young"]
    assert [p.name for p in lock_files.iterdir()] == ["held.lock"]
    held.release()
    assert list(lock_files.iterdir()) == []
    (staging / "old").mkdir()
    os.utime(staging / "old", (1, 1))
    cache.build(source_of("b"))  # so does a publication
    assert [p.name for p in staging.iterdir()] == ["young"]


def test_clear(root: Path) -> None:
    for content in "abc":
        cache.build(source_of(content))
    assert cache.clear() == 3
    assert cache.entries() == []
    assert cache.clear() == 0
    assert cache.lookup(source_of("a")) is None  # not in memory either
    assert cache.build_traced(source_of("a"))[1] == "compiled"


# ---------------------------------------------------------------------------------------------------------- toolchains


def test_toolchains(root: Path) -> None:
    assert cache.TOOLCHAINS == ("triton", "ptx", "amdgcn")
    source = source_of("a", toolchain="nvcc")
    with pytest.raises(CompileError, match=r"'nvcc'; known are amdgcn, fake, ptx, triton") as caught:
        cache.build(source)
    assert caught.value.key == source.key
    cache.register_toolchain("nowhere", "no_such_module")
    with pytest.raises(CompileError, match=r"ModuleNotFoundError: No module named 'no_such_module'"):
        cache.build(source_of("a", toolchain="nowhere"))


@pytest.mark.parametrize("safe", [False, True], ids=["here", "in_a_child"])
def test_compile_errors(root: Path, safe: bool) -> None:
    with settings.scope(safe_compile=safe):
        with pytest.raises(
            CompileError, match=r"ValueError: error: bad layout \(key [0-9a-f]{64}\)\. Choose"
        ) as caught:
            cache.build(source_of("raise bad layout"))
        assert caught.value.key == source_of("raise bad layout").key
        assert "note: nothing" in caught.value.log
        with pytest.raises(IllegalArtifact, match=r"^spills 12$") as illegal:
            cache.build(source_of("illegal 12"))
        assert illegal.value.log == "ptxas info: spilled"
        assert illegal.value.key == source_of("illegal 12").key
        with pytest.raises(CompileError, match="returned an artifact for the key"):
            cache.build(source_of("otherkey"))
    assert cache.entries() == []
    assert list((root / "v1" / "locks").iterdir()) == []
    with pytest.raises(CompileError):  # an error is not remembered
        cache.build(source_of("raise bad layout"))
    assert compiles(root) == 4


def test_safe_compile_runs_in_a_child_without_torch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    Path("json.py").write_text("raise SystemExit('the working directory was imported from')")
    with settings.scope(safe_compile=True):
        artifact, origin = cache.build_traced(source_of("where"))
        assert (origin, artifact.binary) == ("compiled", binary_of(source_of("where")))
        assert artifact.provenance["pid"] != os.getpid()
        assert artifact.provenance["cwd"] == os.getcwd()
        assert Path(artifact.provenance["tempdir"]).name.startswith("mla_jit-child-")
        assert not Path(artifact.provenance["tempdir"]).exists()
        assert not {"triton", "numpy", "pytest"} & set(artifact.provenance["modules"])
        with pytest.raises(CompileError, match="import of torch halted"):
            cache.build(source_of("torch"))
        chatty = cache.build(source_of("chatter"))  # what it prints is not taken for its answer
        assert chatty == artifact_of(source_of("chatter"))
    cache.forget()
    assert cache.build_traced(source_of("chatter")) == (chatty, "disk")


# ------------------------------------------------------------------------------------------------- roots, file systems


def test_the_root_is_the_setting_else_the_users_cache_directory(tmp_path: Path) -> None:
    home = environment(tmp_path / "home")
    report = run(home, "build", contents=["a"])
    assert report["root"] == str(tmp_path / "home/.cache/mla_jit")
    assert report["warnings"] == []
    assert stat.S_IMODE((tmp_path / "home/.cache").stat().st_mode) == 0o700
    report = run(home | {"XDG_CACHE_HOME": str(tmp_path / "xdg")}, "build", contents=["a"])
    assert report["root"] == str(tmp_path / "xdg/mla_jit")
    report = run(home | {"MLA_JIT_CACHE_DIR": str(tmp_path / "set")}, "build", contents=["a"])
    assert report["root"] == str(tmp_path / "set")
    assert report["result"][0]["origin"] == "compiled"
    report = run(home | {"MLA_JIT_CACHE_DIR": str(tmp_path / "set")}, "build", contents=["a"])
    assert report["result"][0]["origin"] == "disk"


def test_ignorance_of_the_home_directory_makes_no_directory_named_tilde(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")  # as expanduser leaves it for a user without HOME and passwd entry
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path / "..")
    with settings.scope(cache_dir=None):
        assert cache.root() == tmp_path / f"mla_jit-{os.geteuid()}"
    assert len(caplog.messages) == 1
    assert "no home directory" in caplog.text
    assert not Path("~").exists()


MOUNTS = r"""
proc /proc proc rw 0 0
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
tmpfs /home/me/fast tmpfs rw 0 0
//host/share /mnt/my\040share cifs rw 0 0
short
sshfs#x /mnt/ssh fuse.sshfs rw 0 0
/dev/sdb /over ext4 rw 0 0
scratch /over lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/tmp/x", "ext4", False), ("/home/me/.cache", "nfs4", True), ("/home/me/fast/c", "tmpfs", False),
        ("/homework", "ext4", False), ("/mnt/my share/c", "cifs", True), ("/mnt/ssh", "fuse.sshfs", True),
        ("/over/there", "lustre", True),
    ],
)  # fmt: skip
def test_network_file_systems(
    path: str, kind: str, network: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locks.filesystem_type(Path(path), MOUNTS) == kind
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(locks, "MOUNTS", tmp_path / "mounts")
    assert locks.on_network(Path(path)) is network


def test_other_network_types() -> None:
    remote = ("nfs", "cifs", "smb3", "smbfs", "ceph", "fuse.glusterfs", "gpfs", "beegfs", "beegfs_nodev", "9p", "fuse")
    local = ("ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "nfsd", "fuseblk", "")
    assert all(locks._NETWORK.fullmatch(kind) for kind in remote)
    assert not [kind for kind in local if locks._NETWORK.fullmatch(kind)]


def test_locks_of_a_network_root_lie_on_the_node(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(node))
    monkeypatch.setattr(locks, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {os.path.realpath(root)} nfs rw 0 0\n")
    cache.build(source_of("a"))
    assert locks.directory(root) == node / f"mla_jit-{os.geteuid()}" / "v1" / "locks"
    assert not (root / "v1" / "locks").exists()
    assert cache.verify() == []
    # Nothing local to put a lock in: no lock, no waiting, and the same artifact.
    (tmp_path / "mounts").write_text("server:/x / nfs rw 0 0\n")
    assert locks.directory(root) is None
    assert cache.build_traced(source_of("b")) == (artifact_of(source_of("b")), "compiled")
    assert cache.gc().locks == 0


# ---------------------------------------------------------------------------------------------------------- failpoints


def test_the_list_of_failpoints_and_the_calls_are_the_same() -> None:
    calls: list[str] = []
    for file in Path(failpoints_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                argument = node.args[0]
                assert isinstance(argument, ast.Constant), f"{file}:{node.lineno}"
                calls.append(str(argument.value))
    assert sorted(calls) == sorted(cache.FAILPOINTS)


@pytest.mark.parametrize("armed", ["nowhere=kill", "before_lock=explode", "before_lock"])
def test_a_wrong_failpoint_is_an_error(root: Path, armed: str) -> None:
    with settings.scope(failpoint=armed), pytest.raises(SettingsError, match="failpoint"):
        cache.build(source_of("a"))


def test_processes_compile_once(root: Path, tmp_path: Path) -> None:
    """32 processes want one key of a fake compiler that takes its time; the faults' file has the real one."""
    env = environment(tmp_path, MLA_JIT_CACHE_DIR=str(root), FAKE_LOG=str(tmp_path / "log"))
    processes = [start(env, "build", contents=["sleep 0.5"], barrier=str(tmp_path)) for _ in range(32)]
    cache_child.wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 32)
    (tmp_path / "go").touch()
    results = [cache_child.finish(process)["result"][0] for process in processes]
    assert sorted(result["origin"] for result in results) == ["compiled"] + ["disk"] * 31
    assert {result["sha256"] for result in results} == {artifact_of(source_of("sleep 0.5")).sha256}
    assert compiles(root) == 1
    assert list((root / "v1" / "locks").iterdir()) == []
