"""`Config`: the tunables of one variant, and nothing of the problem."""

from __future__ import annotations

import builtins
import json
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from dataclasses import dataclass
from typing import Any

Value = int | str | bool


@dataclass(frozen=True)
class Config(Mapping[str, Value]):
    """The tunables of one variant as a sorted, hashable mapping: `Config.of("decode_splitk_triton", block_n=64)`."""

    variant: str
    items_: tuple[tuple[str, Value], ...]

    def __post_init__(self) -> None:  # the tuner looks tunables up millions of times
        object.__setattr__(self, "_values", dict(self.items_))
        object.__setattr__(self, "_hash", hash((self.variant, self.items_)))

    def __hash__(self) -> builtins.int:
        return self._hash  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:  # the hash of a string is of its process
        return Config, (self.variant, self.items_)

    @classmethod
    def of(cls, variant: str, **values: Value) -> Config:
        return cls(variant, tuple(sorted(values.items())))

    @classmethod
    def from_json(cls, text: str) -> Config:
        data = json.loads(text)
        return cls.of(data.pop("variant"), **data)

    def to_json(self) -> str:
        return json.dumps({"variant": self.variant, **dict(self.items_)}, sort_keys=True)

    def replace(self, **values: Value) -> Config:
        """The same config with some values changed; a name that it does not have is an error."""
        merged = self._values | values  # type: ignore[attr-defined]
        if len(merged) > len(self.items_):
            unknown = values.keys() - set(self)
            raise KeyError(f"{self.variant} has no tunable {', '.join(sorted(unknown))}; it has {', '.join(self)}")
        items = tuple(merged.items())
        made = object.__new__(Config)  # as the constructor would, which would make the dictionary again
        made.__dict__.update(variant=self.variant, items_=items, _values=merged, _hash=hash((self.variant, items)))
        return made

    def int(self, name: str) -> int:
        value = self._values.get(name)  # type: ignore[attr-defined]
        if isinstance(value, int):
            return value
        raise AssertionError(f"{self.variant}.{name} is {self[name]!r}, not an integer")

    def text(self, name: str) -> str:
        value = self[name]
        assert isinstance(value, str), f"{self.variant}.{name} is {value!r}, not a name"
        return value

    def __getitem__(self, name: str) -> Value:
        try:
            return self._values[name]  # type: ignore[attr-defined]
        except KeyError:
            raise KeyError(f"{self.variant} has no tunable {name!r}; it has {', '.join(self)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._values  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)  # type: ignore[attr-defined]

    def __len__(self) -> builtins.int:
        return len(self.items_)

    def keys(self) -> KeysView[str]:
        return self._values.keys()  # type: ignore[attr-defined]

    def items(self) -> ItemsView[str, Value]:
        return self._values.items()  # type: ignore[attr-defined]

    def get(self, name: str, default: Any = None) -> Any:
        return self._values.get(name, default)  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"{self.variant}({', '.join(f'{k}={v}' for k, v in self.items_)})"
