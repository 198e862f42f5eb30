"""The layout of one cache root, and what makes an entry good.

    <root>/v1/<key[:2]>/<name>-<isa>-<key[:16]>/kernel.bin      the machine code
                                               /manifest.json   Artifact.manifest() and `check`, a hash over the rest
    <root>/v1/staging/<uuid>/                                   entries on their way in or out
    <root>/v1/locks/<key>.lock                                  see `locks`

An entry appears and goes by one rename of its directory, so it is there whole or not at all; no path stands in it, so a
root may be moved. Everything read is checked against the key that was asked for: what fails is a miss, never an error.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit.compile import layers
from mla_jit.compile.artifact import ABI, Artifact, Source
from mla_jit.compile.failpoints import failpoint

BINARY, MANIFEST = "kernel.bin", "manifest.json"
_MANIFEST_BYTES = 4 << 20  # more is no manifest, and is not read
_TOUCH_S = 3600.0  # a use is noted at most this often, for gc; not on every load of every process


class EntryError(ValueError):
    """An entry that is provably not what it should be (as opposed to one that cannot be read just now)."""


@dataclass(frozen=True)
class Entry:
    """An entry as `mla-tune cache ls` shows it. Times in seconds since the epoch; `problem` is None for a good one."""

    key: str  # what is known of it when the manifest is broken: 16 digits from the directory's name
    name: str
    isa: str
    size_bytes: int
    path: Path
    created: float
    used: float  # to the hour
    layer: Path
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Store:
    """One root. A store that is not `writable` is never written to, not even to note a use."""

    root: Path
    writable: bool

    @property
    def base(self) -> Path:
        return self.root / layers.VERSION

    def path(self, source: Source) -> Path:
        """Where the source's entry is or would be."""
        return self.base / source.key[:2] / f"{_readable(source.name)}-{_readable(source.isa)}-{source.key[:16]}"

    def find(self, key: str) -> Path | None:
        """Where an entry filed under a key is, by a look at the directory."""
        found = (path for path in _listdir(self.base / key[:2]) if path.name.endswith(f"-{key[:16]}"))
        return next(found, None)

    def paths(self) -> Iterator[Path]:
        """All entries, good or bad; and whatever else lies among them."""
        for shard in _listdir(self.base):
            if re.fullmatch(r"[0-9a-f]{2}", shard.name):
                yield from _listdir(shard)

    def load(self, path: Path, key: str) -> Artifact | None:
        """The entry's artifact, verified; None is a miss. A bad entry is evicted where that is ours to do."""
        try:
            artifact = read(path, key)
        except EntryError:
            if self.writable:
                self.remove(path, unless_good=key)
            return None
        except OSError:
            return None
        if artifact is not None and self.writable:
            with contextlib.suppress(OSError):
                if time.time() - os.stat(path).st_mtime > _TOUCH_S:
                    os.utime(path)
        return artifact

    def publish(self, path: Path, artifact: Artifact) -> Artifact:
        """Makes the entry visible; gives the artifact that is in place afterwards, ours or an earlier good one.

        OSError when it could not be written (no space, read-only, …); nothing is left in staging then.
        """
        staged = self._aside()
        try:
            failpoint("compiled")
            layers.make_private(staged)
            _write(staged / BINARY, artifact.binary)
            failpoint("staged_binary")
            _write(staged / MANIFEST, _manifest_text(artifact).encode())
            failpoint("staged_manifest")
            _sync_directory(staged)
            if path.parent.exists() and not path.parent.is_dir():
                self.remove(path.parent)
            layers.make_private(path.parent)
            failpoint("before_rename")
            if (winner := self._place(staged, path, artifact.key)) is not None:
                return winner
            failpoint("after_rename")
            _sync_directory(path.parent)
            return artifact
        finally:
            _delete(staged)

    def _place(self, staged: Path, path: Path, key: str) -> Artifact | None:
        """Renames staged to path. The artifact of a good entry that was there first; None when it is now ours."""
        for _ in range(3):  # a bad entry in place is moved out of the way; another one may come meanwhile
            try:
                os.rename(staged, path)
                return None
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            with contextlib.suppress(EntryError, OSError):
                if (winner := read(path, key)) is not None:
                    return winner
            self.remove(path, unless_good=key)
        raise OSError(errno.EBUSY, "a bad entry in its place cannot be removed", str(path))

    def remove(self, path: Path, unless_good: str | None = None) -> bool:
        """Whether it went. Moved to staging first, so that nobody sees half of it.

        `unless_good`: put it back when it is a good entry for this key, published since the caller looked.
        """
        aside = self._aside()
        try:
            layers.make_private(aside.parent)
            failpoint("evict")
            os.rename(path, aside)
        except FileNotFoundError:
            return False  # another process was faster
        except OSError:
            # overlayfs cannot rename a directory of a lower layer, a full disk may have no room for the new name
            with contextlib.suppress(OSError):
                os.unlink(path / MANIFEST)  # first: from here on it is a miss
            _delete(path)
            return not os.path.lexists(path)
        with contextlib.suppress(OSError):
            if unless_good is not None:
                with contextlib.suppress(EntryError):
                    if read(aside, unless_good) is not None:
                        os.rename(aside, path)
                        return False
            failpoint("evicted")
        _delete(aside)
        return True

    def entry(self, path: Path, *, thorough: bool) -> Entry:
        """What there is to know of an entry. Only `thorough` reads the binary and compares its hash."""
        key, manifest, size_bytes = path.name.rpartition("-")[2], {}, 0
        created = used = 0.0
        try:
            used = os.stat(path).st_mtime
            size_bytes = sum(os.lstat(file).st_size for file in _listdir(path))
            manifest = _manifest(path)
            key, created = manifest["key"], os.stat(path / MANIFEST).st_mtime
            read(path, key, thorough=thorough)
            filed = path.parent.name == key[:2] and path.name.endswith(f"-{key[:16]}")
            problem = None if filed else "it is filed under the name of another key"
        except (EntryError, OSError, KeyError, TypeError) as error:
            problem = str(error) or type(error).__name__
        name, isa = str(manifest.get("name", path.name)), str(manifest.get("isa", ""))
        return Entry(str(key), name, isa, size_bytes, path, created, used, self.root, problem)

    def sweep(self, older_than_s: float) -> int:
        """Deletes what killed processes left in staging; the number deleted. A writer needs it for milliseconds."""
        removed = 0
        for path in _listdir(self.base / "staging"):
            with contextlib.suppress(OSError):
                if time.time() - os.lstat(path).st_mtime >= older_than_s:
                    _delete(path)
                    removed += 1
        return removed

    def _aside(self) -> Path:
        return self.base / "staging" / uuid.uuid4().hex


