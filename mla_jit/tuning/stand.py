"""The tensors of a problem on a device, on which its candidates are checked and timed; made once for all of them.

A candidate is checked on several cases of lengths, captured once and replayed with changed contents, against the
float64 reference, and timed on input sets that rotate past the L2.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Sequence
from typing import Any

from mla_jit import dtypes, plan
from mla_jit.dtypes import DTYPES
from mla_jit.errors import InvalidInput
from mla_jit.launch.base import Binding, Bound
from mla_jit.layouts import LAYOUTS
from mla_jit.ops.decode.inputs import DecodeInputs, decode_inputs
from mla_jit.problem import DecodeProblem
from mla_jit.target import Target


class Fault(Exception):
    """How a candidate ended. `doubtful`: device and process are not to be used any more."""

    def __init__(self, status: str, note: str, *, doubtful: bool = False):
        super().__init__(note)
        self.status, self.note, self.doubtful = status, note, doubtful


class Run:
    """An executable on a stand's operands: `run(inputs)` for inputs of the same shapes, strides and buffers."""

    def __init__(self, executable: plan.Executable, stand: Any):
        import torch

        self.executable, self._on_gpu = executable, stand.on_gpu
        self._bounds: list[tuple[Binding, Bound]] = []  # one for all inputs of the same shapes and strides
        self._calls: dict[int, tuple[Bound, list[int], list[float]]] = {}
        self.workspace = torch.empty(max(16, executable.workspace_bytes), dtype=torch.uint8, device=stand.device)

    def __call__(self, inputs: Any) -> None:
        e = self.executable
        if e.variant.host is not None:
            e.variant.host(e.problem, e.config, inputs)
            return
        if (call := self._calls.get(id(inputs))) is None:
            bound = self._bind(inputs)
            pointers = [self._pointer(name, offset, inputs) for name, offset in bound.operands]
            call = self._calls[id(inputs)] = bound, pointers, [inputs.floats[name] for name in bound.float_names]
        bound, pointers, floats = call
        bound.run(pointers, floats, self._stream())

    def _bind(self, inputs: Any) -> Bound:
        for binding, bound in self._bounds:
            if binding == inputs.binding:
                return bound
        self._bounds.append((inputs.binding, self.executable.bind(inputs.binding, inputs.device.index or 0)))
        return self._bounds[-1][1]

    def _stream(self) -> int:
        import torch

        return torch.cuda.current_stream().cuda_stream if self._on_gpu else 0

    def _pointer(self, name: str, offset: int, inputs: Any) -> int:
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
    """Lengths by sequence with which a candidate is timed: the bound; with total_kv, as the problem's mix has it.

    They have the sum total_kv (but for rounding, and no length below 1), in a random order. "log-uniform": the
    quantiles from a lower end that makes this sum up to the bound; where even the lower end 1 makes it too large, even
    shares of it. "uniform": the middles of equal parts of a range up to the bound, or to twice the mean where that is
    less. "one-long": one has the bound, the others share the rest evenly.
    """
    p = problem
    if p.total_kv is None or p.total_kv >= p.max_kv_len * p.batch:
        return [p.max_kv_len] * p.batch
    if p.mix == "one-long":
        longest = max(1, min(p.max_kv_len, p.total_kv - (p.batch - 1)))
        found = [longest, *_shares(p.total_kv - longest, p.batch - 1)]
    elif p.mix == "uniform":
        mean = p.total_kv / p.batch
        low, high = max(0.0, 2 * mean - p.max_kv_len), min(2 * mean, float(p.max_kv_len))
        found = [max(1, round(low + (high - low) * (b + 0.5) / p.batch)) for b in range(p.batch)]
    elif sum(_quantiles(p, 0.0)) > p.total_kv:
        return _shares(p.total_kv, p.batch)
    else:
        low, high = 0.0, math.log(p.max_kv_len)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(_quantiles(p, middle)) > p.total_kv else (middle, high)
        found = _quantiles(p, low)
    random.Random(p.batch).shuffle(found)
    return found


def _shares(tokens: int, sequences: int) -> list[int]:
    """Even lengths with this sum, none below 1."""
    share, more = divmod(max(tokens, 0), max(1, sequences))
    return [max(1, share + (b < more)) for b in range(sequences)]


def _quantiles(p: DecodeProblem, low: float) -> list[int]:
    """Lengths from exp(low) to the bound, which the last one has."""
    step = (math.log(p.max_kv_len) - low) / max(1, p.batch - 1)
    return [max(1, round(math.exp(math.log(p.max_kv_len) - step * i))) for i in range(p.batch)]


