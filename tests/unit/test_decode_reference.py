"""The truth against attention written another way: row by row in NumPy, torch's own, and closed forms."""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import torch

from mla_jit import dtypes
from mla_jit.ops.decode import reference


def _numpy(t: torch.Tensor) -> np.ndarray:
    return t.to(torch.float64).numpy()


def _sequence(call: cases.Call, b: int) -> tuple[int, dict[int, tuple[int, int]]]:
    """(length, {global position: (page, slot)}) of the tokens in this rank's cache, walked one by one."""
    case, kw = call.case, call.kwargs
    rank, world = case.cp
    if case.csr:
        begin, end = kw["kv_indptr"][b : b + 2].tolist()
        entries = [int(kw["kv_indices"][i]) for i in range(begin, end)]
        length = sum(case.page for _ in entries[:-1]) + (
            int(kw["kv_last_page_lens"][b]) if entries and case.page > 1 else len(entries[-1:])
        )
        if case.csr_lens:
            length = int(kw["seq_lens"][b])
    else:
        length = int(kw["seq_lens"][b])
        entries = kw["block_table"][b].tolist()
    place, local = {}, 0
    for position in range(length):
        if position % world == rank:
            place[position] = (entries[local // case.page], local % case.page)
            local += 1
    return length, place


def naive(call: cases.Call) -> tuple[np.ndarray, np.ndarray]:
    """(out [tokens, H, C], lse [tokens, H]): one row at a time, softmax by its definition."""
    case, kw = call.case, call.kwargs
    q_parts = call.q if case.q_split else (call.q,)
    q = np.concatenate([_numpy(part).reshape(-1, case.heads, part.shape[-1]) for part in q_parts], -1)
    caches = [
        _numpy(c) for c in (call.kv_cache if isinstance(call.kv_cache, tuple) else (call.kv_cache,)) if c is not None
    ]
    caches = [c[:, :, None, :] if c.ndim == 3 else c for c in caches]
    if case.scaled:
        latent, scales, *rope = caches
        caches = [latent * np.repeat(scales, 128, -1), *rope]
    k_factor, q_factor = (float(1.0 if kw[name] is None else kw[name]) for name in ("kv_scale", "q_scale"))
    out, lse = np.zeros((len(q), case.heads, case.C)), np.full((len(q), case.heads), -np.inf)
    token = 0
    for b, q_len in enumerate(case.q_tokens):
        length, place = _sequence(call, b)
        for t in range(q_len):
            seen = [p for p in place if not case.causal or p <= length - q_len + t]
            for h in range(case.heads) if seen else ():
                kv_head = h * case.kv_heads // case.heads
                keys = k_factor * np.stack(
                    [np.concatenate([c[page, slot, kv_head] for c in caches]) for page, slot in map(place.get, seen)]
                )
                logits = keys @ (q_factor * q[token, h]) * kw["sm_scale"]
                if case.cap:
                    logits = case.cap * np.tanh(logits / case.cap)
                top = logits.max()
                weights = np.exp(logits - top)
                sink = np.exp(float(kw["sinks"][h]) - top) if case.sinks else 0.0
                out[token, h] = weights @ keys[:, : case.C] / (weights.sum() + sink)
                lse[token, h] = top + math.log(weights.sum())
            token += 1
    return out, lse / math.log(2) if case.lse_base == "2" else lse


@pytest.mark.parametrize("case", cases.SMALL, ids=lambda c: c.id)
def test_agrees_with_a_row_by_row_softmax(case: cases.Case) -> None:
    call = cases.build(case)
    out, lse = call.expected()
    want_out, want_lse = naive(call)
    got_out, got_lse = out.reshape(want_out.shape).numpy(), lse.reshape(want_lse.shape).numpy()
    assert np.array_equal(np.isinf(got_lse), np.isinf(want_lse))
    full = np.isfinite(want_lse)
    np.testing.assert_allclose(got_lse[full], want_lse[full], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got_out, want_out, rtol=1e-9, atol=1e-12)


def test_agrees_with_torchs_attention_over_a_whole_prompt() -> None:
    """q_len == length: the causal triangle of a prefill."""
    n, heads, rank, width = 12, 3, 32, 48
    generator = torch.Generator().manual_seed(0)
    q, key = (torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((heads, width), (width,)))
    want = torch.nn.functional.scaled_dot_product_attention(
        q.movedim(1, 0), key.expand(heads, n, width), key[:, :rank].expand(heads, n, rank), is_causal=True, scale=0.3
    )
    table, lens = torch.tensor([[2, 0, 1]]), torch.tensor([n])
    cache = torch.empty(3, 4, 1, width, dtype=torch.float64)
    cache[table[0]] = key.view(3, 4, 1, width)
    out, _ = reference.decode(q[None], cache, kv_lora_rank=rank, sm_scale=0.3, block_table=table, seq_lens=lens)
    torch.testing.assert_close(out[0].movedim(1, 0), want)


@pytest.mark.parametrize("q_len", [1, 4])
def test_the_ranks_of_a_context_merge_to_the_whole(q_len: int) -> None:
    """Partial outputs weighted by their LSE give what one rank with all tokens gives."""
    world, case = 3, cases.Case(q_len=q_len, q_3d=False, lens=(50, 3, 1), page=1)
    whole = cases.build(case)
    out, lse = whole.expected()
    parts = []
    for rank in range(world):
        table = torch.full_like(whole.kwargs["block_table"], -1)
        for b, n in enumerate(case.lens):
            own = whole.kwargs["block_table"][b, rank:n:world]
            table[b, : len(own)] = own
        parts.append(
            reference.decode(
                whole.q, whole.kv_cache, **{**_plain(whole), "block_table": table, "cp_rank": rank, "cp_world": world}
            )
        )
    lses = torch.stack([part_lse for _, part_lse in parts])
    total = torch.logsumexp(lses, 0)
    merged = sum(
        part_out * torch.exp(part_lse - total.nan_to_num(neginf=0.0))[..., None] for part_out, part_lse in parts
    )
    torch.testing.assert_close(total, lse)
    torch.testing.assert_close(merged, out)


def _plain(call: cases.Call) -> dict[str, object]:
    return {k: v for k, v in call.kwargs.items() if k not in ("out", "lse", "num_kv_splits")}


def test_equal_keys_give_the_mean_and_the_logarithm_of_the_count() -> None:
    cache = torch.zeros(2, 8, 1, 24)
    cache[..., :16] = torch.arange(16)
    q = torch.ones(1, 2, 24)
    out, lse = reference.decode(
        q, cache, kv_lora_rank=16, sm_scale=0.01, block_table=torch.tensor([[1, 0]]), seq_lens=torch.tensor([11])
    )
    torch.testing.assert_close(out, torch.arange(16.0, dtype=torch.float64).expand(1, 2, 16))
    torch.testing.assert_close(lse, torch.full((1, 2), math.log(11) + 1.2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3fnuz"])
def test_every_fp8_value_is_read_exactly(name: str) -> None:
    """A cache of one token: the output is that token, whatever the weight."""
    dtype = getattr(torch, dtypes.DTYPES[name].torch)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]
    cache = values.to(dtype).view(1, 1, 1, -1)
    out, _ = reference.decode(
        torch.zeros(1, 1, len(values)), cache, kv_lora_rank=len(values), sm_scale=1.0, block_table=torch.tensor([[0]]),
        seq_lens=torch.tensor([1]), kv_scale=0.5,
    )  # fmt: skip
    assert torch.equal(out.flatten(), values.double() * 0.5)


def test_the_judge_sees_one_wrong_row() -> None:
    """`check` fails on one row of NaN, one token dropped for one head, and an empty row that is not zero."""
    call = cases.build(cases.Case(lens=(90, 0)))
    out, lse = (x.float() for x in call.expected())
    figures = cases.check(call, out, lse)
    assert max(figures.rel_l2, figures.lse_error) < 1e-6
    spoiled = {"nan": (0, 1, 3), "zero": (1, 2, 0)}
    for row in spoiled.values():
        bad = out.clone()
        bad[row] = float("nan") if row == spoiled["nan"] else 1e-30
        with pytest.raises(AssertionError, match="row"):
            cases.check(call, bad, lse)
    for value in (float("nan"), 2e-3 + float(lse[0, 0]), -torch.inf):
        bad_lse = lse.clone()
        bad_lse[0, 0] = value
        with pytest.raises(AssertionError, match="LSE"):
            cases.check(call, out, bad_lse)
    for b, length in ((0, 89),):  # the last token dropped: some head looked for it
        shorter = call.changed(seq_lens=torch.tensor([length, 0], dtype=torch.int32))
        short_out, short_lse = (x.float() for x in shorter.expected())
        assert (short_out[b] - out[b]).norm(dim=-1).div(out[b].norm(dim=-1)).max() > 0.3
        with pytest.raises(AssertionError, match="row"):
            cases.check(call, short_out, short_lse)


def test_needles_carry_their_rows() -> None:
    """In a plain case every row's needle has a weight of 0.9 and more, and all needles together reach both ends."""
    case = cases.Case(heads=24, lens=(150,), page=16)
    call = cases.build(case)
    _, place = _sequence(call, 0)
    keys = np.stack([_numpy(call.kv_cache)[page, slot, 0] for page, slot in place.values()])
    logits = keys @ _numpy(call.q)[0].T * call.kwargs["sm_scale"]
    weights = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    assert weights.max(0).min() > 0.9
    assert {0, 149, 15, 16, 143, 144, 127, 128, 63, 64} <= set(weights.argmax(0).tolist())
