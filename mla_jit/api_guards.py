"""Whether tensors are like others: torch's own guards compare in one C++ call what would else be hashed in Python."""

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
