"""A functional emulator of PTX for sm_90a: it runs a kernel on the CPU and checks its synchronisation.

memory = Memory()
memory.add("out", out.data_ptr(), out.nbytes)
statistics = run(parse(text), grid, [out.data_ptr(), 7], memory, smem_bytes)

Checked, each with CTA, warp, lane and the PTX line: bounds and alignment; registers and shared memory read before
they are written; happens-before of shared memory between warps (bar, mbarrier); the pending time of TMA and cp.async;
fence.proxy.async between ordinary writes and wgmma or bulk copies; fence.mbarrier_init; counts and bytes of mbarriers;
bulk copies out of shared memory that are not waited for before their bytes are written again, or their thread exits;
registers and operands of wgmmas in flight, wgmma.fence, warps of a warpgroup in step; convergence of .aligned and
.sync instructions; the register pool of setmaxnreg; races of CTAs through global memory, which only barrier.cluster
orders (cluster.py), and through the shared memory of other CTAs of a cluster, read after they wrote it and before they
write it again or exit; copies to several CTAs, and arrivals at mbarriers of others, of what is there and free; what is
touched, or read by weak loads, before griddepcontrol.wait; deadlock.

Not checked: races through global memory within a CTA, and of atomics, strong accesses and copies; lanes of one warp
among themselves (a warp is one agent: an arrival of one lane publishes what all its lanes did); a proxy fence between
an ordinary read and a bulk copy over it; whatever a run does not execute; scopes, a CTA's arrivals at another's
mbarrier being taken for release at any. Not modelled, a PtxError: tensor copies and reductions out of shared memory,
generic addresses, atomics on shared memory, f64 fma, functions, local memory. Of the shared memory of other CTAs of a
cluster, ordinary reads alone; other ordinary accesses are a MemoryFault.
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
