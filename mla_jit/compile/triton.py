"""The Triton toolchain: a kernel's text closed over what it calls, and that text compiled to a cubin or an hsaco.

`closure` and `version` need no Triton: a process that finds all its binaries in the cache never imports it. Triton's
own disk cache, launcher and autotuner are not used: `compile_source` runs the stages of its backend, in any thread.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mla_jit.compile.artifact import Artifact, Source
from mla_jit.errors import CompileError, IllegalArtifact

_lock = threading.Lock()  # of the two below
_compiling = 0  # threads between the stages of Triton now
_knobs = contextlib.ExitStack()  # Triton's, changed while there are any
# Of who parses Python, which holds the interpreter anyway: two threads that do can end in a SystemError (CPython 3.11).
_parsing = threading.RLock()


def _after_fork_in_child() -> None:
    """In a forked child the threads that were compiling do not exist."""
    global _lock, _parsing, _compiling
    _lock, _parsing, _compiling = threading.Lock(), threading.RLock(), 0
    _knobs.close()


os.register_at_fork(after_in_child=_after_fork_in_child)


@contextlib.contextmanager
def _without_line_info() -> Iterator[None]:
    """Paths of this machine are no part of a binary. The knob is global to the process; others find it as it was."""
    global _compiling
    from triton import knobs

    with _lock:
        if not _compiling:
            _knobs.enter_context(knobs.compilation.scope())
            knobs.compilation.disable_line_info = True
        _compiling += 1
    try:
        yield
    finally:
        with _lock:
            _compiling -= 1
            if not _compiling:
                _knobs.close()


FLOOR = "3.6"  # the oldest Triton whose compiler API and tensor descriptors are the ones used here


@functools.cache
def distribution() -> str | None:
    """The installed distribution that has Triton; its ROCm builds have other names."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return name
    return None


@functools.cache
def version() -> str:
    """What identifies the toolchain in a key, e.g. "triton 3.7.1". CompileError when there is none or it is too old."""
    if (name := distribution()) is None:
        raise CompileError(
            "Triton is not installed. GPU builds of torch bring their own; else install mla_jit's extra `triton`"
        )
    found = importlib.metadata.version(name)
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < tuple(map(int, FLOOR.split("."))):
        raise CompileError(
            f"{name} {found} is too old: mla_jit needs Triton {FLOOR}; use a torch that comes with a newer one"
        )
    return f"triton {found}"


@functools.cache
def _definitions(path: str) -> tuple[list[str], dict[str, ast.stmt]]:
    """The lines of a Python file and its module-level names with the statements that define them; parsed once."""
    text = Path(path).read_text(encoding="utf-8")
    definitions: dict[str, ast.stmt] = {}
    with _parsing:
        body = ast.parse(text).body
    for node in body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            definitions.update({a.asname or a.name: node for a in node.names})
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            definitions.update({t.id: node for t in targets if isinstance(t, ast.Name)})
    return text.splitlines(), definitions


@functools.cache
def closure(path: str, function: str) -> str:
    """The text of a module-level function with all module-level names it reaches, in file order; no line numbers.

    What a name of another module of ours reaches stands before it, by the order of the names.
    """
    lines, definitions = _definitions(path)
    reached: set[str] = set()
    todo = [function]
    others: dict[str, str] = {}
    while todo:
        name = todo.pop()
        if name in reached or name not in definitions:
            continue
        reached.add(name)
        node = definitions[name]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mla_jit":
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            others[name] = closure(_path_of(node.module or ""), original)
        todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    nodes = sorted({id(definitions[n]): definitions[n] for n in reached}.values(), key=lambda n: n.lineno)

    def source_of(node: ast.stmt) -> str:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        return "\n".join(lines[first - 1 : node.end_lineno])

    return "\n\n".join([*(others[name] for name in sorted(others)), *(source_of(n) for n in nodes)]) + "\n"