def read(path: Path, key: str, *, thorough: bool = True) -> Artifact | None:
    """The verified artifact of the entry at path, None when there is none, EntryError when it is not what it should be.

    OSError when it cannot be read now (permissions, a stale handle). Not `thorough`: without the binary's content.
    """
    if not os.path.lexists(path):
        return None
    manifest = _manifest(path)
    if manifest.get("key") != key:
        raise EntryError("the manifest is another key's")
    if manifest.get("abi") != ABI:
        raise EntryError(f"its ABI is {manifest.get('abi')!r}, not {ABI}")
    size = manifest.get("size")
    if not isinstance(size, int):
        raise EntryError("the manifest names no size")
    binary = _read_regular(path / BINARY, size, exactly=True, content=thorough)
    if thorough and hashlib.sha256(binary).hexdigest() != manifest.get("sha256"):
        raise EntryError("the binary's hash is not the manifest's")
    try:
        return Artifact.from_manifest(manifest, binary)
    except (KeyError, TypeError) as error:
        raise EntryError(f"the manifest lacks a field ({error})") from None


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of an entry, whole and unaltered; EntryError otherwise."""
    try:
        manifest = json.loads(_read_regular(path / MANIFEST, _MANIFEST_BYTES))
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EntryError(f"the manifest is no JSON ({type(error).__name__})") from None
    if not isinstance(manifest, dict) or manifest.pop("check", None) != _check(manifest):
        raise EntryError("the manifest does not match its check sum")
    return manifest


def _manifest_text(artifact: Artifact) -> str:
    # Through JSON once, so that the check is over what a reader will have.
    manifest = json.loads(json.dumps(artifact.manifest()))
    return json.dumps(manifest | {"check": _check(manifest)}, sort_keys=True, indent=1) + "\n"


def _check(manifest: dict[str, Any]) -> str:
    """A flipped bit in `smem_bytes` is as bad as one in the code."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_regular(path: Path, size: int, *, exactly: bool = False, content: bool = True) -> bytes:
    """The content of a regular file of at most (or exactly) size bytes, b"" without `content`; else EntryError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block us
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise EntryError(f"{path.name} is missing") from None
        raise
    with open(fd, "rb") as file:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode):
            raise EntryError(f"{path.name} is no file")
        if seen.st_size > size or (exactly and seen.st_size != size):
            raise EntryError(f"{path.name} has {seen.st_size} bytes, not {size}")
        return file.read() if content else b""


def _write(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no fsync for directories
            raise
    finally:
        os.close(fd)


def _delete(path: Path) -> None:
    """Removes a file or a tree as far as it goes; never raises."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _listdir(path: Path) -> list[Path]:
    try:
        return sorted(path / name for name in os.listdir(path))
    except OSError:
        return []


def _readable(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text)[:48].strip(".") or "_"
