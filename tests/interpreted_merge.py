"""Merges states through the Triton kernel in Triton's interpreter; a process of its own (TRITON_INTERPRET=1).

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
from mla_jit.target import by_name


def main() -> int:
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
