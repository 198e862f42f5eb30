"""The search, on simulated times over real problems' candidates; and the model that ranks them, on measured times.

The simulated times share no formula with `heuristic`: their own rooflines, and random effects of each tunable.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from mla_jit import ops, target
from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.errors import InvalidInput
from mla_jit.problem import DecodeProblem
from mla_jit.tuning import heuristic, search, space

HOPPER = target.targets()["sm_90"]
VARIANTS = ops.variants("decode")
ROWS = {variant.name: variant for variant in VARIANTS}
NOISE = (0.015, 0.008, 0.004)  # standard deviation (log) of a measurement, by effort
# Wall time of a measurement by effort, in those of the shortest, and of compiling a kernel, several side by side.
COST, COMPILE = (1.0, 1.6, 4.0), 3.0


@dataclass(frozen=True)
class Measured:
    status: str = "ok"
    median_us: float | None = None
    spread_us: float | None = None
    note: str = ""


@dataclass
class Device:
    """Measures by a landscape: seeded noise for each measurement, a clock that its wall time moves, a log of calls."""

    time_us: Callable[[Config], float]
    seed: int = 0
    faulty: Callable[[Config], str | None] = lambda config: None
    noise: tuple[float, ...] = NOISE
    spread: float = 2.0  # of a measurement, in standard deviations of its median
    now: float = 0.0
    calls: list[tuple[Config, int]] = field(default_factory=list)
    interrupt_at: int | None = None
    met: Counter[tuple[Config, int]] = field(default_factory=Counter)

    def __call__(self, config: Config, effort: int) -> Measured:
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt
        nth = self.met[config, effort] = self.met[config, effort] + 1
        self.calls.append((config, effort))
        self.now += COST[effort]
        if (status := self.faulty(config)) is not None:
            return Measured(status, note="planted")
        rng = random.Random(f"{self.seed} {config.to_json()} {effort} {nth}")
        median = self.time_us(config) * math.exp(rng.gauss(0, self.noise[effort]))
        return Measured("ok", median, median * self.noise[effort] * self.spread)

    def clock(self) -> float:
        return self.now

    def seconds(self) -> float:
        """Wall time with the compiling of each kernel that was met."""
        first = {search._kernel(config) for config, _ in self.calls}
        second = {tuple(i for i in c.items_ if i[0].startswith("combine")) for c, _ in self.calls}
        return self.now + COMPILE * (len(first) + len(second))


def landscape(p: DecodeProblem, seed: int) -> Callable[[Config], float]:
    """A smooth cost: stream of tiles in waves, bandwidth, combine; each value of a tunable with a random effect."""
    drawn: dict[object, float] = {}

    def effect(*what: object, sigma: float = 0.1) -> float:
        if what not in drawn:
            drawn[what] = math.exp(abs(random.Random(f"{seed} {what}").gauss(0, sigma)))
        return drawn[what]

    def time_us(c: Config) -> float:
        n = space.pieces(p, HOPPER, ROWS[c.variant], c)
        block_m, block_n, warps = c.int("block_m"), c.int("block_n"), c.int("num_warps")
        blocks = -(-p.rows // block_m)
        programs = p.batch * blocks * n
        held = HOPPER.sms * (2 if warps == 4 and block_n == 32 else 1)
        waves = 0.7 * math.ceil(programs / held) + 0.3 * max(1.0, programs / held)
        tile = (0.3 + block_n * (0.012 + 0.0002 * block_m)) * (1.6 if block_m == 64 and warps == 4 else 1.0)
        for name, value in c.items_:
            if name not in ("num_kv_splits", "min_tiles", "combine_s", "combine_h", "combine_d"):
                tile *= effect(c.variant, name, value)
        tile *= effect(c.variant, block_n, warps, sigma=0.05) * effect(
            c.variant, block_n, c.get("num_stages"), sigma=0.05
        )
        stream = waves * (2.5 + -(-p.max_kv_len // (n * block_n)) * tile)
        memory = p.batch * p.max_kv_len * p.head_dim * 2 * (1 + 0.1 * (blocks - 1)) / 4.2e6
        total = 2 + (stream**4 + memory**4) ** 0.25
        if n > 1:
            h, d = c.int("combine_h"), c.int("combine_d")
            s, each = (c.int("combine_s"), 0.2) if "combine_s" in c else (max(8, 16384 // (h * d)), 0.7)
            grid = p.batch * -(-p.num_heads // h) * -(-p.kv_lora_rank // d)
            rounds = -(-n // s)
            total += 1.5 + (each * grid / HOPPER.sms + 0.8 * rounds**1.3 * effect("combine", s, h, d, sigma=0.2))
            total += p.batch * p.num_heads * n * 512 * 8 / 8e6
        return total

    return time_us


SHAPES = [
    (16, 1, 1024), (16, 1, 16384), (16, 1, 65536), (16, 4, 4096), (16, 16, 4096), (16, 64, 1024), (16, 64, 16384),
    (16, 128, 4096),
    (64, 1, 4096), (64, 4, 65536), (64, 16, 16384), (64, 64, 4096), (64, 128, 1024),
    (128, 1, 1024), (128, 1, 65536), (128, 4, 4096), (128, 16, 16384), (128, 64, 4096), (128, 64, 65536),
]  # fmt: skip


def problem(shape: tuple[int, int, int]) -> DecodeProblem:
    heads, batch, length = shape
    return DecodeProblem(num_heads=heads, batch=batch, max_kv_len=length)


_candidates: dict[DecodeProblem, list[Config]] = {}


def slotted(configs: list[Config]) -> list[Config]:
    """Those that cut a sequence into split slots."""
    return [c for c in configs if "num_kv_splits" in c]


def candidates(p: DecodeProblem) -> list[Config]:
    if p not in _candidates:
        _candidates[p] = space.candidates(p, HOPPER, VARIANTS)
    return _candidates[p]


def tune(p: DecodeProblem, device: Device, **keywords: object) -> search.Outcome:
    found = keywords.pop("candidates", None) or candidates(p)
    arguments = {"budget_s": 1e9, "clock": device.clock, **keywords}
    return search.tune(p, HOPPER, found, device, **arguments)  # type: ignore[arg-type]


def test_auto_comes_near_the_optimum_at_a_fifth_of_the_cost() -> None:
    """`pytest -s` shows the table."""
    rows = []
    for seed, shape in enumerate(SHAPES):
        p = problem(shape)
        time_us = landscape(p, seed)
        true = {c: time_us(c) for c in candidates(p)}
        best = min(true.values())
        device = Device(true.__getitem__, seed)
        outcome = tune(p, device)
        yardstick = Device(true.__getitem__, seed)
        every = tune(p, yardstick, search="exhaustive", rank=lambda config: 1.0)
        assert outcome.stopped == every.stopped == "done"
        assert every.explored == len(true) == outcome.explored + outcome.skipped
        rows.append(
            (
                shape, len(true), statistics.median(true.values()) / best, best / true[outcome.winner],
                best / true[candidates(p)[0]], best / true[every.winner], outcome.explored / len(true),
                device.now / yardstick.now, device.seconds() / yardstick.seconds(),
            )
        )  # fmt: skip
    reached = [row[3] for row in rows]
    mean = math.exp(statistics.fmean(map(math.log, reached)))
    lines = ["shape, candidates, median ÷ best; best ÷ auto, default, exhaustive; explored; cost, with compiling"]
    lines += [" ".join([str(row[0]), str(row[1]), *(f"{value:.3f}" for value in row[2:])]) for row in rows]
    lines.append(
        f"auto: geometric mean {mean:.4f}, worst {min(reached):.4f}; cost: "
        f"mean {statistics.fmean(r[7] for r in rows):.3f}, greatest {max(r[7] for r in rows):.3f}; "
        f"mean with compiling {statistics.fmean(r[8] for r in rows):.3f}"
    )
    sys.stdout.write("\n".join(["", *lines, ""]))
    assert len(rows) >= 16
    assert all(row[1] >= 300 for row in rows)
    assert mean >= 0.98
    assert min(reached) >= 0.94
    assert max(row[6] for row in rows) <= 0.15
    assert max(row[7] for row in rows) <= 0.20
    assert statistics.fmean(row[8] for row in rows) <= 0.20


SMALL = problem((16, 4, 4096))


def small(seed: int = 0, **keywords: object) -> Device:
    return Device(landscape(SMALL, seed), seed, **keywords)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", search.SEARCHES)
def test_planted_faults_never_win_and_are_named(how: str) -> None:
    """The fastest candidates, and a tenth of all others, end in every kind of fault."""
    time_us = landscape(SMALL, 3)
    order = sorted(candidates(SMALL), key=time_us)
    kinds = ("wrong", "nan", "illegal_access", "hang", "compiler_abort", "too_many_resources", "out_of_memory")
    planted = dict(zip([*order[:8], *order[8::10]], itertools.cycle(kinds), strict=False))
    device = small(3, faulty=planted.get)
    outcome = tune(SMALL, device, search=how)
    assert outcome.winner not in planted
    assert outcome.stopped == "done"
    met = {config for config, _ in device.calls} & set(planted)
    assert met
    assert {config: status for config, status, _ in outcome.faults} == {config: planted[config] for config in met}
    assert all(note == "planted" for *_, note in outcome.faults)
    assert all(device.calls.count((config, effort)) <= 1 for config in met for effort in range(3))
    assert time_us(order[8]) / time_us(outcome.winner) >= 0.94


def test_a_candidate_that_fails_in_the_playoff_does_not_win() -> None:
    device = small()
    first = tune(SMALL, device).winner

    class Late(Device):
        def __call__(self, config: Config, effort: int) -> Measured:
            found = super().__call__(config, effort)
            return Measured("hang", note="late") if config == first and effort == 2 else found

    outcome = tune(SMALL, Late(landscape(SMALL, 0)))
    assert outcome.winner != first
    assert outcome.faults == ((first, "hang", "late"),)


def test_a_time_that_is_no_number_is_a_fault() -> None:
    default = candidates(SMALL)[0]

    class Strange(Device):
        def __call__(self, config: Config, effort: int) -> Measured:
            found = super().__call__(config, effort)
            return Measured("ok", math.nan, 0.0) if config == default else found

    outcome = tune(SMALL, Strange(landscape(SMALL, 0)))
    assert outcome.winner != default
    assert outcome.default_us is None
    assert [fault[:2] for fault in outcome.faults] == [(default, "error")]


def test_where_nothing_runs_the_default_is_the_answer() -> None:
    outcome = tune(SMALL, small(faulty=lambda config: "compile_error"))
    assert (outcome.winner, outcome.median_us, outcome.runner_up) == (candidates(SMALL)[0], None, None)
    assert outcome.why.startswith("the default, unmeasured: none of")


@pytest.mark.parametrize("how", search.SEARCHES)
@pytest.mark.parametrize("budget", [0.5, 1, 5, 20.5, 60, 90, 300])
def test_the_budget_is_honoured_and_the_best_so_far_kept(how: str, budget: float) -> None:
    device = small(5)
    outcome = tune(SMALL, device, search=how, budget_s=budget)
    assert device.now < budget + max(COST)
    assert outcome.seconds == device.now
    if outcome.stopped == "budget":
        assert "the budget is spent" in outcome.why
        assert device.now >= budget
    assert outcome.explored == len({config for config, _ in device.calls})
    measured = {config: found.median_us for config, _, found in outcome.trials}
    assert outcome.winner in measured
    assert device.time_us(outcome.winner) <= 1.05 * min(map(device.time_us, measured))
    assert outcome.default_us is not None


def test_no_budget_leaves_the_default_unmeasured() -> None:
    device = small()
    outcome = tune(SMALL, device, budget_s=0)
    assert device.calls == []
    assert (outcome.winner, outcome.median_us, outcome.stopped) == (candidates(SMALL)[0], None, "budget")
    assert outcome.skipped == len(candidates(SMALL))
    assert outcome.why == "the default, unmeasured: nothing was measured; the budget is spent"


@pytest.mark.parametrize("at", [0, 1, 2, 40, -20, -14, -7, -3, -1])
def test_an_interrupt_keeps_the_best_so_far(at: int) -> None:
    """Negative: so many measurements before the end."""
    if at < 0:
        whole = small(7)
        tune(SMALL, whole)
        at += len(whole.calls)
    device = small(7, interrupt_at=at)
    outcome = tune(SMALL, device)
    assert outcome.stopped == "interrupted"
    assert len(device.calls) == at
    assert outcome.explored == len({config for config, _ in device.calls})
    if at == 0:
        assert outcome.median_us is None
    else:
        seen = [device.time_us(config) for config, _ in device.calls]
        assert device.time_us(outcome.winner) <= 1.05 * min(seen)
        assert "interrupted" in outcome.why
    assert outcome.default_us is not None or at == 0


def test_ties_go_to_the_fewest_splits_then_the_first_by_json_in_any_order() -> None:
    """All candidates take as long, but for noise; the same wins however they are ordered."""
    found = slotted(candidates(SMALL))[:40]
    fewest = min(c.int("num_kv_splits") for c in found)
    expected = min((c for c in found if c["num_kv_splits"] == fewest), key=Config.to_json)
    for seed in range(5):
        shuffled = random.Random(seed).sample(found, len(found))
        device = Device(lambda config: 20.0, seed, noise=(0.0, 0.0, 0.0))
        outcome = tune(SMALL, device, candidates=shuffled, default=found[0], search="exhaustive")
        finalists = {config for config, effort, _ in outcome.trials if effort == search.PLAYOFF}
        assert outcome.winner == min(finalists, key=lambda c: (c["num_kv_splits"], c.to_json()))
        assert outcome.median_us == 20.0
    few = [expected, *(c for c in found if c != expected)][:3]
    for seed, order in itertools.product(range(5), itertools.permutations(few)):
        # What is taken for noise is a quarter of the spread: six standard deviations, so that no draw is outside of it.
        device = Device(lambda config: 20.0, seed, noise=(0.015, 0.008, 0.001), spread=24.0)
        outcome = tune(SMALL, device, candidates=list(order), default=found[0])
        assert outcome.winner == min({*few, found[0]}, key=lambda c: (c["num_kv_splits"], c.to_json()))


def test_a_shuffled_list_of_candidates_changes_nothing() -> None:
    found = candidates(SMALL)
    outcomes = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(found, len(found))
        outcomes.append(tune(SMALL, small(2), candidates=shuffled, default=found[0]))
    assert outcomes[0] == outcomes[1] == outcomes[2] == tune(SMALL, small(2))


def test_a_clear_gap_is_no_tie() -> None:
    """Outside of the noise the faster wins, however many its splits."""
    found = sorted(slotted(candidates(SMALL))[:10], key=lambda c: c["num_kv_splits"])
    fast = found[-1]
    device = Device(lambda c: 19.0 if c == fast else 20.0, noise=(0.01, 0.01, 0.01))
    outcome = tune(SMALL, device, candidates=found)
    assert outcome.winner == fast
    assert outcome.runner_up is not None
    assert outcome.runner_up[1] == pytest.approx(20.0, rel=0.03)
    assert "the fastest" in outcome.why


def test_default_and_incumbent_are_in_the_playoff_whatever_their_time() -> None:
    time_us = landscape(SMALL, 1)
    order = sorted(candidates(SMALL), key=time_us)
    for default, incumbent in ((order[-1], order[-2]), (order[-1], None), (order[0], order[0]), (order[3], order[-1])):
        device = small(1)
        outcome = tune(SMALL, device, default=default, incumbents=[] if incumbent is None else [incumbent])
        assert {default, incumbent or default} <= {config for config, effort, _ in outcome.trials if effort == 2}
        assert device.calls[0] == (default, 0)
        assert outcome.default_us == pytest.approx(time_us(default), rel=0.02)
        assert time_us(order[0]) / time_us(outcome.winner) >= 0.94


def test_an_incumbent_that_is_no_candidate_may_win() -> None:
    found = candidates(SMALL)
    rest = [c for c in found if c != found[5]]
    outcome = tune(SMALL, Device(lambda c: 5.0 if c == found[5] else 9.0), candidates=rest, incumbents=[found[5]])
    assert outcome.winner == found[5]


def test_the_playoff_goes_there_and_back_and_is_one_trial_each() -> None:
    device = small(4)
    outcome = tune(SMALL, device)
    runs = [config for config, effort in device.calls if effort == 2]
    assert runs == runs[::-1]
    assert len(set(runs)) == len(runs) / 2 >= 3
    trials = {config: found for config, effort, found in outcome.trials if effort == 2}
    assert len(trials) == len(set(runs))
    assert len(outcome.trials) == len({(config, effort) for config, effort, _ in outcome.trials})
    winner = trials[outcome.winner]
    assert (outcome.median_us, outcome.spread_us) == (winner.median_us, winner.spread_us)


def test_a_resumed_search_measures_nothing_again() -> None:
    first = tune(SMALL, small(6))
    done = {(config, effort): found for config, effort, found in first.trials}
    device = small(6)
    again = tune(SMALL, device, done=done)
    assert device.calls == []
    assert (again.winner, again.median_us, again.runner_up) == (first.winner, first.median_us, first.runner_up)
    assert dict.fromkeys(again.trials) == dict.fromkeys(first.trials)


@pytest.mark.parametrize("at", [1, 30, 75, 82, 87])
def test_a_stopped_search_goes_on_where_it_was(at: int) -> None:
    whole = tune(SMALL, small(6))
    before = small(6, interrupt_at=at)
    stopped = tune(SMALL, before)
    after = small(6)
    resumed = tune(SMALL, after, done={(config, effort): found for config, effort, found in stopped.trials})
    assert not set(before.calls) & set(after.calls)
    assert resumed.stopped == "done"
    assert after.time_us(whole.winner) / after.time_us(resumed.winner) == pytest.approx(1, abs=0.02)


def test_known_faults_are_not_run_again() -> None:
    time_us = landscape(SMALL, 0)
    bad = min(candidates(SMALL), key=time_us)
    device = small()
    outcome = tune(SMALL, device, done={(bad, 0): Measured("hang", note="before")}, incumbents=[bad])
    assert bad not in {config for config, _ in device.calls}
    assert (bad, "hang", "before") in outcome.faults
    assert outcome.winner != bad


def test_events_tell_what_a_progress_bar_and_a_compiler_need() -> None:
    events: list[tuple[str, dict[str, object]]] = []
    device = small()
    outcome = tune(SMALL, device, on_event=lambda name, data: events.append((name, data)))
    names = [name for name, _ in events]
    assert names[0] == "start"
    assert names[-1] == "done"
    assert events[-1][1]["outcome"] is outcome
    assert events[0][1]["candidates"] == len(candidates(SMALL))
    assert abs(events[0][1]["planned"] - len(device.calls)) <= 6  # type: ignore[operator]
    announced: set[tuple[object, object]] = set()
    trials = []
    for name, data in events:
        if name == "shortlist":
            announced |= {(config, data["effort"]) for config in data["configs"]}  # type: ignore[attr-defined]
        elif name in ("trial", "pass"):
            assert (data["config"], data["effort"]) in announced
        if name == "trial":
            trials.append((data["config"], data["effort"], data["measurement"]))
    assert trials == list(outcome.trials)


def test_what_auto_begins_with_is_known_before_it() -> None:
    """So that it is compiled early: the default, and what the first batch takes of each group."""
    for shape in SHAPES[::4]:
        p = problem(shape)
        early = search.first(p, HOPPER, candidates(p))
        announced: list[Config] = []

        def listen(name: str, data: dict[str, Any], announced: list[Config] = announced) -> None:
            if name == "shortlist" and not announced:
                announced.extend(data["configs"])

        device = Device(landscape(p, 0))
        tune(p, device, on_event=listen)
        assert early[0] == candidates(p)[0]
        assert announced == early
        assert set(early) <= {config for config, _ in device.calls[: 2 * len(early) + 1]}
        assert len({search._group(config) for config in early[1:]}) == len(early) - 1


def test_each_first_kernel_is_there_once_in_the_order_of_its_best() -> None:
    found = search.kernels(SMALL, HOPPER, candidates(SMALL))
    assert [search._kernel(c) for c in found] == list(dict.fromkeys(map(search._kernel, found)))
    assert {search._kernel(c) for c in found} == {search._kernel(c) for c in candidates(SMALL)}
    times = [heuristic.predicted_us(SMALL, HOPPER, ROWS[c.variant], c) for c in found]
    assert times == sorted(times)
    for config, time_us in zip(found, times, strict=True):
        alike = [c for c in candidates(SMALL) if search._kernel(c) == search._kernel(config)]
        assert time_us == min(heuristic.predicted_us(SMALL, HOPPER, ROWS[c.variant], c) for c in alike)


def test_a_config_each_is_there_of_all_kernels_that_results_are_combined_with() -> None:
    def kernels(configs: list[Config]) -> set[Source]:
        return {source for c in configs for source in ROWS[c.variant].sources(SMALL, HOPPER, c)}

    found = search.both_kernels(SMALL, HOPPER, candidates(SMALL))
    missing = kernels(candidates(SMALL)) - kernels(found)  # those for other numbers of pieces
    assert {source.name for source in missing} == {"decode_combine_asm", "decode_splitk_triton_combine"}
    few = kernels(search.kernels(SMALL, HOPPER, candidates(SMALL)))
    assert len(missing) < len(kernels(candidates(SMALL)) - few)
    assert len(found) < len(candidates(SMALL)) / 4


def test_how_many_are_measured_grows_with_how_many_there_are() -> None:
    counts = [search._count(n) for n in range(1, 3001)]
    assert counts == sorted(counts)
    assert counts[:16] == list(range(1, 17))  # few are all measured
    assert all(16 <= count <= 130 for count in counts[16:])


def test_an_auto_search_compiles_no_more_kernels_than_are_planned_for() -> None:
    for seed, shape in enumerate(SHAPES):
        device = Device(landscape(problem(shape), seed), seed)
        tune(problem(shape), device)
        most = search.compiled(problem(shape), candidates(problem(shape)))
        assert len({search._kernel(config) for config, _ in device.calls}) <= most


@pytest.mark.parametrize("how", search.SEARCHES)
def test_configs_are_measured_in_the_order_in_which_they_are_compiled(how: str) -> None:
    """`ready` gives them in its own order, and is told how long it may wait."""
    device, given, seconds = small(3), [], []

    def ready(configs: Sequence[Config], left_s: float) -> list[Config]:
        order = sorted(configs, key=Config.to_json, reverse=True)
        given.append(order)
        seconds.append((left_s, device.now))
        return order

    outcome = tune(SMALL, device, search=how, ready=ready, budget_s=5000.0)
    assert [config for config, effort in device.calls if effort < search.PLAYOFF] == list(itertools.chain(*given))
    assert all(left_s + now == 5000.0 for left_s, now in seconds)
    assert outcome.stopped == "done"
    plain = tune(SMALL, small(3), search=how)
    assert set(plain.trials) == set(outcome.trials)
    assert outcome.winner == plain.winner


def test_what_is_never_compiled_is_not_measured() -> None:
    """Where the time is up before a compiler is done, it is left to the budget."""
    refused = set(candidates(SMALL)[1:])
    device = small(3)
    outcome = tune(SMALL, device, ready=lambda configs, left_s: [c for c in configs if c not in refused])
    assert {config for config, _ in device.calls} == {candidates(SMALL)[0]}
    assert outcome.winner == candidates(SMALL)[0]


def test_a_wrong_rank_costs_no_more_than_the_rest_of_the_share() -> None:
    """With a rank turned upside down, what was measured still leads to something better than the default."""
    time_us = landscape(SMALL, 8)
    outcome = tune(SMALL, small(8), rank=lambda config: 1e3 / time_us(config))
    assert outcome.explored <= 0.15 * len(candidates(SMALL))
    assert time_us(outcome.winner) <= time_us(candidates(SMALL)[0])


def test_mistakes_are_said() -> None:
    with pytest.raises(InvalidInput, match="use auto or exhaustive"):
        tune(SMALL, small(), search="best")
    with pytest.raises(InvalidInput, match="no variant accepts it"):
        search.tune(SMALL, HOPPER, [], small(), budget_s=1)


def test_host_variants_are_searched_too() -> None:
    where, p = target.targets()["cpu"], DecodeProblem(num_heads=16, batch=2, max_kv_len=2048)
    found = space.candidates(p, where, VARIANTS)
    best = found[17]
    device = Device(lambda c: 10.0 + sum(v != best[n] for n, v in c.items_))
    every = search.tune(p, where, found, device, budget_s=1e9, clock=device.clock, search="exhaustive")
    assert every.winner == best
    auto = search.tune(p, where, found, device, budget_s=1e9, clock=device.clock)
    assert auto.explored < every.explored
    assert device.time_us(auto.winner) <= 11.0


# Times on one H200, µs, bf16, page 64: of the default for a capacity of 131072 tokens, at lengths of 1024, 4096, 16384,
# 65536, with these tunables changed. (heads, batch): changes, times.
SWEEP: dict[tuple[int, int], list[tuple[dict[str, int], tuple[float, ...]]]] = {
    (16, 1): [
        ({"combine_s": 128, "combine_h": 1, "combine_d": 64}, (8.76, 10.43, 15.86, 30.86)),
        ({"combine_s": 16, "combine_h": 1, "combine_d": 512}, (8.77, 12.99, 24.98, 40.16)),
        ({"combine_s": 8, "combine_h": 1, "combine_d": 128}, (9.13, 14.53, 62.7, 78.3)),
        ({"min_tiles": 2}, (10.86, 12.25, 15.8, 30.98)),
        ({"num_stages": 2}, (8.65, 10.24, 17.06, 38.99)),
        ({"block_n": 32}, (8.7, 11.1, 17.2, 39.4)),
    ],
    (16, 4): [
        ({"combine_s": 16, "combine_h": 1, "combine_d": 512}, (10.14, 15.95, 31.77)),
        ({"combine_s": 32, "combine_h": 1, "combine_d": 128}, (11.38, 15.75, 31.67)),
        ({"combine_s": 4, "combine_h": 4, "combine_d": 512}, (14.99, 25.39, 41.02)),
        ({"combine_s": 8, "combine_h": 1, "combine_d": 128}, (12.52, 18.29, 43.93)),
    ],
    (128, 1): [
        ({"combine_s": 64, "combine_h": 1, "combine_d": 64}, (16.17, 18.71, 24.45, 46.36)),
        ({"combine_s": 32, "combine_h": 1, "combine_d": 64}, (14.65, 19.29, 24.96, 46.94)),
        ({"combine_s": 16, "combine_h": 1, "combine_d": 512}, (13.33, 22.08, 27.41, 49.06)),
        ({"combine_s": 8, "combine_h": 1, "combine_d": 128}, (16.69, 45.15, 50.79, 73.91)),
    ],
}  # fmt: skip
# The README's table: (length, heads, batch): µs of the default for that capacity.
TABLE = {
    (1024, 16, 1): 8.7, (1024, 16, 16): 15.1, (1024, 16, 128): 46.1, (1024, 64, 4): 14.6, (1024, 64, 64): 40.9,
    (1024, 128, 1): 14.7, (1024, 128, 16): 25.0, (1024, 128, 128): 77.5, (4096, 16, 1): 10.3, (4096, 16, 16): 30.2,
    (4096, 16, 128): 152.9, (4096, 64, 4): 20.4, (4096, 64, 64): 96.8, (4096, 128, 1): 19.5, (4096, 128, 16): 46.1,
    (4096, 128, 128): 241.2, (16384, 16, 4): 31.6, (16384, 16, 64): 298.1, (16384, 64, 1): 20.3, (16384, 64, 16): 91.5,
    (16384, 128, 4): 44.1, (16384, 128, 64): 457.9, (65536, 16, 1): 30.6, (65536, 16, 16): 297.5, (65536, 64, 4): 93.8,
    (65536, 128, 1): 48.6, (65536, 128, 16): 472.3,
}  # fmt: skip


def served(heads: int, batch: int, length: int, **changes: int) -> tuple[DecodeProblem, Config]:
    variant = ROWS["decode_splitk_triton" if heads == 16 else "decode_splitk_gluon"]
    default = variant.default(DecodeProblem(num_heads=heads, batch=batch, max_kv_len=131072), HOPPER)
    return DecodeProblem(num_heads=heads, batch=batch, max_kv_len=length), default.replace(**changes)


def predicted(p: DecodeProblem, config: Config) -> float:
    return heuristic.predicted_us(p, HOPPER, ROWS[config.variant], config)


def test_the_model_orders_what_was_measured() -> None:
    """Of pairs of configs for one problem whose times differ by a tenth, nearly all are ordered right."""
    right = wrong = 0
    for (heads, batch), rows in SWEEP.items():
        for i, length in enumerate((1024, 4096, 16384, 65536)[: len(rows[0][1])]):
            at = [(times[i], predicted(*served(heads, batch, length, **changes))) for changes, times in rows]
            for (a, x), (b, y) in itertools.combinations(at, 2):
                if max(a, b) >= 1.1 * min(a, b):
                    right, wrong = right + ((a < b) == (x < y)), wrong + ((a < b) != (x < y))
    assert right + wrong >= 60
    assert right >= 0.9 * (right + wrong), (right, wrong)


def test_the_model_is_near_the_measured_times_of_defaults() -> None:
    errors = [predicted(*served(h, b, n)) / us for (n, h, b), us in TABLE.items()]
    assert statistics.fmean(abs(math.log(e)) for e in errors) < 0.12
    assert max(abs(math.log(e)) for e in errors) < 0.3


@pytest.mark.parametrize("name", ["sm_80", "sm_120", "gfx942", "gfx950", "cpu"])
def test_the_model_gives_every_candidate_of_every_target_a_time(name: str) -> None:
    where = target.targets()[name]
    for fields in ({"num_heads": 16}, {"num_heads": 128, "batch": 64, "rope_dim": 0}, {"num_heads": 20, "q_len": 3}):
        p = DecodeProblem(**fields)  # type: ignore[arg-type]
        times = [heuristic.predicted_us(p, where, ROWS[c.variant], c) for c in space.candidates(p, where, VARIANTS)]
        assert all(0 < t < 1e7 for t in times)
        assert len(set(times)) >= min(8, len(times) / 4)
