"""PTX text → instructions with resolved names (PTX ISA 4: syntax, 5: state spaces; one `.entry` a module).

Names follow the scopes that braces open: registers, and labels, which may be used before they stand. Anything this
file does not know is a PtxError with its line.
"""

from __future__ import annotations

import bisect
import re
import struct
from dataclasses import dataclass, field
from typing import Any

from .errors import PtxError

NAME = r"(?:[A-Za-z][\w$]*|[_$%][\w$]+)"
WIDTHS = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 8),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 16),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 32),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 64),
}
SHARED_BASE = 1024  # as on the chip, where the first KiB is the system's: code that takes smem for 0 fails
PARAM_BASE = 0x7A00_0000_0000


@dataclass(frozen=True)
class Register:
    name: str
    index: int  # among all registers of the kernel
    width: int  # bits; 1 = predicate
    row: int  # among the registers of this width


@dataclass(frozen=True)
class Immediate:
    value: int  # an integer, or the bits of a floating-point literal
    kind: str  # "int", "f32", "f64"


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Shared:
    address: int


@dataclass(frozen=True)
class Param:
    offset: int
    width: int


@dataclass(frozen=True)
class Label:
    target: int


@dataclass(frozen=True)
class Sink:
    pass


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Address:
    base: Any
    offset: int
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Pair:
    first: Any
    second: Any


@dataclass(frozen=True)
class Not:
    register: Register


Operand = Any


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    nbytes: int  # 128 for a tensor map
    array: bool


@dataclass
class Statement:
    """One instruction of the text."""

    line: int
    text: str
    guard: Register | None
    negate: bool
    op: str
    operands: list[Operand]


@dataclass
class Module:
    name: str = ""
    parameters: list[Parameter] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    reqntid: int | None = None
    maxntid: int | None = None
    min_ctas: int = 1
    cluster: int | None = None  # .reqnctapercluster
    max_registers: int | None = None
    static_bytes: int = 0  # of shared memory, from SHARED_BASE on
    dynamic: bool = False
    shared: dict[str, int] = field(default_factory=dict)  # name → address
    rows: dict[int, int] = field(default_factory=dict)  # width → number of registers


@dataclass
class _Scope:
    parent: _Scope | None
    registers: dict[str, Register] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


_SPACE = re.compile(r"\s*")
_LABEL = re.compile(rf"({NAME})\s*:(?!:)")
_INSTRUCTION = re.compile(rf"(?:@(!?)\s*({NAME})\s+)?([a-z][\w.:]*)(?:\s+(.*))?")
_INTEGER = re.compile(r"(-?)\s*(0[xX][0-9a-fA-F]+|0[bB][01]+|0[0-7]*|[1-9]\d*)U?")
_BASE = re.compile(r"([^\s+-]+)\s*(?:([+-])\s*(.+))?")


def _split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return parts


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _integer(text: str) -> int | None:
    match = _INTEGER.fullmatch(text)
    if not match:
        return None
    digits = match[2]
    base = 16 if digits[:2] in ("0x", "0X") else 2 if digits[:2] in ("0b", "0B") else 8 if digits[0] == "0" else 10
    return int(digits, base) * (-1 if match[1] else 1)


