"""Which configs of a problem are worth measuring: the product of configs/spaces/<op>.yaml, less what changes nothing.

Legality is the variants' own `rejects` and nothing else. Imports neither torch nor triton.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mla_jit import resources
from mla_jit.config import Config, Value
from mla_jit.errors import InvalidInput
from mla_jit.ops.variant import Variant
from mla_jit.problem import DecodeProblem, Tunable, bucket
from mla_jit.target import Target

Space = Mapping[str, Any]  # a variant's rows of the YAML file
_CUT = ("num_kv_splits", "min_tiles")  # numbers of the launch; no other kernel, but for two splits and `together`
_COMBINE = ("combine_s", "combine_h", "combine_d", "combine_ahead")  # of the second kernel
_COMBINED = (*_COMBINE, "together")
_NOT_COMPILED = (*_CUT, "overhead", "waves", "per_sm", *_COMBINE, "together")  # into the first kernel
_LEAST_COMBINE = 8  # pieces that a program of the combine may hold however few there are
_MOST_ROUNDS = 16  # of a program of the combine over its pieces


def load(op: str = "decode") -> dict[str, Space]:
    """The spaces of an op by variant, as configs/spaces/<op>.yaml has them."""
    found: dict[str, Space] = resources.load_yaml("configs", "spaces", f"{op}.yaml")
    return found


def candidates(
    problem: Tunable, target: Target, variants: Sequence[Variant], spaces: Mapping[str, Space] | None = None
) -> list[Config]:
    """The legal configs to choose from, each different in its kernels or in how it cuts a sequence.

    First the default (of the variant that its own model says is fastest), then the other variants' defaults, then the
    product of each space in the order of `variants` and of the file. The same list wherever it is made. Empty where no
    variant accepts the problem; a variant without a space has its default alone. InvalidInput for a space that names an
    unknown tunable or rule.
    """
    spaces = load(problem.op) if spaces is None else spaces
    defaults = [(variant, variant.default(problem, target)) for variant in variants]
    ranked = sorted(
        defaults, key=lambda pair: (pair[0].measured_only, pair[0].cost(problem, target, pair[1]).time_us)
    )  # the call's default first
    of_uneven = [
        (variant, default) for variant, default in ranked
        if _for_uneven(problem, default) and variant.rejects(problem, target, default) is None
    ]  # fmt: skip
    ranked = [pair for pair in ranked if pair not in of_uneven[1:]]  # the cheapest of them stands for all
    found: dict[tuple[Any, ...], Config] = {}
    known: dict[Any, int] = {}
    seen = {variant.name: _Identity(problem, target, variant, default, known) for variant, default in defaults}
    for variant, config in itertools.chain(ranked, _products(problem, target, defaults, spaces)):
        if variant.rejects(problem, target, config) is None:
            found.setdefault(seen[variant.name].of(config), config)
    return list(found.values())


def _for_uneven(problem: Any, default: Config) -> bool:
    """Whether a variant balances uneven lengths and the problem's are even: then it is not tuned."""
    slotless = problem.SLOTTED and "num_kv_splits" not in default
    return slotless and problem.total_kv is None and problem.scheduler == "auto"


def _products(
    problem: Tunable, target: Target, defaults: Sequence[tuple[Variant, Config]], spaces: Mapping[str, Space]
) -> Iterator[tuple[Variant, Config]]:
    for variant, default in defaults:
        if _for_uneven(problem, default):
            continue
        if (space := spaces.get(variant.name)) is not None:
            for config in _product(problem, target, variant, default, space):
                yield variant, config


