"""Merges and sums states through the Triton kernels in Triton's interpreter; a process of its own (TRITON_INTERPRET=1).

A line of JSON a case: the worst error beside float64 and its limit. In place and not, each base, heads of any width,
rows of which one or both sides are empty, with NaN where they are.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch
from interpreted_main import say

from mla_jit import ops
from mla_jit.launch import interpreter
from mla_jit.ops.merge.inputs import merge_inputs
from mla_jit.ops.merge.reduce import reduce_inputs
from mla_jit.target import by_name


def partials(dim: int = 40) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """(arguments of a reduction but the output, what it is, which rows it writes): a group of none, of one and more."""
    generator = torch.Generator().manual_seed(dim)
    part = torch.randn(40, 3, dim, generator=generator)
    lse = torch.randn(40, 3, generator=generator) * 4
    lse[9], lse[17], lse[25], lse[8] = torch.nan, torch.nan, torch.inf, -torch.inf
    part[9], part[17], part[8] = torch.nan, torch.nan, torch.nan
    indptr, final_map = [0, 2, 2, 3, 6], [(4, 11), (11, 12), (0, 3), (12, 20)]
    starts = [8, 16, 30, 24, 0, 32]
    want, written = torch.zeros(22, 3, dim, dtype=torch.float64), torch.zeros(22, dtype=torch.bool)
    for g, (first, end) in enumerate(final_map):
        for row in range(end - first) if indptr[g] < indptr[g + 1] else ():
            rows = [starts[i] + row for i in range(indptr[g], indptr[g + 1])]
            weights = torch.stack([lse[r].double().exp().nan_to_num(0.0, 0.0) for r in rows])
            values = torch.stack([part[r].double().nan_to_num(0.0) for r in rows])
            summed = (weights[..., None] * values).sum(0) / weights.sum(0).clamp_min(1e-300)[:, None]
            want[first + row], written[first + row] = summed, True
    lists = (torch.tensor(x, dtype=torch.int32) for x in (indptr, final_map, starts))
    return (part, lse, *lists), want, written


def reduce() -> None:
    """Prints the line of a sum."""
    arguments, want, written = partials()
    out = torch.full((22, 3, 40), torch.nan)
    inputs = reduce_inputs(*arguments, out, 8)
    variant, there = ops.variants("reduce")[0], by_name("sm_80")
    config = variant.default(inputs.problem, there).replace(block_r=4)
    sources, launches = (rule(inputs.problem, there, config) for rule in (variant.sources, variant.launches))
    bound = interpreter.bind(sources, launches, inputs.binding)
    bound.run([inputs.tensors[name].data_ptr() + offset for name, offset in bound.operands], [])
    assert bool(out[~written].isnan().all()), "rows of no group are written"
    error = (out[written].double() - want[written]).abs().nan_to_num(nan=torch.inf)
    say({"error": float(error.max()), "limit": 1e-5})


def main() -> int:
    reduce()
    variant, there = ops.variants("merge")[0], by_name("sm_80")
    for (tokens, heads, dim), base, in_place in itertools.product(((7, 3, 40), (33, 4, 128)), "e2", (False, True)):
        generator = torch.Generator().manual_seed(tokens)
        a, b = (torch.randn(tokens, heads, dim, generator=generator) for _ in "ab")
        lses = torch.randn(2, tokens, heads, generator=generator) * 5
        lses[0, 0], lses[1, 1], lses[:, 2], lses[0, 3] = -torch.inf, -torch.inf, -torch.inf, torch.inf
        a[0], b[1], a[2], a[3] = torch.nan, torch.nan, torch.nan, torch.nan
        known = torch.where(lses == torch.inf, -torch.inf, lses).double() * (math.log(2) if base == "2" else 1.0)
        want_lse = torch.logaddexp(*known)
        weights = torch.exp(known - torch.where(want_lse == -torch.inf, 0.0, want_lse))
        want = sum(w[..., None] * x.double().nan_to_num(0.0) for w, x in zip(weights, (a, b), strict=True))
        out, lse = (a, lses[0]) if in_place else (torch.full_like(a, torch.nan), torch.full_like(lses[0], torch.nan))
        inputs = merge_inputs(a, lses[0], b, lses[1], out=out, lse=lse, lse_base=base)
        config = variant.default(inputs.problem, there)
        sources, launches = (rule(inputs.problem, there, config) for rule in (variant.sources, variant.launches))
        bound = interpreter.bind(sources, launches, inputs.binding)
        pointers = [inputs.tensors[name].data_ptr() + offset for name, offset in bound.operands]
        bound.run(pointers, [inputs.floats[name] for name in bound.float_names])
        got = lse.double() * (math.log(2) if base == "2" else 1.0)
        gap = torch.where(got == want_lse, 0.0, (got - want_lse).abs()).nan_to_num(nan=torch.inf)
        error = (out.double() - want).abs().nan_to_num(nan=torch.inf)
        say({"error": float(max(error.max(), gap.max())), "limit": 1e-5})
    return 0


if __name__ == "__main__":
    sys.exit(main())