def _path_of(module: str) -> str:
    """The file of a module of ours, which is not imported for it."""
    return str(Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py"))


def _argument(kind: str, gluon: bool = False) -> tuple[str, list[list[Any]]]:
    """A signature entry as Triton spells it: ("*bf16:16") -> ("*bf16", [["tt.divisibility", 16]])."""
    base, _, divisor = kind.partition(":")
    if match := re.fullmatch(r"tma<(\w+)\[(.*)\]>", base):
        layout = ""
        if gluon:  # there a descriptor says how a box lies in shared memory
            from triton.experimental.gluon.language import NVMMASharedLayout

            layout = f",{NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)!r}"
        return f"tensordesc<{match[1]}[{', '.join(match[2].split(','))}]{layout}>", []
    return base, [["tt.divisibility", int(divisor)]] if divisor else []


def compile_source(source: Source) -> Artifact:
    """Compiles a Triton source for its target; no GPU needed. Raises CompileError or IllegalArtifact."""
    started = time.perf_counter()
    stages, metadata = _run_pipeline(source)
    assembly = stages.get("ptx") or stages.get("amdgcn") or ""
    binary = stages.get("cubin") or stages.get("hsaco") or b""
    if not binary:
        raise CompileError(f"{source.name}: the compiler returned no binary for {source.isa}", key=source.key)
    registers, spills = _amd_resources(assembly) if "amdgcn" in stages else _nvidia_resources(binary, source)
    artifact = Artifact(
        key=source.key,
        name=source.name,
        isa=source.isa,
        entry=metadata["name"],
        binary=binary,
        threads=metadata["num_warps"] * metadata["warp_size"],
        smem_bytes=metadata["shared"],
        registers=registers,
        spill_bytes=spills,
        extra={
            "scratch_bytes": metadata.get("global_scratch_size", 0),
            "scratch_args": 2,
            "tma": _tensor_maps(source, metadata),
        },
        provenance={
            "toolchain": source.toolchain_version,
            "constants": dict(source.constants),
            "options": dict(source.options),
        },
        compile_seconds=round(time.perf_counter() - started, 3),
    )
    check_legal(source, artifact, assembly)
    return artifact


def _run_pipeline(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the last stages gave, by stage: "ptx" and "cubin" or "amdgcn" and "hsaco"; the metadata they wrote).

    As triton.compile does, without its cache: making a key there hashes the whole of Triton, 0.4 s a process.
    """
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    wanted = {k: v for k, v in source.options if not k.startswith("env:")}
    target = GPUTarget(wanted.pop("backend"), wanted.pop("arch"), wanted.pop("warp_size"))
    module_name, _, name = source.locator.partition(":")
    module = importlib.import_module(module_name)
    fn = getattr(module, name)
    if closure(module.__file__ or "", name) != source.content:
        raise CompileError(f"{source.locator} changed on disk since this process read it; restart it", key=source.key)

    def constant(value: Any) -> Any:
        return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl:") else value

    names = list(fn.arg_names)
    constants = {n: constant(v) for n, v in source.constants}
    gluon = bool(fn.is_gluon())
    kinds = {n: _argument(kind, gluon) for n, kind in source.signature}
    if missing := [n for n in names if n not in constants and n not in kinds]:
        raise CompileError(
            f"{source.locator} has parameters that the variant does not fill: {', '.join(missing)}", key=source.key
        )
    signature = {n: "constexpr" if n in constants else kinds[n][0] for n in names}
    attributes = {(names.index(n),): attrs for n, (_, attrs) in kinds.items() if attrs}
    sources = importlib.import_module("triton.experimental.gluon._runtime") if gluon else None
    unit_of = sources.GluonASTSource if sources is not None else ASTSource
    unit = unit_of(fn, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    kept: dict[str, Any] = {}
    try:
        with _without_line_info():
            backend = make_backend(target)
            options = backend.parse_options({**wanted, **unit.parse_options()})
            metadata: dict[str, Any] = {"target": target, **options.__dict__}
            stages: dict[str, Any] = {}
            backend.add_stages(stages, options, unit.language)
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            helpers, modules = backend.get_codegen_implementation(options), backend.get_module_map()
            with _parsing:
                made = unit.make_ir(target, options, helpers, modules, context)
            for stage in list(stages)[list(stages).index(unit.ext) :]:
                made = stages[stage](made, metadata)
                if stage in ("ptx", "cubin", "amdgcn", "hsaco"):
                    kept[stage] = made
    except Exception as error:  # Triton raises what its passes raise: RuntimeError, MLIR errors, subprocess errors
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CompileError(
            f"{source.name} does not compile for {source.isa}: {said[-1]} (key {source.key[:16]}). Another config "
            "may: see `mla-tune explain`; the full message is in the error's .log",
            key=source.key,
            log=str(error),
        ) from error
    return kept, metadata


def _nvidia_resources(cubin: bytes, source: Source) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread) as the disassembler of the Triton wheel reads them from the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    if (found := re.search(r"REG:(\d+) STACK:(\d+)", text)) is None:
        raise CompileError(
            f"cuobjdump could not read the resources of {source.name}: {text.strip()[:200]}", key=source.key
        )
    return int(found[1]), int(found[2])


def _amd_resources(text: str) -> tuple[int, int]:
    """(vector registers a lane, spilled bytes a lane) from the metadata of AMDGCN text."""
    count = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", text)}
    return count.get("vgpr_count", 0), 4 * count.get("vgpr_spill_count", 0)


def _tensor_maps(source: Source, metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By parameter: the box that the kernel copies, as the driver must encode it."""
    names = [n for n, kind in source.signature if kind.startswith("tma<")]
    found = [dict(row) for row in metadata.get("tensordesc_meta") or []]
    if len(names) != len(found):
        raise IllegalArtifact(
            f"{source.name}: {len(names)} tensor maps were asked for, {source.isa} made {len(found)}", key=source.key
        )
    keep = ("swizzle", "elem_size", "elem_type", "block_size", "fp4_padded")
    return {name: {k: row[k] for k in keep} for name, row in zip(names, found, strict=True)}


def check_legal(source: Source, artifact: Artifact, assembly: str) -> None:
    """Raises IllegalArtifact if the result cannot run on its target: a compiler's return is no proof."""
    limits = source.limits
    if limits is None:
        return
    faults = []
    if artifact.smem_bytes > limits.smem_bytes:
        faults.append(f"{artifact.smem_bytes} bytes of shared memory, the target has {limits.smem_bytes}")
    if artifact.registers > limits.registers:
        faults.append(f"{artifact.registers} registers a thread, the target has {limits.registers}")
    if artifact.spill_bytes > limits.spill_bytes:
        faults.append(f"{artifact.spill_bytes} bytes of stack a thread, the variant allows {limits.spill_bytes}")
    if artifact.threads > limits.threads:
        faults.append(f"{artifact.threads} threads, the target has {limits.threads}")
    if limits.require and not any(text in assembly for text in limits.require):
        faults.append(f"none of the matrix instructions {', '.join(limits.require)}")
    if faults:
        raise IllegalArtifact(f"{source.name} for {source.isa} is not legal: {'; '.join(faults)}", key=source.key)