def pieces(problem: Any, target: Target, variant: Variant, config: Config) -> int:
    """Into how many pieces a sequence is cut; 1 if it is not. From the numbers that the kernels are given.

    All sequences are taken for equally long, as they are when a config is measured: `length` tokens.
    """
    numbers = variant.numbers(problem, target, config)
    if "num_splits" not in numbers:  # a host variant
        return config.int("num_kv_splits") if "num_kv_splits" in config else 1
    tiles = _tiles(problem, config)
    return -(-tiles // max(-(-tiles // numbers["num_splits"]), numbers["min_tiles"]))


def neighbours(config: Config, others: Iterable[Config], spaces: Mapping[str, Space]) -> list[Config]:
    """Those of the others, of the same variant, that differ from it in what one row of its space chooses; where there
    is none, as for a default with values that the space has not, in what as few rows do as may be."""
    rows = [str(names).split() for names in spaces.get(config.variant, ())]

    def differ(other: Config) -> int:
        left = {name for name, value in config.items() if other.get(name) != value}
        if 2 not in (config.get("num_kv_splits"), other.get("num_kv_splits")):
            left.discard("together")  # of no effect, and so spelt one way or the other
        count = sum(not left.isdisjoint(row) for row in rows)
        return count + len(left.difference(itertools.chain.from_iterable(rows)))

    apart = {other: differ(other) for other in others if other.variant == config.variant and other != config}
    least = min((count for count in apart.values() if count), default=0)
    return [other for other, count in apart.items() if 0 < count == least]


def first_kernel(config: Config) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """What of a config determines the first kernel: the variant, and tunables; `together` only with two splits."""
    items = tuple(item for item in config.items_ if item[0] not in _NOT_COMPILED)
    if config.get("together") and config["num_kv_splits"] == 2:
        items += (("together", True),)
    return config.variant, items


def length(problem: Tunable) -> int:
    """Tokens of a sequence: its share of the total, where the caller gave that, else the bound."""
    if problem.total_kv is None:
        return problem.max_kv_len
    return min(problem.max_kv_len, -(-problem.total_kv // max(1, problem.batch)))


def _tiles(problem: DecodeProblem, config: Config) -> int:
    return max(1, -(-length(problem) // config.int("block_n")))


Items = tuple[tuple[str, Value], ...]


def _parts(config: Config, names: Sequence[str]) -> tuple[Callable[[Items], Items], Callable[[Items], Items]]:
    """What gives, of the items of a config of this variant, those of these names, and the others. By place: all such
    configs have the same names, and thousands are asked."""

    def of(places: Sequence[int]) -> Callable[[Items], Items]:
        if len(places) > 1:
            return operator.itemgetter(*places)
        return lambda items: tuple([items[place] for place in places])

    mine = [place for place, name in enumerate(config) if name in names]
    return of(mine), of([place for place in range(len(config)) if place not in mine])


class _Identity:
    """What of a variant's configs makes a difference for a problem; configs of equal identity do the same work.

    The kernels stand for the tunables that are compiled in. Each part is asked for once: the first kernel does not
    depend on how partials are combined, nor the others on anything but that and, alike for all, on the first.
    """

    def __init__(
        self, problem: Tunable, target: Target, variant: Variant, default: Config, known: dict[Any, int]
    ) -> None:  # fmt: skip
        self.problem, self.target, self.variant, self.default = problem, target, variant, default
        self.known = known  # kernels by number, those of other variants too: a number is hashed more quickly
        self.parts: dict[Any, Any] = {}
        self.cut: dict[Any, Any] = {}  # by all of a config but its combine: the first kernel, the splits, pieces
        self.combine, self.but_combine = _parts(default, _COMBINED)[0], _parts(default, _COMBINE)[1]

    def of(self, config: Config) -> tuple[Any, ...]:
        if self.variant.host is not None:
            return (config,)
        if "num_kv_splits" not in config:  # no slots to cut a sequence into
            kernel = self._kernels(tuple([item for item in config.items_ if item[0] not in _NOT_COMPILED]))[0]
            return (kernel, tuple([item for item in config.items_ if item[0] in _NOT_COMPILED]))
        but_combine = self.but_combine(config.items_)
        if (found := self.cut.get(but_combine)) is None:
            # one, two and more may be of different kernels
            splits = ("num_kv_splits", min(3, config.int("num_kv_splits")))
            first = tuple([item for item in but_combine if item[0] not in _CUT])
            count = pieces(self.problem, self.target, self.variant, config)
            found = self.cut[but_combine] = self._kernels((*first, splits))[0], splits, count
        kernel, splits, count = found
        if count == 1:
            return (kernel, (), count)
        return (kernel, self._kernels((*self.combine(config.items_), splits))[1:], count)

    def _kernels(self, part: tuple[tuple[str, Value], ...]) -> tuple[Any, ...]:
        """Of the default with these values."""
        if part not in self.parts:
            changed = self.default.replace(**dict(part))
            sources = self.variant.sources(self.problem, self.target, changed)
            self.parts[part] = tuple([self.known.setdefault(source, len(self.known)) for source in sources])
        found: tuple[Any, ...] = self.parts[part]
        return found


def _product(problem: Any, target: Target, variant: Variant, default: Config, space: Space) -> Iterator[Config]:
    """The configs of one space, less those that the hints of the problem or its sizes make pointless."""
    rows = {tuple(names.split()): values for names, values in space.items()}
    if unknown := set(itertools.chain(*rows)) - set(default):
        raise InvalidInput(f"a space names {', '.join(sorted(unknown))}; {variant.name} has {', '.join(default)}")
    if not problem.SLOTTED:
        every = _choices(_changes(rows, target), default)
        tallest = max(min((config.int("block_m") for config in every), default=0), bucket(problem.q_len))
        yield from (config for config in every if config.int("block_m") <= tallest)
        return
    fixed = problem.num_kv_splits is not None or problem.batch_invariant  # these say how a sequence is cut
    splits = None if fixed else rows.get(("num_kv_splits",))
    least: dict[tuple[str, ...], Any] = {} if fixed else {n: v for n, v in rows.items() if n == ("min_tiles",)}
    least_tiles = _changes(least, target)
    combine_rows = {n: v for n, v in rows.items() if n[0] in _COMBINE}
    combine = _changes(combine_rows, target)
    compiled = {n: v for n, v in rows.items() if n[0] not in (*_CUT, *_COMBINE)}
    kernels = _choices(_changes(compiled, target), default)
    heights = sorted({config.int("block_m") for config in kernels})
    if "num_kv_splits" not in default:  # nothing is cut into slots
        yield from (kernel for kernel in kernels if kernel.int("block_m") in _useful(problem, heights)[-2:])
        return
    for kernel in kernels:
        if not _high_enough(problem, target, variant, kernel, heights):
            continue
        for count in _counts(problem, target, variant, kernel, splits):
            for config in (cut := kernel.replace(num_kv_splits=count), *_choices(least_tiles, cut)):
                n = pieces(problem, target, variant, config)
                if n == 1 or not combine_rows:
                    yield config
                    continue
                for change in combine:
                    if _combines(problem, target, config, change, n):
                        yield config.replace(**change)


def _combines(problem: Any, target: Target, config: Config, change: Mapping[str, Any], n: int) -> bool:
    """Whether the config's combine, so changed, is neither much too great for n pieces nor much too small."""
    if "combine_s" in config:
        held: int = change.get("combine_s") or config.int("combine_s")
        return held <= max(_LEAST_COMBINE, 2 * bucket(n)) and held * _MOST_ROUNDS >= n
    ahead: int = change.get("combine_ahead") or config.int("combine_ahead")
    if ahead == _LEAST_COMBINE:  # combine.ptx, of 256 threads with 8 columns each, takes any number
        return True
    heads, columns = (change.get(name) or config.int(name) for name in ("combine_h", "combine_d"))
    rows = problem.batch * problem.q_len * problem.num_heads
    programs = -(-rows // heads) * -(-problem.kv_lora_rank // columns)
    return n * heads * columns > 2048 * ahead // 2 and programs <= target.sms  # one an SM: it takes most registers


def _changes(rows: Mapping[tuple[str, ...], Any], target: Target) -> list[dict[str, Value]]:
    """Each combination of the rows' values; one that changes nothing where there are no rows."""
    values = [list(_values(names, row, target)) for names, row in rows.items()]
    return [{k: v for change in changes for k, v in change.items()} for changes in itertools.product(*values)]


def _choices(changes: Sequence[Mapping[str, Value]], start: Config) -> list[Config]:
    return [start.replace(**change) if change else start for change in changes]


def _values(names: tuple[str, ...], row: Any, target: Target) -> Iterator[dict[str, Value]]:
    """What a row of the file may set, as changes to a config; nothing where it leaves this target's backend out.

    InvalidInput for a row that is no list of values.
    """
    if isinstance(row, Mapping):
        row = row.get(target.triton[0] if target.triton else target.name, ())
    if not isinstance(row, Sequence) or isinstance(row, str):
        raise InvalidInput(f"the space's row {' '.join(names)!r} has no list of values for {target.name}: {row!r}")
    for value in row:
        together = value if len(names) > 1 else [value]
        if len(together) != len(names):
            raise InvalidInput(f"the space's row {' '.join(names)!r} wants {len(names)} values at once, not {value!r}")
        yield dict(zip(names, together, strict=True))


def _room(problem: DecodeProblem, target: Target, variant: Variant, config: Config) -> tuple[int, float]:
    """(programs without splits, programs that the device holds at once), by the variant's own `cost`."""
    cost = variant.cost(dataclasses.replace(problem, num_kv_splits=None), target, config.replace(num_kv_splits=1))
    return max(1, cost.programs), cost.programs / cost.waves


def _high_enough(
    problem: DecodeProblem, target: Target, variant: Variant, config: Config, heights: Sequence[int]
) -> bool:
    """Whether a block of so many rows may pay. None that is higher than all rows (rounded up) differs from the lowest
    that holds them. Of the others the two greatest may, on a GPU a lower one only where the next higher, cut into
    single tiles, gives the device less than it holds at once.
    """
    useful = _useful(problem, heights)
    height = config.int("block_m")
    if height not in useful or height in useful[-2:] or variant.host is not None:
        return height in useful
    programs, held = _room(problem, target, variant, config.replace(block_m=useful[useful.index(height) + 1]))
    return programs * _tiles(problem, config) < held


def _useful(problem: DecodeProblem, heights: Sequence[int]) -> list[int]:
    """Without those higher than all rows, rounded up, but the lowest."""
    return [h for h in heights if h <= max(heights[0], bucket(max(problem.rows, 1)))]


def _counts(problem: DecodeProblem, target: Target, variant: Variant, config: Config, row: Any) -> list[int]:
    """The numbers of splits, ascending: the row's, or by its rule; the config's own where there is no row."""
    if row is None:
        return [config.int("num_kv_splits")]
    if not isinstance(row, Mapping):
        return sorted({int(change["num_kv_splits"]) for change in _values(("num_kv_splits",), row, target)})
    if set(row) != {"fill"}:
        raise InvalidInput(f"num_kv_splits has no rule {', '.join(map(str, row))}; use a list or {{fill: […]}}")
    programs, held = _room(problem, target, variant, config)
    tiles = _tiles(problem, config)
    fills = {int(fill * held / programs) for fill in row["fill"]} | {math.ceil(max(row["fill"]) * held / programs)}
    if tiles * programs <= 2 * held:
        fills |= {-(-tiles // share) for share in (1, 2, 4)}
    return sorted({1, *(min(max(1, count), tiles) for count in fills)})
