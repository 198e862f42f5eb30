"""Decode calls to test with: what a call looks like (`Case`), its tensors (`build`), and the judgement (`check`).

The data are made so that a wrong token, page, split or mask cannot hide in a norm. Each sequence has *needles*, keys
that carry a softmax weight of 0.9 and more for the query rows that look for them: at token 0, at the last token, on
both sides of page edges, of multiples of 16, 32, 64 and 128, and of every query token's causal boundary. Each row looks
for one needle. Slots of the cache that hold no token are NaN, unused table entries are ids of no page, and outputs
start as NaN.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_jit import dtypes
from mla_jit.layouts import GROUP
from mla_jit.ops.decode import reference

GARBAGE = (-1, 2**31 - 1, 123_456_789, -(2**31))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decode call. Lengths are in tokens, and global where cp_world > 1."""

    heads: int = 4
    kv_heads: int = 1
    C: int = 64
    R: int = 16
    page: int = 16
    q_len: int = 1
    q_lens: tuple[int, ...] | None = None  # ragged: of each sequence; q_len is not used then
    lens: tuple[int, ...] = (100, 37)
    q_dtype: str = "fp32"
    kv_dtype: str = "fp32"
    out_dtype: str | None = None
    csr: bool = False
    csr_lens: bool = False  # seq_lens given beside the CSR arrays
    q_split: bool = False
    kv_split: bool = False
    scaled: str = ""  # a cache (ckv, kv_scales, kpe): "": no; "buffers"; "token": views of one row a token; "page"
    q_3d: bool = True  # [B, H, D] where q_len is 1
    kv_3d: bool = False  # the cache without the head dimension
    q_view: str = ""  # "heads": head-major storage; "padded": rows apart; "odd": a base off by one element
    kv_view: str = ""  # "padded": rows apart; "gap": pages apart; "odd"
    out_view: str | None = None  # None: not given; "": contiguous; "heads"; "odd"
    q_tail: int = 0  # ragged: tokens of q that belong to no sequence
    max_q_len: int | None = None  # ragged: a bound looser than the longest
    causal: bool = True
    cap: float = 0.0
    sinks: bool = False
    q_scale: str = ""  # "float" | "tensor"
    kv_scale: str = ""
    lse: bool = True
    lse_base: str = "e"
    cp: tuple[int, int] = (0, 1)  # rank, world
    index64: bool = False
    spare_pages: int = 3
    far: bool = False  # the pages in use lie behind the spare ones
    extra_pages: int = 2  # columns of the table beyond the longest sequence
    table_gap: int = 0  # elements between the rows of the table
    hint: bool = False
    num_kv_splits: int | None = None
    batch_invariant: bool = False

    @property
    def id(self) -> str:
        """What differs from a plain call, readable."""
        lens = (
            "x".join(map(str, self.lens))
            if len(self.lens) <= 3
            else f"{len(self.lens)}of{min(self.lens)}to{max(self.lens)}"
        )
        q = "r" + "_".join(map(str, self.q_lens)) if self.q_lens is not None else str(self.q_len)
        types = self.q_dtype if self.q_dtype == self.kv_dtype else f"{self.q_dtype}x{self.kv_dtype}"
        heads = f"{self.heads}" + (f"over{self.kv_heads}" if self.kv_heads > 1 else "")
        parts = [f"h{heads}", f"c{self.C}r{self.R}", f"p{self.page}", f"q{q}", f"kv{lens}", types]
        shown = {"heads", "kv_heads", "C", "R", "page", "q_len", "q_lens", "lens", "q_dtype", "kv_dtype", "spare_pages"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in shown or value == field.default:
                continue
            name = field.name.replace("_", "")
            parts.append(name if value is True else f"no{name}" if value is False else f"{name}{value}")
        return "-".join(parts).replace("(", "").replace(")", "").replace(", ", "of").replace(" ", "").replace(".0", "")

    @property
    def seed(self) -> int:
        return zlib.crc32(self.id.encode())

    @property
    def q_tokens(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return self.q_lens if self.q_lens is not None else (self.q_len,) * len(self.lens)

    def local(self, length: int) -> int:
        """Tokens of a sequence that this rank's cache holds."""
        rank, world = self.cp
        return max(0, -(-(length - rank) // world))


@dataclass
class Call:
    """A built case: the arguments of `decode`, and what owns each row of the result."""

    case: Case
    q: Any
    kv_cache: Any
    kwargs: dict[str, Any]
    owned: Tensor  # bool [tokens]: belongs to a sequence
    _expected: tuple[Tensor, Tensor] | None = None

    def expected(self) -> tuple[Tensor, Tensor]:
        """The reference's (out, lse) in float64."""
        if self._expected is None:
            wishes = ("out", "lse", "num_kv_splits")
            kwargs = {k: v for k, v in self.kwargs.items() if k not in wishes}
            self._expected = reference.decode(self.q, self.kv_cache, **kwargs)
        return self._expected

    def poison(self) -> None:
        """Fills the outputs that were given with NaN again."""
        for name in ("out", "lse"):
            if name in self.kwargs:
                self.kwargs[name].fill_(float("nan"))

    def changed(self, **kwargs: Any) -> Call:
        """The same tensors with other arguments."""
        return Call(self.case, self.q, self.kv_cache, {**self.kwargs, **kwargs}, self.owned)


@dataclass(frozen=True)
class Figures:
    """How far a result is from the truth: the worst row's relative L2 error, the worst |ΔLSE| (natural)."""

    rel_l2: float
    lse_error: float

    def __str__(self) -> str:
        return f"rel L2 {self.rel_l2:.2e}, |dLSE| {self.lse_error:.2e}"


def needles(case: Case, length: int, q_len: int) -> list[int]:
    """Global positions at which something could go wrong, of tokens that this rank holds; most telling first."""
    rank, world = case.cp
    n = case.local(length)
    edges = [0, n - 1]
    edges += [n - 1 - (n - 1) % case.page - 1, n - 1 - (n - 1) % case.page, case.page - 1, case.page]
    for tile in (64, 16, 128, 32):
        last = n - 1 - (n - 1) % tile
        edges += [last - 1, last, tile - 1, tile, last - tile + 1]
    found = [j * world + rank for j in edges if 0 <= j < n]
    found += [p for p in range(length - q_len, length) if p >= 0 and p % world == rank]
    return list(dict.fromkeys(found))


def _wanted(case: Case, b: int, length: int, q_len: int, positions: list[int]) -> list[int]:
    """For each packed row (token, head) of a sequence, the needle it looks for, as an index into positions."""
    wanted = []
    for t in range(q_len):
        own = length - q_len + t
        for h in range(case.heads):
            turn = h + t * case.heads
            choice = turn % len(positions)
            if q_len > 1:  # a third looks for the last token it may see, a third for the first it may not
                boundary = {0: own, 1: own + 1}.get((turn + b) % 3)
                if boundary in positions:
                    choice = positions.index(boundary)
            elif case.heads < len(positions):
                choice = (turn + b * case.heads) % len(positions)
            wanted.append(choice)
    return wanted


def _store(view: str, shape: tuple[int, ...], dtype: torch.dtype, device: Any, gap_dim: int | None = None) -> Tensor:
    """Uninitialised-looking (NaN) storage seen through a view of this shape; the last dimension has stride 1."""

    def new(*sizes: int) -> Tensor:
        count = math.prod(sizes)
        bits = torch.empty(count, dtype=dtype, device=device)
        if bits.element_size() == 1:
            bits.view(torch.uint8).fill_(0x80 if "fnuz" in str(dtype) else 0x7F)
        else:
            bits.fill_(float("nan"))
        return bits.view(sizes)

    *lead, heads, width = shape
    if view == "heads":
        return new(heads, *lead, width).movedim(0, -2)
    if view == "padded":
        return new(*lead, heads, width + 32)[..., 16 : 16 + width]
    if view == "gap":
        assert gap_dim is not None
        wider = list(shape)
        wider[gap_dim] += 1
        return new(*wider).narrow(gap_dim, 0, shape[gap_dim])
    if view == "odd":
        return new(math.prod(shape) + 1)[1:].view(shape)
    return new(*shape)


def _assign(view: Tensor, index: Any, value: Tensor) -> None:
    """view[index] = value in the view's dtype; fp8 travels as bytes."""
    value = value.to(view.dtype)
    if view.element_size() == 1:
        view.view(torch.uint8)[index] = value.view(torch.uint8)
    else:
        view[index] = value


def _scale(kind: str, value: float, device: Any) -> Any:
    return {"": None, "float": value, "tensor": torch.tensor([value], dtype=torch.float32, device=device)}[kind]


def build(case: Case, device: Any = "cpu", seed: int | None = None) -> Call:
    """The tensors of a case. The same case and seed give the same values on one kind of device."""
    generator = torch.Generator(device=device).manual_seed(case.seed if seed is None else seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q_type, kv_type = (getattr(torch, dtypes.DTYPES[name].torch) for name in (case.q_dtype, case.kv_dtype))
    batch, width, world = len(case.lens), case.C + case.R, case.cp[1]
    q_scale, kv_scale = (0.75 if case.q_scale else 1.0), (1.25 if case.kv_scale else 1.0)
    sm_scale = width**-0.5
    tokens = sum(case.q_tokens) + case.q_tail

    held = [case.local(n) for n in case.lens]
    used = [-(-n // case.page) for n in held]
    total = sum(used) + case.spare_pages
    order = torch.randperm(sum(used) if case.far else total, generator=generator, device=device)[: sum(used)]
    page_ids = order + case.spare_pages if case.far else order

    if case.scaled:
        cache = _scaled_store(case, total, device)
    else:
        widths = [case.C, case.R] if case.kv_split else [width]
        cache = [_store(case.kv_view, (total, case.page, case.kv_heads, w), kv_type, device, gap_dim=1) for w in widths]
    q_rows = torch.full((tokens, case.heads, width), float("nan"), device=device)
    start = first = 0
    for b, (length, q_len) in enumerate(zip(case.lens, case.q_tokens, strict=True)):
        mine = page_ids[start : start + used[b]]
        q = randn(q_len, case.heads, width)
        key = randn(held[b], case.kv_heads, width)
        positions = needles(case, length, q_len)
        if positions and q_len:
            strength = ((math.log(len(key)) + 8) / (sm_scale * q_scale * kv_scale)) ** 0.5
            direction = torch.linalg.qr(randn(width, len(positions)))[0].T  # orthonormal: a row finds its needle alone
            slots = torch.tensor([p // world for p in positions], device=device)
            key[slots] += strength * direction[:, None, :]
            wanted = torch.tensor(_wanted(case, b, length, q_len, positions), device=device)
            q += strength * direction[wanted].view(q_len, case.heads, width)
        q_rows[first : first + q_len] = q / q_scale
        slot = torch.arange(held[b], device=device)
        where = (mine[slot // case.page], slot % case.page)
        parts = _quantised(case, key) if case.scaled else torch.split(key / kv_scale, widths, -1)
        for buffer, part in zip(cache, parts, strict=True):
            _assign(buffer, where, part)
        start, first = start + used[b], first + q_len

    kwargs: dict[str, Any] = {"kv_lora_rank": case.C, "sm_scale": sm_scale, "causal": case.causal}
    kwargs |= _paging(case, held, used, page_ids, device)
    lead = (tokens,) if case.q_lens is not None or (case.q_len == 1 and case.q_3d) else (batch, case.q_len)
    q_parts = []
    for part in torch.split(q_rows, [case.C, case.R], -1) if case.q_split else [q_rows]:
        view = _store(case.q_view, (*lead, case.heads, part.shape[-1]), q_type, device)
        view.copy_(part.reshape(view.shape))
        q_parts.append(view)
    if case.q_lens is not None:
        ends = torch.tensor([0, *case.q_lens]).cumsum(0)
        kwargs["qo_indptr"] = ends.to(torch.int64 if case.index64 else torch.int32).to(device)
        kwargs["max_q_len"] = case.max_q_len if case.max_q_len is not None else max(case.q_lens, default=0)
    if case.cap:
        kwargs["logit_cap"] = case.cap
    if case.sinks:
        kwargs["sinks"] = randn(case.heads) * 2 + math.log(max(*case.lens, 1, 1))
        if case.heads > 2:
            kwargs["sinks"][1] = -torch.inf  # no sink for this head
    kwargs["q_scale"], kwargs["kv_scale"] = (
        _scale(case.q_scale, q_scale, device),
        _scale(case.kv_scale, kv_scale, device),
    )
    kwargs |= {"cp_rank": case.cp[0], "cp_world": world, "return_lse": case.lse, "lse_base": case.lse_base}
    out_type = getattr(torch, dtypes.DTYPES[out_dtype(case)].torch)
    if case.out_view is not None:
        kwargs["out"] = _store(case.out_view, (*lead, case.heads, case.C), out_type, device)
        if case.lse:
            kwargs["lse"] = torch.full((*lead, case.heads), float("nan"), device=device)
    elif case.out_dtype is not None:
        kwargs["out_dtype"] = out_type
    if case.hint:
        kwargs |= {"max_kv_len": max(case.lens, default=0), "total_kv": sum(held)}
    kwargs |= {"num_kv_splits": case.num_kv_splits, "batch_invariant": case.batch_invariant}
    if case.kv_3d:
        cache = [buffer.squeeze(2) for buffer in cache]
    owned = torch.arange(tokens, device=device) < sum(case.q_tokens)
    buffers: Any = tuple(cache) if case.kv_split or case.scaled else cache[0]
    if case.scaled and case.R == 0:
        buffers = (*cache[:2], None)
    return Call(case, tuple(q_parts) if case.q_split else q_parts[0], buffers, kwargs, owned)


def _scaled_store(case: Case, pages: int, device: Any) -> list[Tensor]:
    """NaN storage of (ckv, kv_scales, kpe): three buffers, or views of one, its fields side by side a token or page."""
    kinds = [getattr(torch, dtypes.DTYPES[name].torch) for name in (case.kv_dtype, "fp32", case.q_dtype)]
    widths = (case.C, case.C // GROUP, case.R)
    shape = (pages, case.page, case.kv_heads)
    if case.scaled == "buffers":
        return [
            _store(case.kv_view, (*shape, w), kind, device, gap_dim=1) for w, kind in zip(widths, kinds, strict=True)
        ]
    sizes = [w * kind.itemsize for w, kind in zip(widths, kinds, strict=True)]
    raw, tokens = (
        torch.empty(pages, case.page * case.kv_heads * sum(sizes), dtype=torch.uint8, device=device),
        shape[1:],
    )
    if case.scaled == "token":
        fields = raw.view(*shape, sum(sizes)).split(sizes, -1)
    else:
        parts = raw.split([math.prod(tokens) * size for size in sizes], -1)
        fields = tuple(part.unflatten(-1, (*tokens, size)) for part, size in zip(parts, sizes, strict=True))
    found = []
    for field, kind in zip(fields, kinds, strict=True):
        view = field.view(kind)
        if kind.itemsize == 1:
            field.fill_(0x80 if "fnuz" in str(kind) else 0x7F)
        else:
            view.fill_(float("nan"))
        found.append(view)
    return found


def _quantised(case: Case, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scales, rotary parts) of keys [..., C + R]: the greatest of each group is fp8's greatest number."""
    most = dtypes.DTYPES[case.kv_dtype].max_finite
    latent = key[..., : case.C].unflatten(-1, (-1, GROUP))
    scales = latent.abs().amax(-1).clamp_min(1e-6) / most
    values = (latent / scales[..., None]).clamp(-most, most).flatten(-2)
    return values, scales, key[..., case.C :]


def out_dtype(case: Case) -> str:
    """What `decode` promises: the wish, else q's dtype, or bf16 for fp8 q."""
    return case.out_dtype or ("bf16" if dtypes.DTYPES[case.q_dtype].bits == 8 else case.q_dtype)


def _paging(case: Case, held: list[int], used: list[int], page_ids: Tensor, device: Any) -> dict[str, Tensor]:
    """The page table in the case's form, with garbage wherever no page is in use."""
    index = torch.int64 if case.index64 else torch.int32

    def make(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=index, device=device)

    def garbage(*shape: int) -> Tensor:
        count = math.prod(shape)
        return make([GARBAGE[i % len(GARBAGE)] for i in range(count)]).view(shape)

    if case.csr:
        lead = 3  # entries before the first sequence's
        indices = torch.cat([garbage(lead), page_ids.to(index), garbage(5)])
        found = {"kv_indptr": make([lead, *used]).cumsum(0).to(index), "kv_indices": indices}
        if case.csr_lens:
            return found | {"seq_lens": make(list(case.lens)), "kv_last_page_lens": garbage(len(used))}
        if case.page == 1:
            return found | {"kv_last_page_lens": make(held)}  # as some callers pass it: to be ignored
        return found | {
            "kv_last_page_lens": make(
                [n - (pages - 1) * case.page if n else 7 for n, pages in zip(held, used, strict=True)]
            )
        }
    columns = max(used, default=0) + case.extra_pages
    table = garbage(len(used), columns + case.table_gap)
    start = 0
    for b, pages in enumerate(used):
        table[b, :pages] = page_ids[start : start + pages].to(index)
        start += pages
    return {"block_table": table[:, :columns], "seq_lens": make(list(case.lens))}


def tolerance(case: Case) -> float:
    """The limit on the worst row, from the dtypes' rows; a 16-bit result of fp32 operands is held to its own."""
    result = dtypes.DTYPES[out_dtype(case)]
    return max(dtypes.tolerance(case.q_dtype, case.kv_dtype), result.rel_l2 if result.bits == 16 else 0.0)


def check(call: Call, out: Tensor, lse: Tensor | None = None) -> Figures:
    """Judges a result by its worst (token, head) row; AssertionError names that row. NaN never passes."""
    case = call.case
    want_out, want_lse = call.expected()
    assert out.shape == want_out.shape, f"{case.id}: out is {tuple(out.shape)}, not {tuple(want_out.shape)}"
    assert out.dtype == getattr(torch, dtypes.DTYPES[out_dtype(case)].torch), f"{case.id}: out is {out.dtype}"
    width = out.shape[-1]
    got, want = (x.double().reshape(-1, case.heads, width)[call.owned] for x in (out, want_out))
    empty = want_lse.reshape(-1, case.heads)[call.owned] == -torch.inf
    if want.numel() == 0:
        return Figures(0.0, 0.0)
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
    error = torch.where(empty, torch.where((got == 0).all(-1), 0.0, torch.inf), error).nan_to_num(nan=torch.inf)
    worst = _worst(error)
    limit = tolerance(case)
    assert error[worst] <= limit, (
        f"{case.id}: row {worst} has rel L2 {error[worst]:.3e} > {limit:g}; {_rows(error > limit)}"
    )
    if lse is None:
        return Figures(float(error[worst]), 0.0)
    shape = (lse.dtype, lse.shape)
    assert shape == (torch.float32, want_lse.shape), f"{case.id}: lse is {shape}, not float32 {tuple(want_lse.shape)}"
    got, want = (x.double().reshape(-1, case.heads)[call.owned] for x in (lse, want_lse))
    unit = math.log(2) if case.lse_base == "2" else 1.0
    gap = torch.where(empty, torch.where(got == -torch.inf, 0.0, torch.inf), (got - want).abs() * unit).nan_to_num(
        nan=torch.inf
    )
    at = _worst(gap)
    assert gap[at] <= dtypes.LSE_ATOL, (
        f"{case.id}: row {at} has LSE {got[at]:.6f}, not {want[at]:.6f}; {_rows(gap > dtypes.LSE_ATOL)}"
    )
    return Figures(float(error[worst]), float(gap[at]))


def _worst(error: Tensor) -> tuple[int, int]:
    token, head = divmod(int(error.argmax()), error.shape[1])
    return token, head


def _rows(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()} rows are wrong"


def _with(case: Case, **changes: Any) -> Case:
    return dataclasses.replace(case, **changes)


FP8 = {"q_dtype": "bf16", "kv_dtype": "fp8_e4m3"}
FP8_BOTH = {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3"}
SCALED: dict[str, Any] = {**FP8, "scaled": "buffers", "C": 128}

# The dims of real models on few tokens, for what runs kernels as they are compiled but slowly.
LARGE: tuple[Case, ...] = (
    Case(heads=16, C=512, R=64, page=64, lens=(200, 64, 1)),
    Case(heads=128, C=512, R=64, page=64, lens=(330,), cap=30.0, sinks=True),
    Case(heads=40, C=256, R=32, page=64, lens=(130, 0, 65), q_len=2),
    Case(heads=24, C=512, R=64, page=128, lens=(257, 120), q_len=1, csr=True),
    Case(heads=20, C=512, R=0, page=64, lens=(700, 40, 40), index64=True),
)

# Eight tiles in one piece, first as it takes the least time; several sequences, pages of two tiles, a causal boundary,
# an odd tile and a part of one, three boxes of V; and the same of pages that hold no whole tile, or parts of several.
HARD: tuple[Case, ...] = (
    Case(heads=8, page=64, lens=(490,), num_kv_splits=1),
    Case(heads=8, q_len=2, page=128, lens=(300, 130, 1, 64), C=192),
    Case(heads=8, page=7, lens=(490, 63), num_kv_splits=1),
    Case(heads=8, page=48, lens=(63, 450), csr=True, num_kv_splits=1),
    Case(heads=40, page=64, lens=(65, 0, 900, 0, 300)),
)
# Instead of those, for a variant that they do not reach: sequences cut alike, a short one and a long one.
HARD_OF: dict[str, tuple[Case, ...]] = {
    "decode_mixed_asm": (
        Case(heads=20, page=64, lens=(100, 300), num_kv_splits=12),
        Case(heads=70, page=64, lens=(250,), num_kv_splits=12),
        Case(heads=70, page=64, lens=(250,), num_kv_splits=5),
    )
}

# Small enough for the CPU and for Triton's interpreter; every feature alone, and in pairs where they meet in the code.
SMALL: tuple[Case, ...] = (
    # lengths, pages, tiles
    Case(),
    Case(lens=(1,)),
    Case(lens=(0,)),
    Case(lens=(0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65)),
    Case(lens=(127, 128, 129), page=64),
    Case(lens=(200, 3, 0), page=1),
    Case(lens=(200, 7, 8), page=7),
    Case(lens=(199, 32), page=32),
    Case(lens=(150, 64, 1), page=128),
    Case(lens=(100, 37), hint=True, extra_pages=0),
    Case(lens=(100, 37), extra_pages=40, table_gap=3),
    Case(lens=(60, 61), index64=True),
    # heads
    Case(heads=1, lens=(77, 33)),
    Case(heads=3, lens=(77, 33)),
    Case(heads=12, lens=(77, 33)),
    Case(heads=40, lens=(77,)),
    Case(heads=65, lens=(50,), C=128),
    Case(heads=130, lens=(40,)),
    Case(heads=8, kv_heads=2, lens=(90, 20)),
    Case(heads=5, kv_heads=5, lens=(40, 20), kv_split=True),
    # query tokens, causal boundary
    Case(q_len=2, lens=(100, 37, 1)),
    Case(q_len=4, lens=(64, 3, 0, 4), heads=3),
    Case(q_len=4, lens=(18, 34, 66, 130)),  # the first query token's boundary is one short of a tile's edge
    Case(q_len=2, lens=(32, 64, 65, 128)),
    Case(q_len=8, lens=(33, 8, 130)),
    Case(q_len=3, lens=(70, 35, 2), causal=False),
    Case(q_len=1, q_3d=False, lens=(70, 35)),
    Case(q_len=5, lens=(40, 16, 20), heads=16),
    Case(q_lens=(1, 3, 0, 2), lens=(40, 3, 9, 0)),
    Case(q_lens=(4, 1, 6), lens=(4, 100, 5), heads=12, q_tail=3),
    Case(q_lens=(2, 2), lens=(90, 65), max_q_len=6, q_tail=25, num_kv_splits=3),
    Case(q_lens=(3, 2), lens=(50, 20), index64=True, causal=False),
    # paging
    Case(csr=True),
    Case(csr=True, page=1, lens=(45, 0, 33)),
    Case(csr=True, page=7, lens=(49, 50, 0)),
    Case(csr=True, csr_lens=True, lens=(90, 64)),
    Case(csr=True, index64=True, q_lens=(2, 1), lens=(66, 31)),
    # how tensors lie
    Case(q_split=True),
    Case(q_split=True, q_view="heads", heads=6),
    Case(q_split=True, q_view="heads", q_len=3, q_3d=False),
    Case(kv_split=True),
    Case(q_split=True, kv_split=True, q_len=2, kv_view="padded", q_view="padded"),
    Case(kv_view="gap", page=32),
    Case(kv_view="odd", q_view="odd", out_view="odd"),
    Case(kv_3d=True, out_view=""),
    Case(out_view="heads", q_len=2),
    Case(C=80, R=24),
    Case(C=128, R=32, lens=(90, 200)),
    Case(C=128, R=0),
    Case(C=48, R=0, q_len=2),
    # the mathematics
    Case(cap=15.0),
    Case(cap=15.0, q_len=2, sinks=True),
    Case(sinks=True, heads=5),
    Case(sinks=True, q_len=4, lens=(3, 40, 0)),
    Case(sinks=True, num_kv_splits=4, lens=(130, 0, 20)),
    Case(q_scale="float", kv_scale="tensor"),
    Case(q_scale="tensor", kv_scale="float", cap=20.0),
    Case(lse_base="2"),
    Case(lse=False, out_view=""),
    Case(lse_base="2", num_kv_splits=3, lens=(100, 0)),
    Case(cp=(0, 2), lens=(100, 1, 0, 33)),
    Case(cp=(2, 3), lens=(100, 2, 3), q_len=4),
    Case(cp=(3, 4), q_lens=(2, 1, 5), lens=(99, 7, 4), csr=True, csr_lens=True),
    # splits
    Case(num_kv_splits=1, lens=(150, 20)),
    Case(num_kv_splits=2, lens=(128, 129, 33)),
    Case(num_kv_splits=7, lens=(200, 16, 0, 1), q_len=3),
    Case(num_kv_splits=33, lens=(190, 40)),
    Case(lens=(200, *(1, 0, 3) * 5), heads=2),  # one long sequence among many short ones
    Case(lens=tuple(i * 7 % 45 for i in range(66)), heads=1, C=32, R=0),
    Case(batch_invariant=True, lens=(140, 60, 0)),
    # dtypes
    Case(q_dtype="bf16", kv_dtype="bf16"),
    Case(q_dtype="fp16", kv_dtype="fp16", q_len=3),
    Case(q_dtype="bf16", kv_dtype="bf16", out_dtype="fp32", heads=16),
    Case(**FP8, kv_scale="tensor"),
    Case(**FP8, q_len=2, csr=True, num_kv_splits=3),
    Case(**FP8_BOTH, q_scale="tensor", kv_scale="tensor"),
    Case(**FP8_BOTH, q_len=2, out_dtype="fp16"),
    Case(q_dtype="bf16", kv_dtype="fp8_e4m3fnuz", kv_scale="float"),
    # scales of 128 columns
    Case(**SCALED),
    Case(**{**SCALED, "C": 256, "R": 32}, heads=5, page=7, lens=(99, 7, 8), q_len=2),
    Case(**SCALED, page=1, lens=(45, 0, 33), csr=True, lse_base="2"),
    Case(**{**SCALED, "C": 384}, page=64, lens=(127, 128, 129), q_len=4, cap=15.0, num_kv_splits=2),
    Case(**{**SCALED, "scaled": "token"}, page=16, lens=(66, 130), q_split=True, q_lens=(3, 1), sinks=True),
    Case(**{**SCALED, "scaled": "page", "C": 256}, heads=4, kv_heads=2, lens=(90, 20), page=32, q_scale="tensor"),
    Case(**{**SCALED, "q_dtype": "fp16", "R": 0, "C": 256}, heads=16, lens=(100, 1), cp=(1, 2), kv_view="padded"),
    Case(**{**SCALED, "kv_dtype": "fp8_e4m3fnuz"}, kv_3d=True, kv_view="odd", batch_invariant=True, lens=(130, 60, 0)),
    Case(**SCALED, heads=20, lens=(100, 1, 0, 3), q_len=2, causal=False),
    Case(heads=20, lens=(37, 150)),  # a short sequence, then a long one
    # an odd number of boxes of V
    Case(heads=12, C=192, R=64, lens=(130, 70)),
)


# What a kernel is specialised for: one binary or two each. `ragged` becomes q_lens.
_SPECIALISATIONS: tuple[dict[str, Any], ...] = (
    # heads
    *({"heads": n} for n in (1, 3, 8, 12, 16, 20, 40, 64, 96, 128, 256)),
    # pages
    *({"heads": 16, "page": n} for n in (1, 7, 16, 256)),
    *({"heads": 128, "page": n} for n in (1, 16)),
    {"heads": 12, "page": 7, "csr": True},
    # query tokens
    *({"heads": 16, "q_len": n} for n in (2, 3, 4, 8)),
    {"heads": 128, "q_len": 2},
    {"heads": 128, "q_len": 4, "page": 16},
    {"heads": 1, "q_len": 8},
    {"heads": 3, "q_len": 3, "page": 7},
    {"heads": 20, "q_len": 4, "page": 1},
    {"heads": 16, "q_len": 4, "causal": False},
    {"heads": 16, "ragged": True},
    {"heads": 128, "ragged": True, "csr": True, "page": 1},
    # dims
    {"heads": 40, "C": 256, "R": 32},
    {"heads": 128, "C": 256, "R": 32, "q_len": 2},
    {"heads": 16, "C": 128, "R": 0},
    {"heads": 64, "C": 512, "R": 0},
    {"heads": 12, "C": 192, "R": 24, "page": 16},
    # dtypes
    {"heads": 16, "q_dtype": "fp16", "kv_dtype": "fp16"},
    {"heads": 64, "q_dtype": "fp16", "kv_dtype": "fp16", "q_len": 2, "page": 1},
    {"heads": 16, **FP8, "kv_scale": "tensor"},
    {"heads": 128, **FP8, "kv_scale": "float"},
    {"heads": 40, **FP8, "C": 256, "R": 32, "q_len": 3},
    {"heads": 16, **FP8, "page": 1, "csr": True},
    {"heads": 16, **FP8_BOTH, "q_scale": "tensor", "kv_scale": "tensor"},
    {"heads": 128, **FP8_BOTH, "q_scale": "float", "kv_scale": "float"},
    {"heads": 16, **FP8_BOTH, "q_len": 4, "page": 16, "out_dtype": "fp16"},
    # scales of 128 columns
    *({"heads": n, **FP8, "scaled": "buffers"} for n in (1, 16, 64, 128)),
    {"heads": 128, **FP8, "scaled": "buffers", "q_len": 2, "page": 16},
    {"heads": 40, **FP8, "scaled": "token", "C": 256, "R": 32, "q_len": 3, "page": 7},
    {"heads": 16, **FP8, "scaled": "buffers", "page": 1, "csr": True, "q_dtype": "fp16"},
    {"heads": 20, **FP8, "scaled": "page", "C": 384, "ragged": True, "cap": 20.0},
    {"heads": 64, **FP8, "scaled": "buffers", "R": 0, "kv_heads": 2, "batch_invariant": True},
    {"heads": 12, "q_dtype": "bf16", "kv_dtype": "fp8_e4m3fnuz", "scaled": "page", "cp": (1, 3), "q_len": 2},
    # paging
    {"heads": 16, "csr": True, "page": 1},
    {"heads": 128, "csr": True, "page": 16},
    {"heads": 8, "csr": True, "csr_lens": True, "index64": True},
    # the mathematics
    {"heads": 16, "cap": 20.0},
    {"heads": 128, "cap": 20.0, "sinks": True},
    {"heads": 20, "sinks": True, "q_len": 2},
    {"heads": 16, "cp": (1, 3)},
    {"heads": 16, "cp": (3, 4), "q_len": 4, "page": 1},
    {"heads": 64, "lse_base": "2", "q_scale": "tensor", "kv_scale": "tensor"},
    # how tensors lie
    {"heads": 16, "q_view": "odd", "kv_view": "odd", "out_view": "odd"},
    {"heads": 64, "kv_view": "gap", "page": 16},
    {"heads": 64, "kv_heads": 8, "page": 16},
    {"heads": 4, "kv_heads": 4, "q_len": 2},
    {"heads": 16, "out_dtype": "fp32", "out_view": ""},
    {"heads": 16, "lse": False, "out_view": "heads"},
    {"heads": 16, "batch_invariant": True},
    # the same for blocks of 64 rows over whole pages of 64
    {"heads": 64, "C": 256, "R": 64},
    {"heads": 128, "C": 256, "R": 0, "q_len": 2},
    {"heads": 128, "csr": True},
    {"heads": 40, "ragged": True, "csr": True, "csr_lens": True, "index64": True},
    {"heads": 64, "cp": (1, 3), "q_len": 2, "page": 128},
    {"heads": 128, "kv_heads": 2},
    {"heads": 64, "batch_invariant": True},
)

# What it meets at run time. Each specialisation gets four of these.
_SHAPES: tuple[dict[str, Any], ...] = (
    {"lens": (1000, 777, 64, 65, 1), "extra_pages": 8},
    {"lens": (0, 1, 63, 127, 128, 129, 4096, 0), "hint": True},
    {"lens": tuple(37 * i + 1 for i in range(40)), "table_gap": 5},
    {"lens": (2048, 2049, 2047, 31), "num_kv_splits": 3, "q_split": True, "q_view": "heads"},
    {"lens": (5000, 5), "extra_pages": 300, "num_kv_splits": 20},
    {"lens": (640, 128, 64, 0, 1281, 3), "kv_split": True, "out_view": "heads"},
    {"lens": (900, 31), "num_kv_splits": 1, "kv_view": "padded", "q_view": "padded"},
    {"lens": (300, 257, 511, 512, 513) * 3, "q_split": True, "kv_split": True, "kv_3d": True, "out_view": ""},
    {"lens": (20000,), "num_kv_splits": 32, "q_3d": False},
)
# What several query tokens meet beside these: a first boundary that is on a tile's edge, and just before and after it.
_BOUNDARIES = {"lens": tuple(edge + over for edge in (32, 64, 128, 192) for over in (-1, 0, 1, 2, 3, 6, 7))}


PLAIN: dict[str, Any] = {"C": 512, "R": 64, "page": 64, "q_dtype": "bf16", "kv_dtype": "bf16"}


def _gpu() -> tuple[Case, ...]:
    found = []
    for i, specialisation in enumerate(_SPECIALISATIONS):
        shapes = [_SHAPES[(i + 2 * j) % len(_SHAPES)] for j in range(4)]
        if specialisation.get("q_len", 1) > 1 or "ragged" in specialisation:
            shapes[0] = _BOUNDARIES
        for j, shape in enumerate(map(dict, shapes)):
            fixed = {**PLAIN, **specialisation}
            if fixed.pop("ragged", False):
                fixed["q_lens"] = tuple((2, 1, 4, 0, 3)[(b + j) % 5] for b in range(len(shape["lens"])))
                fixed |= {"max_q_len": 4, "q_tail": j}
            if fixed.get("kv_heads", 1) > 1:
                shape.pop("kv_3d", None)
            if "scaled" in fixed:
                shape.pop("kv_split", None)
            if fixed.get("lse") is False or "batch_invariant" in fixed:
                shape.pop("num_kv_splits", None)
            found.append(Case(**{**shape, **fixed}))
    return tuple(dict.fromkeys(found))


GPU: tuple[Case, ...] = (
    *_gpu(),
    # many split slots (a second size of the combine), a table far wider than what is used, the reach of one sequence
    Case(heads=16, **PLAIN, lens=(4096,), extra_pages=1984),
    Case(heads=16, **PLAIN, lens=(100_000,)),
    Case(heads=16, **PLAIN, lens=(70_001, 3, 0), num_kv_splits=100),
    Case(heads=128, **PLAIN, lens=(30_000, 29_999)),
    Case(heads=128, **PLAIN, lens=(1,), extra_pages=500),
    # how a ragged batch is cut: one long sequence among short ones; batches of every size that a kernel holds, and more
    Case(heads=16, **PLAIN, lens=(30_000, *(1, 70) * 35)),
    Case(heads=128, **PLAIN, lens=(9000, 8000, *(64, 0, 300) * 6), q_len=2),
    Case(heads=16, **PLAIN, lens=tuple(i * i % 700 for i in range(100))),
    Case(heads=64, **PLAIN, lens=tuple(i * 131 % 900 for i in range(300))),
    Case(heads=8, **PLAIN, lens=tuple(i * 37 % 130 for i in range(1100))),
    Case(heads=64, **PLAIN, lens=tuple(i * i % 1700 for i in range(20))),
    # pages that hold parts of a tile, of 8, 16 and 32 tokens together
    Case(heads=16, **PLAIN | {"page": 8}, lens=(1000, 63, 0, 129)),
    Case(heads=128, **PLAIN | {"page": 48}, lens=(3000, 47, 97), q_len=2),
    Case(heads=40, **PLAIN | {"page": 24}, lens=(2000, 1, 500), csr=True),
    Case(heads=128, **PLAIN | {"page": 96}, lens=tuple(i * 131 % 900 for i in range(40)), sinks=True),
    Case(heads=128, **PLAIN | {"page": 16, "C": 128, "R": 0}, lens=(3000, 2000)),
    Case(heads=64, **PLAIN | {"page": 80}, lens=(1200, 79), q_lens=(3, 1), cap=20.0),
)
