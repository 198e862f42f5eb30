"""Device memory: registered host buffers with bounds, and tensor maps over them (PTX ISA 5.5, Tensors)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MemoryFault

Array = npt.NDArray[Any]


@dataclass
class Buffer:
    name: str
    address: int
    nbytes: int
    writable: bool
    base: int  # the address rounded down to 16, where the views start
    views: dict[int, Array]  # element bytes → array over the buffer; bounds are checked before it is indexed


class Memory:
    """Every access of a kernel lands in one of the buffers, or is a MemoryFault."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.shut: frozenset[str] | None = frozenset()  # buffers whose contents are not there yet; None: of all

    def opened(self, buffer: Buffer | None, lane: int | None) -> None:
        """MemoryFault for what may not be touched before griddepcontrol.wait (9.7.13.13); None: any buffer."""
        if self.shut is None or (buffer is not None and buffer.name in self.shut):
            what = "device memory" if buffer is None else buffer.name
            raise MemoryFault(f"{what} is used before griddepcontrol.wait: the grid before may still write it", lane)

    def add(self, name: str, address: int, nbytes: int, writable: bool = True) -> None:
        """Register a live host buffer, for instance a torch tensor's data_ptr()."""
        for other in self.buffers:
            if address < other.address + other.nbytes and other.address < address + nbytes:
                raise ValueError(f"{name} overlaps {other.name}")
        base = address & ~15
        size = max(16, (address + nbytes - base + 15) & ~15)
        raw: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        views = {n: raw.view(t) for n, t in ((1, np.uint8), (2, np.uint16), (4, np.uint32), (8, np.uint64))}
        self.buffers.append(Buffer(name, address, nbytes, writable, base, views))

    def find(self, low: int, high: int, write: bool = False, lane: int | None = None) -> Buffer:
        """The buffer that holds bytes low…high-1."""
        for buffer in self.buffers:
            if buffer.address <= low and high <= buffer.address + buffer.nbytes:
                if write and not buffer.writable:
                    raise MemoryFault(f"write to {buffer.name}, which is read-only", lane)
                self.opened(buffer, lane)
                return buffer
        raise MemoryFault(f"address {low:#x} ({high - low} bytes) is in no buffer; {self.nearest(low, high)}", lane)

    def nearest(self, low: int, high: int) -> str:
        if not self.buffers:
            return "none is registered"
        distance, buffer, inside = min(
            (
                (max(b.address - low, high - b.address - b.nbytes, 0), b, b.address <= low < b.address + b.nbytes)
                for b in self.buffers
            ),
            key=lambda x: x[0],
        )
        side = f"offset {low - buffer.address} of {buffer.nbytes}"
        return f"the nearest is {buffer.name} ({side}{', over its end' if inside else f', {distance} bytes off'})"

    def groups(
        self, addresses: Array, lanes: Array, nbytes: int, write: bool, early: bool = False
    ) -> list[tuple[Buffer, Array, Array]]:
        """Buffers with the lanes that touch them and their byte offsets from the buffer's base. `early`: those that are
        shut are read, too."""
        if early:
            shut, self.shut = self.shut, frozenset()
            try:
                return self.groups(addresses, lanes, nbytes, write)
            finally:
                self.shut = shut
        at = addresses[lanes]
        bad = at % np.uint64(nbytes) != 0
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise MemoryFault(f"address {int(at[i]):#x} is not a multiple of {nbytes}", int(lanes[i]))
        low, high = int(at.min()), int(at.max()) + nbytes
        for buffer in self.buffers:
            if buffer.address <= low and high <= buffer.address + buffer.nbytes and (buffer.writable or not write):
                self.opened(buffer, int(lanes[0]))
                return [(buffer, lanes, (at - np.uint64(buffer.base)).astype(np.int64))]
        found: dict[str, tuple[Buffer, list[int]]] = {}
        for i, address in enumerate(at.tolist()):
            buffer = self.find(address, address + nbytes, write, int(lanes[i]))
            found.setdefault(buffer.name, (buffer, []))[1].append(i)
        return [(b, lanes[i], (at[i] - np.uint64(b.base)).astype(np.int64)) for b, i in found.values()]

    def read_bytes(self, address: int, nbytes: int) -> Array:
        """What a copy reads that was issued before."""
        shut, self.shut = self.shut, frozenset()
        try:
            buffer = self.find(address, address + nbytes)
        finally:
            self.shut = shut
        return buffer.views[1][address - buffer.base : address - buffer.base + nbytes]


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled would encode for a row-major matrix: elements outside read as zero.

    whole: a box with rows outside is a fault, as of a page id that is none.
    """

    address: int
    rows: int
    columns: int
    row_bytes: int
    element_bytes: int
    box_rows: int
    box_columns: int
    swizzle: int = 128
    whole: bool = False

    def __post_init__(self) -> None:
        inner = self.box_columns * self.element_bytes
        if self.address % 16 or self.row_bytes % 16:
            raise ValueError("a tensor map needs an address and a row pitch that are multiples of 16 bytes")
        if self.swizzle not in (0, 32, 64, 128):
            raise ValueError(f"swizzle {self.swizzle}")
        if not (1 <= self.box_rows <= 256 and 1 <= self.box_columns <= 256) or inner % 16:
            raise ValueError("a box has 1 to 256 rows and columns, and rows of a multiple of 16 bytes")
        if self.swizzle and inner != self.swizzle:
            raise ValueError(f"only boxes whose rows are as long as the swizzle are modelled ({inner} bytes)")

    @property
    def nbytes(self) -> int:
        return self.box_rows * self.box_columns * self.element_bytes

    @property
    def alignment(self) -> int:
        """Of the destination: a whole period of the swizzle, so that rows count from 0."""
        return max(128, 8 * self.swizzle)

    def box(self, memory: Memory, x: int, y: int) -> tuple[Array, int]:
        """The bytes of the box at element column x and row y [box_rows, bytes], and how many came from memory."""
        e = self.element_bytes
        if self.whole and not 0 <= y <= self.rows - self.box_rows:
            raise MemoryFault(f"a box of rows {y} to {y + self.box_rows - 1} of a tensor of {self.rows}")
        out = np.zeros((self.box_rows, self.box_columns * e), np.uint8)
        top, bottom = max(y, 0), min(y + self.box_rows, self.rows)
        left, right = max(x, 0), min(x + self.box_columns, self.columns)
        if top >= bottom or left >= right:
            return out, 0
        width = (right - left) * e
        first = self.address + top * self.row_bytes + left * e
        span = (bottom - top - 1) * self.row_bytes + width
        flat = memory.read_bytes(first, span)
        rows = np.lib.stride_tricks.as_strided(flat, (bottom - top, width), (self.row_bytes, 1))
        out[top - y : bottom - y, (left - x) * e : (right - x) * e] = rows
        return out, (bottom - top) * width
