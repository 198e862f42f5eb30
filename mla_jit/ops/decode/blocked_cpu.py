"""`decode_blocked_cpu`: blocked flash-decoding in PyTorch ops, the host variant of the `cpu` target.

One sequence and KV head at a time, in fp32 whatever the dtypes: its packed rows (query token × head) in blocks of
`block_m`, its tokens in `num_kv_splits` splits of tiles of `block_n`. Tile i of every split is one batched product, so
splits are what the threads share; each split keeps its own online softmax, and the splits are summed in their order.
`gather` says whether the paged tokens are gathered and widened a tile at a time (again for each block of rows, little
memory) or a sequence at once. Only the last tile of a sequence is short; only tiles that the causal diagonal crosses
are masked.

Every shape that a product sees is a property of the sequence itself and of the config, never of its neighbours.
torch is imported by the first call, not with the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mla_jit.config import Config
from mla_jit.layouts import GROUP
from mla_jit.ops.decode.inputs import LN2, DecodeInputs
from mla_jit.ops.variant import Cost, Variant
from mla_jit.problem import DecodeProblem, bucket
from mla_jit.target import Target

NAME = "decode_blocked_cpu"
Tensor = Any

SPACE: dict[str, tuple[int | str | bool, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (32, 64, 128, 256, 512, 1024),
    "num_kv_splits": (1, 2, 4, 8),
    "gather": ("tile", "sequence"),
}
_INVARIANT = Config.of(NAME, block_m=128, block_n=256, num_kv_splits=1, gather="tile")


def num_splits(p: DecodeProblem, config: Config) -> int:
    """Splits of a sequence: the caller's wish, else the config's."""
    return p.num_kv_splits if p.num_kv_splits is not None else config.int("num_kv_splits")


def rejects(p: DecodeProblem, target: Target, config: Config) -> str | None:
    """Why this variant cannot serve the problem with this config on this target, or None."""
    if target.runtime != "cpu":
        return f"PyTorch ops on the CPU; {target.name} is not served by them"
    for name in ("block_m", "block_n", "num_kv_splits"):
        if config.int(name) < 1:
            return f"{name} is {config[name]}; it must be at least 1"
    if config["gather"] not in SPACE["gather"]:
        return f"gather is {config['gather']!r}; use one of {', '.join(map(repr, SPACE['gather']))}"
    if p.batch_invariant and config != _INVARIANT:
        return f"batch_invariant fixes the blocks, whatever the batch, to {_INVARIANT}"
    return None


def default(p: DecodeProblem, target: Target) -> Config:
    """Tiles whose fp32 copy fills half of the L2 cache; a whole sequence gathered at once where that is small."""
    if p.batch_invariant:
        return _INVARIANT
    token_bytes = p.head_dim * 4
    most = max(32, bucket(target.l2_bytes // 2 // token_bytes + 1) // 2)
    return Config.of(
        NAME,
        block_m=min(128, max(16, bucket(p.rows))),
        block_n=max(32, min(most, bucket(p.max_kv_len))),
        num_kv_splits=1,
        gather="sequence" if p.rows > 128 and p.max_kv_len * token_bytes <= 64 * target.l2_bytes else "tile",
    )


def cost(p: DecodeProblem, target: Target, config: Config) -> Cost:
    """The roofline at the length bound, and one `launch_us` for each batched tile."""
    splits = num_splits(p, config)
    tokens = p.total_kv if p.total_kv is not None else p.batch * p.max_kv_len
    blocks = -(-max(p.rows, 1) // config.int("block_m"))
    gathers = blocks if config["gather"] == "tile" else 1
    size = tokens * (p.token_bytes + p.num_kv_heads * p.head_dim * 4) * gathers
    flops = 2 * tokens * p.num_heads * p.q_len * (p.head_dim + p.kv_lora_rank)
    steps = blocks * p.num_kv_heads * -(-tokens // (config.int("block_n") * splits))
    time_us = max(size / target.bandwidth_gbps * 1e-3, flops / target.bf16_tflops * 1e-6) + steps * target.launch_us
    return Cost(size, flops, p.batch * p.num_kv_heads * blocks, float(steps), time_us)


def _positions(starts: Sequence[int], n: int, device: Any) -> Tensor:
    """[tiles, n]: the positions of the tokens of tiles of n that begin at these."""
    import torch

    return torch.tensor(starts, device=device)[:, None] + torch.arange(n, device=device)


@dataclass
class _Tokens:
    """One sequence's tokens of one KV head, in the paged cache, given out as fp32 [tiles, tokens, C + R]."""

    latent: Tensor  # [pages, page_size, C]
    scales: Tensor | None  # [pages, page_size, C / 128], of 128 columns of the latent each
    rope: Tensor  # [pages, page_size, R]
    pages: Tensor  # int64: the ids of the pages in use
    whole: Tensor | None = None

    def gather(self, positions: Tensor) -> Tensor:
        """The tokens at these positions of the sequence, widened exactly (then scaled); fp8 travels as bytes."""
        import torch

        size = self.latent.shape[1]
        pages, slots = self.pages[positions // size], positions % size
        parts = []
        for buffer in (self.latent, self.rope):
            if buffer.element_size() == 1:
                part = buffer.view(torch.uint8)[pages, slots].view(buffer.dtype)
            else:
                part = buffer[pages, slots]
            parts.append(part.to(torch.float32))
        if self.scales is not None:
            parts[0] *= self.scales[pages, slots].repeat_interleave(GROUP, -1)
        return torch.cat(parts, -1)

    def tiles(self, starts: Sequence[int], n: int) -> Tensor:
        """Tiles of n tokens that begin at these positions."""
        import torch

        if self.whole is not None:
            return torch.stack([self.whole[start : start + n] for start in starts])
        return self.gather(_positions(starts, n, self.pages.device))


@dataclass
class _Rows:
    """A block of packed rows and what its splits have summed: m the running maximum, l the weights, o the values."""

    q: Tensor  # [rows, C + R], times the scale of the logits
    end: Tensor  # [rows]: the first position that each row does not see
    cap: float
    m: Tensor  # [splits, rows]
    l: Tensor
    o: Tensor  # [splits, rows, C]

    def attend(self, splits: slice, starts: Sequence[int], k: Tensor) -> None:
        """One tile [tokens, C + R] for each of these splits: the online softmax of all of them side by side."""
        import torch

        n = k.shape[1]
        s = torch.matmul(self.q, k.transpose(1, 2))  # [splits, rows, tokens]
        if self.cap > 0:
            s = self.cap * torch.tanh(s / self.cap)
        if starts[-1] + n > int(self.end.min()):
            positions = _positions(starts, n, k.device)
            s = s.masked_fill(positions[:, None, :] >= self.end[None, :, None], -torch.inf)
        m = torch.maximum(self.m[splits], s.amax(-1))
        shift = m.masked_fill(m == -torch.inf, 0.0)  # a row that has seen nothing yet
        alpha = torch.exp(self.m[splits] - shift)
        p = torch.exp(s - shift[..., None])
        self.m[splits] = m
        self.l[splits] = self.l[splits] * alpha + p.sum(-1)
        self.o[splits] = torch.baddbmm(self.o[splits] * alpha[..., None], p, k[..., : self.o.shape[-1]])

    def combine(self) -> tuple[Tensor, Tensor, Tensor]:
        """(maximum [rows], weights [rows], values [rows, C]) over all splits, summed in their order."""
        import torch

        m = self.m.amax(0)
        weight = torch.exp(self.m - m.masked_fill(m == -torch.inf, 0.0))
        l, o = self.l[0] * weight[0], self.o[0] * weight[0][:, None]
        for i in range(1, self.m.shape[0]):
            l = l + self.l[i] * weight[i]
            o = o + self.o[i] * weight[i][:, None]
        return m, l, o


def _attend_sequence(rows: _Rows, tokens: _Tokens, block_n: int) -> None:
    """Walks the splits of one sequence side by side; the short tile at its end comes last and alone."""
    end = int(rows.end.max())
    splits = rows.m.shape[0]
    full, tiles = end // block_n, -(-end // block_n)
    per_split = max(1, -(-tiles // splits))
    for i in range(per_split):
        starts = [(s * per_split + i) * block_n for s in range(splits) if s * per_split + i < full]
        if starts:
            rows.attend(slice(0, len(starts)), starts, tokens.tiles(starts, block_n))
    if end % block_n:
        split, start = full // per_split, full * block_n
        rows.attend(slice(split, split + 1), [start], tokens.tiles([start], end - start))


def _sequences(p: DecodeProblem, t: dict[str, Tensor]) -> list[tuple[int, int, int, Tensor]]:
    """(first query token, one past the last, length, page ids) of each sequence; the ids are a view, not all in use."""
    q_starts = t["qo_indptr"].tolist() if p.ragged else [b * p.q_len for b in range(p.batch + 1)]
    if p.paging == "table":
        return [(q_starts[b], q_starts[b + 1], n, t["table"][b]) for b, n in enumerate(t["lens"].tolist())]
    first = t["kv_indptr"].tolist()
    held = [first[b + 1] - first[b] for b in range(p.batch)]
    if p.has_lens:
        lengths = t["lens"].tolist()
    elif p.page_size == 1:
        lengths = held
    else:
        lengths = [(n - 1) * p.page_size + last if n else 0 for n, last in zip(held, t["last"].tolist(), strict=True)]
    return [(q_starts[b], q_starts[b + 1], n, t["table"][first[b] :]) for b, n in enumerate(lengths)]


def run(p: DecodeProblem, config: Config, inputs: DecodeInputs) -> None:
    """Computes a checked call; writes tensors["out"] and, where given, tensors["lse"]."""
    import torch

    with torch.no_grad():
        _run(p, config, inputs)


def _run(p: DecodeProblem, config: Config, inputs: DecodeInputs) -> None:
    import torch

    t, numbers, floats = inputs.tensors, inputs.numbers, inputs.floats
    kv_scale = 1.0 if t["kv_scale"] is None else t["kv_scale"].item()
    qk_scale = floats["qk_scale"] * kv_scale * (1.0 if t["q_scale"] is None else t["q_scale"].item())
    rank, world, ratio = int(numbers["cp_rank"]), int(numbers["cp_world"]), p.gqa_ratio

    def of_tokens(x: Tensor, first: int, last: int, b: int) -> Tensor:
        """The call's query tokens first … last, those of sequence b, whether or not x has a dimension for q_len."""
        return x[b] if t["q"].dim() == 4 else x[first:last]

    for b, (first, last, length, table) in enumerate(_sequences(p, t)):
        if first == last:
            continue
        q_len = last - first
        local = max(0, -(-(length - rank) // world))
        limit = torch.arange(q_len, device=inputs.device) + length - q_len + 1
        if not p.causal:
            limit.fill_(length)
        visible = ((limit - rank + world - 1).div(world, rounding_mode="floor")).clamp(0, local)
        pages = table[: -(-local // p.page_size)].long()
        parts = [of_tokens(t[name], first, last, b) for name in ("q", "q_pe")]
        q = torch.cat([parts[0][..., : p.kv_lora_rank].float(), parts[1].float()], -1) * qk_scale
        out = of_tokens(t["out"], first, last, b)
        lse = None if t["lse"] is None else of_tokens(t["lse"], first, last, b)
        for kv_head in range(p.num_kv_heads):
            scales = None if t["scales"] is None else t["scales"][:, :, kv_head]
            tokens = _Tokens(t["kv"][:, :, kv_head, : p.kv_lora_rank], scales, t["kpe"][:, :, kv_head], pages)
            if config["gather"] == "sequence":
                tokens.whole = tokens.gather(torch.arange(local, device=inputs.device))
            heads = slice(kv_head * ratio, (kv_head + 1) * ratio)
            sinks = None if t["sinks"] is None else t["sinks"][heads].repeat(q_len)
            rows, ends = q[:, heads].reshape(q_len * ratio, -1), visible.repeat_interleave(ratio)
            result, row_lse = _attend_head(p, config, rows, ends, tokens, sinks, floats["logit_cap"])
            out[:, heads] = (result * (floats["v_scale"] * kv_scale)).view(q_len, ratio, -1).to(out.dtype)
            if lse is not None:
                lse[:, heads] = (row_lse * (floats["lse_mul"] / LN2)).view(q_len, ratio)


def _attend_head(p: DecodeProblem, config: Config, q: Tensor, end: Tensor, tokens: _Tokens, sinks: Tensor | None,
                 cap: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [rows, C], natural LSE [rows]) of the packed rows of one sequence and KV head."""
    import torch

    block_m, block_n = config.int("block_m"), config.int("block_n")
    tiles = max(1, -(-int(end.max()) // block_n))
    splits = min(num_splits(p, config), tiles)  # one that has no tile adds nothing
    results = []
    for m0 in range(0, q.shape[0], block_m):
        block = q[m0 : m0 + block_m].contiguous()
        m = block.new_full((splits, block.shape[0]), -torch.inf)
        l, o = torch.zeros_like(m), block.new_zeros(*m.shape, p.kv_lora_rank)
        rows = _Rows(block, end[m0 : m0 + block_m], cap, m, l, o)
        _attend_sequence(rows, tokens, block_n)
        m, l, o = rows.combine()
        denominator = l if sinks is None else l + torch.exp(sinks[m0 : m0 + block_m] - m)
        out = torch.where((l > 0)[:, None], o / denominator[:, None], 0.0)
        results.append((out, m + torch.log(l)))  # an empty row: -inf - inf
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


DECODE_BLOCKED_CPU = Variant(
    name=NAME,
    op="decode",
    backend="cpu",
    rejects=rejects,
    default=default,
    sources=lambda p, target, config: (),
    launches=lambda p, target, config: (),
    workspace_bytes=lambda p, target, config: 0,
    cost=cost,
    space=SPACE,
    host=run,
)
