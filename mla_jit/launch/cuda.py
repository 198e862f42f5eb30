"""The CUDA runtime: cubins loaded and launched through the driver (cuda-bindings), one cuLaunchKernelEx a kernel.

torch owns memory, streams and the primary context; this module owns modules, functions and tensor maps. A loaded module
belongs to a device. Handles are dropped in a forked child, where CUDA cannot be used anyway.
"""

from __future__ import annotations

import ctypes
import operator
import os
import struct
import threading
from collections.abc import Sequence
from typing import Any

from mla_jit.compile.artifact import Artifact
from mla_jit.errors import LaunchError
from mla_jit.launch.base import Arg, Binding, Launch, Packed

_DYNAMIC_SMEM = 48 * 1024  # above this a function must ask for more
_WAIT = struct.Struct("3I")  # in vain: program + 1, thread, the barrier's offset in shared memory
WAITS_TOLD = 16  # by a kernel, at most: macros.ptx says the same
_WAITS = WAITS_TOLD * _WAIT.size
_MAPS_KEPT = 1024  # tensor maps a bound call keeps; a serving process has one a layer


def _check(result: tuple[Any, ...], what: str) -> Any:
    """The values of a driver call, or a LaunchError with the driver's own name for what went wrong."""
    error, *values = result
    if int(error) != 0:
        from cuda.bindings import driver

        text = driver.cuGetErrorString(error)[1]
        message = text.decode() if isinstance(text, bytes) else str(text)
        raise LaunchError(f"{what}: {message} ({error.name})")
    return values[0] if len(values) == 1 else tuple(values)


class CudaBound:
    """See launch.base.Bound. Thread-safe: the argument block is written and launched under a lock."""

    def __init__(
        self,
        runtime: CudaRuntime,
        artifacts: Sequence[Artifact],
        launches: Sequence[Launch],
        binding: Binding,
        device: int,
    ):
        import torch
        from cuda.bindings import driver

        self._current_device = torch._C._cuda_getDevice
        self._device, self._binding = device, binding
        self._packed = packed = Packed(artifacts, launches, binding)
        self.operands, self.float_names = packed.operands, packed.float_names
        self._lock = threading.Lock()
        self._stream = -1
        self._driver = driver
        self._launch = driver.cuLaunchKernelEx
        self._pack, self._block = packed.call.pack_into, packed.block
        self._maps: list[tuple[int, int, int, dict[str, Any], Arg]] = []
        self._encoded: dict[tuple[int, int], tuple[int, Any]] = {}
        self._mapped: Any = None
        for number, position, parameter, arg in packed.maps:
            box = artifacts[launches[number].kernel].extra["tma"][parameter]
            self._maps.append((packed.operands.index((arg.name, arg.offset)), number, position, box, arg))
        self._of_maps = operator.itemgetter(*(operand for operand, *_ in self._maps)) if self._maps else None
        self._calls = []
        self._watched = [a for a in artifacts if a.extra.get("barriers")]
        self._hung = runtime.hung
        for number, launch in enumerate(launches):
            artifact = artifacts[launch.kernel]
            function = runtime.load(artifact, device)
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
            config.blockDimX, config.blockDimY, config.blockDimZ = artifact.threads, 1, 1
            config.sharedMemBytes = artifact.smem_bytes
            attributes = []
            if launch.pdl:
                attribute = driver.CUlaunchAttribute()
                attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                value = driver.CUlaunchAttributeValue()
                value.programmaticStreamSerializationAllowed = 1
                attribute.value = value
                attributes.append(attribute)
            if launch.cluster > 1:
                attribute = driver.CUlaunchAttribute()
                attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                value = driver.CUlaunchAttributeValue()
                value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = launch.cluster, 1, 1
                attribute.value = value
                attributes.append(attribute)
            if attributes:
                config.attrs = attributes
            config.numAttrs = len(attributes)
            self._calls.append((config, function, ctypes.addressof(packed.addresses[number]), artifact.name))

    def run(self, pointers: Sequence[int], floats: Sequence[float], stream: int) -> None:
        if self._current_device() != self._device:  # a launch goes to the current context
            import torch

            with torch.cuda.device(self._device):
                self.run(pointers, floats, stream)
            return
        with self._lock:
            self._pack(self._block, 0, *pointers, *floats)
            if self._of_maps is not None and self._mapped != (mapped := self._of_maps(pointers)):
                if len(self._encoded) + len(self._maps) > _MAPS_KEPT:
                    self._encoded.clear()
                for i, (operand, number, position, box, arg) in enumerate(self._maps):
                    self._packed.point(number, position, self._map(i, pointers[operand], box, arg))
                self._mapped = mapped
            if stream != self._stream:
                handle = self._driver.CUstream(stream)
                for config, *_ in self._calls:
                    config.hStream = handle
                self._stream = stream
            for config, function, addresses, name in self._calls:
                result = self._launch(config, function, addresses, 0)
                if result[0]:
                    _check(result, f"launch of {name}")
        if self._watched and not _capturing(stream):
            for artifact in self._watched:
                self._hung(artifact, self._device, stream)

    def _map(self, index: int, pointer: int, box: dict[str, Any], arg: Arg) -> int:
        """The address of the encoded tensor map for a buffer at `pointer`, kept for the next call."""
        if (index, pointer) not in self._encoded:
            made = encode_map(pointer, self._binding.views[arg.name], box)
            self._encoded[index, pointer] = (int(made.getPtr()), made)
        return self._encoded[index, pointer][0]


