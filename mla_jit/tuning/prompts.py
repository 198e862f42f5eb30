"""The tensors of a prefill problem on a device, on which its candidates are checked and timed. As stand.py for decode.

A candidate is checked on several cases of lengths, captured once and replayed with changed contents, against the
float64 reference, and timed on input sets that rotate past the L2. Lengths in tokens, times in µs.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from typing import Any

from mla_jit import dtypes
from mla_jit.dtypes import DTYPES
from mla_jit.errors import InvalidInput
from mla_jit.ops.prefill.inputs import PrefillInputs, prefill_inputs
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target
from mla_jit.tuning.stand import Fault, Run

_MOST = 2048  # tokens of a sequence that is checked: the reference holds a float64 of each pair
_SIZES = ("batch", "q_len", "total_q", "max_kv_len", "total_kv", "hinted")


def lengths(problem: PrefillProblem, most: int = _MOST) -> list[tuple[list[int], list[int]]]:
    """(q_lens, kv_lens) by case on which a candidate is checked; sums within the problem's rows.

    The bounds, lengths beside multiples of 64 and 128, keys fewer than queries and many more, sequences without any.
    """
    p, rng = problem, random.Random(problem.batch)
    q_bound, kv_bound = min(p.q_len, most), min(p.max_kv_len, most)
    edges = [n + over for n in (64, 128, 256) for over in (-1, 0, 1)]

    def some(bound: int) -> int:
        return min(bound, rng.choice(edges) if rng.random() < 0.5 else rng.randint(1, max(1, bound)))

    cases = []
    for case in range(4):
        q_lens, kv_lens = [], []
        q_left, kv_left = p.total_q, p.keys
        for b in range(p.batch):
            q_len, kv_len = (q_bound, kv_bound) if b == case % 2 else (some(q_bound), some(kv_bound))
            if case == 3 and b == p.batch - 1 and p.batch > 1:
                kv_len = 0
            q_lens.append(min(q_len, q_left))
            kv_lens.append(min(kv_len, kv_left))
            q_left, kv_left = q_left - q_lens[-1], kv_left - kv_lens[-1]
        cases.append((q_lens, kv_lens))
    return cases


class PromptStand:
    """A prefill problem's tensors on a device, made once for all its candidates; see stand.Stand."""

    def __init__(self, problem: PrefillProblem, where: Target, device: str):
        from mla_jit import trial
        from mla_jit.tuning import bench

        self.problem, self.device, self.on_gpu = problem, device, device.startswith("cuda")
        prompt = trial.make_prompt(problem, device)
        self._call = prompt.keywords
        self._data = {"q": prompt.q, "k": prompt.k, "v": prompt.v}
        size = sum(x.numel() * x.element_size() for x in self._data.values())
        rotate = bench.ROTATE_BYTES if self.on_gpu else 4 * where.l2_bytes
        sets = min(bench.MOST_SETS, max(1, -(-rotate // max(1, size))))
        self._sets = [
            self._inputs({name: x.clone() if i else x for name, x in self._data.items()}, self._call)
            for i in range(sets)
        ]  # fmt: skip
        self._cases = lengths(problem)
        self._x = {name: x.clone() for name, x in self._data.items()}
        self._index = {name: self._call[name].clone() for name in ("qo_indptr", "kv_indptr")}
        self._checked = self._inputs(self._x, {**self._call, **self._index})
        self._wanted = [self._reference(case) for case in range(len(self._cases))]

    def _inputs(self, x: dict[str, Any], keywords: dict[str, Any]) -> PrefillInputs:
        """The checked call; InvalidInput if it is no call of the problem."""
        inputs = prefill_inputs(**x, **keywords)
        made = inputs.problem.fields()
        off = [name for name, value in self.problem.fields().items() if name not in _SIZES and made[name] != value]
        if off:
            raise InvalidInput(f"no call can be made with this {', '.join(off)}: {self.problem}")
        return inputs

    def _lay(self, case: int) -> None:
        """Puts a case into the buffers of the check: NaN in rows of no sequence and in the outputs."""
        import torch

        for (name, index), lens in zip(self._index.items(), self._cases[case], strict=True):
            starts = torch.tensor([0, *itertools.accumulate(lens)])
            index.copy_(starts)
            for operand in ("q",) if name == "qo_indptr" else ("k", "v"):
                x, data, used = self._x[operand], self._data[operand], int(starts[-1])
                bits = torch.uint8 if x.element_size() == 1 else x.dtype
                x.view(bits)[:used].copy_(data.view(bits)[:used])
                x.view(bits)[used:] = torch.full((), math.nan).to(x.dtype).view(bits).to(self.device)
        for name in ("out", "lse"):
            if name in self._call:
                self._call[name].fill_(math.nan)

    def _reference(self, case: int) -> tuple[Any, Any]:
        """(out, lse) of the rows that belong to a sequence, as they should be, fp32; computed in float64."""
        from mla_jit.ops.prefill import reference

        self._lay(case)
        keywords = {k: v for k, v in self._call.items() if k not in ("out", "lse")} | self._index
        used = sum(self._cases[case][0])
        out, lse = reference.prefill(self._x["q"], self._x["k"], self._x["v"], **keywords)
        return out[:used].float(), lse[:used].float()

    def check(self, run: Run) -> float:
        """The relative L2 error of the worst row of all cases. Raises Fault where one is not as it should be."""
        import torch

        from mla_jit.tuning import bench

        def once(inputs: Any) -> Any:
            run(inputs)
            return self._call["out"]

        self._lay(0)
        graph = bench.graph_of(once, [self._checked]) if self.on_gpu else None  # type: ignore[list-item]
        worst = 0.0
        for case, (q_lens, kv_lens) in enumerate(self._cases):
            self._lay(case)
            run.workspace.fill_(255)  # NaN
            if graph is None:
                once(self._checked)
            else:
                graph.replay()
                torch.cuda.synchronize()
            worst = max(worst, self._judge(case, f"q_lens {q_lens[:4]}, kv_lens {kv_lens[:4]}"))
        return worst

    def _judge(self, case: int, lens: str) -> float:
        import torch

        want, want_lse = self._wanted[case]
        out, lse = self._call["out"][: len(want)].double(), self._call.get("lse")
        lse = None if lse is None else lse[: len(want)]
        if out.isnan().any() or (lse is not None and lse.isnan().any()):
            raise Fault("nan", f"NaN in the {'output' if out.isnan().any() else 'LSE'} with {lens}")
        if not self._call["out"][len(want) :].isnan().all():
            raise Fault("wrong", f"rows of no sequence are written with {lens}")
        error = float(((out - want).norm(dim=-1) / want.double().norm(dim=-1).clamp_min(1e-30)).max())
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
        """µs a call, by round."""
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
