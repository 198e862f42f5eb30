"""A functional emulator of PTX for sm_90a: it runs a kernel on the CPU and checks its synchronisation.

memory = Memory()
memory.add("out", out.data_ptr(), out.nbytes)
statistics = run(parse(text), grid, [out.data_ptr(), 7], memory, smem_bytes)
"""

from .errors import (
    Deadlock,
    MachineError,
    MemoryFault,
    ProtocolError,
    PtxError,
    Race,
    Trap,
    Uninitialised,
)
from .machine import Program, Statistics, parse, run
from .memory import Memory, TensorMap

__all__ = [
    "Deadlock", "MachineError", "Memory", "MemoryFault", "Program", "ProtocolError", "PtxError", "Race", "Statistics",
    "TensorMap", "Trap", "Uninitialised", "parse", "run",
]  # fmt: skip
