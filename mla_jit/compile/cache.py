"""The kernel cache: a `Source` to its `Artifact`, compiled at most once a node however many threads and processes ask.

Memory, then the writable root, then the read-only layers, then the compiler under a lock, then publication. Promises:
no content of a cache directory and no full or read-only disk is an error to the caller; nobody waits for a dead
process, and for a live one no longer than the setting lock_timeout_s; what is returned was verified against the key.
The only errors are CompileError (the compiler's) and CacheMiss (compiling is not allowed).

    store       the layout of a root, verification, publication        locks       who may compile
    layers      which roots, and whom to trust                         child       how the compiler is run
    failpoints  how the tests kill it at every step

This file knows the order of the steps and the whole-cache verbs of `mla-tune cache`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mla_jit import settings
from mla_jit.compile import child, layers, locks
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.compile.failpoints import FAILPOINTS
from mla_jit.compile.store import Entry, Store
from mla_jit.errors import CacheMiss, CompileError

__all__ = [
    "FAILPOINTS", "TOOLCHAINS", "Collected", "Entry", "Fault", "Origin", "build", "build_traced", "clear", "entries",
    "forget", "gc", "lookup", "path_of", "register_toolchain", "root", "verify",
]  # fmt: skip

TOOLCHAINS = ("triton", "ptx", "amdgcn")  # each a module here with compile_source(source) -> Artifact

Origin = Literal["memory", "disk", "layer", "compiled"]

_modules = {name: f"mla_jit.compile.{name}" for name in TOOLCHAINS}
_memory: dict[str, Artifact] = {}


@dataclass(frozen=True)
class Fault:
    """An entry that would not be used, and why. `fixed`: it was evicted."""

    path: Path
    key: str
    reason: str
    layer: Path
    fixed: bool


@dataclass(frozen=True)
class Collected:
    """What `gc` removed: entries, abandoned staging directories, abandoned lock files."""

    entries: tuple[Entry, ...]
    staging: int
    locks: int

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries)


def build(source: Source, *, forbid_compile: str | None = None) -> Artifact:
    """The source's artifact from memory, disk or the compiler.

    `forbid_compile` says why compiling is not allowed now ("under CUDA graph capture"). CacheMiss when it is not
    compiled and that, or strict mode, forbids it; CompileError when the compiler fails.
    """
    return build_traced(source, forbid_compile=forbid_compile)[0]


def build_traced(
    source: Source, *, forbid_compile: str | None = None, compiler: Callable[[Source, str], Artifact] | None = None
) -> tuple[Artifact, Origin]:  # fmt: skip
    """`build`, and where the artifact came from: "memory", "disk" (the root), "layer" (a read-only one), "compiled".

    `compiler`: with it, a child.Compiler, and in every mode: the way of those who compile ahead or tune.
    """
    if (found := _find(source)) is not None:
        return found
    if forbid_compile is None and compiler is None and settings.current().mode == "strict":
        forbid_compile = "in strict mode"
    if forbid_compile is not None:
        raise _miss(source, forbid_compile)
    deadline = time.monotonic() + settings.current().lock_timeout_s
    with locks.thread_lock(source.key, deadline):
        return _find(source) or _compile(source, deadline, compiler)


def lookup(source_or_key: Source | str) -> Artifact | None:
    """The artifact of a source or of a full key, if it is in memory or on disk. Compiles nothing, waits for nobody."""
    found = _find(source_or_key)
    return None if found is None else found[0]


def path_of(key: str) -> Path | None:
    """The directory of the entry that holds a (full) key, in the first layer that has one."""
    return next((path for store in _stores() if (path := store.find(key)) is not None), None)


def entries() -> list[Entry]:
    """All entries of all layers. `ok` is about everything but the binary's hash, which `verify` compares."""
    return [store.entry(path, thorough=False) for store in _stores() for path in store.paths()]


def verify(fix: bool = False) -> list[Fault]:
    """Reads every entry of every layer and lists the bad ones; with `fix` evicts those in the writable root."""
    faults = []
    for store in _stores():
        for path in store.paths():
            entry = store.entry(path, thorough=True)
            if entry.problem is not None and os.path.lexists(path):  # else it went while we looked
                fixed = fix and store.writable and store.remove(path)
                faults.append(Fault(path, entry.key, entry.problem, store.root, fixed))
    return faults


