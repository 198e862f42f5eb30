"""mla_jit: compiles, caches and tunes Multi-head Latent Attention kernels on first call.

Importing the package loads neither torch nor a GPU driver. Public names are imported at first use; the torch operators
(`torch.ops.mla_jit.*`) are registered at once if torch is already loaded, else with the first public function.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "decode": "api", "decode_plan": "api", "DecodePlan": "api", "warmup": "api", "supports": "api",
    "last_dispatch": "api", "export_plan": "api", "load_plan": "api", "reload": "api", "autotune": "tuning.auto",
    "decode_metadata": "api_metadata", "decode_metadata_info": "api_metadata", "DecodeMetadata": "api_metadata",
    "prefill": "api_prefill", "prefill_paged": "api_prefill", "merge_state": "api_prefill",
    "Dispatch": "plan", "Support": "plan", "DecodeProblem": "problem", "PrefillProblem": "problem",
    "Problem": "problem",
    "Config": "config", "Settings": "settings", "configure": "settings", "errors": "", "compat": "",
}  # fmt: skip
__all__ = [*_HOMES]  # noqa: PLE0604  the table is the list

if TYPE_CHECKING:
    from mla_jit import compat as compat
    from mla_jit import errors as errors
    from mla_jit.api import DecodePlan as DecodePlan
    from mla_jit.api import decode as decode
    from mla_jit.api import decode_plan as decode_plan
    from mla_jit.api import export_plan as export_plan
    from mla_jit.api import last_dispatch as last_dispatch
    from mla_jit.api import load_plan as load_plan
    from mla_jit.api import reload as reload
    from mla_jit.api import supports as supports
    from mla_jit.api import warmup as warmup
    from mla_jit.api_metadata import DecodeMetadata as DecodeMetadata
    from mla_jit.api_metadata import decode_metadata as decode_metadata
    from mla_jit.api_metadata import decode_metadata_info as decode_metadata_info
    from mla_jit.api_prefill import merge_state as merge_state
    from mla_jit.api_prefill import prefill as prefill
    from mla_jit.api_prefill import prefill_paged as prefill_paged
    from mla_jit.config import Config as Config
    from mla_jit.plan import Dispatch as Dispatch
    from mla_jit.plan import Support as Support
    from mla_jit.problem import DecodeProblem as DecodeProblem
    from mla_jit.problem import PrefillProblem as PrefillProblem
    from mla_jit.problem import Problem as Problem
    from mla_jit.settings import Settings as Settings
    from mla_jit.settings import configure as configure
    from mla_jit.tuning.auto import autotune as autotune


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mla_jit' has no attribute {name!r}; it has {', '.join(__all__)}")
    if not home:
        return importlib.import_module(f"mla_jit.{name}")
    value = getattr(importlib.import_module(f"mla_jit.{home}"), name)
    if home.startswith("api"):
        importlib.import_module("mla_jit.torch_ops")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    importlib.import_module("mla_jit.torch_ops")
