"""Sweeps on devices that do not exist: what is tuned, what is stored, how several share it, how it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mla_jit import models, ops, plan, settings, target
from mla_jit.compile import farm
from mla_jit.compile.artifact import Source
from mla_jit.config import Config
from mla_jit.errors import CompilerAborted, InvalidInput
from mla_jit.problem import DecodeProblem, PrefillProblem
from mla_jit.tuning import builds, search, space, store, sweep
from mla_jit.tuning.rows import Measurement
from mla_jit.tuning.stand import timed_lengths

CPU = target.targets()["cpu"]
HOPPER = target.targets()["sm_90"]
DEEPSEEK, KIMI = models.by_name("deepseek-v3"), models.by_name("kimi-k2")


class Bench:
    """Times each config by its own text; some of them fail."""

    def __init__(self, faulty: str = "", stop_after: int | None = None, stop: threading.Event | None = None):
        self.asked: list[tuple[str, DecodeProblem, Config]] = []
        self.rounds: list[tuple[Config, int]] = []
        self.faulty, self.stop_after, self.stop = faulty, stop_after, stop

    def measure(
        self,
        device: str,
        problem: DecodeProblem,
        config: Config,
        *,
        rounds: int,
        window_ms: float,
        timeout_s: float,
        prepare_s: float = 300.0,
    ) -> Measurement:
        self.asked.append((device, problem, config))
        self.rounds.append((config, rounds))
        if self.stop is not None and len(self.asked) == self.stop_after:
            self.stop.set()
        if self.faulty and self.faulty in str(config):
            return Measurement("wrong", note="rel L2 0.5")
        return Measurement("ok", us(config), 0.01, 2e-3)

    def start(self, device: str) -> None:
        pass

    def versions(self, device: str) -> dict[str, str]:
        return {"torch": "0.0", "driver": f"of {device}"}


def us(config: Config) -> float:
    return 10.0 + sum(map(ord, config.to_json())) % 97


@pytest.fixture
def database(tmp_path: Path) -> Iterator[store.Store]:
    with store.Store(tmp_path / "tuning.db") as opened:
        yield opened


def problems(*batches: int) -> list[DecodeProblem]:
    base = DecodeProblem(
        num_heads=4, kv_lora_rank=64, rope_dim=16, q_dtype="fp32", kv_dtype="fp32", out_dtype="fp32", max_kv_len=256,
        hinted=True,
    )  # fmt: skip
    return [dataclasses.replace(base, batch=batch) for batch in batches]


def run(wanted: list[DecodeProblem], bench: Bench, opened: store.Store, **more: object) -> list[sweep.Finished]:
    options = {"budget_s": 60.0, "devices": ["cpu"], "where": CPU, **more}
    devices, where = options.pop("devices"), options.pop("where")
    return list(sweep.run(wanted, where, devices, bench, opened, **options))  # type: ignore[arg-type]


def test_models_with_the_same_local_heads_share_their_shapes() -> None:
    one = sweep.shapes([(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"])
    both = sweep.shapes([(DEEPSEEK, 8), (KIMI, 4)], HOPPER, dtypes=["bf16"])  # 128 / 8 and 64 / 4 heads
    assert len(one) == 5 * 4
    assert both == one


def test_shapes_that_do_not_fit_are_left_out() -> None:
    fits = sweep.shapes([(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], memory_bytes=16 * 4096 * 576 * 2)
    assert {(p.batch, p.max_kv_len) for p in fits} == {
        (batch, kv) for batch in (1, 4, 16, 64, 128) for kv in (1024, 4096, 16384, 65536) if batch * kv <= 16 * 4096
    }


def test_the_best_config_is_stored_and_then_chosen(database: store.Store) -> None:
    (problem,) = wanted = problems(2)
    (done,) = run(wanted, Bench(), database, how="exhaustive")
    assert done.outcome is not None
    best = min(sweep.candidates(problem, CPU), key=lambda c: (us(c), c.to_json()))
    assert us(done.outcome.winner) == us(best)
    assert done.outcome.stopped == "done"
    rows = list(database.trials(problem=problem))
    assert {row.config for row in rows} == set(sweep.candidates(problem, CPU))
    assert [row.config for row in database.best()] == [done.outcome.winner]
    with settings.scope(tuning_db=database.path):
        plan.forget()
        choice = plan.choose(problem, CPU)
    plan.forget()
    assert (choice.config, choice.provenance) == (done.outcome.winner, "measured")


def test_what_is_wrong_never_wins_and_is_stored_with_its_reason(database: store.Store) -> None:
    (problem,) = wanted = problems(2)
    fastest = min(sweep.candidates(problem, CPU), key=us)
    (done,) = run(wanted, Bench(faulty=str(fastest)), database, how="exhaustive")
    assert done.outcome is not None
    assert done.outcome.winner != fastest
    assert (fastest, "wrong", "rel L2 0.5") in done.outcome.faults
    assert {(t.config, t.status) for t in database.trials(status="wrong")} == {(fastest, "wrong")}


def test_devices_share_the_shapes_and_a_shape_stays_on_one(database: store.Store) -> None:
    bench = Bench()
    wanted = problems(1, 2, 3, 4, 5, 6)
    done = run(wanted, bench, database, devices=["null:0", "null:1", "null:2"])
    assert sorted(d.problem.batch for d in done) == [1, 2, 3, 4, 5, 6]
    for each in done:
        assert {device for device, problem, _ in bench.asked if problem == each.problem} == {each.device}
    assert len({d.device for d in done}) > 1


def test_a_finished_sweep_measures_nothing_again(database: store.Store) -> None:
    wanted = problems(1, 2)
    run(wanted, Bench(), database)
    before = len(list(database.trials()))
    again = Bench()
    done = run(wanted, again, database)
    assert [d.outcome for d in done] == [None, None]
    assert again.asked == []
    assert len(list(database.trials())) == before
    run(wanted[:1], again, database, resume=False)
    assert again.asked


def test_a_stopped_sweep_goes_on_where_it_was(database: store.Store) -> None:
    wanted = problems(2)
    stop = threading.Event()
    first = Bench(stop_after=3, stop=stop)
    done = run(wanted, first, database, how="exhaustive", stop=stop)
    assert [d.outcome.stopped for d in done if d.outcome] == ["interrupted"]
    stored = {(t.config, sweep.EFFORTS[t.effort][0]) for t in database.trials()}
    default = sweep.candidates(wanted[0], CPU)[0]
    assert {t.default_us for t in database.trials()} == {us(default)}
    assert len(stored) == 3
    second = Bench()
    (finished,) = run(wanted, second, database, how="exhaustive")
    assert finished.outcome is not None
    assert finished.outcome.stopped == "done"
    assert stored.isdisjoint(second.rounds)
    assert {config for config, _ in (*stored, *second.rounds)} == set(sweep.candidates(wanted[0], CPU))


@pytest.mark.parametrize("before_the_end", [1, 3, 5, 7])
def test_a_playoff_that_was_stopped_is_no_finished_shape(before_the_end: int, database: store.Store) -> None:
    wanted = problems(2)
    with store.Store(database.path.with_name("other.db")) as other:
        whole = Bench()
        run(wanted, whole, other)
    assert whole.rounds[-before_the_end][1] == sweep.EFFORTS[sweep.LAST][0]
    stop = threading.Event()
    bench = Bench(stop_after=len(whole.asked) - before_the_end, stop=stop)
    run(wanted, bench, database, stop=stop)
    (done,) = run(wanted, Bench(), database)
    assert done.outcome is not None
    assert done.outcome.stopped == "done"


def test_without_time_the_default_is_left_as_it_is(database: store.Store) -> None:
    bench = Bench()
    (done,) = run(problems(2), bench, database, budget_s=0.0)
    assert done.outcome is not None
    assert (done.outcome.stopped, bench.asked, list(database.trials())) == ("budget", [], [])


def test_inputs_may_take_what_is_left_of_the_budget(database: store.Store) -> None:
    class Large(Bench):
        def measure(self, *arguments: object, prepare_s: float, **more: object) -> Measurement:
            assert 0 < prepare_s <= 60.0
            raise TimeoutError(f"inputs and reference take more than {prepare_s:g} s")

    for done in run(problems(2, 3), Large(), database):
        assert done.outcome is not None
        assert (done.outcome.stopped, done.outcome.median_us, done.outcome.faults) == ("budget", None, ())
    assert list(database.trials()) == []


def test_an_error_of_the_bench_itself_reaches_the_caller(database: store.Store) -> None:
    class Broken(Bench):
        def measure(self, *arguments: object, **more: object) -> Measurement:
            raise OSError("no worker")

    with pytest.raises(OSError, match="no worker"):
        run(problems(1, 2), Broken(), database)


def of_lengths(*lengths: int, batch: int = 2) -> list[DecodeProblem]:
    return [dataclasses.replace(p, max_kv_len=n) for n in lengths for p in problems(batch)]


def test_the_best_of_other_lengths_are_timed_at_each_length(database: store.Store) -> None:
    """So that a call without hints can be given the config with the best worst case."""

    class ByLength(Bench):
        def measure(self, device: str, problem: DecodeProblem, config: Config, **more: Any) -> Measurement:
            found = super().measure(device, problem, config, **more)
            slower = abs(math.log2(config.int("num_kv_splits")) - math.log2(problem.max_kv_len / 256))
            assert found.median_us is not None
            return dataclasses.replace(found, median_us=found.median_us * (1 + 20 * slower))

    wanted = of_lengths(256, 1024, 2048)
    done = run([*wanted, *problems(3)], ByLength(), database)
    winners = {d.problem: d.outcome.winner for d in done if d.outcome is not None}
    assert len({winners[p].int("num_kv_splits") for p in wanted}) == 3
    timed = {p: {t.config for t in database.trials(problem=p, effort=sweep.LAST)} for p in winners}
    for problem in wanted:
        assert timed[problem] >= {winners[p] for p in wanted}
    for row in database.trials(effort=sweep.LAST):
        assert (row.torch, row.driver) == ("0.0", "of cpu")
    unhinted = dataclasses.replace(wanted[-1], hinted=False)
    with settings.scope(tuning_db=database.path):
        plan.forget()
        choice = plan.choose(unhinted, CPU)
    plan.forget()
    assert "steady over kv 256, 1024, 2048" in choice.why
    again = ByLength()
    run([*wanted, *problems(3)], again, database)
    assert again.asked == []
    (longer,) = later = of_lengths(4096)  # another sweep, over one more length
    (done_,) = run(later, ByLength(), database)
    assert done_.outcome is not None
    timed = {p: {t.config for t in database.trials(problem=p, effort=sweep.LAST)} for p in (*wanted, longer)}
    for problem in timed:
        assert timed[problem] >= {*(winners[p] for p in wanted), done_.outcome.winner}


def test_what_is_good_at_each_length_and_best_at_none_is_timed_and_serves_calls_without_hints(
    database: store.Store,
) -> None:
    wanted = of_lengths(256, 1024, 2048)
    known = sweep.candidates(wanted[0], CPU)[5:]
    everywhere = [c for c in known if all(c in sweep.candidates(p, CPU) for p in wanted)]
    steady, short, *others = everywhere[:35]  # short: up to 1024 tokens
    best = [others[:10], others[10:20], others[20:30]]  # by length; more than a playoff takes
    fair = others[30:]
    assert len(fair) == sweep._STEADY

    class Uneven(Bench):
        def measure(self, device: str, problem: DecodeProblem, config: Config, **more: Any) -> Measurement:
            found = super().measure(device, problem, config, **more)
            mine = best[wanted.index(problem)]
            longest = problem == wanted[-1]
            good = {steady: 11.0, short: 15.0 if longest else 10.5, **dict.fromkeys(fair, 12.0)}
            time = 10.0 + mine.index(config) / 100 if config in mine else good.get(config, 20.0)
            return dataclasses.replace(found, median_us=time)

    done = run(wanted, Uneven(), database, how="exhaustive")
    assert all(d.outcome is not None and d.outcome.winner in mine for d, mine in zip(done, best, strict=True))
    for problem in wanted:
        assert steady in {t.config for t in database.trials(problem=problem, effort=sweep.LAST)}
    with settings.scope(tuning_db=database.path):
        plan.forget()
        unhinted = [plan.choose(dataclasses.replace(p, hinted=False), CPU).config for p in wanted[1:]]
    plan.forget()
    assert unhinted == [short, steady]


def test_neighbours_of_what_is_good_at_all_lengths_are_timed_where_it_is_worst(database: store.Store) -> None:
    wanted = of_lengths(256, 1024, 2048)
    known = sweep.candidates(wanted[-1], CPU)
    everywhere = [c for c in known if all(c in sweep.candidates(p, CPU) for p in wanted)]
    spaces = space.load("decode")
    start = max(everywhere, key=lambda c: len(space.neighbours(c, everywhere, spaces)))
    better, mixed, *worse = near = space.neighbours(start, everywhere, spaces)
    assert len(worse) > 3
    best = [c for c in everywhere if c not in (start, *near)][:3]  # of each length

    class Long(Bench):
        def measure(self, device: str, problem: DecodeProblem, config: Config, **more: Any) -> Measurement:
            found = super().measure(device, problem, config, **more)
            times = {start: (10.4, 14.0), better: (10.4, 12.0), mixed: (16.0, 13.0)}  # shorter, longest
            times[best[wanted.index(problem)]] = (10.0, 10.0)
            return dataclasses.replace(found, median_us=times.get(config, (15.0, 15.0))[problem == wanted[-1]])

    bench = Long()
    with contextlib.closing(builds.Builds(CPU)) as made:
        end = time.monotonic() + 60
        filled = sweep._Sweep(
            CPU, bench, database, "auto", True, 60.0, "", None, threading.Event(), end, 1, wanted, 3, made
        )  # fmt: skip
        filled.homes = dict(zip(wanted, ("a", "b", "c"), strict=True))
        for problem, config in itertools.product(wanted, [start, *best]):
            found = filled.measure(problem, "a", config, sweep.LAST)
            filled.keep(problem, "a", "trial", {"config": config, "effort": sweep.LAST, "measurement": found})
        bench.asked.clear()
        filled.settle(wanted[1:])  # the first is of an earlier sweep
        asked = bench.asked.copy()
        filled.settle(wanted)
    assert all(device == filled.homes[problem] for device, problem, _ in asked)
    assert bench.asked == asked
    assert {config for _, problem, config in asked[: len(near)] if problem == wanted[-1]} == set(near)
    elsewhere = [config for _, problem, config in asked if problem != wanted[-1]]
    assert set(elsewhere) == {better, mixed}
    with settings.scope(tuning_db=database.path):
        plan.forget()
        choice = plan.choose(dataclasses.replace(wanted[-1], hinted=False), CPU)
    plan.forget()
    assert choice.config == better


def test_each_family_is_settled_and_a_shape_stays_on_its_device(
    database: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, settled = sweep._Sweep.settle, []

    def settle(self: sweep._Sweep, kin: list[DecodeProblem]) -> None:
        settled.append(list(kin))
        true(self, kin)

    monkeypatch.setattr(sweep._Sweep, "settle", settle)
    bench = Bench()
    few, more = of_lengths(256, 1024), of_lengths(256, 1024, 2048, batch=3)
    run([*few, *more, *problems(5)], bench, database, devices=["a", "b"])
    assert settled == [few, more]
    for problem in (*few, *more):
        assert len({device for device, asked, _ in bench.asked if asked == problem}) == 1
    assert len({device for device, *_ in bench.asked}) == 2
    settled.clear()
    run(of_lengths(4096, batch=3), bench, database)  # one more length of a family
    assert settled == [of_lengths(4096, batch=3)]


def test_a_shape_without_time_for_its_search_is_not_known_as_finished(database: store.Store) -> None:
    class Slow(Bench):
        def measure(self, device: str, problem: DecodeProblem, config: Config, **more: Any) -> Measurement:
            time.sleep(0.03)
            return super().measure(device, problem, config, **more)

    wanted = of_lengths(256, 1024, 2048)
    bench = Slow()
    run(wanted, bench, database, how="exhaustive", budget_s=1.0)
    assert {problem for _, problem, _ in bench.asked} != set(wanted)
    run(wanted, Bench(), database, how="exhaustive")
    for problem in wanted:
        assert {t.config for t in database.trials(problem=problem)} >= set(sweep.candidates(problem, CPU))


@pytest.mark.parametrize(("lengths", "share"), [((256,), 1.0), ((256, 1024), 1.0 - sweep._PLAYOFFS)])
def test_time_for_playoffs_between_lengths_is_kept(
    lengths: tuple[int, ...], share: float, database: store.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, given = search.tune, []

    def tune(*arguments: Any, budget_s: float, **more: Any) -> search.Outcome:
        given.append(budget_s)
        return true(*arguments, budget_s=budget_s, **more)

    monkeypatch.setattr(search, "tune", tune)
    run(of_lengths(*lengths), Bench(), database, budget_s=500.0)
    assert len(given) == len(lengths)
    assert all(share * 500.0 - 60.0 < budget_s <= share * 500.0 for budget_s in given)


def test_neighbours_differ_in_one_row_of_the_space() -> None:
    problem = DecodeProblem(num_heads=16, max_kv_len=4096, hinted=True)
    found = sweep.candidates(problem, HOPPER)
    spaces = space.load("decode")
    *_, one = (c for c in found if c.variant == "decode_narrow_asm")
    near = space.neighbours(one, found, spaces)
    assert len(near) >= 5
    rows = [str(names).split() for names in spaces[one.variant]]
    for other in found:
        changed = {name for name, value in one.items() if other.get(name) != value} - {
            "together"
        }  # for two splits only
        alike = other.variant == one.variant and any(changed and changed <= set(row) for row in rows)
        assert (other in near) == alike
    for heads, batch, length in ((16, 1, 4096), (128, 1, 65536), (128, 16, 16384)):  # however a default is spelt
        problem = dataclasses.replace(problem, num_heads=heads, batch=batch, max_kv_len=length)
        found = sweep.candidates(problem, HOPPER)
        default = next(
            c for c in found if c.variant.startswith("decode_splitk_asm" if heads > 16 else "decode_narrow_asm")
        )
        changed = {
            name
            for other in space.neighbours(default, found, spaces)
            for name, value in default.items()
            if other.get(name) != value and name != "together"
        }
        assert len(changed) > 3, changed


def test_what_serves_short_and_long_sequences_differently_is_not_searched_but_timed_at_each_length() -> None:
    longest = DecodeProblem(num_heads=128, max_kv_len=65536, hinted=True)
    (variant,) = (v for v in ops.variants("decode") if v.any_length)
    mixed = sweep._for_any_length(longest, HOPPER)
    assert len(mixed) > 10
    assert {c.variant for c in mixed} == {variant.name}
    assert variant.name not in {c.variant for c in sweep.candidates(longest, HOPPER)}
    assert sweep._for_any_length(dataclasses.replace(longest, batch=64), HOPPER) == []
    for batch, length in itertools.product((1, 64), (1, 2048, 65536)):  # what compiles ahead asks for any size
        problem = dataclasses.replace(longest, batch=batch, max_kv_len=length)
        assert {variant.rejects(problem, HOPPER, c) for c in mixed} == {None}


def test_configs_for_any_length_are_timed_at_each(database: store.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = of_lengths(256, 1024, 2048)
    every = [c for c in sweep.candidates(wanted[0], CPU) if all(c in sweep.candidates(p, CPU) for p in wanted)]
    monkeypatch.setattr(sweep, "_for_any_length", lambda longest, target: every[-2:] if longest == wanted[-1] else [])
    run(wanted, Bench(), database)
    for problem in wanted:
        assert {t.config for t in database.trials(problem=problem, effort=sweep.LAST)} >= {*every[-2:]}


def test_what_is_best_for_a_like_shape_takes_part(database: store.Store) -> None:
    first, second = of_lengths(256, 512)
    good = max(sweep.candidates(first, CPU), key=lambda c: c.to_json())

    class Fond(Bench):
        def measure(self, device: str, problem: DecodeProblem, config: Config, **more: Any) -> Measurement:
            super().measure(device, problem, config, **more)
            return Measurement("ok", 1.0 if config == good else 5.0, 0.01, 2e-3)

    run([first], Fond(), database, how="exhaustive")
    bench = Fond()
    run([first, second], bench, database)
    assert [config for _, problem, config in bench.asked if problem == second][1] == good


def test_each_mix_of_lengths_is_a_shape() -> None:
    mixes = ["log-uniform", "uniform", "one-long"]

    def made(lengths: list[str], batches: list[int]) -> list[DecodeProblem]:
        return sweep.shapes(
            [(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], batches=batches, kv_lens=[128, 32768], lengths=lengths
        )

    found = made(mixes, [1, 64])
    assert [(p.batch, p.max_kv_len, p.total_kv, p.mix) for p in found] == [
        (64, 32768, 524288, "log-uniform"), (64, 32768, 1048576, "uniform"), (64, 32768, 65536, "one-long"),
    ]  # fmt: skip
    assert made(["ragged"], [64]) == found[:1]
    for problem in found:
        lens = timed_lengths(problem)
        assert len(lens) == 64
        assert 0.97 <= sum(lens) / (problem.total_kv or 0) <= 1.0
    # of two sequences, one long and one short have, as a call rounds them, as many tokens as two long ones
    assert [p.mix for p in made(mixes, [2])] == ["log-uniform", "uniform"]


def test_both_schedulers_compete_where_lengths_are_uneven() -> None:
    for mix in ("log-uniform", "uniform", "one-long"):
        (problem,) = sweep.shapes(
            [(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], batches=[64], kv_lens=[32768], lengths=[mix]
        )
        begun = search.first(problem, HOPPER, sweep.candidates(problem, HOPPER))
        variants = {config.variant for config in begun}
        assert {"decode_splitk_triton", "decode_persistent_triton"} <= variants


def test_ragged_shapes_are_told_by_the_total(database: store.Store) -> None:
    found = sweep.shapes(
        [(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], batches=[1, 64], kv_lens=[128, 32768], lengths=["even", "ragged"]
    )
    assert [(p.batch, p.max_kv_len, p.total_kv) for p in found] == [
        (1, 128, None), (1, 32768, None), (64, 128, None), (64, 32768, None), (64, 32768, 524288),
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match="even, ragged, log-uniform, uniform, one-long"):
        sweep.shapes([(DEEPSEEK, 8)], HOPPER, lengths=["long"])


def test_prompts_of_models_are_whole_or_chunks() -> None:
    def sizes(**axes: Any) -> list[tuple[int, int, int, int, int | None]]:
        found = sweep.prompts([(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], **axes)
        assert {(p.causal, p.hinted, p.lse) for p in found} <= {(axes.get("causal", True), True, False)}
        return [(p.batch, p.q_len, p.total_q, p.max_kv_len, p.total_kv) for p in found]

    assert sizes(batches=[3], kv_lens=[1024, 1500]) == [(3, 1024, 3072, 1024, 4096), (3, 1536, 4608, 2048, 8192)]
    chunks = {"batches": [1], "kv_lens": [1024, 8192], "q_lens": [1024, 4096]}
    assert sizes(**chunks) == [
        (1, 1024, 1024, 1024, 1024), (1, 1024, 1024, 8192, 8192), (1, 4096, 4096, 8192, 8192),
    ]  # fmt: skip
    assert (1, 4096, 4096, 1024, 1024) in sizes(**chunks, causal=False)
    assert sizes(batches=[1], kv_lens=[1024, 1 << 20]) == [(1, 1024, 1024, 1024, 1024)]  # beyond the context
    (whole,) = sweep.prompts([(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], batches=[1], kv_lens=[1024])
    assert whole.data_bytes == 1024 * 16 * (192 + 128 + 192 + 128) * 2
    assert sizes(batches=[1, 4], kv_lens=[1024], memory_bytes=whole.data_bytes) == [(1, 1024, 1024, 1024, 1024)]
    both = sweep.prompts([(DEEPSEEK, 8), (KIMI, 4)], HOPPER, dtypes=["bf16"], batches=[1], kv_lens=[1024])
    assert both == [whole]


def chunks(*kv_lens: int, batch: int = 2, q_len: int = 64) -> list[PrefillProblem]:
    base = PrefillProblem(num_heads=4, num_kv_heads=4, qk_dim=48, v_dim=32)
    return [dataclasses.replace(base, **base.sizes(batch, q_len, n)) for n in kv_lens]


def test_a_sweep_of_prompts_is_stored_chosen_and_not_repeated(database: store.Store) -> None:
    wanted: list[Any] = [*chunks(256, 1024), *problems(2), *chunks(64, batch=1)]
    bench = Bench(faulty="heads=16")
    done = run(wanted, bench, database, devices=["null:0", "null:1"], how="exhaustive")
    assert {d.problem for d in done} == set(wanted)
    for each in done:
        assert each.outcome is not None
        assert each.outcome.stopped == "done"
        assert "heads=16" not in str(each.outcome.winner)
    for problem in (wanted[0], wanted[-1]):
        assert {t.config for t in database.trials(problem=problem)} == set(sweep.candidates(problem, CPU))
    assert {t.op for t in database.trials()} == {"decode", "prefill"}
    with settings.scope(tuning_db=database.path):
        plan.forget()
        for each in done:
            assert each.outcome is not None
            choice = plan.choose(each.problem, CPU)
            assert (choice.config, choice.provenance) == (each.outcome.winner, "measured")
    plan.forget()
    again = Bench()
    assert [d.outcome for d in run(wanted, again, database)] == [None] * len(wanted)
    assert again.asked == []


def test_a_stopped_sweep_of_prompts_goes_on_where_it_was(database: store.Store) -> None:
    (problem,) = wanted = chunks(256)
    stop = threading.Event()
    run(wanted, Bench(stop_after=5, stop=stop), database, how="exhaustive", stop=stop)  # type: ignore[arg-type]
    stored = {(t.config, sweep.EFFORTS[t.effort][0]) for t in database.trials(op="prefill")}
    second = Bench()
    (done,) = run(wanted, second, database, how="exhaustive")  # type: ignore[arg-type]
    assert len(stored) == 5
    assert done.outcome is not None
    assert done.outcome.stopped == "done"
    assert stored.isdisjoint(second.rounds)
    assert {config for config, _ in (*stored, *second.rounds)} == set(sweep.candidates(problem, CPU))


def test_the_best_of_chunks_behind_other_prefixes_are_timed_at_each(database: store.Store) -> None:
    """For a call whose K has more rows than are used; whole prompts of other lengths are other shapes."""

    class ByLength(Bench):
        def measure(self, device: str, problem: Any, config: Config, **more: Any) -> Measurement:
            found = super().measure(device, problem, config, **more)
            apart = abs(math.log2(config.int("block_n")) - math.log2(problem.max_kv_len / 4))
            assert found.median_us is not None
            return dataclasses.replace(found, median_us=found.median_us * (1 + 20 * apart))

    wanted = chunks(256, 1024, 2048)
    whole = chunks(64)
    done = run([*wanted, *whole], ByLength(), database, how="exhaustive")  # type: ignore[list-item]
    winners = {d.problem: d.outcome.winner for d in done if d.outcome is not None}
    assert len({winners[p] for p in wanted}) == 3
    for problem in (*wanted, *whole):  # all are of one family: as many queries, other keys
        timed = {t.config for t in database.trials(problem=problem, effort=sweep.LAST)}
        assert timed >= {winners[p] for p in (*wanted, *whole)}
    unknown = dataclasses.replace(wanted[-1], hinted=False, max_kv_len=4096)
    with settings.scope(tuning_db=database.path):
        plan.forget()
        assert "steady over kv 64, 256, 1024, 2048" in plan.choose(unknown, CPU).why
    plan.forget()
    other = chunks(2048, q_len=128)
    run(other, ByLength(), database, how="exhaustive")  # type: ignore[arg-type]
    assert {t.problem for t in database.trials(config=winners[wanted[0]], effort=sweep.LAST)}.isdisjoint(other)


def test_what_is_best_for_a_prompt_takes_part_for_longer_ones(database: store.Store) -> None:
    """Whole prompts are kin though their queries are as many as their keys: they take the same kernels."""
    first, second = chunks(64)[0], chunks(128, q_len=128)[0]
    good = max(sweep.candidates(first, CPU), key=lambda c: c.to_json())

    class Fond(Bench):
        def measure(self, device: str, problem: Any, config: Config, **more: Any) -> Measurement:
            super().measure(device, problem, config, **more)
            return Measurement("ok", 1.0 if config == good else 5.0, 0.01, 2e-3)

    run([first], Fond(), database, how="exhaustive")  # type: ignore[list-item]
    bench = Fond()
    run([first, second], bench, database)  # type: ignore[list-item]
    asked: list[Config] = [config for _, problem, config in bench.asked if problem == second]  # type: ignore[comparison-overlap]
    assert asked[1] == good


def test_a_kernel_that_is_refused_is_never_measured_and_asked_for_once(database: store.Store) -> None:
    """On a target whose toolchain always fails."""
    asked: list[Source] = []

    class Failing(builds.Builds):
        def __init__(self) -> None:
            super().__init__(HOPPER)

    def refuse(source: Source, **_: Any) -> Any:
        asked.append(source)
        if "combine" in source.name:
            return None, "disk"
        raise CompilerAborted("the compiler was ended by SIGABRT", key=source.key)

    (problem,) = sweep.shapes([(DEEPSEEK, 8)], HOPPER, dtypes=["bf16"], batches=[1], kv_lens=[1024])
    bench = Bench()
    with pytest.MonkeyPatch.context() as patch, Failing() as compiling:
        patch.setattr(farm.cache, "build_traced", refuse)
        (done,) = run([problem], bench, database, devices=["null:0"], where=HOPPER, builds=compiling)
    assert done.outcome is not None
    assert bench.asked == []
    assert len(asked) == len(set(asked)) > 1
    assert {status for _, status, _ in done.outcome.faults} == {"compiler_abort"}
    assert {t.status for t in database.trials()} == {"compiler_abort"}