def gc(max_age_s: float | None = None, max_bytes: int | None = None, *, staging_age_s: float = 3600.0) -> Collected:
    """Removes from the writable root what was not used for max_age_s, then the longest unused beyond max_bytes.

    In any case collects lock files without a holder and staging directories older than staging_age_s.
    """
    if (store := _root_store()) is None:
        return Collected((), 0, 0)
    kept = sorted((store.entry(path, thorough=False) for path in store.paths()), key=lambda entry: entry.used)
    size_bytes = sum(entry.size_bytes for entry in kept)
    removed = []
    for entry in kept:
        too_old = max_age_s is not None and time.time() - entry.used > max_age_s
        too_many = max_bytes is not None and size_bytes > max_bytes
        if (too_old or too_many) and store.remove(entry.path):
            size_bytes -= entry.size_bytes
            removed.append(entry)
    return Collected(tuple(removed), store.sweep(staging_age_s), locks.collect(store.root))


def clear() -> int:
    """Removes all entries of the writable root and forgets those in memory; the number removed."""
    store = _root_store()
    removed = 0 if store is None else sum(store.remove(path) for path in store.paths())
    forget()
    return removed


def root() -> Path | None:
    """The writable root in use, for the settings in force; None when nothing can be written."""
    return layers.current().root


def forget() -> None:
    """Drops what is in memory, and looks at the directories afresh at the next call."""
    _memory.clear()
    layers.forget()


def register_toolchain(name: str, module: str) -> None:
    """Adds (or replaces, for this process) the module whose compile_source builds sources of this toolchain."""
    _modules[name] = module


def _root_store() -> Store | None:
    path = layers.current().root
    return None if path is None else Store(path, writable=True)


def _stores() -> list[Store]:
    """In the order of search."""
    top = _root_store()
    return ([] if top is None else [top]) + [Store(path, writable=False) for path in layers.current().readonly]


def _find(wanted: Source | str) -> tuple[Artifact, Origin] | None:
    key = wanted if isinstance(wanted, str) else wanted.key
    if (artifact := _memory.get(key)) is not None:
        return artifact, "memory"
    for store in _stores():
        path = store.find(key) if isinstance(wanted, str) else store.path(wanted)
        if path is not None and (artifact := store.load(path, key)) is not None:
            return _memory.setdefault(key, artifact), "disk" if store.writable else "layer"
    return None


def _compile(
    source: Source, deadline: float, compiler: Callable[[Source, str], Artifact] | None
) -> tuple[Artifact, Origin]:  # fmt: skip
    """Compiles and publishes, unless another process does while we wait for its lock."""
    module = _module(source)
    store = _root_store()
    directory = None if store is None else locks.directory(store.root)
    found: list[tuple[Artifact, Origin]] = []

    def published() -> bool:  # by the lock's holder, which may then take its time to unlock
        if (hit := _find(source)) is not None:
            found.append(hit)
        return bool(found)

    with locks.file_lock(directory, source.key, deadline, published):
        if found or published():
            return found[0]
        run = compiler or (child.compile_apart if settings.current().safe_compile else child.compile_here)
        artifact = run(source, module)
        if store is not None:
            artifact = _publish(store, source, artifact)
    return _memory.setdefault(source.key, artifact), "compiled"


def _publish(store: Store, source: Source, artifact: Artifact) -> Artifact:
    """What is in the cache now, or the artifact in hand when it cannot be written: that is no reason to fail a call."""
    try:
        artifact = store.publish(store.path(source), artifact)
        store.sweep(older_than_s=3600.0)
    except OSError as error:
        layers.warn_once(
            f"publish {store.root}",
            f"mla_jit could not write a kernel to its cache {store.root}: {error.strerror or error}. "
            "It goes on without; set MLA_JIT_CACHE_DIR or free some space (mla-tune cache gc).",
        )
    return artifact


def _module(source: Source) -> str:
    if source.toolchain not in _modules:
        known = ", ".join(sorted(_modules))
        raise CompileError(
            f"{source.name} (key {source.key}) wants the toolchain {source.toolchain!r}; known are {known}",
            key=source.key,
        )
    return _modules[source.toolchain]


def _miss(source: Source, why: str) -> CacheMiss:
    searched = ", ".join(str(store.root) for store in _stores()) or "no directory"
    target = settings.current().target or source.isa
    return CacheMiss(
        f"{source.name} for {source.isa} is not compiled, and compiling is not allowed {why} (key {source.key}; "
        f"searched {searched}). Compile it ahead: mla-tune compile --target {target} --model MODEL --op all"
    )
