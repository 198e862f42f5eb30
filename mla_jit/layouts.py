"""One row a KV cache layout: its buffers, their fields and dtypes.

A cache is a tuple of buffers with a row of this table. `width` is in elements a token and KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 128  # columns of the latent that share a scale, where a token has several


@dataclass(frozen=True)
class Field:
    """A run of elements of a token in one buffer: the latent (also V), the scales of its groups, or the rotary part."""

    name: str  # "latent" | "scales" | "rope"
    buffer: int  # which buffer of the cache holds it
    dtype: str = "kv"  # "kv": the cache's; "q": that of q; else a name of dtypes.py


@dataclass(frozen=True)
class Layout:
    """How a paged latent cache lies in memory. Every buffer is [pages, page_size, num_kv_heads, width]."""

    name: str
    buffers: tuple[str, ...]  # the argument names, in order
    fields: tuple[Field, ...]

    @property
    def scaled(self) -> bool:
        """Whether each token has a scale for every GROUP columns of its latent."""
        return any(field.name == "scales" for field in self.fields)

    def widths(self, kv_lora_rank: int, rope_dim: int) -> tuple[int, ...]:
        """Elements a token and KV head of each buffer."""
        size = {"latent": kv_lora_rank, "scales": -(-kv_lora_rank // GROUP), "rope": rope_dim}
        return tuple(sum(size[f.name] for f in self.fields if f.buffer == b) for b in range(len(self.buffers)))

    def dtypes(self, kv_dtype: str, q_dtype: str) -> tuple[str, ...]:
        """The dtype of each buffer."""
        named = {"kv": kv_dtype, "q": q_dtype}
        found = {field.buffer: named.get(field.dtype, field.dtype) for field in self.fields}
        return tuple(found[b] for b in range(len(self.buffers)))


LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout("joint", ("kv_cache",), (Field("latent", 0), Field("rope", 0))),
        Layout("split", ("ckv", "kpe"), (Field("latent", 0), Field("rope", 1))),
        Layout(
            "three",
            ("ckv", "kv_scales", "kpe"),
            (Field("latent", 0), Field("scales", 1, "fp32"), Field("rope", 2, "q")),
        ),
    )
}
