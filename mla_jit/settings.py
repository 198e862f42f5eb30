"""The settings of a process. The only module that reads the environment; it is read once, at first use.

`current()` gives the settings in force, `configure(...)` changes them for the process, `scope(...)` for a `with` block.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mla_jit.errors import SettingsError

MODES = ("serve", "strict")
BACKENDS = ("asm", "triton", "cpu")
# Environment variables of the compilers that say where things are or what is printed, and change no code; or that
# mla_jit sets while it compiles, whatever they were.
_NEUTRAL = (
    "CACHE",
    "HOME",
    "DUMP",
    "PRINT",
    "INTERPRET",
    "REDIS",
    "LIBCUDA",
    "LIBHIP",
    "STORE_BINARY",
    "ALWAYS_COMPILE",
    "DISABLE_LINE_INFO",
)


@dataclass(frozen=True)
class Settings:
    """Everything a user can set. Each field's environment variable is MLA_JIT_ and its name in capitals.

    cache_dir: root of the writable cache; None means the user's cache directory.
    cache_layers: read-only cache roots, searched after the writable one.
    mode: "serve" compiles on a miss; "strict" raises instead. Neither ever benchmarks.
    safe_compile: compile in a child process, so that a compiler that aborts or hangs costs only that call.
    compile_timeout_s: after this a child that compiles is killed.
    lock_timeout_s: how long to wait for another process that compiles the same key before compiling beside it.
    target: a row of configs/targets.yaml to use instead of the detected one.
    failpoint: for tests, "name=action" (see compile/cache.py).
    tuning_db: the user's tuning database; None means `tuning.db` in the user's cache directory.
    shipped_db: whether the tuning rows shipped with the package are looked at; after `mla_jit.reload()` if changed.
    backends: the only backends whose kernels may serve ("asm", "triton", "cpu"), all if empty; after
        `mla_jit.reload()` if changed. To tell which backend something depends on.
    bounded_waits: assembled kernels that hang are stopped, and an eager call's error names the barriers (slower).
    """

    cache_dir: Path | None = None
    cache_layers: tuple[Path, ...] = ()
    mode: str = "serve"
    safe_compile: bool = False
    compile_timeout_s: float = 300.0
    lock_timeout_s: float = 120.0
    target: str | None = None
    failpoint: str | None = None
    tuning_db: Path | None = None
    shipped_db: bool = True
    backends: tuple[str, ...] = ()
    bounded_waits: bool = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Parses MLA_JIT_*; raises SettingsError for an unknown name or a value that does not parse."""
        values: dict[str, object] = {}
        fields = {f.name for f in dataclasses.fields(cls)}
        for variable, text in env.items():
            if not variable.startswith("MLA_JIT_"):
                continue
            name = variable.removeprefix("MLA_JIT_").lower()
            if name not in fields:
                raise SettingsError(f"{variable} is no setting of mla_jit; known: {', '.join(sorted(fields))}")
            if text:
                values[name] = _parse(variable, name, text)
        return cls(**values)._checked()  # type: ignore[arg-type]

    def _checked(self) -> Settings:
        if self.mode not in MODES:
            raise SettingsError(f"mode {self.mode!r} is unknown (MLA_JIT_MODE); use one of {', '.join(MODES)}")
        if unknown := set(self.backends) - set(BACKENDS):
            raise SettingsError(
                f"no backend {', '.join(sorted(unknown))} (MLA_JIT_BACKENDS); there is {', '.join(BACKENDS)}, by commas"
            )
        return self


def _parse(variable: str, name: str, text: str) -> object:
    try:
        if name in ("cache_dir", "tuning_db"):
            return Path(text).expanduser()
        if name == "cache_layers":
            return tuple(Path(p).expanduser() for p in text.split(os.pathsep) if p)
        if name == "backends":
            return tuple(name.strip() for name in text.split(",") if name.strip())
        if name.endswith("_s"):
            return float(text)
        if name in ("safe_compile", "shipped_db", "bounded_waits"):
            return {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}[text.lower()]
    except (ValueError, KeyError):
        raise SettingsError(f"{variable}={text!r} cannot be understood; unset it or correct it") from None
    return text


_lock = threading.Lock()
_current: Settings | None = None


def _after_fork_in_child() -> None:
    """Another thread may have held the lock at the fork."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def current() -> Settings:
    """The settings in force; the environment is read at the first call."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                _current = Settings.from_env(os.environ)
    return _current


def configure(**changes: object) -> Settings:
    """Changes settings for the whole process and returns them; SettingsError for an unknown name or value."""
    global _current
    if unknown := set(changes) - {f.name for f in dataclasses.fields(Settings)}:
        raise SettingsError(f"no such setting: {', '.join(sorted(unknown))}")
    _current = dataclasses.replace(current(), **changes)._checked()  # type: ignore[arg-type]
    return _current


@contextmanager
def scope(**changes: object) -> Iterator[Settings]:
    """`configure` for the duration of a `with` block (process-wide, not per thread)."""
    global _current
    before = current()
    try:
        yield configure(**changes)
    finally:
        _current = before


def user_cache_dir() -> Path:
    """The user's cache directory for mla_jit: $XDG_CACHE_HOME/mla_jit, else ~/.cache/mla_jit."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "mla_jit"


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter in this process (TRITON_INTERPRET=1 at their import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def compiler_knobs() -> tuple[tuple[str, str], ...]:
    """The environment variables in force that can change what a compiler emits; they are part of a Source."""
    prefixes = ("TRITON_", "AMDGCN_", "PTXAS_", "DISABLE_PTXAS_", "NVPTX_", "LLVM_", "MLIR_")
    return tuple(
        sorted(
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(prefixes) and not any(word in name for word in _NEUTRAL)
        )
    )


def child_environment() -> dict[str, str]:
    """The environment for a compiling child process: ours, with bytecode and GPU discovery off."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
