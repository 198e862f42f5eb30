"""The HIP runtime: code objects loaded and launched through libamdhip64 (ctypes), by the same seam as CUDA's.

Written against HIP's public C interface; no AMD GPU has run it yet, which `mla-tune support` says.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_jit.compile.artifact import Artifact
from mla_jit.errors import LaunchError
from mla_jit.launch.base import Binding, Launch, Packed


@functools.cache
def _library() -> ctypes.CDLL:
    """libamdhip64: the one that torch has loaded, else the system's."""
    import torch

    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libamdhip64.so*"))
    for name in (*map(str, bundled), "libamdhip64.so", ctypes.util.find_library("amdhip64") or "libamdhip64.so.6"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise LaunchError("libamdhip64 was not found; install a ROCm build of torch, or ROCm's runtime")


def _check(code: int, what: str) -> None:
    if code != 0:
        text = _library().hipGetErrorString
        text.restype = ctypes.c_char_p
        raise LaunchError(f"{what}: {(text(code) or b'').decode()} (hipError {code})")


class HipBound:
    """See launch.base.Bound."""

    def __init__(
        self,
        runtime: HipRuntime,
        artifacts: Sequence[Artifact],
        launches: Sequence[Launch],
        binding: Binding,
        device: int,
    ):
        self._packed = Packed(artifacts, launches, binding)
        if self._packed.maps:
            raise LaunchError("HIP has no tensor maps; the variant should not have asked for one")
        self.operands, self.float_names = self._packed.operands, self._packed.float_names
        self._lock = threading.Lock()
        self._calls = [
            (runtime.load(artifacts[la.kernel], device), la.grid, artifacts[la.kernel], self._packed.addresses[i])
            for i, la in enumerate(launches)
        ]

    def run(self, pointers: Sequence[int], floats: Sequence[float], stream: int) -> None:
        launch = _library().hipModuleLaunchKernel
        with self._lock:
            self._packed.write(pointers, floats)
            for function, grid, artifact, addresses in self._calls:
                code = launch(
                    function, *map(ctypes.c_uint, (*grid, artifact.threads, 1, 1, artifact.smem_bytes)),
                    ctypes.c_void_p(stream), ctypes.cast(addresses, ctypes.c_void_p), None,
                )  # fmt: skip
                _check(code, f"launch of {artifact.name}")


class HipRuntime:
    """Loads code objects, once a device and key."""

    name = "hip"

    def __init__(self) -> None:
        self._functions: dict[tuple[str, int], Any] = {}

    def load(self, artifact: Artifact, device: int) -> ctypes.c_void_p:
        """The kernel of an artifact as a hipFunction_t of `device`."""
        if (key := (artifact.key, device)) not in self._functions:
            import torch

            with torch.cuda.device(device):
                module, function = ctypes.c_void_p(), ctypes.c_void_p()
                _check(_library().hipModuleLoadData(ctypes.byref(module), artifact.binary), f"load of {artifact.name}")
                code = _library().hipModuleGetFunction(ctypes.byref(function), module, artifact.entry.encode())
                _check(code, f"lookup of {artifact.entry}")
            self._functions[key] = function
        return self._functions[key]

    def has(self, artifact: Artifact, device: int) -> bool:
        """Whether the artifact is loaded on the device already."""
        return (artifact.key, device) in self._functions

    def bind(
        self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int
    ) -> HipBound:
        return HipBound(self, artifacts, launches, binding, device)
