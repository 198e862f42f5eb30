"""Assembly templates: Jinja2 text in asm_templates/<isa>/, closed over what it imports, filled in for one kernel.

A template begins with its header, YAML in a comment `{#--- … ---#}`: op, entry, threads, registers by role, and the
names of the constants that it takes. It is filled in with these constants and:

    parameters       the kernel's parameter list, in the order of the signature
    arg(name)        the PTX name of a parameter; params: their names; bytes[name]: the size of what a pointer points to
    ENTRY, THREADS, START_REGISTERS, …  from the header
    barrier(offset, name, …)  the address of a barrier in the program's shared memory, whose name is noted

What is not filled in, and a constant or parameter that is not used, is an error. Every line of the text is traced back
to a line of a template (`Rendered.origins`), so that an assembler's messages can be.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import resources
from mla_jit.compile.artifact import Source
from mla_jit.errors import CompileError

_IMPORT = re.compile(r"{%-?\s*(?:import|from|include)\s+'([^']+)'")
_HEADER = re.compile(r"\A{#---\n(.*?)---#}\n", re.DOTALL)
_COMMENT = re.compile(r"(?:(?<=[;:{}])|^)\s*//(?!@).*$")  # of PTX; `//` divides in Jinja2
_MARK = re.compile(r" //@([^:]+):(\d+)$")
_codes: dict[tuple[str, str], Any] = {}  # of templates, by name and text
_turn = threading.Lock()
# A signature's kind -> the type of a parameter, and the bytes of what a pointer points to.
_PARAMETERS = {"i32": ".b32", "i64": ".b64", "fp32": ".f32"}
_BYTES = {"u8": 1, "i8": 1, "fp8e4nv": 1, "bf16": 2, "fp16": 2, "i32": 4, "fp32": 4, "i64": 8}


def _renew() -> None:
    global _turn
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_renew)  # a thread that the child does not have may be rendering


@dataclass(frozen=True)
class Header:
    """What a template says of itself: registers a thread by role (`stack`: bytes), and the constants it takes."""

    op: str
    entry: str
    threads: int
    registers: Mapping[str, int]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class Rendered:
    """Text for the assembler. origins: of each line (file, line) in the templates, or None; barriers: by offset."""

    text: str
    origins: tuple[tuple[str, int] | None, ...]
    header: Header
    barriers: Mapping[int, str]


@functools.cache
def has(isa: str, name: str) -> bool:
    """Whether there is a template of this name for an ISA."""
    try:
        resources.path("asm_templates", isa, name)
    except FileNotFoundError:
        return False
    return True


@functools.cache
def closure(isa: str, name: str) -> str:
    """The template and all that it imports, as one text: JSON of [[file, text], …], itself first."""
    folder = resources.path("asm_templates", isa)
    texts: dict[str, str] = {}
    todo = [name]
    while todo:
        file = todo.pop()
        if file not in texts:
            texts[file] = (folder / file).read_text(encoding="utf-8")
            todo += _IMPORT.findall(texts[file])
    return json.dumps([[name, texts[name]], *sorted([f, t] for f, t in texts.items() if f != name)])


@functools.cache
def header(isa: str, name: str) -> Header:
    """The header of a template. CompileError where it has none, or a bad one."""
    return _header(name, Path(resources.path("asm_templates", isa, name)).read_text(encoding="utf-8"))


def _header(name: str, text: str) -> Header:
    import yaml

    found = _HEADER.match(text)
    if found is None:
        raise CompileError(f"{name} does not begin with a header, {{#--- … ---#}}")
    data = yaml.safe_load(found[1])
    try:
        return Header(**(data | {"constants": tuple(data["constants"])}))
    except (TypeError, KeyError) as error:
        raise CompileError(f"the header of {name} is not complete: {error}") from error


def render(source: Source) -> Rendered:
    """The text of a source's template. CompileError names what was not filled in or not used, and where.

    One thread at a time: two would only make the first one's assembler wait.
    """
    with _turn:
        return _render(source)


def _render(source: Source) -> Rendered:
    import jinja2

    files = json.loads(source.content)
    main, text = files[0]
    head = _header(main, text)
    given = dict(source.constants)
    if set(given) != set(head.constants):
        odd = ", ".join(sorted(set(given) ^ set(head.constants)))
        raise CompileError(f"{source.name}: the variant's constants are not those that {main} takes: {odd}")
    marked = {file: _marked(file, text) for file, text in files}
    seen: set[str] = set()
    environment = jinja2.Environment(
        loader=_loader(marked), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, autoescape=False, keep_trailing_newline=True, optimized=False,
    )  # fmt: skip
    unused = set(given)

    class Constants(jinja2.runtime.Context):
        """Notes which constants are looked up."""

        def resolve_or_missing(self, key: str) -> Any:
            unused.discard(key)
            return super().resolve_or_missing(key)

    environment.context_class = Constants
    signature = dict(source.signature)

    def arg(name: str) -> str:
        if name not in signature:
            raise CompileError(f"{source.name}: {main} reads the parameter {name}, which this kernel does not have")
        seen.add(name)
        return f"arg_{name}"

    barriers: dict[int, str] = {}

    def barrier(offset: int, *name: object) -> str:
        barriers[offset] = " ".join(map(str, name))
        return f"arena+{offset}"

    constants = {name: json.loads(v) if isinstance(v, str) and v[:1] == "[" else v for name, v in given.items()}
    environment.globals |= {  # globals reach imported macros too
        **constants,
        **{f"{role.upper()}_REGISTERS": count for role, count in head.registers.items()},
        "THREADS": head.threads,
        "ENTRY": head.entry,
        "parameters": ",\n".join(f"    {_parameter(name, kind)}" for name, kind in source.signature),
        "params": tuple(signature),
        "bytes": {name: _BYTES[_element(kind)] for name, kind in source.signature if kind.startswith("*")},
        "arg": arg,
        "barrier": barrier,
    }
    try:
        made = environment.get_template(main).render()
    except jinja2.TemplateError as error:
        raise CompileError(f"{source.name}: {_where(error, files)}{error}", key=source.key) from error
    if unused := unused - {"ARENA"}:  # the launch's, for the checks
        raise CompileError(f"{source.name}: {main} does not use {', '.join(sorted(unused))}", key=source.key)
    if left := [name for name in signature if name not in seen]:
        raise CompileError(f"{source.name}: {main} does not read the parameters {', '.join(left)}", key=source.key)
    lines: list[str] = []
    origins: list[tuple[str, int] | None] = []
    for line in made.splitlines():
        if (mark := _MARK.search(line)) is not None:
            line = line[: mark.start()]
            origins.append((mark[1], int(mark[2])))
        elif line.strip():
            origins.append(None)
        if line.strip():
            lines.append(line.rstrip())
    return Rendered("\n".join(lines) + "\n", tuple(origins), head, barriers)


def _loader(texts: Mapping[str, str]) -> Any:
    """A loader of these texts. Each is compiled once a process, whatever kernels it is a part of."""
    import jinja2

    class Texts(jinja2.BaseLoader):
        def load(self, environment: Any, name: str, globals: Any = None) -> Any:  # noqa: A002  jinja2's name
            key = name, texts[name]
            if key not in _codes:
                _codes[key] = environment.compile(texts[name], name, name)
            return environment.template_class.from_code(environment, _codes[key], globals or {})

    return Texts()


@functools.cache
def _marked(name: str, text: str) -> str:
    """The text with its file and line numbers in comments, on lines that come out as they stand."""
    lines = []
    for line, what in enumerate(text.splitlines(), 1):
        bare = re.sub(r"%}\s+{#", "%}{#", _COMMENT.sub("", what))
        plain = bare.endswith((";", ":", "{", "}")) and not bare.endswith(("%}", "}}", "#}"))
        lines.append(f"{bare} //@{name}:{line}" if plain else bare)
    return "\n".join(lines) + "\n"


def _element(kind: str) -> str:
    return kind.lstrip("*").partition(":")[0]


def _parameter(name: str, kind: str) -> str:
    if kind.startswith("tma<"):
        return f".param .align 64 .b8 arg_{name}[128]"
    return f".param {'.b64' if kind.startswith('*') else _PARAMETERS[_element(kind)]} arg_{name}"


def _where(error: Any, files: list[list[str]]) -> str:
    """The innermost place in a template that an error's traceback tells of."""
    if isinstance(getattr(error, "lineno", None), int):  # of syntax
        return f"{error.name}, line {error.lineno}: "
    names = {name for name, _ in files}
    found, trace = "", error.__traceback__
    while trace is not None:
        if (file := trace.tb_frame.f_code.co_filename) in names:
            found = f"{file}, line {trace.tb_lineno}: "
        trace = trace.tb_next
    return found
