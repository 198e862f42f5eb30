"""Prefill calls to test with: what a call looks like (`Case`), its tensors (`build`), and the judgement (`check`).

As in cases.py each sequence has *needles*, keys that carry a softmax weight of 0.9 and more for the query rows that
look for them: at the first and the last key, on both sides of tile edges, and at causal boundaries, where a third of
the rows look for the last key that they may see and a third for the first that they may not. Rows of q, k and v that
belong to no sequence, before the first and behind the last one, are NaN; so are outputs.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from cases import Figures, _assign, _scale, _store, _worst
from torch import Tensor

from mla_jit import dtypes
from mla_jit.ops.prefill import reference


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prefill call. kv_lens are of the same number as q_lens; None: the same lengths."""

    heads: int = 2
    kv_heads: int = 2
    D: int = 48
    DV: int = 32
    q_lens: tuple[int, ...] = (37, 20)
    kv_lens: tuple[int, ...] | None = None
    q_dtype: str = "fp32"
    kv_dtype: str = "fp32"
    out_dtype: str | None = None
    causal: bool = True
    cap: float = 0.0
    scales: str = ""  # of q, k and v: "float" | "tensor"
    lse: bool = True
    lse_base: str = "e"
    lead: int = 0  # rows before the first sequence
    tail: int = 3  # rows behind the last one
    loose: int = 0  # by how much max_q_len is beyond the longest
    hint: bool = False  # max_kv_len given
    index64: bool = False
    q_view: str = ""  # "heads": head-major storage; "padded": rows apart; "odd": a base off by one element
    kv_view: str = ""
    out_view: str | None = None  # None: not given; "": contiguous; "heads"; "odd"
    scheduler: str = "auto"

    @property
    def keys(self) -> tuple[int, ...]:
        return self.q_lens if self.kv_lens is None else self.kv_lens

    @property
    def id(self) -> str:
        """What differs from a plain call, readable."""

        def many(lens: tuple[int, ...]) -> str:
            return "_".join(map(str, lens)) if len(lens) <= 4 else f"{len(lens)}of{min(lens)}to{max(lens)}"

        types = self.q_dtype if self.q_dtype == self.kv_dtype else f"{self.q_dtype}x{self.kv_dtype}"
        heads = f"{self.heads}" + (f"over{self.kv_heads}" if self.kv_heads != self.heads else "")
        parts = [f"h{heads}", f"d{self.D}v{self.DV}", f"q{many(self.q_lens)}"]
        parts += [f"kv{many(self.keys)}"] if self.kv_lens is not None else []
        parts += [types]
        shown = {"heads", "kv_heads", "D", "DV", "q_lens", "kv_lens", "q_dtype", "kv_dtype"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and value != field.default:
                name = field.name.replace("_", "")
                parts.append(name if value is True else f"no{name}" if value is False else f"{name}{value}")
        return "-".join(parts).replace(".0", "")

    @property
    def seed(self) -> int:
        return zlib.crc32(self.id.encode())


@dataclass
class Call:
    """A built case: the arguments of `prefill`, and which rows of the result belong to a sequence."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    kwargs: dict[str, Any]
    owned: Tensor  # bool [T]
    _expected: tuple[Tensor, Tensor] | None = None

    def expected(self) -> tuple[Tensor, Tensor]:
        """The reference's (out, lse) in float64."""
        if self._expected is None:
            kwargs = {k: v for k, v in self.kwargs.items() if k not in ("out", "lse")}
            self._expected = reference.prefill(self.q, self.k, self.v, **kwargs)
        return self._expected

    def poison(self) -> None:
        """Fills the outputs that were given with NaN again."""
        for name in ("out", "lse"):
            if name in self.kwargs:
                self.kwargs[name].fill_(float("nan"))


def needles(case: Case, q_len: int, kv_len: int) -> list[int]:
    """Keys at which something could go wrong, most telling first; at most as many as have orthogonal directions."""
    edges = [0, kv_len - 1]
    own = [kv_len - q_len + t for t in (0, q_len - 1, q_len // 2, 15, 16, 63, 64, 127, 128, q_len // 3) if t < q_len]
    edges += [p + over for p in own for over in (0, 1)]
    for tile in (64, 128, 32, 16):
        last = kv_len - 1 - (kv_len - 1) % tile
        edges += [last - 1, last, tile - 1, tile]
    return list(dict.fromkeys(p for p in edges if 0 <= p < kv_len))[: case.D // 2]


def _wanted(case: Case, q_len: int, kv_len: int, positions: list[int]) -> Tensor:
    """[q_len, heads]: for each row the needle it looks for, as an index into positions."""
    places = {p: i for i, p in enumerate(positions)}
    found = []
    for t in range(q_len):
        for h in range(case.heads):
            turn = h + t * case.heads
            boundary = {0: kv_len - q_len + t, 1: kv_len - q_len + t + 1}.get((h + t) % 3, -1)
            found.append(places.get(boundary, turn % len(positions)))
    return torch.tensor(found).view(q_len, case.heads)


def build(case: Case, device: Any = "cpu", seed: int | None = None) -> Call:
    """The tensors of a case. The same case and seed give the same values on one kind of device."""
    generator = torch.Generator(device=device).manual_seed(case.seed if seed is None else seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q_type, kv_type = (getattr(torch, dtypes.DTYPES[name].torch) for name in (case.q_dtype, case.kv_dtype))
    scale = dict(zip("qkv", (0.75, 1.25, 0.5) if case.scales else (1.0, 1.0, 1.0), strict=True))
    sm_scale = case.D**-0.5
    q_starts, k_starts = ([case.lead, *lens] for lens in (case.q_lens, case.keys))
    q_starts, k_starts = (torch.tensor(starts).cumsum(0).tolist() for starts in (q_starts, k_starts))
    tokens, keys = q_starts[-1] + case.tail, k_starts[-1] + case.tail

    q = _store(case.q_view, (tokens, case.heads, case.D), q_type, device)
    k = _store(case.kv_view, (keys, case.kv_heads, case.D), kv_type, device)
    v = _store(case.kv_view, (keys, case.kv_heads, case.DV), kv_type, device)
    for b, (q_len, kv_len) in enumerate(zip(case.q_lens, case.keys, strict=True)):
        query, key = randn(q_len, case.heads, case.D), randn(kv_len, case.kv_heads, case.D)
        positions = needles(case, q_len, kv_len) if q_len else []
        if positions:
            strength = ((math.log(kv_len) + 8) / sm_scale) ** 0.5
            direction = torch.linalg.qr(randn(case.D, len(positions)))[0].T
            key[torch.tensor(positions, device=device)] += strength * direction[:, None, :]
            query += strength * direction[_wanted(case, q_len, kv_len, positions).to(device)]
        _assign(q, slice(q_starts[b], q_starts[b + 1]), query / scale["q"])
        _assign(k, slice(k_starts[b], k_starts[b + 1]), key / scale["k"])
        _assign(v, slice(k_starts[b], k_starts[b + 1]), randn(kv_len, case.kv_heads, case.DV) / scale["v"])

    index = torch.int64 if case.index64 else torch.int32
    kwargs: dict[str, Any] = {
        "qo_indptr": torch.tensor(q_starts, dtype=index, device=device),
        "kv_indptr": torch.tensor(k_starts, dtype=index, device=device),
        "max_q_len": max(case.q_lens, default=0) + case.loose, "sm_scale": sm_scale, "causal": case.causal,
        "return_lse": case.lse, "lse_base": case.lse_base, "scheduler": case.scheduler,
    }  # fmt: skip
    kwargs |= {f"{name}_scale": _scale(case.scales, value, device) for name, value in scale.items()}
    if case.cap:
        kwargs["logit_cap"] = case.cap
    if case.hint:
        kwargs["max_kv_len"] = max(case.keys, default=0)
    out_type = getattr(torch, dtypes.DTYPES[out_dtype(case)].torch)
    if case.out_view is not None:
        kwargs["out"] = _store(case.out_view, (tokens, case.heads, case.DV), out_type, device)
        if case.lse:
            kwargs["lse"] = torch.full((tokens, case.heads), float("nan"), device=device)
    elif case.out_dtype is not None:
        kwargs["out_dtype"] = out_type
    token = torch.arange(tokens, device=device)
    return Call(case, q, k, v, kwargs, (token >= q_starts[0]) & (token < q_starts[-1]))


def out_dtype(case: Case) -> str:
    """What `prefill` promises: the wish, else q's dtype, or bf16 for fp8 q."""
    return case.out_dtype or ("bf16" if dtypes.DTYPES[case.q_dtype].bits == 8 else case.q_dtype)


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
    got, want, empty = out.double()[call.owned], want_out[call.owned], want_lse[call.owned] == -torch.inf
    if want.numel() == 0:
        return Figures(0.0, 0.0)
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-300)
    error = torch.where(empty, torch.where((got == 0).all(-1), 0.0, torch.inf), error).nan_to_num(nan=torch.inf)
    at, limit = _worst(error), tolerance(case)
    bad = int((error > limit).sum())
    assert error[at] <= limit, (
        f"{case.id}: row {at} has rel L2 {error[at]:.3e} > {limit:g}; {bad} rows of {error.numel()}"
    )
    if lse is None:
        return Figures(float(error[at]), 0.0)
    assert (lse.dtype, lse.shape) == (torch.float32, want_lse.shape), f"{case.id}: lse is {lse.dtype} {lse.shape}"
    got, want = lse.double()[call.owned], want_lse[call.owned]
    unit = math.log(2) if case.lse_base == "2" else 1.0
    gap = torch.where(empty, torch.where(got == -torch.inf, 0.0, torch.inf), (got - want).abs() * unit)
    at_lse = _worst(gap.nan_to_num(nan=torch.inf))
    assert gap[at_lse] <= dtypes.LSE_ATOL, f"{case.id}: row {at_lse} has LSE {got[at_lse]:.6f}, not {want[at_lse]:.6f}"
    return Figures(float(error[at]), float(gap[at_lse]))


FP8: dict[str, Any] = {"q_dtype": "fp8_e4m3", "kv_dtype": "fp8_e4m3"}
MIXED: dict[str, Any] = {"q_dtype": "fp16", "kv_dtype": "fp8_e4m3"}

# For the CPU and the interpreter: small, fp32 where no dtype is the point (interpreted kernels run these in fp16).
SMALL: tuple[Case, ...] = (
    Case(),
    Case(causal=False),
    Case(q_lens=(1,), tail=0),
    Case(q_lens=(64,), tail=0, lead=5),
    Case(q_lens=(65, 0, 63, 1)),
    Case(q_lens=(20, 17), kv_lens=(70, 33)),  # a chunk behind a prefix
    Case(q_lens=(20, 17), kv_lens=(70, 33), causal=False, lead=2),
    Case(q_lens=(40, 9, 5), kv_lens=(13, 0, 64)),  # kv shorter than q, and none
    Case(q_lens=(40, 9), kv_lens=(13, 0), causal=False),
    Case(heads=6, kv_heads=2, q_lens=(33, 18), kv_lens=(48, 18)),
    Case(heads=4, kv_heads=1, q_lens=(30,), kv_lens=(129,), lse_base="2"),
    Case(D=96, DV=64, q_lens=(50,), hint=True),
    Case(D=192, DV=128, q_lens=(40, 3), kv_lens=(100, 3)),
    Case(D=128, DV=128, q_lens=(33,)),
    Case(D=40, DV=24, q_lens=(33, 16)),
    Case(D=20, DV=72, q_lens=(33, 16), kv_lens=(34, 80)),
    Case(cap=20.0, q_lens=(30, 12), kv_lens=(60, 12)),
    Case(lse=False, out_view="heads"),
    Case(loose=100, q_lens=(20, 3), index64=True, out_view=""),
    Case(q_view="heads", kv_view="heads"),
    Case(q_view="padded", kv_view="padded", out_view="heads"),
    Case(q_view="odd", kv_view="odd", out_view="odd", q_lens=(17, 40), kv_lens=(90, 41)),
    Case(scales="float", q_lens=(30,)),
    Case(scales="tensor", q_lens=(30,), kv_lens=(31,), lse_base="2"),
    Case(q_dtype="fp16", kv_dtype="fp16"),
    Case(q_dtype="bf16", kv_dtype="bf16", out_dtype="fp32", q_lens=(40, 7), kv_lens=(80, 7)),
    Case(**FP8, scales="tensor", q_lens=(33,), kv_lens=(70,)),
    Case(**MIXED, scales="float", q_lens=(33, 2)),
    Case(q_dtype="bf16", kv_dtype="fp8_e4m3fnuz", out_dtype="fp32", D=64, DV=64),
)

BF16: dict[str, Any] = {"q_dtype": "bf16", "kv_dtype": "bf16"}
FP16: dict[str, Any] = {"q_dtype": "fp16", "kv_dtype": "fp16"}
MLA: dict[str, Any] = {"D": 192, "DV": 128, **BF16}

# What a kernel is specialised for: one binary or two each.
_SPECIALISATIONS: tuple[dict[str, Any], ...] = (
    # dims
    *({**MLA, "D": d, "DV": dv} for d, dv in ((192, 128), (96, 64), (128, 128), (64, 64), (192, 256), (256, 256))),
    *({**MLA, "D": d, "DV": dv, "heads": 3, "kv_heads": 3} for d, dv in ((80, 80), (40, 24), (224, 96), (24, 200))),
    # heads
    *({**MLA, "heads": n, "kv_heads": n} for n in (1, 5, 16, 40)),
    *({**MLA, "heads": h, "kv_heads": k} for h, k in ((8, 1), (12, 4), (16, 8))),
    # dtypes
    {**MLA, **FP16},
    {**MLA, **FP16, "D": 96, "DV": 64, "causal": False},
    {**MLA, **FP8, "scales": "tensor"},
    {**MLA, **FP8, "scales": "float", "causal": False, "heads": 8, "kv_heads": 2},
    {**MLA, "q_dtype": "bf16", "kv_dtype": "fp8_e4m3", "scales": "tensor"},
    {**MLA, **MIXED, "D": 128},
    {**MLA, "q_dtype": "fp16", "kv_dtype": "fp8_e4m3fnuz", "D": 64, "DV": 64},
    # the mathematics
    {**MLA, "causal": False},
    {**MLA, "cap": 20.0},
    {**MLA, "cap": 20.0, "causal": False, "D": 96, "DV": 64},
    {**MLA, "lse_base": "2", "scales": "tensor"},
    {**MLA, "lse": False, "out_view": "heads"},
    {**MLA, "out_dtype": "fp32", "out_view": ""},
    {**MLA, "out_dtype": "fp16"},
    # how tensors lie
    {**MLA, "q_view": "odd", "kv_view": "odd", "out_view": "odd"},
    {**MLA, "q_view": "heads", "kv_view": "heads"},
    {**MLA, "q_view": "padded", "kv_view": "padded", "out_view": "heads"},
    {**MLA, "index64": True},
)

# What it meets at run time. Each specialisation gets some of these.
_SHAPES: tuple[dict[str, Any], ...] = (
    {"q_lens": (1000, 129, 1, 64)},
    {"q_lens": (700, 1, 128, 0, 33), "kv_lens": (1500, 1500, 129, 40, 33), "lead": 7},
    {"q_lens": (127, 128, 129, 255, 256, 257), "loose": 500},
    {"q_lens": (300, 200, 50), "kv_lens": (100, 0, 64)},
    {"q_lens": (2100,), "hint": True},
    {"q_lens": (65, 3), "kv_lens": (5000, 2047), "lead": 130, "tail": 300},
    {"q_lens": tuple(37 * i % 190 for i in range(30)), "kv_lens": tuple(91 * i % 700 for i in range(30))},
)


def _gpu() -> tuple[Case, ...]:
    found = []
    for i, specialisation in enumerate(_SPECIALISATIONS):
        for j in range(5):
            found.append(Case(**{**specialisation, **_SHAPES[(i + j) % len(_SHAPES)]}))
    return tuple(dict.fromkeys(found))


GPU: tuple[Case, ...] = (
    *_gpu(),
    Case(**MLA, heads=128, kv_heads=128, q_lens=(300, 40)),
    Case(**MLA, heads=144, kv_heads=144, q_lens=(140,), kv_lens=(400,)),
    Case(**MLA, q_lens=(4097,)),
    Case(**MLA, heads=1, kv_heads=1, q_lens=(16,), kv_lens=(30_000,)),  # few blocks, long keys
    Case(**MLA, heads=4, kv_heads=4, q_lens=tuple(i * i % 300 for i in range(300))),
)
