"""The PTX toolchain: a template filled in (render.py) and assembled by the ptxas that the Triton wheel carries.

Neither `version` nor `compile_source` imports triton: a cold start costs what ptxas takes, about half a second.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
import time
from pathlib import Path

from mla_jit.compile import render, triton
from mla_jit.compile.artifact import Artifact, Source
from mla_jit.errors import CompileError

# Advice that is a fault here: a setmaxnreg that is ignored, waits put between wgmmas (C7508 … C7519), and their like.
_FAULT = re.compile(r"\(C75\d\d\)|setmaxnreg ignored|Potential Performance Loss")
_ERROR = re.compile(r"\b(error|fatal)\b")
_LINE = re.compile(r", line (\d+)")


@functools.cache
def assembler() -> Path:
    """The ptxas of the installed Triton. CompileError where there is none."""
    found = importlib.util.find_spec("triton")
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (path := Path(folder, "backends", "nvidia", "bin", "ptxas")).exists():
            return path
    raise CompileError(
        f"no ptxas: PTX templates are assembled by the one in the wheel of {triton.version()}; this Triton has "
        "no NVIDIA tools"
    )


def version() -> str:
    """What identifies the toolchain in a key: the Triton that brings the assembler."""
    return triton.version()


def compile_source(source: Source) -> Artifact:
    """Assembles a PTX source; no GPU needed. Raises CompileError, or IllegalArtifact for what breaks its limits."""
    started = time.perf_counter()
    made = render.render(source)
    binary, said = assemble(made, source)
    registers, spills, static = _resources(said, source)
    constants = dict(source.constants)
    dynamic = int(constants.get("ARENA") or 0)
    artifact = Artifact(
        key=source.key,
        name=source.name,
        isa=source.isa,
        entry=made.header.entry,
        binary=binary,
        threads=int(re.findall(r"\.reqntid (\d+)", made.text)[0]),
        smem_bytes=static + dynamic,
        registers=registers,
        spill_bytes=spills,
        extra={
            "scratch_args": 0, "bare_maps": True, "tma": _tensor_maps(source),
            "barriers": {str(at): name for at, name in made.barriers.items()} if constants.get("DEBUG") else {},
        },
        provenance={"toolchain": source.toolchain_version, "constants": constants, "options": dict(source.options)},
        compile_seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    triton.check_legal(source, artifact, made.text)
    declared = made.header.registers["start"]
    if registers > declared or ("setmaxnreg" in made.text and registers != declared):  # a pool of another size hangs
        raise CompileError(f"{source.name} has {registers} registers a thread, its header says {declared}")
    return artifact


def assemble(made: render.Rendered, source: Source) -> tuple[bytes, str]:
    """(cubin, what ptxas said). CompileError, with the template's line, for errors and advice of lost performance."""
    with tempfile.TemporaryDirectory(prefix="mla_jit-ptx-") as folder:
        text, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        text.write_text(made.text, encoding="ascii", errors="replace")
        flags = [str(v) for k, v in source.options if k.startswith("ptxas:")]
        command = [str(assembler()), "-v", f"-arch={source.isa}", *flags, str(text), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).replace(str(text), source.name)
        slow = _FAULT if not dict(source.constants).get("DEBUG") else _ERROR  # a way out of a wait costs waits
        faults = [line for line in said.splitlines() if _ERROR.search(line) or slow.search(line)]
        if done.returncode == 0 and not faults and cubin.exists():
            return cubin.read_bytes(), said
    first = _traced(faults[0], made) if faults else f"ptxas ended with {done.returncode}"
    raise CompileError(
        f"{source.name} was not assembled for {source.isa}: {first} (key {source.key[:16]}). Another config or variant "
        "may serve: see `mla-tune explain`; the full message is in the error's .log",
        key=source.key,
        log="\n".join(_traced(line, made) for line in said.splitlines()),
    )


def _traced(line: str, made: render.Rendered) -> str:
    """A message of ptxas with the template's line and the text that stands there."""
    if (found := _LINE.search(line)) is None or not 0 < (number := int(found[1])) <= len(made.origins):
        return line
    origin = made.origins[number - 1]
    place = "" if origin is None else f" = {origin[0]}, line {origin[1]}"
    return f"{line} [{made.text.splitlines()[number - 1].strip()}{place}]"


def _resources(said: str, source: Source) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack and spills a thread, bytes of static shared memory) as ptxas reports them."""
    used = re.search(r"Used (\d+) registers", said)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    if used is None or stack is None:
        raise CompileError(f"ptxas did not report the resources of {source.name}: {said[:200]}", key=source.key)
    static = re.search(r"(\d+) bytes smem", said)
    return int(used[1]), max(int(stack[1]), int(stack[2])), int(static[1]) if static else 0


def _tensor_maps(source: Source) -> dict[str, dict[str, object]]:
    """By parameter: the box that the kernel copies, 128-byte swizzle, as the driver must encode it."""
    found = {}
    for name, kind in source.signature:
        if (match := re.fullmatch(r"tma<(\w+)\[(\d+),(\d+)\]>", kind)) is not None:
            found[name] = {"swizzle": 3, "block_size": [int(match[2]), int(match[3])]}
    return found
