"""Other libraries' spellings of MLA decode: `compat.aiter`, `compat.flash_mla`. Nothing here computes anything."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["aiter", "flash_mla"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'mla_jit.compat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return importlib.import_module(f"mla_jit.compat.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
