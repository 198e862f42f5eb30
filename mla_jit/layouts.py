"""One row a KV cache layout: its buffers, their fields and dtypes.

A cache is a tuple of buffers with a row of this table. `width` is in elements a token and KV head.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """A run of elements of a token in one buffer: the latent (also V), or the rotary part."""

    name: str  # "latent" | "rope"
    buffer: int  # which buffer of the cache holds it


@dataclass(frozen=True)
class Layout:
    """How a paged latent cache lies in memory. Every buffer is [pages, page_size, num_kv_heads, width]."""

    name: str
    buffers: tuple[str, ...]  # the argument names, in order
    fields: tuple[Field, ...]

    def widths(self, kv_lora_rank: int, rope_dim: int) -> tuple[int, ...]:
        """Elements a token and KV head of each buffer."""
        size = {"latent": kv_lora_rank, "rope": rope_dim}
        return tuple(sum(size[f.name] for f in self.fields if f.buffer == b) for b in range(len(self.buffers)))


LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout("joint", ("kv_cache",), (Field("latent", 0), Field("rope", 0))),
        Layout("split", ("ckv", "kpe"), (Field("latent", 0), Field("rope", 1))),
    )
}
