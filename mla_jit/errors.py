"""The tree of errors that mla_jit raises. Every message says the cause and the remedy.

MlaJitError
├── InvalidInput        (also ValueError)    a tensor, shape, dtype, stride or flag that no kernel could serve
├── NoVariant           (also LookupError)   valid, but no variant of any backend accepts it on this target
├── UnknownTarget       (also LookupError)   a device or target name that configs/targets.yaml has no row for
├── CompileError        (also RuntimeError)  the compiler or assembler refused, aborted or timed out
│   ├── CompilerAborted                      its process died, or was killed because it did not end
│   └── IllegalArtifact                      it compiled, but the result cannot run on the target
├── CacheMiss           (also RuntimeError)  strict mode, or under graph capture: not compiled ahead
├── LaunchError         (also RuntimeError)  the driver refused to load or to launch
├── StoreError          (also RuntimeError)  a tuning database that cannot be opened, read or written
└── SettingsError       (also ValueError)    a setting or environment variable that cannot be understood
"""

from __future__ import annotations

from typing import Any


class MlaJitError(Exception):
    """Base of all errors raised on purpose by mla_jit."""


class InvalidInput(MlaJitError, ValueError):
    """An argument that no kernel could serve: wrong shape, dtype, device, stride or flag."""


class NoVariant(MlaJitError, LookupError):
    """A valid problem that no variant accepts on this target. `reasons` maps a variant to its reason."""

    def __init__(self, message: str, reasons: dict[str, str]):
        super().__init__(message)
        self.reasons = dict(reasons)


class UnknownTarget(MlaJitError, LookupError):
    """A device or a target name without a row in configs/targets.yaml."""


class CompileError(MlaJitError, RuntimeError):
    """The compiler refused, aborted or timed out. `key` names the source, `log` holds what it printed."""

    def __init__(self, message: str, *, key: str = "", log: str = ""):
        super().__init__(message)
        self.key, self.log = key, log

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), str(self), self.key, self.log))


class CompilerAborted(CompileError):
    """The compiling process died, or did not end and was killed."""


class IllegalArtifact(CompileError):
    """A compiler returned without error, but its result exceeds the target: shared memory, registers, spills, MMA."""


class CacheMiss(MlaJitError, RuntimeError):
    """A binary was not compiled ahead, and compiling now is not allowed (strict mode, or graph capture)."""


class LaunchError(MlaJitError, RuntimeError):
    """The driver refused to load a module or to launch a kernel."""


class StoreError(MlaJitError, RuntimeError):
    """A tuning database that cannot be opened, read or written: too new, damaged, locked, not one at all."""


class SettingsError(MlaJitError, ValueError):
    """A setting or environment variable that cannot be understood."""


def _rebuild(cls: type[CompileError], message: str, key: str, log: str) -> CompileError:
    return cls(message, key=key, log=log)
