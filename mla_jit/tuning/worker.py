"""Measuring candidates in worker processes, one a device, that a candidate may kill, hang or exhaust at no other cost.

`Pool.measure` gives a `Measurement`, whatever the candidate does: its status says how it ended, in the words of
rows.FAULTS. A worker is spawned (a new interpreter, in a session of its own), never forked; it gets requests as JSON
lines on stdin and says on stdout which phase it is in and how that ended; what compilers print goes to stderr. After a
fault that leaves a device or a process in doubt it is ended, and the next request starts a fresh one.

In the worker, `run_candidate` builds a candidate through the cache, checks it against the float64 reference and only
then times it. A device "null:0" is a fake one: its candidates are compiled for a target, not run, and timed by `timer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import os
import queue
import random
import re
import resource
import selectors
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_jit import dtypes, launch, ops, plan, settings, target
from mla_jit.compile import layers
from mla_jit.config import Config
from mla_jit.dtypes import DTYPES
from mla_jit.errors import CompileError, IllegalArtifact, InvalidInput, MlaJitError
from mla_jit.launch.base import Bound
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target
from mla_jit.tuning.rows import FAULTS, OK, PROBLEMS

POLICY = (
    "v1: µs a call, median and max - min over rounds. A round replays, for the window, one CUDA graph of a call on "
    "each of the input sets, whose KV together exceeds 240 MiB (host variants: calls timed by perf_counter, sets "
    "beyond 4 × L2). Every sequence has max_kv_len tokens, or its share of total_kv; the table has the capacity's "
    "width. Timed only after a check against the float64 reference"
)
Timer = Callable[[DecodeProblem, Config, int], Sequence[float]]  # (problem, config, rounds) -> µs a call, by round

_START_S = 180.0  # that a worker may take to start: an import of torch, a context
_PREPARE_S = 300.0  # that a problem's inputs and reference may take; no candidate's fault
_LOG_BYTES = 1 << 16  # of a worker's stderr that are kept
_DEVICE = re.compile(r"(cuda|cpu|null)(?::(\d+))?")
_ILLEGAL = re.compile(
    r"illegal (memory access|address|instruction)|misaligned address|invalid (address space|program counter)|"
    r"unspecified launch failure|ERROR_(ILLEGAL|MISALIGNED|LAUNCH_FAILED)|IllegalAddress|Memory access fault",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"out of memory|ERROR_OUT_OF_MEMORY|bad_alloc|cannot allocate memory", re.IGNORECASE)
_TIMEOUT = re.compile(r"LAUNCH_TIMEOUT|launch timed out", re.IGNORECASE)
_RESOURCES = re.compile(
    r"of shared memory|^shared memory of|shared data|registers a thread|bytes of stack|threads, the target|"
    r"too many resources|out of ?resources",
    re.IGNORECASE,
)


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


# ------------------------------------------------------------------------------------------------------ in the worker


class _Fault(Exception):
    """How a candidate ended. `doubtful`: device and process are not to be used any more."""

    def __init__(self, status: str, note: str, *, doubtful: bool = False):
        super().__init__(note)
        self.status, self.note, self.doubtful = status, note, doubtful


def _quiet(phase: str, **found: Any) -> None:
    """Says nothing."""


def run_candidate(
    problem: DecodeProblem, config: Config, device: str, rounds: int, window_ms: float, *, timer: Timer | None = None,
    known: Mapping[str, Sequence[str]] | None = None, say: Callable[..., None] = _quiet,
) -> Measurement:  # fmt: skip
    """Builds, checks and times a candidate in this process, on "cpu", "cuda:0" or, to be timed by `timer`, "null:0".

    rounds, window_ms: how many times, and for how long each, it is timed. timer: gives the times instead.
    known: faults on record, (status, note) by quarantine key; such a candidate is not run. say: hears the phases
    ("compiling", "preparing", "checking", "timing") with what is known of the candidate by then.
    Raises nothing for a candidate that a process survives.
    """
    return _run_candidate(problem, config, device, rounds, window_ms, timer, known or {}, say)[0]


def _run_candidate(
    problem: DecodeProblem, config: Config, device: str, rounds: int, window_ms: float, timer: Timer | None,
    known: Mapping[str, Sequence[str]], say: Callable[..., None],
) -> tuple[Measurement, bool]:  # fmt: skip
    """(measurement, whether the process is in doubt after it)."""
    found: dict[str, Any] = {}

    def enter(phase: str, **more: Any) -> None:
        found.update(more)
        say(phase, **more)

    try:
        times = _figures(problem, config, device, rounds, window_ms, timer, known, enter, found)
        median = statistics.median(times)
        return Measurement(OK, median_us=median, spread_us=max(times) - min(times), **found), False
    except (Exception, SystemExit) as error:  # whatever a candidate raises is its result, with the reason
        fault = error if isinstance(error, _Fault) else _fault_of(error)
        doubtful = fault.doubtful or not _sound(device)
        return Measurement(fault.status, note=" ".join(fault.note.split())[:500], **found), doubtful


def _figures(
    problem: DecodeProblem, config: Config, device: str, rounds: int, window_ms: float, timer: Timer | None,
    known: Mapping[str, Sequence[str]], enter: Callable[..., None], found: dict[str, Any],
) -> Sequence[float]:  # fmt: skip
    """µs a call, by round. Raises _Fault, or whatever the candidate raises."""
    variant = next((v for v in ops.variants(problem.op) if v.name == config.variant), None)
    if variant is None:
        raise _Fault("illegal", f"no variant of {problem.op} is called {config.variant!r}")
    if not (problem.batch and problem.q_len and problem.max_kv_len):
        raise _Fault("illegal", f"nothing to compute: {problem}")
    where = _where(device)
    if (reason := variant.rejects(problem, where, config)) is not None:
        raise _Fault("illegal", reason)
    source_hash = _source_hash(variant, problem, where, config)
    found["source_hash"] = source_hash
    for key in _quarantine_keys(source_hash, problem, config):
        if key in known:
            raise _Fault(known[key][0], f"quarantined: {known[key][1]}")

    enter("compiling", source_hash=source_hash)
    executable = plan.make(problem, where, plan.Choice(variant, config, "measured", {}))
    for artifact in executable.artifacts[:1]:
        enter(
            "compiled", registers=artifact.registers, spill_bytes=artifact.spill_bytes, smem_bytes=artifact.smem_bytes
        )
    if device.startswith("null"):
        if timer is None:
            raise InvalidInput(f"{device} is a fake device, which runs nothing; give a timer")
        executable.load(0)
    else:
        enter("preparing")
        stand = _stand(problem, where, device)
        run = _Run(executable, stand)
        enter("checking")
        found["rel_l2"] = stand.check(run)
    enter("timing")
    if timer is not None:
        return timer(problem, config, rounds)
    return stand.time(run, rounds, window_ms)


def _where(device: str) -> Target:
    kind, _, index = device.partition(":")
    return target.here() if kind == "null" else target.of_device(kind, int(index or 0))


def _source_hash(variant: Variant, problem: DecodeProblem, where: Target, config: Config) -> str:
    if variant.host is not None:
        text = f"{variant.name} {variant.revision} {config.to_json()}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    return variant.sources(problem, where, config)[0].key[:16]


def _quarantine_keys(source_hash: str, problem: DecodeProblem, config: Config) -> tuple[str, str]:
    """Under which a fault is remembered: of the code, whatever the sizes; and of these sizes with this config alone."""
    text = json.dumps(problem.fields(), sort_keys=True) + config.to_json()
    return source_hash, f"{source_hash} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _fault_of(error: BaseException) -> _Fault:
    """The status of what a candidate has raised."""
    text = f"{error}\n{getattr(error, 'log', '')}"
    note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if isinstance(error, CompileError):
        short = isinstance(error, IllegalArtifact) or "ptxas" in text or "OutOfResources" in text
        return _Fault("too_many_resources" if short and _RESOURCES.search(text) else "compile_error", note)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _MEMORY.search(text):
        return _Fault("out_of_memory", note, doubtful=True)
    if _ILLEGAL.search(text):
        return _Fault("illegal_access", note, doubtful=True)
    if _TIMEOUT.search(text):
        return _Fault("hang", note, doubtful=True)
    return _Fault("too_many_resources" if _RESOURCES.search(str(error)) else "error", note)


def _sound(device: str) -> bool:
    """Whether the device still answers: errors of a CUDA context stay until its process ends."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class _Run:
    """An executable on a stand's operands: `run(inputs)` for inputs of the same shapes, strides and buffers."""

    def __init__(self, executable: plan.Executable, stand: _Stand):
        import torch

        self.executable, self._on_gpu = executable, stand.on_gpu
        self._bound: dict[int, Bound] = {}
        self._pointers: dict[int, list[int]] = {}
        self.workspace = torch.empty(max(16, executable.workspace_bytes), dtype=torch.uint8, device=stand.device)

    def __call__(self, inputs: DecodeInputs) -> None:
        e = self.executable
        if e.variant.host is not None:
            e.variant.host(e.problem, e.config, inputs)
            return
        bound = self._bound.get(id(inputs))
        if bound is None:
            bound = self._bound[id(inputs)] = e.bind(inputs.binding, inputs.device.index or 0)
            self._pointers[id(inputs)] = [self._pointer(name, offset, inputs) for name, offset in bound.operands]
        floats = [inputs.floats[name] for name in bound.float_names]
        bound.run(self._pointers[id(inputs)], floats, self._stream())

    def _stream(self) -> int:
        import torch

        return torch.cuda.current_stream().cuda_stream if self._on_gpu else 0

    def _pointer(self, name: str, offset: int, inputs: DecodeInputs) -> int:
        if name in self.executable.offsets:
            return self.workspace.data_ptr() + self.executable.offsets[name] + offset
        address: int = inputs.tensors[name].data_ptr()
        return address + offset