class Parser:
    def __init__(self, text: str) -> None:
        self.source = text.split("\n")
        self.text = re.sub(r"/\*.*?\*/|//[^\n]*", _blank, text, flags=re.S)
        self.starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        self.at = 0
        self.module = Module()
        self.scope = _Scope(None)
        self.fixups: list[tuple[Statement, str, _Scope]] = []

    # ------------------------------------------------------------------ places
    def line(self, at: int) -> int:
        return bisect.bisect_right(self.starts, at)

    def error(self, message: str, at: int | None = None) -> PtxError:
        line = self.line(self.at if at is None else at)
        return PtxError(message, line, self.source[line - 1].strip() if line <= len(self.source) else "")

    def skip(self) -> bool:
        found = _SPACE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return self.at < len(self.text)

    def match(self, pattern: str) -> re.Match[str] | None:
        self.skip()
        found = re.compile(pattern).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def until(self, end: str) -> str:
        stop = self.text.find(end, self.at)
        if stop < 0:
            raise self.error(f"no {end!r} after this")
        found = self.text[self.at : stop]
        self.at = stop + len(end)
        return found

    # ------------------------------------------------------------------ the module
    def parse(self) -> Module:
        seen = set()
        while self.skip():
            if found := self.match(r"\.(version|target|address_size)\b([^\n]*)"):
                seen.add(found[1])
                value = found[2].strip()
                if found[1] == "target" and value.split(",")[0].strip() != "sm_90a":
                    raise self.error(f"target {value} is not modelled: sm_90a", found.start())
                if found[1] == "address_size" and value != "64":
                    raise self.error("only 64-bit addresses", found.start())
            elif self.match(r"\.pragma\b"):
                self.until(";")
            elif self.match(r"\.(loc|file)\b[^\n]*"):
                continue
            elif self.match(r"(\.extern\s+)?\.shared\b"):
                self.shared_variable()
            elif found := self.match(rf"(?:\.visible\s+|\.weak\s+)?\.entry\s+({NAME})"):
                if self.module.name:
                    raise self.error("a second entry is not modelled", found.start())
                self.module.name = found[1]
                self.entry()
            else:
                raise self.error("not modelled at module level")
        if not self.module.name:
            raise PtxError("the module has no .entry")
        if missing := {"version", "target"} - seen:
            raise PtxError(f"the module lacks .{', .'.join(sorted(missing))}")
        return self.module

    def shared_variable(self) -> None:
        at = self.at
        body = self.until(";")
        found = re.fullmatch(rf"\s*(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({NAME})\s*\[\s*(\w*)\s*\]\s*", body)
        if not found or found[2] not in WIDTHS:
            raise self.error("a shared variable is an array: .shared .align N .b8 name[BYTES];", at)
        width = WIDTHS[found[2]] // 8
        align = int(found[1] or width)
        base = -(-(SHARED_BASE + self.module.static_bytes) // align) * align
        if found[3] in self.module.shared:
            raise self.error(f"{found[3]} is declared twice", at)
        if not found[4]:
            if self.module.dynamic:
                raise self.error("a second array of dynamic shared memory is not modelled", at)
            self.module.dynamic = True
        elif self.module.dynamic:
            raise self.error("static shared memory after the dynamic array is not modelled", at)
        count = _integer(found[4]) if found[4] else 0
        if count is None:
            raise self.error("the size is no number", at)
        self.module.shared[found[3]] = base
        self.module.static_bytes = base - SHARED_BASE + width * count

    def entry(self) -> None:
        if self.match(r"\("):
            offset = 0
            for part in _split(self.until(")")):
                if not part:
                    continue
                found = re.fullmatch(
                    rf"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?)?\s+({NAME})"
                    r"(?:\[(\d+)\])?",
                    part,
                )
                if not found or WIDTHS.get(found[2], 0) < 8:
                    raise self.error(f"parameter not understood: {part}")
                width = WIDTHS[found[2]] // 8
                align = int(found[1] or width)
                nbytes = width * int(found[4] or 1)
                if found[4] and (nbytes != 128 or align < 64):
                    raise self.error(f"an array parameter is a tensor map, .align 64 .b8 [128]: {part}")
                offset = -(-offset // align) * align
                self.module.parameters.append(Parameter(found[3], found[2], offset, nbytes, bool(found[4])))
                offset += nbytes
        while not self.match(r"\{"):
            found = self.match(r"\.(\w+)\s*([\d\s,]*)")
            if not found:
                raise self.error("not modelled before the body of an entry")
            numbers = [int(x) for x in re.findall(r"\d+", found[2])]
            size = 1
            for n in numbers:
                size *= n
            if found[1] in ("reqntid", "maxntid", "reqnctapercluster") and any(n != 1 for n in numbers[1:]):
                raise self.error("blocks and clusters of more than one dimension are not modelled", found.start())
            if found[1] == "reqntid":
                self.module.reqntid = size
            elif found[1] == "maxntid":
                self.module.maxntid = size
            elif found[1] == "minnctapersm":
                self.module.min_ctas = size
            elif found[1] == "maxnreg":
                self.module.max_registers = size
            elif found[1] == "reqnctapercluster":
                self.module.cluster = size
            elif found[1] != "explicitcluster":
                raise self.error(f".{found[1]} is not modelled", found.start())
        self.body()

    def body(self) -> None:
        depth = 1
        while depth:
            if not self.skip():
                raise self.error("the body does not end")
            first = self.text[self.at]
            if first == "{":
                self.at += 1
                depth += 1
                self.scope = _Scope(self.scope)
            elif first == "}":
                self.at += 1
                depth -= 1
                if depth:
                    assert self.scope.parent is not None
                    self.scope = self.scope.parent
            elif first == ";":
                self.at += 1
            elif first == ".":
                self.directive()
            elif found := _LABEL.match(self.text, self.at):
                self.at = found.end()
                if found[1] in self.scope.labels:
                    raise self.error(f"label {found[1]} stands twice in this scope", found.start())
                self.scope.labels[found[1]] = len(self.module.statements)
            else:
                self.instruction()
        for statement, name, scope in self.fixups:
            search: _Scope | None = scope
            while search is not None and name not in search.labels:
                search = search.parent
            if search is None:
                raise PtxError(f"no label {name} in reach", statement.line, statement.text)
            statement.operands = [Label(search.labels[name])]

    def directive(self) -> None:
        if self.match(r"\.reg\b"):
            self.declare()
        elif self.match(r"\.shared\b"):
            self.shared_variable()
        elif self.match(r"\.pragma\b"):
            self.until(";")
        elif not self.match(r"\.(loc|file)\b[^\n]*"):
            self.instruction()

    def declare(self) -> None:
        at = self.at
        found = re.fullmatch(r"\s*\.(\w+)\s+(.*)", self.until(";"), flags=re.S)
        if not found or found[1] not in WIDTHS:
            raise self.error("declaration not understood", at)
        width = WIDTHS[found[1]]
        for item in _split(found[2]):
            one = re.fullmatch(rf"({NAME})(?:<(\d+)>)?", item)
            if not one:
                raise self.error(f"not a register name: {item}", at)
            names = [one[1]] if one[2] is None else [f"{one[1]}{i}" for i in range(int(one[2]))]
            for name in names:
                if name in self.scope.registers:
                    raise self.error(f"register {name} is declared twice in this scope", at)
                row = self.module.rows.setdefault(width, 0)
                self.module.rows[width] += 1
                register = Register(name, len(self.module.registers), width, row)
                self.module.registers.append(register)
                self.scope.registers[name] = register

    # ------------------------------------------------------------------ instructions
    def instruction(self) -> None:
        at = self.at
        body = " ".join(self.until(";").split())
        line = self.line(at)
        found = _INSTRUCTION.fullmatch(body)
        if not found:
            raise self.error("statement not understood", at)
        statement = Statement(line, body + ";", None, found[1] == "!", found[3], [])
        if found[2]:
            guard = self.register(found[2])
            if guard is None or guard.width != 1:
                raise PtxError(f"{found[2]} is no predicate", line, body)
            statement.guard = guard
        operands = _split(found[4]) if found[4] else []
        if found[3] in ("bra", "bra.uni"):
            if len(operands) != 1:
                raise PtxError("bra has one label", line, body)
            self.fixups.append((statement, operands[0], self.scope))
        else:
            try:
                statement.operands = [self.operand(o) for o in operands]
            except ValueError as error:
                raise PtxError(str(error), line, body) from None
        self.module.statements.append(statement)

    def register(self, name: str) -> Register | None:
        scope: _Scope | None = self.scope
        while scope is not None:
            if name in scope.registers:
                return scope.registers[name]
            scope = scope.parent
        return None

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if (register := self.register(text)) is not None:  # most are, and no number is called so
            return register
        if text.startswith("{"):
            if not text.endswith("}"):
                raise ValueError(f"vector not understood: {text}")
            return Vector(tuple(self.operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            if not text.endswith("]"):
                raise ValueError(f"address not understood: {text}")
            parts = _split(text[1:-1])
            coordinates = self.operand(parts[1]) if len(parts) == 2 else None
            if len(parts) > 2 or (coordinates is not None and not isinstance(coordinates, Vector)):
                raise ValueError(f"address not understood: {text}")
            base, offset = self.base(parts[0])
            return Address(base, offset, coordinates)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        if text.startswith("!"):
            register = self.register(text[1:].strip())
            if register is None or register.width != 1:
                raise ValueError(f"{text[1:]} is no predicate")
            return Not(register)
        if text == "_":
            return Sink()
        if (number := _integer(text)) is not None:
            return Immediate(number, "int")
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return Immediate(int(found[1], 16), "f32")
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return Immediate(int(found[1], 16), "f64")
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        base, offset = self.base(text)
        if isinstance(base, Shared):
            return Shared(base.address + offset)
        if offset:
            raise ValueError(f"operand not understood: {text}")
        return base

    def base(self, text: str) -> tuple[Operand, int]:
        """A name or a number, with + or - a constant."""
        if (number := _integer(text)) is not None:
            return Immediate(number, "int"), 0
        found = _BASE.fullmatch(text)
        if not found:
            raise ValueError(f"address not understood: {text}")
        offset = 0
        if found[2]:
            value = _integer(found[3])
            if value is None:
                raise ValueError(f"offset is no number: {text}")
            offset = value if found[2] == "+" else -value
        name = found[1]
        register = self.register(name)
        if register is not None:
            return register, offset
        if name in self.module.shared:
            return Shared(self.module.shared[name]), offset
        for parameter in self.module.parameters:
            if parameter.name == name:
                return Param(parameter.offset, parameter.nbytes), offset
        if name.startswith("%"):
            return Special(name), offset
        raise ValueError(f"{name} is not declared")
