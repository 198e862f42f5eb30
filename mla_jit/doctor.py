"""What this machine offers to mla_jit, what is wrong with it, and the remedy."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import stat
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mla_jit import __version__, resources, settings, target
from mla_jit.compile import cache, layers, locks
from mla_jit.compile import triton as toolchain
from mla_jit.errors import MlaJitError

FLOORS = {"python": "3.10", "torch": "2.7"}


@dataclass(frozen=True)
class Check:
    """One thing looked at. status: "ok", "note" (works, with less), or "fault" (something will fail)."""

    name: str
    status: str
    value: str
    remedy: str = ""


def examine() -> list[Check]:
    """All checks. Imports torch; never raises: what raises is a fault."""
    checks: list[Check] = []
    for look in (_versions, _target, _driver, _data, _settings, _cache):
        try:
            checks += look()
        except Exception as error:  # whatever is wrong is what the reader wants to know
            remedy = "" if isinstance(error, MlaJitError) else "this is unexpected; please report it"
            checks.append(Check(look.__name__.strip("_"), "fault", f"{type(error).__name__}: {error}", remedy))
    return checks


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"ok": all(check.status != "fault" for check in checks), "checks": [asdict(check) for check in checks]}


def _release(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)


def _floor(name: str, version: str, floor: str, remedy: str) -> Check:
    low = _release(version) < _release(floor)
    return Check(name, "fault" if low else "ok", f"{version} (at least {floor})", remedy if low else "")


def _versions() -> list[Check]:
    checks = [
        Check("mla_jit", "ok", f"{__version__} in {resources.PACKAGE}"),
        _floor("python", platform.python_version(), FLOORS["python"], "use a newer Python"),
    ]
    try:
        import torch
    except ImportError as error:
        return [*checks, Check("torch", "fault", f"not usable: {error}", "install torch")]
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU only"
    )
    torch_check = _floor("torch", torch.__version__, FLOORS["torch"], "install a newer torch")
    checks.append(dataclasses.replace(torch_check, value=f"{torch_check.value}, {build}"))
    if (name := toolchain.distribution()) is None:
        remedy = "install the extra: pip install 'mla_jit[triton]' (GPU builds of torch bring their own Triton)"
        checks.append(Check("triton", "fault", "not installed: no kernel can be compiled", remedy))
    else:
        remedy = "use a torch whose Triton is new enough; do not put another Triton over a ROCm build"
        check = _floor("triton", importlib.metadata.version(name), toolchain.FLOOR, remedy)
        checks.append(dataclasses.replace(check, value=f"{check.value}, distribution {name}"))
    return checks


def _target() -> list[Check]:
    import torch

    where = target.here()
    forced = " (set by MLA_JIT_TARGET)" if settings.current().target else ""
    checks = [Check("target", "ok", f"{where.name}{forced}: {where.device}, {where.sms} SMs or CUs, ISA {where.isa}")]
    if not torch.cuda.is_available():
        built_for_gpu = bool(torch.version.cuda or torch.version.hip)
        value = "torch sees none; calls run on the cpu target, kernels can be compiled ahead"
        checks.append(Check("gpu", "note", value, "check the driver (nvidia-smi, rocminfo)" if built_for_gpu else ""))
        return checks
    for index in range(torch.cuda.device_count()):
        device = target.of_device("cuda", index)
        checks.append(
            Check(
                f"gpu {index}", "ok", f"{device.device}, {device.name}, {device.smem_bytes} B shared memory a program"
            )
        )
    return checks


def _driver() -> list[Check]:
    import torch

    if torch.version.hip or not torch.cuda.is_available():
        return []
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return [
            Check(
                "cuda-bindings",
                "fault",
                f"not usable: {error}",
                "pip install cuda-bindings (CUDA builds of torch require it)",
            )
        ]
    checks = [Check("cuda-bindings", "ok", importlib.metadata.version("cuda-bindings"))]
    status, version = driver.cuDriverGetVersion()
    text = f"CUDA {version // 1000}.{version % 1000 // 10}" if int(status) == 0 else f"error {status}"
    checks.append(
        Check("driver", "ok" if int(status) == 0 else "fault", text, "" if int(status) == 0 else "reinstall the driver")
    )
    return checks


def _data() -> list[Check]:
    found = [str(resources.path(name)) for name in resources.NAMES]
    return [Check("data", "ok", ", ".join(found))]


def _settings() -> list[Check]:
    now, plain = settings.current(), settings.Settings()
    changed = {
        f.name: getattr(now, f.name) for f in dataclasses.fields(now) if getattr(now, f.name) != getattr(plain, f.name)
    }
    text = ", ".join(f"{name}={value}" for name, value in changed.items()) or "all at their defaults"
    checks = [Check("settings", "ok", text)]
    if knobs := settings.compiler_knobs():
        remedy = "kernels compiled with other values are other kernels; unset what you do not need"
        checks.append(Check("compiler variables", "note", ", ".join(f"{k}={v}" for k, v in knobs), remedy))
    return checks


def _cache() -> list[Check]:
    s = settings.current()
    wanted = s.cache_dir or settings.user_cache_dir()
    used = layers.current()
    checks = []
    if used.root is None:
        checks.append(
            Check(
                "cache",
                "fault",
                "kernels are kept in memory only",
                "set MLA_JIT_CACHE_DIR to a directory that you can write",
            )
        )
    else:
        mode = stat.S_IMODE(used.root.stat().st_mode) if used.root.exists() else 0o700
        value = f"{used.root}, mode {mode:04o}, {_count(used.root)}"
        instead = (
            ""
            if used.root == Path(wanted).absolute()
            else f"{layers.refusal(Path(wanted).absolute()) or 'not writable'}"
        )
        remedy = (
            f"{wanted} is not used ({instead}); set MLA_JIT_CACHE_DIR to a directory that only you can write"
            if instead
            else ""
        )
        checks.append(Check("cache", "note" if instead else "ok", value, remedy))
        kind = locks.filesystem_type(used.root.resolve(), _mounts()) or "unknown"
        if locks.on_network(used.root):
            remedy = "its locks lie in the node's temporary directory; a local MLA_JIT_CACHE_DIR loads faster"
            checks.append(Check("cache file system", "note", f"{kind}, shared between machines", remedy))
        else:
            checks.append(Check("cache file system", "ok", f"{kind}, local"))
    for layer in used.readonly:
        checks.append(Check("cache layer", "ok", f"{layer}, {_count(layer)}"))
    for layer in set(s.cache_layers) - set(used.readonly):
        checks.append(Check("cache layer", "note", f"{layer} is not read", layers.refusal(layer) or ""))
    return checks


def _count(root: Path) -> str:
    found = [entry for entry in cache.entries() if entry.layer == root]
    return f"{len(found)} kernels, {sum(entry.size_bytes for entry in found) / 1e6:.1f} MB"


def _mounts() -> str:
    try:
        return locks.MOUNTS.read_text(errors="surrogateescape")
    except OSError:
        return ""


def render(checks: list[Check], write: Callable[[str], None]) -> None:
    """The checks as lines of text."""
    marks = {"ok": "ok   ", "note": "note ", "fault": "FAULT"}
    for check in checks:
        write(f"{marks[check.status]} {check.name}: {check.value}")
        if check.remedy:
            write(f"      → {check.remedy}")