def lengths(problem: DecodeProblem, tokens: int) -> list[list[int]]:
    """Lengths by case and sequence on which a candidate is checked, at most about `tokens` beside the longest.

    Over the cases the first sequences have max_kv_len, a page and a token, a page, and one token; the others, and all
    in the last case, random lengths, half of them within a token of the end of a page, and one is empty.
    """
    rng = random.Random(problem.batch)
    page, longest, batch = problem.page_size, problem.max_kv_len, problem.batch
    special = [min(n, longest) for n in (longest, page + 1, page, 1)]
    most = min(longest, max(2 * page, tokens // batch))

    def some() -> int:
        n = rng.randint(1, most)
        if rng.random() < 0.5:
            n = -(-n // page) * page + rng.choice((-1, 0, 1))
        return min(max(n, 1), most)

    cases = [[special[(b + k) % 4] if b < 4 else some() for b in range(batch)] for k in range(4)]
    cases.append([some() for _ in range(batch)])
    if batch > 1:
        cases[-1][-1] = 0
    return cases


def timed_lengths(problem: DecodeProblem) -> list[int]:
    """Lengths by sequence with which a candidate is timed: the bound, or an even share of total_kv."""
    p = problem
    if p.total_kv is None:
        return [p.max_kv_len] * p.batch
    share, more = divmod(min(p.total_kv, p.max_kv_len * p.batch), p.batch)
    return [max(1, share + (b < more)) for b in range(p.batch)]


class _Stand:
    """A problem's tensors on a device, made once for all its candidates: cases to check on, input sets to time on.

    One cache of random values serves the sets. The check has a copy of it, the page table and the outputs in buffers of
    their own, filled anew for each case (`_lay`), so that a graph captured on the first case can be replayed on all.
    """

    def __init__(self, problem: DecodeProblem, where: Target, device: str):
        import torch

        from mla_jit import trial
        from mla_jit.tuning import bench

        self.problem, self.device, self.on_gpu = p, device, on_gpu = problem, device, device.startswith("cuda")
        self._ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[DTYPES[p.kv_dtype].bytes]
        self._cases = lengths(p, 1 << 18 if on_gpu else 1 << 11)
        timed = timed_lengths(p)
        set_pages = self._pages(timed)
        width = p.num_kv_heads * p.head_dim
        rotate = bench.ROTATE_BYTES if on_gpu else 4 * where.l2_bytes
        sets = -(-rotate // (set_pages * p.page_size * width * DTYPES[p.kv_dtype].bytes))
        sets = min(bench.MOST_SETS, max(1, sets))
        check_pages = max(map(self._pages, self._cases)) + 1  # one page is never used

        random_bits = torch.Generator(device).manual_seed(0)
        shape = (max(check_pages, sets * set_pages), p.page_size, p.num_kv_heads, p.head_dim)
        data = torch.empty(shape, dtype=getattr(torch, DTYPES[p.kv_dtype].torch), device=device)
        for chunk in data.split(max(1, (1 << 27) // (p.page_size * width))):
            chunk.copy_(torch.randn(chunk.shape, device=device, generator=random_bits))
        order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(0))

        small = dataclasses.replace(p, max_kv_len=1, total_kv=None, layout="joint", q_split=False)
        call = trial.make_call(small, device)  # everything but the cache and its pages
        self._call = {k: v for k, v in call.keywords.items() if k not in ("block_table", "seq_lens", "return_lse")}
        self._call = {k: v for k, v in self._call.items() if not k.startswith("kv_i") and k != "kv_last_page_lens"}
        self._call |= {"return_lse": p.lse} | ({"cp_rank": 0, "cp_world": 2} if p.context_parallel else {})
        if p.lse:
            self._call["lse"] = torch.empty(call.q.shape[:-1], dtype=torch.float32, device=device)
        if p.ragged and "qo_indptr" in p.index64:
            self._call["qo_indptr"] = self._call["qo_indptr"].long()

        self._sets = []
        buffers = self._parted(data, p.layout == "split")
        for i in range(sets):
            paging = self._paging(timed, order[i * set_pages : (i + 1) * set_pages], set_pages)
            q = self._parted(call.q.clone() if i else call.q, p.q_split)
            self._sets.append(self._inputs(q, buffers, paging))

        self._data = self._parted(data[:check_pages], p.layout == "split")
        self._kv = [part.clone() for part in self._data]
        self._laid: list[tuple[dict[str, Any], Any]] = []  # by case: the index tensors, and which slots hold tokens
        for number, lens in enumerate(self._cases):
            order = torch.randperm(check_pages, generator=torch.Generator().manual_seed(number + 1))
            self._laid.append((self._paging(lens, order, check_pages), self._used(lens, order)))
        self._index = {name: tensor.clone() for name, tensor in self._laid[0][0].items()}
        self._q = self._parted(call.q, p.q_split)
        self._checked = self._inputs(self._q, self._kv, self._index)
        self._wanted = [self._reference(case) for case in range(len(self._cases))]

    def _pages(self, lens: Sequence[int]) -> int:
        return sum(-(-n // self.problem.page_size) for n in lens)

    def _parted(self, x: Any, split: bool) -> list[Any]:
        """[x], or its latent and rope parts."""
        rank = self.problem.kv_lora_rank
        return [x[..., :rank].contiguous(), x[..., rank:].contiguous()] if split else [x]

    def _paging(self, lens: Sequence[int], order: Any, slots: int) -> dict[str, Any]:
        """The index tensors of a call whose sequences have these lengths and pages in this order."""
        import torch

        p, garbage = self.problem, 2**30
        used = [-(-n // p.page_size) for n in lens]
        starts = [0, *itertools.accumulate(used)]
        found: dict[str, tuple[str, Any]] = {}
        if p.paging == "table":
            table = torch.full((p.batch, -(-p.max_kv_len // p.page_size)), garbage)
            for b, n in enumerate(used):
                table[b, :n] = order[starts[b] : starts[b] + n]
            found["block_table"] = "table", table
        else:
            indices = torch.full((max(1, slots),), garbage)
            indices[: starts[-1]] = order[: starts[-1]]
            last = [n - (pages - 1) * p.page_size if pages else 0 for n, pages in zip(lens, used, strict=True)]
            found["kv_indices"] = "table", indices
            found["kv_indptr"] = "kv_indptr", torch.tensor(starts)
            found["kv_last_page_lens"] = "last", torch.tensor(last)
        if p.has_lens:  # of all ranks together
            found["seq_lens"] = "lens", torch.tensor([n * (2 if p.context_parallel else 1) for n in lens])
        return {
            name: tensor.to(self.device, torch.int64 if kind in p.index64 else torch.int32)
            for name, (kind, tensor) in found.items()
        }

    def _used(self, lens: Sequence[int], order: Any) -> Any:
        """bool [pages, page_size, 1, 1]: the slots that hold a token."""
        import torch

        page = self.problem.page_size
        held = [min(page, n - first) for n in lens for first in range(0, n, page)]  # by page, in order
        tokens = torch.zeros(len(order), dtype=torch.int64)
        tokens[order[: len(held)]] = torch.tensor(held, dtype=torch.int64)
        return (torch.arange(page) < tokens[:, None])[..., None, None].to(self.device)

    def _inputs(self, q: list[Any], kv: list[Any], paging: dict[str, Any]) -> DecodeInputs:
        """The checked call; InvalidInput if it is no call of the problem."""
        p = self.problem
        inputs = decode_inputs(
            q[0] if len(q) == 1 else tuple(q), kv[0] if len(kv) == 1 else tuple(kv), **self._call, **paging,
            max_kv_len=p.max_kv_len * (2 if p.context_parallel else 1),
        )  # fmt: skip
        sizes = ("max_kv_len", "hinted", "total_kv", "num_kv_splits", "batch_invariant", "misaligned", "flat_pages")
        made = inputs.problem.fields()
        off = [name for name, value in p.fields().items() if name not in sizes and made[name] != value]
        if off:
            raise InvalidInput(f"no call can be made with this {', '.join(off)}: {p}")
        return inputs

    def _lay(self, case: int) -> None:
        """Puts a case into the buffers of the check: NaN in slots without a token and in the outputs."""
        import torch

        index, used = self._laid[case]
        for name, tensor in index.items():
            self._index[name].copy_(tensor)
        for part, data in zip(self._kv, self._data, strict=True):
            nan = torch.full((), math.nan, device=self.device).to(data.dtype).view(self._ints)
            part.view(self._ints).copy_(torch.where(used, data.view(self._ints), nan))
        for name in ("out", "lse"):
            if name in self._call:
                self._call[name].fill_(math.nan)

    def _reference(self, case: int) -> tuple[Any, Any]:
        """(out, lse) as it should be, fp32; computed in float64."""
        from mla_jit.ops.decode import reference

        self._lay(case)
        keywords = {k: v for k, v in self._call.items() if k not in ("out", "lse")} | self._index
        q, kv = (parts[0] if len(parts) == 1 else tuple(parts) for parts in (self._q, self._kv))
        out, lse = reference.decode(q, kv, **keywords)
        return out.float(), lse.float()

    def check(self, run: _Run) -> float:
        """The relative L2 error of the worst row of all cases. Raises _Fault where one is not as it should be."""
        import torch

        from mla_jit.tuning import bench

        def once(inputs: Any) -> Any:
            run(inputs)
            return self._call["out"]

        self._lay(0)
        graph = bench.graph_of(once, [self._checked]) if self.on_gpu else None  # type: ignore[list-item]
        worst = 0.0
        for case, lens in enumerate(self._cases):
            self._lay(case)
            run.workspace.fill_(255)  # NaN
            if graph is None:
                once(self._checked)
            else:
                graph.replay()
                torch.cuda.synchronize()
            worst = max(worst, self._judge(case, f"lengths {', '.join(map(str, lens[:4]))}"))
        return worst

    def _judge(self, case: int, lens: str) -> float:
        import torch

        out, lse, (want, want_lse) = self._call["out"].double(), self._call.get("lse"), self._wanted[case]
        if out.isnan().any() or (lse is not None and lse.isnan().any()):
            raise _Fault("nan", f"NaN in the {'output' if out.isnan().any() else 'LSE'} with {lens}")
        error = float(((out - want).norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)).max())
        p = self.problem
        limit = max(dtypes.tolerance(p.q_dtype, p.kv_dtype), DTYPES[p.out_dtype].rel_l2)
        if not error <= limit:
            raise _Fault("wrong", f"relative L2 error {error:.2e} (limit {limit:.0e}) with {lens}")
        if lse is not None:
            off = float(torch.where(lse == want_lse, 0.0, (lse - want_lse).abs()).max())
            if not off <= dtypes.LSE_ATOL:
                raise _Fault("wrong", f"LSE off by {off:.2e} (limit {dtypes.LSE_ATOL:.0e}) with {lens}")
        return error

    def time(self, run: _Run, rounds: int, window_ms: float) -> list[float]:
        """µs a call, by round; see POLICY."""
        from mla_jit.tuning import bench

        if self.on_gpu:
            graph = bench.graph_of(run, self._sets)  # type: ignore[arg-type]
            return bench.time_alternating({"": graph}, len(self._sets), rounds=rounds, min_ms=window_ms)[""]
        turn = itertools.cycle(self._sets)
        run(next(turn))
        times = []
        for _ in range(rounds):
            calls, started = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - started < window_ms * 1e-3:
                run(next(turn))
                calls += 1
            times.append((time.perf_counter() - started) / calls * 1e6)
        return times


_kept: dict[Any, _Stand] = {}  # at most one: a problem's candidates come one after the other


def _stand(problem: DecodeProblem, where: Target, device: str) -> _Stand:
    """The problem's stand. Raises _Fault, without a doubt about the process, where its tensors do not fit."""
    key = problem, where, device
    if key in _kept:
        return _kept[key]
    _kept.clear()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
    try:
        return _kept.setdefault(key, _Stand(problem, where, device))
    except Exception as error:
        fault = _fault_of(error)
        if fault.status != "out_of_memory":
            raise
        note = f"inputs and reference do not fit the device, before any kernel: {fault.note}"
    raise _Fault("out_of_memory", note)


def main() -> None:
    """The worker: a line of JSON on stdin says what it is, each other line is a request; it ends when stdin does."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of a process with a CUDA context has gigabytes
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def say(phase: str, **found: Any) -> None:
        answer.write(json.dumps({"phase": phase, **found}) + "\n")
        answer.flush()

    start = json.loads(sys.stdin.readline())
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    device: str = start["device"]
    try:
        timer = _open(start)
    except Exception as error:
        say("failed", note=f"{type(error).__name__}: {error}")
        os._exit(1)
    say("ready")
    while True:
        request = json.loads(requests.get())
        # Should the parent be stopped, and a C++ loop hold the interpreter.
        signal.alarm(min(math.ceil(request["timeout_s"] + _PREPARE_S) + 60, 1 << 30))
        say("resolving")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["problem"].items()}
        problem, config = PROBLEMS[fields["op"]](**fields), Config.from_json(request["config"])
        measurement, doubtful = _run_candidate(
            problem, config, device, request["rounds"], request["window_ms"], timer, request["known"], say
        )
        signal.alarm(0)
        say("done", measurement=measurement.to_json(), doubtful=doubtful)


def _listen(requests: queue.SimpleQueue[str]) -> None:
    """Ends the process, and the assemblers it may have started, when its parent is gone or done with it."""
    for line in sys.stdin:
        requests.put(line)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _open(start: dict[str, Any]) -> Timer | None:
    """Makes this process the worker of a device. The timer, if there is one."""
    if start["device"].startswith("null"):
        launch.override(launch.runtime("null"))
    else:
        import torch

        if start["device"].startswith("cuda"):
            torch.zeros(1, device=start["device"])
    _where(start["device"])
    if start["timer"] is None:
        return None
    module, _, name = start["timer"].partition(":")
    timer: Timer = getattr(importlib.import_module(module), name)
    return timer


# ------------------------------------------------------------------------------------------------------- in the parent


@dataclass(frozen=True)
class _Reply:
    """What a request came to. `doubtful`: the worker is gone or not to be used again. `phase`: the last it was in."""

    measurement: Measurement
    doubtful: bool
    phase: str


class _Worker:
    """A worker process, seen from its parent. For one thread at a time, but for `end`."""

    def __init__(self, start: dict[str, Any], environment: dict[str, str]):
        cwd = os.getcwd()
        command = "import sys; sys.path[:] = sys.argv[1:]; from mla_jit.tuning.worker import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, *(os.path.join(cwd, path) for path in sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's; a kill reaches the assemblers that it may have started
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._lock = threading.Lock()
        self._out, self._log = b"", b""
        self._selector = selectors.DefaultSelector()
        self._stdout, self._stderr = self.process.stdout.fileno(), self.process.stderr.fileno()
        for fd in (self._stdout, self._stderr):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ)
        self._ready = False
        self._send(start)

    def alive(self) -> bool:
        """Whether it runs; the status of one that has ended is left for `end`."""
        with self._lock:
            return self.process.returncode is None and not self._ended()

    def wait_ready(self) -> None:
        """Raises MlaJitError if it does not start."""
        if self._ready:
            return
        try:
            message = self._read(time.monotonic() + _START_S) or {}
            note = message.get("note", "it ended")
        except TimeoutError:
            message, note = {}, f"it took more than {_START_S:g} s"
        if message.get("phase") != "ready":
            self.end(1.0)
            line = _telling(self._printed())
            raise MlaJitError(f"no worker could be started, {note}{f' ({line})' if line else ''}; see that the device "
                              "is there and free, and that torch imports with the same interpreter")  # fmt: skip
        self._ready = True

    def ask(self, request: dict[str, Any]) -> _Reply | None:
        """What a request comes to. None if the process had ended before it."""
        self._printed()
        self._log = b""
        self._send(request)
        timeout_s = left = request["timeout_s"]
        deadline, phase = time.monotonic() + timeout_s, ""
        found: dict[str, Any] = {}
        while True:
            try:
                message = self._read(deadline)
            except TimeoutError:
                self.end()
                status, note = "hang", f"killed after {timeout_s:g} s, while {phase or 'resolving'}"
                if phase == "preparing":
                    status, note = (
                        "error",
                        f"inputs and reference took more than {_PREPARE_S:g} s; take a smaller shape",
                    )
                return _Reply(Measurement(status, note=note, **found), True, phase)
            if message is None:
                code = self.end(patience_s=5.0)
                if not phase:
                    return None
                status, note = _verdict(phase, code, self._printed())
                return _Reply(Measurement(status, note=note, **found), True, phase)
            if phase == "preparing":
                deadline = time.monotonic() + left
            if message["phase"] == "preparing":
                left = deadline - time.monotonic()
                deadline = time.monotonic() + _PREPARE_S
            if message["phase"] == "done":
                return _Reply(Measurement.from_json(message["measurement"]), message["doubtful"], phase)
            phase = message.pop("phase")
            found |= message

    def end(self, patience_s: float = 0.0) -> int:
        """Kills it and all of its session, unless it ends by itself within `patience_s`; the return code."""
        with self._lock:
            if self.process.returncode is None:
                deadline = time.monotonic() + patience_s
                while not self._ended() and time.monotonic() < deadline:
                    time.sleep(0.005)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):  # in the driver; it goes when that lets it
                    self.process.wait(30.0)
            return -signal.SIGKILL if self.process.returncode is None else self.process.returncode

    def release(self) -> None:
        """Closes the pipes of a worker that was ended."""
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _ended(self) -> bool:
        """Whether it has, its status left to be read: until then nobody else can have its process id."""
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, or was: the answer tells
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """The next message; None when it has ended. Raises TimeoutError."""
        while b"\n" not in self._out:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = [key.fd for key, _ in self._selector.select(left)]
            if self._stderr in ready and not self._take():
                self._selector.unregister(self._stderr)
            if self._stdout in ready:
                if not (data := os.read(self._stdout, 1 << 16)):
                    return None
                self._out += data
        line, _, self._out = self._out.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _take(self) -> bytes:
        data = os.read(self._stderr, 1 << 16)
        self._log = (self._log + data)[-_LOG_BYTES:]
        return data

    def _printed(self) -> str:
        """The end of what it has printed since the request."""
        with contextlib.suppress(OSError):  # BlockingIOError: that was all
            while self._take():
                pass
        return self._log.decode(errors="replace")


def _verdict(phase: str, code: int, log: str) -> tuple[str, str]:
    """(status, note) of a candidate whose process ended with this return code in this phase."""
    how = f"with status {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(-code).name}"
    note = f"the process was ended {how} while {phase}: {_telling(log) or 'it printed nothing'}"
    if phase == "compiling":
        return "compiler_abort", note
    if _ILLEGAL.search(log) or -code in (signal.SIGSEGV, signal.SIGBUS):
        return "illegal_access", note
    return "out_of_memory" if _MEMORY.search(log) else "error", note


def _telling(log: str) -> str:
    """The line of a log that tells most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [n for n in lines if _ILLEGAL.search(n) or _MEMORY.search(n)]
    telling = telling or [n for n in lines if re.search(r"error|assert|fatal|abort", n, re.IGNORECASE)]
    return (telling or lines[-1:] or [""])[-1][:300]


class _Quarantine:
    """Faults on record, (status, note) by key; in a file of JSON lines too, if there is one, that processes share."""

    def __init__(self, path: Path | None):
        self._path, self._size, self._faults = path, -1, dict[str, tuple[str, str]]()
        self._lock = threading.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError as error:
                reason = error.strerror or error
                raise MlaJitError(f"the quarantine {path} cannot be written: {reason}; name another file") from error

    def faults(self) -> dict[str, tuple[str, str]]:
        """What is on record now, by this process and by others."""
        with self._lock:
            with contextlib.suppress(OSError):
                if self._path is not None and (size := self._path.stat().st_size) != self._size:
                    lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
                    self._faults |= dict(_records(lines))
                    self._size = size
            return dict(self._faults)

    def add(self, key: str, problem: DecodeProblem, config: Config, device: str, measurement: Measurement) -> None:
        fault = {"key": key, "status": measurement.status, "note": measurement.note, "device": device}
        fault |= {"problem": str(problem), "config": str(config)}
        with self._lock:
            self._faults[key] = measurement.status, measurement.note
            if self._path is None:
                return
            try:
                with self._path.open("a+b") as file:  # O_APPEND: a line at once, whoever else writes
                    end = file.seek(0, os.SEEK_END)
                    file.seek(max(0, end - 1))
                    torn = file.read(1) not in (b"", b"\n")  # by a process that was killed
                    file.write((b"\n" if torn else b"") + json.dumps(fault, sort_keys=True).encode() + b"\n")
            except OSError as error:
                layers.warn_once(
                    f"quarantine {self._path}",
                    f"mla_jit could not write to {self._path}: {error.strerror or error}. This process alone remembers "
                    "the candidates that ended a worker.",
                )


def _records(lines: Sequence[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["status"] in FAULTS:
                yield str(row["key"]), (row["status"], str(row["note"]))


@dataclass
class _Slot:
    """A device's place: one candidate at a time."""

    device: str
    worker: _Worker | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def retire(self) -> None:
        """Ends the worker; the next request gets a fresh one."""
        if self.worker is not None:
            self.worker.end()
            self.worker.release()
            self.worker = None


def _end_all(slots: Sequence[_Slot]) -> None:
    """Ends all workers; the threads that wait for one see it."""
    for slot in slots:
        if (worker := slot.worker) is not None:
            worker.end()
    for slot in slots:
        if slot.lock.acquire(timeout=5.0):
            slot.retire()
            slot.lock.release()


class Pool:
    """A worker process a device, started by the first `measure` on it. A context manager; `close` ends them all.

    devices: "cuda:0" … (as this process numbers them), "cpu", or fake ones, "null:0" …; each once.
    target: a row of configs/targets.yaml, instead of what the device is; a fake device needs one.
    environment: variables for the workers beside this process's own. They have its settings, but that they compile on a
    miss, and in their own process, whatever those say.
    timer: "module:function" that gives the times instead of a clock (see Timer); a fake device needs one.
    quarantine: a file of JSON lines in which candidates that ended a worker are remembered across processes. Delete
    a line, or the file, to try one again.

    A fault of the code (an illegal access, a compiler that aborts or does not end, a check that does not end) is
    remembered by source hash; one that may be due to the sizes (memory, a slow call, an unexplained end) for this
    problem and config alone.
    """

    def __init__(
        self, devices: Sequence[str], *, target: str | None = None, environment: Mapping[str, str] | None = None,
        timer: str | None = None, quarantine: Path | None = None,
    ):  # fmt: skip
        for device in devices:
            if _DEVICE.fullmatch(device) is None or list(devices).count(device) > 1:
                raise InvalidInput(f"devices are {list(devices)}; name each once, as cuda:0, cpu or null:0")
            if device.startswith("null") and (target is None or timer is None):
                raise InvalidInput(f"{device} is a fake device; give a target to compile for and a timer")
        self._target, self._environment, self._timer = target, dict(environment or {}), timer
        self._slots = {device: _Slot(device) for device in devices}
        self._quarantine = _Quarantine(quarantine)
        self._closed, self._lock = False, threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, list(self._slots.values()))  # at exit, too

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def measure(self, device: str, problem: DecodeProblem, config: Config, *, rounds: int = 7, window_ms: float = 3.0,
                timeout_s: float = 60.0) -> Measurement:  # fmt: skip
        """Measures a candidate on a device of the pool and blocks until it is; threads may ask at once.

        rounds, window_ms: how many times, and for how long each, it is timed. timeout_s: after this it is killed and
        has the status "hang"; a worker's start and a problem's inputs and reference do not count.
        Raises nothing for a bad candidate: InvalidInput for no device of the pool, MlaJitError if the pool is closed or
        the device's worker cannot be started.
        """
        if (slot := self._slots.get(device)) is None:
            raise InvalidInput(f"{device!r} is no device of this pool; it has {', '.join(self._slots)}")
        request = {
            "problem": problem.fields(), "config": config.to_json(), "rounds": rounds, "window_ms": window_ms,
            "timeout_s": timeout_s,
        }  # fmt: skip
        with slot.lock:
            reply = self._reply(slot, request | {"known": self._quarantine.faults()})
            if reply.doubtful:
                self._remember(problem, config, device, reply)
            return reply.measurement

    def _reply(self, slot: _Slot, request: dict[str, Any]) -> _Reply:
        while True:
            worker = self._worker(slot)
            try:
                worker.wait_ready()
                reply = worker.ask(request)
            except BaseException:
                slot.retire()
                self._check_open()  # `close` ended it
                raise
            if reply is not None and not reply.doubtful:
                return reply
            slot.retire()
            self._check_open()
            if reply is not None:
                return reply

    def _worker(self, slot: _Slot) -> _Worker:
        """The slot's worker, a fresh one where it has ended."""
        with self._lock:
            self._check_open()
            if slot.worker is not None and not slot.worker.alive():
                slot.retire()
            if slot.worker is None:
                slot.worker = _Worker(*self._start(slot.device))
            return slot.worker

    def _start(self, device: str) -> tuple[dict[str, Any], dict[str, str]]:
        """What a worker is told, and its environment: one GPU, which it knows as the first, or none."""
        kind, _, index = device.partition(":")
        changed = {"mode": "serve", "safe_compile": False} | ({"target": self._target} if self._target else {})
        current = _as_environment(dataclasses.replace(settings.current(), **changed))  # type: ignore[arg-type]
        environment = settings.child_environment() | current | self._environment
        visible = _visible(int(index or 0)) if kind == "cuda" else ""
        environment |= {"CUDA_VISIBLE_DEVICES": visible, "HIP_VISIBLE_DEVICES": visible}
        return {"device": "cuda:0" if kind == "cuda" else device, "timer": self._timer}, environment

    def _remember(self, problem: DecodeProblem, config: Config, device: str, reply: _Reply) -> None:
        found = reply.measurement
        if found.source_hash and reply.phase != "preparing":
            of_code, of_sizes = _quarantine_keys(found.source_hash, problem, config)
            code = found.status in ("illegal_access", "compiler_abort")
            code |= found.status == "hang" and reply.phase != "timing"
            self._quarantine.add(of_code if code else of_sizes, problem, config, device, found)

    def _check_open(self) -> None:
        if self._closed:
            raise MlaJitError("the pool of workers is closed; make another")

    def close(self) -> None:
        """Ends all workers; a `measure` in another thread raises MlaJitError. May be called again."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def __enter__(self) -> Pool:  # noqa: PYI034  # Self is of a later Python than 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_environment(current: settings.Settings) -> dict[str, str]:
    """The variables from which a process gets these settings, whatever else its environment has."""

    def text(value: object) -> str:
        if isinstance(value, tuple):
            return os.pathsep.join(map(str, value))
        return "" if value is None else str(value)

    return {f"MLA_JIT_{f.name.upper()}": text(getattr(current, f.name)) for f in dataclasses.fields(current)}


def _visible(index: int) -> str:
    """What a worker must have in CUDA_VISIBLE_DEVICES to see the GPU that is number `index` here, alone."""
    import torch

    devices = torch.cuda._parse_visible_devices()
    if index >= len(devices):
        raise InvalidInput(f"cuda:{index} is not among the {len(devices)} devices that this process may see")
    return str(devices[index])
