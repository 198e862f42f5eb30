"""The work list of persistent decode: each tile once, balanced, and the same on the device as on the host."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from mla_jit.ops.decode import worklist
from mla_jit.ops.decode.worklist import WorkList, work_list
from mla_jit.tuning.grids import ragged_lens

ROOT = Path(worklist.__file__).parents[3]


def some_batch(rng: random.Random) -> tuple[list[int], int, int, int, bool]:
    """(tiles, groups, overhead, most pieces, even) of a batch: padding, one long, all alike, uniform, log-uniform."""
    batch, kind = rng.randint(1, 80), rng.randrange(5)
    most = rng.choice((1, 3, 20, 500))
    tiles = [
        0 if kind == 0 else most if kind == 1 else rng.randint(0, most) if kind == 2 else int(most ** rng.random())
        for _ in range(batch)
    ]
    if kind == 4:
        tiles[rng.randrange(batch)] = 2000
        tiles[batch // 2 :] = [0] * (batch - batch // 2)
    groups, most = rng.choice((1, 2, 7, 33, 66, 132, 264)), rng.choice((1, 2, 3, 16, 1 << 20))
    return tiles, groups, rng.randint(0, 8), most, rng.random() < 0.3


def check(tiles: list[int], groups: int, overhead: int, most_pieces: int, even: bool) -> None:
    found = work_list(tiles, groups, overhead, most_pieces, even=even)
    assert len(found.info) <= sum(n > 0 for n in tiles) + groups <= len(tiles) + groups  # the room that there is
    if not even:
        assert len(found.info) == sum(n > 0 for n in tiles) + groups
    assert len(found.groups) == groups + 1
    assert found.groups[0] == 0
    assert found.groups[-1] == len(found.info)
    assert list(found.groups) == sorted(found.groups)
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for place, (b, first, last, parts) in enumerate(found.info):
        if parts:
            seen.setdefault(b, []).append((first, last, place))
            assert parts == found.sums[b][1]
    for b, n in enumerate(tiles):
        if n == 0:  # on nobody's way
            assert b not in seen
            assert found.sums[b][1] == 0
            continue
        pieces = seen[b]
        assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]
        assert pieces[-1][1] == n
        assert all(last > first for first, last, _ in pieces)
        assert len(pieces) <= most_pieces
        start, count, _ = found.sums[b]
        assert [place for _, _, place in pieces] == list(range(start, start + count))
    if even:
        check_even(tiles, groups, most_pieces, seen)
        return
    if most_pieces == 1:  # whole sequences, where they begin
        return
    for a, b in zip(found.groups, found.groups[1:], strict=False):
        pieces_of = [info for info in found.info[a:b] if info[3]]
        tiles_of = sum(last - first for _, first, last, _ in pieces_of)
        assert 16 * tiles_of < found.length + 16
        begun = sum(overhead for _, first, last, _ in pieces_of if first == 0 < last)
        assert 16 * (tiles_of + begun) < found.length + 16 * (overhead + 1)
        assert b - a - len(pieces_of) <= 2  # with nothing to do: where the group begins, and where it ends


def check_even(tiles: list[int], groups: int, most: int, seen: dict[int, list[tuple[int, int, int]]]) -> None:
    """As many pieces of each sequence as the groups hold once, none longer than its share; fewer if it is short."""
    share = max(1, min(most, groups // max(1, len(seen))))
    for b, pieces in seen.items():
        n = tiles[b]
        lengths = [last - first for first, last, _ in pieces]
        assert max(lengths) == -(-n // share)
        assert len(set(lengths[:-1])) <= 1
        assert n < share**2 or len(lengths) == share or share * -(-n // share) - n >= -(-n // share)


def test_the_modes_are_honoured() -> None:
    """An example of each by hand: 3 sequences, 8 groups."""
    assert [parts for _, parts, _ in work_list([8, 8, 100], 8, 0).sums] == [1, 2, 7]
    assert [parts for _, parts, _ in work_list([8, 8, 100], 8, 0, 3).sums] == [1, 1, 3]
    assert [parts for _, parts, _ in work_list([8, 8, 100], 8, 0, 1).sums] == [1, 1, 1]
    even = work_list([8, 1, 100], 8, 0, even=True)
    assert [parts for _, parts, _ in even.sums] == [2, 1, 2]
    assert even.info == ((0, 0, 4, 2), (0, 4, 8, 2), (1, 0, 1, 1), (1, 1, 1, 0), (2, 0, 50, 2), (2, 50, 100, 2))
    assert even.groups == (0, 0, 1, 2, 3, 3, 4, 5, 6)
    assert [parts for _, parts, _ in work_list([8, 1, 100], 8, 0, 1, even=True).sums] == [1, 1, 1]
    padded = work_list([8, 0, 1, 0, 0, 100], 8, 0, even=True)
    assert [parts for _, parts, _ in padded.sums] == [2, 0, 1, 0, 0, 2]
    assert [info[1:] for info in padded.info] == [info[1:] for info in even.info]


def test_each_tile_of_ten_thousand_batches_is_in_one_piece() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        check(*some_batch(rng))


def test_log_uniform_lengths_are_balanced() -> None:
    tiles = [-(-n // 64) for n in ragged_lens()]
    for groups in (66, 132):
        assert work_list(tiles, groups, 5).imbalance(5) <= 1.10


def most_tiles(found: WorkList) -> int:
    """Of a group."""
    ends = zip(found.groups, found.groups[1:], strict=False)
    return max(sum(last - first for _, first, last, parts in found.info[a:b] if parts) for a, b in ends)


@pytest.mark.parametrize("even", [False, True])
def test_padding_costs_nothing_wherever_it_stands(even: bool) -> None:
    """Up to 1024 sequences every group has the same tiles of the same sequences as without it."""
    tiles = [64] * 100 + [1, 3, 500] + [64] * 25
    plain = work_list(tiles, 132, 5, even=even)
    rng = random.Random(0)
    for batch in (129, 256, 1024):
        for places in (range(128), range(batch - 128, batch), sorted(rng.sample(range(batch), 128))):
            mixed = [0] * batch
            for place, n in zip(places, tiles, strict=True):
                mixed[place] = n
            padded = work_list(mixed, 132, 5, even=even)
            assert (padded.groups, padded.length) == (plain.groups, plain.length)
            assert [(first, last, parts) for _, first, last, parts in padded.info if parts] == [
                (first, last, parts) for _, first, last, parts in plain.info if parts
            ]
            assert most_tiles(padded) == most_tiles(plain)


KERNEL = """
import os, random, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from mla_jit.ops.decode import triton_persistent as kernels
from mla_jit.ops.decode.persistent import _steps as steps
from mla_jit.ops.decode.worklist import work_list
sys.path.insert(0, {tests!r})
from test_worklist import some_batch
rng = random.Random({seed})
for _ in range({count}):
    tiles, groups, overhead, most_pieces, even = some_batch(rng)
    lens = torch.tensor([max(0, 64 * n - rng.randrange(64)) if n else 0 for n in tiles], dtype=torch.int32)
    shapes = (groups + 1,), (len(tiles) + groups, 4), (len(tiles), 3), (len(tiles) * 3,)
    made = [torch.full(shape, -7, dtype=torch.int32) for shape in shapes]
    kernels.schedule[(1,)](
        lens, None, None, *made, len(tiles), groups, overhead, most_pieces, int(even), 3 * len(tiles), 0, 1,
        PAGE=64, UNIT=64, CP=False, HAS_LENS=True, WIDE=rng.choice((32, 128)), CHUNK=32, STEPS=steps(len(tiles)),
    )
    want = work_list(tiles, groups, overhead, most_pieces, even=even)
    assert made[0].tolist() == list(want.groups), (tiles, groups, overhead)
    assert made[1][: len(want.info)].tolist() == [list(x) for x in want.info], (tiles, groups, overhead)
    assert (made[1][len(want.info) :] == -7).all()
    assert (made[3] == 0).all()
    assert made[2].tolist() == [list(x) for x in want.sums], (tiles, groups, overhead)
print("equal")
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_the_device_makes_the_same_list(seed: int) -> None:
    code = KERNEL.format(tests=str(Path(__file__).parent), seed=seed, count=40)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "equal\n"
