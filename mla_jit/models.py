"""The models of configs/models.yaml, and the kinds of decode call that serving one of them makes.

Here are the properties of a call that come from the model and from how it is served; `ahead` adds the sizes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mla_jit import resources
from mla_jit.dtypes import DTYPES
from mla_jit.errors import InvalidInput
from mla_jit.layouts import LAYOUTS
from mla_jit.problem import DecodeProblem, MergeProblem, PrefillProblem, bucket
from mla_jit.target import Target

DTYPE_NAMES = ("bf16", "fp16", "fp32", "fp8", "fp8xfp8")
PAGINGS = ("table", "csr", "csr+lens")


@dataclass(frozen=True)
class Model:
    """A row of configs/models.yaml. `heads` are the whole model's; `dtypes` are names of DTYPE_NAMES."""

    name: str
    heads: int
    layers: int
    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    max_kv_len: int
    dtypes: tuple[str, ...]
    source: str
    sparse: int | None = None

    @property
    def sm_scale(self) -> float:
        """(nope_dim + rope_dim)^-½, without the model's own mscale²."""
        return float((self.nope_dim + self.rope_dim) ** -0.5)

    def local_heads(self, tp: int) -> int:
        """Query heads of one tensor-parallel rank. InvalidInput where they cannot be shared."""
        if tp < 1 or self.heads % tp:
            raise InvalidInput(
                f"{self.name} has {self.heads} heads, which {tp} tensor-parallel ranks cannot share equally"
            )
        return self.heads // tp


@functools.cache
def models() -> dict[str, Model]:
    """All rows of configs/models.yaml by name."""
    rows = resources.load_yaml("configs", "models.yaml")
    return {name: Model(name=name, **{**row, "dtypes": tuple(row["dtypes"])}) for name, row in rows.items()}


def by_name(name: str) -> Model:
    """The row of a model's name, in any case. InvalidInput lists what there is."""
    found = models().get(name.lower())
    if found is None:
        raise InvalidInput(
            f"no model {name!r}; configs/models.yaml has {', '.join(models())}. A new model is a new row"
        )
    return found


def dtypes_on(name: str, target: Target) -> tuple[str, str]:
    """(q, cache) dtypes of a name of DTYPE_NAMES, or of "Q×CACHE" / "QxCACHE" in dtypes.py's names.

    "fp8" is the fp8 that the target's hardware knows, else e4m3. InvalidInput for an unknown name.
    """
    fp8 = next((d for d in target.dtypes if DTYPES[d].bits == 8), "fp8_e4m3")
    pairs = {"fp8": ("bf16", fp8), "fp8xfp8": (fp8, fp8)}
    name = name.replace("×", "x")
    q, found, cache = name.partition("x")
    pair = pairs.get(name) or ((q, cache) if found else (name, name))
    if not set(pair) <= set(DTYPES):
        known = f"{', '.join(DTYPE_NAMES)}, or QxCACHE of {', '.join(DTYPES)}"
        raise InvalidInput(f"dtype {name!r} is unknown; use {known}")
    return pair


PLANNED = {"auto": (False,), "persistent": (False, True)}  # by scheduler: whether calls may bring a work list


def decode_problems(
    model: Model, target: Target, *, tp: int = 1, dtypes: Sequence[str] | None = None,
    page_sizes: Sequence[int] = (64,), q_lens: Sequence[int] = (1, 2), pagings: Sequence[str] = ("table", "csr"),
    lse: Sequence[bool] = (False, True), ragged: Sequence[bool] = (False, True), scales: str = "auto",
    layouts: Sequence[str] = ("joint",), **fixed: Any,
) -> Iterator[DecodeProblem]:  # fmt: skip
    """The kinds of decode call that serving a model on a target makes: the product of the given axes.

    Sizes are not an axis here: each problem has one sequence of the model's longest context (see `ahead.of_any_size`).
    Scales given as device tensors are another kernel than floats or none. scales: "none" of them; "all", q_scale and
    kv_scale whatever the dtypes; "auto", none, and also those of the fp8 operands. layouts: rows of layouts.py; of one
    with scales of its own only calls with an fp8 cache and q in 16 bits are made, without kv_scale. `fixed` sets
    further fields of all problems, e.g. causal=False or sinks=True. InvalidInput for what is unknown, and for a layout
    that none of the dtypes can have.
    """
    heads = model.local_heads(tp)
    if unknown := set(pagings) - set(PAGINGS):
        raise InvalidInput(f"paging {', '.join(sorted(unknown))} is unknown; use {', '.join(PAGINGS)}")
    pairs = [dtypes_on(name, target) for name in (dtypes if dtypes is not None else model.dtypes)]
    kinds = [kind for layout in dict.fromkeys(layouts) for kind in laid_out(layout, dict.fromkeys(pairs))]
    axes = itertools.product(kinds, page_sizes, q_lens, pagings, lse, ragged)
    for (layout, q, cache), page_size, q_len, paging, with_lse, is_ragged in axes:
        for scaled in _scales(q, cache, scales):
            if LAYOUTS[layout].scaled and scaled.pop("kv_scale", False) and not scaled.get("q_scale"):
                continue  # as without any
            yield DecodeProblem(
                num_heads=heads, kv_lora_rank=model.kv_lora_rank, rope_dim=model.rope_dim, q_dtype=q, kv_dtype=cache,
                out_dtype="bf16" if DTYPES[q].bits == 8 else q, page_size=page_size, layout=layout,
                q_len=q_len, paging=paging.partition("+")[0], has_lens=paging != "csr", lse=with_lse, ragged=is_ragged,
                max_kv_len=bucket(model.max_kv_len), **(scaled | fixed),
            )  # fmt: skip