def _capturing(stream: int) -> bool:
    from cuda.bindings import driver

    status = _check(driver.cuStreamIsCapturing(driver.CUstream(stream)), "state of the stream")
    return bool(status != driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE)


def encode_map(pointer: int, view: Any, box: dict[str, Any]) -> Any:
    """A CUtensorMap over a 2-D view; `box` is what the compiler says of its copies (swizzle, element type, box).

    The L2 fetches what is asked for: rounded up to 256 bytes, boxes of 128-byte rows in random pages read 4.17 TB/s on
    an H200 instead of 4.46 (2026-11-28, 240 pages a program, nothing computed).
    """
    from cuda.bindings import driver

    swizzles = driver.CUtensorMapSwizzle
    types = driver.CUtensorMapDataType
    columns, rows = [driver.cuuint64_t(n) for n in (view.columns, view.rows)]
    swizzle = (
        swizzles.CU_TENSOR_MAP_SWIZZLE_NONE, swizzles.CU_TENSOR_MAP_SWIZZLE_32B, swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    )[box["swizzle"]]  # fmt: skip
    element = {
        "bf16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "fp16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "fp32": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }.get(view.dtype, types.CU_TENSOR_MAP_DATA_TYPE_UINT8)  # fmt: skip
    shape = [driver.cuuint32_t(n) for n in reversed(box["block_size"])]
    return _check(
        driver.cuTensorMapEncodeTiled(
            element, 2, pointer, [columns, rows], [driver.cuuint64_t(view.row_bytes)], shape,
            [driver.cuuint32_t(1)] * 2,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"tensor map of {view.rows} × {view.columns} elements, row stride {view.row_bytes} bytes",
    )  # fmt: skip


class CudaRuntime:
    """Loads cubins, once a device and key."""

    name = "cuda"

    def __init__(self) -> None:
        self._functions: dict[tuple[str, int], Any] = {}
        self._records: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._functions, self._records, self._lock = {}, {}, threading.Lock()

    def load(self, artifact: Artifact, device: int) -> Any:
        """The kernel of an artifact as a CUfunction of `device`."""
        with self._lock:
            if (key := (artifact.key, device)) not in self._functions:
                self._functions[key] = self._load(artifact, device)
            return self._functions[key]

    def _load(self, artifact: Artifact, device: int) -> Any:
        import torch
        from cuda.bindings import driver

        with torch.cuda.device(device):
            torch.cuda.current_stream()  # torch creates the primary context
            module = _check(driver.cuModuleLoadData(artifact.binary), f"load of {artifact.name} ({artifact.isa})")
            if artifact.extra.get("barriers"):
                self._watch(artifact, device, module)
            function = _check(
                driver.cuModuleGetFunction(module, artifact.entry.encode()), f"lookup of {artifact.entry}"
            )
            if artifact.smem_bytes > _DYNAMIC_SMEM:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _check(
                    driver.cuFuncSetAttribute(function, attribute, artifact.smem_bytes),
                    f"shared memory of {artifact.name}",
                )
        return function

    def _watch(self, artifact: Artifact, device: int, module: Any) -> None:
        """Gives a kernel with bounded waits the host's memory in which it says for which barrier it waits in vain."""
        from cuda.bindings import driver

        kept = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        host = int(_check(driver.cuMemHostAlloc(_WAITS, kept), f"record of {artifact.name}"))
        ctypes.memset(host, 0, _WAITS)
        place, _ = _check(driver.cuModuleGetGlobal(module, b"hung"), f"record of {artifact.name}")
        told = ctypes.c_uint64(host)
        _check(driver.cuMemcpyHtoD(place, ctypes.addressof(told), 8), f"record of {artifact.name}")
        self._records[artifact.key, device] = host

    def hung(self, artifact: Artifact, device: int, stream: int) -> None:
        """Waits for the stream; LaunchError if a kernel with bounded waits was stopped, which names the barrier."""
        from cuda.bindings import driver

        result = driver.cuStreamSynchronize(driver.CUstream(stream))
        told = _WAIT.iter_unpack(ctypes.string_at(self._records[artifact.key, device], _WAITS))
        if waits := [wait for wait in told if wait[0]]:
            named = artifact.extra["barriers"]
            each = {f"thread {thread} for {named.get(str(at), f'at {at}')!r}" for _, thread, at in waits}
            raise LaunchError(
                f"{artifact.name}: program {waits[0][0] - 1} waited in vain at its barriers and was stopped: "
                f"{', '.join(sorted(each))}. CUDA serves this process no more: restart it, with "
                "MLA_JIT_BACKENDS=triton if it must serve meanwhile. It is a fault of the kernel: please report it"
            )
        _check(result, f"run of {artifact.name}")

    def has(self, artifact: Artifact, device: int) -> bool:
        """Whether the artifact is loaded on the device already."""
        return (artifact.key, device) in self._functions

    def bind(
        self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int
    ) -> CudaBound:
        return CudaBound(self, artifacts, launches, binding, device)
