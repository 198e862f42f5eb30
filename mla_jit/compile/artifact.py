"""`Source` (what determines the machine code) and `Artifact` (the machine code and its manifest)."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

ABI = 1  # raised when the meaning of an artifact's manifest or of a kernel's arguments changes

Scalar = int | float | str | bool | None


@dataclass(frozen=True)
class Limits:
    """What an artifact may use, checked after compilation; from the target's row and the variant's row."""

    smem_bytes: int
    registers: int = 255  # 32-bit registers a thread
    spill_bytes: int = 0  # what the variant's row declares tolerable
    threads: int = 1024
    require: tuple[str, ...] = ()  # substrings, one of which the machine code's text must contain (the MMA)


@dataclass(frozen=True)
class Source:
    """Everything that determines the machine code of one kernel, and nothing else: no path, no time, no tensor.

    `content` is the template's text closed over all it calls. `signature` names each runtime argument with its type and
    alignment class, in order: ("kv", "*bf16:16"), ("page_stride", "i64"). `locator` ("package.module:function") says
    where a Triton function can be imported; a move of a file is no new kernel, so it is not part of the key.
    """

    name: str  # readable: "decode_splitk_triton"
    toolchain: str  # which file of compile/ builds it: "triton" | "ptx" | "amdgcn"
    toolchain_version: str
    isa: str  # of a row of configs/targets.yaml
    content: str
    constants: tuple[tuple[str, Scalar], ...] = ()
    signature: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, Scalar], ...] = ()
    abi: int = ABI
    locator: str = field(default="", compare=False)
    limits: Limits | None = field(default=None, compare=False)

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 (hex) of the canonical JSON of everything but `locator` and `limits`."""
        data = asdict(self)
        del data["locator"], data["limits"]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Source:
        data = json.loads(text)
        for name in ("constants", "signature", "options"):
            data[name] = tuple(tuple(pair) for pair in data[name])
        if data["limits"] is not None:
            data["limits"] = Limits(**(data["limits"] | {"require": tuple(data["limits"]["require"])}))
        return cls(**data)


@dataclass(frozen=True)
class Artifact:
    """Machine code with what is known of it. Sizes in bytes; registers a thread; spills a thread.

    `extra` is plain JSON data that a runtime needs to launch it (tensor-map boxes, scratch sizes).
    """

    key: str
    name: str
    isa: str
    entry: str  # the symbol of the kernel
    binary: bytes = field(repr=False)
    threads: int  # a program
    smem_bytes: int
    registers: int
    spill_bytes: int
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    provenance: dict[str, Any] = field(default_factory=dict, compare=False, hash=False)
    compile_seconds: float = field(default=0.0, compare=False)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.binary).hexdigest()

    def manifest(self) -> dict[str, Any]:
        """The manifest as plain JSON data: all fields but the binary, with its size and SHA-256 instead."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "binary"}
        return data | {"size": len(self.binary), "sha256": self.sha256, "abi": ABI}

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any], binary: bytes) -> Artifact:
        """The artifact of a verified manifest. KeyError or TypeError on a foreign one."""
        fields = {name: manifest[name] for name in cls.__dataclass_fields__ if name != "binary"}
        return cls(binary=binary, **fields)
