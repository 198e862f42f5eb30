"""From the arguments of a merge to a checked `MergeProblem`, tensors by name, and the numbers of a launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mla_jit.launch.base import Binding, Number
from mla_jit.ops.decode.inputs import LN2, _aligned, _check, _dtype, _last_stride
from mla_jit.problem import ALIGNMENT, MergeProblem, ReduceProblem, rounded

Tensor = Any


@dataclass
class MergeInputs:
    """A checked call: the problem, tensors by argument name, and the numbers that a launch needs."""

    problem: MergeProblem | ReduceProblem
    tensors: dict[str, Tensor]
    numbers: dict[str, Number]
    floats: dict[str, float]
    device: Any
    out_shape: tuple[int, ...]

    @property
    def binding(self) -> Binding:
        return Binding(self.numbers)


def merge_inputs(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, out: Tensor | None = None, lse: Tensor | None = None,
    lse_base: str = "e",
) -> MergeInputs:  # fmt: skip
    """Checks a call of `mla_jit.merge_state` and describes it. Raises InvalidInput."""
    names = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    for name, t in names.items():
        _check(hasattr(t, "stride"), f"{name} is {t!r}; it must be a tensor")
    shape, device = tuple(out_a.shape), out_a.device
    _check(len(shape) == 3, f"out_a has shape {shape}; it must be [T, H, D]")
    for name, t in (*names.items(), ("out", out), ("lse", lse)):
        if t is None:
            continue
        want = shape[:-1] if name.startswith("lse") else shape
        _check(tuple(t.shape) == want, f"{name} has shape {tuple(t.shape)}; it must be {want}")
        _check(t.device == device, f"{name} is on {t.device}, out_a is on {device}; move them to one device")
        if name.startswith("lse"):
            _check(str(t.dtype) == "torch.float32", f"{name} is {t.dtype}; it must be float32")
        else:
            _last_stride(name, t)
    _check(lse_base in ("e", "2"), f"lse_base is {lse_base!r}; use 'e' (natural logarithm) or '2'")
    tokens, heads, dim = shape
    operands = {"a": out_a, "b": out_b} | ({"out": out} if out is not None else {})
    misaligned = [name for name, t in operands.items() if not _aligned(t)]
    if out is None and dim % ALIGNMENT:  # what is allocated
        misaligned.append("out")
    dtypes = {name: _dtype(f"out_{name}", t) for name, t in (("a", out_a), ("b", out_b))}
    problem = MergeProblem(
        num_heads=heads, dim=dim, a_dtype=dtypes["a"], b_dtype=dtypes["b"],
        out_dtype=dtypes["a"] if out is None else _dtype("out", out), misaligned=tuple(misaligned),
        tokens=rounded(tokens),
    )  # fmt: skip
    numbers: dict[str, Number] = {"rows": tokens * heads}
    strides = {"out": (heads * dim, dim), "lse": (heads, 1)}
    every = {"a": out_a, "lse_a": lse_a, "b": out_b, "lse_b": lse_b, "out": out, "lse": lse}
    for name, t in every.items():
        stride_t, stride_h = strides[name] if t is None else t.stride()[:2]
        numbers |= {f"{name}_stride_t": stride_t, f"{name}_stride_h": stride_h}
    natural = lse_base == "e"
    floats = {"to_base2": 1 / LN2 if natural else 1.0, "from_base2": LN2 if natural else 1.0}
    return MergeInputs(problem, every, numbers, floats, device, shape)
