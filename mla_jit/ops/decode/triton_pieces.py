"""Which tokens of which sequence are whose, in Triton: lengths, the even cut and the schedule of a ragged batch.

The kernels derive all of it from the lengths on the device, so a graph captured at capacity serves any length: each
program of stage 1 its piece (`_even_pieces` where sequences are cut alike, `_schedule` where lengths are uneven), the
combine the pieces of a sequence. Imports triton only.
"""

import triton
import triton.language as tl


@triton.jit
def _lengths(b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS: tl.constexpr, PAGE: tl.constexpr):
    """Lengths in tokens of sequences b (an index, or many), 0 where not ok."""
    if HAS_LENS:
        length = tl.load(lens_ptr + b, mask=ok, other=0).to(tl.int32)
    else:
        pages = (tl.load(indptr_ptr + b + 1, mask=ok, other=0) - tl.load(indptr_ptr + b, mask=ok, other=0)).to(tl.int32)
        length = pages
        if PAGE > 1:
            last = tl.load(last_ptr + b, mask=ok, other=0).to(tl.int32)
            length = tl.where(pages > 0, (pages - 1) * PAGE + last, 0)
    return tl.maximum(length, 0)


@triton.jit
def _tokens(b, qo_indptr_ptr, max_q_len):
    """(first query token of sequence b, how many it has)."""
    if qo_indptr_ptr is None:
        q_len = max_q_len
        q_first = b * max_q_len
    else:
        q_first = tl.load(qo_indptr_ptr + b).to(tl.int32)
        q_len = tl.load(qo_indptr_ptr + b + 1).to(tl.int32) - q_first
    return q_first, q_len


@triton.jit
def _visible(limit, cp_rank, cp_world, CP: tl.constexpr):
    """How many tokens of this rank's share of the sequence lie below the global position `limit`."""
    if CP:
        limit = (limit - cp_rank + cp_world - 1) // cp_world
    return tl.maximum(limit, 0)


@triton.jit
def _even_pieces(tiles, num_splits, min_tiles):
    """Tiles a piece when every sequence gets num_splits slots: enough to fill them, at least min_tiles."""
    return tl.maximum(tl.cdiv(tiles, num_splits), min_tiles)


@triton.jit
def _schedule(batch, wave, slots, lens_ptr, indptr_ptr, last_ptr, cp_rank, cp_world,
              HAS_LENS: tl.constexpr, PAGE: tl.constexpr, CP: tl.constexpr, BLOCK_N: tl.constexpr,
              BATCH_POW2: tl.constexpr):  # fmt: skip
    """How a batch is cut for `slots` programs: (whether lengths are even; else each sequence's pieces, their indices).

    Nearly equal lengths: num_splits slots a sequence. Else one cut c for all: of 16 candidates, 1/2 to 7 times
    total/wave, the one with the least predicted time, min(waves·c, total/wave + c) + 1.5 tiles a piece and program,
    whose pieces fit the slots. Integers only: both stages must come to the same cut.
    """
    offs_b = tl.arange(0, BATCH_POW2)
    ok = offs_b < batch
    lengths = _visible(_lengths(offs_b, ok, lens_ptr, indptr_ptr, last_ptr, HAS_LENS, PAGE), cp_rank, cp_world, CP)
    tiles = tl.where(ok, tl.cdiv(lengths, BLOCK_N), 0)
    total = tl.sum(tiles, 0)
    even = tl.max(tiles, 0).to(tl.int64) * batch * 8 <= total.to(tl.int64) * 9
    pieces = tiles
    if not even:
        share = tl.cdiv(total, wave)
        k = tl.arange(0, 16)
        cuts = tl.maximum((share * ((8 + 2 * (k % 4)) << (k // 4)) + 15) // 16, 1)
        inverses = _inverse(cuts)
        count = tl.sum(tl.where(ok[:, None], _pieces(tiles[:, None], inverses[None, :]), 0), 0)
        rounds = tl.cdiv(3 * count, wave)
        time = tl.where(count <= slots, 2 * tl.minimum(tl.cdiv(rounds, 3) * cuts, share + cuts) + rounds, 2147483647)
        best = tl.argmin(time, 0)
        fits = tl.min(time, 0) < 2147483647
        pieces = _pieces(tiles, _inverse(tl.sum(tl.where(k == best, cuts, 0), 0)))
        pieces = tl.where(ok & fits, pieces, ok.to(tl.int32))
    return even, pieces, offs_b


@triton.jit
def _inverse(cut):
    """2^32 / cut, by which `_pieces` divides many lengths with a multiplication each."""
    return 0xFFFFFFFF // cut.to(tl.uint32) + (cut > 1).to(tl.uint32)


@triton.jit
def _pieces(tiles, inverse):
    """About ceil(tiles / cut), at least 1: one off for some lengths, but the same wherever it is computed."""
    return tl.umulhi(tl.maximum(tiles - 1, 0).to(tl.uint32), inverse).to(tl.int32) + 1
