"""`Problem`: the mathematics and the shapes of one call, and the checks that refuse a bad one before any launch.

A problem is made from tensors (`decode_from_tensors`) or by hand (`DecodeProblem(...)`, for `warmup`, `supports` and
`mla-tune compile`); both give the same binary. Contents of tensors are never read: lengths live on the device.
torch is not imported here; tensors are asked for their attributes only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from mla_jit import dtypes
from mla_jit.errors import InvalidInput
from mla_jit.layouts import GROUP, LAYOUTS

SCHEDULERS = ("auto", "split", "persistent")
MIXES = ("log-uniform", "uniform", "one-long")  # how uneven lengths may be distributed
PREFILL_SCHEDULERS = ("auto", "tiles", "persistent")
NO_KV_SCALE = "kv_scale is given beside kv_scales; multiply it into kv_scales (and into kpe)"
ALIGNMENT = 16  # bytes: the width of the widest vector access and of a bulk copy's base


def bucket(n: int) -> int:
    """The least power of two not less than n (0 stays 0): the granularity of sizes that change from call to call."""
    return 1 << (n - 1).bit_length() if n > 1 else n


def rounded(n: int) -> int:
    """The least multiple of an eighth of an octave not less than n: finer than `bucket`, for the size of a grid."""
    return -(-n // step) * step if (step := bucket(n) // 16) > 1 else n


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InvalidInput(message)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Base of every op's problem; `op` names the op, `fields()` its columns.

    What a tuner asks of it. TUNED: whether it has rows in the tuning database. HARD: fields in which a row must be
    equal to say anything of a problem; SOFT: in which it had better be. The sizes are in neither. FIXED: of the axes of
    `shape` those that a row had better have in common; between the others it may lie anywhere. LENGTHS: fields that say
    how long, with their values where that does not count; KIN: these, and the others in which problems may differ that
    take the same kernels. SLOTTED: whether a config says how a sequence is cut. DATA: what `data_bytes` counts.
    """

    op: str = ""
    TUNED: ClassVar[bool] = True
    HARD: ClassVar[tuple[str, ...]] = ("op",)
    SOFT: ClassVar[tuple[str, ...]] = ()
    FIXED: ClassVar[tuple[str, ...]] = ("num_heads",)
    LENGTHS: ClassVar[Mapping[str, Any]] = {"max_kv_len": 0, "total_kv": None}
    KIN: ClassVar[Mapping[str, Any]] = {**LENGTHS, "batch": 0}
    SLOTTED: ClassVar[bool] = False
    DATA: ClassVar[str] = "data"

    def fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class DecodeProblem(Problem):
    """Decode: `num_heads` query heads over `num_kv_heads` latent caches of kv_lora_rank + rope_dim, q_len tokens each.

    What is computed: kv_lora_rank (C), rope_dim (R), causal, soft_cap (a logit cap is given), sinks, lse (wanted),
    q_scale / kv_scale (given as device tensors; floats are folded in), context_parallel (cp_world > 1).
    How it lies in memory: dtypes, page_size, layout (a row of layouts.py), q_split ((q_nope, q_pe) given), paging
    ("table": padded [B, pages]; "csr": kv_indptr + kv_indices), has_lens (seq_lens given), ragged (qo_indptr given),
    misaligned (names of operands whose base or strides are not multiples of 16 bytes), flat_pages (a token's place is
    (page · page_size + slot) · token stride, as a bulk copy needs), index64 (page table or lengths are int64).
    How large: batch, q_len (the longest, if ragged), max_kv_len (a bound: a hint, else the table's capacity), hinted
    (max_kv_len or total_kv came from the caller), total_kv (or None), num_kv_splits (the caller's wish, or None),
    batch_invariant, scheduler (the caller's wish: "auto", "split" or "persistent"), planned (the caller brings the
    persistent scheduler's work list), groups (of programs that the caller's list is cut for; None: as many as the
    config says), mix (one of MIXES: how the lengths are distributed where total_kv makes them uneven; a measured row
    tells with what it was timed, a call cannot know and leaves the default).
    """

    op: str = "decode"
    num_heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    num_kv_heads: int = 1
    q_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    out_dtype: str = "bf16"
    page_size: int = 64
    layout: str = "joint"
    q_split: bool = False
    paging: str = "table"
    has_lens: bool = True
    ragged: bool = False
    causal: bool = True
    soft_cap: bool = False
    sinks: bool = False
    lse: bool = False
    q_scale: bool = False
    kv_scale: bool = False
    context_parallel: bool = False
    misaligned: tuple[str, ...] = ()
    flat_pages: bool = True
    index64: tuple[str, ...] = ()
    batch: int = 1
    q_len: int = 1
    max_kv_len: int = 4096
    hinted: bool = False
    total_kv: int | None = None
    num_kv_splits: int | None = None
    batch_invariant: bool = False
    scheduler: str = "auto"
    planned: bool = False
    groups: int | None = None
    mix: str = MIXES[0]
    HARD: ClassVar[tuple[str, ...]] = (
        "op", "kv_lora_rank", "rope_dim", "num_kv_heads", "q_dtype", "kv_dtype", "out_dtype", "layout",
        "context_parallel", "batch_invariant",
    )  # fmt: skip
    SOFT: ClassVar[tuple[str, ...]] = (
        "page_size", "paging", "has_lens", "ragged", "causal", "soft_cap", "sinks", "lse", "q_split", "q_scale",
        "kv_scale", "misaligned", "flat_pages", "index64", "scheduler", "planned", "mix",
    )  # fmt: skip
    FIXED: ClassVar[tuple[str, ...]] = ("num_heads", "q_len")  # rows decide between kernels
    LENGTHS: ClassVar[Mapping[str, Any]] = {**Problem.LENGTHS, "mix": MIXES[0]}
    KIN: ClassVar[Mapping[str, Any]] = {**LENGTHS, "batch": 0}
    SLOTTED: ClassVar[bool] = True
    DATA: ClassVar[str] = "cache"

    def __post_init__(self) -> None:
        _check(self.num_heads >= 1, f"num_heads is {self.num_heads}; it must be at least 1")
        _check(self.num_kv_heads >= 1, f"num_kv_heads is {self.num_kv_heads}; it must be at least 1")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads cannot be shared by {self.num_kv_heads} KV heads: not a multiple",
        )
        _check(self.kv_lora_rank >= 16, f"kv_lora_rank is {self.kv_lora_rank}; the least is 16")
        _check(self.rope_dim >= 0, f"rope_dim is {self.rope_dim}; it must not be negative")
        _check(self.page_size >= 1, f"page_size is {self.page_size}; it must be at least 1")
        _check(self.q_len >= 0 and self.batch >= 0 and self.max_kv_len >= 0, "batch, q_len and max_kv_len must be >= 0")
        for name in ("q_dtype", "kv_dtype", "out_dtype"):
            value = getattr(self, name)
            _check(value in dtypes.DTYPES, f"{name} {value!r} is unknown; known: {', '.join(dtypes.DTYPES)}")
        _check(self.layout in LAYOUTS, f"layout {self.layout!r} is unknown; known: {', '.join(LAYOUTS)}")
        _check(self.paging in ("table", "csr"), f"paging {self.paging!r} is unknown; use 'table' or 'csr'")
        _check(self.scheduler in SCHEDULERS, f"scheduler {self.scheduler!r} is unknown; use {', '.join(SCHEDULERS)}")
        _check(self.scheduler == "persistent" or not self.planned, "a work list is for the persistent scheduler alone")
        _check(
            self.groups is None or (self.planned and self.groups >= 1),
            f"groups is {self.groups}; it says for how many the caller's work list is made (planned), at least 1",
        )
        _check(self.mix in MIXES, f"mix {self.mix!r} is unknown; use {', '.join(MIXES)}")
        _check(
            self.num_kv_splits is None or self.num_kv_splits >= 1,
            f"num_kv_splits is {self.num_kv_splits}; it must be at least 1, or None to let the tuner choose",
        )
        _check(
            not (self.sinks and self.context_parallel),
            "sinks with cp_world > 1 would be counted once a rank; merge the ranks' partial outputs, then add them",
        )
        if LAYOUTS[self.layout].scaled:
            self._check_scaled()

    def _check_scaled(self) -> None:
        """InvalidInput for what a cache (ckv, kv_scales, kpe) cannot be."""
        _check(
            dtypes.DTYPES[self.kv_dtype].bits == 8,
            f"ckv is {self.kv_dtype}; beside kv_scales it must be fp8 e4m3 (without them, pass the pair (ckv, kpe))",
        )
        _check(
            dtypes.DTYPES[self.q_dtype].bits > 8,
            f"q is {self.q_dtype}; with kv_scales it must be bf16 or fp16, which kpe is then too",
        )
        _check(
            self.kv_lora_rank % GROUP == 0,
            f"kv_lora_rank is {self.kv_lora_rank}; kv_scales has one scale for {GROUP} columns, of which it must be a "
            "multiple",
        )
        _check(not self.kv_scale, NO_KV_SCALE)

    @property
    def scaled(self) -> bool:
        """Whether the latent is to be multiplied by scales of its own (layouts.py)."""
        return LAYOUTS[self.layout].scaled

    @property
    def rope_dtype(self) -> str:
        """Of the cached rotary part."""
        return LAYOUTS[self.layout].dtypes(self.kv_dtype, self.q_dtype)[-1]

    @property
    def token_bytes(self) -> int:
        """Of a token in the cache, all KV heads."""
        row = LAYOUTS[self.layout]
        sizes = (dtypes.DTYPES[name].bytes for name in row.dtypes(self.kv_dtype, self.q_dtype))
        widths = row.widths(self.kv_lora_rank, self.rope_dim)
        return self.num_kv_heads * sum(n * size for n, size in zip(widths, sizes, strict=True))

    @property
    def gqa_ratio(self) -> int:
        """Query heads a KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def rows(self) -> int:
        """Packed rows a sequence and KV head: query tokens × heads."""
        return self.gqa_ratio * self.q_len

    @property
    def head_dim(self) -> int:
        return self.kv_lora_rank + self.rope_dim

    @property
    def shape(self) -> tuple[int, ...]:
        """By what a lookup finds neighbours: batch, heads, query tokens, and the bucket of the length bound."""
        return self.batch, self.num_heads, self.q_len, bucket(self.max_kv_len)

    @property
    def means(self) -> tuple[int | None, ...]:
        """(bucket of the mean length,) where total_kv makes it less than the bound's; (None,): all are as long."""
        if self.total_kv is None:
            return (None,)
        mean = max(1, bucket(-(-self.total_kv // max(1, self.batch))))
        return (mean if mean < bucket(self.max_kv_len) else None,)

    @property
    def tokens(self) -> int:
        """Cached tokens of all sequences when it is timed: the bound of each, or the given total."""
        most = self.max_kv_len * self.batch
        return most if self.total_kv is None else min(self.total_kv, most)

    @property
    def data_bytes(self) -> int:
        """Of these tokens in the latent cache."""
        return self.tokens * self.token_bytes

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.num_heads * self.q_len * (self.head_dim + self.kv_lora_rank)

    @property
    def spread(self) -> str:
        """How its lengths are distributed, in a word."""
        return "even" if self.total_kv is None else self.mix

    @property
    def kind(self) -> str:
        """What it is but for its sizes, in a few words."""
        dims = f"{self.kv_lora_rank}+{self.rope_dim}"
        types = f"{self.q_dtype}×{self.kv_dtype}{' scaled' if self.scaled else ''}"
        return f"{self.num_heads} heads × {dims}, {types}, page {self.page_size}"

    @property
    def label(self) -> str:
        """A shape in a few words: heads, batch, length, and what is not usual."""
        more = [] if self.total_kv is None else [self.mix]
        more += [] if self.q_len == 1 else [f"q_len {self.q_len}"]
        more += _dtypes_unlike_bf16(self.q_dtype, self.kv_dtype, " scaled" if self.scaled else "")
        return ", ".join([f"{self.num_heads} heads × {self.batch} × {self.max_kv_len}", *more])

    def __str__(self) -> str:
        length = f"kv<={self.max_kv_len}"
        q = f"q_len {self.q_len}{' ragged' if self.ragged else ''}"
        return (
            f"decode {self.num_heads} heads/{self.num_kv_heads} × {self.kv_lora_rank}+{self.rope_dim}, "
            f"{self.q_dtype}×{self.kv_dtype}{' scaled' if self.scaled else ''}, page {self.page_size}, "
            f"batch {self.batch}, {q}, {length}"
        )


def _dtypes_unlike_bf16(q: str, kv: str, more: str = "") -> list[str]:
    return [] if (q, kv) == ("bf16", "bf16") else [f"{q}×{kv}{more}"]


@dataclass(frozen=True, kw_only=True)
class PrefillProblem(Problem):
    """Prefill, un-absorbed: `num_heads` query heads over `num_kv_heads` of K [qk_dim] and V [v_dim], both in full.

    What is computed: qk_dim, v_dim, causal (query i of a sequence sees keys j <= kv_len - q_len + i), soft_cap (a logit
    cap is given), lse (wanted), q_scale / k_scale / v_scale (given as device tensors; floats are folded in).
    How it lies in memory: dtypes (K's and V's are one), misaligned (names of operands whose base or strides are not
    multiples of 16 bytes), token_major (the heads of K and V lie within a token's row, as a bulk copy needs), index64
    (which indptrs are int64).
    How large: batch, q_len (a bound of the longest), total_q (rows of q), max_kv_len (a bound: a hint, else all rows of
    K), total_kv (rows of K; None: batch × max_kv_len), hinted (max_kv_len came from the caller, or there is one
    sequence alone), scheduler (the caller's wish: "auto", "tiles" or "persistent").
    """

    op: str = "prefill"
    num_heads: int
    num_kv_heads: int
    qk_dim: int = 192
    v_dim: int = 128
    q_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    out_dtype: str = "bf16"
    causal: bool = True
    soft_cap: bool = False
    lse: bool = False
    q_scale: bool = False
    k_scale: bool = False
    v_scale: bool = False
    misaligned: tuple[str, ...] = ()
    token_major: bool = True
    index64: tuple[str, ...] = ()
    batch: int = 1
    q_len: int = 4096
    total_q: int = 4096
    max_kv_len: int = 4096
    total_kv: int | None = None
    hinted: bool = False
    scheduler: str = "auto"
    HARD: ClassVar[tuple[str, ...]] = (
        "op", "num_heads", "num_kv_heads", "qk_dim", "v_dim", "q_dtype", "kv_dtype", "out_dtype", "causal",
    )  # fmt: skip
    SOFT: ClassVar[tuple[str, ...]] = (
        "soft_cap", "lse", "q_scale", "k_scale", "v_scale", "misaligned", "token_major", "index64", "scheduler",
    )  # fmt: skip
    KIN: ClassVar[Mapping[str, Any]] = {**Problem.KIN, "q_len": 0, "total_q": 0}
    DATA: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        _check(self.num_heads >= 1, f"num_heads is {self.num_heads}; it must be at least 1")
        _check(self.num_kv_heads >= 1, f"num_kv_heads is {self.num_kv_heads}; it must be at least 1")
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.num_heads} query heads cannot be shared by {self.num_kv_heads} KV heads: not a multiple",
        )
        for name in ("qk_dim", "v_dim"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("batch", "q_len", "total_q", "max_kv_len", "total_kv"):
            size = getattr(self, name)
            _check(size is None or size >= 0, f"{name} is {size}; it must be >= 0")
        for name in ("q_dtype", "kv_dtype", "out_dtype"):
            value = getattr(self, name)
            _check(value in dtypes.DTYPES, f"{name} {value!r} is unknown; known: {', '.join(dtypes.DTYPES)}")
        _check(
            self.scheduler in PREFILL_SCHEDULERS,
            f"scheduler {self.scheduler!r} is unknown; use {', '.join(PREFILL_SCHEDULERS)}",
        )

    @property
    def gqa_ratio(self) -> int:
        """Query heads a KV head (G)."""
        return self.num_heads // self.num_kv_heads

    @property
    def keys(self) -> int:
        """Rows of K, or their bound."""
        return self.batch * self.max_kv_len if self.total_kv is None else self.total_kv

    @property
    def pairs(self) -> float:
        """(query, key) pairs a head that count, for sequences of mean lengths."""
        if not (self.batch and self.total_q):
            return 0.0
        q_len = min(self.q_len, self.total_q / self.batch)
        kv_len = min(self.max_kv_len, self.keys / self.batch)
        if not self.causal:
            return self.batch * q_len * kv_len
        below = kv_len - min(q_len, kv_len)  # keys that all queries see
        return self.batch * min(q_len, kv_len) * (below + (kv_len - below + 1) / 2)

    @staticmethod
    def sizes(batch: int, q_len: int, kv_len: int) -> dict[str, Any]:
        """The fields that say how large, of as long sequences whose length the host knows; rounded as a call's are."""
        return {
            "batch": batch, "q_len": rounded(q_len), "total_q": rounded(batch * q_len), "max_kv_len": bucket(kv_len),
            "total_kv": bucket(batch * kv_len), "hinted": True,
        }  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """By what a lookup finds neighbours: batch, heads, the longest q, and the bucket of the longest keys.

        Where the call did not tell it (max_kv_len is all rows of K), these are as long as the longest q, or the mean.
        """
        kv_len = bucket(self.max_kv_len)
        if not self.hinted:
            kv_len = min(kv_len, max(bucket(self.q_len), bucket(-(-self.keys // max(1, self.batch)))))
        return self.batch, self.num_heads, self.q_len, kv_len

    @property
    def means(self) -> tuple[int | None, ...]:
        """(of the keys, of q): mean lengths, rounded as the bounds are; None where all are as long as the bound."""
        keys, q = (-(-total // max(1, self.batch)) for total in (self.keys, self.total_q))
        found = max(1, bucket(keys)), max(1, rounded(q))
        return tuple(
            mean if mean < bound else None for mean, bound in zip(found, (self.shape[3], self.q_len), strict=True)
        )

    @property
    def tokens(self) -> int:
        """Query tokens of all sequences."""
        return self.total_q

    @property
    def data_bytes(self) -> int:
        """Of q, K, V and the output."""
        q, kv, out = (dtypes.DTYPES[name].bytes for name in (self.q_dtype, self.kv_dtype, self.out_dtype))
        a_query = self.num_heads * (self.qk_dim * q + self.v_dim * out)
        return self.total_q * a_query + self.keys * self.num_kv_heads * (self.qk_dim + self.v_dim) * kv

    @property
    def flops(self) -> int:
        """Of the pairs that count."""
        return int(2 * self.pairs * self.num_heads * (self.qk_dim + self.v_dim))

    @property
    def spread(self) -> str:
        """How its lengths are distributed, in a word."""
        return "even" if self.means == (None, None) else "uneven"

    @property
    def kind(self) -> str:
        """What it is but for its sizes, in a few words."""
        shared = "" if self.gqa_ratio == 1 else f"/{self.num_kv_heads}"
        dims = f"{self.num_heads}{shared} heads × {self.qk_dim}/{self.v_dim}"
        return f"prompts, {dims}, {self.q_dtype}×{self.kv_dtype}, {'causal' if self.causal else 'full'}"

    @property
    def label(self) -> str:
        """A shape in a few words: heads, batch, longest keys, and what is not usual."""
        more = [] if self.spread == "even" else [self.spread]
        more += [] if bucket(self.q_len) == self.max_kv_len else [f"q_len {self.q_len}"]
        more += [] if self.causal else ["full"]
        more += _dtypes_unlike_bf16(self.q_dtype, self.kv_dtype)
        return ", ".join([f"prompt {self.num_heads} heads × {self.batch} × {self.max_kv_len}", *more])

    def __str__(self) -> str:
        return (
            f"prefill {self.num_heads} heads/{self.num_kv_heads} × {self.qk_dim}/{self.v_dim}, "
            f"{self.q_dtype}×{self.kv_dtype}{', causal' if self.causal else ''}, batch {self.batch}, "
            f"q_len<={self.q_len} of {self.total_q}, kv<={self.max_kv_len} of {self.keys}"
        )


Tunable: TypeAlias = DecodeProblem | PrefillProblem  # what has rows in the tuning database


@dataclass(frozen=True, kw_only=True)
class MergeProblem(Problem):
    """The merge of two attention states: outputs [tokens, num_heads, dim] and their LSEs. tokens: a bound.

    misaligned: of "a", "b" and "out", those whose base or strides are not multiples of 16 bytes.
    """

    op: str = "merge"
    TUNED: ClassVar[bool] = False
    num_heads: int
    dim: int
    a_dtype: str = "bf16"
    b_dtype: str = "bf16"
    out_dtype: str = "bf16"
    misaligned: tuple[str, ...] = ()
    tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("num_heads", "dim", "tokens"):
            _check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must be >= 0")
        for name in ("a_dtype", "b_dtype", "out_dtype"):
            value = getattr(self, name)
            _check(value in dtypes.DTYPES, f"{name} {value!r} is unknown; known: {', '.join(dtypes.DTYPES)}")

    def __str__(self) -> str:
        types = f"{self.a_dtype} + {self.b_dtype} -> {self.out_dtype}"
        return f"merge of {self.tokens} tokens × {self.num_heads} heads × {self.dim}, {types}"


@dataclass(frozen=True, kw_only=True)
class ReduceProblem(Problem):
    """The sum of listed partial states, [rows, num_heads, dim], by `groups` of up to tile_q queries.

    misaligned: of "part" and "out"; index64: of the lists "indptr", "final_map" and "partial_map".
    """

    op: str = "reduce"
    TUNED: ClassVar[bool] = False
    num_heads: int
    dim: int
    part_dtype: str = "fp32"
    out_dtype: str = "bf16"
    misaligned: tuple[str, ...] = ()
    index64: tuple[str, ...] = ()
    groups: int = 1
    tile_q: int = 256

    def __str__(self) -> str:
        types = f"{self.part_dtype} -> {self.out_dtype}"
        return f"sum of {self.groups} groups of {self.tile_q} queries × {self.num_heads} heads × {self.dim}, {types}"
