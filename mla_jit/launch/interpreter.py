"""Triton's interpreter as a runtime: the same launches, run on host memory one program at a time, nothing compiled.

It takes the sources instead of artifacts, and checks what a driver cannot: that a launch's arguments are the source's
signature, in order and kind. TRITON_INTERPRET=1 must be set before Triton is first imported (settings.interpreting()).
Triton's interpreter multiplies bfloat16 bit patterns (3.7.1): `constants` replaces a source's, to compute in fp32.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_jit import settings
from mla_jit.compile.artifact import Scalar, Source
from mla_jit.errors import LaunchError
from mla_jit.launch.base import Arg, Binding, Launch

_running = threading.Lock()  # Triton's interpreter replaces functions of the whole process while it runs a launch
_LANGUAGE = {"triton.language", "triton.language.core"}
_KINDS = {"i32": ("i32",), "i64": ("i64",), "fp32": ("f32",)}  # a signature's scalar type -> kinds of arguments


@dataclass
class InterpreterBound:
    """See launch.base.Bound. `run` takes addresses of host memory and returns when all programs have run."""

    sources: Sequence[Source]
    launches: Sequence[Launch]
    binding: Binding
    constants: Mapping[str, Scalar]  # instead of a source's own

    def __post_init__(self) -> None:
        every = [a for launch in self.launches for a in launch.args]
        self.operands = tuple(dict.fromkeys((a.name, a.offset) for a in every if a.kind in ("ptr", "tma")))
        self.float_names = tuple(dict.fromkeys(a.name for a in every if a.kind == "f32"))

    def run(self, pointers: Sequence[int], floats: Sequence[float], stream: int = 0) -> None:
        """Runs the launches in order. Offsets are in the pointers already, as for every runtime."""
        addresses = dict(zip(self.operands, pointers, strict=True))
        values = {**self.binding.numbers, **dict(zip(self.float_names, floats, strict=True))}
        for launch in self.launches:
            source = self.sources[launch.kernel]
            module, _, name = source.locator.partition(":")
            constants = dict(source.constants)
            constants |= {k: v for k, v in self.constants.items() if k in constants}
            arguments = {k: _constant(v) for k, v in constants.items()}
            for (parameter, kind), arg in zip(source.signature, launch.args, strict=True):
                arguments[parameter] = self._argument(parameter, kind, arg, addresses, values)
            with _running, _patched_once():
                getattr(importlib.import_module(module), name)[launch.grid](**arguments)

    def _argument(
        self, parameter: str, kind: str, arg: Arg, addresses: Mapping[Any, int], values: Mapping[str, Any]
    ) -> Any:
        """The interpreter's value of one parameter. LaunchError where signature and launch disagree."""
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle, interpreter_semantic

        base, _, divisor = kind.partition(":")
        element = base.removeprefix("tma<").partition("[")[0] if arg.kind == "tma" else base.lstrip("*")
        pointer = ("tma",) if base.startswith("tma<") else ("ptr",) if base.startswith("*") else ()
        if arg.kind not in (pointer or _KINDS.get(base, ())):
            raise LaunchError(f"parameter {parameter} is {kind} in the source, its argument {arg.name} is {arg.kind}")
        if arg.kind in ("ptr", "tma"):
            value = addresses[arg.name, arg.offset]
            dtype: Any = tl.pointer_type(tl.str_to_ty(element, None))
            handle = TensorHandle(np.array([value], np.uint64), dtype)
        else:
            value = values[arg.name]
            number: Any = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[base]
            dtype = tl.str_to_ty(base, None)
            handle = TensorHandle(np.array([value], number), dtype)
        if divisor and value % int(divisor):
            raise LaunchError(f"parameter {parameter} was compiled as a multiple of {divisor}; it is {value}")
        tensor = tl.tensor(handle, dtype)
        if arg.kind != "tma":
            return tensor
        view = self.binding.views[arg.name]
        strides, box = [view.row_elements, tl.constexpr(1)], [tl.constexpr(n) for n in arg.block]
        return interpreter_semantic.make_tensor_descriptor(tensor, [view.rows, view.columns], strides, box)


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """One launch, for which Triton's interpreter replaces the functions of each language module once, and looks up each
    element type once.

    It looks through the modules that a function sees whenever one calls another (3.6 and 3.7.1), which takes longer
    than what they do on small blocks, and after the first time finds nothing more to replace.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    known = functools.cache(numpy_type)
    patched: set[str] = set()  # triton.language, as kernels see it, and its core, as its own functions do

    def once(fn: Any) -> Any:
        modules = {v.__name__ for v in fn.__globals__.values() if isinstance(v, ModuleType)} & _LANGUAGE
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(fn)

    def element(dtype: Any) -> Any:
        inner = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return numpy_type(dtype) if isinstance(inner, tl.pointer_type) else known(inner)

    interpreter._patch_lang, interpreter._get_np_dtype = once, element
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter._get_np_dtype = patch, numpy_type


def _constant(value: Any) -> Any:
    import triton.language as tl

    return getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl:") else value


def bind(
    sources: Sequence[Source],
    launches: Sequence[Launch],
    binding: Binding,
    constants: Mapping[str, Scalar] | None = None,
) -> InterpreterBound:
    """The launches of a problem, ready to run. LaunchError where Triton was not imported as an interpreter."""
    if not settings.interpreting():
        raise LaunchError("Triton's interpreter is off; set TRITON_INTERPRET=1 before the first import of triton")
    return InterpreterBound(sources, launches, binding, constants or {})
