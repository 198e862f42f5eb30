"""What makes a warm call fast: tensors recognised by torch's own guards, pointers taken by a function made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def alike(tensors: Sequence[Any], *, free: int | None = None) -> Callable[..., bool] | None:
    """A function of as many tensors, whether they are like these; None where this torch has no such thing.

    Alike: of the same types, dtypes, devices, shapes, strides and modes (autograd, inference), and no tensor twice. Of
    the tensor number `free` the shape does not count. The function keeps no tensor.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: list[Any] = [list(t.shape) for t in tensors]
        if free is not None:
            sizes[free] = [None] * len(sizes[free])
        strides: list[Any] = [list(t.stride()) for t in tensors]
        made = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = made.check
    except (ImportError, AttributeError, TypeError, RuntimeError, ValueError):
        return None
    return check


def pointers(spec: Sequence[tuple[int, int]]) -> Callable[[Any], tuple[int, ...]]:
    """A function of a call's operands that gives its pointers: by (which operand, how many bytes behind it).

    It is written out for this spec, asking each tensor once: a loop takes twice as long.
    """
    names = {i: f"p{n}" for n, i in enumerate(dict.fromkeys(i for i, _ in spec))}
    lines = [f"    {name} = operands[{i}].data_ptr()" for i, name in names.items()]
    values = "".join(f"{names[i]} + {offset}, " if offset else f"{names[i]}, " for i, offset in spec)
    found: dict[str, Any] = {}
    exec("\n".join(["def pointers(operands):", *lines, f"    return ({values})"]), found)  # of integers alone
    made: Callable[[Any], tuple[int, ...]] = found["pointers"]
    return made
