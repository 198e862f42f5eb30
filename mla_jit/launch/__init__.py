"""How an artifact becomes a call: one file a runtime. `runtime(name)` gives the one that a target's row names."""

from __future__ import annotations

import functools
import importlib

from mla_jit.launch.base import Runtime

_RUNTIMES = {"cuda": "CudaRuntime", "hip": "HipRuntime", "null": "NullRuntime"}
_override: Runtime | None = None


@functools.cache
def _make(name: str) -> Runtime:
    module = importlib.import_module(f"mla_jit.launch.{name}")
    made: Runtime = getattr(module, _RUNTIMES[name])()
    return made


def runtime(name: str) -> Runtime:
    """The process's runtime of that name; where `override` is set, that one for every name."""
    return _override if _override is not None else _make(name)


def override(instead: Runtime | None) -> None:
    """Sends every launch to another runtime (the null runtime, in tests), until called with None."""
    global _override
    _override = instead
