"""Candidates that behave as they are told, for test_worker.py: rows, a toolchain and timers that workers import.

`planted` is a kernel row for a fake device; its config's `does` says what happens, while it is compiled
(`compile_source`) or in place of being run and timed (`timer`). `planted_cpu` is a host row that runs; its `does` says
how the result of the real one is spoiled. `tag` makes another source of the same behaviour. Each run adds a line to
$WORKER_LOG: what, tag, process id. Importing this changes the process: only workers do.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from mla_jit import launch, ops
from mla_jit.compile import cache
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.config import Config
from mla_jit.errors import CompileError, IllegalArtifact, LaunchError
from mla_jit.launch import interpreter
from mla_jit.launch.base import Binding, Launch
from mla_jit.ops.decode import blocked_cpu
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem

ILLEGAL = "CUDA error: an illegal memory access was encountered"
_sources: dict[str, Source] = {}  # compiled in this process, by key


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def note(*words: object) -> None:
    with open(os.environ["WORKER_LOG"], "a") as file:
        file.write(" ".join(map(str, (*words, os.getpid()))) + "\n")


# ------------------------------------------------------------------------------------------------------ while compiling


def compile_source(source: Source) -> Artifact:
    _sources[source.key] = source
    verb = source.content.partition(" ")[0] if source.name == "planted" else ""
    if verb.startswith("compile"):
        note(verb, "compiling")
    if verb == "compile_abort":
        sys.stderr.write("LLVM ERROR: Cannot select: t42\n")
        sys.stderr.flush()
        os.abort()
    if verb == "compile_exit":
        os._exit(3)
    if verb == "compile_segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if verb == "compile_loop":
        hold_the_interpreter()
    if verb == "compile_error":
        raise CompileError("planted was not compiled: 'tt.dot' op expected another encoding", key=source.key)
    if verb == "smem":
        text = "planted for sm_90a is not legal: 426000 bytes of shared memory, the target has 232448"
        raise IllegalArtifact(text, key=source.key)
    if verb == "registers":
        raise IllegalArtifact("planted is not legal: 300 registers a thread, the target has 255", key=source.key)
    if verb == "ptxas":
        log = "ptxas error : Entry function 'planted' uses too much shared data (0x40000 bytes, 0x38c00 max)"
        raise CompileError("planted was not compiled, PTXASError: ptxas failed", key=source.key, log=log)
    if verb == "no_mma":
        raise IllegalArtifact("planted is not legal: none of the matrix instructions wgmma", key=source.key)
    return Artifact(key=source.key, name=source.name, isa=source.isa, entry="planted", binary=b"code", threads=128,
                    smem_bytes=4096, registers=64, spill_bytes=8)  # fmt: skip


def hold_the_interpreter() -> None:
    """As a C++ loop does: no other thread of the process runs."""
    re.match(r"(a+)+$", "a" * 64 + "b")


# ------------------------------------------------------------------------------------------ in place of running, timing


def timer(problem: DecodeProblem, config: Config, rounds: int) -> list[float]:
    does, tag = (config.get(name, 0) for name in ("does", "tag"))
    note(does, tag)
    if does == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "print_illegal":
        sys.stderr.write(f"noise\nterminate called after throwing an instance of 'c10::Error'\n  what():  {ILLEGAL}\n")
        sys.stderr.flush()
        os.abort()
    if does == "raise_illegal":
        raise RuntimeError(f"{ILLEGAL}\nCUDA kernel errors might be asynchronously reported at some other API call")
    if does == "raise_misaligned":
        raise LaunchError("launch of planted: misaligned address (CUDA_ERROR_MISALIGNED_ADDRESS)")
    if does == "launch_resources":
        raise LaunchError("shared memory of planted: invalid argument (CUDA_ERROR_INVALID_VALUE)")
    if does == "loop":
        while True:
            time.sleep(0.01)
    if does == "loop_in_c":
        hold_the_interpreter()
    if does == "loop_with_child":
        note("child", subprocess.Popen(["sleep", "300"]).pid)
        while True:
            time.sleep(0.01)
    if does == "memory_error":
        raise MemoryError
    if does == "torch_oom":
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 GiB.")
    if does == "print_oom":
        sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        sys.stderr.flush()
        os.abort()
    if does == "raise":
        raise ValueError("planted\nsecond line")
    if does == "sys_exit":
        sys.exit(5)
    if does == "exit":
        os._exit(7)
    if does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "chatty":
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * (1 << 20) + "\n")
            stream.flush()
        os.write(1, b"raw\n")
    if does == "sleep":
        time.sleep(0.3)
    return [10.0 + float(tag) + 0.5 * i for i in range(rounds)]


_PLANTED = Variant(
    name="planted", op="decode", backend="triton",
    rejects=lambda p, target, config: "planted as illegal" if config["does"] == "illegal" else None,
    default=lambda p, target: Config.of("planted", does="ok", tag=0),
    sources=lambda p, target, config: (
        Source(name="planted", toolchain="planted", toolchain_version="1", isa=target.isa,
               content=f"{config['does']} {config['tag']}"),
    ),
    launches=lambda p, target, config: (), workspace_bytes=lambda p, target, config: 0,
    cost=lambda p, target, config: Cost(0, 0, 1, 1.0, 1.0),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ results spoiled

_before: list[Any] = []


def _run(p: DecodeProblem, config: Config, inputs: Any) -> None:
    import torch

    does, real = config["does"], blocked_cpu.default(p, _cpu())
    out, lse = inputs.tensors["out"], inputs.tensors["lse"]
    if does == "reads_past_end":  # takes a last page for a full one
        lens = inputs.tensors["lens"]
        kept, page = lens.clone(), p.page_size
        lens.copy_((lens + page - 1) // page * page)
        blocked_cpu.run(p, real, inputs)
        lens.copy_(kept)
        return
    if does == "torch_oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 GiB.")
    if does == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if does == "frozen_lengths":  # as a graph that has baked the captured call's lengths in
        if not _before:
            blocked_cpu.run(p, real, inputs)
            _before.extend((out.clone(), lse.clone()))
        out.copy_(_before[0])
        lse.copy_(_before[1])
        return
    blocked_cpu.run(p, real, inputs)
    if does == "wrong":
        out.view(-1)[0] += 1.0
    if does == "wrong_lse":
        lse.view(-1)[-1] += 0.01
    if does == "untouched":
        out.view(-1)[-1] = float("nan")


def _cpu() -> Any:
    from mla_jit.target import by_name

    return by_name("cpu")


_PLANTED_CPU = Variant(
    name="planted_cpu", op="decode", backend="cpu", rejects=lambda p, target, config: None,
    default=lambda p, target: Config.of("planted_cpu", does="ok"), sources=lambda p, target, config: (),
    launches=lambda p, target, config: (), workspace_bytes=lambda p, target, config: 0,
    cost=lambda p, target, config: Cost(0, 0, 1, 1.0, 1.0), host=_run,
)  # fmt: skip


# --------------------------------------------------------------------------------- kernels run, in Triton's interpreter


class _Interpreted:
    """A runtime: the kernels of the sources that this process has compiled, run on host memory."""

    name = "interpreter"

    def bind(self, artifacts: Sequence[Artifact], launches: Sequence[Launch], binding: Binding, device: int) -> Any:
        return interpreter.bind([_sources[a.key] for a in artifacts], launches, binding)


_real = ops.variants
ops.variants = lambda op: (*_real(op), _PLANTED, _PLANTED_CPU)  # type: ignore[assignment]
cache.register_toolchain("planted", __name__)
if os.environ.get("TRITON_INTERPRET") == "1":
    cache.register_toolchain("triton", __name__)
    launch.override(_Interpreted())  # type: ignore[arg-type]
