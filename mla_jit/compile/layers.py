"""Which directories the cache uses: the one writable root, the read-only layers, and whom to trust.

A binary from the cache runs with the user's rights, so a directory that others may write is no cache: like ssh with its
keys, we refuse it and say so once. A root that cannot be written still serves as a read-only layer.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from mla_jit import settings

VERSION = "v1"  # of the layout below a root; another version is another directory

_log = logging.getLogger("mla_jit.cache")
_warned: set[str] = set()
_chosen: dict[tuple[object, ...], Layers] = {}


@dataclass(frozen=True)
class Layers:
    """`root` is None when nothing at all can be written. `readonly` are searched after it, in order."""

    root: Path | None
    readonly: tuple[Path, ...]


def current() -> Layers:
    """The layers of the settings in force; looked at once a setting, not once a call."""
    s = settings.current()
    wanted = s.cache_dir or settings.user_cache_dir()
    key = (wanted, s.cache_layers)
    if key not in _chosen:
        _chosen[key] = _choose(wanted, s.cache_layers)
    return _chosen[key]


def forget() -> None:
    """The next `current()` looks at the directories again."""
    _chosen.clear()


def warn_once(topic: str, message: str) -> None:
    """A log record, not a `warnings.warn`: under `-W error` a full disk must not become an exception."""
    if topic not in _warned:
        _warned.add(topic)
        _log.warning("%s", message)


def make_private(path: Path) -> None:
    """mkdir -p with mode 0700 for each directory it makes. Other processes may be making the same ones."""
    try:
        _mkdir(path)
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_private(path.parent)
        _mkdir(path)  # once: in /proc it fails although the parent exists


def refusal(root: Path) -> str | None:
    """Why the directory cannot be trusted (or reached), or None. One that does not exist is judged by its parents."""
    real = Path(os.path.realpath(root))
    try:
        for directory in (real, real / VERSION):
            if (seen := _stat(directory)) is None:
                continue
            if not stat.S_ISDIR(seen.st_mode):
                return f"{directory} is not a directory"
            if seen.st_uid not in (os.geteuid(), 0):
                return f"{directory} belongs to another user (uid {seen.st_uid})"
            if seen.st_mode & 0o022:
                return f"{directory} can be written by others (mode {stat.S_IMODE(seen.st_mode):04o}; chmod go-w it)"
        for directory in real.parents:
            seen = _stat(directory)
            # Whoever can write a parent can put another directory in our place, unless it has the sticky bit like /tmp.
            # Group-writable parents are let pass: with the umask 002 of many systems ~/.cache is one.
            if seen is not None and seen.st_mode & 0o002 and not seen.st_mode & stat.S_ISVTX:
                return f"its parent {directory} can be written by everybody (chmod o-w or +t it)"
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def shared_temporary() -> Path | None:
    """`mla_jit-<uid>` in the node's temporary directory, so that all our processes have the same; None if unusable."""
    if (base := _temporary_base()) is None:
        return None
    path = base / f"mla_jit-{os.geteuid()}"
    return path if refusal(path) is None and _unwritable(path) is None else None


def _choose(wanted: Path, layers: tuple[Path, ...]) -> Layers:
    # Without HOME and a passwd entry the user's directory is the relative path "~/.cache": no place to write to.
    explicit = settings.current().cache_dir is not None
    reason = None if explicit or wanted.is_absolute() else "this user has no home directory"
    wanted = Path(os.path.abspath(wanted))
    reason = reason or refusal(wanted)
    root: Path | None = wanted
    readonly = list(layers)
    if reason is None and (reason := _unwritable(wanted)) is not None and wanted.is_dir():
        readonly.insert(0, wanted)  # filled by somebody else: an image, an administrator
    if reason is not None:
        temporary = shared_temporary() or _own_temporary()
        warn_once(
            f"root {wanted}",
            f"mla_jit cannot keep kernels in {wanted}: {reason}. They are kept "
            + (f"in {temporary}" if temporary else "in memory only")
            + " instead; set MLA_JIT_CACHE_DIR to a directory that only you can write.",
        )
        root = temporary
    return Layers(root, tuple(layer for layer in readonly if _usable(layer)))


def _usable(layer: Path) -> bool:
    if (reason := refusal(layer)) is not None:
        warn_once(f"layer {layer}", f"mla_jit does not read the cache layer {layer}: {reason}.")
    return reason is None


def _unwritable(root: Path) -> str | None:
    """Why nothing can be written below root, found by trying: mode bits say little (uid 0, read-only mounts)."""
    probe = root / VERSION / "staging" / f"probe-{uuid.uuid4().hex}"
    try:
        make_private(probe)
        os.rmdir(probe)
    except OSError as error:
        return f"{error.strerror or error}"
    return None


def _temporary_base() -> Path | None:
    try:
        base = Path(tempfile.gettempdir())
        # tempfile falls back to the working directory, which may be a checkout or site-packages: not that.
        return None if base == Path.cwd() and base not in (Path("/tmp"), Path("/var/tmp")) else base
    except OSError:
        return None


def _own_temporary() -> Path | None:
    """A temporary root that goes with this process, for when somebody else sits on the shared name."""
    if (base := _temporary_base()) is None:
        return None
    try:
        path, owner = Path(tempfile.mkdtemp(prefix="mla_jit-", dir=base)), os.getpid()
    except OSError:
        return None
    atexit.register(lambda: shutil.rmtree(path, ignore_errors=True) if os.getpid() == owner else None)
    return path


def _mkdir(path: Path) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not path.is_dir():
            raise


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
