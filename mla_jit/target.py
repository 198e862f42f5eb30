"""`Target`: a row of configs/targets.yaml, and the only place that finds out which architecture a device is."""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass
from typing import Any

from mla_jit import resources, settings
from mla_jit.errors import UnknownTarget

SHOWCASE = ("sm_90", "gfx942", "gfx950")  # what `mla-tune quickstart` cross-compiles for


@dataclass(frozen=True)
class Target:
    """An architecture, or one device of it. Sizes in bytes, bandwidth in GB/s, rates in dense TFLOP/s."""

    name: str
    isa: str
    triton: tuple[str | int, ...]
    runtime: str
    device: str
    sms: int
    smem_bytes: int
    registers_sm: int
    registers: int
    l2_bytes: int
    bandwidth_gbps: float
    bf16_tflops: float
    launch_us: float
    dtypes: tuple[str, ...]
    features: tuple[str, ...]
    mma: tuple[str, ...]
    source: str = dataclasses.field(compare=False, hash=False, default="")

    def has(self, feature: str) -> bool:
        return feature in self.features


@functools.cache
def targets() -> dict[str, Target]:
    """All rows of configs/targets.yaml by name."""
    rows: dict[str, dict[str, Any]] = resources.load_yaml("configs", "targets.yaml")
    found = {}
    for name, row in rows.items():
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        found[name] = Target(name=name, **fields)
    return found


@functools.cache
def by_name(name: str) -> Target:
    """The row of a target's name or ISA ("sm_90" and "sm_90a" are one). UnknownTarget lists what there is."""
    for row in targets().values():
        if name in (row.name, row.isa):
            return row
    raise UnknownTarget(
        f"no target {name!r}; configs/targets.yaml has {', '.join(targets())}. A new architecture is a new row"
    )


def of_device(device_type: str, index: int = 0) -> Target:
    """The target of a torch device ("cuda", 0), with the SM count and shared memory that the device itself reports.

    The setting `target` overrides the detection. Raises UnknownTarget.
    """
    if (forced := settings.current().target) is not None:
        return by_name(forced)
    if device_type == "cpu":
        return by_name("cpu")
    if device_type != "cuda":  # ROCm builds of torch call their devices "cuda" too
        raise UnknownTarget(f"tensors on a {device_type!r} device are not supported; move them to a GPU or to the CPU")
    return _of_gpu(index)


@functools.cache
def _of_gpu(index: int) -> Target:
    import torch

    props = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        row = by_name(props.gcnArchName.split(":")[0])
    else:
        row = by_name(f"sm_{props.major}{props.minor}")
    smem = getattr(props, "shared_memory_per_block_optin", row.smem_bytes)
    return dataclasses.replace(
        row, device=props.name, sms=props.multi_processor_count, smem_bytes=min(row.smem_bytes, smem), source=row.source
    )


def here() -> Target:
    """This machine's target: its first GPU where torch sees one, else `cpu`."""
    if (forced := settings.current().target) is not None:
        return by_name(forced)
    if "torch" not in sys.modules and (said := _by_driver()) is not None:
        return said[0]
    import torch

    return of_device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else by_name("cpu")


def memory_bytes() -> int | None:
    """Of this machine's first GPU; None where there is none."""
    if "torch" not in sys.modules and (said := _by_driver()) is not None:
        return said[1]
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


@functools.cache
def _by_driver() -> tuple[Target, int] | None:
    """The first CUDA device and its bytes of memory, by the driver's own word: seconds sooner than torch is imported.

    None where cuda-bindings (CUDA builds of torch bring them), a driver or a device are missing: torch has the say.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    kinds = driver.CUdevice_attribute

    def asked(*result: Any) -> Any:
        if result[0]:
            raise LookupError(result[0])
        return result[1] if len(result) > 1 else None

    try:
        asked(*driver.cuInit(0))
        device = asked(*driver.cuDeviceGet(0))
        wanted = (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )  # fmt: skip
        major, minor, sms, smem = (asked(*driver.cuDeviceGetAttribute(kind, device)) for kind in wanted)
        row = by_name(f"sm_{major}{minor}")
        name = asked(*driver.cuDeviceGetName(256, device)).split(b"\0")[0].decode()
        found = dataclasses.replace(row, device=name, sms=sms, smem_bytes=min(row.smem_bytes, smem))
        return found, int(asked(*driver.cuDeviceTotalMem(device)))
    except (LookupError, RuntimeError, OSError):  # no row, an error of the driver, no driver: torch has the say
        return None
