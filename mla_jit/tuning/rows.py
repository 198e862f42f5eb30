"""`Measurement`: how a candidate ended. `Trial`: that, or a prediction, with all that it belongs to. Plain data."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.problem import DecodeProblem, MergeProblem, PrefillProblem, ReduceProblem, Tunable

OK = "ok"
# What a candidate may end as beside "ok"; none of these ever wins.
FAULTS = (
    "illegal", "compile_error", "compiler_abort", "too_many_resources", "wrong", "nan", "illegal_access", "hang",
    "out_of_memory", "error",
)  # fmt: skip
PROVENANCES = ("measured", "imported", "predicted")  # best first
PROBLEMS: dict[str, Any] = {  # by op
    "decode": DecodeProblem, "prefill": PrefillProblem, "merge": MergeProblem, "reduce": ReduceProblem,
}  # fmt: skip
# Closer medians are equal: a part of the greater spread, and no more than a part of the median.
NOISE, MOST_NOISE = 0.25, 0.01
SIZES = ("batch", "q_len", "max_kv_len", "total_kv", "num_heads")  # axes between which a neighbour may lie


@dataclass(frozen=True)
class Measurement:
    """How a candidate ended, and its figures. Times in µs a call; they are there exactly where status is "ok".

    `rel_l2` is the relative L2 error of the worst (token, head) row; registers, spills and shared memory (bytes) are
    stage 1's. `source_hash` is the first 16 characters of the stage-1 Source's key; a host variant, which has no
    Source, has the hash of its name, revision and config. `note` explains a fault, in one line.
    """

    status: str
    median_us: float | None = None
    spread_us: float | None = None
    rel_l2: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    smem_bytes: int | None = None
    source_hash: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.status != OK and self.status not in FAULTS:
            raise InvalidInput(f"status {self.status!r} is unknown; use {OK} or {', '.join(FAULTS)}")
        if (self.status == OK) != (self.median_us is not None):
            raise InvalidInput("median_us is there exactly where status is ok")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """InvalidInput for what is no measurement."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"no measurement: {error} in {text[:120]}") from error


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A row of the tuning database. Times in µs a call.

    `device` is the device's name as `Target.device` has it, `revision` the variant's at the time; `median_us` and
    `spread_us` (max - min over rounds) are None unless status is "ok". `default_us` is the default config's time in the
    same session. `source_hash` is the first 16 characters of the stage-1 Source's key, `policy` says how it was timed,
    `command` what ran it. `note` explains a fault, in one line.
    """

    problem: Tunable
    config: Config
    target: str
    device: str
    revision: int
    status: str = OK
    median_us: float | None = None
    spread_us: float | None = None
    default_us: float | None = None
    rel_l2: float | None = None
    registers: int | None = None
    spill_bytes: int | None = None
    smem_bytes: int | None = None
    source_hash: str = ""
    toolchain: str = ""
    driver: str = ""
    torch: str = ""
    effort: int = 2  # of the measurement; only those of the playoff, 2, are compared between configs
    policy: str = ""
    command: str = ""
    provenance: str = "measured"
    created: str = ""  # UTC, ISO 8601, seconds
    note: str = ""

    def __post_init__(self) -> None:
        if self.status != OK and self.status not in FAULTS:
            raise InvalidInput(f"status {self.status!r} is unknown; use {OK} or {', '.join(FAULTS)}")
        if self.provenance not in PROVENANCES:
            raise InvalidInput(f"provenance {self.provenance!r} is unknown; use {', '.join(PROVENANCES)}")
        if (self.status == OK) != (self.median_us is not None):
            raise InvalidInput("median_us is there exactly where status is ok")

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def variant(self) -> str:
        return self.config.variant

    def to_json(self) -> str:
        """One line, keys sorted; fields of the problem that have their default are left out."""
        data: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("problem", "config")
        }
        kind: Any = type(self.problem)
        plain = defaults(kind)
        data["problem"] = {k: v for k, v in self.problem.fields().items() if k not in plain or v != plain[k]}
        data["problem"]["op"] = self.problem.op
        data["config"] = json.loads(self.config.to_json())
        return json.dumps(data, sort_keys=True, separators=(", ", ": "))

    @classmethod
    def from_json(cls, text: str) -> Trial:
        """InvalidInput for what is no trial."""
        return cls.from_data(parsed(text))

    @classmethod
    def from_data(cls, data: Any) -> Trial:
        """The same of the parsed line, which stays as it is."""
        try:
            config = dict(data["config"])
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data["problem"].items()}
            problem = PROBLEMS[fields["op"]](**fields)
            rest = {k: v for k, v in data.items() if k not in ("config", "problem")}
            return cls(problem=problem, config=Config.of(config.pop("variant"), **config), **rest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInput(f"no tuning row: {error!r} in {str(data)[:120]}") from error


def parsed(text: str) -> Any:
    """A line of JSON; InvalidInput for what is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"no tuning row: {error!r} in {text[:120]}") from error


@functools.cache
def defaults(kind: Any) -> dict[str, Any]:
    """The fields of a problem's class that may be left out of a row, with the values that they then have."""
    return {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}


def slug(device: str) -> str:
    """The directory of a device's shipped rows: "NVIDIA H200" → "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def preferred(times: Iterable[tuple[Config, float, float | None]]) -> Config:
    """Of configs with a median and a spread the fastest; of those within the noise of it the simplest.

    Noise: a quarter of the greater spread (max - min over rounds), about what medians of the same config differ by; but
    never more than 1 % of the fastest.
    """
    known = list(times)
    _, best_us, best_spread = min(known, key=lambda row: (row[1], row[0].to_json()))

    def noise_us(spread: float | None) -> float:
        return min(NOISE * max(spread or 0.0, best_spread or 0.0), MOST_NOISE * best_us)

    return min((config for config, us, spread in known if us - best_us <= noise_us(spread)), key=simplest)


@functools.lru_cache(maxsize=8192)  # a lookup sorts thousands of rows by it
def simplest(config: Config) -> tuple[int, str]:
    """The order of equals: fewest splits, then by JSON."""
    splits = config.get("num_kv_splits")
    return splits if isinstance(splits, int) else 0, config.to_json()
