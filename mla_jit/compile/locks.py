"""Who may compile a key: one thread of a process, one process of a node. Waiting is bounded; a lock is only a saving.

Between processes: flock on one small file a key. The kernel drops it with its holder, so a dead holder delays nobody.
On a network file system flock may be missing, slow, or kept by a server that has forgotten us; there the lock files lie
in the node's own temporary directory (one compile a node), and without such a directory there is no lock: duplicate
work, never a hang. What makes publication safe is the rename in `store`, not the lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mla_jit.compile import layers
from mla_jit.compile.failpoints import failpoint

MOUNTS = Path("/proc/self/mounts")
# A local type listed here by mistake costs nothing: its locks only lie elsewhere. So all of fuse is taken as remote.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|ceph|gpfs|beegfs\w*|fuse\b.*|afs|9p|virtiofs|glusterfs|panfs|wekafs|pvfs2|orangefs|gfs2|ocfs2"
)

_log = logging.getLogger("mla_jit.cache")
_threads: dict[str, threading.Lock] = {}
_open: set[FileLock] = set()
_opening = threading.RLock()  # held while a descriptor is opened and noted, so that no fork comes between


@contextmanager
def thread_lock(key: str, deadline: float) -> Iterator[None]:
    """Excludes the other threads of this process for this key; after the deadline (monotonic) goes on without."""
    lock = _threads.setdefault(key, threading.Lock())  # atomic, so no lock guards the table
    held = lock.acquire(timeout=max(0.0, deadline - time.monotonic()))
    try:
        yield
    finally:
        if held:
            lock.release()


class FileLock:
    """The lock of one key between processes. `directory` None means that there is no place for locks."""

    def __init__(self, directory: Path | None, key: str):
        self.path = None if directory is None else directory / f"{key}.lock"
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def acquire(self, deadline: float, done: Callable[[], bool]) -> None:
        """Returns when the lock is held, or waiting is pointless: it is `done`, the deadline is over, no locks here."""
        pause_s = 0.001
        try:
            failpoint("before_lock")
            while not self.try_acquire():
                if self.path is None or done():
                    return
                if time.monotonic() >= deadline:
                    _log.warning("mla_jit waited long enough for the holder of %s and compiles beside it", self.path)
                    return
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 0.05)
            failpoint("locked")
        except OSError:  # no space for the lock file, no flock here: go on without
            self.release()

    def try_acquire(self) -> bool:
        """Whether it is held now. OSError where locks do not work."""
        if self.path is None:
            return False
        with _opening:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            _open.add(self)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        self._close()  # another holds it, or what we locked was unlinked by its last holder meanwhile
        return False

    def release(self) -> None:
        """Unlinks the file while it is held (see samestat above), so that only killed processes leave any behind."""
        if self._fd is None or self.path is None:
            return
        try:
            failpoint("before_unlock")
            os.unlink(self.path)
        except OSError:
            pass
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # close alone would leave it to a duplicate in some forked process
            self._close()

    def _close(self) -> None:
        # Forgotten before it is closed: a fork in between must not let the child close a number that is another file's.
        fd, self._fd = self._fd, None
        _open.discard(self)
        if fd is not None:
            os.close(fd)


@contextmanager
def file_lock(directory: Path | None, key: str, deadline: float, done: Callable[[], bool]) -> Iterator[FileLock]:
    """FileLock.acquire and release around a block, which runs in any case: ask `.held`."""
    lock = FileLock(directory, key)
    try:
        lock.acquire(deadline, done)
        yield lock
    finally:
        lock.release()


def directory(root: Path) -> Path | None:
    """Where the lock files for a writable root lie; None when there is no place for any."""
    base: Path | None = root
    if on_network(root):
        base = layers.shared_temporary()
    if base is None or (base != root and on_network(base)):
        return None
    path = base / layers.VERSION / "locks"
    try:
        layers.make_private(path)
    except OSError:
        return None
    return path


def collect(root: Path) -> int:
    """Deletes the lock files that nobody holds; the number deleted."""
    removed = 0
    if (path := directory(root)) is None:
        return removed
    for name in os.listdir(path):
        lock = FileLock(path, name.removesuffix(".lock"))
        try:
            removed += name.endswith(".lock") and lock.try_acquire()
        except OSError:
            pass
        finally:
            lock.release()
    return removed


def on_network(path: Path) -> bool:
    """Whether the file system below path is shared between machines, by the types in /proc/self/mounts."""
    try:
        mounts = MOUNTS.read_text(errors="surrogateescape")
    except OSError:
        return False
    return _NETWORK.fullmatch(filesystem_type(Path(os.path.realpath(path)), mounts)) is not None


def filesystem_type(path: Path, mounts: str) -> str:
    """The type of the deepest (of equals the last) mount that holds path; "" when none does."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        if len(point.parts) >= best and path.is_relative_to(point):
            best, kind = len(point.parts), fields[2]
    return kind


def _after_fork_in_child() -> None:
    """The child holds nothing: fresh thread locks, and the descriptors closed but not unlocked, which would unlock the
    parent's too; kept open, they would keep the lock alive after the parent's death."""
    _opening.release()
    _threads.clear()
    for lock in list(_open):
        lock._close()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_after_fork_in_child)
