"""The work list of persistent decode on the host: what triton_persistent.py's `schedule` writes, in plain integers.

For tests, for `explain`, and for the description of the list; a call makes its list on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_FINE = 16  # places on the line a tile


@dataclass(frozen=True)
class WorkList:
    """`info`: of each piece (sequence, first tile, last tile, pieces with tiles of its sequence: 0 for nothing to do).

    Group g has the pieces groups[g] … groups[g + 1]; sequence b's partials are those of the pieces sums[b][0] …
    sums[b][0] + sums[b][1], and it begins at sums[b][2] on the line. One without tokens has no piece: sums[b][1] is 0.
    `length`: of a group, in sixteenths of a tile, as places on the line are; 0 where all sequences are cut alike. What
    stands in `info` behind the last group's pieces is left as it was.
    """

    groups: tuple[int, ...]
    info: tuple[tuple[int, int, int, int], ...]
    sums: tuple[tuple[int, int, int], ...]
    length: int

    def imbalance(self, overhead: int) -> float:
        """The cost of the most loaded group over the mean, in tiles and `overhead` a piece."""
        costs = [
            sum(last - first + overhead for _, first, last, parts in pieces if parts)
            for pieces in (self.info[a:b] for a, b in zip(self.groups, self.groups[1:], strict=False))
        ]
        return max(costs) * len(costs) / max(1, sum(costs))


def work_list(
    tiles: Sequence[int], groups: int, overhead: int, most_pieces: int = 1 << 20, *, even: bool = False
) -> WorkList:
    """The list for sequences of so many tiles, cut among so many groups; overhead in tiles a piece.

    No sequence is cut into more than most_pieces. `even`: all into the same number, as many as the groups hold once.
    """
    return _even(tiles, groups, most_pieces) if even else _line(tiles, groups, overhead, most_pieces)


def _even(tiles: Sequence[int], groups: int, most_pieces: int) -> WorkList:
    share = max(1, min(groups // max(1, sum(n > 0 for n in tiles)), most_pieces))
    info: list[tuple[int, int, int, int]] = []
    sums = []
    for b, n in enumerate(tiles):
        each = max(1, -(-n // share))
        parts = -(-n // each)
        sums.append((len(info), parts, len(info)))
        for k in range(share if n else 0):
            info.append((b, min(k * each, n), min((k + 1) * each, n), parts if k < parts else 0))
    starts = [g * len(info) // groups for g in range(groups + 1)]
    return WorkList(tuple(starts), tuple(info), tuple(sums), 0)


def _line(tiles: Sequence[int], groups: int, overhead: int, most_pieces: int) -> WorkList:
    uncut = most_pieces < 2
    costs = [_FINE * (n + overhead) if n else 0 for n in tiles]
    starts = [0]
    for cost in costs:
        starts.append(starts[-1] + cost)
    longest = 0 if uncut else -(-_FINE * max(tiles, default=0) // (most_pieces - 1))
    length = max(-(-starts[-1] // groups), longest, _FINE)
    info: list[tuple[int, int, int, int]] = [(-1, 0, 0, 0)] * (sum(n > 0 for n in tiles) + groups)
    sums = []
    rank = 0  # among the sequences with tokens
    for b, n in enumerate(tiles):
        group, kept = starts[b] // length, starts[b] + (_FINE * overhead if n else 0)
        first = group if uncut else kept // length
        parts = 0 if not n else 1 if uncut else (kept + _FINE * (n - 1)) // length - first + 1
        last = n if uncut else max(0, min(-(-((group + 1) * length - kept) // _FINE), n))
        sums.append((rank + first + 1, parts, starts[b]))
        if n:
            info[rank + group + 1] = (b, 0, last, parts if last else 0)
            rank += 1
    places = []
    for g in range(groups):
        begin = g * length
        before = sum(n > 0 and start < begin for n, start in zip(tiles, starts, strict=False))
        b = max((b for b in range(len(tiles)) if starts[b] <= begin), default=-1)
        start, n = (starts[b], tiles[b]) if b >= 0 else (-1, 0)
        kept = start + (_FINE * overhead if n else 0)
        first, last = (max(0, min(-(-(end - kept) // _FINE), n)) for end in (begin, begin + length))
        parts = (
            (kept + _FINE * (n - 1)) // length - kept // length + 1
            if last > first and start < begin and not uncut
            else 0
        )
        places.append(g + before)
        info[g + before] = (b, first, last, parts)
    return WorkList((*places, len(info)), tuple(info), tuple(sums), length)