class Stand(abc.ABC):
    """The tensors of a problem on a device: cases to check its candidates on, input sets to time them on.

    An op's stand says how a case is laid into the buffers of the check, and which rows of the outputs are its results.
    """

    problem: Any
    device: str
    on_gpu: bool
    _cases: Sequence[Any]
    _call: dict[str, Any]  # the call's keywords; "out" and, if wanted, "lse" among them
    _checked: Any  # the call's inputs, on the buffers of the check
    _sets: Sequence[Any]  # of inputs to time on
    _wanted: Sequence[tuple[Any, Any]]  # by case: (out, lse) as they should be

    @abc.abstractmethod
    def _lay(self, case: int) -> None:
        """Puts a case into the buffers of the check: NaN where there is no token, and in the outputs."""

    @abc.abstractmethod
    def _lengths(self, case: int) -> str:
        """A case's lengths, for the note of a fault."""

    @abc.abstractmethod
    def _results(self, case: int) -> tuple[Any, Any]:
        """(out, lse or None): the rows to compare. Raises Fault where something else is written."""

    def check(self, run: Run) -> float:
        """The relative L2 error of the worst row of all cases. Raises Fault where one is not as it should be."""
        import torch

        from mla_jit.tuning import bench

        def once(inputs: Any) -> Any:
            run(inputs)
            return self._call["out"]

        self._lay(0)
        graph = bench.graph_of(once, [self._checked]) if self.on_gpu else None
        worst = 0.0
        for case in range(len(self._cases)):
            self._lay(case)
            run.workspace.fill_(255)  # NaN
            if graph is None:
                once(self._checked)
            else:
                graph.replay()
                torch.cuda.synchronize()
            worst = max(worst, self._judge(case))
        return worst

    def _judge(self, case: int) -> float:
        import torch

        lens, (want, want_lse) = self._lengths(case), self._wanted[case]
        out, lse = self._results(case)
        if out.isnan().any() or (lse is not None and lse.isnan().any()):
            raise Fault("nan", f"NaN in the {'output' if out.isnan().any() else 'LSE'} with {lens}")
        error = float(((out.double() - want).norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)).max())
        p = self.problem
        limit = max(dtypes.tolerance(p.q_dtype, p.kv_dtype), DTYPES[p.out_dtype].rel_l2)
        if not error <= limit:
            raise Fault("wrong", f"relative L2 error {error:.2e} (limit {limit:.0e}) with {lens}")
        if lse is not None:
            off = float(torch.where(lse == want_lse, 0.0, (lse - want_lse).abs()).max())
            if not off <= dtypes.LSE_ATOL:
                raise Fault("wrong", f"LSE off by {off:.2e} (limit {dtypes.LSE_ATOL:.0e}) with {lens}")
        return error

    def time(self, run: Run, rounds: int, window_ms: float) -> list[float]:
        """µs a call, by round; see candidate.POLICY."""
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


class DecodeStand(Stand):
    """A decode problem's tensors on a device, made once for all its candidates.

    One cache of random values serves the sets. The check has a copy of it, the page table and the outputs in buffers of
    their own, filled anew for each case (`_lay`), so that a graph captured on the first case can be replayed on all.
    """

    def __init__(self, problem: DecodeProblem, where: Target, device: str):
        import torch

        from mla_jit import trial
        from mla_jit.tuning import bench

        self.problem, self.device, self.on_gpu = p, device, on_gpu = problem, device, device.startswith("cuda")
        self._cases = lengths(p, 1 << 18 if on_gpu else 1 << 11)
        timed = timed_lengths(p)
        set_pages = self._pages(timed)
        width = p.num_kv_heads * p.head_dim
        rotate = bench.ROTATE_BYTES if on_gpu else 4 * where.l2_bytes
        sets = -(-rotate // (set_pages * p.page_size * p.token_bytes))
        sets = min(bench.MOST_SETS, max(1, sets))
        check_pages = max(map(self._pages, self._cases)) + 1  # one page is never used

        pages = max(check_pages, sets * set_pages)
        buffers = self._cache(pages, max(1, (1 << 27) // (p.page_size * width)))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))

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
        for i in range(sets):
            paging = self._paging(timed, order[i * set_pages : (i + 1) * set_pages], set_pages)
            q = self._parted(call.q.clone() if i else call.q, p.q_split)
            self._sets.append(self._inputs(q, buffers, paging))

        self._data = [buffer[:check_pages] for buffer in buffers]
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

    def _cache(self, pages: int, chunk_pages: int) -> list[Any]:
        """The cache's buffers, of random values, made so many pages at a time."""
        import torch

        from mla_jit import trial

        p, random_bits = self.problem, torch.Generator(self.device).manual_seed(0)
        row, lead = LAYOUTS[p.layout], (p.page_size, p.num_kv_heads)
        kinds = [getattr(torch, DTYPES[name].torch) for name in row.dtypes(p.kv_dtype, p.q_dtype)]
        widths = row.widths(p.kv_lora_rank, p.rope_dim)
        buffers = [
            torch.empty((pages, *lead, w), dtype=kind, device=self.device)
            for w, kind in zip(widths, kinds, strict=True)
        ]
        for first in range(0, pages, chunk_pages):
            some = [buffer[first : first + chunk_pages] for buffer in buffers]
            tokens = torch.randn((len(some[0]), *lead, p.head_dim), device=self.device, generator=random_bits)
            parts = trial.scaled_cache(p, tokens) if p.scaled else tokens.split(widths, -1)
            for buffer, part in zip(some, parts, strict=True):
                buffer.copy_(part)
        return buffers

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
        sizes = (
            "max_kv_len", "hinted", "total_kv", "mix", "num_kv_splits", "batch_invariant", "misaligned", "flat_pages",
        )  # fmt: skip
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
            ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[data.element_size()]
            nan = torch.full((), math.nan, device=self.device).to(data.dtype).view(ints)
            part.view(ints).copy_(torch.where(used, data.view(ints), nan))
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

    def _lengths(self, case: int) -> str:
        return f"lengths {', '.join(map(str, self._cases[case][:4]))}"

    def _results(self, case: int) -> tuple[Any, Any]:
        return self._call["out"], self._call.get("lse")