def laid_out(layout: str, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(layout, q, cache) of those of these dtypes that a cache laid out so can have. InvalidInput where none can."""
    if layout not in LAYOUTS:
        raise InvalidInput(f"layout {layout!r} is unknown; use {', '.join(LAYOUTS)}")
    found = [
        (layout, q, cache) for q, cache in pairs
        if not LAYOUTS[layout].scaled or (DTYPES[cache].bits == 8 < DTYPES[q].bits)
    ]  # fmt: skip
    if not found:
        raise InvalidInput(f"layout {layout!r} needs an fp8 cache and q in 16 bits; pass such dtypes, e.g. fp8")
    return found


def prefill_problems(
    model: Model, target: Target, *, tp: int = 1, dtypes: Sequence[str] | None = None,
    lse: Sequence[bool] = (False, True), causal: Sequence[bool] = (True, False), scales: str = "auto", **fixed: Any,
) -> Iterator[PrefillProblem]:  # fmt: skip
    """The kinds of un-absorbed prefill call that serving a model makes: the product of the given axes.

    Not causal: of a chunk to a prefix that is attended to by itself. Sizes are not an axis (see
    `ahead.prompts_of_any_size`); `scales` and `fixed` as for `decode_problems`.
    """
    heads = model.local_heads(tp)
    pairs = [dtypes_on(name, target) for name in (dtypes if dtypes is not None else model.dtypes)]
    for (q, kv), with_lse, is_causal in itertools.product(dict.fromkeys(pairs), lse, causal):
        for scaled in _scales(q, kv, scales):
            given = {"k_scale": scaled["kv_scale"], "v_scale": scaled["kv_scale"]} if "kv_scale" in scaled else {}
            given |= {"q_scale": scaled["q_scale"]} if "q_scale" in scaled else {}
            yield PrefillProblem(
                num_heads=heads, num_kv_heads=heads, qk_dim=model.nope_dim + model.rope_dim, v_dim=model.v_dim,
                q_dtype=q, kv_dtype=kv, out_dtype="bf16" if DTYPES[q].bits == 8 else q, lse=with_lse, causal=is_causal,
                **(given | fixed),
            )  # fmt: skip


def merge_problems(
    model: Model, target: Target, *, tp: int = 1, dtypes: Sequence[str] | None = None
) -> Iterator[MergeProblem]:  # fmt: skip
    """The merges of what such calls give: of their outputs, and of fp32 ones."""
    names = {"fp32"}
    for q, _ in (dtypes_on(name, target) for name in (dtypes if dtypes is not None else model.dtypes)):
        names.add("bf16" if DTYPES[q].bits == 8 else q)
    for name in sorted(names):
        yield MergeProblem(
            num_heads=model.local_heads(tp), dim=model.v_dim, a_dtype=name, b_dtype=name, out_dtype=name
        )  # fmt: skip


def _scales(q: str, cache: str, which: str) -> tuple[dict[str, Any], ...]:
    """Which scales come as device tensors."""
    if which == "all":
        return ({"q_scale": True, "kv_scale": True},)
    if which == "none" or DTYPES[cache].bits != 8:
        return ({},)
    return {}, {"kv_scale": True, "q_scale": DTYPES[q].bits == 8}
