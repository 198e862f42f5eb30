"""What a decode call costs beside its kernels: the host time of a warm one, and the first one of a process.

`python -m mla_jit.tuning.overhead CACHE_DIR HEADS…` is the process that `first_rows` starts: it makes one call for each
head count and prints what they took as a line of JSON. Without a GPU calls go to the null runtime: all of a call's work
on the host but the driver's, and no kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mla_jit
from mla_jit import launch, ops, settings, target
from mla_jit.errors import MlaJitError
from mla_jit.launch.null import NullRuntime
from mla_jit.tuning import bench, peers

# (heads, kv_len, hints) at batch 1: one kernel by a hint, by request; split and combine.
HOST_CASES: tuple[tuple[int, int, dict[str, int]], ...] = (
    (16, 64, {"max_kv_len": 64}), (16, 128, {"num_kv_splits": 1}), (16, 128, {}), (128, 128, {}),
)  # fmt: skip
FIRST_HEADS = ((16, 128), (128, 16))  # of a process's first and next call
FIRST_KV_LEN = 1024
CHILD_TIMEOUT_S = 600.0
_ORIGIN = {"empty": "compiled", "filled": "disk"}  # where kernels must come from, by what the cache held


@contextlib.contextmanager
def gpu_or_null() -> Iterator[str]:
    """Where tensors go: "cuda"; without a GPU "cpu", calls being planned for one and sent to the null runtime."""
    if torch.cuda.is_available():
        yield "cuda"
        return
    mla_jit.reload()
    launch.override(NullRuntime())
    try:
        with settings.scope(target=target.SHOWCASE[0]):
            yield "cpu"
    finally:
        launch.override(None)
        mla_jit.reload()


def _call(heads: int, kv_len: int, device: str, seed: int = 0, **hints: Any) -> Callable[[], Any]:
    """A call of `mla_jit.decode` as a user makes it, its inputs ready on the device."""
    s = bench.make_sets(bench.Shape(heads, (kv_len,)), device=device, seed=seed, rotate_bytes=0)[0]
    _finish(device)
    return functools.partial(mla_jit.decode, s.q, s.cache, **s.keywords, **hints)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _served() -> mla_jit.Dispatch:
    dispatch = mla_jit.last_dispatch()
    assert dispatch is not None
    return dispatch


# ---------------------------------------------------------------------------------------------------------- warm calls


@dataclass(frozen=True)
class HostRow:
    """Host time of a warm eager call in µs: the median of the runs' medians, their least and largest, the minimum.

    kernels: that it launches; None for a peer's call.
    """

    case: str
    kernels: int | None
    median_us: float
    low_us: float
    high_us: float
    min_us: float


def host_rows(against: Sequence[str] = (), *, runs: int = 3, rounds: int = 40, calls: int = 50) -> list[HostRow]:
    """A row for each of HOST_CASES; then, on a GPU, of each of these peers, with the last one's shape.

    A value is the mean of `calls` calls in a row, the device idle before them. How fast a host is differs between
    machines: a peer's row says how fast this one is.
    """
    rows = []
    with gpu_or_null() as device:

        def row(case: str, made: Callable[[int], Callable[[], Any]]) -> HostRow:
            medians, least = [], []
            for seed in range(runs):
                call = made(seed)
                call()
                times = [_host_us(call, calls, device) for _ in range(rounds)]
                medians.append(statistics.median(times))
                least.append(min(times))
            return HostRow(case, None, statistics.median(medians), min(medians), max(medians), min(least))

        for heads, kv_len, hints in HOST_CASES:
            case = ", ".join([f"{heads} heads", f"kv {kv_len}", *(f"{k}={v}" for k, v in hints.items())])
            found = row(case, functools.partial(_call, heads, kv_len, device, **hints))
            rows.append(replace(found, kernels=len(_served().kernels)))
        for name in against:
            made = functools.partial(_peer, peers.by_name(name), heads, kv_len)
            rows.append(row(f"{name}, {heads} heads, kv {kv_len}", made))
    return rows


def _peer(runner: bench.Runner, heads: int, kv_len: int, seed: int) -> Callable[[], Any]:
    """A peer's call, its inputs and its schedule ready on the GPU. MlaJitError where it does not serve the shape."""
    sets = bench.make_sets(bench.Shape(heads, (kv_len,)), device="cuda", seed=seed, rotate_bytes=0)[:1]
    call = runner.prepare(sets)
    if call is None:
        raise MlaJitError(f"this peer does not serve {heads} heads × {kv_len} tokens")
    _finish("cuda")
    return functools.partial(call, sets[0])


