"""The ops: mathematics, kernels and the variants' rows. `variants(op)` is the registry."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from mla_jit import settings

if TYPE_CHECKING:
    from mla_jit.ops.variant import Variant

OPS = ("decode", "prefill")  # those with a support matrix and a tuning space


def variants(op: str) -> tuple[Variant, ...]:
    """The variants of an op (of settings.backends, if any are named), in the order in which equals are preferred."""
    backends = settings.current().backends
    return tuple(v for v in every(op) if v.backend in backends) if backends else every(op)


@functools.cache
def every(op: str) -> tuple[Variant, ...]:
    """All variants of an op, whatever settings.backends names. Imported on first use."""
    if op == "decode":
        from mla_jit.ops.decode.asm_persistent import DECODE_PERSISTENT_ASM
        from mla_jit.ops.decode.asm_splitk import (
            DECODE_MIXED_ASM,
            DECODE_NARROW_ASM,
            DECODE_NARROW_PAIR_ASM,
            DECODE_SPLITK_ASM,
        )
        from mla_jit.ops.decode.blocked_cpu import DECODE_BLOCKED_CPU
        from mla_jit.ops.decode.gluon import DECODE_SPLITK_GLUON
        from mla_jit.ops.decode.persistent import DECODE_PERSISTENT_TRITON
        from mla_jit.ops.decode.persistent_gluon import DECODE_PERSISTENT_GLUON
        from mla_jit.ops.decode.splitk import DECODE_SPLITK_TRITON

        return (
            DECODE_NARROW_ASM, DECODE_NARROW_PAIR_ASM, DECODE_SPLITK_ASM, DECODE_MIXED_ASM, DECODE_SPLITK_GLUON,
            DECODE_SPLITK_TRITON, DECODE_PERSISTENT_ASM, DECODE_PERSISTENT_GLUON, DECODE_PERSISTENT_TRITON,
            DECODE_BLOCKED_CPU,
        )  # fmt: skip
    if op == "prefill":
        from mla_jit.ops.prefill.blocked_cpu import PREFILL_BLOCKED_CPU
        from mla_jit.ops.prefill.gluon import PREFILL_GLUON
        from mla_jit.ops.prefill.persistent import PREFILL_PERSISTENT_TRITON
        from mla_jit.ops.prefill.persistent_gluon import PREFILL_PERSISTENT_GLUON
        from mla_jit.ops.prefill.tiles import PREFILL_TRITON

        return (
            PREFILL_GLUON, PREFILL_TRITON, PREFILL_PERSISTENT_GLUON, PREFILL_PERSISTENT_TRITON, PREFILL_BLOCKED_CPU,
        )  # fmt: skip
    if op == "merge":
        from mla_jit.ops.merge.rows import MERGE_CPU, MERGE_TRITON

        return (MERGE_TRITON, MERGE_CPU)
    if op == "reduce":
        from mla_jit.ops.merge.reduce import REDUCE_CPU, REDUCE_TRITON

        return (REDUCE_TRITON, REDUCE_CPU)
    raise KeyError(f"no op {op!r}; there is {', '.join(OPS)}, merge, reduce")
