"""One row a dtype: its names in torch and Triton, its bits, and how exact a kernel that uses it must be.

Which target has which dtype stands in `configs/targets.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """A dtype as every part of the package names it.

    `rel_l2` is the limit on the relative L2 error of the worst (token, head) row of an attention output when this is
    the *cache* dtype and q is 16 bits wide; `rel_l2_same` the limit when q has this dtype too.
    """

    name: str
    torch: str  # attribute of the torch module
    triton: str  # element type in a Triton signature
    bits: int
    rel_l2: float
    rel_l2_same: float
    max_finite: float

    @property
    def bytes(self) -> int:
        return self.bits // 8


_ROWS = (
    DType("bf16", "bfloat16", "bf16", 16, 6e-3, 6e-3, 3.3895e38),
    DType("fp16", "float16", "fp16", 16, 6e-3, 6e-3, 65504.0),
    DType("fp32", "float32", "fp32", 32, 1e-5, 1e-5, 3.4028e38),
    DType("fp8_e4m3", "float8_e4m3fn", "fp8e4nv", 8, 8e-3, 2.5e-2, 448.0),
    DType("fp8_e4m3fnuz", "float8_e4m3fnuz", "fp8e4b8", 8, 8e-3, 2.5e-2, 240.0),
)
DTYPES: dict[str, DType] = {row.name: row for row in _ROWS}
_BY_TORCH = {f"torch.{row.torch}": row for row in _ROWS}

LSE_ATOL = 1e-3  # absolute limit on the natural-log LSE, every dtype


def of_torch(dtype: object) -> DType | None:
    """The row of a torch dtype, or None; torch itself is not needed."""
    return _BY_TORCH.get(str(dtype))


def tolerance(q: str, kv: str) -> float:
    """The limit on the relative L2 error of the worst output row for q and cache of these dtypes."""
    row = DTYPES[kv]
    return row.rel_l2_same if q == kv else row.rel_l2