def _host_us(call: Callable[[], Any], calls: int, device: str) -> float:
    _finish(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls * 1e6


# --------------------------------------------------------------------------------------------------------- first calls


@dataclass(frozen=True)
class First:
    """A call that a process made for the first time, until the device was done; `compile_s` is in `ms`."""

    heads: int
    ms: float
    variant: str
    origins: tuple[str, ...]
    compile_s: float


@dataclass(frozen=True)
class FirstRow:
    """A first call in `runs` fresh processes: with an empty cache or with one that such a process filled.

    `call` is "first", or "next" for another specialisation after it in the same process. `compile_s` is a median.
    """

    cache: str
    call: str
    heads: int
    median_ms: float
    min_ms: float
    max_ms: float
    compile_s: float
    variant: str
    origins: tuple[str, ...]


def first_rows(*, runs: int = 3) -> Iterator[FirstRow]:
    """Rows for each of FIRST_HEADS, every process with a cache directory of its own or of the one that filled it.

    The clock starts after imports, the CUDA context and the inputs. Raises MlaJitError if a process fails, or if its
    kernels did not come from where the row says.
    """
    for heads in FIRST_HEADS:
        found: dict[str, list[list[First]]] = {state: [] for state in _ORIGIN}
        for _ in range(runs):
            with tempfile.TemporaryDirectory(prefix="mla_jit-bench-") as directory:
                for answers in found.values():
                    answers.append(_in_child(directory, heads))
        for state, answers in found.items():
            for call, same in zip(("first", "next"), zip(*answers, strict=True), strict=False):
                yield _first_row(state, call, same)


def _first_row(state: str, call: str, same: Sequence[First]) -> FirstRow:
    for one in same:  # what two specialisations share is in memory at the second
        allowed = {_ORIGIN[state], "memory"} if call == "next" else {_ORIGIN[state]}
        if _ORIGIN[state] not in one.origins or not allowed.issuperset(one.origins):
            raise MlaJitError(
                f"the {call} call with {one.heads} heads was to have its kernels {_ORIGIN[state]}, with the cache "
                f"{state}; they were {', '.join(one.origins) or 'none'}"
            )
    times = [one.ms for one in same]
    return FirstRow(
        state, call, same[0].heads, statistics.median(times), min(times), max(times),
        statistics.median(one.compile_s for one in same), same[0].variant, same[0].origins,
    )  # fmt: skip


def _in_child(directory: str, heads: Sequence[int]) -> list[First]:
    """`first_calls` in a fresh process."""
    command = [sys.executable, "-m", "mla_jit.tuning.overhead", directory, *map(str, heads)]
    home = Path(__file__).resolve().parents[2]  # there `-m` finds this very mla_jit
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise MlaJitError(f"the process for a first call did not end in {CHILD_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise MlaJitError(f"the process for a first call ended with status {done.returncode}: {said[-1]}")
    return [First(**{**row, "origins": tuple(row["origins"])}) for row in json.loads(done.stdout.splitlines()[-1])]


def first_calls(directory: Path, heads: Sequence[int]) -> list[First]:
    """One call for each head count, with that cache directory and no layers; meant for a process that made none yet."""
    imports = ["cuda.bindings.driver", "yaml"]
    if not any(directory.iterdir()):  # a process that finds its kernels never imports Triton
        imports += ["jinja2", "triton", "triton.compiler", "triton.experimental.gluon._runtime"]
    for name in imports:
        with contextlib.suppress(ImportError):  # where the call needs it, it says so better
            importlib.import_module(name)
    ops.variants("decode")
    found = []
    with settings.scope(cache_dir=directory, cache_layers=(), mode="serve"), gpu_or_null() as device:
        calls = [_call(n, FIRST_KV_LEN, device) for n in heads]
        for n, call in zip(heads, calls, strict=True):
            started = time.perf_counter()
            call()
            _finish(device)
            ms = (time.perf_counter() - started) * 1e3
            dispatch = _served()
            found.append(First(n, ms, dispatch.variant, dispatch.origins, dispatch.compile_s))
    return found


def main(arguments: Sequence[str]) -> None:
    """The child's side."""
    try:
        found = first_calls(Path(arguments[0]), [int(n) for n in arguments[1:]])
    except MlaJitError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.write(json.dumps([asdict(one) for one in found]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
