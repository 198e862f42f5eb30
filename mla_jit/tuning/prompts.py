"""The tensors of a prefill problem on a device, on which its candidates are checked and timed. As stand.py for decode.

A candidate is checked on several cases of lengths, captured once and replayed with changed contents, against the
float64 reference, and timed on input sets that rotate past the L2. Lengths in tokens, times in µs.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

from mla_jit.errors import InvalidInput
from mla_jit.ops.prefill.inputs import PrefillInputs, prefill_inputs
from mla_jit.problem import PrefillProblem
from mla_jit.target import Target
from mla_jit.tuning.stand import Fault, Stand

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


class PrefillStand(Stand):
    """A prefill problem's tensors on a device, made once for all its candidates."""

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

    def _lengths(self, case: int) -> str:
        q_lens, kv_lens = self._cases[case]
        return f"q_lens {q_lens[:4]}, kv_lens {kv_lens[:4]}"

    def _results(self, case: int) -> tuple[Any, Any]:
        out, lse, rows = self._call["out"], self._call.get("lse"), len(self._wanted[case][0])
        if not out[rows:].isnan().all():
            raise Fault("wrong", f"rows of no sequence are written with {self._lengths(case)}")
        return out[:rows], None if lse is None else lse[:rows]
