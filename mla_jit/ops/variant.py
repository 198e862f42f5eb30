"""`Variant`: one way to compute an op, as a row of plain functions. The registry is the ops' tuples of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.launch.base import Launch, TensorView
from mla_jit.problem import Problem
from mla_jit.target import Target


@dataclass(frozen=True)
class Cost:
    """What the analytic model says of a config: bytes and FLOPs to move and do, programs, waves, predicted time."""

    bytes: int
    flops: int
    programs: int
    waves: float
    time_us: float


@dataclass(frozen=True)
class Variant:
    """One kernel family. `rejects` is the only legality predicate: search, default, `supports()` and errors use it.

    `measured_only`: no model takes it, only a measured row (of the shape or of one near by); so for a kernel that no
    hardware of its targets has run yet. The tuner measures it like any other.

    `any_length`: serves short and long sequences differently: for calls whose lengths the host does not know.
    The tuner times its configs at each length of a family, and leaves them out where it searches for one length.

    `host`, where set, is the callable of a host variant (no source, no artifact): it takes `(problem, config, inputs)`.
    """

    name: str
    op: str
    backend: str  # "triton" | "asm" | "cpu"
    rejects: Callable[[Any, Target, Config], str | None]
    default: Callable[[Any, Target], Config]
    sources: Callable[[Any, Target, Config], tuple[Source, ...]]
    launches: Callable[[Any, Target, Config], tuple[Launch, ...]]
    workspace_bytes: Callable[[Any, Target, Config], int]
    cost: Callable[[Any, Target, Config], Cost]
    numbers: Callable[[Any, Target, Config], dict[str, int]] = (
        lambda problem, target, config: {}
    )  # run-time numbers that a config fixes
    offsets: Callable[[Any, Target, Config], dict[str, int]] = (
        lambda problem, target, config: {}
    )  # where workspace buffers start, bytes
    # what tensor maps over workspace buffers look at, by name
    views: Callable[[Any, Target, Config], dict[str, TensorView]] = lambda problem, target, config: {}
    # the launches that fill the buffers which a caller brings (`planned`); () for a variant that takes none
    prepare: Callable[[Any, Target, Config], tuple[Launch, ...]] = lambda problem, target, config: ()
    # the shapes of these buffers, int32, by name
    lists: Callable[[Any, Target, Config], dict[str, tuple[int, ...]]] = lambda problem, target, config: {}
    # (measured problem, asked problem, target, config): a config for the one, made to fit the sizes of the other
    resize: Callable[[Any, Any, Target, Config], Config] = lambda measured, asked, target, config: config
    revision: int = 1  # raised whenever a change of the template makes older measurements stale
    space: dict[str, tuple[int | str | bool, ...]] = field(default_factory=dict, compare=False, hash=False)
    measured_only: bool = False
    any_length: bool = False
    host: Callable[[Any, Config, Any], None] | None = None


def explain_rejection(variant: Variant, problem: Problem, target: Target) -> str | None:
    """The reason why a variant cannot serve a problem with its own default config, or None."""
    return variant.rejects(problem, target, variant.default(problem, target))
