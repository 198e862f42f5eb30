"""Targets: the rows of configs/targets.yaml make sense, and a device finds its row."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mla_jit import launch, resources, settings, target
from mla_jit.dtypes import DTYPES
from mla_jit.errors import UnknownTarget
from mla_jit.target import Target

ROOT = Path(target.__file__).parents[1]
ROWS = target.targets()
GPUS = [row for row in ROWS.values() if row.triton]


@pytest.fixture(autouse=True)
def fresh():
    target._of_gpu.cache_clear()
    yield
    target._of_gpu.cache_clear()


def test_the_rows_that_were_promised():
    assert set(ROWS) == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950", "cpu"}
    assert set(target.SHOWCASE) <= set(ROWS)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_row_is_whole(row: Target):
    raw = resources.load_yaml("configs", "targets.yaml")[row.name]
    assert set(raw) == {f.name for f in dataclasses.fields(Target)} - {"name"}
    assert row.source
    assert row.runtime in (*launch._RUNTIMES, "cpu")
    assert set(row.dtypes) <= set(DTYPES)
    assert {"bf16", "fp16"} <= set(row.dtypes)
    assert min(row.smem_bytes, row.sms, row.bandwidth_gbps, row.bf16_tflops, row.launch_us) > 0
    assert set(row.features) <= ({"tma", "tmem", "mma_m64", "pdl"} if row.runtime == "cuda" else set())


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.name)
def test_a_gpu_says_the_same_to_every_toolchain(row: Target):
    backend, arch, warp = row.triton
    assert (backend, warp) in (("cuda", 32), ("hip", 64))
    assert row.name == (f"sm_{arch}" if backend == "cuda" else arch)
    assert row.isa.startswith(row.name)
    assert row.runtime == backend
    assert row.mma
    assert 0 < row.registers <= row.registers_sm


def test_names_and_isas_are_one():
    for row in ROWS.values():
        assert target.by_name(row.name) is row
        assert target.by_name(row.isa) is row


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UnknownTarget, match=r"no target 'sm_75'.*sm_80.*gfx950.*cpu"):
        target.by_name("sm_75")


def _device(monkeypatch, hip: str | None, **properties):
    plain = {"name": "a device", "multi_processor_count": 7}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**plain | properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    return target.of_device("cuda", 0)


def test_an_nvidia_device_finds_its_row_and_brings_its_own_size(monkeypatch):
    found = _device(monkeypatch, None, major=9, minor=0, shared_memory_per_block_optin=100_000)
    assert (found.name, found.isa, found.device, found.sms, found.smem_bytes) == (
        "sm_90",
        "sm_90a",
        "a device",
        7,
        100_000,
    )
    assert found.registers == ROWS["sm_90"].registers


def test_a_device_never_has_more_shared_memory_than_its_row(monkeypatch):
    assert (
        _device(monkeypatch, None, major=9, minor=0, shared_memory_per_block_optin=1 << 30).smem_bytes
        == ROWS["sm_90"].smem_bytes
    )


def test_an_amd_device_finds_its_row(monkeypatch):
    found = _device(monkeypatch, "7.0", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4)
    assert (found.name, found.sms, found.smem_bytes) == ("gfx942", 7, ROWS["gfx942"].smem_bytes)


def test_a_device_without_a_row_is_refused(monkeypatch):
    with pytest.raises(UnknownTarget, match="sm_75"):
        _device(monkeypatch, None, major=7, minor=5)


def test_the_cpu_and_other_devices():
    assert target.of_device("cpu") is ROWS["cpu"]
    with pytest.raises(UnknownTarget, match=r"'mps'.*move them"):
        target.of_device("mps")


def test_the_setting_overrides_the_detection():
    with settings.scope(target="gfx950"):
        assert target.here() is ROWS["gfx950"]
        assert target.of_device("cpu") is ROWS["gfx950"]
    assert target.of_device("cpu") is ROWS["cpu"]
    with settings.scope(target="nonsense"), pytest.raises(UnknownTarget):
        target.here()


def test_here_without_a_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.here() is ROWS["cpu"]


def test_the_driver_is_asked_where_torch_is_not_loaded() -> None:
    """With a driver of Python objects: `here` needs no torch then, and without a device leaves the word to torch."""
    code = """
import sys, types
class Driver(types.ModuleType):
    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = "major", "minor"
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = "sms", "smem"
    devices = 1
    def cuInit(self, flags):
        if self.devices is None:
            raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search')
        return (0 if self.devices else 100,)
    def cuDeviceGet(self, index): return 0, index
    def cuDeviceGetAttribute(self, kind, device): return 0, {"major": 9, "minor": 0, "sms": 78, "smem": 200000}[kind]
    def cuDeviceGetName(self, size, device): return 0, b"Some GPU" + bytes(248)
    def cuDeviceTotalMem(self, device): return 0, 5 << 30
driver = sys.modules["cuda.bindings.driver"] = Driver("cuda.bindings.driver")
sys.modules["cuda"], sys.modules["cuda.bindings"] = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
sys.modules["cuda.bindings"].driver = driver
from mla_jit import target
found = target.here()
print(found.name, found.device, found.sms, found.smem_bytes, target.memory_bytes() >> 30, "torch" in sys.modules)
for driver.devices in (0, None):
    target._by_driver.cache_clear()
    print(target._by_driver(), target.here().name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sm_90 Some GPU 78 200000 5 False", "None cpu", "None cpu"]
