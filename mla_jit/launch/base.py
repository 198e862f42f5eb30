"""`Launch`: one kernel's launch as data, and `Executable`: artifacts loaded on a device, ready to be called.

A variant says *which* arguments a kernel takes by name; binding fills in the numbers that a call signature fixes
(strides, sizes), and each call adds only pointers and scales. Each runtime packs them its own way.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from mla_jit.compile.artifact import Artifact

Number = int | float


@dataclass(frozen=True)
class Arg:
    """One runtime argument. kind: "ptr", "i32", "i64", "f32" (by value), or "tma" (a tensor map, with shape and
    strides by value).

    `name` is looked up among the tensors of the call ("ptr", "tma"), the numbers of the call ("f32") or the numbers
    fixed by its signature ("i32", "i64"). `offset` is added to a pointer, in bytes.
    """

    kind: str
    name: str
    offset: int = 0
    block: tuple[int, ...] = ()  # tma: the box, in elements


@dataclass(frozen=True)
class Launch:
    """One kernel of an op's sequence: which source, grid, arguments. `pdl`: may start before the one before it ends.

    `cluster`: so many neighbours of the grid run at once and see each other's shared memory (CUDA alone).
    """

    kernel: int  # index into the variant's sources
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]
    pdl: bool = False
    cluster: int = 1


@dataclass(frozen=True)
class TensorView:
    """What a tensor map needs of a buffer: [rows, columns] in elements; the row stride in elements and in bytes."""

    rows: int
    columns: int
    row_elements: int
    row_bytes: int
    dtype: str


@dataclass(frozen=True)
class Binding:
    """What one call signature fixes: numbers by name, and the views behind tensor maps."""

    numbers: Mapping[str, Number]
    views: Mapping[str, TensorView] = field(default_factory=dict)


class Bound(Protocol):
    """A sequence of launches with all fixed arguments packed.

    `operands` are (name, byte offset) of the pointers that `run` takes, in order; `float_names` the floats.
    """

    operands: tuple[tuple[str, int], ...]
    float_names: tuple[str, ...]

    def run(self, pointers: Sequence[int], floats: Sequence[float], stream: int) -> None: ...


class Runtime(Protocol):
    """A runtime: loads an artifact on a device once, and binds launches."""

    name: str

    def load(self, artifact: Artifact, device: int) -> Any: ...

    def has(self, artifact: Artifact, device: int) -> bool: ...

    def bind(
        self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int
    ) -> Bound: ...


class Packed:
    """Arguments of a sequence of launches in one block of memory: pointers and floats of the call, then the fixed ones.

    Each launch has an array of addresses into the block, the form that cuLaunchKernel and hipModuleLaunchKernel take.
    A tensor map is an address of its own, set by `point`.
    """

    _FORMATS: ClassVar[dict[str, str]] = {"i32": "i", "i64": "q"}

    def __init__(self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding):
        every = [a for launch in launches for a in launch.args]
        self.operands = tuple(dict.fromkeys((a.name, a.offset) for a in every if a.kind in ("ptr", "tma")))
        self.float_names = tuple(dict.fromkeys(a.name for a in every if a.kind == "f32"))
        self.call = struct.Struct(f"<{len(self.operands)}Q{len(self.float_names)}f")
        self.maps: list[tuple[int, int, str, Arg]] = []  # (launch, position in its address array, parameter, argument)
        fixed = bytearray()
        places: list[list[int]] = []  # per launch: offsets into the block, -1 for a tensor map
        start = -(-self.call.size // 16) * 16

        def put(kind: str, value: Number) -> int:
            size = struct.calcsize(self._FORMATS[kind])
            fixed.extend(bytes(-len(fixed) % size))
            fixed.extend(struct.pack("<" + self._FORMATS[kind], int(value)))
            return start + len(fixed) - size

        for number, launch in enumerate(launches):
            places.append([])
            parameters = iter(artifacts[launch.kernel].extra.get("tma", {}))
            for arg in launch.args:
                here = places[-1]
                if arg.kind == "ptr":
                    here.append(8 * self.operands.index((arg.name, arg.offset)))
                elif arg.kind == "f32":
                    here.append(8 * len(self.operands) + 4 * self.float_names.index(arg.name))
                elif arg.kind == "tma":  # the map; then, for a kernel of Triton's, its shape and strides by value
                    view = binding.views[arg.name]
                    self.maps.append((number, len(here), next(parameters), arg))
                    here.append(-1)
                    if artifacts[launch.kernel].extra.get("bare_maps"):
                        continue
                    element = view.row_bytes // view.row_elements
                    here += [put("i32", view.rows), put("i32", view.columns)]
                    here += [put("i64", view.row_bytes // element), put("i64", 1)]
                else:
                    here.append(put(arg.kind, binding.numbers[arg.name]))
            here = places[-1]
            here += [put("i64", 0) for _ in range(artifacts[launch.kernel].extra.get("scratch_args", 0))]
        self.block = (ctypes.c_char * (start + len(fixed) + 16))()
        ctypes.memmove(ctypes.addressof(self.block) + start, bytes(fixed), len(fixed))
        base = ctypes.addressof(self.block)
        self.addresses = [(ctypes.c_uint64 * len(p))(*(base + o if o >= 0 else 0 for o in p)) for p in places]

    def write(self, pointers: Sequence[int], floats: Sequence[float]) -> None:
        """The arguments that change from call to call."""
        self.call.pack_into(self.block, 0, *pointers, *floats)

    def point(self, launch: int, position: int, address: int) -> None:
        """Sets a tensor map argument to a map that lies at `address`."""
        self.addresses[launch][position] = address
