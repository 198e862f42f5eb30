"""The peers beside which our decode is timed, each if its package imports: FlashMLA, FlashInfer, torch's own attention.

A peer has its schedule or its contiguous keys made before anything is timed. None of them takes a cache of another
dtype than q; what else one cannot serve it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from mla_jit.errors import MlaJitError
from mla_jit.tuning.bench import Call, Runner, Set

_C, _R = 512, 64  # of the sets' latent and rope parts
_FLASH_MLA_PAGE = 64  # the only page size that it takes
_FLASHINFER_BYTES = 128 << 20  # of its split results, as its documentation recommends


def _alike(s: Set) -> bool:
    return s.q.dtype == s.cache.dtype


def flash_mla() -> Runner:
    """FlashMLA without its scheduler kernel. Page size 64 only."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata  # type: ignore[import-not-found]

    def prepare(sets: Sequence[Set]) -> Call | None:
        if not _alike(sets[0]) or sets[0].cache.shape[1] != _FLASH_MLA_PAGE:
            return None
        schedule = get_mla_metadata()[0]  # made by the first call; all sets have the same lengths

        def call(s: Set) -> torch.Tensor:
            out: torch.Tensor = flash_mla_with_kvcache(
                s.q, s.cache, s.table, s.lens, _C, schedule, softmax_scale=s.scale, causal=s.q.shape[1] > 1
            )[0]
            return out

        return call

    return Runner(prepare)


def flashinfer() -> Runner:
    """FlashInfer's MLA wrapper with the kernels that it chooses itself, without its `plan`: one plan a set."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper  # type: ignore[import-not-found]

    def planned(s: Set, workspace: torch.Tensor) -> Any:
        batch, q_len, heads, _ = s.q.shape
        page_size = s.cache.shape[1]
        pages = (s.lens + page_size - 1) // page_size
        slots = torch.arange(s.table.shape[1], device=s.table.device)
        wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="auto")
        wrapper.plan(
            qo_indptr=torch.arange(batch + 1, dtype=torch.int32, device=s.q.device) * q_len,
            kv_indptr=torch.cat([pages.new_zeros(1), pages.cumsum(0)]).to(torch.int32),
            kv_indices=s.table[slots < pages[:, None]], kv_len_arr=s.lens, num_heads=heads, head_dim_ckv=_C,
            head_dim_kpe=_R, page_size=page_size, causal=q_len > 1, sm_scale=s.scale, q_data_type=s.q.dtype,
            kv_data_type=s.cache.dtype,
        )  # fmt: skip
        return wrapper

    def prepare(sets: Sequence[Set]) -> Call | None:
        if not _alike(sets[0]):
            return None
        workspace = torch.empty(_FLASHINFER_BYTES, dtype=torch.uint8, device=sets[0].q.device)
        wrappers = {id(s): planned(s, workspace) for s in sets}

        def call(s: Set) -> torch.Tensor:
            q, cache = s.q.flatten(0, 1), s.cache[:, :, 0]
            out: torch.Tensor = wrappers[id(s)].run(
                q[..., :_C], q[..., _C:], cache[..., :_C], cache[..., _C:], return_lse=False
            )
            return out.unflatten(0, s.q.shape[:2])

        return call

    return Runner(prepare)


def sdpa() -> Runner:
    """`scaled_dot_product_attention` on each set's keys gathered into one tensor. Equal lengths only.

    Left out, too, where its copies of the keys do not fit the device: torch may repeat them for each head.
    """

    def gathered(s: Set) -> torch.Tensor:
        used = -(-s.longest // s.cache.shape[1])
        keys = s.cache[s.table[:, :used].long()].flatten(1, 2)[:, : s.longest]
        return keys.transpose(1, 2).contiguous()  # [B, 1, kv_len, C + R]

    def prepare(sets: Sequence[Set]) -> Call | None:
        first = sets[0]
        if not _alike(first) or bool((first.lens != first.longest).any()):
            return None
        q_len, mask = first.q.shape[1], None
        if q_len > 1:
            mask = torch.ones(q_len, first.longest, dtype=torch.bool, device=first.q.device)
            mask = mask.tril(first.longest - q_len)
        keys: dict[int, torch.Tensor] = {}

        def call(s: Set) -> torch.Tensor:
            key = keys[id(s)]
            return functional.scaled_dot_product_attention(
                s.q.transpose(1, 2), key, key[..., :_C], attn_mask=mask, scale=s.scale, enable_gqa=True
            ).transpose(1, 2)

        try:
            keys.update((id(s), gathered(s)) for s in sets)
            call(first)
        except torch.OutOfMemoryError:
            return None
        return call

    return Runner(prepare)


PEERS: dict[str, Callable[[], Runner]] = {"flash_mla": flash_mla, "flashinfer": flashinfer, "sdpa": sdpa}
# What they are called in the recorded grid: FlashInfer's own choice on that device is fa3.
RECORDED = {"flash_mla": "flashmla", "flashinfer": "fi_fa3"}


def by_name(name: str) -> Runner:
    """A peer's runner. MlaJitError where its package does not import."""
    try:
        return PEERS[name]()
    except ImportError as error:
        raise MlaJitError(f"{name} cannot be timed: {error}; install its package, or leave it out") from error
