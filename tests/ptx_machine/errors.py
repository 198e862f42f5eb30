"""What can go wrong in a kernel, each with the place: CTA, warp, lane, line number and text of the PTX line."""

from __future__ import annotations


class PtxError(Exception):
    """The text is not PTX that this emulator models: nothing is ignored in silence."""

    def __init__(self, message: str, line: int = 0, text: str = "") -> None:
        super().__init__(f"{message}\n  line {line}: {text}" if line else message)
        self.line, self.text = line, text


class MachineError(Exception):
    """A fault of a running kernel; `where` is filled in by the machine, which knows what was running."""

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.message, self.lane = message, lane
        self.cta: tuple[int, int, int] | None = None
        self.warp: int | None = None
        self.line, self.text = 0, ""

    def place(self, cta: tuple[int, int, int], warp: int | None, line: int, text: str) -> None:
        if self.cta is None:
            self.cta, self.warp, self.line, self.text = cta, warp, line, text

    def __str__(self) -> str:
        if self.cta is None:
            return self.message
        where = f"CTA {self.cta}"
        if self.warp is not None:
            where += f", warp {self.warp}"
        if self.lane is not None:
            where += f", lane {self.lane}"
        return f"{self.message}\n  {where}, line {self.line}: {self.text}"


class MemoryFault(MachineError):
    """An address outside the registered buffers or shared memory, misaligned, or a write to a read-only buffer."""


class Uninitialised(MachineError):
    """A register or a byte of shared memory that was never written is read."""


class Race(MachineError):
    """Two accesses of which nothing says which comes first, or the async proxy without a proxy fence."""


class ProtocolError(MachineError):
    """A rule of the PTX ISA about barriers, fences, descriptors or convergence is broken."""


class Deadlock(MachineError):
    """Nothing can run and no asynchronous copy is under way, or the step limit is reached."""


class Trap(MachineError):
    """`trap` was executed."""
